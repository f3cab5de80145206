"""The contract between a run and its engine."""

import inspect

import pytest

from referee_jax import config, run
from referee_jax.engine import inverter
from referee_jax.hardware import chips
from referee_jax.performance import abstract_networks, cost
from referee_jax.runs import job, worker
from tests.fakes import ROOT, FakeInverter, command, execute

DATA = worker.Engine.__annotations__
METHODS = {name: x for name, x in vars(worker.Engine).items() if inspect.isfunction(x) and not name.startswith("_")}


@pytest.fixture(scope="module")
def engines():
    """One of each class; the real one of abstract networks."""
    settings = config.load("configs/shapes_clip.py")
    sized = abstract_networks.abstract(settings)
    return [FakeInverter(settings), inverter.Inverter(settings, sized.prior, sized.judges)]


@pytest.mark.parametrize(
    ("memory", "size", "message"),
    [
        (None, 8, None),
        (10**10, 8, None),
        (
            10**8,
            8,
            "8 images of 64 x 64 pixels at once need about 258 MB of memory, this machine has 100 MB; --config.batch_size=2",
        ),
        (5 * 10**7, 4096, "; choose a smaller --config.image_size"),
    ],
)
@pytest.mark.parametrize("work", [job.execute, job.warm_up])
def test_what_is_too_large_for_the_machine_is_said_at_once(tmp_path, monkeypatch, capsys, work, memory, size, message):
    """Before anything is compiled."""
    running = cost.Running(36 * 10**6, 222 * 10**6 * size // 8, None, count=lambda: 1e12)
    monkeypatch.setattr(cost, "running", lambda engine, batch: running)
    monkeypatch.setattr(chips, "machine_memory", lambda: memory)
    engines = []
    load = lambda settings: engines.append(FakeInverter(settings).at_once(size)) or engines[-1]
    asked = command(
        "--prompt=a", f"--samples={size}", f"--config.batch_size={size}", f"--workdir={tmp_path}",
        path=ROOT / "configs" / "shapes_clip.py",
    )  # fmt: skip
    assert run.main(asked, load=load, work=work) == (2 if message else 0)
    assert bool(engines[0].begun) != bool(message) and (message or "") in capsys.readouterr().err


def test_simulated_devices_share_the_machines_memory(tmp_path, monkeypatch, capsys):
    """Each holds the networks and a batch of its own: on eight, eight times as much is needed."""
    running = cost.Running(36 * 10**6, 222 * 10**6, None, count=lambda: 1e12)
    monkeypatch.setattr(cost, "running", lambda engine, batch: running)

    def load(settings):
        engine = FakeInverter(settings).at_once(8)
        engine.groups = 8
        return engine

    for memory, advice in ((10**9, "--config.batch_size=3 fits"), (2 * 10**8, "simulate fewer than 8 devices")):
        monkeypatch.setattr(chips, "machine_memory", lambda memory=memory: memory)
        asked = command(
            "--prompt=a", "--samples=64", "--config.batch_size=8", f"--workdir={tmp_path}",
            path=ROOT / "configs" / "shapes_clip.py",
        )  # fmt: skip
        assert run.main(asked, load=load) == 2
        said = capsys.readouterr().err
        assert "64 images of 64 x 64 pixels at once need about 2.06 GB" in said and advice in said


def test_a_machine_has_what_its_container_has(tmp_path):
    whole = chips.machine_memory(tmp_path)
    for name, content, expected in (
        ("memory.max", "max\n", whole),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", whole),
        ("memory.max", "1000000\n", 10**6),
    ):
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        assert chips.machine_memory(tmp_path) == expected


def test_more_images_than_a_disk_holds_are_refused_at_once(tmp_path, capsys):
    code, engine = execute("--prompt=a", "--samples=100000000000", f"--workdir={tmp_path}")
    assert (code, engine) == (2, None) and "100000000000 images need about" in capsys.readouterr().err


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
