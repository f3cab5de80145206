"""Random augmentations of one view: what is drawn, and what it does to a `[S, S, 3]` image.

Each augmentation is a pair of functions of ONE view; views.py adds the axis of views. The parameters
are physical (an angle in degrees, a shift in pixels, corner points), so a test or a user may set them
by hand, and they alone decide the result. Formulas and pixel conventions are kornia's with
`align_corners=False`: pixel centres at the integers, bilinear, zero outside the image. (The release
that the paper's code pinned, 0.6.12, mixed two conventions: there a shift is longer by S / (S - 1),
and a perspective view smaller by as much about its centre, half a pixel at the border. This is not
reproduced.)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from referee_jax.method.registry import Registry

GREY = (0.299, 0.587, 0.114)
ELASTIC_RADIUS = 31  # half width of the elastic transform's Gaussian, in pixels (kornia's kernel of 63)


@struct.dataclass
class Settings:
    """Magnitudes and probabilities of all augmentations, all of them traced: changing one recompiles nothing.

    Defaults are the paper's for affine, perspective, jitter, erasing and noise; ranges are `(low, high)`, pairs of axes
    are `(x, y)`, shifts are fractions of the view's side, and every `*_p` is the probability that one view is touched.
    """

    affine_degrees: float = 30.0  # largest angle of Af
    affine_translate: tuple[float, float] = (0.0, 0.1)  # largest shifts
    affine_p: float = 1.0
    perspective_distortion: float = 0.2  # how far corners move inwards, in half sides
    perspective_p: float = 0.4
    jitter: tuple[float, float, float, float] = (0.1, 0.1, 0.1, 0.1)  # brightness, contrast, saturation, hue (turns)
    jitter_p: float = 0.5
    erase_area: tuple[float, float] = (0.1, 0.4)  # share of the view
    erase_ratio: tuple[float, float] = (0.3, 3.33)  # height over width
    erase_p: float = 1.0
    noise: float = 0.1  # largest standard deviation of the noise on each view
    flip_p: float = 0.5
    sharpness: float = 0.3  # largest factor of Sh
    sharpness_p: float = 0.5
    gaussian: float = 0.1  # standard deviation of Gn
    gaussian_p: float = 0.5
    rotation_degrees: float = 15.0  # largest angle of Ro
    rotation_p: float = 0.7
    elastic_sigma: float = 32.0  # of the Gaussian, in pixels
    elastic_alpha: float = 1.0  # largest shift of Et, in half sides
    elastic_p: float = 0.7
    spline_scale: float = 0.2  # largest shift of the points of Ts, in half sides
    spline_p: float = 0.7
    crop_padding: float = 0.1  # of Cr, a share of the side
    crop_p: float = 0.5
    resized_area: tuple[float, float] = (0.1, 1.0)  # share of the view in Re
    resized_ratio: tuple[float, float] = (0.75, 4 / 3)  # width over height
    resized_p: float = 0.5


Params = dict[str, Array]
Warp = Callable[[Array, Array, Array], Array]


class Augmentation(NamedTuple):
    """One augmentation of one view.

    Attributes:
        sample: `(u, settings, size) -> params`, with `u` uniform in [0, 1), `[draws]`; where there
            are `channels`, a pair of that and of uniform numbers `[size, size, channels]`.
            `params["on"]` says whether the view is touched at all; views.py selects.
        apply: `(view [S, S, 3], params, warp) -> view`; `warp` is one of the two below.
        draws: how many uniform numbers it takes.
        channels: of the numbers that it takes for each pixel.
    """

    sample: Callable[[Array, Settings, int], Params]
    apply: Callable[[Array, Params, Warp], Array]
    draws: int
    channels: int = 0


def gather_warp(view: Array, x: Array, y: Array) -> Array:
    """Bilinear samples `[..., C]` of `view [H, W, C]` at pixel positions `x, y` (broadcast to `[...]`); zero outside."""
    height, width, channels = view.shape
    x, y = jnp.clip(x, -1, width), jnp.clip(y, -1, height)
    left, top = jnp.floor(x), jnp.floor(y)
    # All four neighbours lie side by side in one row of the table: one gather, and in the backward pass one scatter-add
    # (XLA's slowest operation on a CPU) of a quarter of the rows.
    padded = jnp.pad(view, ((1, 2), (1, 2), (0, 0)))
    corners = (padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:])
    table = jnp.concatenate(corners, -1).reshape(-1, 4 * channels)
    index = (top.astype(jnp.int32) + 1) * (width + 2) + left.astype(jnp.int32) + 1
    rows = table.at[index].get(mode="clip").reshape(*index.shape, 4, channels)
    # Selected, not concatenated: the backward pass would add concatenated parts to the table one element at a time.
    corner = jnp.arange(4)
    right, low = (x - left)[..., None], (y - top)[..., None]
    weights = jnp.where(corner % 2 == 1, right, 1 - right) * jnp.where(corner >= 2, low, 1 - low)
    return (rows * weights[..., None]).sum(-2)


@jax.checkpoint  # the weights are as many as pixels x columns: kept, they would be most of the memory
def _dense_warp(view: Array, x: Array, y: Array) -> Array:
    weight = lambda at, place: jnp.maximum(0, 1 - abs(at - place))
    columns = jnp.einsum("...w,hwc->...hc", weight(x[..., None], jnp.arange(view.shape[1])), view)
    # The rows' weights in full size, channels too: XLA would store smaller ones, and computes these where it reads them.
    rows = jax.lax.broadcasted_iota(jnp.float32, columns.shape, columns.ndim - 2)
    return (columns * weight(y[..., None, None], rows)).sum(-2)


def dense_warp(view: Array, x: Array, y: Array) -> Array:
    """`gather_warp` as a product with the weights of all columns for each pixel, which suits TPUs."""
    return _dense_warp(view, *jnp.broadcast_arrays(x, y))


def _grid(view: Array) -> tuple[Array, Array]:
    """Pixel positions `x [1, W]`, `y [H, 1]` of an image."""
    height, width, _ = view.shape
    return jnp.arange(width, dtype=jnp.float32)[None, :], jnp.arange(height, dtype=jnp.float32)[:, None]


def clamp(x: Array) -> Array:
    """Clamp to `[0, 1]`; the gradient is 1 on the closed interval, as in torch (jnp.clip halves it at the ends)."""
    return jnp.where((x >= 0) & (x <= 1), x, jax.lax.stop_gradient(jnp.clip(x, 0, 1)))


def _between(u: Array, low: Array | float, high: Array | float) -> Array:
    """Uniform numbers of [0, 1) to [low, high)."""
    return low + (jnp.asarray(high, jnp.float32) - low) * u


def normal(u: Array) -> Array:
    """Uniform numbers of [0, 1), multiples of 2^-23, to normal ones: the middle of each step, so none is infinite."""
    return jnp.sqrt(2.0) * jax.lax.erf_inv(2 * u - (1 - 2.0**-23))


def _rotate(view: Array, degrees: Array, shift: Array, warp: Warp) -> Array:
    """Turn clockwise (as displayed) about the centre, then move by `shift (x, y)` pixels."""
    x, y = _grid(view)
    centre_x, centre_y = (view.shape[1] - 1) / 2, (view.shape[0] - 1) / 2
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    x, y = x - centre_x - shift[0], y - centre_y - shift[1]
    return warp(view, cos * x + sin * y + centre_x, cos * y - sin * x + centre_y)


def _sample_affine(u: Array, settings: Settings, size: int) -> Params:
    reach = jnp.asarray(settings.affine_translate, jnp.float32) * size
    return {
        "on": u[0] < settings.affine_p,
        "angle": _between(u[1], -settings.affine_degrees, settings.affine_degrees),
        "shift": _between(u[2:4], -reach, reach),
    }


def _apply_affine(view: Array, params: Params, warp: Warp) -> Array:
    return _rotate(view, params["angle"], params["shift"], warp)


def _sample_rotation(u: Array, settings: Settings, size: int) -> Params:
    return {
        "on": u[0] < settings.rotation_p,
        "angle": _between(u[1], -settings.rotation_degrees, settings.rotation_degrees),
    }


def _apply_rotation(view: Array, params: Params, warp: Warp) -> Array:
    # kornia's rotation is counter-clockwise where its affine is clockwise.
    return _rotate(view, -params["angle"], jnp.zeros(2), warp)


def _sample_perspective(u: Array, settings: Settings, size: int) -> Params:
    corners = (size - 1) * jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    inside = jnp.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    reach = settings.perspective_distortion * size / 2
    return {
        "on": u[0] < settings.perspective_p,
        "corners": corners + reach * inside * u[1:9].reshape(4, 2),
    }


def _apply_perspective(view: Array, params: Params, warp: Warp) -> Array:
    """Move the image's corners (clockwise from the top left) to `corners [4, 2]`, in pixels."""
    x, y = _grid(view)
    end = jnp.array([view.shape[1] - 1, view.shape[0] - 1], jnp.float32)
    # The homography from the unit square to the four corners in closed form (Heckbert 1989), in units of the image's
    # side: entries stay near one, and no linear solver is needed. Its adjugate leads back from a target pixel to its
    # source.
    p0, p1, p2, p3 = params["corners"] / end
    u, v, w = p1 - p2, p3 - p2, p0 - p1 + p2 - p3
    det = u[0] * v[1] - v[0] * u[1]
    g, h = (w[0] * v[1] - v[0] * w[1]) / det, (u[0] * w[1] - w[0] * u[1]) / det
    (a, d), (b, e), (c, f) = p1 - p0 + g * p1, p3 - p0 + h * p3, p0
    x, y = x / end[0], y / end[1]
    scale = (d * h - e * g) * x + (b * g - a * h) * y + (a * e - b * d)
    source_x = ((e - f * h) * x + (c * h - b) * y + (b * f - c * e)) / scale
    source_y = ((f * g - d) * x + (a - c * g) * y + (c * d - a * f)) / scale
    return warp(view, end[0] * source_x, end[1] * source_y)


