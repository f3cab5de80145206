"""The tables of lavis.py: names in the authors' files, and the networks' sizes from shapes.

`KINDS` has a row for each kind of file. In names `*` is one part between dots, `**` one or more.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from referee_jax.weights.convert import WeightsError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BERT, CLIP_H = "google-bert/bert-base-uncased", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
OPENAI = "openai/clip-vit-base-patch32"
DEC, ENC = {"bos_token": "[DEC]"}, {"additional_special_tokens": ["[ENC]"]}

Row = tuple[str, str] | tuple[str, str, Callable[..., Iterable[np.ndarray]]]
Shapes = Mapping[str, tuple[int, ...]]


# --- transformations of tensors, for rows ---


def with_leading_axes(x: np.ndarray) -> list[np.ndarray]:
    """A class token `[D]` or table `[T, D]` to `[1, T, D]`."""
    return [x.reshape(1, -1, x.shape[-1])]


def without_key_bias(query: np.ndarray, value: np.ndarray) -> list[np.ndarray]:
    """Biases of queries and values to those of queries, keys and values.

    EVA's keys have none: zeros.
    """
    return [np.concatenate([query, np.zeros_like(value), value])]


def thirds(x: np.ndarray) -> list[np.ndarray]:
    """One tensor of torch's MultiheadAttention to those of queries, keys and values."""
    return np.split(x, 3)


def transposed(x: np.ndarray) -> list[np.ndarray]:
    """A matrix for multiplication from the right to that of torch's Linear."""
    return [x.T]


# --- rows: the authors' names, ours, and a transformation, if any ---


def _moved(rows: Iterable[Row], old: str, new: str) -> tuple[Row, ...]:
    """The rows with the prefix `old` for their sources and `new` for their targets."""
    before = lambda prefix, names: " ".join(prefix + name for name in names.split())
    return tuple((before(old, row[0]), before(new, row[1]), *row[2:]) for row in rows)


# timm's vision transformer, BLIP's; and EVA's, whose bias differs.
VIT = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.*", "embeddings.patch_embedding.*"),
    ("blocks.*.norm1.*", "encoder.layers.*.layer_norm1.*"),
    ("blocks.*.norm2.*", "encoder.layers.*.layer_norm2.*"),
    ("blocks.*.attn.qkv.*", "encoder.layers.*.self_attn.qkv.*"),
    ("blocks.*.attn.q_bias blocks.*.attn.v_bias", "encoder.layers.*.self_attn.qkv.bias", without_key_bias),
    ("blocks.*.attn.proj.*", "encoder.layers.*.self_attn.projection.*"),
    ("blocks.*.mlp.**", "encoder.layers.*.mlp.**"),
    ("norm.*", "post_layernorm.*"),
)
# A block of OpenAI's CLIP without its attention.
BLOCK = (
    ("resblocks.*.ln_1.*", "layers.*.layer_norm1.*"),
    ("resblocks.*.ln_2.*", "layers.*.layer_norm2.*"),
    ("resblocks.*.mlp.c_fc.*", "layers.*.mlp.fc1.*"),
    ("resblocks.*.mlp.c_proj.*", "layers.*.mlp.fc2.*"),
)
# Its attention as BLIP-2's vision transformer has it, and as transformers' CLIP does.
FUSED = (
    ("resblocks.*.attn.in_proj_*", "layers.*.self_attn.qkv.*"),
    ("resblocks.*.attn.out_proj.*", "layers.*.self_attn.projection.*"),
)
SPLIT = (
    (
        "resblocks.*.attn.in_proj_*",
        "layers.*.self_attn.q_proj.* layers.*.self_attn.k_proj.* layers.*.self_attn.v_proj.*",
        thirds,
    ),
    ("resblocks.*.attn.out_proj.*", "layers.*.self_attn.out_proj.*"),
)
LAVIS_CLIP = (
    ("class_embedding", "embeddings.class_embedding", with_leading_axes),
    ("positional_embedding", "embeddings.position_embedding", with_leading_axes),
    ("conv1.weight", "embeddings.patch_embedding.weight"),
    ("ln_pre.*", "pre_layernorm.*"),
    *_moved((*BLOCK, *FUSED), "transformer.", "encoder."),
)
QFORMER = (
    ("bert.embeddings.LayerNorm.*", "qformer.layernorm.*"),
    ("bert.embeddings.*.weight", "embeddings.*.weight"),
    ("bert.encoder.layer.*.attention.self.**", "qformer.encoder.layer.*.attention.attention.**"),
    ("bert.encoder.layer.*.crossattention.self.**", "qformer.encoder.layer.*.crossattention.attention.**"),
    ("bert.encoder.**", "qformer.encoder.**"),
    ("cls.**", "cls.**"),
)
BLIP2 = (
    *_moved((*VIT, *LAVIS_CLIP), "visual_encoder.", "vision_model."),
    *_moved(QFORMER, "Qformer.", ""),
    ("ln_vision.*", "vision_model.post_layernorm.*"),
    ("query_tokens", "query_tokens"),
    ("vision_proj.*", "vision_projection.*"),
    ("text_proj.*", "text_projection.*"),
    ("itm_head.*", "itm_head.*"),
)
TEXT_ENCODER, TEXT_DECODER = ("text_encoder.**", "text_encoder.**"), ("text_decoder.**", "text_decoder.**")
HEADS = tuple((name, name) for name in ("vision_proj.*", "text_proj.*", "itm_head.*"))
BLIP_VIT = _moved(VIT, "visual_encoder.", "vision_model.")
OPEN_CLIP = (
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *_moved((*BLOCK, *SPLIT), "transformer.", "text_model.encoder."),
    ("ln_final.*", "text_model.final_layer_norm.*"),
    ("text_projection", "text_projection.weight", transposed),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),  # as transformers spells it
    *_moved((*BLOCK, *SPLIT), "visual.transformer.", "vision_model.encoder."),
    ("visual.ln_post.*", "vision_model.post_layernorm.*"),
    ("visual.proj", "visual_projection.weight", transposed),
    ("logit_scale", "logit_scale"),
)

