"""A run directory in a bucket: gs://, s3://, or anything else that fsspec supports.

A bucket has no locks and no appends, and objects appear whole. So each process works in a local
directory of its own (`Bucket.local`) and uploads new files. Objects are written once:

    images/, shards/, trajectories/      as in any run directory; deleted locally after the upload
    metadata-<process>-<n>.jsonl, log-*  lines of the journal and log since the previous upload;
                                         log-failed-* those of device failures
    metadata.jsonl                       all lines, merged when a process ends (`Bucket.merge`)
    checkpoints/                         deleted in the bucket when they are deleted locally
    claims/<id>.claim                    the owner of an item in a pool of workers (`BucketClaims`)

An image is uploaded before its line. Only this module uses fsspec.
"""

import collections
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import fsspec

from referee_jax import items
from referee_jax.hardware import processes
from referee_jax.items import Item
from referee_jax.storage import claims
from referee_jax.storage import files as files_lib

CONTENT = ("images", "shards", "trajectories")
LINES = ("metadata", "log")
FAILED = "log-failed"  # parts of the log with device failures
CHECKPOINTS = "checkpoints"
SHOWN_BYTES = 1e9  # of shards to fetch for a contact sheet or gallery; each is fetched whole
TOGETHER = 32  # objects per fetch request
LOCK = 600.0  # seconds after which a lock's owner counts as dead
SEEN = 10.0  # seconds between two listings of other workers' claims


def is_remote(path: object) -> bool:
    """Whether a path is a URL in a bucket, such as gs://bucket/run."""
    return "://" in str(path)


def local_only(path: str) -> Path:
    """The path with ~ expanded. ValueError for a URL in a bucket, where only runs can be."""
    if is_remote(path):
        raise ValueError(
            f"{path} is in a bucket: copy it down first (gcloud storage rsync, aws s3 sync), and give its path"
        )
    return Path(path).expanduser()


