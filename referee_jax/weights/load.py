"""Loads networks from Hugging Face directories, local or on the hub.

Reads config.json and safetensors, no pickles. `KINDS` has the config, module and files of each kind
of network. Tensors are read one at a time and cast at once, so that loading needs about the memory
of the loaded network.
"""

import dataclasses
import fnmatch
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from referee_jax.hardware import kept
from referee_jax.models import align, blip, blip2, clip, image_reward, qwen3_vl, siglip
from referee_jax.models.diffusion import flux, sd3, tiny_vae, unet, vae
from referee_jax.models.flan_t5 import clip_t5, t5
from referee_jax.weights import config_json, convert, hub, tensors, tokenizers
from referee_jax.weights.convert import WeightsError
from referee_jax.weights.tensors import Tensors

TRANSFORMERS, DIFFUSERS = "model", "diffusion_pytorch_model"  # files of weights
# As transformers writes it before and from 5.0; the second file has other parts, too.
_IMAGE_PROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How one kind of network is read.

    Attributes:
        config: `(dictionary of config.json, where=...) -> config`.
        network: `(config, rngs=...) -> module`.
        architecture: its name in config.json, if that distinguishes it from other kinds.
        stem: name of its files of weights, without ending.
        renames, ignore, float32: of `convert.fill`.
        ties: name of a tensor that is not read -> name of the tensor that it repeats; without effect
            where the config gives the network a parameter of its own for it.
        optional: parts of some checkpoints: the config's field that has them -> a glob pattern of
            their tensors.
        unread: a config to glob patterns of tensors that the network does not read.
    """

    config: Callable
    network: Callable[..., nnx.Module]
    architecture: str = ""
    stem: str = TRANSFORMERS
    renames: Sequence[tuple[str, str]] = ()
    ignore: Sequence[str] = ()
    float32: Sequence[str] = ()
    ties: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unread: Callable[[Any], Sequence[str]] = lambda config: ()


def _blip(network: Callable[..., nnx.Module], architecture: str) -> Kind:
    predictions, words = "text_decoder.cls.predictions", "text_decoder.bert.embeddings.word_embeddings.weight"
    return Kind(
        config=config_json.blip_config,
        network=network,
        architecture=architecture,
        ignore=("*.position_ids",),
        ties={f"{predictions}.decoder.weight": words, f"{predictions}.decoder.bias": f"{predictions}.bias"},
    )


# transformers names the table of words by each of its readers, too, and keeps that of distances in
# the first block.
_T5_RENAMES = ((r"\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".relative_attention_bias."),)
_T5_TIES = {f"{part}embed_tokens.weight": "shared.weight" for part in ("", "encoder.", "decoder.")}


KINDS: dict[str, Kind] = {
    # transformers before 4.31 wrote buffers (position_ids).
    "clip": Kind(
        config=config_json.clip_config,
        network=clip.CLIP,
        architecture="CLIPModel",
        ignore=("*.position_ids",),
    ),
    # transformers 5 writes this class without the prefix that all published files have.
    "clip_text": Kind(
        config=config_json.reader(clip.TextConfig),
        network=clip.TextModel,
        architecture="CLIPTextModel",
        renames=((r"^(?!text_model\.)", "text_model."),),
        ignore=("*.position_ids",),
    ),
    "clip_text_projected": Kind(
        config=config_json.reader(clip.TextConfig),
        network=clip.TextModelWithProjection,
        architecture="CLIPTextModelWithProjection",
        ignore=("*.position_ids",),
    ),
    "siglip": Kind(
        config=config_json.reader(siglip.Config),
        network=siglip.SigLIP,
        architecture="SiglipModel",
        ignore=("*.position_ids",),
        float32=("logit_scale", "logit_bias"),
    ),
    "blip_itm": _blip(blip.ImageTextRetrieval, "BlipForImageTextRetrieval"),
    "blip_caption": _blip(blip.ConditionalGeneration, "BlipForConditionalGeneration"),
    "blip_vqa": _blip(blip.QuestionAnswering, "BlipForQuestionAnswering"),
    "blip2": Kind(
        config=config_json.reader(blip2.Config),
        network=blip2.BLIP2,
        architecture="Blip2ForImageTextRetrieval",
        # The second is unused, of a vocabulary without [DEC]; the decoder's bias gets its name.
        ignore=("*.position_ids", "cls.predictions.bias"),
        renames=((r"^cls\.predictions\.decoder\.bias$", "cls.predictions.bias"),),
        ties={"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight"},
        optional={"lm_head": "cls.predictions.*"},
        # All but the vision transformer, as in transformers and LAVIS.
        float32=("query_tokens", "embeddings.*", "qformer.*", "*_projection.*", "itm_head.*", "cls.*"),
    ),
    # Written by weights.lavis: the authors' file is a pickle, and transformers has no class for it.
    "image_reward": Kind(
        config=config_json.reader(image_reward.Config),
        network=image_reward.ImageReward,
        architecture="ImageReward",
        float32=("mlp.*",),
    ),
    "align": Kind(
        config=config_json.reader(align.Config),
        network=align.ALIGN,
        architecture="AlignModel",
        # Buffers that transformers wrote before 4.31, and counters of training steps.
        ignore=("*.position_ids", "*.token_type_ids", "*.num_batches_tracked"),
        float32=("*.batchnorm.*", "*_bn.*", "*.depthwise_norm.*"),
    ),
    "qwen3_vl": Kind(
        config=config_json.qwen3_vl_config,
        network=qwen3_vl.Qwen3VL,
        architecture="Qwen3VLForConditionalGeneration",
        ties={"lm_head.weight": "model.language_model.embed_tokens.weight"},
    ),
    "t5": Kind(
        config=config_json.t5_config,
        network=t5.T5,
        architecture="T5ForConditionalGeneration",
        renames=_T5_RENAMES,
        ties=_T5_TIES,
        optional={"lm_head": "lm_head.*"},
    ),
    "t5_encoder": Kind(
        config=config_json.t5_config,
        network=t5.T5Encoder,
        architecture="T5EncoderModel",
        renames=_T5_RENAMES,
        ties=_T5_TIES,
    ),
    "clip_t5": Kind(
        config=config_json.clip_t5_config,
        network=clip_t5.CLIPT5,
        architecture="CLIPT5ForConditionalGeneration",
        # The authors wrap transformers' class, which version 5 writes without the second prefix.
        renames=(
            *_T5_RENAMES,
            (r"^vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower."),
            (r"^mm_projector\.2\.", "mm_projector.1."),  # 1 is the activation
        ),
        ignore=("*.position_ids",),
        ties=_T5_TIES,
        optional={"lm_head": "lm_head.*"},
        unread=lambda config: (
            "vision_tower.*post_layernorm.*",
            *(
                f"vision_tower.*encoder.layers.{n}.*"
                for n in range(config.tower.num_hidden_layers, config.vision_config.num_hidden_layers)
            ),
        ),
    ),
    "unet": Kind(config=config_json.reader(unet.Config), network=unet.UNet, stem=DIFFUSERS),
    "sd3": Kind(
        config=config_json.reader(sd3.Config),
        network=sd3.SD3,
        stem=DIFFUSERS,
        float32=("pos_embed.pos_embed",),
    ),
    "flux": Kind(config=config_json.reader(flux.Config), network=flux.Flux, stem=DIFFUSERS),
    "vae_decoder": Kind(
        config=config_json.reader(vae.Config),
        network=vae.AutoencoderKL,
        stem=DIFFUSERS,
        renames=vae.RENAMES,
        ignore=("encoder.*", "quant_conv.*"),
    ),
    "tiny_vae": Kind(
        config=config_json.reader(tiny_vae.Config),
        network=tiny_vae.AutoencoderTiny,
        stem=DIFFUSERS,
        ignore=("encoder.*",),
    ),
}
# diffusers' class, in a config.json -> the kind.
_OF_DIFFUSERS = {
    "UNet2DConditionModel": "unet",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "AutoencoderKL": "vae_decoder",
    "AutoencoderTiny": "tiny_vae",
}


def load(
    kind: str,
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    dtype: jax.typing.DTypeLike = jnp.float32,
    put: Callable[[np.ndarray], Any] = jax.device_put,
) -> nnx.Module:
    """Returns a network with the weights of a local directory or a hub id.

    Raises WeightsError naming the file, tensors or key that is wrong.

    Args:
        kind: of `KINDS`.
        path_or_id: the directory or hub id.
        revision: for hub ids; a commit hash is best.
        subfolder: of the directory or repository, where the files are.
        dtype: of the weights; see `convert.fill` for the exceptions.
        put: see `convert.fill`.
    """
    stem = KINDS[kind].stem
    directory = fetch(path_or_id, revision, {subfolder: stem}) / subfolder
    return build(kind, read_config(kind, directory), Tensors(directory, stem), dtype=dtype, put=put)


def build(
    kind: str,
    config: Any,
    weights: Mapping[str, np.ndarray],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    put: Callable[[np.ndarray], Any] = jax.device_put,
) -> nnx.Module:
    """Returns a network of `KINDS` with its config, and weights by the names of its files; see `load`."""
    row = KINDS[kind]
    config = dataclasses.replace(config, **optional_parts(row, weights))
    module = unfilled(row, config)
    own = {name for target in convert.targets(module) for name in target.names}
    row = dataclasses.replace(row, ties={copy: name for copy, name in row.ties.items() if copy not in own})
    try:
        check_ties(row, weights)
        ignore = (*row.ignore, *row.ties, *row.unread(config))
        how = {"renames": row.renames, "ignore": ignore, "float32": row.float32}
        return convert.fill(module, weights, dtype=dtype, **how, put=put)
    except WeightsError as error:
        source = getattr(weights, "source", "")
        raise WeightsError(f"{source}: {error}" if source else str(error)) from error


class Renamed(Mapping):
    """Weights by the names of the network's parameters, each read when it is asked for.

    Raises WeightsError as `load` does for names that do not fit.
    """

    def __init__(self, kind: str, config: Any, weights: Tensors):
        row = KINDS[kind]
        self.source, self._weights = weights.source, weights
        parameters = {name for target in convert.targets(unfilled(row, config)) for name in target.names}
        self._names = convert.matched(weights, parameters, row.renames, (*row.ignore, *row.ties))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_config(kind: str, directory: Path) -> Any:
    """Returns the config of a network of `KINDS` in a local directory.

    Raises WeightsError for a config.json that is missing, damaged or of another kind of network.
    """
    file = directory / "config.json"
    if (
        not file.exists()
        and tensors.source(directory, KINDS[kind].stem) is None
        and any(directory.glob("*.safetensors"))
    ):
        raise WeightsError(tensors.missing(directory, KINDS[kind].stem))  # another layout, or a LoRA
    values = config_json.read_json(file)
    _check_kind(kind, values, file)
    return KINDS[kind].config(values, where=str(file))


def kind_of(directory: Path) -> str:
    """The kind of a network that diffusers wrote into a local directory, by its config.json.

    Raises WeightsError for one that is not implemented.
    """
    file = directory / "config.json"
    name = config_json.read_json(file).get("_class_name")
    if name not in _OF_DIFFUSERS:
        raise WeightsError(f"{file}: _class_name={name!r} is not implemented; supported: {', '.join(_OF_DIFFUSERS)}")
    return _OF_DIFFUSERS[name]


def check_names(kind: str, directory: Path) -> None:
    """Raises WeightsError unless a local directory has all tensors of its network, by name, and no others."""
    row, config = KINDS[kind], read_config(kind, directory)
    names = Tensors(directory, row.stem)
    module = unfilled(row, dataclasses.replace(config, **optional_parts(row, names)))
    parameters = {name for target in convert.targets(module) for name in target.names}
    convert.matched(names, parameters, row.renames, (*row.ignore, *row.ties, *row.unread(config)))


def text_config(config: Any) -> Any:
    """The part of a network's config that has `vocab_size` and `max_position_embeddings`."""
    return getattr(config, "text_config", None) or getattr(config, "qformer_config", None) or config


