"""FLOPs of a function, counted in its jaxpr: no weights, no device, no compilation.

    flops.flops(lambda z: vae.decode(z), jax.ShapeDtypeStruct((1, 64, 64, 4), "float32"))

Counts products of matrices and convolutions, a multiply-add as two; the rest of a network is a few
per cent. Weights may be abstract (`nnx.eval_shape`). A loop counts as often as it runs, of a branch the
costlier side.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from referee_jax.hardware import chips


def flops(fn: Callable, *args: Any) -> float:
    """FLOPs of `fn(*args)`; arguments are pytrees of arrays or jax.ShapeDtypeStructs."""
    return count(jax.make_jaxpr(fn)(*args).jaxpr)


def count(jaxpr: core.Jaxpr) -> float:
    """FLOPs of a jaxpr; of one that runs on several devices, those of each, or of a group that splits weights.

    Raises ValueError for a loop without a fixed number of trips.
    """
    # Rematerialisation leaves calls of which nothing is used; compilers remove them.
    return sum(_equation(eqn) for eqn in jaxpr.eqns if eqn.outvars or eqn.primitive.name != "jit")


def _equation(eqn: core.JaxprEqn) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot(eqn)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name in _ATTENTION:
        return _attention(eqn)
    inner = [count(jaxpr) for jaxpr in _inner(eqn.params)]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise ValueError("a loop without a fixed number of trips cannot be counted")
    if name == "pallas_call":  # the program of one block
        return sum(inner) * math.prod(eqn.params["grid_mapping"].grid)
    if name == "shard_map" and chips.MODEL in eqn.params["newly_manual_axes"]:
        return sum(inner) * eqn.params["mesh"].shape[chips.MODEL]
    return sum(inner) * (eqn.params["length"] if name == "scan" else 1)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs within an equation: of a call, a loop, the sides of a branch."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _dot(eqn: core.JaxprEqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


_ATTENTION = {chips.CUDNN_FORWARD: 2, chips.CUDNN_BACKWARD: 5}


def _attention(eqn: core.JaxprEqn) -> float:
    """Attention of queries `[B, T, N, D]` and keys `[B, S, N, D]`."""
    query, key = (var.aval.shape for var in eqn.invars[:2])
    return 2.0 * _ATTENTION[eqn.primitive.name] * math.prod(query) * key[-3]


def _convolution(eqn: core.JaxprEqn) -> float:
    """Zeros that dilate the input, as in a gradient through a stride, do not count."""
    kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    spec = eqn.params["dimension_numbers"].rhs_spec  # (out channels, in channels of a group, places ...)
    taps = math.prod(kernel[axis] for axis in spec[1:]) / math.prod(eqn.params["lhs_dilation"])
    return 2.0 * math.prod(out) * taps