def read_file(file: str | os.PathLike) -> bytes:
    """The content of a local file, or of an object by its URL. OSError as from either; ValueError for a URL of no kind."""
    if not is_remote(file):
        return Path(file).expanduser().read_bytes()
    fs, path = filesystem(str(file))
    return fs.cat_file(path)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """What reaches a URL, and its path there. ValueError for one of no kind, or that needs what is not installed."""
    kind = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be reached: {error} (gs:// and s3:// need the extra [{kind}])") from error


class Bucket:
    """A run directory at `url` in a bucket, and this process's local copy.

    All methods raise OSError when the bucket fails. The constructor raises ValueError for a URL of
    an unknown kind, or one that needs a package that is not installed.
    """

    is_remote = True

    def __init__(self, url: str):
        self.name, self.process = url.rstrip("/"), processes.name_process()
        self.fs, self.root = filesystem(self.name)
        self._directory = tempfile.TemporaryDirectory(prefix="referee_jax-")
        self.local = Path(self._directory.name)
        self._ends = dict.fromkeys(LINES, 0)  # bytes of each file of lines that were uploaded
        self._parts: collections.Counter[str] = collections.Counter()  # uploads of each
        self._checkpoints: set[str] = set()  # known to be in the bucket
        self._keys: dict[str, str] = {}  # versions of the fetched files that may change
        self._fetched: set[str] = set()

    @property
    def title(self) -> str:
        """The last part of the URL."""
        return self.name.rpartition("/")[2]

    def free(self) -> float:
        """Free bytes: a bucket has no limit."""
        return math.inf

    def claims(self, expiry: float) -> "BucketClaims":
        """The claims of this worker in a pool, which expire after `expiry` seconds."""
        return BucketClaims(self, expiry)

    def close(self) -> None:
        """Removes the local directory."""
        self._directory.cleanup()

    # --- objects ------------------------------------------------------------------------------------------------------

    def names(self, folder: str = "") -> list[str]:
        """The names in a folder of the bucket, sorted."""
        with self._os_errors(), contextlib.suppress(FileNotFoundError):
            paths = self.fs.ls(self._at(folder), detail=False)
            return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)
        return []

    def listing(self, folder: str) -> list[str]:
        """The names in a folder of the bucket and of the local directory."""
        directory = self.local / folder
        return (os.listdir(directory) if directory.is_dir() else []) + self.names(folder)

    def write(self, name: str, data: bytes) -> None:
        """Writes or replaces an object."""
        with self._os_errors():
            self.fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object unless it exists; returns whether it was written."""
        try:
            with self._os_errors():
                self.fs.pipe_file(self._at(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def read(self, name: str) -> bytes | None:
        """An object's content; None if it does not exist."""
        with self._os_errors(), contextlib.suppress(FileNotFoundError):
            return self.fs.cat_file(self._at(name))
        return None

    def remove(self, *names: str) -> None:
        """Removes objects, where they exist."""
        for name in names:
            with self._os_errors(), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._at(name))

    def modified(self, name: str) -> float | None:
        """When an object was last written, Unix seconds of the bucket's clock; None if missing."""
        with self._os_errors(), contextlib.suppress(FileNotFoundError):
            return self.fs.modified(self._at(name)).timestamp()
        return None

    def now(self) -> float:
        """The bucket's clock, Unix seconds."""
        probe = f".{self.process}.now"
        self.write(probe, b"")
        now = self.modified(probe)
        self.remove(probe)
        if now is None:
            raise OSError(f"{self.name}: an object that was just written is missing")
        return now

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[Callable[[], bool]]:
        """Holds a lock across processes. Gives a function: whether the lock is still ours."""
        locks = BucketClaims(self, LOCK, folder="locks", patience=0.0)
        while not locks.take_name(name):
            time.sleep(claims.WAIT)
        try:
            yield lambda: locks.is_ours(name)
        finally:
            locks.close()

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Turns the errors of the bucket's library into OSErrors."""
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # every kind of bucket has its own
            if _is_conflict(error):
                raise FileExistsError(str(error)) from error
            raise OSError(f"{self.name}: {type(error).__name__}: {str(error)[:200]}") from error

    # --- downloads and uploads ----------------------------------------------------------------------------------------

    def begin(self, name: str, data: bytes) -> bool:
        """Writes a run's first file, here and in the bucket; False if another process was first."""
        is_ours = self.create(name, data)
        if is_ours:
            files_lib.write_atomic(self.local / name, data)
        return is_ours

    def fetch(self) -> None:
        """Fetches the current settings, journals and device failures."""
        names = [name for name in self.names() if name.startswith(("metadata", FAILED)) and name.endswith(".jsonl")]
        names = [name for name in names if not name.startswith(f"{FAILED}-{self.process}")]
        fixed = [name for name in names if name != "metadata.jsonl" and not (self.local / name).exists()]
        # Parts first: RunDirectory.merge moves their lines to metadata.jsonl, and so each line is
        # seen at least once.
        self.bring(fixed)
        self.fetch_settings()
        self.bring([name for name in ("metadata.jsonl",) if self._is_new(name)])

    def fetch_settings(self) -> None:
        """Fetches the current settings."""
        self.bring([name for name in ("config.json",) if self._is_new(name)])

    def fetch_checkpoints(self) -> None:
        """Fetches the checkpoints of all processes."""
        with self._os_errors():
            paths = self.fs.find(self._at(CHECKPOINTS))
        names = [path[len(self.root) + 1 :] for path in paths]
        self.bring([name for name in names if not (self.local / name).exists()])
        self._checkpoints.update(names)

    def bring(self, names: Sequence[str]) -> None:
        """Fetches objects into the local directory, where they exist; several per request."""
        for name in names:
            (self.local / name).parent.mkdir(parents=True, exist_ok=True)
        large = [name for name in names if name.startswith("shards/")]
        for name in large:
            with self._os_errors(), contextlib.suppress(FileNotFoundError):
                self.fs.get_file(self._at(name), str(self.local / name))
        small = [name for name in names if name not in large]
        for share in items.batches(small, TOGETHER):
            with self._os_errors():
                contents = self.fs.cat([self._at(name) for name in share], on_error="return")
                for name in share:
                    data = contents[self._at(name)]
                    if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                        raise data
                    if isinstance(data, bytes):
                        (self.local / name).write_bytes(data)
        self._fetched.update(names)

    def bring_images(self, files: Sequence[str]) -> list[str]:
        """Fetches images, and shards up to SHOWN_BYTES; returns the names that were fetched."""
        names, total = [x for x in files if not x.endswith(".tar")], 0
        for shard in (x for x in files if x.endswith(".tar")):
            if total < SHOWN_BYTES:
                names.append(shard)
                total += self._size(shard)
        self.bring([name for name in names if not (self.local / name).exists()])
        return names

    def _size(self, name: str) -> int:
        with self._os_errors(), contextlib.suppress(FileNotFoundError):
            return self.fs.size(self._at(name)) or 0
        return 0

    def send(self) -> None:
        """Uploads what is new. Lines are read before their images are sent, so none comes first."""
        lines = {kind: self._new_lines(kind) for kind in LINES}
        content = [file for folder in CONTENT for file in _files(self.local / folder)]
        content = [file for file in content if self._name(file) not in self._fetched]
        states = {self._name(file): file for file in _files(self.local / CHECKPOINTS, "*/[0-9]*/default/*")}
        self._put(content + [file for name, file in states.items() if name not in self._checkpoints])
        for kind, data in lines.items():
            if data:
                self._parts[kind] += 1
                # Other processes read device failures, and not all the rest of the log.
                stem = FAILED if kind == "log" and b'failed", ' in data else kind
                self.write(f"{stem}-{self.process}-{self._parts[kind]:06d}.jsonl", data)
                self._ends[kind] += len(data)
        for file in content:
            file.unlink(missing_ok=True)
        self.remove(*(self._checkpoints - states.keys()))
        self._checkpoints = set(states)

    def publish(self, *names: str) -> None:
        """Uploads these files, replacing what the bucket has."""
        self._put([self.local / name for name in names if (self.local / name).exists()])

    def merge(self, gather: Callable[[], Sequence[str]]) -> None:
        """Under a lock, merges the journals by `gather`, which returns the names of the merged."""
        self.send()
        is_merged = False
        while not is_merged:
            with self.locked("merge") as is_ours:
                self.fetch()
                merged = gather()
                self._ends["metadata"] = 0  # this process's journal was uploaded, and is now empty
                if is_merged := is_ours():  # else the lock expired, and another process merges
                    self.publish("metadata.jsonl")
                    self.remove(*merged)

    def _is_new(self, name: str) -> bool:
        with self._os_errors(), contextlib.suppress(FileNotFoundError):
            key = self.fs.ukey(self._at(name))
            previous, self._keys[name] = self._keys.get(name), key
            return key != previous
        return False

    def _new_lines(self, kind: str) -> bytes:
        """The whole lines of a local file that were not uploaded yet."""
        file = self.local / (f"{kind}-{self.process}.jsonl" if kind == "metadata" else f"{kind}.jsonl")
        if not file.exists():
            return b""
        with open(file, "rb") as lines:
            lines.seek(self._ends[kind])
            data = lines.read()
        return data[: data.rfind(b"\n") + 1]

    def _put(self, files: Sequence[Path]) -> None:
        if files:
            with self._os_errors():
                self.fs.put([str(file) for file in files], [self._at(self._name(file)) for file in files])

    def _name(self, file: Path) -> str:
        return file.relative_to(self.local).as_posix()


