"""Performance: what a config costs, and what its programs do."""
