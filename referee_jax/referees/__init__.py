"""Referees: frozen vision-language models that judge an image.

A `Judge` is the host's handle on one (tokenizer, settings, network); its `referee` is the pytree that compiled programs take.
"""

from referee_jax.referees.judge import Judge
from referee_jax.referees.registry import REFEREES, build, load_referee, name_of

__all__ = ["REFEREES", "Judge", "build", "load_referee", "name_of"]
