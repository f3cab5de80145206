"""The contact sheet: one picture with a grid of a run's first images."""

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
    """Wraps `text` to `lines` lines of `width` pixels, breaking long words; "..." if it is cut."""
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
            # Bisection: measuring a word of 2000 letters at every length would take minutes.
            fits = bisect.bisect_right(range(1, len(line)), width, key=lambda n: font.getlength(line[:n])) or 1
            yield line[:fits]
            line = line[fits:]
    if line:
        yield line


def _thumbnail(image: Path | Image.Image, width: int) -> Image.Image:
    """The image, or that of a file, enlarged by a whole factor to `width` or more, or shrunk to it; grey if broken."""
    try:
        image = images_lib.read_image(image) if isinstance(image, Path) else image
    except ValueError as error:
        logging.warning("%s", error)
        image = Image.new("RGB", (width, width), "#bbbbbb")
    if image.width < width:
        factor = -(-width // image.width)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)


def draw_sheet(
    pictures: Sequence[tuple[Path | Image.Image, str, Mapping[str, float | None]]], *, title: str = "", width: int = 192
) -> Image.Image:
    """A grid of images with their texts and scores below; a picture is (image or its file, text, scores)."""
    margin, size, lines = 12, 15, 4
    font, small = ImageFont.load_default(size), ImageFont.load_default(size - 2)
    images = [_thumbnail(file, width) for file, _, _ in pictures]
    wide, high = max(x.width for x in images), max(x.height for x in images)
    texts = [wrap(text, font, wide, lines=lines) for _, text, _ in pictures]
    captions = [[wrap(_score(*x), small, wide, lines=1)[0] for x in scores.items()] for _, _, scores in pictures]
    leading = size + 4
    below = leading * max(len(a) + len(b) for a, b in zip(texts, captions, strict=True))
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
        rows_below = [(text, font, "black") for text in texts[n]] + [(text, small, "#666666") for text in captions[n]]
        for text, face, colour in rows_below:
            draw.text((x, y), text, font=face, fill=colour)
            y += leading
    return sheet


def _score(name: str, value: float | None) -> str:
    return f"{name} {'not finite' if value is None else format(value, '.3f')}"
