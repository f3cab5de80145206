"""Networks from Hugging Face directories: config.json and safetensors, local or on the hub. Nothing pickled is opened.

`KINDS` says for each kind of network which config (see configs.py), which module, which files. Tensors are read one at a
time and cast at once, so that loading needs about the memory of the loaded network.
"""

import dataclasses
import fnmatch
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from referee_jax import console
from referee_jax.models import align, blip, blip2, clip, image_reward, siglip, unet, vae
from referee_jax.weights import config_json, convert, hub
from referee_jax.weights.convert import WeightsError

TRANSFORMERS, DIFFUSERS = "model", "diffusion_pytorch_model"  # what the two libraries call a file of weights
_PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".h5")
_TOKENIZER = ("config.json", "*token*.json", "vocab.*", "merges.txt", "spiece.model")
# As transformers has written it before and since 5.0; in the second it is one part among others.
_IMAGE_PROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How one kind of network is read.

    Attributes:
        config: `(dictionary of config.json, where=...) -> config`.
        network: `(config, rngs=...) -> module`.
        architecture: what config.json calls it, where one that it calls otherwise is of another kind.
        stem: what its files of weights are called.
        renames, ignore, float32: of `convert.fill`.
        ties: names of tensors that repeat another one, which is all that is read: copy -> original.
        optional: parts that some checkpoints have: the config's field that says so -> a glob pattern of their tensors.
    """

    config: Callable
    network: Callable[..., nnx.Module]
    stem: str
    architecture: str = ""
    renames: Sequence[tuple[str, str]] = ()
    ignore: Sequence[str] = ()
    float32: Sequence[str] = ()
    ties: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _blip(network: Callable[..., nnx.Module], architecture: str) -> Kind:
    predictions, words = "text_decoder.cls.predictions", "text_decoder.bert.embeddings.word_embeddings.weight"
    return Kind(
        config=config_json.blip_config,
        network=network,
        stem=TRANSFORMERS,
        architecture=architecture,
        ignore=("*.position_ids",),
        ties={f"{predictions}.decoder.weight": words, f"{predictions}.decoder.bias": f"{predictions}.bias"},
    )


KINDS: dict[str, Kind] = {
    # Buffers that transformers wrote before 4.31.
    "clip": Kind(
        config=config_json.clip_config,
        network=clip.CLIP,
        stem=TRANSFORMERS,
        architecture="CLIPModel",
        ignore=("*.position_ids",),
    ),
    # transformers 5 writes this class without the prefix that all published files have.
    "clip_text": Kind(
        config=config_json.reader(clip.TextConfig),
        network=clip.TextModel,
        stem=TRANSFORMERS,
        architecture="CLIPTextModel",
        renames=((r"^(?!text_model\.)", "text_model."),),
        ignore=("*.position_ids",),
    ),
    "siglip": Kind(
        config=config_json.reader(siglip.Config),
        network=siglip.SigLIP,
        stem=TRANSFORMERS,
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
        stem=TRANSFORMERS,
        architecture="Blip2ForImageTextRetrieval",
        # The second is a bias from before LAVIS made room for [DEC]; the one that is added is the decoder's.
        ignore=("*.position_ids", "cls.predictions.bias"),
        renames=((r"^cls\.predictions\.decoder\.bias$", "cls.predictions.bias"),),
        ties={"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight"},
        optional={"lm_head": "cls.predictions.*"},
        # All but the vision transformer, as transformers and LAVIS have it.
        float32=("query_tokens", "embeddings.*", "qformer.*", "*_projection.*", "itm_head.*", "cls.*"),
    ),
    # As weights.lavis writes it: the authors' file is a pickle, and transformers has no class for it.
    "image_reward": Kind(
        config=config_json.reader(image_reward.Config),
        network=image_reward.ImageReward,
        stem=TRANSFORMERS,
        architecture="ImageReward",
        float32=("mlp.*",),
    ),
    "align": Kind(
        config=config_json.reader(align.Config),
        network=align.ALIGN,
        stem=TRANSFORMERS,
        architecture="AlignModel",
        # Buffers that transformers wrote before 4.31, and counters of the training.
        ignore=("*.position_ids", "*.token_type_ids", "*.num_batches_tracked"),
        float32=("*.batchnorm.*", "*_bn.*", "*.depthwise_norm.*"),
    ),
    "unet": Kind(config=config_json.reader(unet.Config), network=unet.UNet, stem=DIFFUSERS),
    "vae_decoder": Kind(
        config=config_json.reader(vae.Config),
        network=vae.AutoencoderKL,
        stem=DIFFUSERS,
        renames=vae.RENAMES,
        ignore=("encoder.*", "quant_conv.*"),
    ),
}


def load(
    kind: str,
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> nnx.Module:
    """Returns the network of `KINDS[kind]` with the weights of a local directory or a hub id, cast to `dtype`.

    `revision` (a commit hash, best) is for hub ids; `subfolder` is where in the repository the files are. Raises
    WeightsError naming the file, tensors or key that is wrong.
    """
    row = KINDS[kind]
    directory = hub.resolve(path_or_id, revision, _patterns(row.stem, subfolder)) / subfolder
    file = directory / "config.json"
    values = config_json.read_json(file)
    _check_kind(kind, values, file)
    config = row.config(values, where=str(file))
    tensors = Tensors(directory, row.stem)
    config = dataclasses.replace(config, **optional_parts(row, tensors))
    module = nnx.eval_shape(lambda: row.network(config, rngs=nnx.Rngs(0)))
    try:
        check_ties(row, tensors)
        return convert.fill(
            module, tensors, dtype=dtype, renames=row.renames, ignore=(*row.ignore, *row.ties), float32=row.float32
        )
    except WeightsError as error:
        raise WeightsError(f"{tensors.source}: {error}") from error


def _check_kind(kind: str, values: Mapping, file: Path) -> None:
    """Raises WeightsError where config.json says that it is of another of `KINDS`; one of no known kind may still fit."""
    for other, row in KINDS.items():
        if other != kind and row.architecture and values.get("architectures") == [row.architecture]:
            raise WeightsError(f"{file} is of another kind of network: {other} ({row.architecture}), not {kind}")


def abstract(kind: str, config: object, *, dtype: jax.typing.DTypeLike = jnp.float32) -> nnx.Module:
    """Returns the network of `KINDS[kind]` and a config, as `load` does, but each leaf is a jax.ShapeDtypeStruct."""
    row = KINDS[kind]
    module = nnx.eval_shape(lambda: row.network(config, rngs=nnx.Rngs(0)))
    return convert.cast(module, dtype=dtype, float32=row.float32)


def optional_parts(row: Kind, names: Iterable[str]) -> dict[str, bool]:
    """The fields of `row.optional` whose tensors are there."""
    names = list(names)
    return {field: True for field, pattern in row.optional.items() if fnmatch.filter(names, pattern)}


def check_ties(row: Kind, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises WeightsError where one of `row.ties` does not repeat its original."""
    for copy, original in row.ties.items():
        if copy in tensors and original in tensors and not np.array_equal(tensors[copy], tensors[original]):
            raise WeightsError(f"{copy} differs from {original}, which it should repeat")


