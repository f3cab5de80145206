"""`python -m referee_jax.run` with the engine of fakes.py: a program, for tests of several processes."""

import functools

from absl import app

from referee_jax import run
from tests import fakes

if __name__ == "__main__":
    run.main = functools.partial(run.main, load=fakes.FakeInverter)
    app.run(run._absl_main, flags_parser=run._absl_flags)
