"""Differentiable random views of one image, and the choice of the hardest of them.

The image is pooled to the referee's size once, then each of `count` views runs its own chain of
augmentations (augmentations.py) and gets its own noise. All that is random is drawn by `sample` and
given to `apply`, which is deterministic. All of it is for one image: vmap adds prompts.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from referee_jax.method import augmentations

AUGMENTATIONS = augmentations.AUGMENTATIONS
Settings = augmentations.Settings
DEFAULT = ("Af", "Pe", "Ji", "Er")
# Which columns of a view's uniforms are each of the package's augmentations'; the last is the amplitude of the noise after them.
_ENDS = np.cumsum([0, *(row.draws for row in AUGMENTATIONS.values())]).tolist()
COLUMNS = {name: slice(*ends) for name, *ends in zip(AUGMENTATIONS, _ENDS[:-1], _ENDS[1:], strict=True)}
DRAWS = _ENDS[-1] + 1

Params = dict[str, dict[str, Array] | Array]


def check(names: Sequence[str]) -> None:
    """Raises ValueError unless `names` are different augmentations of the table."""
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        raise ValueError(f"augmentations {unknown} are unknown; known are {AUGMENTATIONS.known()}")
    if len(set(names)) != len(names):
        raise ValueError(f"augmentations {tuple(names)}: one of them is named twice")


def _windows(length: int, size: int) -> np.ndarray:
    """Row i: the inputs under output i of torch's adaptive pooling, the last repeated up to a common width."""
    starts = np.arange(size) * length // size
    ends = -(-(np.arange(size) + 1) * length // size)
    return np.minimum(starts[:, None] + np.arange((ends - starts).max()), ends[:, None] - 1)


def _average_axis(image: Array, size: int, axis: int) -> Array:
    """Adaptive average of `[H, W, C]` along one axis."""
    length = image.shape[axis]
    if length == size:
        return image
    matrix = np.zeros((size, length), np.float32)
    for row, inputs in enumerate(_windows(length, size)):
        inputs = np.unique(inputs)
        matrix[row, inputs] = 1 / len(inputs)
    return _mixed(matrix, image, axis)


def _maximum_axis(image: Array, size: int, axis: int, dense: bool) -> Array:
    """Adaptive maximum of `[H, W, C]` along one axis."""
    length = image.shape[axis]
    if length == size:
        return image
    first, *others = _windows(length, size).T
    best = _taken(image, first, axis, dense)
    for inputs in others:
        # Strictly greater: of equal inputs the first gets the gradient, as in torch (and a repeated one gets none).
        other = _taken(image, inputs, axis, dense)
        best = jnp.where(other > best, other, best)
    return best


def _taken(image: Array, inputs: np.ndarray, axis: int, dense: bool) -> Array:
    """Rows or columns `inputs` of `[H, W, C]`: gathered, or an exact product with zeros and ones."""
    if not dense:
        return jnp.take(image, inputs, axis=axis)
    return _mixed(np.eye(image.shape[axis], dtype=np.float32)[inputs], image, axis)


def _mixed(matrix: np.ndarray, image: Array, axis: int) -> Array:
    """`matrix [new, old]` times the rows or columns of `[H, W, C]`."""
    return jnp.moveaxis(jnp.tensordot(matrix, image, axes=(1, axis), precision="highest"), 0, axis)


def pool(image: Array, size: int, *, dense: bool = False) -> Array:
    """Mean of adaptive average and adaptive maximum pooling, `[H, W, C] -> [size, size, C]`.

    A side that is smaller than `size` is first enlarged to it bilinearly; an image of that size is
    returned as it is. `dense` takes products of matrices instead of gathers.
    """
    height, width, channels = image.shape
    if min(height, width) < size:
        image = jax.image.resize(image, (max(height, size), max(width, size), channels), "bilinear", antialias=False)
    if image.shape[:2] == (size, size):
        return image
    # Columns first: together with the strict comparison the winner of a window is the first in reading order.
    average = _average_axis(_average_axis(image, size, 1), size, 0)
    return (average + _maximum_axis(_maximum_axis(image, size, 1, dense), size, 0, dense)) / 2


def sample(
    key: Array,
    settings: augmentations.Settings,
    *,
    names: Sequence[str] = DEFAULT,
    count: int,
    size: int,
    shared_erase: bool = False,
) -> Params:
    """Draws what is random in the views of one image.

    What an augmentation draws depends neither on `count` nor on which others are named.

    Args:
        key: a PRNG key.
        settings: magnitudes and probabilities.
        names: augmentations, keys of augmentations.AUGMENTATIONS.
        count: views.
        size: side of the views, in pixels.
        shared_erase: whether all views lose the same rectangle (the paper's setting).

    Returns:
        The parameters of each named augmentation, and "noise" `[count, size, size, 3]`: normal, of
        an amplitude drawn from `[0, settings.noise]` for each view. All leaves have a leading axis
        `[count]`; the views of an image share the order of the colour jitter's steps.

    Raises:
        ValueError: for unknown names.
    """
    check(names)
    # One draw for all of a view: with a call of the generator for each number a program is many times as long.
    uniforms = jax.random.uniform(key, (count, DRAWS + size * size * 3))
    params: Params = {}
    for name in names:
        augmentation = AUGMENTATIONS[name]
        if name in COLUMNS:
            u, number = uniforms[:, COLUMNS[name]], COLUMNS[name].start
        else:  # a user's own: more columns would change the numbers of all others
            number = zlib.crc32(name.encode())
            u = jax.random.uniform(jax.random.fold_in(key, number), (count, augmentation.draws))
        if augmentation.channels:
            shape = (count, size, size, augmentation.channels)
            u = u, jax.random.uniform(jax.random.fold_in(key, number), shape)
        params[name] = jax.vmap(lambda u, sample=augmentation.sample: sample(u, settings, size))(u)
    shared = [("Ji", "order")] + [("Er", "box"), ("Er", "on")] * shared_erase
    for name, leaf in shared:
        if name in params:
            params[name][leaf] = jnp.broadcast_to(params[name][leaf][:1], params[name][leaf].shape)
    amplitude = settings.noise * uniforms[:, DRAWS - 1, None, None, None]
    params["noise"] = amplitude * augmentations.normal(uniforms[:, DRAWS:].reshape(count, size, size, 3))
    return params


def apply(image: Array, params: Params, *, size: int, names: Sequence[str] = DEFAULT, dense: bool = False) -> Array:
    """Views of an image: pooled, augmented in the order of `names`, noise added; not clamped.

    Args:
        image: `[H, W, 3]`.
        params: of `sample`.
        size: side of the views, as of `sample`.
        names: those of `sample`, given again because a dict loses its order in a JAX transformation.
        dense: whether pixels are resampled by products of matrices, which suits TPUs.

    Returns:
        `[count, size, size, 3]`, differentiable in the image.

    Raises:
        ValueError: where names and parameters do not match.
    """
    check(names)
    if set(names) != set(params) - {"noise"}:
        raise ValueError(f"augmentations {tuple(names)} were asked for, parameters are those of {sorted(params)}")
    view = pool(image, size, dense=dense)
    warp = augmentations.dense_warp if dense else augmentations.gather_warp

    def augmented(params: Params) -> Array:
        out = view
        for name in names:
            out = jnp.where(params[name]["on"], AUGMENTATIONS[name].apply(out, params[name], warp), out)
        return out + params["noise"]

    return jax.vmap(augmented)(params)


def take(params: Params, index: Array) -> Params:
    """The parameters of the views `index [keep]` only."""
    return jax.tree.map(lambda x: x[index], params)


def split(x: Array, passes: int, *, mode: str) -> Array:
    """`[count, ...] -> [passes, ceil(count / passes), ...]`, filled up as `mode` of jnp.pad says."""
    size = -(-len(x) // passes)
    x = jnp.pad(x, ((0, passes * size - len(x)), *[(0, 0)] * (x.ndim - 1)), mode=mode)
    return x.reshape(passes, size, *x.shape[1:])


def hardest(losses: Array, keep: int) -> Array:
    """Indices `[keep]` of the largest of `losses [count]`, largest first; `keep` is static, at most count."""
    return jax.lax.top_k(losses, keep)[1]
