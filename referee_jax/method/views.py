"""Differentiable random views of one image, and the choice of the hardest of them.

The image is pooled to the referee's size once, then each of `count` views runs its own chain of augmentations
(augment.py) and gets its own noise. Everything random is drawn by `sample` and handed to `apply`, which is
deterministic. All of it is for one image: vmap adds prompts.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from referee_jax.hardware import chips
from referee_jax.method import augmentations

AUGMENTATIONS = augmentations.AUGMENTATIONS
Settings = augmentations.Settings
DEFAULT = ("Af", "Pe", "Ji", "Er")

Params = dict[str, dict[str, Array] | Array]


def check(names: Sequence[str]) -> None:
    """Raise ValueError unless `names` are different augmentations of the table."""
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        raise ValueError(f"augmentations {unknown} are unknown; known are {list(AUGMENTATIONS)}")
    if len(set(names)) != len(names):
        raise ValueError(f"augmentations {tuple(names)}: one of them is named twice")


def _windows(length: int, size: int) -> np.ndarray:
    """Row i: the inputs under output i of torch's adaptive pooling, the last repeated up to a common width."""
    starts = np.arange(size) * length // size
    ends = -(-(np.arange(size) + 1) * length // size)
    return np.minimum(starts[:, None] + np.arange((ends - starts).max()), ends[:, None] - 1)


def _pool_axis(image: Array, size: int, axis: int, mode: str) -> Array:
    """Adaptive average or maximum of `[H, W, C]` along one axis."""
    length = image.shape[axis]
    if length == size:
        return image
    index = _windows(length, size)
    if mode == "average":
        matrix = np.zeros((size, length), np.float32)
        for row, inputs in enumerate(index):
            inputs = np.unique(inputs)
            matrix[row, inputs] = 1 / len(inputs)
        return _mixed(matrix, image, axis)
    best = _taken(image, index[:, 0], axis)
    for inputs in index.T[1:]:
        # Strictly greater: of equal inputs the first gets the gradient, as in torch (and a repeated one gets none).
        other = _taken(image, inputs, axis)
        best = jnp.where(other > best, other, best)
    return best


def _taken(image: Array, inputs: np.ndarray, axis: int) -> Array:
    """Rows or columns `inputs` of `[H, W, C]`: gathered, or an exact product with zeros and ones."""
    if not chips.is_dense():
        return jnp.take(image, inputs, axis=axis)
    return _mixed(np.eye(image.shape[axis], dtype=np.float32)[inputs], image, axis)


def _mixed(matrix: np.ndarray, image: Array, axis: int) -> Array:
    """`matrix [new, old]` times the rows or columns of `[H, W, C]`."""
    return jnp.moveaxis(jnp.tensordot(matrix, image, axes=(1, axis), precision="highest"), 0, axis)


def pool(image: Array, size: int) -> Array:
    """Mean of adaptive average and adaptive maximum pooling, `[H, W, C] -> [size, size, C]`.

    A side that is smaller than `size` is first enlarged to it bilinearly; an image of that size is returned as it is.
    """
    height, width, channels = image.shape
    if min(height, width) < size:
        image = jax.image.resize(image, (max(height, size), max(width, size), channels), "bilinear", antialias=False)
    if image.shape[:2] == (size, size):
        return image
    # Columns first: together with the strict comparison the winner of a window is the first in reading order.
    average = _pool_axis(_pool_axis(image, size, 1, "average"), size, 0, "average")
    return (average + _pool_axis(_pool_axis(image, size, 1, "maximum"), size, 0, "maximum")) / 2


def _axes(params: Params) -> dict:
    """The axis of views of each leaf: 0, or None where all views share it."""
    axes: dict = {"noise": 0}
    for name in params.keys() - {"noise"}:
        axes[name] = {leaf: None if leaf in AUGMENTATIONS[name].shared else 0 for leaf in params[name]}
    return axes


def sample(
    key: Array,
    settings: augmentations.Settings,
    *,
    names: Sequence[str] = DEFAULT,
    count: int,
    size: int,
    shared_erase: bool = False,
) -> Params:
    """Draw `count` views of side `size`: augmentation name -> its parameters, and the noise.

    Leaves have a leading axis `[count]`, except those that all views share (the order of the colour jitter's steps);
    `noise [count, size, size, 3]` is normal with an amplitude drawn from `[0, settings.noise]` per view. `shared_erase`
    gives all views the same rectangle (the paper's setting). What one augmentation draws does not depend on which
    others are asked for. Raises ValueError for unknown names.
    """
    check(names)
    *keys, noise_key = jax.random.split(key, len(AUGMENTATIONS) + 1)
    keys = dict(zip(AUGMENTATIONS, keys, strict=True))
    params: Params = {}
    for name in names:
        augmentation = AUGMENTATIONS[name]
        draw = functools.partial(augmentation.sample, settings=settings, size=size)
        drawn = jax.vmap(draw)(jax.random.split(keys[name], count))
        if name == "Er" and shared_erase:
            drawn = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), drawn)
        params[name] = drawn | {leaf: drawn[leaf][0] for leaf in augmentation.shared}

    def noise(key: Array) -> Array:
        amplitude, normal = jax.random.split(key)
        return settings.noise * jax.random.uniform(amplitude) * jax.random.normal(normal, (size, size, 3))

    params["noise"] = jax.vmap(noise)(jax.random.split(noise_key, count))
    return params


def apply(image: Array, params: Params, *, size: int, names: Sequence[str] = DEFAULT) -> Array:
    """Views `[count, size, size, 3]` of `image [H, W, 3]`: pooled, augmented in the order of `names`, noise added.

    `names` are those of `sample`, given again because a dict loses its order in a JAX transformation; a mismatch raises
    ValueError. The views are not clamped. Differentiable in the image.
    """
    check(names)
    if set(names) != set(params) - {"noise"}:
        raise ValueError(f"augmentations {tuple(names)} were asked for, parameters are those of {sorted(params)}")
    view = pool(image, size)

    def augmented(params: Params) -> Array:
        out = view
        for name in names:
            out = jnp.where(params[name]["on"], AUGMENTATIONS[name].apply(out, params[name]), out)
        return out + params["noise"]

    return jax.vmap(augmented, in_axes=(_axes(params),))(params)


def take(params: Params, index: Array) -> Params:
    """The parameters of the views `index [keep]` only: what was scored may be applied again to the hardest."""
    return jax.tree.map(
        lambda axis, x: x if axis is None else x[index], _axes(params), params, is_leaf=lambda x: x is None
    )


def in_passes(params: Params, passes: int) -> Params:
    """The parameters in groups, each leaf with a leading axis `[passes]`; the last view fills up the last group."""

    def leaf(axis: int | None, x: Array) -> Array:
        return jnp.broadcast_to(x, (passes, *x.shape)) if axis is None else split(x, passes, mode="edge")

    return jax.tree.map(leaf, _axes(params), params, is_leaf=lambda x: x is None)


def split(x: Array, passes: int, *, mode: str) -> Array:
    """`[count, ...] -> [passes, ceil(count / passes), ...]`, filled up as `mode` of jnp.pad says."""
    size = -(-len(x) // passes)
    x = jnp.pad(x, ((0, passes * size - len(x)), *[(0, 0)] * (x.ndim - 1)), mode=mode)
    return x.reshape(passes, size, *x.shape[1:])


def hardest(losses: Array, keep: int) -> Array:
    """Indices `[keep]` of the largest of `losses [count]`, largest first; `keep` is static, at most count."""
    return jax.lax.top_k(losses, keep)[1]
