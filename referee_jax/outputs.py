"""A run directory: images, their journal, the log, and what was asked for. Nothing in it is ever half written.

    config.json         settings, fingerprint, versions, device
    images/<id>.png     one per item, with its prompt, scores and settings in a text chunk (`read_settings`)
    metadata.jsonl      the journal: one line per finished image, with `file_name`
    log.jsonl           starts, skipped prompts, metrics of every chunk
    contact_sheet.png   all of it at a glance
    gallery.html        all of it to sort, filter and compare (gallery.py)
    trajectories/<id>.webp

It is a Hugging Face ImageFolder: `load_dataset("imagefolder", data_files=["RUN/metadata.jsonl", "RUN/images/*"])`. An
image is on disk before its line is in the journal, so an item is done if both are there, whatever happened in between.
"""

import bisect
import contextlib
import datetime
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from referee_jax import config, queue, watch

CHUNK = "referee_jax"  # keyword of the PNG text chunk
PACKAGES = ("referee_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "pillow")
SHEET_PICTURES = 200


class RunError(ValueError):
    """A run directory that cannot be used; one sentence, perhaps with a list."""


class Picture(Protocol):
    """What is written: see inverter.Picture. `image` is float32 `[H, W, 3]` in [0, 1]."""

    item: queue.Item
    image: np.ndarray
    scores: Mapping[str, float]
    status: str
    losses: Mapping[str, Sequence[float]] | None


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def finite(value: Any) -> Any:
    """`value` as JSON has it: NumPy numbers and arrays as Python's, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    if isinstance(value, np.ndarray | np.generic):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, also after a loss of power. OSError as from the system."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    # The rename itself lives in the directory. Some file systems cannot sync one: only the promise is lost there.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line of JSON (ASCII: no reader splits it elsewhere) to a file, on disk when this returns."""
    line = json.dumps(finite(record), allow_nan=False).encode() + b"\n"
    with open(path, "ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; lines that are not one (half written, say) are left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def read_image(file: str | Path) -> Image.Image:
    """The image in a file, in RGB; ValueError where there is none."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {getattr(error, 'strerror', None) or error}") from error


def mend(path: Path) -> None:
    """Ends a file of JSON lines that a crash cut short: a whole last line gets its end, half a one is taken away."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        data = file.read()
        start = data.rfind(b"\n") + 1
        if start == len(data):
            return
        try:
            json.loads(data[start:])
            file.write(b"\n")
        except ValueError:
            file.truncate(start)
        file.flush()
        os.fsync(file.fileno())


class RunDirectory:
    """A run directory that is written to."""

    def __init__(self, path: Path, settings: config.Settings):
        self.path, self.settings = path, settings
        self.images, self.journal, self.log_file = path / "images", path / "metadata.jsonl", path / "log.jsonl"
        self.fingerprint = config.fingerprint(settings)

    @classmethod
    def open(cls, path: str | os.PathLike, settings: config.Settings, *, device: str = "") -> "RunDirectory":
        """Begins a run directory or continues one; `device` is noted in it.

        Raises RunError where it cannot be written, holds something else, or was begun for other images.
        """
        run = cls(Path(path).expanduser(), settings)
        try:
            run._begin(device)
        except OSError as error:
            raise RunError(f"the run directory {run.path} cannot be written: {error.strerror or error}") from error
        return run

    def _begin(self, device: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "config.json"
        if file.exists():
            self._compare(file)
        elif any(not x.name.startswith(".") for x in self.path.iterdir()):
            raise RunError(
                f"{self.path} is not empty and not a run directory (no config.json); choose another --workdir"
            )
        else:
            record = {
                "fingerprint": self.fingerprint,
                "settings": config.to_dict(self.settings),
                "versions": versions(),
                "device": device,
                "created": now(),
            }
            write_atomic(file, json.dumps(record, indent=2).encode() + b"\n")
        self.images.mkdir(exist_ok=True)
        for left in self.images.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        for lines in (self.journal, self.log_file):
            mend(lines)
        self._forget_lost()
        # Also the proof that the directory can be written to.
        self.log("start", device=device, versions=versions())

    def _compare(self, file: Path) -> None:
        try:
            old = json.loads(file.read_bytes())
            fingerprint, settings = old["fingerprint"], old["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} is damaged ({error!r}); choose another --workdir") from error
        if fingerprint != self.fingerprint:
            changes = config.diff(config.image_part(settings), config.image_settings(self.settings))
            raise RunError(
                f"{self.path} was begun with other settings; choose another --workdir, or take back:\n{changes}"
            )

    def _forget_lost(self) -> None:
        """Takes the lines of images that are no longer there out of the journal: they will be made again."""
        records = read_lines(self.journal)
        kept = {x["file_name"]: x for x in records if "file_name" in x and (self.path / x["file_name"]).is_file()}
        if len(kept) < len(records):
            write_atomic(self.journal, b"".join(json.dumps(x).encode() + b"\n" for x in kept.values()))

    def finished(self) -> list[dict[str, Any]]:
        """The journal's lines whose images are there, each image once."""
        return list(self._finished().values())

    def _finished(self) -> dict[str, dict[str, Any]]:
        records = {x["id"]: x for x in read_lines(self.journal) if isinstance(x.get("id"), str)}
        return {name: x for name, x in records.items() if self.image_file(name).is_file()}

    def done(self) -> set[str]:
        """The ids of all items that are journalled and whose images are there."""
        return set(self._finished())

    def image_file(self, name: str) -> Path:
        """Where the image of an item's id is."""
        return self.images / f"{name}.png"

    def write(self, picture: Picture, *, seconds: float) -> str:
        """Writes an image and then its line; `seconds` is what it took. Returns the status in the journal.

        It is the picture's ("done"), or "nonfinite" if a pixel or a score is not a finite number.
        """
        item, scores = picture.item, finite(dict(picture.scores))
        is_finite = np.isfinite(picture.image).all() and None not in scores.values()
        record = {
            "file_name": f"images/{item.id}.png",
            "text": item.prompt,
            "id": item.id,
            "sample": item.sample,
            "seed": self.settings.seed,
            "scores": scores,
            "status": picture.status if is_finite else "nonfinite",
            **_watched(picture.losses),
            "seconds": round(seconds, 3),
            "time": now(),
        }
        chunk = {key: x for key, x in record.items() if key not in ("file_name", "seconds")}
        chunk |= {"fingerprint": self.fingerprint, "settings": config.image_settings(self.settings)}
        write_atomic(
            self.image_file(item.id), encode_png(to_uint8(picture.image, stretch=self.settings.outputs.stretch), chunk)
        )
        append(self.journal, record)
        return record["status"]

    def log(self, event: str, **values: Any) -> None:
        """Adds a line to log.jsonl."""
        append(self.log_file, {"event": event, "time": now(), **values})

    def trajectory(self, name: str, frames: Sequence[np.ndarray]) -> Path:
        """Writes uint8 frames `[H, W, 3]` of the item with this id as an animation that rests on its last frame."""
        path = self.path / "trajectories" / f"{name}.webp"
        path.parent.mkdir(exist_ok=True)
        first, *rest = [Image.fromarray(frame) for frame in frames]
        buffer = io.BytesIO()
        durations = [100] * len(rest) + [1500]
        first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=90)
        write_atomic(path, buffer.getvalue())
        return path

    def contact_sheet(self) -> Path | None:
        """Writes contact_sheet.png of the first SHEET_PICTURES images, prompt by prompt; None without images."""
        order: dict[str, int] = {}
        records = self.finished()
        for record in records:
            order.setdefault(record["text"], len(order))
        records.sort(key=lambda x: (order[x["text"]], x["sample"]))
        if not records:
            return None
        shown = [(self.path / x["file_name"], x["text"], x["scores"]) for x in records[:SHEET_PICTURES]]
        title = (
            f"{self.path.resolve().name}: {len(shown)} of {len(records)} images" if len(records) > len(shown) else ""
        )
        buffer = io.BytesIO()
        draw_sheet(shown, title=title).save(buffer, "PNG")
        path = self.path / "contact_sheet.png"
        write_atomic(path, buffer.getvalue())
        return path


def _watched(losses: Mapping[str, Sequence[float]] | None) -> dict[str, Any]:
    """What the journal says of the watch (watch.py): first and last losses, and whether they look like reward hacking."""
    return {"losses": finite(losses), "hacked": watch.is_hacked(losses)} if losses else {}


def to_uint8(image: np.ndarray, *, stretch: bool = False) -> np.ndarray:
    """An image in [0, 1] to uint8; what is not finite is black. `stretch` spreads its values over 0..255."""
    image = np.nan_to_num(np.asarray(image, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    if stretch:
        low, high = image.min(), image.max()
        image = (image - low) / max(high - low, 1e-12)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def encode_png(image: np.ndarray, settings: Mapping[str, Any]) -> bytes:
    """A PNG of uint8 `[H, W, 3]` with `settings` as JSON in its text chunk."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps(finite(settings)))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_settings(png: str | os.PathLike) -> dict[str, Any]:
    """What an image was made from: prompt (`text`), sample, seed, scores, settings. ValueError if it does not say."""
    with Image.open(png) as image:
        text = getattr(image, "text", {}).get(CHUNK)
    if text is None:
        raise ValueError(f"{png} was not written by referee_jax: it has no text chunk {CHUNK!r}")
    return json.loads(text)


# --- contact sheet ----------------------------------------------------------------------------------------------------


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, *, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels; a word that is too long is broken, a text cut with "..."."""
    wrapped = list(itertools.islice(_wrapped(text, font, width), lines + 1))
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        wrapped = [*wrapped[: lines - 1], last + "..."]
    return wrapped


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") <= width:
            line = f"{line} {word}"
            continue
        if line:
            yield line
        line = word
        while font.getlength(line) > width and len(line) > 1:
            # By halves: a word of 2000 letters would take minutes to measure at every length.
            fits = bisect.bisect_right(range(1, len(line)), width, key=lambda n: font.getlength(line[:n])) or 1
            yield line[:fits]
            line = line[fits:]
    if line:
        yield line


def _thumbnail(file: Path, width: int) -> Image.Image:
    """At least `width` wide by whole pixels, or shrunk to it."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    if image.width < width:
        factor = -(-width // image.width)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)


def draw_sheet(
    pictures: Sequence[tuple[Path, str, Mapping[str, float | None]]], *, title: str = "", width: int = 192
) -> Image.Image:
    """A grid of image files with their texts and scores below."""
    margin, size, lines = 12, 15, 4
    font, small = ImageFont.load_default(size), ImageFont.load_default(size - 2)
    images = [_thumbnail(file, width) for file, _, _ in pictures]
    wide, high = max(x.width for x in images), max(x.height for x in images)
    texts = [wrap(text, font, wide, lines=lines) for _, text, _ in pictures]
    said = [[wrap(_score(*x), small, wide, lines=1)[0] for x in scores.items()] for _, _, scores in pictures]
    leading = size + 4
    below = leading * max(len(a) + len(b) for a, b in zip(texts, said, strict=True))
    columns = min(len(pictures), max(4, math.ceil(math.sqrt(len(pictures)))))
    rows, top = -(-len(pictures) // columns), leading + margin if title else 0
    cell = wide + margin, high + below + margin
    sheet = Image.new("RGB", (margin + columns * cell[0], top + margin + rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin), title, font=font, fill="black")
    for n, image in enumerate(images):
        x, y = margin + n % columns * cell[0], top + margin + n // columns * cell[1]
        sheet.paste(image, (x, y))
        y += high + 2
        for text, kind, colour in [(t, font, "black") for t in texts[n]] + [(t, small, "#666666") for t in said[n]]:
            draw.text((x, y), text, font=kind, fill=colour)
            y += leading
    return sheet


def _score(name: str, value: float | None) -> str:
    return f"{name} {'not finite' if value is None else format(value, '.3f')}"
