"""Settings: names, types, defaults and ranges, checked before any weights are loaded.

`default()` is an ml_collections ConfigDict for configs/*.py and `--config.x.y=`; `from_config`
turns it into frozen dataclasses. The ConfigDict, the checks and the messages are derived from
these. The defaults are those of "Referee Can Play" (arXiv 2402.16305) for Stable Diffusion 1.5.
"""

from referee_jax.config.checks import guided_levels, guided_window
from referee_jax.config.known_referees import (
    ASKED,
    CONTRASTS,
    ENTRY_POINTS,
    LOSSES,
    WHOLE,
    own_referee,
    own_referees,
)
from referee_jax.config.reading import default, find, from_config, load, override, read, recorded, referee
from referee_jax.config.records import (
    checkpoints,
    diff,
    fingerprint,
    image_part,
    image_settings,
    pinned,
    to_dict,
    to_json,
)
from referee_jax.config.settings import (
    Ema,
    Generator,
    Guided,
    Lora,
    Mesh,
    Noise,
    Optim,
    Outputs,
    Referee,
    RefereeSpec,
    Sds,
    Settings,
    Views,
)
from referee_jax.schema import ConfigError

__all__ = [
    "ASKED",
    "CONTRASTS",
    "ConfigError",
    "ENTRY_POINTS",
    "Ema",
    "Generator",
    "Guided",
    "LOSSES",
    "Mesh",
    "Noise",
    "Optim",
    "Outputs",
    "Referee",
    "Lora",
    "RefereeSpec",
    "Sds",
    "Settings",
    "Views",
    "WHOLE",
    "checkpoints",
    "default",
    "diff",
    "find",
    "fingerprint",
    "from_config",
    "guided_levels",
    "guided_window",
    "image_part",
    "image_settings",
    "load",
    "override",
    "own_referee",
    "own_referees",
    "pinned",
    "read",
    "recorded",
    "referee",
    "to_dict",
    "to_json",
]
