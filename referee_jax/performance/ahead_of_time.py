"""A config's program compiled for a TPU slice that is not there: does it fit, does it communicate, how long might it take.

libtpu (the extra `[tpu]`) describes any slice to jax.experimental.topologies on any Linux machine, and compiles for it. Weights
are abstract, so no checkpoint is needed. The compiler takes minutes for a network of Stable Diffusion's size,
and a few GB of memory.
"""

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies  # nothing public describes devices that are not there

from referee_jax import config
from referee_jax.engine import capacity, inverter
from referee_jax.hardware import chips
from referee_jax.performance import abstract_networks, cost, hlo

GIB = 2**30
# libtpu asks no metadata server which TPU this is, and does not insist on being the only one to use it: no chip is touched.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class TopologyError(ValueError):
    """A slice that cannot be compiled for; one sentence."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What compiling said. Bytes are of one chip's HBM; what a program that does not fit leaves unknown is None.

    Attributes:
        topology: its name, and the number of `chips`.
        batch: images per chip.
        needed, weights: bytes of all, and of the networks alone.
        flops: of one image in a full iteration, with what is made again to save memory (`remat`).
        useful: operations of an image, its start and end included, without what is made again.
        most: images of the largest batch that would fit, by cost.py's estimate.
        collectives: instructions by which chips exchange data.
        surprises: what a fast program does not have (hlo.py).
        seconds: of an image, all iterations, by the estimated cycles; and of the useful work at the chip's peak, `floor`.
        uncounted: loops that were counted once, since their trips are not known.
        compiling: seconds that it took.
    """

    topology: str
    chips: int
    batch: int
    fits: bool
    needed: int | None
    weights: int
    flops: float
    useful: float
    floor: float
    remat: str
    most: int
    collectives: list[str] | None = None
    surprises: list[hlo.Surprise] | None = None
    seconds: float | None = None
    uncounted: int = 0
    compiling: float = 0.0

    def lines(self) -> list[str]:
        """For reading."""
        chip = _chip(self.topology)
        needed = "more" if self.needed is None else f"{'' if self.fits else 'at least '}{self.needed / GIB:.2f} GiB"
        told = [
            f"{self.topology}: {self.chips} chips, {self.batch} images a chip, {self.chips * self.batch} at once",
            f"memory: {needed} of the {chip.memory:g} GiB of a chip, weights {self.weights / GIB:.2f} GiB: "
            + ("fits" if self.fits else "does not fit; the remedies are a smaller --config.batch_size and bfloat16"),
            f"at most {self.most} images a chip fit, by the estimate of cost.py (remat={self.remat})",
            f"work: {self.flops / 1e12:.3g} TFLOP for an iteration of an image; {self.useful / 1e12:.4g} for an image without "
            f"what remat makes again, at least {self.floor:.3g} s of the chip",
        ]
        if self.collectives is not None:
            told.append(f"collectives: {', '.join(sorted(set(self.collectives))) or 'none'}")
        told += [f"not of a fast program: {surprise.line()}" for surprise in self.surprises or ()]
        if self.seconds is not None:
            rate = 3600 / self.seconds
            told.append(
                f"time, by the compiler's estimated cycles: {self.seconds:.3g} s an image on each chip, {rate:.0f} images an "
                f"hour and chip, {rate * self.chips:.0f} in all"
                + (f" ({self.uncounted} loops counted once)" if self.uncounted else "")
            )
        return [*told, f"compiled in {self.compiling:.0f} s"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


def _chip(name: str) -> chips.Chip:
    match = re.fullmatch(r"(\w+):\d+x\d+(x\d+)?", name)
    if not match or match[1] not in chips.TPUS:
        raise TopologyError(f"{name!r} is no slice, as v5e:16x16 or v4:4x4x4 are; there are {', '.join(chips.TPUS)}")
    return chips.TPUS[match[1]]


def devices(name: str) -> list[jax.Device]:
    """The devices of a slice, `v5e:2x4` say: to compile for, not to run on. Raises TopologyError."""
    layout = _chip(name).layout
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError('the compiler for TPUs is not installed: pip install -e ".[tpu]"')
    jax.config.update("jax_platforms", "cpu")  # libtpu would else be the device that all runs on
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        options = {"chip_config_name": layout} if layout else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise TopologyError(f"libtpu does not describe {name}: {str(error).splitlines()[0]}") from error


def unloaded(settings: config.Settings, there: Sequence[jax.Device], memory: int | None = None) -> inverter.Inverter:
    """The engine with abstract networks on devices with so many bytes of `memory`.

    Raises ConfigError; WeightsError for a checkpoint of unknown sizes.
    """
    return _engine(settings, abstract_networks.abstract(settings), there, memory)


def _engine(
    settings: config.Settings, sized: abstract_networks.Sized, there: Sequence[jax.Device], memory: int | None
) -> inverter.Inverter:
    decided = capacity.fitting(settings, sized.prior, sized.judges, memory)
    return inverter.Inverter(decided, sized.prior, sized.judges, there)


def compile_for(settings: config.Settings, name: str) -> Report:
    """Compiles the program of an iteration for a slice. Raises TopologyError, and what `unloaded` does."""
    chip, there = _chip(name), devices(name)
    sized = abstract_networks.abstract(settings)
    engine = _engine(settings, sized, there, int(chip.bytes))
    batch, decided = engine.shapes(), engine.settings
    useful = cost.estimate(dataclasses.replace(settings, remat="none"))
    most = dataclasses.replace(decided, batch_size=0)
    report = Report(
        topology=name, chips=len(there), batch=decided.batch_size, fits=False, needed=None, flops=cost.step_flops(engine, batch),
        weights=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(engine.networks)), useful=useful.image,
        floor=useful.seconds(chip), remat=decided.remat,
        most=capacity.fitting_batch(most, sized.prior, sized.judges, int(chip.bytes)),
    )  # fmt: skip
    lowered, begun = engine.trace(batch).lower(), time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not chips.is_out_of_memory(error):
            raise
        return dataclasses.replace(report, needed=_asked(str(error)), compiling=time.monotonic() - begun)
    return measured(report, compiled, settings.steps, chip, time.monotonic() - begun)


def measured(report: Report, compiled: jax.stages.Compiled, steps: int, chip: chips.Chip, seconds: float) -> Report:
    """The report with what a compiled program says; an image takes so many `steps`."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = hlo.cycles(text)
    return dataclasses.replace(
        report,
        fits=True,
        needed=needed + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        collectives=hlo.collectives(text),
        surprises=hlo.surprises(text),
        seconds=found.total * steps / report.batch / (chip.clock * 1e9),
        uncounted=len(found.uncounted),
        compiling=seconds,
    )


def _asked(refusal: str) -> int | None:
    """Bytes that the compiler asked for: "Used 20.31G of 15.75G hbm", "the total memory (23.01G) exceeds available HBM"."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    match = re.search(r"(?:Used |\()([\d.]+)([KMG])(?: of |\) exceeds )", refusal)
    return int(float(match[1]) * units[match[2]]) if match else None
