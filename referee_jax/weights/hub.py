"""Finds a checkpoint's files: in a local directory, or by a download from the Hugging Face hub.

Of the processes that share a cache one downloads, the others wait. If the hub fails, is silent or
limits the rate, the request is repeated a few times. After that a complete snapshot in the cache is
used, or the error says which command to run on a machine with a network.
"""

import contextlib
import email.utils
import hashlib
import random
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import huggingface_hub
import yaml
from absl import logging
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from referee_jax import console
from referee_jax.weights import tensors
from referee_jax.weights.convert import WeightsError

ASSETS = Path(__file__).parents[1] / "shapes" / "assets"
EMBEDDED = "shapes/"  # the beginning of names of checkpoints in the package
TRIES = 4
CARD = "README.md"
CONFIGS = ("config.json", "model_index.json", "unet/config.json")  # every checkpoint has one of them
READ = (".json", ".txt", ".model", ".safetensors")  # endings of the files that a checkpoint is read from
FIRST_WAIT = 2.0  # seconds, twice as long each time
LONGEST_WAIT = 300.0  # the window of the hub's rate limits; to be asked for more is an error
_TRANSIENT = (408, 429, 500, 502, 503, 504)  # status codes after which a request is repeated


def is_embedded(name: str) -> bool:
    """Whether a checkpoint is part of the package: `shapes/...`."""
    return name.startswith(EMBEDDED)


def are_embedded(pairs: Iterable[tuple[str, str]]) -> bool:
    """Whether all of these (name, revision) are part of the package: networks that are small."""
    return all(is_embedded(name) for name, _ in pairs)


def local_path(name: str) -> Path:
    """The path of a checkpoint that is a directory or a file.

    Raises WeightsError for an unknown one of the package.
    """
    if not is_embedded(name):
        return Path(name).expanduser()
    path = ASSETS / name.removeprefix(EMBEDDED)
    if ".." in path.parts or not path.exists():
        embedded = ", ".join(sorted(EMBEDDED + x.name for x in ASSETS.glob("*") if x.is_dir())) or "none"
        raise WeightsError(f"the checkpoint {name!r} is not in the package; it holds {embedded}")
    return path


def resolve(path_or_id: str | Path, revision: str | None, patterns: Sequence[str], later: Sequence[str] = ()) -> Path:
    """Returns the directory of a checkpoint: in the package, local, or the hub's cache.

    Only files that match `patterns`, and the card (README.md) if there is one, are downloaded.
    Respects HF_HUB_OFFLINE. Raises WeightsError with what to do where the hub refuses, or else with
    the command that would download the files, and those of the patterns `later`, which are not downloaded now.
    """
    name, path = str(path_or_id), local_path(str(path_or_id))
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise WeightsError(f"{name} is not a directory: {tensors.of_one_file(path)}")
    if not is_id(name):
        raise WeightsError(f"{name!r} is not a directory, nor the id of a repository on the hub")
    try:
        with _one_at_a_time(name), _bounded_silence():
            directory = _download(name, revision, patterns)
    except (OSError, hub_errors.HTTPError, hub_errors.HFValidationError) as error:
        if refusal := refused(error, name, revision):
            raise WeightsError(f"{name} is not a local directory, and {': '.join(refusal)}") from error
        raise WeightsError(
            f"{name} is not a local directory, and getting it from the Hugging Face hub failed ({console.first_line(error)}); "
            f"where there is a network, run: {download_command(name, revision, [*patterns, *later, CARD])}"
        ) from error
    _check_sizes(directory, name, revision)
    return directory