# Only for training: buffers, momentum encoders, queues, the temperature of the contrastive loss.
TRAINING = ("**.position_ids", "visual_encoder_m.**", "text_encoder_m.**", "vision_proj_m.*", "text_proj_m.*")
TRAINING += ("image_queue", "text_queue", "idx_queue", "ptr_queue", "queue_ptr", "temp")
# Parts of the vision transformers that LAVIS does not use: the last block (of EVA's 40, CLIP's 24)
# and after it.
VISION_ENDS = ("blocks.39.**", "norm.*", "fc_norm.*", "head.*", "mask_token")
VISION_ENDS += ("transformer.resblocks.23.**", "ln_post.*", "proj")
# The last is unused, of a vocabulary without [DEC]; the decoder's bias is read.
BLIP2_IGNORED = (*TRAINING, *(f"visual_encoder.{name}" for name in VISION_ENDS), "Qformer.cls.predictions.bias")


# --- configs, from the shapes of the tensors by our names ---


class ShapesByName(dict):
    """Shapes by name. Raises WeightsError for a tensor that is missing."""

    def __missing__(self, name: str):
        raise WeightsError(f"there is no {name}, which says how large the network is")


def _count(shapes: Shapes, prefix: str) -> int:
    """Number of layers, which are numbered after `prefix`."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})


def _sizes(shapes: Shapes, layers: str, wide: str, width: int, head_width: int) -> dict:
    """The keys of all transformers' configs.

    `layers` is the prefix of the layers' numbers, `wide` the name of a layer's wider matrix.
    """
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{layers}0.{wide}.weight"][0],
        "num_hidden_layers": _count(shapes, layers),
        "num_attention_heads": width // head_width,
    }


def _vision(shapes: Shapes, positions: str, head_width: int, **values) -> dict:
    """`vision_config`; `positions` is the name of the table of positions."""
    *_, tokens, width = shapes[f"vision_model.embeddings.{positions}"]
    patch, side = shapes["vision_model.embeddings.patch_embedding.weight"][-1], math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise WeightsError(f"{tokens} positions are not those of a class token and a square of patches")
    sizes = _sizes(shapes, "vision_model.encoder.layers.", "mlp.fc1", width, head_width)
    return sizes | {"image_size": side * patch, "patch_size": patch} | values


def _bert(shapes: Shapes, embeddings: str, layers: str, **values) -> dict:
    """`text_config` or `qformer_config`; `embeddings` and `layers` are prefixes of names."""
    words, width = shapes[f"{embeddings}word_embeddings.weight"]
    positions = shapes[f"{embeddings}position_embeddings.weight"][0]
    sizes = _sizes(shapes, layers, "intermediate.dense", width, 64) | {"vocab_size": words}
    return sizes | {"max_position_embeddings": positions, "hidden_act": "gelu", "layer_norm_eps": 1e-12} | values


def _blip2(shapes: Shapes) -> dict:
    position, layers = "position_embedding", "qformer.encoder.layer."
    if "vision_model.pre_layernorm.weight" in shapes:
        values = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "pre_layernorm": True, "patch_bias": False}
        vision = _vision(shapes, position, 64, **values)
    else:
        vision = _vision(shapes, position, 88, hidden_act="gelu", layer_norm_eps=1e-6)
    depth = _count(shapes, layers)
    reading = [n for n in range(depth) if f"{layers}{n}.crossattention.attention.key.weight" in shapes]
    qformer = {
        "cross_attention_frequency": depth // max(len(reading), 1),
        "use_qformer_text_input": True,
        "encoder_hidden_size": vision["hidden_size"],
    }
    return {
        "model_type": "blip-2",
        "architectures": ["Blip2ForImageTextRetrieval"],
        "vision_config": vision | {"post_layernorm_eps": 1e-5},
        "qformer_config": _bert(shapes, "embeddings.", layers, **qformer),
        "num_query_tokens": shapes["query_tokens"][1],
        "image_text_hidden_size": shapes["vision_projection.weight"][0],
    }


def _blip_parts(shapes: Shapes, text: str, **values) -> dict:
    """`text_config`, with `values`, and `vision_config`.

    `text` is the prefix of the BERT's names.
    """
    return {
        "vision_config": _vision(shapes, "position_embedding", 64, hidden_act="gelu", layer_norm_eps=1e-6),
        "text_config": _bert(shapes, f"{text}embeddings.", f"{text}encoder.layer.", **values),
    }


def _blip(shapes: Shapes, architecture: str, text: str, **values) -> dict:
    common = shapes.get("vision_proj.weight", (256,))[0]
    names = {"model_type": "blip", "architectures": [architecture], "image_text_hidden_size": common}
    config = _blip_parts(shapes, text, **values)
    config["text_config"]["encoder_hidden_size"] = config["vision_config"]["hidden_size"]
    return names | config


def _image_reward(shapes: Shapes) -> dict:
    sizes = [shapes[f"mlp.layers.{n}.weight"][0] for n in range(_count(shapes, "mlp.layers."))]
    # No model_type: transformers, when it reads the tokenizer, would warn of an unknown one.
    return {"architectures": ["ImageReward"], "mlp_sizes": sizes} | _blip_parts(shapes, "text_encoder.")


def _clip(shapes: Shapes, architecture: str, head_width: int, act: str) -> dict:
    """`head_width` is of the vision transformer; texts are read by heads of 64."""
    words, width = shapes["text_model.embeddings.token_embedding.weight"]
    sizes = _sizes(shapes, "text_model.encoder.layers.", "mlp.fc1", width, 64)
    common = {"hidden_act": act, "layer_norm_eps": 1e-5, "projection_dim": shapes["text_projection.weight"][0]}
    positions = shapes["text_model.embeddings.position_embedding.weight"][0]
    ids = {"bos_token_id": words - 2, "eos_token_id": words - 1}  # as in all vocabularies of CLIP
    vision = _vision(shapes, "position_embedding.weight", head_width, **common)
    if vision["hidden_size"] % head_width:
        raise WeightsError(
            f"a vision transformer {vision['hidden_size']} wide is not HPSv2's; of other CLIPs by these names only OpenAI's own "
            "archives are converted, since the tensors do not say which activation a network has: get its directory in "
            f"transformers' layout from the hub, as {OPENAI}"
        )
    return {
        "model_type": "clip",
        "architectures": [architecture],
        "projection_dim": common["projection_dim"],
        "text_config": sizes | common | ids | {"vocab_size": words, "max_position_embeddings": positions},
        "vision_config": vision,
    }


# --- kinds ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How one kind of file is converted.

    Attributes:
        network: of `load.KINDS`, where it has not the kind's own name.
        has, lacks: patterns that identify the kind: the file has a tensor of each of the first,
            none of the second.
        rows: names of its tensors and ours; the first row that matches is used.
        ignore: patterns of tensors that are not converted.
        config: shapes by our names -> config.json.
        tokenizer: directory or hub id of the default tokenizer.
        special: special tokens that the authors add to it.
        crop: whether images are cropped to a square; else they are resized to one.
    """

    network: str = ""
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    rows: tuple[Row, ...]
    ignore: tuple[str, ...]
    config: Callable[[Shapes], dict]
    tokenizer: str = BERT
    special: tuple[Mapping, ...] = (DEC, ENC)
    crop: bool = False


