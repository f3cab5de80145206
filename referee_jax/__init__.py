"""referee_jax: pictures from frozen vision-language referees, by model inversion ("Referee Can Play", arXiv 2402.16305).

The house, from the top: run (the command line) -> inverter (networks and one compiled program) -> inversion (the method for
one prompt) -> objective, sds, views, optim (its parts) -> referees -> models (the networks). weights fills the networks from
checkpoints; shapes is the embedded world that everything runs on without a download.

    from referee_jax import Inverter, load_config
    inverter = Inverter.from_config(load_config("configs/shapes.py"))
    result = inverter(["a red circle and a blue square"], samples=2, seed=0)
"""

__version__ = "0.1.0"
