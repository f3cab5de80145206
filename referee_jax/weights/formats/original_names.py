"""The names of original_layout.py: those of the authors' code, and of diffusers and transformers.

Each table is made for the numbers of levels and layers that the names of a file show.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

# Our name, and how its tensor is made of the original.
Target = tuple[str, Callable[[np.ndarray], np.ndarray]]

# --- names: modules of the authors' code -> those of diffusers or transformers ---

_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_ADDED = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_BLOCK = (
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in _ATTENTION),
)


def _moved(modules: Mapping[str, str], old: str, new: str) -> dict[str, str]:
    """The modules with prefixes."""
    return {f"{old}.{a}": f"{new}.{b}" for a, b in modules.items()}


def unet_modules(levels: int, layers: int, depth: int) -> dict[str, str]:
    """The modules of a U-Net: names of `ldm` -> names of diffusers.

    Some do not exist, as not all levels have transformers.

    Args:
        levels: resolutions.
        layers: residual blocks of each on the way down; there is one more on the way up.
        depth: blocks of the deepest transformer.
    """
    transformer = {x: x for x in ("norm", "proj_in", "proj_out")}
    transformer |= {x: x for x in (f"transformer_blocks.{n}.{name}" for n in range(depth) for name in _BLOCK)}
    kinds = ((0, "resnets", _RESNET), (1, "attentions", transformer))
    modules = _ENDS | _ADDED
    for level, layer in itertools.product(range(levels), range(layers + 1)):
        n = level * (layers + 1) + layer
        for place, kind, names in kinds:
            if layer < layers:
                modules |= _moved(names, f"input_blocks.{n + 1}.{place}", f"down_blocks.{level}.{kind}.{layer}")
            modules |= _moved(names, f"output_blocks.{n}.{place}", f"up_blocks.{level}.{kind}.{layer}")
    for level in range(levels):
        last = (level + 1) * (layers + 1)
        modules[f"input_blocks.{last}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for place in (1, 2):  # behind the residual block, or the transformer
            modules[f"output_blocks.{last - 1}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    for old, new, names in ((0, "resnets.0", _RESNET), (1, "attentions.0", transformer), (2, "resnets.1", _RESNET)):
        modules |= _moved(names, f"middle_block.{old}", f"mid_block.{new}")
    return modules


def _vae_modules(levels: int, layers: int) -> dict[str, str]:
    """Those of an autoencoder; the decoder's levels are numbered from the last to the first."""
    resnet = {x: x for x in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    modules = {x: x for x in ("quant_conv", "post_quant_conv")}
    for side, way, count in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        modules |= _moved({"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}, side, side)
        for level in range(levels):
            old, new = f"{side}.{way}.{level}", f"{side}.{way}_blocks.{level if way == 'down' else levels - 1 - level}"
            for layer in range(count):
                modules |= _moved(resnet, f"{old}.block.{layer}", f"{new}.resnets.{layer}")
            modules[f"{old}.{way}sample.conv"] = f"{new}.{way}samplers.0.conv"
        for n in range(2):
            modules |= _moved(resnet, f"{side}.mid.block_{n + 1}", f"{side}.mid_block.resnets.{n}")
        modules |= _moved(attention, f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
    return modules


def count(names: Iterable[str], prefix: str) -> int:
    """How many things are numbered after `prefix`."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def unet_depth(names: Iterable[str]) -> int:
    """How many blocks the deepest transformer has; it is the same by both names."""
    parts = (name.partition("transformer_blocks.")[2].partition(".")[0] for name in names)
    return max((int(n) + 1 for n in parts if n.isdecimal()), default=0)


# --- tables of tensors: original name -> what is made of it ---


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _matrix(x: np.ndarray) -> np.ndarray:
    """A convolution of one pixel, `[out, in, 1, 1]`, to the matrix of a linear layer."""
    return x.reshape(x.shape[:2])


def _third(n: int) -> Callable[[np.ndarray], np.ndarray]:
    """Queries', keys' or values' part of one tensor of torch's MultiheadAttention."""
    return lambda x: np.split(x, 3)[n]


def _plain(modules: Mapping[str, str]) -> dict[str, Sequence[Target]]:
    """Weights and biases that are only renamed."""
    return {f"{old}.{x}": [(f"{new}.{x}", _same)] for old, new in modules.items() for x in ("weight", "bias")}


def unet(names: Sequence[str]) -> dict[str, Sequence[Target]]:
    ends = [n for n in range(count(names, "input_blocks.")) if f"input_blocks.{n}.0.op.weight" in names]
    layers = (ends[0] if ends else count(names, "input_blocks.")) - 1
    return _plain(unet_modules(len(ends) + 1, layers, unet_depth(names)))


def vae(names: Sequence[str]) -> dict[str, Sequence[Target]]:
    modules = _vae_modules(count(names, "decoder.up."), count(names, "decoder.up.0.block.") - 1)
    linear = {old: new for old, new in modules.items() if ".attn_1." in old and not old.endswith(".norm")}
    return _plain(modules) | {f"{old}.weight": [(f"{new}.weight", _matrix)] for old, new in linear.items()}


def open_clip(names: Sequence[str]) -> dict[str, Sequence[Target]]:
    """OpenCLIP's text encoder; its projection multiplies from the right."""
    modules = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    table: dict[str, Sequence[Target]] = {
        "positional_embedding": [("text_model.embeddings.position_embedding.weight", _same)],
        "text_projection": [("text_projection.weight", np.transpose)],
    }
    layer = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    layer["attn.out_proj"] = "self_attn.out_proj"
    for n in range(count(names, "transformer.resblocks.")):
        old, new = f"transformer.resblocks.{n}", f"encoder.layers.{n}"
        modules |= _moved(layer, old, new)
        for x in ("weight", "bias"):
            table[f"{old}.attn.in_proj_{x}"] = [
                (f"text_model.{new}.self_attn.{name}_proj.{x}", _third(i)) for i, name in enumerate("qkv")
            ]
    return _plain({old: f"text_model.{new}" for old, new in modules.items()}) | table


def clip(names: Sequence[str]) -> dict[str, Sequence[Target]]:
    """transformers' text encoder; some files lack the first part of its names."""
    layer = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    layer += ["layer_norm1", "layer_norm2"]
    depth = max(count(names, "text_model.encoder.layers."), count(names, "encoder.layers."))
    modules = [f"encoder.layers.{n}.{x}" for n in range(depth) for x in layer]
    modules += ["embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm"]
    return _plain({prefix + x: f"text_model.{x}" for x in modules for prefix in ("", "text_model.")})