KINDS = {
    "blip2": Kind(has=("Qformer.**",), rows=BLIP2, ignore=BLIP2_IGNORED, config=_blip2, special=(DEC,)),
    "image_reward": Kind(
        has=("blip.**", "mlp.**"),
        rows=(
            *_moved((*BLIP_VIT, TEXT_ENCODER), "blip.", ""),
            # The numbers between are those of dropout layers.
            *((f"mlp.layers.{old}.*", f"mlp.layers.{new}.*") for new, old in enumerate((0, 2, 4, 6, 7))),
        ),
        # BLIP's heads are not used.
        ignore=tuple(f"blip.{name}" for name in (*TRAINING, *(name for name, _ in HEADS))),
        config=_image_reward,
        crop=True,
    ),
    "openai_clip": Kind(
        network="clip",
        has=("visual.transformer.**", "input_resolution"),
        rows=OPEN_CLIP,
        ignore=("input_resolution", "context_length", "vocab_size"),
        config=lambda shapes: _clip(shapes, "CLIPModel", 64, "quick_gelu"),
        tokenizer=OPENAI,
        special=(),
        crop=True,
    ),
    "clip": Kind(
        has=("visual.transformer.**",),
        lacks=("input_resolution",),
        rows=OPEN_CLIP,
        ignore=("attn_mask",),
        config=lambda shapes: _clip(shapes, "HPS", 80, "gelu"),
        tokenizer=CLIP_H,
        special=(),
        crop=True,
    ),
    # Files of pre-training hold all tasks of BLIP: they need --kind, and parts of other tasks are
    # ignored.
    "blip_itm": Kind(
        has=("itm_head.*", "text_encoder.**"),
        lacks=("text_decoder.**",),
        rows=(*BLIP_VIT, TEXT_ENCODER, *HEADS),
        ignore=(*TRAINING, "text_decoder.**"),
        config=lambda shapes: _blip(shapes, "BlipForImageTextRetrieval", "text_encoder."),
    ),
    "blip_caption": Kind(
        has=("text_decoder.**",),
        lacks=("text_encoder.**",),
        rows=(*BLIP_VIT, TEXT_DECODER),
        ignore=(*TRAINING, "text_encoder.**", *(name for name, _ in HEADS)),
        # The authors' training of captions; transformers' directories of the same weights have 0.
        config=lambda shapes: _blip(shapes, "BlipForConditionalGeneration", "text_decoder.bert.", label_smoothing=0.1),
    ),
    "blip_vqa": Kind(
        has=("text_encoder.**", "text_decoder.**"),
        lacks=("itm_head.*",),
        rows=(*BLIP_VIT, TEXT_ENCODER, TEXT_DECODER),
        ignore=TRAINING,
        config=lambda shapes: _blip(shapes, "BlipForQuestionAnswering", "text_encoder."),
    ),
}
