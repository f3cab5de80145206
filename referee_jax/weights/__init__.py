"""Weights of published checkpoints.

`load` finds and reads networks, `generators` those of a generator, `convert` puts tensors into
networks, `lavis` converts authors' files.
"""
