"""The authors' own files as directories that weights.load reads, for checkpoints that Hugging Face does not have as such:

    python -m referee_jax.weights.lavis IN.pth [VISION.pth] OUT_DIR [--kind=KIND] [--tokenizer=DIR_OR_HUB_ID]

    blip2         LAVIS' stage 1: blip2_pretrained.pth with eva_vit_g.pth, or blip2_pretrained_vitL.pth with clip_vit_L.pth;
                  fine-tuned files that hold their vision transformer need no second one
    blip_itm      BLIP: model_base_retrieval_coco.pth and the like
    blip_caption  BLIP: model_base_caption_capfilt_large.pth and the like
    blip_vqa      BLIP: model_base_vqa_capfilt_large.pth and the like, at 480 pixels
    image_reward  ImageReward.pt
    clip          HPS_v2_compressed.pt, HPS_v2.1_compressed.pt: CLIP H/14 by the names of open_clip

The kind is seen in the names of the tensors. A pickled file can run code: torch (the extra `train`) reads tensors and plain
values only, and refuses the rest. Every tensor is moved by a row of `KINDS`, or ignored by name; one that is unknown, missing
or of another shape than the network's is an error that names it. Sizes are read from the shapes; what shapes do not say
(the width of a head, epsilons, activations) is the authors' code's. The files hold no tokenizer: it is taken from `--tokenizer`.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from referee_jax.weights import convert, load
from referee_jax.weights.convert import WeightsError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BERT, CLIP_H = "google-bert/bert-base-uncased", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
DEC, ENC = {"bos_token": "[DEC]"}, {"additional_special_tokens": ["[ENC]"]}

Row = tuple[str, str] | tuple[str, str, Callable[..., Iterable[np.ndarray]]]
Shapes = Mapping[str, tuple[int, ...]]


# --- what a row may do to its tensors ---------------------------------------------------------------------------------


def with_leading_axes(x: np.ndarray) -> list[np.ndarray]:
    """A class token `[D]` or a table `[T, D]` to `[1, T, D]`."""
    return [x.reshape(1, -1, x.shape[-1])]


def without_key_bias(query: np.ndarray, value: np.ndarray) -> list[np.ndarray]:
    """Biases of queries and values to those of queries, keys and values: EVA's keys have none."""
    return [np.concatenate([query, np.zeros_like(value), value])]


def thirds(x: np.ndarray) -> list[np.ndarray]:
    """What torch's MultiheadAttention keeps as one, to queries, keys and values."""
    return np.split(x, 3)


def transposed(x: np.ndarray) -> list[np.ndarray]:
    """A matrix that is multiplied from the right, to torch's Linear."""
    return [x.T]


# --- tables: the authors' names, ours, and how; `*` is a part between two dots, `**` any number of them -----------------


def _moved(rows: Iterable[Row], old: str, new: str) -> tuple[Row, ...]:
    """The rows with `old` before each of their sources and `new` before each of their targets."""
    before = lambda prefix, names: " ".join(prefix + name for name in names.split())  # noqa: E731
    return tuple((before(old, row[0]), before(new, row[1]), *row[2:]) for row in rows)


# timm's vision transformer: BLIP's and, with a bias of its own kind, EVA's.
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
# A block of OpenAI's CLIP, but for its attention.
BLOCK = (
    ("resblocks.*.ln_1.*", "layers.*.layer_norm1.*"),
    ("resblocks.*.ln_2.*", "layers.*.layer_norm2.*"),
    ("resblocks.*.mlp.c_fc.*", "layers.*.mlp.fc1.*"),
    ("resblocks.*.mlp.c_proj.*", "layers.*.mlp.fc2.*"),
)
# The attention in BLIP-2's vision transformer, and in transformers' CLIP.
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

