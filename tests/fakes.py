"""An engine without networks, and what tests of runs ask with it."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib

import numpy as np
from absl import flags
from PIL import Image

from referee_jax import run
from referee_jax.hardware import chips
from referee_jax.items import Item, Part
from referee_jax.performance import cost
from referee_jax.runs import command as command_lib
from referee_jax.storage import images, run_directory

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "paper.py"

_running = cost.running


def running(engine, batch):
    """`cost.running`, which counts a program; a fake engine has none."""
    if isinstance(engine, FakeInverter):
        return cost.Running(2_000_000, 3_000_000_000, chips.TPUS["v5e"], count=lambda: 1.5e12)
    return _running(engine, batch)


cost.running = running


@dataclasses.dataclass(frozen=True)
class Batch:
    items: tuple
    seed: int
    step: int = 0
    begun: np.ndarray = None
    prompt: None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    item: Item
    image: np.ndarray
    scores: dict
    latents: np.ndarray
    status: str = "done"
    losses: dict | None = None
    questions: dict = dataclasses.field(default_factory=dict)


class FakeInverter:
    """The engine's methods; an image is one colour, of the prompt, the sample and the seed. Fails as `failures` say."""

    devices, compiling = "fake x 1", "compiling for fake x 1, 3 images at once"

    def __init__(self, settings, failures=()):
        self.steps, self.chunk, self.batch_size, self.groups = settings.steps, settings.chunk, 3, 1
        self.settings = dataclasses.replace(settings, batch_size=3)
        self.failures, self.compiled, self.calls, self.begun, self.resumed = dict(failures), False, 0, [], []

    def check(self, prompt, negative=None):
        return "99 tokens, the prior reads 77" if "too long" in prompt else None

    def asking(self, questions):
        self.questions = questions
        return self

    def begin(self, items, seed, *, look=None):
        self.begun.append(tuple(items))
        return Batch(tuple(items), seed)

    def shapes(self):
        return Batch((), 0)

    def trace(self, batch):
        return None

    def ahead(self):
        return contextlib.nullcontext()

    def snapshot(self, batch):
        return Part(batch.items, batch.step, {"prompt": np.array([item.prompt_id for item in batch.items])})

    def resume(self, part, seed):
        assert part.state["prompt"].tolist() == [item.prompt_id for item in part.items]
        self.resumed.append((part.items, part.step))
        return Batch(part.items, seed, part.step)

    def halved(self):
        return None if self.batch_size == 1 else self.at_once(self.batch_size // 2)

    def at_once(self, size):
        self.batch_size = size
        self.settings = dataclasses.replace(self.settings, batch_size=size)
        return self

    def advance(self, batch):
        self.calls += 1
        self.compiled = True
        if failure := self.failures.get(self.calls):
            if callable(failure) and not isinstance(failure, type):
                failure()
            else:
                raise failure
        count = min(self.chunk, self.steps - batch.step)
        loss = np.tile(np.arange(batch.step, batch.step + count, dtype=np.float32), (len(batch.items), 1))
        return dataclasses.replace(batch, step=batch.step + count), {"loss": loss, "norm": np.full_like(loss, np.nan)}

    def preview(self, batch):
        return np.full((len(batch.items), 8, 8, 3), batch.step, np.uint8)

    def finish(self, batch):
        pictures = []
        for item in batch.items:
            seed = batch.seed if item.seed is None else item.seed
            colour = hashlib.sha256(f"{item.prompt} {item.sample} {seed}".encode()).digest()[:3]
            image = np.broadcast_to(np.frombuffer(colour, np.uint8) / np.float32(255), (8, 8, 3))
            score = float("nan") if "broken" in item.prompt else 0.5
            losses = {"referee": (2.0, 1.0), "held_out": (0.5, 0.75)} if "hacked" in item.prompt else None
            pictures.append(Picture(item, image, {"cosine": score}, np.zeros((1, 1, 4)), losses=losses))
        return pictures


def command(*arguments, path=CONFIG):
    argv = ["run", f"--config={path}", *map(str, arguments)]
    values = flags.FlagValues()
    return command_lib.read_command(values, command_lib.parse_flags(argv, values)[1:])


def execute(*arguments, failures=(), stop=None, path=CONFIG):
    """Exit code and engine (None where it was not loaded)."""
    engines = []

    def load(settings):
        engines.append(FakeInverter(settings, failures))
        return engines[-1]

    code = run.main(command("--config.steps=25", *arguments, path=path), load=load, stop=stop)
    return code, engines[0] if engines else None


def pixels(path):
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in (path / "images").iterdir()}


def colours(path):
    return {x.name: Image.open(x).getpixel((0, 0)) for x in (path / "images").iterdir()}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def shown(path):
    """Id -> colour of all finished images, wherever they are."""
    records = run_directory.read_journal(path)
    return {x["id"]: images.read_image(path / x["file_name"]).getpixel((0, 0)) for x in records}
