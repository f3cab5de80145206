"""The method, for one prompt, pure."""
