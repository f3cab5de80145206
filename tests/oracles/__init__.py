"""Oracles in plain torch that tests compare the JAX implementation with."""
