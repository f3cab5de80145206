"""Is this machine ready for a run? Looks at all that a run needs, and says beside what is wrong how it is put right.

    python -m referee_jax.doctor
    python -m referee_jax.doctor --config=configs/clip.py --prompts=prompts.txt --workdir=runs/mine

Takes the flags of referee_jax.run, whose command it examines without beginning it. `--json` prints the same for programs.

    python -m referee_jax.doctor --compile-for=v5e:16x16 --config=configs/tpu_pod.py

compiles the program of a config for a TPU slice, on any Linux machine with the extra `[tpu]` and without the checkpoints: does it
fit, does it communicate, how long might an image take (topology.py). Exit codes: 0 nothing is wrong, 1 something is.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from absl import app, flags, logging
from huggingface_hub import constants, errors
from packaging import requirements

from referee_jax import config, console, prompts
from referee_jax.engine import capacity
from referee_jax.hardware import chips, compile_cache, devices
from referee_jax.performance import abstract_networks, ahead_of_time, cost
from referee_jax.runs import command as command_lib
from referee_jax.runs import prompt_file
from referee_jax.runs.command import Command
from referee_jax.storage import bucket as bucket_lib
from referee_jax.storage import run_directory
from referee_jax.weights import convert
from referee_jax.weights import hub as hub_files

GB = 1e9
KNOWN = "openai/clip-vit-large-patch14"  # which the hub is asked about where no config names a checkpoint
HUB_SECONDS = 5  # and no longer, whatever the network does
SKEW_SECONDS = 60  # between this machine's clock and that of the run directory's file system
SPARE_BYTES = 1 * GB  # for logs, checkpoints and what else writes to the disk


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found of one thing; where there is a `remedy`, it is wrong."""

    name: str
    text: str
    remedy: str = ""


# --- what there is to look at: each gives its findings, of the command that is examined or of none ------------------------------


def versions(command: Command | None) -> list[Finding]:
    """Of Python and the packages, and whether they are as new as asked for."""
    told = ", ".join(f"{name} {version}" for name, version in run_directory.versions().items())
    wrong = []
    for text in importlib.metadata.requires("referee_jax") or []:
        asked = requirements.Requirement(text)
        if asked.marker and not asked.marker.evaluate({"extra": ""}):
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if not asked.specifier.contains(importlib.metadata.version(asked.name), prereleases=True):
                wrong.append(text)
    return [Finding("versions", told, f"pip install {' '.join(map(repr, wrong))}" if wrong else "")]


def device(command: Command | None) -> list[Finding]:
    """What JAX runs on, the memory of each, and whether an accelerator is left out."""
    try:
        devices.choose(command.device if command else "auto")
    except devices.DeviceError as error:
        remedy = "unset JAX_PLATFORMS, choose another --device, or install the extra that is named"
        return [Finding("devices", str(error), remedy)]
    found = jax.local_devices()
    told = []
    for device in found:
        limit = chips.memory_limit(device)
        told.append(device.device_kind + (f" ({limit / GB:.1f} GB)" if limit else ""))
    text = ", ".join(f"{told.count(kind)} x {kind}" for kind in dict.fromkeys(told))
    return [Finding("devices", text)]


def step(command: Command | None) -> list[Finding]:
    """Compiles and runs a product of matrices: seconds for both, and whether it is right."""
    n = 256
    fn = jax.jit(lambda x: (x @ x).sum())
    begun = time.monotonic()
    try:
        compiled = fn.lower(jnp.ones((n, n))).compile()
        compiling, begun = time.monotonic() - begun, time.monotonic()
        total = float(compiled(jnp.ones((n, n))))
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        text = f"a small program fails: {str(error).splitlines()[0]}"
        return [
            Finding("step", text, "is another process using the device? else the driver does not fit JAX's version")
        ]
    text = f"a small program is compiled in {compiling:.2f} s and run in {(time.monotonic() - begun) * 1e3:.1f} ms"
    if total != n**3:
        return [
            Finding("step", f"{text}, but gives {total} for {n**3}", "this device computes wrongly: use another one")
        ]
    return [Finding("step", text)]


def cache(command: Command | None) -> list[Finding]:
    """The directory of compiled programs: can it be written, and by nobody else, since what is in it is run."""
    try:
        kind = jax.local_devices()[0].device_kind
    except RuntimeError:  # said by `device`
        kind = "cpu"
    if problem := compile_cache.use(kind):
        return [Finding("cache", problem, "set JAX_COMPILATION_CACHE_DIR to a directory of yours")]
    return [Finding("cache", f"compiled programs are kept in {jax.config.jax_compilation_cache_dir or 'no place'}")]