def _is_conflict(error: BaseException | None) -> bool:
    """Whether an error means that the object exists, or that another process is writing it."""
    while error is not None:
        response = getattr(error, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else getattr(error, "code", None)
        if str(code) in ("412", "PreconditionFailed", "ConditionalRequestConflict"):
            return True
        error = error.__cause__
    return False


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    """The finished files in a folder; temporary ones begin with a dot."""
    return [file for file in sorted(folder.glob(pattern)) if file.is_file() and not file.name.startswith(".")]


class BucketClaims:
    """claims.Claims in a bucket: the owners of items in a pool of workers that come and go.

    A claim is an object that only one worker can create. If its owner has not rewritten it for
    `expiry` seconds of the bucket's clock, another may take it over. If two do so at the same
    instant, both may make the item: the images are equal, and the journal counts it once. Other
    workers' claims are listed every `patience` seconds, not requested one by one.
    """

    def __init__(self, bucket: Bucket, expiry: float, *, folder: str = "claims", patience: float = SEEN):
        self.bucket, self.expiry, self.folder, self.patience = bucket, expiry, folder, patience
        # Times are those of this machine's monotonic clock.
        self.held: dict[str, float] = {}  # id -> when it was last written
        self._others: dict[str, float] = {}  # id -> when the claim of another may have expired
        self._listed: set[str] = set()
        self._list_again = -math.inf
        self._ahead: float | None = None  # seconds by which the bucket's clock is ahead of it

    def take(self, item: Item) -> bool:
        """Claims an item; False if another worker holds it."""
        return self.take_name(item.id)

    def take_name(self, name: str) -> bool:
        """`take` of anything that has a name."""
        if name in self.held:
            return True
        now = time.monotonic()
        if now >= self._list_again:
            self._listed = {x.removesuffix(".claim") for x in self.bucket.names(self.folder)}
            self._list_again = now + self.patience
        path = self._path(name)
        if name in self._listed:
            expires = self._others.get(name, 0.0)
            if expires <= now:
                expires = self._expires(path)
            if expires is not None:  # else it was released, and may have a new owner by now
                self._others[name] = expires
                if expires > now:
                    return False
                self.bucket.remove(path)
        if not self.bucket.create(path, self.bucket.process.encode()):
            self._listed.add(name)
            self._others[name] = now + self.patience
            return False
        self.held[name] = now
        return True

    def refresh(self) -> None:
        """Keeps the held claims from expiring; rewrites each when a quarter of its time is over."""
        now = time.monotonic()
        for name, written in self.held.items():
            if now - written > self.expiry / 4 and self.is_ours(name):
                self.bucket.write(self._path(name), self.bucket.process.encode())
                self.held[name] = now

    def release(self, ids: Collection[str]) -> None:
        """Releases items, done or not."""
        for name in ids:
            if self.held.pop(name, None) is not None and self.is_ours(name):
                self.bucket.remove(self._path(name))

    def close(self) -> None:
        """Releases everything."""
        self.release(list(self.held))

    def is_ours(self, name: str) -> bool:
        """Whether the bucket still names this process as the owner."""
        return self.bucket.read(self._path(name)) == self.bucket.process.encode()

    def _expires(self, path: str) -> float | None:
        """When a claim expires unless it is rewritten, by the monotonic clock; None if missing."""
        if self._ahead is None:
            self._ahead = self.bucket.now() - time.monotonic()
        written = self.bucket.modified(path)
        return None if written is None else written - self._ahead + self.expiry

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}.claim"
