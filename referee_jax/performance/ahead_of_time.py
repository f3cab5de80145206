"""Compiles a config's program for an absent TPU slice: does it fit, does it communicate, how fast is it?

libtpu (the extra `[tpu]`) describes any slice to jax.experimental.topologies on any Linux machine,
and compiles for it. Weights are abstract, so no checkpoint is needed. Compiling networks of Stable
Diffusion's size takes minutes and a few GB of memory.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies  # nothing public describes absent devices

from referee_jax import config
from referee_jax.engine import capacity, inverter, parallel
from referee_jax.hardware import chips
from referee_jax.performance import abstract_networks, cost, hlo
from referee_jax.weights import generators

GIB = 2**30
# No chip is touched, so libtpu needs neither a metadata server nor to be the only process that uses it.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class TopologyError(ValueError):
    """A slice that cannot be compiled for, in one sentence."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of compiling. Bytes are of one chip's HBM; None is unknown, for a program that does not fit.

    Attributes:
        topology: the slice's name.
        chips: how many it has.
        model: chips of a group, over which the weights are split (`config.mesh.model`).
        batch: images of a group at once.
        fits: whether the program fits in a chip's memory.
        needed: bytes in all.
        weights: bytes of the networks on a chip, the text encoders that stay there included.
        texts: bytes of those among them, which an iteration does not read.
        flops: FLOPs of one image in a full iteration, rematerialised work (`remat`) included.
        useful: FLOPs of a whole image with its start and end, without rematerialised work.
        floor: seconds that the useful work takes at the peak of the chips of a group.
        remat: what is rematerialised, as in the settings.
        most: images of the largest batch that fits, as cost.py estimates.
        collectives: instructions by which chips exchange data.
        strays: groups of chips among which they do and that are not of one group.
        seconds: of a whole image, by the estimated cycles.
        uncounted: loops with an unknown number of trips, which count once.
        compiling: seconds of compilation.
    """

    topology: str
    chips: int
    batch: int
    fits: bool
    needed: int | None
    weights: int
    texts: int
    flops: float
    useful: float
    floor: float
    remat: str
    most: int
    model: int = 1
    collectives: list[str] | None = None
    strays: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    seconds: float | None = None
    uncounted: int = 0
    compiling: float = 0.0

    def lines(self) -> list[str]:
        """Lines for people."""
        chip = _chip(self.topology)
        needed = "more" if self.needed is None else f"{'' if self.fits else 'at least '}{self.needed / GIB:.2f} GiB"
        each = "chip" if self.model == 1 else f"group of {self.model} chips"
        groups = self.chips // self.model
        lines = [
            f"{self.topology}: {self.chips} chips, {self.batch} images a {each}, {groups * self.batch} at once",
            f"memory: {needed} of the {chip.memory:g} GiB of a chip, weights {self.weights / GIB:.2f} GiB: "
            + ("fits" if self.fits else "does not fit; the remedies are a smaller --config.batch_size and bfloat16"),
            f"at most {self.most} images a {each} fit, by the estimate of cost.py (remat={self.remat})",
            f"work: {self.flops / 1e12:.3g} TFLOP for an iteration of an image; {self.useful / 1e12:.4g} for an image without "
            f"what remat makes again, at least {self.floor:.3g} s of the {each}",
        ]
        if self.collectives is not None:
            among = (
                f"; NOT within a group: {self.strays[:3]}"
                if self.strays
                else " (within a group)" * bool(self.collectives)
            )
            lines.append(f"collectives: {', '.join(sorted(set(self.collectives))) or 'none'}{among}")
        if self.seconds is not None:
            rate = 3600 / self.seconds
            lines.append(
                f"time, by the compiler's estimated cycles: {self.seconds:.3g} s an image on each {each}, {rate:.0f} "
                f"images an hour, {rate * groups:.0f} in all"
                + (f" ({self.uncounted} loops counted once)" if self.uncounted else "")
            )
        return [*lines, f"compiled in {self.compiling:.0f} s"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def _chip(name: str) -> chips.Chip:
    match = re.fullmatch(r"(\w+):\d+x\d+(x\d+)?", name)
    if not match or match[1] not in chips.TPUS:
        raise TopologyError(f"{name!r} is no slice, as v5e:16x16 or v4:4x4x4 are; there are {', '.join(chips.TPUS)}")
    return chips.TPUS[match[1]]


def devices(name: str) -> list[jax.Device]:
    """The devices of a slice, such as `v5e:2x4`, to compile for, not to run on. Raises TopologyError."""
    layout = _chip(name).layout
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError('the compiler for TPUs is not installed: pip install -e ".[tpu]"')
    jax.config.update("jax_platforms", "cpu")  # otherwise libtpu becomes the default device
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        options = {"chip_config_name": layout} if layout else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise TopologyError(f"libtpu does not describe {name}: {str(error).splitlines()[0]}") from error


def unloaded(settings: config.Settings, targets: Sequence[jax.Device], memory: int | None = None) -> inverter.Inverter:
    """The engine with abstract networks, on devices with `memory` bytes each.

    Raises ConfigError, and WeightsError for a checkpoint of unknown sizes.
    """
    return _engine(settings, abstract_networks.abstract(settings), targets, memory)


def _engine(
    settings: config.Settings, sized: abstract_networks.Sized, targets: Sequence[jax.Device], memory: int | None
) -> inverter.Inverter:
    decided = capacity.fitting(settings, sized.prior, sized.judges, memory)
    return inverter.Inverter(decided, sized.prior, sized.judges, targets)


def compile_for(settings: config.Settings, name: str) -> Report:
    """Compiles the program of an iteration for a slice. Raises TopologyError, and the errors of `unloaded`."""
    chip, targets = _chip(name), devices(name)
    sized = abstract_networks.abstract(settings)
    engine = _engine(settings, sized, targets, int(chip.bytes))
    batch, decided = engine.shapes(), engine.settings
    useful = cost.estimate(dataclasses.replace(settings, remat="none"))
    most = dataclasses.replace(decided, batch_size=0)
    texts = _share(parallel.place(generators.resident(sized.prior.text_encoder), engine.mesh, batched=False))
    report = Report(
        topology=name,
        chips=len(targets),
        model=settings.mesh.model,
        batch=decided.batch_size,
        fits=False,
        needed=None,
        weights=texts + _share(engine.networks),
        texts=texts,
        flops=cost.step_flops(engine, batch),
        useful=useful.image,
        floor=useful.seconds(chip),
        remat=decided.remat,
        most=capacity.fitting_batch(most, sized.prior, sized.judges, int(chip.bytes)),
    )
    lowered, start = engine.trace(batch).lower(), time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not chips.is_out_of_memory(error):
            raise
        return dataclasses.replace(report, needed=_needed(str(error)), compiling=time.monotonic() - start)
    return measured(report, compiled, settings.steps, chip, time.monotonic() - start)


def _share(networks: Any) -> int:
    """Bytes that a chip holds of networks that are placed on the chips."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(networks))


def measured(report: Report, compiled: jax.stages.Compiled, steps: int, chip: chips.Chip, seconds: float) -> Report:
    """The report with the numbers of a compiled program, of which an image takes `steps` iterations."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + report.texts
    cycles = hlo.cycles(text, chip.logits)
    strays = [group for group in hlo.exchanging(text) if len({chip // report.model for chip in group}) > 1]
    return dataclasses.replace(
        report,
        fits=needed <= chip.bytes,
        needed=needed,
        collectives=hlo.collectives(text),
        strays=sorted(strays),
        seconds=cycles.total * steps / report.batch / (chip.clock * 1e9),
        uncounted=len(cycles.uncounted),
        compiling=seconds,
    )


def _needed(refusal: str) -> int | None:
    """Bytes that a refused program needs: "Used 20.31G of 15.75G hbm", "memory (23.01G) exceeds available HBM"."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    match = re.search(r"(?:Used |\()([\d.]+)([KMG])(?: of |\) exceeds )", refusal)
    return int(float(match[1]) * units[match[2]]) if match else None
