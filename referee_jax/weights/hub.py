"""Where a checkpoint's files are: a local directory, or the Hugging Face hub's cache, which is filled with patience.

Of the processes of a host one downloads, the others wait for it. A hub that fails, is silent or sends away for a while is
asked again, a few times; then what is in the cache has to do, or the user is told what to run where there is a network.
"""

import contextlib
import email.utils
import random
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import huggingface_hub
import yaml
from absl import logging
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from referee_jax import console
from referee_jax.weights.convert import WeightsError

ASSETS = Path(__file__).parents[1] / "shapes" / "assets"
EMBEDDED = "shapes/"  # checkpoints whose names begin so are part of the package
TRIES = 4
CARD = "README.md"
FIRST_WAIT = 2.0  # seconds, twice as long each time
LONGEST_WAIT = 300.0  # the window of the hub's rate limits: whoever asks for more than that is not waited for
_PASSING = (408, 429, 500, 502, 503, 504)


def is_embedded(name: str) -> bool:
    """Whether a checkpoint is part of the package: `shapes/...`."""
    return name.startswith(EMBEDDED)


def local_path(name: str) -> Path:
    """Where a checkpoint is if it is a directory: of an embedded one, within the package. WeightsError if there is no such."""
    if not is_embedded(name):
        return Path(name).expanduser()
    path = ASSETS / name.removeprefix(EMBEDDED)
    if ".." in path.parts or not path.is_dir():
        embedded = ", ".join(sorted(EMBEDDED + x.name for x in ASSETS.glob("*") if x.is_dir())) or "none"
        raise WeightsError(f"the checkpoint {name!r} is not in the package; it holds {embedded}")
    return path


def resolve(path_or_id: str | Path, revision: str | None, patterns: Sequence[str]) -> Path:
    """Returns the local directory of a checkpoint: embedded, a directory, or the cache of the hub's files matching `patterns`.

    The card (README.md) comes along, if it can be had. Respects HF_HUB_OFFLINE. Raises WeightsError with the command that would
    get the files.
    """
    name, path = str(path_or_id), local_path(str(path_or_id))
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise WeightsError(f"{name} is not a directory")
    if not is_id(name):
        raise WeightsError(f"{name!r} is not a directory, nor the id of a repository on the hub")
    try:
        with _one_at_a_time(name), _bounded_silence():
            directory = _download(name, revision, patterns)
    except (OSError, hub_errors.HTTPError, hub_errors.HFValidationError) as error:
        raise WeightsError(
            f"{name} is not a local directory, and getting it from the Hugging Face hub failed ({console.first_line(error)}); "
            f"where there is a network, run: {download_command(name, revision, [*patterns, CARD])}"
        ) from error
    _check_sizes(directory, name, revision)
    return directory


def is_id(name: str) -> bool:
    """Whether it can be the id of a repository on the hub."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name))


def commit(name: str, revision: str | None) -> str | None:
    """The commit of a repository that is in the cache; None where there is none, or for a directory."""
    if not is_id(name) or Path(name).is_dir():
        return None
    for file in ("config.json", "unet/config.json"):
        found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found[: -len(file)]).name
    return None


def license_of(name: str, revision: str | None) -> str | None:
    """What the card of a checkpoint says of its license ("openrail++", say); None where it says nothing, or is not here."""
    path = Path(name).expanduser()
    is_cached = is_id(name) and not path.is_dir()
    card = huggingface_hub.try_to_load_from_cache(name, CARD, revision=revision) if is_cached else str(path / CARD)
    said = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        said = huggingface_hub.metadata_load(card) or {} if isinstance(card, str) else {}
    found = said.get("license_name") or said.get("license")
    return str(found) if found else None


def download_command(name: str, revision: str | None, patterns: Sequence[str], *options: str) -> str:
    """The shell command that puts the files of `resolve` into the cache."""
    command = ["hf", "download", name, *(["--revision", revision] if revision else [])]
    for pattern in patterns:
        command += ["--include", pattern]
    return shlex.join([*command, *options])


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot in the cache. Where the hub cannot be asked, one that is cached and complete, but for the card, will do."""
    for tries in range(1, TRIES + 1):
        try:
            return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*patterns, CARD]))
        except (OSError, hub_errors.HTTPError) as error:
            if not _is_refused(error) and (directory := _cached(name, revision, patterns)):
                return directory
            wait = _wait(error, tries)
            if wait is None or tries == TRIES:
                raise
            logging.warning("%s (try %d of %d); again in %.0f s", console.first_line(error), tries, TRIES, wait)
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _cached(name: str, revision: str | None, patterns: Sequence[str]) -> Path | None:
    """The snapshot in the cache, if all of it is there; asks nobody."""
    with contextlib.suppress(OSError, hub_errors.HFValidationError):
        how = {"revision": revision, "allow_patterns": list(patterns), "local_files_only": True}
        return Path(huggingface_hub.snapshot_download(name, **how))
    return None


