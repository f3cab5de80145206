"""referee_jax: images from frozen vision-language referees, by model inversion (arXiv 2402.16305).

The rooms, from the top (docs/architecture.md has the table of who may import whom):

    run score evaluate sweep bench doctor gallery    commands        networks    each network alone
    ray         tables of prompts on a Ray cluster, a command and a room
    runs        which process makes which images, and when
    performance what a config costs          benchmarks  prompt lists and their scores
    engine      networks and compiled programs on devices      shapes  the embedded world
    referees    models that judge            storage     bytes on a disk or in a bucket
    config      every setting                cli         what all commands share
    method      the paper, for one prompt    weights     checkpoints to networks
    models      the networks                 hardware    chips, devices, processes

    import referee_jax
    inverter = referee_jax.Inverter.from_config(referee_jax.load_config("configs/shapes.py"))
    result = inverter(["a red circle and a blue square"], samples=2, seed=0)
    result.images, result.scores, result.latents, result.history
"""

# ruff: noqa: E402
from referee_jax.hardware import interrupts

interrupts.guard()  # what follows takes seconds

from referee_jax.config import load as load_config
from referee_jax.engine.inverter import Inverter
from referee_jax.engine.results import Result
from referee_jax.referees import load_referee

__all__ = ["Inverter", "Result", "load_config", "load_referee"]
__version__ = "0.1.0"
