"""The contract between a run and its engine."""

import inspect

import pytest

from referee_jax import config
from referee_jax.engine import inverter
from referee_jax.performance import abstract_networks
from referee_jax.runs import worker
from tests.fakes import FakeInverter

DATA = worker.Engine.__annotations__
METHODS = {name: x for name, x in vars(worker.Engine).items() if inspect.isfunction(x) and not name.startswith("_")}


@pytest.fixture(scope="module")
def engines():
    """One of each class; the real one of abstract networks."""
    settings = config.load("configs/shapes.py")
    sized = abstract_networks.abstract(settings)
    return [FakeInverter(settings), inverter.Inverter(settings, sized.prior, sized.judges)]


def test_engines_keep_the_contract(engines):
    """Each member is there, and a method can be called with the protocol's arguments, by position or name."""
    assert {"steps", "batch_size"} <= DATA.keys() and {"check", "advance", "finish"} <= METHODS.keys()
    for engine in engines:
        for name, kind in DATA.items():
            assert isinstance(getattr(engine, name), kind), name
        for name, method in METHODS.items():
            parameters = list(inspect.signature(method).parameters.values())[1:]
            theirs = list(inspect.signature(getattr(engine, name)).parameters.values())
            assert [(x.name, x.kind) for x in theirs[: len(parameters)]] == [(x.name, x.kind) for x in parameters], name
            assert all(x.default is not x.empty for x in theirs[len(parameters) :]), name
