"""The one engine between torch-layout tensors and the networks of referee_jax.models, both ways.

A network's attributes are named as the checkpoint's parameters are, so a tensor's name is the attribute path and only
the layout differs, by the kind of leaf: `KINDS`. Equal layers kept as one `layers.Stack` are gathered from, and written
as, `<path>.0.…`, `<path>.1.…`; those of `layers.Interleaved` stacks in turns, those of a `layers.Row`
one part after the other.
"""

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from referee_jax.models import layers


class WeightsError(ValueError):
    """Weights or a config that do not fit the network; the message names the tensors, keys or files."""


def _same(ndim: int) -> tuple[int, ...]:
    return tuple(range(ndim))


def _out_last(ndim: int) -> tuple[int, ...]:
    """torch's `(out, in, *space)` to Flax's `(*space, in, out)`."""
    return (*range(2, ndim), 1, 0)


# Owner of a leaf -> its attribute -> (the checkpoint's name, axes of the source tensor in our order).
# A parameter that sits in any other module keeps its name and its axes.
KINDS: dict[type, dict[str, tuple[str, Callable[[int], tuple[int, ...]]]]] = {
    nnx.Linear: {"kernel": ("weight", _out_last), "bias": ("bias", _same)},
    nnx.Conv: {"kernel": ("weight", _out_last), "bias": ("bias", _same)},
    nnx.Embed: {"embedding": ("weight", _same)},
    layers.LayerNorm: {"scale": ("weight", _same), "bias": ("bias", _same)},
    layers.GroupNorm: {"scale": ("weight", _same), "bias": ("bias", _same)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One leaf of a network: the tensors it is made of, and how.

    `names` has one name per layer of the stacks around the leaf, whose depths are `depths` (empty outside of a stack).
    """

    names: tuple[str, ...]
    depths: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the checkpoint."""
        return tuple(self.shape[self.axes.index(axis)] for axis in range(len(self.axes)))


def targets(module: nnx.Module) -> list[Target]:
    """What every leaf of `module` (real or abstract) is made of, in the order of `jax.tree.leaves`."""
    return [_target(module, path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]]


def _target(module: nnx.Module, path: Sequence, leaf: jax.ShapeDtypeStruct | jax.Array) -> Target:
    parts, numbers, turn, node, owner = [], [], (0, 1), module, module
    for key in path:
        if isinstance(node, nnx.Variable):  # the last step, from a parameter into its array
            break
        owner, at = node, getattr(key, "name", getattr(key, "idx", None))
        node = owner[at] if isinstance(key, jax.tree_util.SequenceKey) else getattr(owner, at)
        if isinstance(owner, layers.Interleaved):
            turn = at, len(owner)
        elif isinstance(owner, layers.Row):
            if isinstance(node, layers.Stack):
                turn = owner.first(at), 1
            else:
                parts.append(str(owner.first(at)))
        elif isinstance(owner, layers.Stack):
            first, step = turn
            numbers.append(range(first, first + owner.depth * step, step))
            turn = 0, 1
            parts.append("{}")
        else:
            parts.append(str(at))
    kinds = next((table for kind, table in KINDS.items() if isinstance(owner, kind)), None)
    name, axes = parts[-1], _same
    if kinds is not None:
        name, axes = kinds[name]
    template = ".".join([*parts[:-1], name])
    return Target(
        names=tuple(template.format(*index) for index in itertools.product(*numbers)),
        depths=tuple(map(len, numbers)),
        shape=tuple(leaf.shape[len(numbers) :]),
        axes=axes(leaf.ndim - len(numbers)),
    )


def fill(
    module: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: jax.typing.DTypeLike,
    renames: Iterable[tuple[str, str]] = (),
    ignore: Iterable[str] = (),
    float32: Iterable[str] = (),
) -> nnx.Module:
    """Returns the abstract `module` (of `nnx.eval_shape`) with weights read from `tensors`, one at a time.

    `tensors` may be lazy: each is asked for once, cast at once. All weights get `dtype`, but for scalars (logit
    scales), which stay float32: an exponential of theirs is a factor of the result; so do those whose names match one
    of the glob patterns `float32`. `renames` are (regular expression, replacement) pairs, applied in order to the
    source's names; `ignore` are glob patterns of source names that are not weights.

    Raises WeightsError where a source tensor is left over, a parameter would stay empty, two tensors go to one
    parameter, a shape differs, or what should be a weight is no finite number: five checks, each naming the tensors.
    """
    wanted = targets(module)
    sources = _sources(tensors, {name for target in wanted for name in target.names}, renames, ignore)
    kinds = _dtypes(wanted, dtype, float32)
    filled = [_read(tensors, sources, target, kind) for target, kind in zip(wanted, kinds, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(module), filled)


def cast(module: nnx.Module, *, dtype: jax.typing.DTypeLike, float32: Iterable[str] = ()) -> nnx.Module:
    """The abstract `module` as `fill` would leave it, but without weights: every leaf has the dtype it would get."""
    leaves, kinds = jax.tree.leaves(module), _dtypes(targets(module), dtype, float32)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, kind) for leaf, kind in zip(leaves, kinds, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(module), shapes)


def _dtypes(wanted: Sequence[Target], dtype: jax.typing.DTypeLike, float32: Iterable[str]) -> list:
    float32 = tuple(float32)
    return [jnp.float32 if x.shape == () or _matches(x.names[0], float32) else dtype for x in wanted]


def _sources(tensors: Mapping, wanted: set[str], renames: Iterable, ignore: Iterable) -> dict[str, str]:
    """Name in the network -> name in the source; checks that each is used, filled, and once."""
    renames, ignore = tuple(renames), tuple(ignore)
    found: dict[str, list[str]] = {}
    for source in tensors:
        if _matches(source, ignore):
            continue
        name = source
        for old, new in renames:
            name = re.sub(old, new, name)
        found.setdefault(name, []).append(source)
    twice = {name: sources for name, sources in found.items() if len(sources) > 1}
    if twice:
        raise WeightsError(
            "parameters filled twice: " + "; ".join(f"{n} from {' and '.join(s)}" for n, s in twice.items())
        )
    unused = [sources[0] for name, sources in found.items() if name not in wanted]
    missing = sorted(wanted - set(found))
    problems = []
    if missing:
        problems.append(f"parameters without a tensor: {_listed(missing)}")
    if unused:
        problems.append(f"tensors that no parameter takes: {_listed(unused)}")
    if problems:
        raise WeightsError("; ".join(problems))
    return {name: sources[0] for name, sources in found.items()}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: Sequence[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read(tensors: Mapping, sources: Mapping[str, str], target: Target, dtype) -> jax.Array:
    """One leaf: every tensor of it checked, turned, cast and, in a stack, put at its place."""
    out = np.empty((len(target.names), *target.shape), dtype)
    for n, name in enumerate(target.names):
        source = sources[name]
        tensor = np.asarray(tensors[source])
        if tensor.shape != target.source_shape:
            raise WeightsError(
                f"{source} has shape {tensor.shape}, but {name} takes {target.source_shape} "
                f"({target.shape} in the network)"
            )
        # One bit of a damaged file turns floats into integers. NaN would be seen in every picture, but after its work.
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise WeightsError(f"{source} holds {tensor.dtype}, which are no weights")
        if not _is_finite(tensor):
            raise WeightsError(f"{source} holds NaN or infinity")
        out[n] = tensor.transpose(target.axes)
    return jnp.asarray(out.reshape(target.depths + target.shape))


def _is_finite(tensor: np.ndarray) -> bool:
    """Whether all of a tensor of floats is finite; by its bits, since numpy is ten times slower at half precision."""
    unsigned = np.dtype(f"u{tensor.itemsize}")
    magnitude = tensor.view(unsigned) & (np.iinfo(unsigned).max >> 1)
    return bool(np.max(magnitude, initial=0) < np.array(np.inf, tensor.dtype).view(unsigned))


def export(module: nnx.Module) -> dict[str, np.ndarray]:
    """The inverse of `fill`: every parameter under its checkpoint name, in torch's layout and its own dtype."""
    tensors = {}
    for target, leaf in zip(targets(module), jax.tree.leaves(module), strict=True):
        inverse = tuple(target.axes.index(axis) for axis in range(len(target.axes)))
        rows = np.asarray(leaf).reshape((-1, *target.shape))
        tensors |= {n: np.array(row.transpose(inverse), order="C") for n, row in zip(target.names, rows, strict=True)}
    return tensors
