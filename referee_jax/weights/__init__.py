"""Weights of published checkpoints.

`load` finds and reads them, `convert` puts tensors into networks, `lavis` converts authors' files.
"""