def _check_kind(kind: str, values: Mapping, file: Path) -> None:
    """Raises WeightsError if config.json names another of `KINDS`.

    An unknown name may still fit.
    """
    for other, row in KINDS.items():
        if other != kind and row.architecture and values.get("architectures") == [row.architecture]:
            raise WeightsError(f"{file} is of another kind of network: {other} ({row.architecture}), not {kind}")


def abstract(kind: str, config: object, *, dtype: jax.typing.DTypeLike = jnp.float32) -> nnx.Module:
    """Returns the network of `KINDS[kind]` with a config; each leaf is a jax.ShapeDtypeStruct."""
    row = KINDS[kind]
    return convert.cast(unfilled(row, config), dtype=dtype, float32=row.float32)


class _OneKey:
    """In nnx.Rngs' place where nothing is drawn: counting keys takes most of the time of a U-Net's eval_shape."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def unfilled(row: Kind, config: object) -> nnx.Module:
    """The network of a row of KINDS with a config, without weights: each leaf is a jax.ShapeDtypeStruct, float32."""
    return jax.tree.map(lambda x: x, _unfilled(row.network, config))  # a copy: its fields may be set


@functools.lru_cache(maxsize=16)
def _unfilled(network: type[nnx.Module], config: object) -> nnx.Module:
    build = lambda: nnx.eval_shape(lambda: network(config, rngs=_OneKey()))  # seconds for a large one
    try:
        return kept.once(kept.text((network, config)), build)
    except kept.Unknown:
        return build()


def optional_parts(row: Kind, names: Iterable[str]) -> dict[str, bool]:
    """The fields of `row.optional` whose tensors are among `names`."""
    names = list(names)
    return {field: True for field, pattern in row.optional.items() if fnmatch.filter(names, pattern)}


def check_ties(row: Kind, weights: Mapping[str, np.ndarray]) -> None:
    """Raises WeightsError if a tensor of `row.ties` differs from its original."""
    for copy, original in row.ties.items():
        if copy in weights and original in weights and not np.array_equal(weights[copy], weights[original]):
            raise WeightsError(f"{copy} differs from {original}, which it should repeat")


def fetch_referee(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """Returns a directory with a referee's weights, tokenizer and image processor.

    Raises WeightsError if it cannot be downloaded, with one command for all files.
    """
    return fetch(path_or_id, revision, {"": TRANSFORMERS}, [*tokenizers.PATTERNS, _IMAGE_PROCESSOR, _PROCESSOR])


def read_preprocessing(directory: Path) -> dict:
    """The settings of the image processor in a checkpoint's directory.

    Raises WeightsError if there are none. As in transformers, processor_config.json takes
    precedence over preprocessor_config.json.
    """
    file = directory / _PROCESSOR
    settings = config_json.read_json(file).get("image_processor") if file.exists() else None
    if settings is not None:
        if not isinstance(settings, dict):
            raise WeightsError(f"{file}: image_processor does not hold a JSON object")
        return settings
    file = directory / _IMAGE_PROCESSOR
    if not file.exists():
        raise WeightsError(f"{file} is missing, and there is no {_PROCESSOR} that says how an image is prepared")
    return config_json.read_json(file)


def load_tokenizer(path_or_id: str | Path, *, revision: str | None = None, kind: str = "") -> Any:
    """Returns the tokenizer of a directory or hub id, as `tokenizers.read` does.

    It is compared with the network of this `kind`, of `KINDS`, by the config.json beside it.
    """
    directory = hub.resolve(path_or_id, revision, ["config.json", *tokenizers.PATTERNS])
    return tokenizers.read(directory, text_config(read_config(kind, directory)) if kind else None)


def check(directory: Path, kind: str) -> None:
    """Raises WeightsError for a part of a network's directory that is missing or damaged; reads no weights.

    Args:
        directory: a local one.
        kind: of `KINDS`: a referee's, which has a tokenizer and an image processor, or one of diffusers'.
    """
    read_config(kind, directory)
    Tensors(directory, KINDS[kind].stem)
    if KINDS[kind].stem != DIFFUSERS:
        load_tokenizer(directory, kind=kind)
        read_preprocessing(directory)


def fetch(
    path_or_id: str | Path,
    revision: str | None,
    parts: Mapping[str, str],
    others: Sequence[str] = (),
) -> Path:
    """The directory of a checkpoint with the files of these networks, and others.

    Variants are downloaded where the hub has no other weights. Raises WeightsError, which says what
    the hub has instead, where it has neither.

    Args:
        path_or_id: the directory or hub id.
        revision: for hub ids.
        parts: subfolder of each network -> name of its files of weights, without ending.
        others: patterns of further files.
    """

    def lacking() -> list[tuple[str, str]]:
        return [(folder, stem) for folder, stem in parts.items() if tensors.source(directory / folder, stem) is None]

    directory = hub.resolve(path_or_id, revision, [*patterns(parts), *others])
    if not lacking() or (files := hub.listing(directory)) is None:
        return directory
    directory = hub.resolve(path_or_id, revision, [*patterns(parts, tensors.VARIANTS), *others])
    for folder, stem in lacking():
        names = [Path(file).name for file in files if Path(file).parent in (Path(), Path(folder))]
        reason = tensors.instead(directory / folder, names, stem)
        raise WeightsError(f"{path_or_id}: {Path(folder, stem)}.safetensors is missing{reason}")
    return directory


def patterns(parts: Mapping[str, str], variants: Sequence[str] = ()) -> list[str]:
    """Of the files of networks, subfolder -> name of its files of weights, and of these variants."""
    names = lambda stem: ["config.json", *(x for variant in ("", *variants) for x in tensors.patterns(stem, variant))]
    return [str(Path(folder, name)) for folder, stem in parts.items() for name in names(stem)]


def save_directory(
    path: str | Path,
    weights: nnx.Module | Mapping[str, np.ndarray],
    config: Mapping,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Writes a network as Hugging Face lays it out: config.json and a file of safetensors.

    Args:
        path: the directory.
        weights: a network, or its tensors by their names.
        config: written unchanged; has the keys that name the class: `_class_name` (diffusers), or
            `model_type` and `architectures` (transformers).
        dtype: of floating-point tensors, if they are to be cast.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    values = convert.export(weights) if isinstance(weights, nnx.Module) else dict(weights)
    if dtype is not None:
        values = {n: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for n, x in values.items()}
    file = path / f"{DIFFUSERS if '_class_name' in config else TRANSFORMERS}.safetensors"
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    safetensors.numpy.save_file(values, temporary, metadata={"format": "pt"})
    temporary.replace(file)