# What only training needs: buffers, momentum encoders, queues, the temperature of the contrastive loss.
TRAINING = ("**.position_ids", "visual_encoder_m.**", "text_encoder_m.**", "vision_proj_m.*", "text_proj_m.*")
TRAINING += ("image_queue", "text_queue", "idx_queue", "ptr_queue", "queue_ptr", "temp")
# What LAVIS leaves of its vision transformers: neither the last block of EVA's 40 and CLIP's 24, nor what follows.
VISION_ENDS = ("blocks.39.**", "norm.*", "fc_norm.*", "head.*", "mask_token")
VISION_ENDS += ("transformer.resblocks.23.**", "ln_post.*", "proj")
# The bias from before LAVIS made room for [DEC]; that of the decoder is added.
BLIP2_IGNORED = (*TRAINING, *(f"visual_encoder.{name}" for name in VISION_ENDS), "Qformer.cls.predictions.bias")


# --- configs, from the shapes of the tensors by our names -------------------------------------------------------------


class _Shapes(dict):
    """Shapes by name; a WeightsError for a tensor that there is not."""

    def __missing__(self, name: str):
        raise WeightsError(f"there is no {name}, which says how large the network is")


def _count(shapes: Shapes, prefix: str) -> int:
    """Layers that are numbered behind `prefix`."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})


def _sizes(shapes: Shapes, layers: str, wide: str, width: int, head_width: int) -> dict:
    """What the configs of all transformers have; `layers` is before the number, `wide` a layer's wider matrix."""
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{layers}0.{wide}.weight"][0],
        "num_hidden_layers": _count(shapes, layers),
        "num_attention_heads": width // head_width,
    }


def _vision(shapes: Shapes, positions: str, head_width: int, **own) -> dict:
    """`vision_config`; `positions` is the name of their table."""
    *_, tokens, width = shapes[f"vision_model.embeddings.{positions}"]
    patch, side = shapes["vision_model.embeddings.patch_embedding.weight"][-1], math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise WeightsError(f"{tokens} positions are not those of a class token and a square of patches")
    sizes = _sizes(shapes, "vision_model.encoder.layers.", "mlp.fc1", width, head_width)
    return sizes | {"image_size": side * patch, "patch_size": patch} | own


def _bert(shapes: Shapes, embeddings: str, layers: str, **own) -> dict:
    """`text_config` or `qformer_config`; the prefixes are those of the tables and of the layers."""
    words, width = shapes[f"{embeddings}word_embeddings.weight"]
    positions = shapes[f"{embeddings}position_embeddings.weight"][0]
    sizes = _sizes(shapes, layers, "intermediate.dense", width, 64) | {"vocab_size": words}
    return sizes | {"max_position_embeddings": positions, "hidden_act": "gelu", "layer_norm_eps": 1e-12} | own


def _blip2(shapes: Shapes) -> dict:
    position, layers = "position_embedding", "qformer.encoder.layer."
    if "vision_model.pre_layernorm.weight" in shapes:
        own = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "pre_layernorm": True, "patch_bias": False}
        vision = _vision(shapes, position, 64, **own)
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


def _blip_parts(shapes: Shapes, text: str, **own) -> dict:
    """`text_config` and `vision_config`; `text` is before the names of the BERT."""
    return {
        "vision_config": _vision(shapes, "position_embedding", 64, hidden_act="gelu", layer_norm_eps=1e-6),
        "text_config": _bert(shapes, f"{text}embeddings.", f"{text}encoder.layer.", **own),
    }


def _blip(shapes: Shapes, architecture: str, text: str, **own) -> dict:
    common = shapes.get("vision_proj.weight", (256,))[0]
    names = {"model_type": "blip", "architectures": [architecture], "image_text_hidden_size": common}
    config = _blip_parts(shapes, text, **own)
    config["text_config"]["encoder_hidden_size"] = config["vision_config"]["hidden_size"]
    return names | config


def _image_reward(shapes: Shapes) -> dict:
    sizes = [shapes[f"mlp.layers.{n}.weight"][0] for n in range(_count(shapes, "mlp.layers."))]
    # No model_type: transformers, which reads the tokenizer beside it, would warn of one that it does not know.
    return {"mlp_sizes": sizes} | _blip_parts(shapes, "text_encoder.")