def is_id(name: str) -> bool:
    """Whether a name can be the id of a repository on the hub."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not name.endswith(".safetensors")


def present(name: str, revision: str | None) -> Path | None:
    """The directory, or file, of a checkpoint that is on this machine, whole or not; None if there is none.

    Raises WeightsError for an unknown one of the package.
    """
    path = local_path(name)
    return path if path.exists() else _snapshot(name, revision)


def commit(name: str, revision: str | None) -> str | None:
    """The commit of a repository's cached snapshot; None if there is none, or for a directory or file."""
    directory = None if Path(name).expanduser().exists() else _snapshot(name, revision)
    return directory and directory.name


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The directory of a repository in the cache, whole or not."""
    for file in CONFIGS if is_id(name) else ():
        path = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            return Path(path[: -len(file)])
    return None


def version(name: str, revision: str | None = None) -> str:
    """Stands for the content of a checkpoint: the `digest` of a directory or file, or the commit on the hub.

    Raises WeightsError as `resolve`.
    """
    if file := file_of(name):
        return digest(file)
    directory = resolve(name, revision, CONFIGS)
    return digest(directory) if is_local(name) else directory.name


def versions(checkpoints: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The `version` of each checkpoint, by name; `checkpoints` are names and revisions. Raises WeightsError."""
    return {name: version(name, revision or None) for name, revision in checkpoints}


def file_of(name: str | Path) -> Path | None:
    """The file, if a checkpoint is one of safetensors on this machine."""
    path = local_path(str(name))
    return path if path.suffix == ".safetensors" and path.is_file() else None


def is_local(name: str) -> bool:
    """Whether a checkpoint is a directory, the package's included, or a file, and not on the hub."""
    return is_embedded(name) or Path(name).expanduser().exists()


def digest(directory: Path) -> str:
    """SHA-256, 16 hex digits, of a file, or of all in a directory that a network, tokenizer or processor is read from."""
    if directory.is_file():  # with what is read beside it
        beside = [*directory.parent.glob("tokenizer*/*"), directory.with_name("adapter_config.json")]
        files, directory = (x for x in (directory, *beside) if x.is_file()), directory.parent
    else:
        files = (x for x in directory.rglob("*") if x.suffix in READ and x.is_file())
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(directory).as_posix(), path) for path in files):
        if not name.startswith("."):  # notes of downloads and of git
            with path.open("rb") as file:
                total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def license_of(name: str, revision: str | None) -> str | None:
    """The license in a checkpoint's card, e.g. "openrail++"; None if there is none, or no card."""
    path = Path(name).expanduser()
    is_cached = is_id(name) and not path.exists()
    card = huggingface_hub.try_to_load_from_cache(name, CARD, revision=revision) if is_cached else str(path / CARD)
    metadata = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        metadata = huggingface_hub.metadata_load(card) or {} if isinstance(card, str) else {}
    license = metadata.get("license_name") or metadata.get("license")
    return str(license) if license else None


