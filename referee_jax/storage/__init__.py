"""Storage of runs on a disk or in a bucket."""