def fetch_referee(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """Returns the local directory of a transformers checkpoint with all that is read of it: weights, tokenizer, image processor.

    Raises WeightsError where it cannot be had, with one command for all of it.
    """
    patterns = [*_patterns(TRANSFORMERS, ""), *_TOKENIZER[1:], _IMAGE_PROCESSOR, _PROCESSOR]
    return hub.resolve(path_or_id, revision, patterns)


def read_preprocessing(directory: Path) -> dict:
    """The settings of the image processor in a checkpoint's directory; where both files have some, those that transformers
    takes: processor_config.json's.

    Raises WeightsError where neither has.
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


def load_tokenizer(path_or_id: str | Path, *, revision: str | None = None, subfolder: str = ""):
    """Returns the transformers tokenizer of a local directory or a hub id; no code of the checkpoint is run."""
    import transformers  # slow to import, and not needed by those who bring their own token ids

    patterns = [str(Path(subfolder, name)) for name in _TOKENIZER]
    directory = hub.resolve(path_or_id, revision, patterns) / subfolder
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise WeightsError(f"{directory}: no tokenizer can be read here ({console.first_line(error)})") from error


def load_image_processor(path_or_id: str | Path, *, revision: str | None = None):
    """Returns the transformers image processor (PIL's resizing) of a local directory or a hub id; runs no code of theirs."""
    import transformers  # as above

    directory = hub.resolve(path_or_id, revision, [_IMAGE_PROCESSOR, _PROCESSOR])
    read_preprocessing(directory)  # for its messages
    options = dict(local_files_only=True, trust_remote_code=False, backend="pil")
    try:
        return transformers.AutoImageProcessor.from_pretrained(directory, **options)
    except Exception as error:  # it raises whatever the configuration makes it
        raise WeightsError(f"{directory}: no image processor can be read here ({console.first_line(error)})") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableDiffusion:
    """The parts of a Stable Diffusion checkpoint.

    Attributes:
        alphas_cumprod: float32[steps], of the noise schedule it was trained with.
        prediction_type: what the U-Net predicts, "epsilon" or "v_prediction".
        tokenizer: transformers', whose `model_max_length` is the number of tokens to pad to.
    """

    text_encoder: clip.TextModel
    unet: unet.UNet
    vae: vae.AutoencoderKL
    alphas_cumprod: jax.Array
    prediction_type: str
    tokenizer: object


def load_stable_diffusion(
    path_or_id: str | Path, *, revision: str | None = None, dtype: jax.typing.DTypeLike = jnp.float32
) -> StableDiffusion:
    """Returns the parts of a checkpoint in diffusers' layout (local directory or hub id), weights cast to `dtype`.

    Raises WeightsError as `load` does, and if the parts do not fit.
    """
    patterns = [
        "scheduler/scheduler_config.json",
        "tokenizer/*",
        *_patterns(TRANSFORMERS, "text_encoder"),
        *_patterns(DIFFUSERS, "unet"),
        *_patterns(DIFFUSERS, "vae"),
    ]
    directory = hub.resolve(path_or_id, revision, patterns)
    file = directory / "scheduler" / "scheduler_config.json"
    schedule = config_json.config_from_json(config_json.Schedule, config_json.read_json(file), where=str(file))
    parts = StableDiffusion(
        tokenizer=load_tokenizer(directory, subfolder="tokenizer"),
        text_encoder=load("clip_text", directory, subfolder="text_encoder", dtype=dtype),
        unet=load("unet", directory, subfolder="unet", dtype=dtype),
        vae=load("vae_decoder", directory, subfolder="vae", dtype=dtype),
        alphas_cumprod=jnp.asarray(schedule.alphas_cumprod()),
        prediction_type=schedule.prediction_type,
    )
    for what, have, want in (
        ("unet: in_channels", parts.unet.config.in_channels, parts.vae.config.latent_channels),
        (
            "unet: cross_attention_dim",
            parts.unet.config.cross_attention_dim,
            parts.text_encoder.text_model.config.hidden_size,
        ),
    ):
        if have != want:
            raise WeightsError(f"{directory}: {what}={have} does not fit the other parts, which have {want}")
    return parts


def _patterns(stem: str, subfolder: str) -> list[str]:
    names = ("config.json", f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*-of-*.safetensors")
    return [str(Path(subfolder, name)) for name in names]


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a directory's safetensors file or shards, each read when asked for.

    A file is opened for each tensor anew: of one that stays open, all pages that were read stay in memory. `source` is the
    file, or the index of the shards.

    Raises WeightsError naming the file that is missing, damaged, or not what the index says.
    """

    def __init__(self, directory: Path, stem: str):
        self._files: dict[str, Path] = {}
        shards = _shards(directory, stem)
        single = directory / f"{stem}.safetensors"
        self.source = single if single in shards else directory / f"{stem}.safetensors.index.json"
        for file, promised in shards.items():
            try:
                with safetensors.safe_open(file, framework="numpy") as opened:
                    names = set(opened.keys())
            except FileNotFoundError as error:
                raise WeightsError(f"{file} is missing") from error
            except (OSError, safetensors.SafetensorError) as error:
                raise WeightsError(f"{file} is damaged or not a safetensors file ({error})") from error
            if promised is not None and names != promised:
                raise WeightsError(f"{file} does not hold what the index says: {', '.join(sorted(names ^ promised))}")
            self._files |= dict.fromkeys(sorted(names), file)

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._files[name]
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                return opened.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise WeightsError(f"{file}: {name} cannot be read ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _shards(directory: Path, stem: str) -> dict[Path, set[str] | None]:
    """The files of weights in `directory`, and which tensors the index promises in each (None without an index)."""
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.exists():
        return {single: None}
    if not index.exists():
        pickled = sorted(f.name for f in directory.glob("*") if f.suffix in _PICKLED)
        found = f" (there is {', '.join(pickled)})" if pickled else ""
        raise WeightsError(
            f"{single} is missing{found}; only safetensors are read, as pickled files can run code: convert a "
            "checkpoint that has no others once, with from_pretrained and save_pretrained of transformers or diffusers, or "
            "the authors' own file with referee_jax.weights.lavis"
        )
    shards: dict[Path, set[str]] = {}
    weight_map = config_json.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        # An index is data from outside: it may name files beside it only.
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise WeightsError(f"{index} puts {name} into {file!r}, which is not the name of a file beside it")
        shards.setdefault(directory / file, set()).add(name)
    return shards


def save_directory(
    path: str | Path,
    weights: nnx.Module | Mapping[str, np.ndarray],
    config: Mapping,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Writes a network as Hugging Face lays it out: config.json and one file of safetensors.

    `dtype` (float16, say) is what floating-point tensors are cast to. `config` is written as it is given, with the keys
    by which the library knows the class: `_class_name` (diffusers), or `model_type` and `architectures` (transformers).
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = convert.export(weights) if isinstance(weights, nnx.Module) else dict(weights)
    if dtype is not None:
        tensors = {n: t.astype(dtype) if jnp.issubdtype(t.dtype, jnp.floating) else t for n, t in tensors.items()}
    file = path / f"{DIFFUSERS if '_class_name' in config else TRANSFORMERS}.safetensors"
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(file)