def _sample_jitter(u: Array, settings: Settings, size: int) -> Params:
    reach = jnp.asarray(settings.jitter, jnp.float32)
    brightness, contrast, saturation = jnp.maximum(_between(u[1:4], 1 - reach[:3], 1 + reach[:3]), 0)
    return {
        "on": u[0] < settings.jitter_p,
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "hue": _between(u[4], -reach[3], reach[3]),
        "order": jnp.argsort(u[5:9]),
    }


def shift_hue(planes: Array, turns: Array) -> Array:
    """Turn the hue of `[3, H, W]` by `turns`, value and saturation kept (kornia's adjust_hue)."""
    red, green, blue = planes
    high, low = planes.max(0), planes.min(0)
    chroma = high - low
    # Sixths of a turn, from the first channel that is the largest.
    sixths = jnp.where(
        (red >= green) & (red >= blue),
        green - blue,
        jnp.where(green >= blue, blue - red + 2 * chroma, red - green + 4 * chroma),
    ) / jnp.where(chroma == 0, 1, chroma)
    # Each channel falls from the largest value by the chroma times a trapezium of the hue, a third of a turn apart.
    k = jnp.array([5.0, 3.0, 1.0])[:, None, None] + sixths + 6 * turns
    k = k - 6 * jnp.floor(k / 6)
    return high - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def _apply_jitter(view: Array, params: Params, warp: Warp) -> Array:
    """Brightness, contrast, saturation (0, 1, 2: each clamps) and hue (3) in the given `order [4]`."""
    order = params["order"]
    factors = jnp.stack([params["brightness"], params["contrast"], params["saturation"], jnp.ones(())])[order]
    hue_later = jnp.arange(4) < jnp.argmax(order == 3)

    # Brightness, contrast and saturation are one formula, a blend with black, the mean grey or the grey image, so a
    # traced order needs no branch (under vmap a branch computes every side); the hue, which is dearer, is computed
    # once, between the slots before it and those after it. Scanned and not unrolled: half the time on a CPU, both of
    # running (37 ms against 82 for 80 views of 64 pixels, forward and backward) and of compiling.
    def mix(planes: Array, slot: tuple[Array, Array, Array]) -> tuple[Array, None]:
        step, factor, active = slot
        grey = GREY[0] * planes[0] + GREY[1] * planes[1] + GREY[2] * planes[2]
        towards = jnp.where(step == 1, grey.mean(), jnp.where(step == 2, grey, 0))
        mixed = clamp(factor * planes + (1 - factor) * towards)
        return jnp.where(active & (step != 3), mixed, planes), None

    planes, _ = jax.lax.scan(mix, jnp.moveaxis(view, -1, 0), (order[:3], factors[:3], hue_later[:3]))
    # Left out at zero, as kornia does: without a turn the red, yellow, ... pixels sit on kinks of the formula.
    planes = jnp.where(params["hue"] == 0, planes, shift_hue(planes, params["hue"]))
    planes, _ = jax.lax.scan(mix, planes, (order[1:], factors[1:], ~hue_later[1:]))
    return jnp.moveaxis(planes, 0, -1)