def _clip(shapes: Shapes) -> dict:
    words, width = shapes["text_model.embeddings.token_embedding.weight"]
    sizes = _sizes(shapes, "text_model.encoder.layers.", "mlp.fc1", width, 64)
    common = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": shapes["text_projection.weight"][0]}
    positions = shapes["text_model.embeddings.position_embedding.weight"][0]
    ids = {"bos_token_id": words - 2, "eos_token_id": words - 1}  # as in all of CLIP's vocabularies
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": common["projection_dim"],
        "text_config": sizes | common | ids | {"vocab_size": words, "max_position_embeddings": positions},
        "vision_config": _vision(shapes, "position_embedding.weight", 80, **common),
    }


# --- kinds ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of file, by the name of its network in `load.KINDS`.

    Attributes:
        has, lacks: names by which a file is known to be of this kind: some tensor of each of the first, none of the second.
        rows: what becomes of its tensors; the first row that fits counts.
        ignore: tensors that are left out.
        config: shapes by our names -> config.json.
        tokenizer: where it is taken from unless said otherwise, and `special`, what the authors add to it.
        crop: whether images are cropped to a square, not pressed into one.
    """

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
            # The numbers between are dropout's.
            *((f"mlp.layers.{old}.*", f"mlp.layers.{new}.*") for new, old in enumerate((0, 2, 4, 6, 7))),
        ),
        # BLIP's heads are there, but not asked.
        ignore=tuple(f"blip.{name}" for name in (*TRAINING, *(name for name, _ in HEADS))),
        config=_image_reward,
        crop=True,
    ),
    "clip": Kind(
        has=("visual.transformer.**",),
        rows=OPEN_CLIP,
        ignore=("attn_mask",),
        config=_clip,
        tokenizer=CLIP_H,
        special=(),
        crop=True,
    ),
    # Files of pre-training hold all of BLIP's tasks: there the kind must be said, and the other tasks' parts are left out.
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
        # The authors train captions so; transformers' directories of the same weights say 0.
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


# --- names ------------------------------------------------------------------------------------------------------------


def _bind(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the stars of a pattern stand for in a name, or None."""
    parts = re.split(r"(\*\*|\*)", pattern)
    regex = "".join({"*": r"([^.]+)", "**": "(.+)"}.get(part, re.escape(part)) for part in parts)
    found = re.fullmatch(regex, name)
    return found and found.groups()


def _fill(patterns: str, stars: Iterable[str]) -> list[str]:
    """Names of patterns, the stars of each replaced by the same values."""
    names = []
    for pattern in patterns.split():
        values = iter(stars)
        names.append(re.sub(r"\*\*|\*", lambda _, values=values: next(values), pattern))
    return names


def _fits(patterns: Iterable[str], name: str) -> bool:
    return any(_bind(pattern, name) is not None for pattern in patterns)


def _kind(names: Iterable[str]) -> str:
    """The first kind that a file of these tensors may be."""
    some = lambda pattern: any(_bind(pattern, name) is not None for name in names)  # noqa: E731
    for kind, row in KINDS.items():
        if all(map(some, row.has)) and not any(map(some, row.lacks)):
            return kind
    raise WeightsError(f"the names of the tensors do not say which kind this is; say --kind={'|'.join(KINDS)}")


# --- the conversion ---------------------------------------------------------------------------------------------------


