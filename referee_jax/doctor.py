"""Is this machine ready for a run? Checks everything that a run needs, and prints a remedy for each problem.

    python -m referee_jax.doctor
    python -m referee_jax.doctor --config=configs/clip.py --prompts=prompts.txt --workdir=runs/mine

Takes the flags of referee_jax.run and checks that command without running it. `--json` prints the same for programs.

    python -m referee_jax.doctor --compile-for=v5e:16x16 --config=configs/tpu_pod.py

compiles the program of a config for a TPU slice, on any Linux machine with the extra `[tpu]` and without
checkpoints: does it fit, does it communicate, how long does an image take (performance/ahead_of_time.py)?
Exit codes: 0 nothing is wrong, 1 something is.
"""

import collections
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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from absl import app, flags, logging
from huggingface_hub import constants, errors
from packaging import requirements

from referee_jax import config, console, prompts, referees
from referee_jax.engine import capacity
from referee_jax.hardware import chips, compile_cache, devices
from referee_jax.performance import abstract_networks, ahead_of_time, cost
from referee_jax.runs import command as command_lib
from referee_jax.runs import prompt_file
from referee_jax.runs.command import Command
from referee_jax.storage import objects, run_directory
from referee_jax.weights import convert, generators, load
from referee_jax.weights import hub as hub_files
from referee_jax.weights.formats import lora

GB = 1e9
KNOWN = "openai/clip-vit-large-patch14"  # a repository that the hub has, to ask for without a config
HUB_SECONDS = 5  # timeout
LORA = "lora"
OF_DIFFUSERS = "diffusers"  # a network by itself, of a kind that its config.json says
SKEW_SECONDS = 60  # allowed between this machine's clock and that of the run directory's file system
SPARE_BYTES = 1 * GB  # for logs and checkpoints


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check; with a `remedy` it is a problem."""

    name: str
    text: str
    remedy: str = ""


# --- checks: each takes the command to check, or None, and returns its findings -------------------------------------------------


def versions(command: Command | None) -> list[Finding]:
    """Versions of Python and the packages, and whether they meet the package's requirements."""
    text = ", ".join(f"{name} {version}" for name, version in run_directory.versions().items())
    wrong = []
    for line in importlib.metadata.requires("referee_jax") or []:
        requirement = requirements.Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if not requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True):
                wrong.append(line)
    return [Finding("versions", text, f"pip install {' '.join(map(repr, wrong))}" if wrong else "")]


def device(command: Command | None) -> list[Finding]:
    """JAX's devices with their memory, and whether an accelerator is not used."""
    try:
        devices.choose(command.device if command else "auto")
    except devices.DeviceError as error:
        remedy = "unset JAX_PLATFORMS, choose another --device, or install the extra that is named"
        return [Finding("devices", str(error), remedy)]
    kinds = []
    for device in devices.local():
        limit = chips.memory_limit(device)
        kinds.append(device.device_kind + (f" ({limit / GB:.1f} GB)" if limit else ""))
    text = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    return [Finding("devices", text)]


def step(command: Command | None) -> list[Finding]:
    """Compiles and runs a product of matrices: the times of both, and whether the result is right."""
    n = 256
    fn = jax.jit(lambda x: (x @ x).sum())
    start = time.monotonic()
    try:
        devices.local()
    except devices.DeviceError:  # `device` reports it
        return []
    try:
        compiled = fn.lower(jnp.ones((n, n))).compile()
        compiling, start = time.monotonic() - start, time.monotonic()
        total = float(compiled(jnp.ones((n, n))))
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        text = f"a small program fails: {str(error).splitlines()[0]}"
        return [
            Finding("step", text, "is another process using the device? else the driver does not fit JAX's version")
        ]
    text = f"a small program is compiled in {compiling:.2f} s and run in {(time.monotonic() - start) * 1e3:.1f} ms"
    if total != n**3:
        return [
            Finding("step", f"{text}, but gives {total} for {n**3}", "this device computes wrongly: use another one")
        ]
    return [Finding("step", text)]


def cache(command: Command | None) -> list[Finding]:
    """The directory of compiled programs: writable, and by nobody else, since what is in it is executed."""
    try:
        kind = devices.local()[0].device_kind
    except devices.DeviceError:  # `device` reports it
        kind = "cpu"
    if problem := compile_cache.use(kind):
        return [Finding("cache", problem, "set JAX_COMPILATION_CACHE_DIR to a directory of yours")]
    return [Finding("cache", f"compiled programs are kept in {jax.config.jax_compilation_cache_dir or 'no place'}")]


