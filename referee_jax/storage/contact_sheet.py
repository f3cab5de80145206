"""The contact sheet: a picture of the first images of a run."""

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import logging
from PIL import Image, ImageDraw, ImageFont

from referee_jax.storage import images as images_lib

SHEET_PICTURES = 200


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
    """At least `width` wide by whole pixels, or shrunk to it; of a damaged file, grey."""
    try:
        image = images_lib.read_image(file)
    except ValueError as error:
        logging.warning("%s", error)
        image = Image.new("RGB", (width, width), "#bbbbbb")
    if image.width < width:
        factor = -(-width // image.width)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)


def draw_sheet(
    pictures: Sequence[tuple[Path, str, Mapping[str, float | None]]], *, title: str = "", width: int = 192
) -> Image.Image:
    """A grid of images (files, or in shards) with their texts and scores below."""
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
