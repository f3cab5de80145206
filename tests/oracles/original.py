"""Networks of diffusers and transformers by the names of the authors' code, in one file.

The inverse of weights/original_layout.py, written without its tables: the modules are walked in the order in which
the authors' code numbers them. Works on torch's meta device, too.
"""

from __future__ import annotations

import numpy as np

from tests.lazy import diffusers, torch, transformers
from tests.oracles import networks

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
TEXTS = {
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
# Sizes of the published networks, from their config.json.
UNETS = {
    "sd1": dict(
        block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8, sample_size=64
    ),
    "sd2": dict(
        block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True, sample_size=96,
    ),
    "sdxl": dict(
        block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        use_linear_projection=True, transformer_layers_per_block=(1, 2, 10), sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ),
}  # fmt: skip
_TEXT = dict(vocab_size=49408, max_position_embeddings=77, layer_norm_eps=1e-5)
_L = _TEXT | dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu"
)
_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu")
_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu")
TEXT_CONFIGS = {
    "sd1": (_L | {"projection_dim": 768},),
    "sd2": (_TEXT | _H | {"projection_dim": 1024},),
    "sdxl": (_L | {"projection_dim": 768}, _TEXT | _G | {"projection_dim": 1280}),
}
VAE = dict(
    block_out_channels=(128, 256, 512, 512), latent_channels=4, layers_per_block=2, norm_num_groups=32,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip

# Tiny ones, of heads and groups as published: 8 heads, or heads of 64 channels, and 32 groups.
_TINY_TEXT = dict(
    vocab_size=99, max_position_embeddings=12, hidden_size=64, intermediate_size=72, num_attention_heads=1
)
TINY_UNETS = {
    "sd1": dict(
        block_out_channels=(32, 64, 64), cross_attention_dim=64, layers_per_block=2, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "sd2": dict(
        block_out_channels=(64, 128), cross_attention_dim=64, attention_head_dim=(1, 2), use_linear_projection=True
    ),
    "sdxl": dict(
        block_out_channels=(64, 64), cross_attention_dim=128, attention_head_dim=(1, 1), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 40, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
}  # fmt: skip
TINY_TEXTS = {
    "sd1": (_TINY_TEXT | {"num_hidden_layers": 2, "projection_dim": 64},),
    "sd2": (_TINY_TEXT | {"num_hidden_layers": 24, "projection_dim": 40, "hidden_act": "gelu"},),
    "sdxl": (
        _TINY_TEXT | {"num_hidden_layers": 2, "projection_dim": 64},
        _TINY_TEXT | {"num_hidden_layers": 3, "projection_dim": 40, "hidden_act": "gelu"},
    ),
}


def tiny(family: str) -> dict[str, torch.nn.Module]:
    """The networks of one family: "unet", "vae", and the text encoders, the one of Stable Diffusion 2 with its last block."""
    parts = {
        "unet": networks.unet(norm_num_groups=32, **TINY_UNETS[family]),
        "vae": networks.vae(norm_num_groups=32, block_out_channels=(32, 64, 64)),
    }
    for part, config in zip(("text_encoder", "text_encoder_2"), TINY_TEXTS[family], strict=False):
        parts[part] = networks.redraw(_text(family, config), 4 + len(parts))
    return parts


def published(family: str) -> dict[str, torch.nn.Module]:
    """The same of the published sizes, on the meta device."""
    with torch.device("meta"):
        parts = {
            "unet": diffusers.UNet2DConditionModel(**UNETS[family]),
            "vae": diffusers.AutoencoderKL(**VAE),
        }
        texts = [_text(family, config) for config in TEXT_CONFIGS[family]]
    return parts | dict(zip(("text_encoder", "text_encoder_2"), texts, strict=False))


def _text(family: str, config: dict) -> torch.nn.Module:
    is_projected = family == "sd2" or config.get("hidden_act") == "gelu"
    cls = transformers.CLIPTextModelWithProjection if is_projected else transformers.CLIPTextModel
    return cls(transformers.CLIPTextConfig(**config))


def one_file(family: str, parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The tensors of the original file, with some that no network reads."""
    out: dict[str, torch.Tensor] = {}
    unet_names(out, parts["unet"])
    _vae(out, parts["vae"])
    for part, prefix in zip(("text_encoder", "text_encoder_2"), TEXTS[family], strict=False):
        (_open_clip if prefix.endswith("model.") else _clip)(out, parts[part], prefix)
    device = next(iter(out.values())).device
    unread = [
        "betas",
        "sqrt_recipm1_alphas_cumprod",
        "model_ema.decay",
        "first_stage_model.loss.logvar",
        "denoiser.sigmas",
    ]
    return out | {name: torch.zeros(3, device=device) for name in unread}


def _put(out: dict, name: str, module: torch.nn.Module, change=lambda x: x) -> None:
    for leaf, x in module.named_parameters(recurse=False):
        out[f"{name}.{leaf}"] = change(x.detach())


def _resnet(out: dict, name: str, module: torch.nn.Module, names: dict[str, str] = RESNET) -> None:
    for theirs, ours in names.items():
        if getattr(module, ours, None) is not None:
            _put(out, f"{name}.{theirs}", getattr(module, ours))


def _all(out: dict, name: str, module: torch.nn.Module) -> None:
    for path, x in module.named_parameters():
        out[f"{name}.{path}"] = x.detach()


def unet_names(out: dict, unet: torch.nn.Module) -> None:
    """Put a U-Net's tensors into `out` by their original names."""
    root = "model.diffusion_model."
    _put(out, f"{root}time_embed.0", unet.time_embedding.linear_1)
    _put(out, f"{root}time_embed.2", unet.time_embedding.linear_2)
    if getattr(unet, "add_embedding", None) is not None:
        _put(out, f"{root}label_emb.0.0", unet.add_embedding.linear_1)
        _put(out, f"{root}label_emb.0.2", unet.add_embedding.linear_2)
    _put(out, f"{root}input_blocks.0.0", unet.conv_in)
    n = 0
    for block in unet.down_blocks:
        for i, resnet in enumerate(block.resnets):
            n += 1
            _resnet(out, f"{root}input_blocks.{n}.0", resnet)
            if hasattr(block, "attentions"):
                _all(out, f"{root}input_blocks.{n}.1", block.attentions[i])
        if block.downsamplers:
            n += 1
            _put(out, f"{root}input_blocks.{n}.0.op", block.downsamplers[0].conv)
    _resnet(out, f"{root}middle_block.0", unet.mid_block.resnets[0])
    _all(out, f"{root}middle_block.1", unet.mid_block.attentions[0])
    _resnet(out, f"{root}middle_block.2", unet.mid_block.resnets[1])
    n = -1
    for block in unet.up_blocks:
        for i, resnet in enumerate(block.resnets):
            n += 1
            _resnet(out, f"{root}output_blocks.{n}.0", resnet)
            if hasattr(block, "attentions"):
                _all(out, f"{root}output_blocks.{n}.1", block.attentions[i])
        if block.upsamplers:
            _put(out, f"{root}output_blocks.{n}.{1 + hasattr(block, 'attentions')}.conv", block.upsamplers[0].conv)
    _put(out, f"{root}out.0", unet.conv_norm_out)
    _put(out, f"{root}out.2", unet.conv_out)


def _vae(out: dict, vae: torch.nn.Module) -> None:
    root = "first_stage_model."
    names = {x: x for x in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    for side, blocks in (("encoder", vae.encoder.down_blocks), ("decoder", list(vae.decoder.up_blocks)[::-1])):
        module, name = getattr(vae, side), f"{root}{side}"
        for theirs, ours in {"conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out"}.items():
            _put(out, f"{name}.{theirs}", getattr(module, ours))
        for level, block in enumerate(blocks):
            way = "down" if side == "encoder" else "up"
            for i, resnet in enumerate(block.resnets):
                _resnet(out, f"{name}.{way}.{level}.block.{i}", resnet, names)
            for sampler in getattr(block, f"{way}samplers") or ():
                _put(out, f"{name}.{way}.{level}.{way}sample.conv", sampler.conv)
        for i, resnet in enumerate(module.mid_block.resnets, 1):
            _resnet(out, f"{name}.mid.block_{i}", resnet, names)
        attention = module.mid_block.attentions[0]
        _put(out, f"{name}.mid.attn_1.norm", attention.group_norm)
        for theirs, layer in (("q", attention.to_q), ("k", attention.to_k), ("v", attention.to_v)):
            _put(out, f"{name}.mid.attn_1.{theirs}", layer, _convolution)
        _put(out, f"{name}.mid.attn_1.proj_out", attention.to_out[0], _convolution)
    for name in ("quant_conv", "post_quant_conv"):
        _put(out, root + name, getattr(vae, name))


def _convolution(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None, None] if x.ndim == 2 else x


def text_names(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a text encoder by their published names, `text_model.*`, which transformers 5 shortens."""
    state = {name.removeprefix("text_model."): x for name, x in module.state_dict().items()}
    return {name if name.startswith("text_projection") else f"text_model.{name}": x for name, x in state.items()}


def _clip(out: dict, text: torch.nn.Module, prefix: str) -> None:
    out |= {prefix + name: x for name, x in text_names(text).items()}
    out[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(12)[None]


def _open_clip(out: dict, text: torch.nn.Module, prefix: str) -> None:
    state = {name.removeprefix("text_model."): x for name, x in text_names(text).items()}
    out[f"{prefix}positional_embedding"] = state["embeddings.position_embedding.weight"]
    out[f"{prefix}token_embedding.weight"] = state["embeddings.token_embedding.weight"]
    out[f"{prefix}text_projection"] = state["text_projection.weight"].T
    out[f"{prefix}logit_scale"] = torch.zeros(())
    layers = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    layers["attn.out_proj"] = "self_attn.out_proj"
    for x in ("weight", "bias"):
        out[f"{prefix}ln_final.{x}"] = state[f"final_layer_norm.{x}"]
        for n in range(text.config.num_hidden_layers):
            block, ours = f"{prefix}transformer.resblocks.{n}", f"encoder.layers.{n}"
            out |= {f"{block}.{a}.{x}": state[f"{ours}.{b}.{x}"] for a, b in layers.items()}
            fused = torch.cat([state[f"{ours}.self_attn.{q}_proj.{x}"] for q in ("q", "k", "v")])
            out[f"{block}.attn.in_proj_{x}"] = fused


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """As numpy's; those on the meta device without memory of their own."""
    empty = np.zeros((), np.float16)
    return {n: np.broadcast_to(empty, x.shape) if x.is_meta else x.detach().numpy() for n, x in tensors.items()}
