"""Settings as records: JSON, what images depend on, differences, checkpoints."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from referee_jax import schema
from referee_jax.config.known_referees import own_referee
from referee_jax.config.settings import Settings

# Settings that do not change any image's pixels.
_NOT_OF_THE_IMAGE = (
    "prompts", "samples", "workdir", "batch_size", "remat", "mesh", "chunk", "checkpoint_seconds", "stall_seconds",
    "views.per_pass", "outputs.trajectory", "outputs.format", "outputs.shard_size", "outputs.shard_images",
)  # fmt: skip


def to_dict(settings: Settings) -> dict[str, Any]:
    """JSON values: `from_config(to_dict(settings)) == settings`."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def to_json(settings: Settings) -> str:
    """`to_dict` as indented JSON with sorted keys."""
    return json.dumps(to_dict(settings), indent=2, sort_keys=True)


def image_settings(settings: Settings) -> dict[str, Any]:
    """The part of `to_dict` that the pixels of a given prompt and sample depend on."""
    return image_part(to_dict(settings))


def image_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """`image_settings` of a dictionary, perhaps written by another version."""
    part = {}
    for key, value in values.items():
        inner = [name.removeprefix(f"{key}.") for name in _NOT_OF_THE_IMAGE if name.startswith(f"{key}.")]
        if inner and isinstance(value, Mapping):
            value = {name: x for name, x in value.items() if name not in inner}
        if key not in _NOT_OF_THE_IMAGE:
            part[key] = value
    return part


def fingerprint(settings: Settings) -> str:
    """SHA-256 of `image_settings` and of the source of modules of one's own, in hex.

    Checkpoints count by name and revision, not content.
    """
    names = {*settings.plugins, *(own_referee(spec.name).partition(":")[0] for spec in settings.referees)} - {""}
    files = [getattr(schema.imported(name, "plugins"), "__file__", None) for name in sorted(names)]
    code = [hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() for file in files if file]
    values = image_settings(settings) | ({"code": code} if code else {})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def diff(old: Settings | Mapping, new: Settings | Mapping) -> str:
    """The differences of two settings (or dictionaries), by line: `sds.guidance: 30.0 -> 7.5`."""
    old, new = (_flat(x if isinstance(x, Mapping) else to_dict(x)) for x in (old, new))
    text = lambda values, key: json.dumps(values[key]) if key in values else "(absent)"
    keys = sorted(key for key in old.keys() | new.keys() if text(old, key) != text(new, key))
    return "\n".join(f"{key}: {text(old, key)} -> {text(new, key)}" for key in keys)


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Flattens `{"a": {"b": 1}, "c": [{"d": 2}]}` to `{"a.b": 1, "c[0].d": 2}`."""
    if isinstance(values, Mapping):
        parts = [(f"{key}.{name}" if key else name, x) for name, x in values.items()]
    elif isinstance(values, list) and any(isinstance(x, Mapping) for x in values):
        parts = [(f"{key}[{n}]", x) for n, x in enumerate(values)]
    else:
        return {key: values}
    return {name: x for part, inner in parts for name, x in _flat(inner, part).items()}


def checkpoints(settings: Settings) -> list[tuple[str, str]]:
    """(name, revision) of each checkpoint in the settings, once."""
    generator = settings.generator
    named = [
        (generator.checkpoint, generator.revision),
        (generator.unet, generator.unet_revision),
        (generator.vae, generator.vae_revision),
        *((lora.file, "") for lora in generator.loras),
    ]
    named += [(spec.checkpoint, spec.revision) for spec in settings.referees]
    return list(dict.fromkeys(pair for pair in named if pair[0]))


def pinned(settings: Settings, commits: Mapping[str, str]) -> Settings:
    """The settings, with `commits` (by checkpoint) in place of empty revisions."""
    pin = lambda x: dataclasses.replace(x, revision=x.revision or commits.get(x.checkpoint, ""))
    generator = pin(settings.generator)
    generator = dataclasses.replace(
        generator,
        unet_revision=generator.unet_revision or commits.get(generator.unet, ""),
        vae_revision=generator.vae_revision or commits.get(generator.vae, ""),
    )
    return dataclasses.replace(settings, generator=generator, referees=tuple(map(pin, settings.referees)))
