"""Referees by name: `load_referee(spec)` gives a `Judge`.

judge = load_referee(config.RefereeSpec(name="blip_itm", checkpoint="Salesforce/blip-itm-base-coco", losses={}))
judge.score(["a.png"], ["a red book"])  # [[{"itm_probability": ..., "cosine": ...}]]
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from referee_jax import config
from referee_jax.hardware import chips
from referee_jax.models import layers
from referee_jax.referees import align, blip, blip2, clip, image_reward, own, qwen3_vl, vqascore
from referee_jax.referees.judge import Judge
from referee_jax.weights import config_json, hub, load

# The names of config.LOSSES. A new referee is a row here and there, models/x.py and referees/x.py; or own.py's.
REFEREES = {
    "clip": clip.CLIP,
    "siglip": clip.SIGLIP,
    "pickscore": clip.PICKSCORE,
    "hps": clip.HPS,
    "blip_itm": blip.ITM,
    "blip_caption": blip.CAPTION,
    "blip_vqa": blip.VQA,
    "blip2": blip2.FAMILY,
    "image_reward": image_reward.FAMILY,
    "align": align.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "vqascore": vqascore.FAMILY,
}


def name_of(path_or_id: str, revision: str | None = None) -> str:
    """The name of a checkpoint's referee, by its published id, or else by its config.json.

    Of several with the same architecture, the first in REFEREES. ValueError for an unknown one.
    """
    for name, family in REFEREES.items():
        if path_or_id in family.published:
            return name
    directory = hub.resolve(path_or_id, revision, ["config.json"])
    architecture = (config_json.read_json(directory / "config.json").get("architectures") or ["none"])[0]
    for name, family in REFEREES.items():
        if architecture == (family.architecture or load.KINDS[family.kind].architecture):
            return name
    raise ValueError(
        f"{path_or_id}: which referee it is cannot be seen (architecture {architecture}); say so by its name"
    )


def load_referee(
    spec: config.RefereeSpec | str,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    put: Callable[[np.ndarray], Any] = jax.device_put,
) -> Judge | own.OwnJudge:
    """Loads the referee of `spec`, or, to score with, of a directory or hub id; `put` is where its weights go.

    Raises WeightsError where it cannot be had, and ConfigError for a loss that it does not have:
    before anything is read, except for BLIP-2's captions, which depend on the weights.
    """
    if isinstance(spec, str):
        spec = config.RefereeSpec(name=name_of(spec), checkpoint=spec, losses={})
    if config.own_referee(spec.name):
        judge = own.load(spec, dtype=dtype)
        _check_fits(spec, judge.referee)
        return judge
    _check_losses(spec, config.LOSSES[spec.name])
    family = REFEREES[spec.name]
    directory = load.fetch_referee(spec.checkpoint, revision=spec.revision or None)
    tokenizer = load.load_tokenizer(directory, kind=family.kind)
    family.check(tokenizer)
    preprocessing = load.read_preprocessing(directory)
    network = load.load(family.kind, directory, dtype=dtype, put=put)
    try:
        return build(spec, network, preprocessing, tokenizer)
    except config.ConfigError:
        raise
    except ValueError as error:
        raise load.WeightsError(f"{directory}: {error}") from error


def build(spec: config.RefereeSpec, network: Any, preprocessing: Mapping, tokenizer: Any) -> Judge:
    """The referee of a network, real or abstract, and its preprocessor_config.json.

    ValueError where `spec` does not fit.
    """
    family = REFEREES[spec.name]
    referee = family.build(spec, network, preprocessing, tokenizer)
    _check_fits(spec, referee)
    referee = layers.configured(referee, hardware=chips.traits())  # an engine sets that of its own devices
    return Judge(spec, family, referee, tokenizer)


def _check_fits(spec: config.RefereeSpec, referee: Any) -> None:
    _check_losses(spec, referee.losses)
    if spec.image_size not in (0, referee.image_size):
        raise config.ConfigError(
            f"referee {spec.name}: image_size = {spec.image_size}, but it reads {referee.image_size}"
        )


def _check_losses(spec: config.RefereeSpec, known: tuple[str, ...]) -> None:
    if unknown := set(spec.losses) - set(known):
        raise config.ConfigError(
            f"referee {spec.name}: no loss {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