def download_command(name: str, revision: str | None, patterns: Sequence[str], *options: str) -> str:
    """The shell command that downloads the files of `resolve` into the cache."""
    command = ["hf", "download", name, *(["--revision", revision] if revision else [])]
    for pattern in patterns:
        command += ["--include", pattern]
    return shlex.join([*command, *options])


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Returns the snapshot in the cache, after a download.

    If the hub does not answer, a cached one is used that is complete, with or without the card.
    """
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
    """The snapshot in the cache if it is complete; without the network."""
    with contextlib.suppress(OSError, hub_errors.HFValidationError):
        how = {"revision": revision, "allow_patterns": list(patterns), "local_files_only": True}
        return Path(huggingface_hub.snapshot_download(name, **how))
    return None


def _is_refused(error: BaseException) -> bool:
    """Whether the hub has given an answer that a repeated request would not change."""
    answers = [e.response for e in _causes(error) if getattr(e, "response", None) is not None]
    return any(answer.status_code not in _TRANSIENT for answer in answers)


def refused(error: BaseException, name: str, revision: str | None) -> tuple[str, str] | None:
    """Why the hub does not give a repository to this user, and what to do; None for another error."""
    page, login = f"{constants.ENDPOINT}/{name}", "`hf auth login` (or HF_TOKEN)"
    for cause in _causes(error):
        answer = getattr(cause, "response", None)
        message = answer.headers.get("X-Error-Message", "") if answer is not None else ""
        if isinstance(cause, hub_errors.GatedRepoError):
            return (
                f"the hub gives {name} to those who accept its terms",
                f"accept them at {page}, and log in with {login}",
            )
        if isinstance(cause, hub_errors.RevisionNotFoundError):
            return f"{name} has no revision {revision!r} on the hub", f"choose one of {page}/commits/main"
        if isinstance(cause, hub_errors.DisabledRepoError):
            return f"the hub has disabled {name}", "choose another checkpoint"
        if answer is not None and answer.status_code == 401 and re.search("(?i)token|credentials", message):
            return f"the hub does not accept the token of this machine ({message})", f"log in anew with {login}"
        if isinstance(cause, hub_errors.RepositoryNotFoundError):
            return (
                f"the hub has no {name}, or it is private",
                f"correct the name, or log in with {login} as who may read it",
            )
        if answer is not None and answer.status_code == 403:
            return (
                f"the hub forbids {name} ({message or 'no reason is given'})",
                f"log in with {login} as who may read it",
            )
    return None


def _wait(error: BaseException, tries: int) -> float | None:
    """Seconds until a request should be repeated; None if it should not.

    A part of it is random, so that processes do not repeat their requests all at once.
    """
    causes = list(_causes(error))
    answers = [e.response for e in causes if getattr(e, "response", None) is not None]
    is_silent = any(isinstance(e, hub_errors.HTTPError) for e in causes)
    if answers and answers[0].status_code not in _TRANSIENT or not (answers or is_silent):
        return None
    wait = FIRST_WAIT * 2 ** (tries - 1)
    requested = _requested_wait(answers[0].headers) if answers else 0.0
    return None if requested > LONGEST_WAIT else max(requested, wait) + random.uniform(0, wait / 2)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _requested_wait(headers: Mapping[str, str]) -> float:
    """Seconds to wait by a server's Retry-After (seconds or a date) or RateLimit."""
    after = headers.get("retry-after", "").strip()
    if after.isdigit():
        return float(after)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    reset = re.search(r"\br=0\b.*\bt=(\d+)", headers.get("ratelimit", ""))
    return float(reset[1]) if reset else 0.0


@contextlib.contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """A lock on a repository for all processes that share the cache.

    Without one if no lock can be made: a read-only cache can still be read, and huggingface_hub
    keeps files whole that two processes download at once.
    """
    file = Path(constants.HF_HUB_CACHE, ".locks", f"referee_jax--{name.replace('/', '--')}.lock")
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(file, mode=0o664)
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except filelock.Timeout:
                logging.warning("another process is getting %s; waiting for it", name)
                stack.enter_context(lock.acquire())
        except (OSError, NotImplementedError) as error:
            logging.info("no lock on %s: %s", file, error)
        yield


@contextlib.contextmanager
def _bounded_silence() -> Iterator[None]:
    """Sets a timeout for requests to the hub: huggingface_hub lists files without one."""

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


def listing(directory: Path) -> list[str] | None:
    """The files that a snapshot's repository has on the hub; None for any other directory."""
    tree = _tree(directory)
    return tree and [file.path for file in tree]


def _tree(directory: Path) -> list | None:
    *_, repository, _, commit = ("", "", *directory.parts)
    kind, *name = repository.split("--")
    if kind != "models":
        return None
    with contextlib.suppress(hub_errors.CachedRepoTreeNotFoundError, hub_errors.HFValidationError):
        return list(huggingface_hub.get_cached_repo_tree("/".join(name), revision=commit))
    return None


def _check_sizes(directory: Path, name: str, revision: str | None) -> None:
    """Raises WeightsError for a cached file of another size than on the hub."""
    for file in _tree(directory) or ():
        cached = directory / file.path
        if cached.exists() and (size := cached.stat().st_size) != file.size:
            command = download_command(name, revision, [file.path], "--force-download")
            raise WeightsError(f"{cached} is damaged: {size} bytes, on the hub {file.size}; run: {command}")
