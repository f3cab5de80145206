"""Referees: frozen vision-language models that judge an image.

A `Referee` is the pytree that compiled programs take; its `Judge` holds it, tokenizer and settings.
"""

from referee_jax.referees.judge import Judge
from referee_jax.referees.registry import REFEREES, build, load_referee, name_of

__all__ = ["REFEREES", "Judge", "build", "load_referee", "name_of"]