def read(file: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file that torch.save wrote, without running any of it; they stay on the disk until they are used.

    Prints the file's SHA-256.
    Raises WeightsError for a file that is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        import torch  # only here: of the whole program, only this conversion and training know it
    except ImportError as error:
        raise WeightsError("torch is needed to read the authors' files: pip install 'referee_jax[train]'") from error

    if not Path(file).is_file():
        raise WeightsError(f"{file} is missing")
    with open(file, "rb") as opened:
        print(f"SHA-256 {hashlib.file_digest(opened, 'sha256').hexdigest()}  {file}")
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except Exception as error:  # torch and pickle raise whatever the damage leads to
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise WeightsError(
            f"{file} is damaged, or holds more than tensors; nothing in it was run ({reason})"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(values, Mapping) and isinstance(values.get(key), Mapping):
            values = values[key]
            break
    if not isinstance(values, Mapping) or not values:
        raise WeightsError(f"{file} does not hold tensors by their names")
    if strange := [str(name) for name, x in values.items() if not isinstance(x, torch.Tensor)]:
        raise WeightsError(f"{file} should hold tensors by their names, but these are none: {_listed(strange)}")
    exact = {torch.bfloat16: torch.float32}  # which numpy does not have
    return {name: x.detach().to(exact.get(x.dtype, x.dtype)).contiguous().numpy() for name, x in values.items()}


def rename(kind: str, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file of `KINDS[kind]` by our names, and our names to the authors'.

    Raises WeightsError naming tensors that no row knows, and those without the others that a row puts them together with.
    """
    made: dict[str, np.ndarray] = {}
    origins: dict[str, str] = {}
    used, unknown = set(), []
    for name in tensors:
        if name in used or _fits(KINDS[kind].ignore, name):
            continue
        found = next(_matches(kind, name, 0), None)
        if found is None:
            unknown.append(name)
            continue
        (sources, targets, *transform), stars = found
        together, new = _fill(sources, stars), _fill(targets, stars)
        used |= set(together)
        if missing := [source for source in together if source not in tensors]:
            raise WeightsError(f"{name} is there, but {', '.join(missing)} is missing")
        if twice := [target for target in new if target in made]:
            raise WeightsError(f"{origins[twice[0]]} and {name} are the same part of the network")
        parts, names = [tensors[source] for source in together], " and ".join(together)
        try:
            made |= zip(new, transform[0](*parts) if transform else parts, strict=True)
        except ValueError as error:
            raise WeightsError(f"{names}: unexpected shape {' and '.join(str(x.shape) for x in parts)}") from error
        origins |= dict.fromkeys(new, names)
    if unknown:
        raise WeightsError(f"tensors that a {kind} does not have: {_listed(unknown)}")
    return made, origins


def _matches(kind: str, name: str, side: int) -> Iterator[tuple[Row, tuple[str, ...]]]:
    """Rows that have `name` among their sources (`side` 0) or targets (1), and what their stars stand for."""
    for row in KINDS[kind].rows:
        for pattern in row[side].split():
            if (stars := _bind(pattern, name)) is not None:
                yield row, stars


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check(kind: str, tensors: Mapping[str, np.ndarray], origins: Mapping[str, str], config: Mapping) -> None:
    """Raises WeightsError, with the authors' names, if these are not exactly the tensors of the network of `config`."""
    could_be = lambda name: " or ".join(" and ".join(_fill(row[0], stars)) for row, stars in _matches(kind, name, 1))  # noqa: E731
    row = load.KINDS[kind]
    parsed = row.config(config, where="config.json")
    parsed = dataclasses.replace(parsed, **load.optional_parts(row, tensors))
    module = nnx.eval_shape(lambda: row.network(parsed, rngs=nnx.Rngs(0)))
    wanted = {name: target.source_shape for target in convert.targets(module) for name in target.names}
    found = {}
    for name, x in tensors.items():
        final = name
        for old, new in row.renames:
            final = re.sub(old, new, final)
        if name not in row.ties:
            found[final] = name, x.shape
    problems = []
    if missing := [could_be(name) for name in wanted if name not in found]:
        problems.append(f"missing: {_listed(missing)}")
    if unknown := [origins[found[name][0]] for name in found if name not in wanted]:
        problems.append(f"no part of the network: {_listed(unknown)}")
    shapes = [
        f"{origins[name]}, as {name} {shape} instead of {wanted[final]}"
        for final, (name, shape) in found.items()
        if shape != wanted.get(final, shape)
    ]
    if shapes:
        problems.append(f"of another shape: {_listed(shapes)}")
    if problems:
        raise WeightsError(f"the tensors are not those of a {kind}: {'; '.join(problems)}")
    load.check_ties(row, tensors)


def _tokenizer(kind: str, path_or_id: str):
    """The tokenizer with the words that the authors add."""
    try:
        tokenizer = load.load_tokenizer(path_or_id)
    except WeightsError as error:
        raise WeightsError(
            f"the authors' files hold no tokenizer, and that of {path_or_id} cannot be had ({error}). Copy the files of "
            f"{KINDS[kind].tokenizer} (tokenizer.json, or vocab.txt; tokenizer_config.json) into a directory, and say "
            "--tokenizer=DIRECTORY"
        ) from error
    for words in KINDS[kind].special:
        tokenizer.add_special_tokens(dict(words))
    return tokenizer


def _preprocessing(kind: str, size: int) -> dict:
    """preprocessor_config.json."""
    square = {"height": size, "width": size}
    if KINDS[kind].crop:
        own = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}, "crop_size": square}
    else:
        own = {"image_processor_type": "BlipImageProcessor", "size": square}
    return own | {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3, "do_convert_rgb": True}


def main(files: list[str], out: str | Path, *, kind: str | None = None, tokenizer: str | None = None) -> str:
    """Writes the directory `out` from the authors' one or two files (see the module's docstring), returns the kind.

    Raises WeightsError before anything is written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out} is there already")
    tensors: dict[str, np.ndarray] = {}
    for file, prefix in zip(files, ("", "visual_encoder."), strict=False):
        new = {prefix + name: x for name, x in read(file).items()}
        if twice := sorted(new.keys() & tensors.keys()):
            raise WeightsError(
                f"{files[0]} holds its vision transformer already: {_listed(twice, 3)}; leave out {file}"
            )
        tensors |= new
    try:
        kind = kind or _kind(tensors)
        if kind == "blip2" and not any(name.startswith("visual_encoder.") for name in tensors):
            raise WeightsError(
                "its vision transformer is another file: eva_vit_g.pth, or clip_vit_L.pth of a ..._vitL.pth"
            )
        made, origins = rename(kind, tensors)
        values = KINDS[kind].config(_Shapes({name: x.shape for name, x in made.items()}))
        check(kind, made, origins, values)
    except WeightsError as error:
        raise WeightsError(f"{' and '.join(files)}: {error}") from error
    made = {name: x for name, x in made.items() if name not in load.KINDS[kind].ties}
    source = tokenizer or KINDS[kind].tokenizer
    words, vocabulary = _tokenizer(kind, source), values.get("text_config", values.get("qformer_config"))
    if len(words) != vocabulary["vocab_size"]:
        raise WeightsError(
            f"the tokenizer of {source} has {len(words)} words, the network {vocabulary['vocab_size']}: it is another one"
        )
    if kind.startswith("blip_") or kind == "image_reward":
        vocabulary["bos_token_id"] = words.bos_token_id
    # asarray, as ascontiguousarray would make a vector of a scalar.
    load.save_directory(out, {name: np.asarray(x, order="C") for name, x in made.items()}, values)
    preprocessing = json.dumps(_preprocessing(kind, values["vision_config"]["image_size"]), indent=2)
    (out / "preprocessor_config.json").write_text(preprocessing + "\n", encoding="utf-8")
    words.save_pretrained(out)
    print(f"{out}: a {kind} of {len(made)} tensors")
    return kind


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m referee_jax.weights.lavis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="IN.pth", help="the authors' file")
    parser.add_argument("vision", metavar="VISION.pth", nargs="?", help="the file of BLIP-2's vision transformer")
    parser.add_argument("out", metavar="OUT_DIR", help="the directory to write; it must be new, or empty")
    parser.add_argument("--kind", choices=KINDS, help="what the file is; by default, what its names say")
    parser.add_argument("--tokenizer", help=f"directory or hub id; by default {BERT}, {CLIP_H} for clip")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    inputs = [file for file in (given.input, given.vision) if file]
    try:
        main(inputs, given.out, kind=given.kind, tokenizer=given.tokenizer)
    except WeightsError as problem:
        sys.exit(f"error: {problem}")