def _sample_erasing(u: Array, settings: Settings, size: int) -> Params:
    area = _between(u[1], *settings.erase_area) * size**2
    low, high = settings.erase_ratio
    ratio = jnp.where(
        u[2] < 0.5,
        _between(u[3], low, jnp.minimum(high, 1)),
        _between(u[3], jnp.maximum(low, 1), high),
    )
    sides = jnp.clip(jnp.round(jnp.sqrt(area * jnp.stack([1 / ratio, ratio]))), 1, size)
    left, top = jnp.floor(u[4:6] * (size - sides + 1))
    return {
        "on": u[0] < settings.erase_p,
        "box": jnp.stack([left, top, sides[0], sides[1]]),
    }


def _apply_erasing(view: Array, params: Params, warp: Warp) -> Array:
    """Blacken the rectangle `box (left, top, width, height)`, in whole pixels."""
    x, y = _grid(view)
    left, top, width, height = params["box"]
    inside = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
    return jnp.where(inside[..., None], 0.0, view)


def _sample_flip(u: Array, settings: Settings, size: int) -> Params:
    return {"on": u[0] < settings.flip_p}


def _apply_flip(view: Array, params: Params, warp: Warp) -> Array:
    return view[:, ::-1]


def _sample_sharpness(u: Array, settings: Settings, size: int) -> Params:
    return {"on": u[0] < settings.sharpness_p, "factor": _between(u[1], 0.0, settings.sharpness)}


