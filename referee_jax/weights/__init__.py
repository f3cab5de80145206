"""Weights of published checkpoints: `convert` puts tensors into networks, `load` finds and reads them, `lavis` converts files."""
