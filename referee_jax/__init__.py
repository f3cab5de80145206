"""referee_jax: pictures from frozen vision-language referees, by model inversion (arXiv 2402.16305).

The house, from the top: run (the command line; command, progress) -> generation (batch after batch: queue, checkpoint, outputs)
-> inverter (networks and one compiled program; assembly) -> inversion (the method for one prompt) -> objective, sds, views, optim
(its parts) -> referees -> models (the networks). weights fills the networks from checkpoints; shapes is the embedded world that
everything runs on without a download; cost and bench say what it all takes.

    import referee_jax
    inverter = referee_jax.Inverter.from_config(referee_jax.load_config("configs/shapes.py"))
    result = inverter(["a red circle and a blue square"], samples=2, seed=0)
    result.images, result.scores, result.latents, result.history
"""

from referee_jax.config import load as load_config
from referee_jax.engine.inverter import Inverter, Result
from referee_jax.referees import load_referee

__all__ = ["Inverter", "Result", "load_config", "load_referee"]
__version__ = "0.1.0"
