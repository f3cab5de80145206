"""Reads a picture of the shapes world back into a scene, with classical vision only: the world's ground truth.

1. Background: the median of the bright, grey pixels. Ink: pixels further from it than `INK`.
2. Colour: seeds (pixels not paler than their neighbourhood, so never an edge) take the nearest palette colour; all
   other ink takes that of its nearest seed. This separates touching objects of different colours.
3. Grouping: per colour, ink at most four pixels apart is one object, since textures leave white gaps; where the
   object fits badly, its pieces are tried separately.
4. Template matching: the ink of a group is compared with drawings of every shape, texture, phase of the texture,
   radius and place (a bank drawn once by `world`); the best few are refined to less than a pixel.

Pictures of a generator have soft edges, slightly wrong colours, shifted textures and debris. So phases are free,
ink under `DEBRIS` pixels is ignored, and other ink that fits no shape is an object of shape "unknown", which no
caption names.
"""

import dataclasses
import functools

import numpy as np
from scipy import ndimage

from referee_jax.shapes import world

INK = 0.25  # RGB distance from the background, 0..sqrt 3; white on the darkest background has 0.14, full pink 0.5
DEBRIS = 12  # pixels; less is ignored, more is an object. The smallest object of the world (a star) has 55.
OVERLAP = 0.7  # soft intersection over union of ink and drawing; below, the shape is unknown
SURE = 0.8  # above, an object is not tried in pieces
UNKNOWN = "unknown"

_RADII = np.arange(5, 20.25, 0.5)
_PHASES = {
    "solid": [(0.0, 0.0)],
    "striped": [(p, 0.0) for p in (0.0, 1.4, 2.8, 4.2, 5.6)],
    "dotted": [(p, q) for p in (0.0, -2.0, 2.0) for q in (0.0, -2.0, 2.0)],
}
_KINDS = [(texture, phase) for texture, phases in _PHASES.items() for phase in phases]
# Groups of kinds, of each of which the best is a candidate: solid, striped, dotted, as the world draws them; then
# striped and dotted with any phase.
_CHOICES = (slice(0, 1), slice(1, 2), slice(6, 7), slice(1, 6), slice(6, 15))
_SHIFTS = np.arange(-2, 3)
_BLUR = 0.08  # of the bank: between a clean drawing and a soft picture


@dataclasses.dataclass(frozen=True)
class Detection:
    """A scene, and `quality`, the PSNR in dB of the picture against a drawing of that scene."""

    scene: world.Scene
    quality: float


def detect(image: np.ndarray) -> Detection:
    """The scene that a picture shows, and the picture's quality.

    `image` is `[64, 64, 3]`, float in [0, 1] or uint8; raises ValueError for other shapes. Objects are ordered by
    colour; their shape is "unknown" if no drawing fits. A picture that is mostly ink, or without a light
    background, is one unknown object.
    """
    image = np.asarray(image)
    if image.shape != (world.SIZE, world.SIZE, 3):
        raise ValueError(f"a picture of the shapes world is 64x64x3, not {image.shape}")
    image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else np.clip(image.astype(np.float32), 0, 1)
    ground = _background(image)
    grey = int(np.clip(round(255 * float(ground.mean())), 235, 255))
    ink = np.linalg.norm(image - ground, axis=-1)
    if (ink > INK).mean() > 0.6 or ground.min() < 0.75:  # more ink than any scene holds, or no light background
        objects = [world.Object(UNKNOWN, _nearest(image.reshape(-1, 3).mean(0)), "solid")]
    else:
        objects = [item for mask in _by_colour(image, ground, ink) for item in _read(image, ground, mask)]
    scene = world.Scene(tuple(objects), grey)
    known = dataclasses.replace(scene, objects=tuple(o for o in objects if o.shape != UNKNOWN)[: world.MAX_OBJECTS])
    error = float(np.mean((world.draw(known)[0] - image) ** 2))
    return Detection(scene, -10 * np.log10(max(error, 1e-6)))


def judge(image: np.ndarray, text: str) -> bool:
    """Whether a picture shows exactly what a caption says. Raises ValueError for a text that is no caption."""
    return world.matches(world.parse(text), detect(image).scene)