def _is_refused(error: BaseException) -> bool:
    """Whether the hub has answered, and will not answer otherwise."""
    answers = [e.response for e in _causes(error) if getattr(e, "response", None) is not None]
    return any(answer.status_code not in _PASSING for answer in answers)


def _wait(error: BaseException, tries: int) -> float | None:
    """Seconds after which it is worth to ask again; None where it is not.

    A part of it is by chance: those that were sent away together should not come back together.
    """
    causes = list(_causes(error))
    answers = [e.response for e in causes if getattr(e, "response", None) is not None]
    is_silent = any(isinstance(e, hub_errors.HTTPError) for e in causes)
    if answers and answers[0].status_code not in _PASSING or not (answers or is_silent):
        return None
    wait = FIRST_WAIT * 2 ** (tries - 1)
    asked = _asked_wait(answers[0].headers) if answers else 0.0
    return None if asked > LONGEST_WAIT else max(asked, wait) + random.uniform(0, wait / 2)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: Retry-After (seconds or a date), or the reset of the hub's RateLimit."""
    after = headers.get("retry-after", "").strip()
    if after.isdigit():
        return float(after)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    reset = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("ratelimit", ""))
    return float(reset[1]) if reset else 0.0


@contextlib.contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """Of all processes that share the cache, only one is in here for a repository.

    Where no lock can be made there is none: a cache that cannot be written can still be read, and huggingface_hub takes
    care that a file which two download at once is whole.
    """
    file = Path(constants.HF_HUB_CACHE, ".locks", f"referee_jax--{name.replace('/', '--')}.lock")
    with contextlib.ExitStack() as held:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(file, mode=0o664)
            try:
                held.enter_context(lock.acquire(timeout=0))
            except filelock.Timeout:
                logging.warning("another process is getting %s; waiting for it", name)
                held.enter_context(lock.acquire())
        except (OSError, NotImplementedError) as error:
            logging.info("no lock on %s: %s", file, error)
        yield


@contextlib.contextmanager
def _bounded_silence() -> Iterator[None]:
    """Bounds how long a request waits for the hub to say something: huggingface_hub lists files without a limit."""

    def bound(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            phase: limits.get(phase) or constants.HF_HUB_DOWNLOAD_TIMEOUT
            for phase in ("connect", "read", "write", "pool")
        }

    hooks = huggingface_hub.get_session().event_hooks["request"]
    hooks.append(bound)
    try:
        yield
    finally:
        hooks.remove(bound)


def _check_sizes(directory: Path, name: str, revision: str | None) -> None:
    """Raises WeightsError for a cached file that is not as long as the hub says, where it has said so."""
    try:
        files = huggingface_hub.get_cached_repo_tree(name, revision=directory.name)
    except hub_errors.CachedRepoTreeNotFoundError:
        return
    for file in files:
        cached = directory / file.path
        if cached.exists() and (size := cached.stat().st_size) != file.size:
            again = download_command(name, revision, [file.path], "--force-download")
            raise WeightsError(f"{cached} is damaged: {size} bytes, on the hub {file.size}; run: {again}")