def _apply_sharpness(view: Array, params: Params, warp: Warp) -> Array:
    """Blend a smoothed copy (`factor` 0) with the view (1; above it sharpens), borders kept."""
    height, width, _ = view.shape
    box = sum(view[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    smooth = view.at[1:-1, 1:-1].set(clamp((box + 4 * view[1:-1, 1:-1]) / 13))
    return clamp(smooth + (view - smooth) * params["factor"])


def _sample_gaussian(u: Array, settings: Settings, size: int) -> Params:
    u, pixels = u
    return {"on": u[0] < settings.gaussian_p, "noise": settings.gaussian * normal(pixels)}


def _apply_gaussian(view: Array, params: Params, warp: Warp) -> Array:
    return view + params["noise"]


def elastic_shift(noise: Array, *, sigma: Array | float, alpha: Array | float) -> Array:
    """Pixel shifts `[S, S, 2]` (x, y) of an elastic transform: smoothed noise of `[-1, 1]`, `alpha` in half sides."""
    size = noise.shape[0]
    distance = jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
    total = jnp.exp(-0.5 * (jnp.arange(-ELASTIC_RADIUS, ELASTIC_RADIUS + 1) / sigma) ** 2).sum()
    blur = jnp.where(abs(distance) <= ELASTIC_RADIUS, jnp.exp(-0.5 * (distance / sigma) ** 2) / total, 0.0)
    return alpha * size / 2 * jnp.einsum("ij,jkc,lk->ilc", blur, noise, blur, precision="highest")


def _sample_elastic(u: Array, settings: Settings, size: int) -> Params:
    u, pixels = u
    return {
        "on": u[0] < settings.elastic_p,
        "shift": elastic_shift(_between(pixels, -1.0, 1.0), sigma=settings.elastic_sigma, alpha=settings.elastic_alpha),
    }


def _apply_elastic(view: Array, params: Params, warp: Warp) -> Array:
    x, y = _grid(view)
    return warp(view, x + params["shift"][..., 0], y + params["shift"][..., 1])


def _spline_points() -> Array:
    return jnp.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [0.0, 0.0]])


def _sample_spline(u: Array, settings: Settings, size: int) -> Params:
    scale = settings.spline_scale
    return {
        "on": u[0] < settings.spline_p,
        "points": _spline_points() + _between(u[1:11].reshape(5, 2), -scale, scale),
    }


