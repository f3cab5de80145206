"""Storage: bytes on a disk or in a bucket."""
