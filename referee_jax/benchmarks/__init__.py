"""Fixed prompt lists and their scores."""
