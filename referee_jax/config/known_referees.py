"""The package's referees with their losses, and those of other packages."""

from importlib import metadata

from referee_jax.schema import wrong

# Referee -> its losses. Referees with one of CONTRASTS use negatives. BLIP-2 has itg only if
# its weights have a language head, which is known when they are loaded.
LOSSES = {
    "clip": ("cosine", "contrastive"),
    "siglip": ("cosine", "sigmoid", "contrastive"),
    "pickscore": ("cosine", "contrastive"),
    "hps": ("cosine",),
    "blip_itm": ("itm", "itc"),
    "blip_caption": ("caption",),
    "blip_vqa": ("vqa",),
    "blip2": ("itm", "itc", "itg"),
    "image_reward": ("reward",),
    "align": ("cosine", "contrastive"),
    "qwen3_vl": ("vqa",),
    "vqascore": ("vqa", "versus"),
}
CONTRASTS = {"contrastive", "versus"}  # losses that tell the prompt from other texts
# Referees that are asked where things are and how many, and the augmentations that make true answers false.
WHOLE = ("qwen3_vl", "vqascore")
ASKED = ("blip_vqa", "qwen3_vl", "vqascore")  # referees that answer the questions a prompt is taken apart into
MOVING = ("Af", "Er", "Hf", "Ro", "Et", "Ts", "Cr", "Re")
WHY = 'is asked where things are, and these cut things off or turn "left of" round'

ENTRY_POINTS = "referee_jax.referees"  # the group of packages' own referees


def own_referee(name: str, key: str = "name") -> str:
    """The "module:function" of a referee that is not the package's: its name, or the entry point so called.

    Empty for one of LOSSES. Raises ConfigError for any other name, of the setting `key`.
    """
    if name in LOSSES:
        return ""
    points = {point.name: point.value for point in own_referees()}
    if name in points or ":" in name:
        return points.get(name, name)
    known = ", ".join(map(repr, [*LOSSES, *points]))
    raise wrong(key, name, f'one of {known}, or your own: "module:function", see docs/referees.md')


def own_referees() -> metadata.EntryPoints:
    """The referees of installed packages: their entry points."""
    return metadata.entry_points(group=ENTRY_POINTS)
