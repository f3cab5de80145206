"""A run directory in a bucket: gs://, s3://, and whatever else fsspec reaches.

A bucket has no locks, appends nothing and shows no half object. So each process works in a local directory of its own
(`Bucket.local`), and sends what is new there. An object is written once and whole:

    images/, shards/, trajectories/         as in any run directory; what is sent leaves the local disk
    metadata-<who>-<n>.jsonl, log-...       lines of the journal and of the log that came since the last time
    metadata.jsonl                          the lines of all, when somebody ends (`Bucket.locked`)
    checkpoints/                            removed there when they are removed here
    claims/<id>.claim                       who makes what, in a pool of workers (`Claims`)

An image is there before its line. Only this file knows fsspec.
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
CHECKPOINTS = "checkpoints"
SHOWN_BYTES = 1e9  # of shards, of which each is fetched as a whole
TOGETHER = 32  # objects that are fetched at once
LOCK = 600.0  # seconds after which a lock's owner is taken for dead
SEEN = 10.0  # seconds between two looks at what others have claimed


def is_remote(where: object) -> bool:
    """Whether it names a place in a bucket, as gs://bucket/run."""
    return "://" in str(where)


def local_only(where: str) -> Path:
    """A path. ValueError for a place in a bucket, where only runs are made."""
    if is_remote(where):
        raise ValueError(
            f"{where} is in a bucket: copy it down first (gcloud storage rsync, aws s3 sync), and give its path"
        )
    return Path(where).expanduser()


