"""Many prompts on a Ray cluster: a table of prompts in, a table of pictures out."""
