"""What the log says, to TensorBoard and Weights & Biases as well (extra [logging])."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from referee_jax.runs.command import CommandError
from referee_jax.storage import run_directory

Write = Callable[[dict[str, float], int], None]  # of numbers by name, at an iteration
PROJECT = "referee_jax"  # of Weights & Biases; WANDB_PROJECT names another


class Listener:
    """Writes the numbers of the log's lines, over the iterations of this process's batches, one batch behind the other."""

    def __init__(self, write: Write):
        self.write, self.iteration, self.step = write, 0, 0

    def __call__(self, line: Mapping[str, Any]) -> None:
        if line["event"] == "chunk":
            self.iteration += line["step"] - (self.step if line["step"] > self.step else 0)
            self.step = line["step"]
            # NaN: a metric that the chunk did not measure, or an image that is frozen.
            values = {name: np.asarray(x, float) for name, x in line["metrics"].items()}
            means = {name: float(x[~np.isnan(x)].mean()) for name, x in values.items() if not np.isnan(x).all()}
            self.write(means, self.iteration)
        elif line["event"] == "end":
            numbers = {f"end/{name}": float(line[name]) for name in ("images", "skipped", "nonfinite", "seconds")}
            self.write(numbers, self.iteration)


def attach(run: run_directory.RunDirectory, names: tuple[str, ...]) -> Callable[[], None]:
    """Has what is logged written by the writers of these names, too; returns what ends them. Raises CommandError."""
    opened = [WRITERS[name](run) for name in names]
    run.listeners += [Listener(write) for write, _ in opened]

    def close() -> None:
        for _, end in opened:
            end()

    return close


def _tensorboard(run: run_directory.RunDirectory) -> tuple[Write, Callable[[], None]]:
    if run.storage.is_remote:
        raise CommandError("--writers=tensorboard needs a --workdir on a disk; wandb writes from anywhere")
    try:
        import tensorboardX
    except ImportError as error:
        raise CommandError("--writers=tensorboard needs the extra [logging]") from error
    writer = tensorboardX.SummaryWriter(str(run.path / "tensorboard" / str(run.process)))

    def write(values: dict[str, float], iteration: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)

    return write, writer.close


def _wandb(run: run_directory.RunDirectory) -> tuple[Write, Callable[[], None]]:
    try:
        import wandb
    except ImportError as error:
        raise CommandError("--writers=wandb needs the extra [logging]") from error
    title = run.storage.title
    one = wandb.init(
        project=wandb.setup().settings.project or PROJECT, group=title, name=f"{title}-{run.process}",
        dir=str(run.path), config={"fingerprint": run.fingerprint},
    )  # fmt: skip
    return lambda values, iteration: one.log(values, step=iteration), one.finish


WRITERS = {"tensorboard": _tensorboard, "wandb": _wandb}