class Bucket:
    """The place `url` in a bucket, and the local directory of this process that is sent there.

    Every method raises OSError where the bucket does not answer as it should. ValueError for a `url` whose kind is not known,
    or needs a package that is not installed.
    """

    is_remote = True

    def __init__(self, url: str):
        self.name, self.who = url.rstrip("/"), processes.name_process()
        kind = url.partition("://")[0]
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.name, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url} cannot be reached: {error} (gs:// and s3:// need the extra [{kind}])") from error
        self._directory = tempfile.TemporaryDirectory(prefix="referee_jax-")
        self.local = Path(self._directory.name)
        self._ends = dict.fromkeys(LINES, 0)  # how far each file of lines has been sent
        self._parts: collections.Counter[str] = collections.Counter()
        self._there: set[str] = set()  # checkpoints that the bucket has, as far as we know
        self._keys: dict[str, str] = {}  # of what was fetched and may change
        self._brought: set[str] = set()

    @property
    def title(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2]

    def free(self) -> float:
        """A bucket has no end."""
        return math.inf

    def claims(self, expiry: float) -> "BucketClaims":
        """Who makes what, in a pool of workers."""
        return BucketClaims(self, expiry)

    def close(self) -> None:
        """Removes the local directory."""
        self._directory.cleanup()

    # --- objects ------------------------------------------------------------------------------------------------------

    def names(self, folder: str = "") -> list[str]:
        """What is in a folder."""
        with self._asked(), contextlib.suppress(FileNotFoundError):
            found = self.fs.ls(self._at(folder), detail=False)
            return sorted(name.rstrip("/").rpartition("/")[2] for name in found)
        return []

    def listing(self, folder: str) -> list[str]:
        """What is in a folder, and what will be sent there."""
        here = self.local / folder
        return (os.listdir(here) if here.is_dir() else []) + self.names(folder)

    def write(self, name: str, data: bytes) -> None:
        """An object, anew or in place of what it was."""
        with self._asked():
            self.fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """An object, unless there is one; whether it is ours now."""
        try:
            with self._asked():
                self.fs.pipe_file(self._at(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def read(self, name: str) -> bytes | None:
        """An object's content; None where there is none."""
        with self._asked(), contextlib.suppress(FileNotFoundError):
            return self.fs.cat_file(self._at(name))
        return None

    def remove(self, *names: str) -> None:
        """Removes objects, those that are there."""
        for name in names:
            with self._asked(), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._at(name))

    def modified(self, name: str) -> float | None:
        """When an object was last written, by the bucket's own clock, seconds since 1970; None where there is none."""
        with self._asked(), contextlib.suppress(FileNotFoundError):
            return self.fs.modified(self._at(name)).timestamp()
        return None

    def now(self) -> float:
        """The bucket's clock, seconds since 1970."""
        probe = f".{self.who}.now"
        self.write(probe, b"")
        now = self.modified(probe)
        self.remove(probe)
        if now is None:
            raise OSError(f"{self.name}: what was written this moment is not there")
        return now

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[Callable[[], bool]]:
        """Holds a lock that one process has at a time; gives what tells whether it is still ours."""
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
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each kind of bucket raises errors of its own library
            if _is_conflict(error):
                raise FileExistsError(str(error)) from error
            raise OSError(f"{self.name}: {type(error).__name__}: {str(error)[:200]}") from error

    # --- what is fetched and sent -------------------------------------------------------------------------------------

    def begin(self, name: str, data: bytes) -> bool:
        """Writes the first file of a run, here as well, unless another process was first; whether it was ours."""
        is_ours = self.create(name, data)
        if is_ours:
            files_lib.write_atomic(self.local / name, data)
        return is_ours

    def fetch(self) -> None:
        """Brings settings and journals as they are now into the local directory."""
        names = [name for name in self.names() if name.startswith("metadata") and name.endswith(".jsonl")]
        fixed = [name for name in names if name != "metadata.jsonl" and not (self.local / name).exists()]
        # The parts first: `RunDirectory.merge` moves lines to the main one, where they may be seen again but must not be missed.
        self.bring(fixed)
        self.bring([name for name in ("config.json", "metadata.jsonl") if self._is_new(name)])

    def fetch_checkpoints(self) -> None:
        """Brings what any process has left in flight."""
        with self._asked():
            found = self.fs.find(self._at(CHECKPOINTS))
        names = [name[len(self.root) + 1 :] for name in found]
        self.bring([name for name in names if not (self.local / name).exists()])
        self._there.update(names)

    def bring(self, names: Sequence[str]) -> None:
        """Brings objects into the local directory, those that are there; some at once."""
        for name in names:
            (self.local / name).parent.mkdir(parents=True, exist_ok=True)
        large = [name for name in names if name.startswith("shards/")]
        for name in large:
            with self._asked(), contextlib.suppress(FileNotFoundError):
                self.fs.get_file(self._at(name), str(self.local / name))
        small = [name for name in names if name not in large]
        for share in items.batches(small, TOGETHER):
            with self._asked():
                found = self.fs.cat([self._at(name) for name in share], on_error="return")
                for name in share:
                    data = found[self._at(name)]
                    if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                        raise data
                    if isinstance(data, bytes):
                        (self.local / name).write_bytes(data)
        self._brought.update(names)

    def bring_images(self, files: Sequence[str]) -> list[str]:
        """Brings images, and of shards the first few; those that can be opened now."""
        shown, total = [x for x in files if not x.endswith(".tar")], 0
        for shard in (x for x in files if x.endswith(".tar")):
            if total < SHOWN_BYTES:
                shown.append(shard)
                total += self._size(shard)
        self.bring([name for name in shown if not (self.local / name).exists()])
        return shown

    def _size(self, name: str) -> int:
        with self._asked(), contextlib.suppress(FileNotFoundError):
            return self.fs.size(self._at(name)) or 0
        return 0

    def send(self) -> None:
        """Brings the bucket up to the local directory; whatever happens meanwhile, no line comes before its image."""
        lines = {kind: self._news(kind) for kind in LINES}
        content = [file for folder in CONTENT for file in _files(self.local / folder)]
        content = [file for file in content if self._name(file) not in self._brought]
        states = [file for file in _files(self.local / CHECKPOINTS, "*/[0-9]*/default/*")]
        new = [file for file in states if self._name(file) not in self._there]
        self._put(content + new)
        for kind, data in lines.items():
            if data:
                self._parts[kind] += 1
                self.write(f"{kind}-{self.who}-{self._parts[kind]:06d}.jsonl", data)
                self._ends[kind] += len(data)
        for file in content:
            file.unlink(missing_ok=True)
        kept = {self._name(file) for file in states}
        self.remove(*(self._there - kept))
        self._there = kept

    def publish(self, *names: str) -> None:
        """Sends these files as they are, in place of what they were."""
        self._put([self.local / name for name in names if (self.local / name).exists()])

    def merge(self, gather: Callable[[], Sequence[str]]) -> None:
        """Calls what takes all journals into metadata.jsonl, and tells which; one process at a time."""
        self.send()
        is_merged = False
        while not is_merged:
            with self.locked("merge") as is_ours:
                self.fetch()
                taken = gather()
                self._ends["metadata"] = 0  # our own journal, all of which was sent, begins anew
                if is_merged := is_ours():  # else it took so long that another does the same
                    self.publish("metadata.jsonl")
                    self.remove(*taken)

    def _is_new(self, name: str) -> bool:
        with self._asked(), contextlib.suppress(FileNotFoundError):
            key = self.fs.ukey(self._at(name))
            before, self._keys[name] = self._keys.get(name), key
            return key != before
        return False

    def _news(self, kind: str) -> bytes:
        """The whole lines of a local file that were not sent yet."""
        file = self.local / (f"{kind}-{self.who}.jsonl" if kind == "metadata" else f"{kind}.jsonl")
        if not file.exists():
            return b""
        with open(file, "rb") as lines:
            lines.seek(self._ends[kind])
            data = lines.read()
        return data[: data.rfind(b"\n") + 1]

    def _put(self, files: Sequence[Path]) -> None:
        if files:
            with self._asked():
                self.fs.put([str(file) for file in files], [self._at(self._name(file)) for file in files])

    def _name(self, file: Path) -> str:
        return file.relative_to(self.local).as_posix()


def _is_conflict(error: BaseException | None) -> bool:
    """Whether it says that there is an object already, or that another writes it this moment."""
    while error is not None:
        answer = getattr(error, "response", None)
        told = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else getattr(error, "code", None)
        if str(told) in ("412", "PreconditionFailed", "ConditionalRequestConflict"):
            return True
        error = error.__cause__
    return False


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    """The finished files in a folder; others begin with a dot."""
    return [file for file in sorted(folder.glob(pattern)) if file.is_file() and not file.name.startswith(".")]


class BucketClaims:
    """Who makes what, in a pool of workers that come and go: queue.Claims in a bucket.

    A claim is an object that only one can create. One that its owner has not written anew for `expiry` seconds, by the bucket's
    clock, may be taken over; where two take over the same at the same instant, both may make the item: the images are the same,
    and the journal counts it once. The claims of others are listed, once in `patience` seconds, and not asked for one by one.
    """

    def __init__(self, bucket: Bucket, expiry: float, *, folder: str = "claims", patience: float = SEEN):
        self.bucket, self.expiry, self.folder, self.patience = bucket, expiry, folder, patience
        self.held: dict[str, float] = {}  # id -> when it was last written, by this machine's monotonic clock
        self._others: dict[str, float] = {}  # id -> when it may have expired
        self._listed: set[str] = set()
        self._list_again = -math.inf
        self._ahead: float | None = None  # seconds of the bucket's clock before the monotonic one

    def take(self, item: Item) -> bool:
        """Whether the item is ours now: it was already, nobody had it, or who had it is gone."""
        return self.take_name(item.id)

    def take_name(self, name: str) -> bool:
        """`take` of anything with a name."""
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
            if expires is not None:  # else it was given back meanwhile, and may be another's by now
                self._others[name] = expires
                if expires > now:
                    return False
                self.bucket.remove(path)
        if not self.bucket.create(path, self.bucket.who.encode()):
            self._listed.add(name)
            self._others[name] = now + self.patience
            return False
        self.held[name] = now
        return True

    def refresh(self) -> None:
        """Says that we are still at work on what we hold; a few times before it expires, since each is a request."""
        now = time.monotonic()
        for name, written in self.held.items():
            if now - written > self.expiry / 4 and self.is_ours(name):
                self.bucket.write(self._path(name), self.bucket.who.encode())
                self.held[name] = now

    def release(self, ids: Collection[str]) -> None:
        """Gives items back, done or not."""
        for name in ids:
            if self.held.pop(name, None) is not None and self.is_ours(name):
                self.bucket.remove(self._path(name))

    def close(self) -> None:
        """Gives everything back."""
        self.release(list(self.held))

    def is_ours(self, name: str) -> bool:
        """Whether nobody has taken it over."""
        return self.bucket.read(self._path(name)) == self.bucket.who.encode()

    def _expires(self, path: str) -> float | None:
        """When a claim expires that its owner writes no more, by the monotonic clock; None where there is none."""
        if self._ahead is None:
            self._ahead = self.bucket.now() - time.monotonic()
        written = self.bucket.modified(path)
        return None if written is None else written - self._ahead + self.expiry

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}.claim"
