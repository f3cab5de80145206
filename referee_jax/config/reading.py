"""From config files, ConfigDicts and dictionaries to checked settings."""

import dataclasses
import os
import pathlib
import re
import runpy
import sys
from collections.abc import Mapping
from typing import Any

import ml_collections

from referee_jax import schema
from referee_jax.config.checks import check
from referee_jax.config.known_referees import own_referee
from referee_jax.config.settings import RefereeSpec, Settings
from referee_jax.schema import ConfigError, parse


def _config_dict(values: Any) -> Any:
    """Dictionaries as locked ConfigDicts, also in tuples, which ml_collections leaves alone."""
    if isinstance(values, Mapping):
        config = ml_collections.ConfigDict({key: _config_dict(value) for key, value in values.items()})
        return config.lock()
    return tuple(map(_config_dict, values)) if isinstance(values, tuple) else values


def default() -> ml_collections.ConfigDict:
    """The paper's settings, typed and locked."""
    return _config_dict(dataclasses.asdict(Settings()))


def referee(**changes: Any) -> ml_collections.ConfigDict:
    """An entry of `config.referees`: the defaults with `changes`. Raises ConfigError.

    The checkpoint of a referee of one's own is by default empty.
    """
    spec = parse(changes, RefereeSpec, "referee", {})
    if "checkpoint" not in changes and own_referee(spec.name, "referee.name"):
        spec = dataclasses.replace(spec, checkpoint="")
    return _config_dict(dataclasses.asdict(spec))


def find(config: str | os.PathLike) -> str:
    """The path of a config: a name, as "shapes", is one of the package's. Raises ConfigError.

    Modules beside a file of the user's can be imported from then on.
    """
    name = os.fspath(config)
    package = pathlib.Path(__file__).parents[1]
    if not re.fullmatch(r"[\w-]+", name) or pathlib.Path(name).is_file():
        directory = pathlib.Path(name).absolute().parent
        # Last, so that it hides no other module; the package's own configs have names of others ("clip").
        if directory not in (package / "configs", package.parent / "configs") and str(directory) not in sys.path:
            sys.path.append(str(directory))
        return name
    # An installed package has them inside, a checkout beside it.
    paths = sorted(package.glob("configs/*.py")) or sorted(package.parent.glob("configs/*.py"))
    files = {path.stem: str(path) for path in paths}
    if name not in files:
        raise ConfigError(f"there is no config {name!r}; there are {', '.join(files)}, or give a file (with .py)")
    return files[name]


def read(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """The result of `get_config` in a config file, by path or name (see `find`). Raises ConfigError."""
    path = find(path)
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"there is no config file {str(path)!r}")
    try:
        return runpy.run_path(str(path))["get_config"]()
    except ConfigError:
        raise
    except Exception as error:  # a config file is code, and may raise anything
        reason = "it has no function get_config" if str(error) == "'get_config'" else f"{type(error).__name__}: {error}"
        raise ConfigError(f"the config file {str(path)!r} fails: {reason}") from error


def load(path: str | os.PathLike) -> Settings:
    """The checked settings of a config file. Raises ConfigError."""
    return from_config(read(path))


def from_config(config: Settings | ml_collections.ConfigDict | Mapping) -> Settings:
    """The checked settings of a ConfigDict or dictionary, with defaults; imports their plugins. Raises ConfigError."""
    if isinstance(config, Mapping | ml_collections.ConfigDict):
        for n, name in enumerate(parse(config.get("plugins", ()), tuple[str, ...], "plugins", {})):
            schema.imported(name, f"plugins[{n}]")
    settings = parse(config, Settings, "", {})
    check(settings)
    return settings


def recorded(values: Mapping) -> Settings:
    """The settings of a record that others may have written: imports nothing and checks types and ranges alone."""
    return parse(values, Settings, "", {})


def override(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with `changes`, such as {"sds.guidance": 7.5}. Raises ConfigError."""
    values = dataclasses.asdict(settings)
    for key, value in changes.items():
        *groups, name = key.split(".")
        inner = values
        for group in groups:
            inner = inner.get(group)
            if not isinstance(inner, dict):
                raise ConfigError(f"{key} is not a setting")
        inner[name] = value
    return from_config(values)
