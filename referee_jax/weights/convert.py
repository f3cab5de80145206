"""Converts tensors in torch's layout to the networks of referee_jax.models, and back.

A network's attributes have the names of the checkpoint's parameters, so a tensor's name is the
attribute path; only the layout depends on the kind of leaf (`KINDS`). The layers of a
`layers.Stack` are the checkpoint's `<path>.0.…`, `<path>.1.…`; `layers.Interleaved` and
`layers.Row` number them otherwise.
"""

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from referee_jax.models import layers


class WeightsError(ValueError):
    """Weights or a config that do not fit the network. The message names tensors, keys or files."""


def _same(ndim: int) -> tuple[int, ...]:
    return tuple(range(ndim))


def _out_last(ndim: int) -> tuple[int, ...]:
    """torch's `(out, in, *space)` to Flax's `(*space, in, out)`."""
    return (*range(2, ndim), 1, 0)


# Module -> attribute -> (the checkpoint's name, axes of its tensor in our order). Parameters of
# other modules have the checkpoint's names and axes.
_PRODUCT = {"kernel": ("weight", _out_last), "bias": ("bias", _same)}
KINDS: dict[type, dict[str, tuple[str, Callable[[int], tuple[int, ...]]]]] = {
    layers.Linear: _PRODUCT,
    nnx.Linear: _PRODUCT,
    nnx.Conv: _PRODUCT,
    nnx.Embed: {"embedding": ("weight", _same)},
    layers.LayerNorm: {"scale": ("weight", _same), "bias": ("bias", _same)},
    layers.RMSNorm: {"scale": ("weight", _same)},
    layers.GroupNorm: {"scale": ("weight", _same), "bias": ("bias", _same)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One leaf of a network, and the checkpoint's tensors of which it consists.

    Attributes:
        names: of the tensors, one for each layer of the stacks around the leaf.
        depths: of these stacks; empty outside of a stack.
        shape: of one layer's part of the leaf.
        axes: of a tensor, in the order of the leaf's.
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
    """The targets of a module, real or abstract, in the order of `jax.tree.leaves`."""
    return [_target(module, path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]]


def _target(module: nnx.Module, path: Sequence, leaf: jax.ShapeDtypeStruct | jax.Array) -> Target:
    # `numbering`: first layer's number and step of the stack that comes next.
    parts, numbers, numbering, node, owner = [], [], (0, 1), module, module
    for key in path:
        if isinstance(node, nnx.Variable):  # the last step, from a parameter into its array
            break
        owner, name = node, getattr(key, "name", getattr(key, "idx", None))
        node = owner[name] if isinstance(key, jax.tree_util.SequenceKey) else getattr(owner, name)
        if isinstance(owner, layers.Interleaved):
            numbering = name, len(owner)
        elif isinstance(owner, layers.Row):
            if isinstance(node, layers.Stack):
                numbering = owner.first(name), 1
            else:
                parts.append(str(owner.first(name)))
        elif isinstance(owner, layers.Stack):
            first, step = numbering
            numbers.append(range(first, first + owner.depth * step, step))
            numbering = 0, 1
            parts.append("{}")
        else:
            parts.append(str(name))
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
    put: Callable[[np.ndarray], Any] = jax.device_put,
) -> nnx.Module:
    """Returns the abstract `module` (of `nnx.eval_shape`) with weights from `tensors`.

    Raises WeightsError, which names the tensors, in five cases: a tensor is not used, a parameter
    is not filled, two tensors fill the same parameter, a shape differs, a weight is not a finite
    float.

    Args:
        module: the network.
        tensors: name -> tensor; may be lazy: each tensor is read once and cast at once.
        dtype: of all weights but scalars (logit scales), which are float32, as their exponentials
            are factors.
        renames: pairs of regular expression and replacement, applied in order to the names of
            `tensors`.
        ignore: glob patterns of names of `tensors` that are not weights.
        float32: glob patterns of further parameters that are float32.
        put: where each weight goes as soon as it is read; by default to JAX's default device.
    """
    parameters = targets(module)
    sources = matched(tensors, {name for target in parameters for name in target.names}, renames, ignore)
    dtypes = _dtypes(parameters, dtype, float32)
    leaves = [put(_read(tensors, sources, target, kind)) for target, kind in zip(parameters, dtypes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(module), leaves)


def cast(module: nnx.Module, *, dtype: jax.typing.DTypeLike, float32: Iterable[str] = ()) -> nnx.Module:
    """The abstract `module` with the dtypes that `fill` would give its leaves."""
    leaves, dtypes = jax.tree.leaves(module), _dtypes(targets(module), dtype, float32)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, kind) for leaf, kind in zip(leaves, dtypes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(module), shapes)


def _dtypes(parameters: Sequence[Target], dtype: jax.typing.DTypeLike, float32: Iterable[str]) -> list:
    float32 = tuple(float32)
    return [jnp.float32 if x.shape == () or _matches(x.names[0], float32) else dtype for x in parameters]


def matched(tensors: Mapping, parameters: set[str], renames: Iterable, ignore: Iterable) -> dict[str, str]:
    """Name in the network -> name in the source. Raises WeightsError unless they match one to one."""
    renames, ignore = tuple(renames), tuple(ignore)
    sources: dict[str, list[str]] = {}
    for source in tensors:
        if _matches(source, ignore):
            continue
        name = source
        for old, new in renames:
            name = re.sub(old, new, name)
        sources.setdefault(name, []).append(source)
    if twice := {name: several for name, several in sources.items() if len(several) > 1}:
        raise WeightsError(
            "parameters filled twice: " + "; ".join(f"{n} from {' and '.join(s)}" for n, s in twice.items())
        )
    problems = []
    if missing := sorted(parameters - set(sources)):
        problems.append(f"parameters without a tensor: {_listed(missing)}")
    if unused := [several[0] for name, several in sources.items() if name not in parameters]:
        problems.append(f"tensors that no parameter takes: {_listed(unused)}")
    if problems:
        raise WeightsError("; ".join(problems))
    return {name: several[0] for name, several in sources.items()}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: Sequence[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read(tensors: Mapping, sources: Mapping[str, str], target: Target, dtype) -> np.ndarray:
    """One leaf: its tensors, checked, transposed, cast and stacked."""
    out = np.empty((len(target.names), *target.shape), dtype)
    for n, name in enumerate(target.names):
        source = sources[name]
        tensor = np.asarray(tensors[source])
        if tensor.shape != target.source_shape:
            raise WeightsError(
                f"{source} has shape {tensor.shape}, but {name} takes {target.source_shape} "
                f"({target.shape} in the network)"
            )
        # One flipped bit of a file may turn floats into integers, or make NaN, which only the
        # finished image would show.
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise WeightsError(f"{source} holds {tensor.dtype}, which are no weights")
        if not _is_finite(tensor):
            raise WeightsError(f"{source} holds NaN or infinity")
        out[n] = tensor.transpose(target.axes)
    return out.reshape(target.depths + target.shape)


def _is_finite(tensor: np.ndarray) -> bool:
    """Whether all floats of a tensor are finite.

    By bits, as numpy is ten times slower in half precision.
    """
    unsigned = np.dtype(f"u{tensor.itemsize}")
    magnitude = tensor.view(unsigned) & (np.iinfo(unsigned).max >> 1)
    return bool(np.max(magnitude, initial=0) < np.array(np.inf, tensor.dtype).view(unsigned))


def export(module: nnx.Module) -> dict[str, np.ndarray]:
    """The inverse of `fill`: every parameter by its checkpoint name, in torch's layout."""
    tensors = {}
    for target, leaf in zip(targets(module), jax.tree.leaves(module), strict=True):
        inverse = tuple(target.axes.index(axis) for axis in range(len(target.axes)))
        rows = np.asarray(leaf).reshape((-1, *target.shape))
        tensors |= {n: np.array(row.transpose(inverse), order="C") for n, row in zip(target.names, rows, strict=True)}
    return tensors
