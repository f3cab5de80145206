"""Reads config.json of a checkpoint into a typed config.

What is not implemented is an error of one sentence. A key is a field of the network's config, or
one of the keys that do not change what the network computes (`HARMLESS`), or an error.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

from referee_jax.models import align, blip, blip2, clip, image_reward, qwen3_vl, siglip
from referee_jax.models.diffusion import flux, sd3, tiny_vae, unet, vae
from referee_jax.models.flan_t5 import clip_t5, t5
from referee_jax.weights.convert import WeightsError
from referee_jax.weights.schedules import FlowSchedule, Schedule


def _any(names: str) -> dict[str, None]:
    return dict.fromkeys(names.split())


_PRETRAINED = _any(
    # where the file comes from; settings of training
    "_name_or_path _commit_hash _attn_implementation_autoset architectures transformers_version torch_dtype dtype "
    "attention_dropout dropout initializer_range initializer_factor "
    # keys that transformers once wrote into every config
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id "
    "forced_eos_token_id tokenizer_class prefix max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "exponential_decay_length_penalty remove_invalid_values suppress_tokens begin_suppress_tokens output_scores "
    "output_attentions output_hidden_states return_dict return_dict_in_generate use_cache id2label label2id "
    "finetuning_task task_specific_params problem_type chunk_size_feed_forward cross_attention_hidden_size "
    "tie_word_embeddings tie_encoder_decoder torchscript tf_legacy_loss use_bfloat16"
) | {
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
}
_T5 = (
    _PRETRAINED
    | _any("dropout_rate classifier_dropout is_encoder_decoder dense_act_fn is_gated_act output_past")
    | {"model_type": ("t5",)}
)
_DIFFUSERS = _any("_class_name _diffusers_version _name_or_path _use_default_values sample_size force_upcast dropout")

# Keys without a field in the config -> the values they may have; None: any.
HARMLESS: dict[type, Mapping[str, tuple | None]] = {
    clip.TextConfig: _PRETRAINED | {"model_type": ("clip_text_model",)},
    clip.VisionConfig: _PRETRAINED | {"model_type": ("clip_vision_model",), "num_channels": (3,)},
    clip.Config: _PRETRAINED | {"model_type": ("clip",)},
    siglip.TextConfig: _PRETRAINED | {"model_type": ("siglip_text_model",)},
    siglip.VisionConfig: _PRETRAINED
    | {"model_type": ("siglip_vision_model",), "num_channels": (3,), "vision_use_head": (True,)},
    # Early versions of the port wrote the two keys of CLIP; none read them.
    siglip.Config: _PRETRAINED | _any("projection_dim logit_scale_init_value") | {"model_type": ("siglip",)},
    blip.TextConfig: _PRETRAINED
    # label_smoothing is a setting of training.
    | _any("hidden_dropout_prob attention_probs_dropout_prob projection_dim encoder_hidden_size label_smoothing")
    | {"model_type": ("blip_text_model",), "is_decoder": (True,), "tie_word_embeddings": (True,)},
    blip.VisionConfig: _PRETRAINED
    | {"model_type": ("blip_vision_model",), "num_channels": (3,), "projection_dim": None},
    blip.Config: _PRETRAINED
    | _any("projection_dim logit_scale_init_value label_smoothing decoder_pad_token_id")
    | {"model_type": ("blip",), "tie_word_embeddings": (True,)},
    blip2.VisionConfig: _PRETRAINED
    | {"model_type": ("blip_2_vision_model",), "num_channels": (3,), "projection_dim": None},
    blip2.QFormerConfig: _PRETRAINED
    # transformers also takes the width of the images from vision_config.
    | _any("encoder_hidden_size hidden_dropout_prob attention_probs_dropout_prob classifier_dropout")
    | {"model_type": ("blip_2_qformer",), "position_embedding_type": ("absolute",)},
    # Keys of a language model, which this class does not have.
    blip2.Config: _PRETRAINED
    | _any("text_config use_decoder_only_language_model is_encoder_decoder image_token_index image_token_id")
    | {"model_type": ("blip-2",)},
    image_reward.Config: {"architectures": (["ImageReward"],)},
    align.TextConfig: _PRETRAINED
    | _any("hidden_dropout_prob attention_probs_dropout_prob")
    | {"model_type": ("align_text_model",), "position_embedding_type": ("absolute",)},
    # Includes keys of the classifier google/efficientnet-b7.
    align.VisionConfig: _PRETRAINED
    | _any("image_size hidden_dim num_hidden_layers batch_norm_momentum drop_connect_rate dropout_rate")
    | {"model_type": ("align_vision_model",), "num_channels": (3,), "pooling_type": ("mean",)},
    align.Config: _PRETRAINED | {"model_type": ("align",)},
    qwen3_vl.TextConfig: _PRETRAINED | {"model_type": ("qwen3_vl_text",), "attention_bias": (False,)},
    qwen3_vl.VisionConfig: _PRETRAINED | {"model_type": ("qwen3_vl", "qwen3_vl_vision"), "in_channels": (3,)},
    # Ids of tokens that the processor puts around a picture.
    qwen3_vl.Config: _PRETRAINED
    | _any("image_token_id video_token_id vision_start_token_id vision_end_token_id")
    | {"model_type": ("qwen3_vl",)},
    t5.Config: _T5,
    clip_t5.Config: _T5
    # settings of training; the hub id of the tower, and what is also in vision_config
    | _any(
        "freeze_mm_mlp_adapter tune_mm_mlp_adapter pretrain_mm_mlp_adapter mm_vision_tower mm_hidden_size use_mm_proj"
    )
    | {
        "model_type": ("clip_t5", "t5"),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch",),
        "mm_use_im_start_end": (False,),
        "mm_use_im_patch_token": (False,),
        "image_aspect_ratio": ("pad", None),
        "image_grid_pinpoints": (None,),
    },
    unet.Config: _DIFFUSERS
    | unet.REFUSED
    | {"_class_name": ("UNet2DConditionModel",), "addition_embed_type_num_heads": None},
    vae.Config: _DIFFUSERS
    | vae.REFUSED
    | {"_class_name": ("AutoencoderKL",), "in_channels": None, "use_quant_conv": None},
    tiny_vae.Config: _DIFFUSERS
    | tiny_vae.REFUSED
    # of the encoder, of latents written as bytes, and a copy of the decoder's widths
    | _any("in_channels encoder_block_out_channels num_encoder_blocks latent_magnitude latent_shift block_out_channels")
    | {"_class_name": ("AutoencoderTiny",)},
    sd3.Config: _DIFFUSERS | {"_class_name": ("SD3Transformer2DModel",)},
    flux.Config: _DIFFUSERS | {"_class_name": ("FluxTransformer2DModel",)},
    # The shift by the size of the picture, and those keys, act with use_dynamic_shifting only.
    FlowSchedule: _any(
        "_class_name _diffusers_version base_image_seq_len base_shift max_image_seq_len max_shift time_shift_type"
    )
    | dict.fromkeys(
        (
            "use_dynamic_shifting",
            "invert_sigmas",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "stochastic_sampling",
        ),
        (False,),
    )
    | {"shift_terminal": (None,)},
    Schedule: _any(
        "_class_name _diffusers_version algorithm_type clip_sample clip_sample_range dynamic_thresholding_ratio "
        "euler_at_final final_sigmas_type interpolation_type lambda_min_clipped lower_order_final sample_max_value "
        "sigma_max sigma_min skip_prk_steps solver_order solver_type thresholding timestep_type use_beta_sigmas "
        "use_exponential_sigmas use_karras_sigmas use_lu_lambdas "
        "variance_type "
        # of UniPC, DPM-Solver and SA-Solver; shifts act with use_flow_sigmas only
        "corrector_order disable_corrector flow_shift predict_x0 predictor_order shift_terminal solver_p tau_func "
        "time_shift_type use_dynamic_shifting "
        # of LCM and TCD, then of EDM
        "original_inference_steps timestep_scaling rho sigma_data sigma_schedule"
    )
    | {"trained_betas": (None,), "rescale_betas_zero_snr": (False,), "use_flow_sigmas": (False,)},
}


def config_from_json(cls: type, values: Mapping, *, where: str = "config.json"):
    """Returns the config dataclass `cls` from the dictionary of a config.json.

    Absent keys get the defaults. Raises WeightsError, which begins with `where` and names key and
    value, for an unknown key, a wrong type, or a value that is not implemented.
    """
    hints, known = typing.get_type_hints(cls), HARMLESS.get(cls, {})
    fields = {}
    for key, value in values.items():
        if key in hints:
            fields[key] = _typed(value, hints[key], key, where)
        elif key not in known:
            raise WeightsError(f"{where}: the key {key}={value!r} is not known to {cls.__module__}.{cls.__name__}")
        elif known[key] is not None and not any(_equal(value, allowed) for allowed in known[key]):
            allowed = ", ".join(map(repr, known[key]))
            raise WeightsError(f"{where}: {key}={value!r} is not implemented; supported: {allowed}")
    try:
        return cls(**fields)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error


def _equal(a, b) -> bool:
    """Equality of JSON values, where True is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _typed(value, hint, key: str, where: str):
    """A JSON value as the type `hint`; lists become tuples, dictionaries configs."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if dataclasses.is_dataclass(option) and (value is None or isinstance(value, Mapping)):
            return config_from_json(option, value or {}, where=f"{where}: {key}")
        if kind is tuple and isinstance(value, list | tuple):
            return tuple(tuple(v) if isinstance(v, list) else v for v in value)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return value
    expected = getattr(hint, "__name__", hint) if isinstance(hint, type) else hint
    raise WeightsError(f"{where}: {key}={value!r} is of the wrong type; expected {expected}")


def clip_config(values: Mapping, *, where: str) -> clip.Config:
    """Reads config.json of a CLIPModel.

    In old ones `text_config_dict` overrides `text_config`, even by defaults.
    """
    values = dict(values)
    for key, cls in (("text_config", clip.TextConfig), ("vision_config", clip.VisionConfig)):
        legacy = values.pop(f"{key}_dict", None)
        if legacy is not None:
            values[key] = (values.get(key) or {}) | dataclasses.asdict(cls()) | legacy
    return config_from_json(clip.Config, values, where=where)


def blip_config(values: Mapping, *, where: str) -> blip.Config:
    """Reads config.json of a BLIP.

    Raises WeightsError if its BERT-base has a wrong number of heads. The shapes of the weights do
    not depend on that number: a wrong one would load and give noise.
    """
    config = config_from_json(blip.Config, values, where=where)
    text = config.text_config
    if text.hidden_size == 768 and text.num_attention_heads != 12:
        raise WeightsError(
            f"{where}: text_config: num_attention_heads={text.num_attention_heads} (8 if absent) is not what weights of "
            "hidden_size=768 were trained with, which is 12; transformers once wrote 8 by mistake "
            '(huggingface/transformers#22625): write "num_attention_heads": 12 into text_config'
        )
    return config


# Samplers whose timesteps are "leading" unless they say otherwise.
_STOPPING = ("PNDM", "DDIM", "LCM", "TCD", "None")  # those that may end at the noise of timestep 0
_LEADING = ("PNDM", "DDIM", "DDPM", "LCM", "TCD", "None")


def schedule(values: Mapping, *, where: str) -> Schedule | FlowSchedule:
    """Reads scheduler_config.json: the schedule of training, whichever sampler it was saved with.

    Raises WeightsError for EDM's without betas, which is that of networks trained in EDM's own way.
    """
    name = str(values.get("_class_name"))
    if name.startswith("FlowMatch"):
        return config_from_json(FlowSchedule, values, where=where)
    if name.startswith("EDM") and "beta_schedule" not in values:
        raise WeightsError(
            f"{where}: _class_name={name!r} without beta_schedule is not implemented: it was trained as EDM"
        )
    spacing = "leading" if name.startswith(_LEADING) else "linspace"
    values = {"timestep_spacing": spacing, "set_alpha_to_one": not name.startswith("PNDM")} | dict(values)
    if not name.startswith(
        _STOPPING
    ):  # others may have the key, from a file that they were made of, and do not read it
        values["set_alpha_to_one"] = True
    return config_from_json(Schedule, values, where=where)


# What rotary positions may be, besides the numbers that are fields -> the values that are implemented.
_ROTARY = {"text_config": {"rope_type": "default", "type": "default", "mrope_interleaved": True}}
_ROTARY["vision_config"] = {"rope_type": "axial"}


def qwen3_vl_config(values: Mapping, *, where: str) -> qwen3_vl.Config:
    """Reads config.json of a Qwen3VLForConditionalGeneration.

    Its rotary positions are in `rope_parameters`, or, before transformers 5, in `rope_scaling` and
    beside it.
    """
    values = dict(values)
    for key, allowed in _ROTARY.items():
        part = dict(values.get(key) or {})
        rotary = {**(part.pop("rope_scaling", None) or {}), **(part.pop("rope_parameters", None) or {})}
        for name, value in rotary.items():
            if name in allowed and value != allowed[name]:
                raise WeightsError(
                    f"{where}: {key}: {name}={value!r} of the rotary positions is not implemented; "
                    f"supported: {allowed[name]!r}"
                )
        values[key] = part | {name: value for name, value in rotary.items() if name not in allowed}
    return config_from_json(qwen3_vl.Config, values, where=where)


def t5_config(values: Mapping, *, where: str, cls: type = t5.Config) -> t5.Config:
    """Reads config.json of a T5: with words that are not tied there is a head of its own."""
    # Where the key is absent, transformers means the feed-forward of the first version.
    values = {"feed_forward_proj": "relu", "lm_head": values.get("tie_word_embeddings") is False} | dict(values)
    return config_from_json(cls, values, where=where)


def clip_t5_config(values: Mapping, *, where: str) -> clip_t5.Config:
    """Reads config.json of a CLIP-FlanT5. Raises WeightsError where it has no `vision_config`."""
    if "vision_config" not in values:
        raise WeightsError(
            f"{where} has no vision_config, as the authors' files name the vision tower by its hub id alone: make a "
            "directory of both with `python -m referee_jax.weights.lavis DIRECTORY OUT_DIR`"
        )
    return t5_config(values, where=where, cls=clip_t5.Config)


def reader(cls: type) -> Callable:
    """`config_from_json` for a class: `(values, where=...) -> config`."""
    return lambda values, *, where: config_from_json(cls, values, where=where)


def read_json(file: Path) -> dict:
    """Returns the object in a JSON file. Raises WeightsError naming the file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing") from error
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} does not hold a JSON object")
    return values