def workdir(command: Command | None) -> list[Finding]:
    """The run directory: is it writable, is there room, and does its file system's clock agree with ours?"""
    path = command.workdir if command else Path("runs")
    if objects.is_remote(path):
        return bucket(str(path))
    if problem := unwritable(path):
        return [Finding("workdir", problem, "choose another --workdir, or get the right to write there")]
    findings = [Finding("workdir", f"{path} can be written")]
    parent = existing(path)
    free, need = shutil.disk_usage(parent).free, SPARE_BYTES
    if command:
        need += run_directory.bytes_per_item(command.settings) * command.settings.samples * len(command.entries)
    text = f"{free / GB:.1f} GB free for {path}, {need / GB:.1f} GB needed at most"
    findings.append(Finding("disk", text, "" if free > need else "free some, or choose a --workdir on a larger disk"))
    with tempfile.NamedTemporaryFile(dir=parent, prefix=".doctor-") as probe:
        probe.write(b"x")
        probe.flush()
        findings.append(clock(f"the file system of {path}", os.stat(probe.name).st_mtime))
    return findings


def bucket(url: str) -> list[Finding]:
    """A run directory in a bucket: is it writable, and does its clock agree with ours?"""
    try:
        now = objects.Objects(url).now()
    except ValueError as error:
        return [Finding("workdir", str(error), "install it, or choose another --workdir")]
    except OSError as error:
        remedy = "choose another --workdir, or get the right to write, read and remove there (gcloud auth, AWS_PROFILE)"
        return [Finding("workdir", str(error), remedy)]
    return [Finding("workdir", f"{url} can be written"), clock(url, now)]


def clock(whose: str, now: float) -> Finding:
    """Whether the clock of `whose`, at `now`, agrees with this machine's."""
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
    usable, rejected = prompt_file.sift(command.entries)
    text = f"{len(usable)} of {len(command.entries)} can be used" + (f"; {rejected[0]}" if rejected else "")
    return [Finding("prompts", text, "give other prompts" if not usable else "")]


def checkpoints(command: Command | None) -> list[Finding]:
    """Whether each checkpoint of the config is on this machine and whole, or else on the hub."""
    if not command:
        text, remedy = hub(KNOWN)
        # To be offline is a choice, and no checkpoint may be missing.
        return [Finding("hub", text, "" if constants.HF_HUB_OFFLINE else remedy)]
    generator, kinds = command.settings.generator, collections.defaultdict(list)
    kinds[generator.checkpoint, generator.revision].append("")
    kinds[generator.unet, generator.unet_revision].append(OF_DIFFUSERS)
    kinds[generator.vae, generator.vae_revision].append(OF_DIFFUSERS)
    for file in generator.loras:
        kinds[file.file, ""].append(LORA)
    for spec in command.settings.referees:
        if spec.name in referees.REFEREES:  # what one of the user's own reads, it alone knows
            kinds[spec.checkpoint, spec.revision].append(referees.REFEREES[spec.name].kind)
    read = [pair for pair in config.checkpoints(command.settings) if kinds[pair]]
    return [Finding("checkpoint", *checkpoint(*pair, kinds[pair], generator)) for pair in read]


def price(command: Command | None) -> list[Finding]:
    """What the config costs (performance/cost.py), and whether a batch fits the device."""
    if not command:
        return []
    try:
        limit = chips.memory_limit(devices.local()[0])
        sized = abstract_networks.abstract(command.settings)
        settings = capacity.fitting(command.settings, sized.prior, sized.judges, limit)  # as the engine does
        costs = cost.estimate(settings)
    except config.ConfigError as error:
        return [Finding("cost", str(error), "correct the config")]
    except (ValueError, RuntimeError) as error:  # also without a device, which `device` reports
        return [Finding("cost", f"not known: {console.first_line(error)}")]
    weights, size = sum(costs.weights.values()) / costs.model + costs.fixed, settings.batch_size
    needed = weights + size * costs.live
    text = (
        f"{costs.step / 1e12:.3g} TFLOP for an iteration of an image, {costs.image / 1e12:.3g} for all; "
        f"{needed / GB:.1f} GB for {size} images at once, {weights / GB:.1f} GB of them whatever the batch"
    )
    if limit and needed > limit:
        return [Finding("cost", f"{text}; the device has {limit / GB:.1f} GB", "a smaller --config.batch_size")]
    return [Finding("cost", text)]


CHECKS: tuple[Callable[[Command | None], list[Finding]], ...] = (
    versions, device, step, cache, workdir, prompts_of, checkpoints, price,
)  # fmt: skip


# --- how they check -----------------------------------------------------------------------------------------------------------


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    path = path.expanduser().absolute()
    return next(x for x in (path, *path.parents) if x.exists())