def workdir(command: Command | None) -> list[Finding]:
    """The run directory: can it be written, is there room, and does its clock (a file server's, perhaps) agree with ours."""
    path = command.workdir if command else Path("runs")
    if bucket_lib.is_remote(path):
        return bucket(str(path))
    if problem := unwritable(path):
        return [Finding("workdir", problem, "choose another --workdir, or get the right to write there")]
    found = [Finding("workdir", f"{path} can be written")]
    place = existing(path)
    free, need = shutil.disk_usage(place).free, SPARE_BYTES
    if command:
        need += run_directory.bytes_per_item(command.settings) * command.settings.samples * len(command.entries)
    text = f"{free / GB:.1f} GB free for {path}, {need / GB:.1f} GB needed at most"
    found.append(Finding("disk", text, "" if free > need else "free some, or choose a --workdir on a larger disk"))
    with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as probe:
        probe.write(b"x")
        probe.flush()
        found.append(clock(f"the file system of {path}", os.stat(probe.name).st_mtime))
    return found


def bucket(url: str) -> list[Finding]:
    """A run directory in a bucket: can it be written, and how does its clock agree with ours."""
    try:
        place = bucket_lib.Bucket(url)
        now = place.now()
    except ValueError as error:
        return [Finding("workdir", str(error), "install it, or choose another --workdir")]
    except OSError as error:
        remedy = "choose another --workdir, or get the right to write, read and remove there (gcloud auth, AWS_PROFILE)"
        return [Finding("workdir", str(error), remedy)]
    return [Finding("workdir", f"{url} can be written"), clock(url, now)]


def clock(whose: str, now: float) -> Finding:
    """Whether a clock that says `now` agrees with this machine's."""
    skew = now - time.time()
    text = f"{whose} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    remedy = "set the clocks by NTP: buckets refuse what is signed minutes off, and times in the logs of machines do not compare"
    return Finding("clock", text, "" if abs(skew) < SKEW_SECONDS else remedy)


def prompts_of(command: Command | None) -> list[Finding]:
    """Which of the command's prompts can be used."""
    if not command:
        return []
    if not command.entries:
        return [Finding("prompts", "none are given; a run needs some")]
    kept, rejected = prompt_file.sift(command.entries)
    text = f"{len(kept)} of {len(command.entries)} can be used" + (f"; {rejected[0]}" if rejected else "")
    return [Finding("prompts", text, "give other prompts" if not kept else "")]


def checkpoints(command: Command | None) -> list[Finding]:
    """Whether each checkpoint of the config is here, and if not, whether the hub has it."""
    if not command:
        text, remedy = hub(KNOWN)
        return [
            Finding("hub", text, "" if constants.HF_HUB_OFFLINE else remedy)
        ]  # chosen, and perhaps nothing is missing
    named = config.checkpoints(command.settings)
    return [Finding("checkpoint", *checkpoint(name, revision)) for name, revision in named]


def price(command: Command | None) -> list[Finding]:
    """What the config costs (cost.py), and whether a batch fits the device."""
    if not command:
        return []

    try:
        try:
            limit = chips.memory_limit(jax.local_devices()[0])
        except RuntimeError:  # said by `device`
            limit = None
        sized = abstract_networks.abstract(command.settings)
        settings = capacity.fitting(command.settings, sized.prior, sized.judges, limit)  # as the engine will
        found = cost.estimate(settings)
    except config.ConfigError as error:
        return [Finding("cost", str(error), "correct the config")]
    except (ValueError, RuntimeError) as error:  # also where there is no device, which `device` says
        return [Finding("cost", f"not known: {console.first_line(error)}")]
    weights, size = sum(found.weights.values()) + found.fixed, settings.batch_size
    needed = weights + size * found.live
    text = (
        f"{found.step / 1e12:.3g} TFLOP for an iteration of an image, {found.image / 1e12:.3g} for all; "
        f"{needed / GB:.1f} GB for {size} images at once, {weights / GB:.1f} GB of them whatever the batch"
    )
    if limit and needed > limit:
        return [Finding("cost", f"{text}; the device has {limit / GB:.1f} GB", "a smaller --config.batch_size")]
    return [Finding("cost", text)]


CHECKS: tuple[Callable[[Command | None], list[Finding]], ...] = (
    versions, device, step, cache, workdir, prompts_of, checkpoints, price,
)  # fmt: skip


