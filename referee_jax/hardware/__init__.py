"""Hardware: what the program runs on."""
