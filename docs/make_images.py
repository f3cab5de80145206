"""Draws the pictures of the README: `python docs/make_images.py`, three minutes on two CPU cores.

docs/images/sampling_and_method.png shows for each prompt of configs/shapes.py a plain DDIM sample (50 steps,
guidance 7.5) above the method's picture, both of seed 0, framed by the detector's verdict.
docs/images/trajectory.webp shows the method at work from noise, as published, with configs/shapes_clip.py: of two
pictures of each prompt the one that ends right and cleanest.
"""

import dataclasses
import pathlib
import textwrap

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

import referee_jax
from referee_jax import cli, items
from referee_jax.engine import inverter
from referee_jax.shapes import benchmark

DOCS = pathlib.Path(__file__).parent
CONFIG, FROM_NOISE = (DOCS.parent / "configs" / name for name in ("shapes.py", "shapes_clip.py"))
SEED, SAMPLES = 0, 2
SIDE, GAP, LABEL, TEXT = 120, 6, 96, 80  # pixels of the sheet
FRAME_SIDE, FRAME_MS, LAST_MS = 256, 120, 1500
MARKS = {True: ("right", (30, 130, 60)), False: ("wrong", (200, 40, 40))}


def enlarged(image: np.ndarray, side: int) -> PIL.Image.Image:
    """A picture `[H, W, 3]`, uint8 or in [0, 1], as a square of `side` pixels."""
    pixels = image if image.dtype == np.uint8 else np.round(image * 255).astype(np.uint8)
    return PIL.Image.fromarray(pixels).resize((side, side), PIL.Image.Resampling.BICUBIC)


def draw_sheet(prompts: list[str], rows: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> PIL.Image.Image:
    """A column for each prompt, a row for each way to make pictures `[prompt, H, W, 3]`."""
    size = LABEL + len(prompts) * (SIDE + GAP), TEXT + len(rows) * (SIDE + GAP)
    sheet = PIL.Image.new("RGB", size, "white")
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(13)
    for column, prompt in enumerate(prompts):
        place = LABEL + column * (SIDE + GAP) + SIDE // 2, TEXT - GAP
        draw.multiline_text(place, textwrap.fill(prompt, 18), "black", font, anchor="md", align="center")
    for row, (name, pictures) in enumerate(rows.items()):
        top = TEXT + row * (SIDE + GAP)
        label = f"{name}\n\n{right[name].sum()} of {len(prompts)} right"
        draw.multiline_text((GAP, top + SIDE // 2), label, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            left, colour = LABEL + column * (SIDE + GAP), MARKS[bool(right[name][column])][1]
            sheet.paste(enlarged(picture, SIDE), (left, top))
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=colour, width=2)
    return sheet


def trajectories(engine: inverter.Inverter, prompts: list[str]) -> tuple[list[items.Item], np.ndarray]:
    """The items, and their pictures after each chunk: uint8 `[frame, item, H, W, 3]`."""
    todo, films = items.expand(prompts, SAMPLES), []
    for batch_items in items.batches(todo, engine.batch_size):
        batch = engine.begin(batch_items, SEED)
        frames = [engine.preview(batch)]
        while batch.step < engine.steps:
            batch, _ = engine.advance(batch)
            frames.append(engine.preview(batch))
        films.append(np.stack(frames))
    return todo, np.concatenate(films, axis=1)


def draw_film(prompt: str, pictures: np.ndarray, chunk: int) -> list[PIL.Image.Image]:
    """A frame for each of `pictures` `[frame, H, W, 3]`, with the detector's verdict below."""
    right, _ = benchmark.score(pictures / 255, [prompt] * len(pictures))
    frames, font = [], PIL.ImageFont.load_default(14)
    for n, picture in enumerate(pictures):
        frame = PIL.Image.new("RGB", (FRAME_SIDE, FRAME_SIDE + 46), "white")
        frame.paste(enlarged(picture, FRAME_SIDE))
        draw, (verdict, colour) = PIL.ImageDraw.Draw(frame), MARKS[bool(right[n])]
        draw.text((4, FRAME_SIDE + 4), prompt, "black", font)
        draw.text((4, FRAME_SIDE + 24), f"iteration {n * chunk:2d}: {verdict}", colour, font)
        frames.append(frame)
    return frames


def main() -> None:
    """Makes both files."""
    cli.prepare("auto")
    out = DOCS / "images"
    out.mkdir(exist_ok=True)
    settings = referee_jax.load_config(CONFIG)
    prompts = list(settings.prompts)
    engine = inverter.Inverter.from_config(settings)
    rows = {
        "sampling\n(DDIM)": engine.sample(prompts, samples=1, seed=SEED, steps=50, guidance=7.5).images,
        "the method": engine(prompts, samples=1, seed=SEED).images,
    }
    right = {name: benchmark.score(pictures, prompts)[0] for name, pictures in rows.items()}
    sheet = draw_sheet(prompts, rows, right)
    sheet.quantize(255, dither=PIL.Image.Dither.NONE).save(out / "sampling_and_method.png", optimize=True)

    settings = dataclasses.replace(referee_jax.load_config(FROM_NOISE), init="noise", init_candidates=1, chunk=2)
    prompts = list(settings.prompts)
    todo, films = trajectories(inverter.Inverter.from_config(settings), prompts)
    is_right, quality = benchmark.score(films[-1] / 255, [item.prompt for item in todo])
    best = int(np.argmax(np.where(is_right, quality, -np.inf)))
    frames = draw_film(todo[best].prompt, films[:, best], settings.chunk)
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    frames[0].save(
        out / "trajectory.webp", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=80
    )
    for file in sorted(out.iterdir()):
        print(f"{file} {file.stat().st_size / 1000:.0f} kB")
    counts = ", ".join(f"{x.sum()} by {' '.join(name.split())}" for name, x in right.items())
    print(f"right, of {len(prompts)}: {counts}; {is_right.sum()} of {len(todo)} from noise")


if __name__ == "__main__":
    main()
