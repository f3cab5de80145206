"""Reads Stable Diffusion in one file, by the names of its authors' code, as the parts of a diffusers directory.

CompVis and Stability AI publish all networks of Stable Diffusion 1.x, 2.x and XL in one file of
safetensors: the U-Net by the names of `ldm` (blocks in one row of numbers), the autoencoder, and
one or two text encoders by the names of transformers or of OpenCLIP. The renames are those of
diffusers (loaders/single_file_utils.py). A tensor that is neither renamed nor of `IGNORED` is an
error that names it; one that is missing is missed by `convert.fill`.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from referee_jax.weights.convert import WeightsError
from referee_jax.weights.formats import original_names

UNET, VAE = "model.diffusion_model.", "first_stage_model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What files of one family have in common, besides the names.

    Attributes:
        texts: part -> prefix of its names; those of OpenCLIP's layout end with `model.`.
        context: width of the texts' states, by which a file without text encoders is known.
        scaling_factor: of the latents.
        size: side of the images of training, in pixels.
    """

    texts: Mapping[str, str]
    context: int
    scaling_factor: float = 0.18215
    size: int = 512


LAYOUTS = {
    "sd1": Family(texts={"text_encoder": "cond_stage_model.transformer."}, context=768),
    "sd2": Family(texts={"text_encoder": "cond_stage_model.model."}, context=1024),
    "sdxl": Family(
        texts={
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        context=2048,
        scaling_factor=0.13025,
        size=1024,
    ),
}
# Names of files that are similar, and are not read -> what they are.
REFUSED = {
    "conditioner.embedders.0.model.*": "SDXL's refiner, which makes no images of its own",
    "edm_mean": "Playground v2.5, which was trained as EDM",
    "edm_vpred.*": "a v-prediction of EDM",
    "control_model.*": "a ControlNet",
}
# Tensors that no network reads.
IGNORED = (
    # averages over the training, kept beside the weights; diffusers does not take them either
    *("model_ema.*", "first_stage_model.model_ema.*"),
    # the noise schedule, and what says how the network was trained
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_*alphas_cumprod", "log_one_minus_alphas_cumprod"),
    *("posterior_*", "logvar", "lvlb_weights", "denoiser.sigmas", "global_step", "v_pred", "ztsnr"),
    # of the autoencoder's training
    "first_stage_model.loss.*",
    # buffers of the text encoders, and what only compares texts with images
    *("*.position_ids", "*.attn_mask", "*.logit_scale", "*.transformer.text_projection.weight"),
    # Stable Diffusion 2 reads the last block but one of OpenCLIP's 24.
    *("cond_stage_model.model.transformer.resblocks.23.*", "cond_stage_model.model.text_projection"),
)


class Part(Mapping[str, np.ndarray]):
    """A network's tensors by the names of diffusers or transformers, each read when it is asked for.

    `sources` has the original name and the change of each.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], sources: Mapping[str, original_names.Target]):
        self._tensors, self.sources, self.source = tensors, sources, getattr(tensors, "source", "")

    def __getitem__(self, name: str) -> np.ndarray:
        source, change = self.sources[name]
        x = np.asarray(self._tensors[source])
        try:
            return change(x)
        except ValueError as error:
            raise WeightsError(f"{source} has shape {x.shape}, which {name} cannot be made of") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


# --- what a file is ---


def is_original(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of an original file."""
    return any(name.startswith(UNET) for name in names)


def family(tensors: Mapping[str, np.ndarray]) -> str:
    """The family, of `LAYOUTS`, of the tensors of an original file.

    Names of text encoders say it; where there are none, the width of the texts' states does. Raises
    WeightsError for other files.
    """
    for pattern, what in REFUSED.items():
        if found := fnmatch.filter(tensors, pattern):
            raise WeightsError(f"{found[0]} is of {what}: it is not read")
    for kind, row in LAYOUTS.items():
        if any(name.startswith(prefix) for prefix in row.texts.values() for name in tensors):
            return kind
    keys = fnmatch.filter(tensors, f"{UNET}*.attn2.to_k.weight")
    width = np.shape(tensors[keys[0]])[-1] if keys else 0
    for kind, row in LAYOUTS.items():
        if row.context == width:
            return kind
    raise WeightsError(
        "the names of the tensors are not those of Stable Diffusion 1, 2 or XL in one file: "
        + (f"the texts' states are {width} wide" if keys else f"there is no {UNET}*.attn2.to_k.weight")
    )


def prediction_type(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> str:
    """What the U-Net predicts, "epsilon" or "v_prediction", as far as a file says it; "" if it does not.

    Only files of Stable Diffusion 2 are silent: a mark `v_pred`, or `modelspec.prediction_type` in
    the file's metadata, says it for all; the number of steps of training, as in diffusers, for 2.

    Args:
        tensors: of the file.
        metadata: of the file's header.
    """
    said = (metadata or {}).get("modelspec.prediction_type", "")
    if "v_pred" in tensors or said in ("v", "v_prediction"):
        return "v_prediction"
    if said == "epsilon" or family(tensors) != "sd2":
        return "epsilon"
    if "global_step" in tensors:  # of the base, for 512 pixels; others are of 768
        return "epsilon" if int(np.asarray(tensors["global_step"]).reshape(())) == 875_000 else "v_prediction"
    return ""


def split(tensors: Mapping[str, np.ndarray]) -> dict[str, Part]:
    """The parts of an original file that are there: "unet", "vae", "text_encoder", "text_encoder_2".

    Raises WeightsError naming tensors that are unknown, or two that are the same.

    Args:
        tensors: of the file, by its names; nearly none is read before a part is asked for it.
    """
    kind = family(tensors)
    prefixes = {"unet": UNET, "vae": VAE, **LAYOUTS[kind].texts}
    tables = {"unet": original_names.unet, "vae": original_names.vae}
    unknown = [name for name in tensors if not any(fnmatch.fnmatchcase(name, pattern) for pattern in IGNORED)]
    parts: dict[str, Part] = {}
    for part, prefix in prefixes.items():
        names = [name.removeprefix(prefix) for name in unknown if name.startswith(prefix)]
        table = tables.get(part, original_names.open_clip if prefix.endswith("model.") else original_names.clip)(names)
        if kind != "sdxl":
            table = {name: row for name, row in table.items() if not name.startswith("label_emb.")}
        sources: dict[str, original_names.Target] = {}
        for name in names:
            for target, change in table.get(name, ()):
                if target in sources:
                    raise WeightsError(f"{sources[target][0]} and {prefix}{name} are the same part of the network")
                sources[target] = prefix + name, change
        known = {name for name, _ in sources.values()}
        unknown = [name for name in unknown if name not in known]
        if sources:
            parts[part] = Part(tensors, sources)
    if unknown:
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        raise WeightsError(f"tensors that a {kind} in one file does not have: {', '.join(unknown[:20])}{more}")
    return parts


# --- configs, from the shapes ---


def configs(
    tensors: Mapping[str, np.ndarray], *, prediction: str = "", metadata: Mapping[str, str] | None = None
) -> dict[str, dict]:
    """What config.json of each part of `split` says, and scheduler_config.json as "scheduler".

    Sizes are from shapes; numbers of heads and of groups, activations and the noise schedule are
    those of all published files. Raises WeightsError as `split` does, and for a missing tensor, or one
    of too few axes.

    Args:
        tensors: of the file, by its names.
        prediction: what the U-Net predicts; "": what the file says, or else "epsilon", as sd-turbo
            and the base of Stable Diffusion 2 do. diffusers takes a silent file for the other.
        metadata: of the file's header.
    """
    kind, parts = family(tensors), split(tensors)
    prediction = prediction or prediction_type(tensors, metadata) or "epsilon"
    size = 768 if kind == "sd2" and prediction == "v_prediction" else LAYOUTS[kind].size
    out: dict[str, dict] = {}
    for part, named in parts.items():
        try:
            out[part] = {"unet": _unet_config, "vae": _vae_config}.get(part, _text_config)(_Shapes(part, named))
        except WeightsError:
            raise
        except (IndexError, ValueError) as error:
            raise WeightsError(f"{part}: a tensor has too few axes to say how large the network is") from error
    for part, side in (("unet", size // 8), ("vae", size)):
        if part in out:
            out[part]["sample_size"] = side
    if "vae" in out:
        out["vae"]["scaling_factor"] = LAYOUTS[kind].scaling_factor
    for part, prefix in LAYOUTS[kind].texts.items():
        if part in out:
            out[part]["hidden_act"] = "gelu" if prefix.endswith("model.") else "quick_gelu"
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    schedule |= {"prediction_type": prediction, "timestep_spacing": "leading", "steps_offset": 1}
    schedule |= {"_class_name": "EulerDiscreteScheduler"} if kind == "sdxl" else {
        "_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False,
    }  # fmt: skip
    if "ztsnr" in tensors:
        schedule["rescale_betas_zero_snr"] = True
    return out | {"scheduler": schedule}


class _Shapes:
    """Shapes by name, each of a tensor that is read for it. Raises WeightsError for a tensor that is missing."""

    def __init__(self, part: str, tensors: Mapping[str, np.ndarray]):
        self.part, self.tensors = part, tensors

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise WeightsError(f"{self.part}: there is no {name}, which says how large the network is")
        return np.shape(self.tensors[name])

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


def _unet_config(shapes: _Shapes) -> dict:
    levels = range(original_names.count(shapes, "down_blocks."))
    widths = [shapes[f"down_blocks.{n}.resnets.0.conv1.bias"][0] for n in levels]
    depths = [original_names.count(shapes, f"down_blocks.{n}.attentions.0.transformer_blocks.") for n in levels]
    up = [original_names.count(shapes, f"up_blocks.{n}.attentions.0.transformer_blocks.") for n in levels]
    blocks = [n or 1 for n in depths]
    middle = "mid_block.attentions.0."
    is_linear = len(shapes[f"{middle}proj_in.weight"]) == 2
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.bias"][0],
        "block_out_channels": widths,
        "layers_per_block": original_names.count(shapes, "down_blocks.0.resnets."),
        "down_block_types": ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if n else "UpBlock2D" for n in up],
        "transformer_layers_per_block": blocks if len(set(blocks)) > 1 else blocks[0],
        "cross_attention_dim": shapes[f"{middle}transformer_blocks.0.attn2.to_k.weight"][1],
        # By diffusers' misnomer these are numbers of heads, of which the newer files' have 64 channels.
        "attention_head_dim": [width // 64 for width in widths] if is_linear else 8,
        "use_linear_projection": is_linear,
    }
    if "add_embedding.linear_1.weight" in shapes:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config["projection_class_embeddings_input_dim"] = shapes["add_embedding.linear_1.weight"][1]
    return config


def _vae_config(shapes: _Shapes) -> dict:
    levels = original_names.count(shapes, "decoder.up_blocks.")
    widths = [shapes[f"decoder.up_blocks.{n}.resnets.0.conv1.bias"][0] for n in reversed(range(levels))]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.bias"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": original_names.count(shapes, "decoder.up_blocks.0.resnets.") - 1,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_config(shapes: _Shapes) -> dict:
    """transformers' CLIPTextModel; its heads have 64 channels in all published files."""
    words, width = shapes["text_model.embeddings.token_embedding.weight"]
    is_projected = "text_projection.weight" in shapes
    return {
        "architectures": ["CLIPTextModelWithProjection" if is_projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.bias"][0],
        "num_hidden_layers": original_names.count(shapes, "text_model.encoder.layers."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "layer_norm_eps": 1e-5,
        "projection_dim": shapes["text_projection.weight"][0] if is_projected else width,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
    }
