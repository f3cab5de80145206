"""The networks of a config from their sizes: without weights, or with random ones. Nothing is downloaded.

Sizes come from config.json where a checkpoint is a local directory, else from PUBLISHED. A stand-in
replaces the tokenizer: what a program costs depends on the length of its texts, which is fixed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from referee_jax import config, referees
from referee_jax.engine import builders
from referee_jax.models.diffusion.text import T5_TOKENS
from referee_jax.performance.published import GENERATORS, PUBLISHED, PublishedGenerator
from referee_jax.weights import config_json, families, generators, hub, load, tokenizers
from referee_jax.weights.generators import Generator

DRAWN = 4_194_301  # random numbers; a prime, so that no two rows or layers are equal
# In place of a preprocessor_config.json. Only ALIGN's network does not know the size of its pictures.
_PREPROCESSING = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_ALIGN_SIZES = {"do_center_crop": True, "size": 346, "crop_size": 289}


class Words:
    """A stand-in tokenizer: one token per word, all with the same id."""

    pad_token_id, unk_token_id, bos_token_id = 0, None, None

    def __init__(self, length: int):
        self.model_max_length = length

    def __len__(self) -> int:
        return 2  # the word, and what pads

    def get_vocab(self) -> dict[str, int]:
        """An empty vocabulary."""
        return {}

    def __call__(
        self, texts: str | Sequence[str], *, add_special_tokens: bool = True, max_length: int = 0, **_: Any
    ) -> dict[str, list]:
        """`input_ids` of a text or of several."""
        if isinstance(texts, str):
            return {"input_ids": [1] * (len(texts.split()) + 2 * add_special_tokens)}
        rows = [self(text)["input_ids"] for text in texts]
        return {"input_ids": [row + [self.pad_token_id] * (max_length - len(row)) for row in rows]}


@dataclasses.dataclass(frozen=True)
class Sized:
    """The networks of a config, as `weights.load` returns them.

    `assumed` has a sentence for each checkpoint whose sizes were taken from another one.
    """

    prior: Generator
    judges: tuple[referees.Judge, ...]
    assumed: tuple[str, ...]


def abstract(settings: config.Settings) -> Sized:
    """The networks of a config, each weight a jax.ShapeDtypeStruct of its dtype.

    Raises ConfigError, or WeightsError for a directory whose config.json does not fit.
    """
    dtype, assumed = builders.DTYPES[settings.precision], []
    prior = _prior(settings.generator, dtype, assumed)
    judges = tuple(_judge(spec, dtype, assumed) for spec in settings.referees)
    return Sized(prior, judges, tuple(assumed))


def at_random(sized: Sized) -> Sized:
    """The same with random weights, always the same: norms 1, all others normal with standard deviation 0.02.

    All weights share DRAWN numbers, each from its own offset: drawing billions would take a minute.
    """
    rng, prior = np.random.default_rng(0), sized.prior
    parts = {name: _drawn(rng, getattr(prior, name)) for name in ("text_encoder", "denoiser", "vae")}
    parts["text_encoder"] = generators.on_host(parts["text_encoder"])
    judges = [dataclasses.replace(judge, referee=_drawn(rng, judge.referee)) for judge in sized.judges]
    return dataclasses.replace(sized, prior=dataclasses.replace(prior, **parts), judges=tuple(judges))


def _drawn(rng: np.random.Generator, tree: Any) -> Any:
    drawn = np.tile(0.02 * rng.standard_normal(DRAWN, np.float32), 2)  # twice: an offset plus DRAWN numbers are in it

    def draw(path: Sequence, x: jax.ShapeDtypeStruct) -> jax.Array:
        # scales of norms, variances of batch norms
        if any(word in str(path) for word in ("scale", "running_var")):
            return jnp.ones(x.shape, x.dtype)
        offset = rng.integers(DRAWN)
        # No more than are needed: JAX on a CPU keeps the array of which it is given a part.
        return jnp.asarray(np.resize(drawn[offset : offset + min(x.size, DRAWN)], x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def _prior(generator: config.Generator, dtype: Any, assumed: list[str]) -> Generator:
    checkpoint, directory = generator.checkpoint, hub.local_path(generator.checkpoint)
    published = GENERATORS.get(checkpoint) or GENERATORS[config.Generator().checkpoint]
    family, sizes, schedule, index = published.family, published.sizes, published.schedule, {}
    has = {"denoiser": not generator.unet, "vae": not generator.vae}
    if directory.is_dir():
        family = generators.family_of(directory)
        sizes = _published_of(family).sizes | generators.read_configs(directory, has)
        schedule, index = generators.read_schedule(directory), generators.read_index(directory)
    elif file := hub.file_of(checkpoint):
        files = generators.read_file(file, has, prediction=generator.prediction, reads_words=False)
        family, schedule = files.family, files.schedule
        sizes = _published_of(family).sizes | files.configs
    elif checkpoint not in GENERATORS:
        assumed.append(f"{checkpoint} is not here: sizes are those of {config.Generator().checkpoint}")
    kinds = dict(family.folders) | (generators.kinds_of(directory) if directory.is_dir() else {})
    for folder, other in ((family.denoiser, generator.unet), ("vae", generator.vae)):
        if other and (where := hub.local_path(other)).is_dir():
            kinds[folder] = load.kind_of(where)
            sizes = sizes | {folder: load.read_config(kinds[folder], where)}
        elif other:
            assumed.append(f"{other} is not here: its sizes are those of {checkpoint}")
    families.check_widths(family, sizes, where=generator.unet or checkpoint)
    networks = {folder: load.abstract(kind, sizes[folder], dtype=dtype) for folder, kind in kinds.items()}
    longest = lambda folder: T5_TOKENS if folder == family.t5 else sizes[folder].max_position_embeddings
    words = [Words(longest(folder)) for folder in family.tokenizers.values()]
    return generators.assemble(family, networks, schedule, words, index)


def _published_of(family: families.Family) -> PublishedGenerator:
    """A generator of this family, whose networks stand in for those that are not here."""
    return next(row for row in GENERATORS.values() if row.family.name == family.name)


def _judge(spec: config.RefereeSpec, dtype: Any, assumed: list[str]) -> referees.Judge:
    if config.own_referee(spec.name):  # nobody else knows its sizes
        judge = referees.load_referee(spec, dtype=dtype)
        return dataclasses.replace(judge, referee=jax.eval_shape(lambda: judge.referee))
    family, directory = referees.REFEREES[spec.name], hub.local_path(spec.checkpoint)
    preprocessing = _PREPROCESSING | (_ALIGN_SIZES if family.kind == "align" else {})
    if directory.is_dir():
        sizes = load.read_config(family.kind, directory)
        preprocessing = load.read_preprocessing(directory)
    else:
        stand_in = spec.checkpoint if spec.checkpoint in family.published else family.published[0]
        if stand_in != spec.checkpoint:
            assumed.append(f"{spec.checkpoint} is not here: sizes are those of {stand_in}")
        sizes = PUBLISHED[stand_in]
    if family.kind == "blip2":
        sizes = dataclasses.replace(sizes, lm_head="itg" in spec.losses)
    network, length = load.abstract(family.kind, sizes, dtype=dtype), load.text_config(sizes).max_position_embeddings
    if (file := directory / tokenizers.CONFIG).exists():
        length = min(length, config_json.read_json(file).get("model_max_length", length))
    return referees.build(spec, network, preprocessing, Words(length))