# --- how it is looked at ------------------------------------------------------------------------------------------------------


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that there is."""
    path = path.expanduser().absolute()
    return next(x for x in (path, *path.parents) if x.exists())


def unwritable(path: Path) -> str | None:
    """Why no file can be written in a directory, which need not be there yet; or None."""
    place = existing(path)
    if not place.is_dir():
        return f"{place} is not a directory"
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-"):
            return None
    except OSError as error:
        return f"{place} cannot be written: {error.strerror or error}"


def checkpoint(name: str, revision: str) -> tuple[str, str]:
    """Where a checkpoint is, and the remedy where it is nowhere."""
    try:
        if hub_files.local_path(name).is_dir():
            return f"{name} is here", ""
    except convert.WeightsError as error:
        return str(error), "name one of those"
    if not hub_files.is_id(name):
        return f"{name} is not here", "correct the path, or make the checkpoint as the config's docstring says"
    if commit := hub_files.commit(name, revision or None):  # what is damaged or missing of it, the run says
        return f"{name} is in the hub's cache, commit {commit[:12]}", ""
    text, remedy = hub(name)
    return f"{name} is not here; {text}", remedy


def hub(name: str) -> tuple[str, str]:
    """What the hub says of a repository, and the remedy where it does not have it or say anything; within HUB_SECONDS."""
    fetch = f"where there is a network, run: hf download {name}; then copy HF_HOME here, and set HF_HUB_OFFLINE=1"
    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked (HF_HUB_OFFLINE)", f"unset HF_HUB_OFFLINE; or, {fetch}"
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            huggingface_hub.HfApi().model_info(name, timeout=HUB_SECONDS)
            answer.append(None)
        except Exception as error:  # whatever the network does
            answer.append(error)

    # Not even a name server that never answers holds the program up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if answer == [None]:
        return "the Hugging Face hub has it", ""
    if answer and isinstance(answer[0], errors.RepositoryNotFoundError):
        return (
            "nor on the hub",
            "correct the name, or make it as the config's docstring says; private ones need HF_TOKEN",
        )
    problem = (str(answer[0]).splitlines() or [""])[0] if answer else f"nothing in {HUB_SECONDS} s"
    return f"the hub ({constants.ENDPOINT}) does not answer: {problem}", fetch


def examine(command: Command | None) -> list[Finding]:
    """All findings, in the order of CHECKS."""
    return [finding for check in CHECKS for finding in check(command)]


# --- the program --------------------------------------------------------------------------------------------------------------


def read_command(argv: Sequence[str]) -> tuple[Command | None, list[Finding]]:
    """The command of run that the flags are of, None where no config is named or it is wrong; and what is said of it."""
    if not any(re.match(r"--?config\b", argument) for argument in argv):
        return None, []
    values = flags.FlagValues()
    try:
        command = command_lib.read_command(values, command_lib.parse_flags(argv, values)[1:])
    except (command_lib.CommandError, config.ConfigError, prompts.PromptError) as error:
        return None, [
            Finding(
                "config",
                str(error),
                "correct it; config.py has every setting with its range, augment.py those of views",
            )
        ]
    return command, [Finding("config", f"valid; fingerprint {config.fingerprint(command.settings)[:8]}")]


def report(findings: Sequence[Finding]) -> str:
    """For reading: one line each, the remedy below."""
    lines = []
    for finding in findings:
        lines.append(f"{'wrong' if finding.remedy else 'ok   '}  {finding.name}: {finding.text}")
        if finding.remedy:
            lines.append(f"       -> {finding.remedy}")
    wrong = sum(bool(finding.remedy) for finding in findings)
    return "\n".join([*lines, f"{wrong} of {len(findings)} things are wrong" if wrong else "nothing is wrong"])


def compile_for(command: Command, name: str) -> tuple[str, dict[str, Any], bool]:
    """What compiling for the slice `name` says, for reading and as JSON has it, and whether it fits and is silent."""

    found = ahead_of_time.compile_for(command.settings, name)
    return "\n".join(found.lines()), found.to_dict(), found.fits and not found.collectives


def main(argv: list[str]) -> int:
    """The command line."""
    args = flags.FLAGS
    if not args["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    command, findings = read_command(argv)
    name = args["compile-for"].value
    if name and command:
        try:
            text, values, is_good = compile_for(command, name)
        except ValueError as error:
            findings.append(Finding("slice", str(error), "see launch/README.md"))
        else:
            print(json.dumps(values, indent=2) if args.json else text)
            return 0 if is_good else 1
    elif name:
        findings = findings or [
            Finding("config", "--compile-for needs --config", "add --config=configs/tpu_pod.py, say")
        ]
    else:
        findings += examine(command)
    is_wrong = any(finding.remedy for finding in findings)
    if args.json:
        print(json.dumps({"ok": not is_wrong, "findings": list(map(dataclasses.asdict, findings))}, indent=2))
    else:
        print(report(findings))
    return int(is_wrong)


if __name__ == "__main__":
    flags.DEFINE_bool("json", False, "print JSON")
    flags.DEFINE_string("compile-for", None, "compile for this TPU slice instead, v5e:16x16 say")
    # The other flags are those of run, which the command that is examined is read by.
    app.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
