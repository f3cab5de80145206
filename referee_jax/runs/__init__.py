"""Runs: which process makes which images, and when."""