# --- segmentation ------------------------------------------------------------------------------------------------------


def _background(image: np.ndarray) -> np.ndarray:
    pixels = image.reshape(-1, 3)
    light = (pixels.min(1) > 0.8) & (np.ptp(pixels, axis=1) < 0.12)
    return np.median(pixels[light] if light.mean() > 0.2 else pixels, axis=0)


def _palette() -> np.ndarray:
    return np.array(list(world.COLOURS.values()), np.float32) / 255


def _nearest(colour: np.ndarray) -> str:
    return tuple(world.COLOURS)[int(np.argmin(((colour - _palette()) ** 2).sum(-1)))]


def _paint(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Index of the palette colour of pixels `[n, 3]`, which may be mixed with the background (thin parts are pale).

    Mixtures have a penalty, since pink is near to pale red.
    """
    toward = _palette() - ground
    share = np.clip((pixels - ground) @ toward.T / (toward**2).sum(-1), 0.3, 1)
    residual = np.linalg.norm((pixels - ground)[:, None] - share[..., None] * toward, axis=-1)
    return np.argmin(residual + 0.1 * (1 - share), axis=-1)


def _by_colour(image: np.ndarray, ground: np.ndarray, ink: np.ndarray) -> list[np.ndarray]:
    """Masks of all ink, one per palette colour, fringes aside."""
    inked = ink > INK
    seeds = inked & (ink >= 0.9 * ndimage.maximum_filter(ink, 5))
    if not seeds.any():
        return []
    kinds = np.full(ink.shape, -1)
    kinds[seeds] = _paint(image[seeds], ground)
    kinds = _follow(_without_fringes(kinds, inked), inked)
    return [kinds == k for k in range(len(world.COLOURS)) if np.any(kinds == k)]


def _follow(kinds: np.ndarray, inked: np.ndarray) -> np.ndarray:
    """The kind of the nearest seed at each pixel of ink; -1 elsewhere."""
    rows, columns = ndimage.distance_transform_edt(kinds < 0, return_distances=False, return_indices=True)
    return np.where(inked, kinds[rows, columns], -1)


def _without_fringes(kinds: np.ndarray, inked: np.ndarray) -> np.ndarray:
    """The seeds without those of discoloured fringes of an object of another colour.

    A fringe has less than 30 % of the seeds of that object, is part of the same ink, and is thin.
    """
    whole, _ = ndimage.label(ndimage.binary_dilation(inked, iterations=2), np.ones((3, 3)))
    nearest, cleaned = _follow(kinds, inked), kinds.copy()
    for i in np.unique(whole[kinds >= 0]):
        counts = np.bincount(kinds[(whole == i) & (kinds >= 0)], minlength=len(world.COLOURS))
        for k in np.flatnonzero((counts > 0) & (counts < 0.3 * counts.max())):
            fringe = (whole == i) & (nearest == k)
            if ndimage.binary_opening(fringe, np.ones((3, 3))).sum() < DEBRIS:
                cleaned[fringe] = -1
    return cleaned


def _read(image: np.ndarray, ground: np.ndarray, mask: np.ndarray) -> list[world.Object]:
    """The objects in the ink of one colour."""
    inked = image[mask]
    strength = np.linalg.norm(inked - ground, axis=-1)
    colour = np.median(inked[strength >= 0.8 * np.quantile(strength, 0.9)], axis=0)
    toward = ground - colour
    share = np.clip((ground - image) @ toward / (toward @ toward), 0, 1).astype(np.float32)
    share *= ndimage.binary_dilation(mask, iterations=2) & (mask | (share < 0.5))
    full = mask & (share > 0.5)
    # Three ways to group ink, from generous to strict: across gaps of four pixels, of two, of none.
    levels = []
    for gap, least in ((2, 0.25), (1, 0.5), (0, 0.5)):
        bridged = mask & (share > least)
        bridged = ndimage.binary_dilation(bridged, iterations=gap) if gap else bridged
        levels.append(ndimage.label(bridged, np.ones((3, 3)))[0] * full)
    return [item for group in _parts(full, levels[0]) for item, _ in _take(image, ground, share, group, levels[1:])]


def _parts(group: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """The parts of a group by their labels, without debris."""
    parts = [group & (labels == i) for i in np.unique(labels[group])]
    return [part for part in parts if part.sum() >= DEBRIS]


def _take(
    image: np.ndarray, ground: np.ndarray, share: np.ndarray, group: np.ndarray, levels: list[np.ndarray]
) -> list[tuple[world.Object, float]]:
    """A group as one object, or as its parts if all of them fit better: (object, overlap) of each."""
    item, overlap = _match(image, ground, share, group)
    pairs = [(item, overlap)]
    if overlap < SURE:
        for level, labels in enumerate(levels):
            parts = _parts(group, labels)
            if len(parts) > 1:
                split = [pair for part in parts for pair in _take(image, ground, share, part, levels[level + 1 :])]
                if min(score for _, score in split) > max(overlap, OVERLAP):
                    return split
                break
    if overlap >= OVERLAP:
        x, y = (
            ticks + 0.5 - at
            for ticks, at in zip(np.meshgrid(*[np.arange(world.SIZE)] * 2), (item.x, item.y), strict=True)
        )
        rest = group & ~ndimage.binary_dilation(
            world._inside(item.shape, x / item.radius, y / item.radius), iterations=2
        )
        for part in _parts(rest, ndimage.label(rest)[0]):
            rows, columns = np.nonzero(part)
            radius = float(np.sqrt(len(rows) / np.pi))
            pairs.append(
                (world.Object(UNKNOWN, item.colour, "solid", columns.mean() + 0.5, rows.mean() + 0.5, radius), 0.0)
            )
    return pairs


# --- template matching -------------------------------------------------------------------------------------------------


def _drawing(
    half: int, shape: str, texture: str, x: float, y: float, radius: float, p: float, q: float, blur: float
) -> np.ndarray:
    """The share of colour in each pixel of a window, float32 `[2 half, 2 half]`.

    Args:
        half: half the window's side in pixels.
        shape: of the object.
        texture: of the object.
        x: offset of the object from the window's middle, to the right.
        y: the same, down.
        radius: in pixels.
        p: shift of the texture to the right.
        q: the same, down.
        blur: weight of either neighbour in a row and in a column; 0 is sharp.
    """
    ticks = ((np.arange(4 * half) + 0.5) / 2 - half).astype(np.float32)
    u, v = ticks[None] - np.float32(x), ticks[:, None] - np.float32(y)
    ink = world._inside(shape, u / radius, v / radius)
    if texture != "solid":
        ink &= ~world._is_white(texture, u - p, v - q)
    ink = ink.view(np.int8)
    ink = (ink[::2, ::2] + ink[1::2, ::2] + ink[::2, 1::2] + ink[1::2, 1::2]) * np.float32(0.25)
    for image in (ink, ink.T):
        image[1:-1] += blur * (image[:-2] - 2 * image[1:-1] + image[2:])
    return ink


@functools.cache
def _span(shape: str) -> tuple[float, float, float, float]:
    """The extent of a shape of radius 1: left, right, top, bottom."""
    ticks = np.linspace(-1.2, 1.2, 481)
    inside = world._inside(shape, ticks[None], ticks[:, None])
    across, down = ticks[inside.any(0)], ticks[inside.any(1)]
    return across[0], across[-1], down[0], down[-1]


@functools.cache
def _bank(shape: str, radius: float) -> tuple[int, np.ndarray, np.ndarray]:
    """Half the side of a window that just holds a shape, its drawings `[kind, pixel]`, and their squared norms."""
    half = int(np.ceil(radius)) + 2
    drawings = [_drawing(half, shape, texture, 0, 0, radius, *phase, _BLUR).ravel() for texture, phase in _KINDS]
    drawings = np.array(drawings)
    return half, drawings, (drawings**2).sum(-1, keepdims=True)


def _match(image: np.ndarray, ground: np.ndarray, share: np.ndarray, group: np.ndarray) -> tuple[world.Object, float]:
    """The object that fits the ink of a group best, and its soft intersection over union with the ink."""
    ink = share * ndimage.binary_dilation(group, iterations=2)
    rows, columns = np.nonzero(group)
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    row, column = (top + bottom) // 2, (left + right) // 2
    margin = int(_RADII[-1]) + 8
    padded = np.pad(ink, margin)

    def window(half: int, row: int, column: int) -> np.ndarray:
        return padded[row + margin - half : row + margin + half, column + margin - half : column + margin + half]

    energy = float((ink**2).sum())
    candidates = []
    for shape in world.SHAPES:
        x0, x1, y0, y1 = _span(shape)
        guess = ((right - left) / (x1 - x0) + (bottom - top) / (y1 - y0)) / 2
        middle = int(np.clip(round((top + bottom) / 2 - guess * (y0 + y1) / 2), row - 4, row + 4))
        first = int(np.clip(round((guess - _RADII[0]) / 0.5) - 3, 0, len(_RADII) - 7))
        radii = _RADII[first : first + 7]
        error = np.empty((len(_KINDS), len(radii), len(_SHIFTS) ** 2), np.float32)
        for r, radius in enumerate(radii):
            half, drawings, squares = _bank(shape, float(radius))
            near = window(half + 2, middle, column)
            near = np.lib.stride_tricks.sliding_window_view(near, (2 * half, 2 * half))
            error[:, r] = squares - 2 * (drawings @ near.reshape(len(_SHIFTS) ** 2, -1).T)
        for choice in _CHOICES:
            k, r, s = np.unravel_index(np.argmin(error[choice]), error[choice].shape)
            down, across = (int(_SHIFTS[n]) for n in divmod(int(s), len(_SHIFTS)))
            place = (float(across), float(middle + down - row), float(radii[r]))
            kind = _KINDS[choice.start + k]
            candidates.append(
                (float(error[choice][k, r, s]) + energy, shape, *kind, place, choice.stop - choice.start > 1)
            )
    candidates.sort(key=lambda item: item[0])
    limit = 2 * candidates[0][0] + 4  # the bank's half steps can double the error of the right drawing
    candidates = [item for item in candidates[:5] if item[0] <= limit]
    half = min(margin - 1, int(np.ceil(max(item[4][2] for item in candidates))) + 5)
    target = window(half, row, column)
    refined = [_refine(target, *item[1:]) for item in candidates]
    error, shape, texture, (x, y, radius), drawing = min(refined, key=lambda item: item[0])
    overlap = float(np.minimum(drawing, target).sum() / np.maximum(drawing, target).sum())
    # The colour that, mixed with the background as in the drawing, is nearest to the picture.
    box = np.pad(image, ((half, half), (half, half), (0, 0)))[row : row + 2 * half, column : column + 2 * half]
    weight = drawing * target
    colour = ground - (weight[..., None] * (ground - box)).sum((0, 1)) / max(float((weight * drawing).sum()), 1e-6)
    shape = shape if overlap >= OVERLAP else UNKNOWN
    return world.Object(shape, _nearest(colour), texture, float(column + x), float(row + y), float(radius)), overlap


def _refine(target: np.ndarray, shape: str, texture: str, phase: tuple, place: tuple, free: bool) -> tuple:
    """Refines centre, radius, phase and blur by pattern search: (cost, shape, texture, place, drawing).

    Args:
        target: the ink, `[2 half, 2 half]`.
        shape: of the object.
        texture: of the object.
        phase: shift of the texture.
        place: centre and radius.
        free: whether the phase may change.
    """

    def compare(values: np.ndarray) -> tuple[float, np.ndarray]:
        drawing = _drawing(len(target) // 2, shape, texture, *values)
        return float(((drawing - target) ** 2).sum()), drawing

    best = np.array([*place, *phase, _BLUR])
    error, drawing = compare(best)
    phases = {"solid": (), "striped": (3,), "dotted": (3, 4)}[texture] if free else ()
    for step in (0.5, 0.25, 0.125):
        for axis in (0, 1, 2, *phases, 5):
            for sign in (1, -1):
                trial = best.copy()
                trial[axis] += sign * step * (0.16 if axis == 5 else 1)
                trial[5] = np.clip(trial[5], 0, 0.24)
                new, other = compare(trial)
                if new < error:
                    best, error, drawing = trial, new, other
                    break
    # A free phase has a penalty, since in clean pictures it is fixed.
    return error * (1.5 if free else 1) + free, shape, texture, tuple(best[:3]), drawing