def _apply_spline(view: Array, params: Params, warp: Warp) -> Array:
    """Thin plate spline that moves the corners and the centre to `points [5, 2]`, in half sides from the centre."""
    start, end = _spline_points(), params["points"]

    def kernel(a: Array, b: Array) -> Array:
        square = jnp.square(a[..., None, :] - b).sum(-1)
        return 0.5 * square * jnp.log(jnp.where(square > 0, square, 1))

    ones = jnp.ones((5, 1))
    linear = jnp.concatenate([ones, end], 1)
    system = jnp.block([[kernel(end, start), linear], [linear.T, jnp.zeros((3, 3))]])
    weights = jnp.linalg.solve(system, jnp.concatenate([start, jnp.zeros((3, 2))]))
    x, y = _grid(view)
    height, width, _ = view.shape
    x, y = jnp.broadcast_arrays((2 * x + 1) / width - 1, (2 * y + 1) / height - 1)
    terms = jnp.concatenate(
        [kernel(jnp.stack([x, y], -1), start), jnp.stack([jnp.ones_like(x), x, y], -1)], -1
    )  # [H, W, 8]
    source = jnp.einsum("hwt,tc->hwc", terms, weights, precision="highest")
    return warp(view, ((source[..., 0] + 1) * width - 1) / 2, ((source[..., 1] + 1) * height - 1) / 2)


def _sample_crop(u: Array, settings: Settings, size: int) -> Params:
    pad = jnp.floor(settings.crop_padding * size)
    return {"on": u[0] < settings.crop_p, "offset": jnp.floor(u[1:3] * (2 * pad + 1)) - pad}


def _apply_crop(view: Array, params: Params, warp: Warp) -> Array:
    """Pad with zeros and cut the view out again, `offset (x, y)` whole pixels from where it was."""
    x, y = _grid(view)
    return warp(view, x + params["offset"][0], y + params["offset"][1])


def _sample_resized(u: Array, settings: Settings, size: int) -> Params:
    area = _between(u[1], *settings.resized_area) * size**2
    ratio = jnp.exp(_between(u[2], *(jnp.log(bound) for bound in settings.resized_ratio)))
    sides = jnp.clip(jnp.floor(jnp.sqrt(area * jnp.stack([ratio, 1 / ratio]))), 2, size)
    left, top = jnp.floor(u[3:5] * (size - sides + 1))
    return {
        "on": u[0] < settings.resized_p,
        "box": jnp.stack([left, top, sides[0], sides[1]]),
    }


def _apply_resized(view: Array, params: Params, warp: Warp) -> Array:
    """Stretch the rectangle `box (left, top, width, height)` over the view, corner pixel onto corner pixel."""
    x, y = _grid(view)
    left, top, width, height = params["box"]
    x, y = left + x * (width - 1) / (view.shape[1] - 1), top + y * (height - 1) / (view.shape[0] - 1)
    return warp(view, x, y)


# Random numbers of a view are these rows' in this order (views.COLUMNS); what a user adds has numbers of its own.
AUGMENTATIONS = Registry(
    "augmentations.register",
    {
        "Af": Augmentation(_sample_affine, _apply_affine, draws=4),
        "Pe": Augmentation(_sample_perspective, _apply_perspective, draws=9),
        "Ji": Augmentation(_sample_jitter, _apply_jitter, draws=9),
        "Er": Augmentation(_sample_erasing, _apply_erasing, draws=6),
        "Hf": Augmentation(_sample_flip, _apply_flip, draws=1),
        "Sh": Augmentation(_sample_sharpness, _apply_sharpness, draws=2),
        "Gn": Augmentation(_sample_gaussian, _apply_gaussian, draws=1, channels=3),
        "Ro": Augmentation(_sample_rotation, _apply_rotation, draws=2),
        "Et": Augmentation(_sample_elastic, _apply_elastic, draws=1, channels=2),
        "Ts": Augmentation(_sample_spline, _apply_spline, draws=11),
        "Cr": Augmentation(_sample_crop, _apply_crop, draws=3),
        "Re": Augmentation(_sample_resized, _apply_resized, draws=5),
    },
)


def register(name: str, *, draws: int = 0, p: float = 1.0) -> Callable[[Callable], Callable]:
    """A decorator that adds `(view [S, S, 3], u [draws], warp) -> view`, differentiable in the view.

    Args:
        name: in `views.augmentations`.
        draws: uniform numbers of [0, 1) that each view gets.
        p: the probability that a view is touched.
    """

    def row(augment: Callable[[Array, Array, Warp], Array]) -> Augmentation:
        return Augmentation(
            sample=lambda u, settings, size: {"on": u[0] < p, "u": u[1:]},
            apply=lambda view, params, warp: augment(view, params["u"], warp),
            draws=1 + draws,
        )

    return AUGMENTATIONS.register(name, row)