def unwritable(path: Path) -> str | None:
    """Why no file can be written in a directory, which may not exist yet; None if one can."""
    parent = existing(path)
    if not parent.is_dir():
        return f"{parent} is not a directory"
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".doctor-"):
            return None
    except OSError as error:
        return f"{parent} cannot be written: {error.strerror or error}"


def checkpoint(
    name: str, revision: str, kinds: Iterable[str] = (), generator: config.Generator | None = None
) -> tuple[str, str]:
    """Where a checkpoint is, and a remedy if it is nowhere, or not whole as these kinds of networks ("": a generator)."""
    try:
        directory = hub_files.present(name, revision or None)
    except convert.WeightsError as error:
        return str(error), "name one of those"
    try:
        for kind in kinds if directory else ():
            if kind == LORA:
                lora.File(directory)
            elif kind:
                load.check(directory, load.kind_of(directory) if kind == OF_DIFFUSERS else kind)
            else:
                generator = generator or config.Generator()
                has = {"denoiser": not generator.unet, "vae": not generator.vae}
                generators.check(directory, generator.prediction, has)
    except convert.WeightsError as error:
        return f"{name} is here, but {error}", "get its files anew, from where it is from"
    if directory == hub_files.local_path(name):
        return f"{name} is here", ""
    if directory:
        return f"{name} is in the hub's cache, commit {directory.name[:12]}", ""
    if not hub_files.is_id(name):
        return f"{name} is not here", "correct the path, or make the checkpoint as the config's docstring says"
    text, remedy = hub(name, revision)
    return f"{name} is not here; {text}", remedy


def hub(name: str, revision: str = "") -> tuple[str, str]:
    """Whether the hub gives a repository to this user; a remedy if not, or if it does not answer within HUB_SECONDS."""
    fetch = f"where there is a network, run: hf download {name}; then copy HF_HOME here, and set HF_HUB_OFFLINE=1"
    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked (HF_HUB_OFFLINE)", f"unset HF_HUB_OFFLINE; or, {fetch}"
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            api = huggingface_hub.HfApi()
            api.model_info(name, revision=revision or None, timeout=HUB_SECONDS)
            api.auth_check(name)  # all may see what those may download who accepted its terms
            answer.append(None)
        except Exception as error:  # networks fail in many ways
            answer.append(error)

    # In a thread, since the timeout does not cover a name server that never answers.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if answer == [None]:
        return "the Hugging Face hub has it", ""
    if answer and type(answer[0]) is errors.RepositoryNotFoundError:
        return (
            "nor on the hub",
            "correct the name, or make it as the config's docstring says; private ones need HF_TOKEN",
        )
    if answer and (refusal := hub_files.refused(answer[0], name, revision)):
        return refusal
    problem = (str(answer[0]).splitlines() or [""])[0] if answer else f"nothing in {HUB_SECONDS} s"
    return f"the hub ({constants.ENDPOINT}) does not answer: {problem}", fetch


def examine(command: Command | None) -> list[Finding]:
    """All findings, in the order of CHECKS."""
    return [finding for check in CHECKS for finding in check(command)]


# --- the program --------------------------------------------------------------------------------------------------------------


def read_command(argv: Sequence[str]) -> tuple[Command | None, list[Finding]]:
    """The command of these flags, None without a config or with a wrong one; and the findings about it."""
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
                "correct it; docs/configuration.md has every setting with its range, method/augmentations.py those of views",
            )
        ]
    return command, [Finding("config", f"valid; fingerprint {config.fingerprint(command.settings)[:8]}")]


def report(findings: Sequence[Finding]) -> str:
    """A line for each finding, its remedy below."""
    lines = []
    for finding in findings:
        lines.append(f"{'wrong' if finding.remedy else 'ok   '}  {finding.name}: {finding.text}")
        if finding.remedy:
            lines.append(f"       -> {finding.remedy}")
    wrong = sum(bool(finding.remedy) for finding in findings)
    return "\n".join([*lines, f"{wrong} of {len(findings)} things are wrong" if wrong else "nothing is wrong"])


def compile_for(command: Command, name: str) -> tuple[str, dict[str, Any], bool]:
    """The report of compiling for the slice `name`, as text and for JSON; whether it fits, and groups do not communicate."""
    compiled = ahead_of_time.compile_for(command.settings, name)
    return "\n".join(compiled.lines()), compiled.to_dict(), compiled.fits and not compiled.strays


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
            Finding("config", "--compile-for needs --config", "for example --config=configs/tpu_pod.py")
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
    flags.DEFINE_string("compile-for", None, "compile for this TPU slice instead, such as v5e:16x16")
    # All other flags are those of run, with which `read_command` parses them.
    app.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
