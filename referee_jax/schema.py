"""Parses values of config files and command lines into frozen dataclasses of settings.

The dataclass' fields define names, types and ranges. An error is one sentence.
"""

import dataclasses
import difflib
import importlib
import math
import numbers
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections


class ConfigError(ValueError):
    """One sentence: the key, its value, and what is allowed."""


def bounded(default: Any, *, low: float = None, above: float = None, high: float = None, allowed: tuple = None) -> Any:
    """A field with limits: value >= `low`, > `above`, <= `high`, in `allowed`."""
    limits = {"low": low, "above": above, "high": high, "allowed": allowed}
    return dataclasses.field(default=default, metadata={name: x for name, x in limits.items() if x is not None})


def wrong(key: str, value: Any, allowed: str) -> ConfigError:
    """The error for a value that is not allowed; `allowed` says what is."""
    text = repr(value)
    text = text if len(text) <= 200 else text[:200] + "..."
    return ConfigError(f"{key} = {text} is not possible: it must be {allowed}")


def parse(value: Any, hint: Any, key: str, limits: Mapping) -> Any:
    """`value` as type `hint`, within the `limits` of its field. Raises ConfigError."""
    if dataclasses.is_dataclass(hint):
        return _parse_group(value, hint, key)
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is tuple:
        return _parse_tuple(value, inner, key)
    if kind is dict:
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise wrong(key, value, "a dictionary of names and numbers")
        return {name: parse(x, inner[1], f"{key}.{name}", {}) for name, x in sorted(value.items())}
    if kind is bool:
        if not isinstance(value, bool):
            raise wrong(key, value, "True or False")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise wrong(key, value, "a text")
    else:
        number = numbers.Integral if kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, number) or not math.isfinite(value):
            raise wrong(key, value, "a whole number" if kind is int else "a finite number")
        value = kind(value)
    return _within(value, key, limits)


def _within(value: Any, key: str, limits: Mapping) -> Any:
    if "allowed" in limits and value not in limits["allowed"]:
        raise wrong(key, value, "one of " + ", ".join(map(repr, limits["allowed"])))
    for name, words, is_met in (
        ("low", "at least", lambda limit: value >= limit),
        ("above", "more than", lambda limit: value > limit),
        ("high", "at most", lambda limit: value <= limit),
    ):
        if name in limits and not is_met(limits[name]):
            raise wrong(key, value, f"{words} {limits[name]}")
    return value


def _parse_tuple(value: Any, inner: tuple, key: str) -> tuple:
    is_open = inner[-1] is Ellipsis
    if not isinstance(value, list | tuple) or not (is_open or len(value) == len(inner)):
        length = "" if is_open else f" of {len(inner)}"
        raise wrong(
            key,
            value,
            f"a tuple{length}, as in --config.{key}=first,second"
            if is_open and not key.endswith("]")
            else f"a tuple{length}",
        )
    hints = [inner[0]] * len(value) if is_open else inner
    return tuple(parse(x, hint, f"{key}[{n}]", {}) for n, (x, hint) in enumerate(zip(value, hints, strict=True)))


def _parse_group(value: Any, cls: type, key: str) -> Any:
    if isinstance(value, cls):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(cls)}
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise wrong(key or "the config", value, "a group of settings (a ConfigDict or a dictionary)")
    value, hints = dict(value.items()), typing.get_type_hints(cls)
    fields, prefix = {field.name: field for field in dataclasses.fields(cls)}, f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise ConfigError(unknown_key(f"{prefix}{name}", fields))
    # On the command line None is a word. It stands for an empty text where a text may be empty.
    texts = {name for name, x in value.items() if hints[name] is str and x in (None, "None")}
    if refused := next((name for name in texts if fields[name].default != ""), None):
        raise wrong(prefix + refused, None, "a text")
    value |= dict.fromkeys(texts, "")
    return cls(**{name: parse(x, hints[name], prefix + name, fields[name].metadata) for name, x in value.items()})


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for an unknown key, with the closest of its group's `known` names."""
    *path, name = key.split(".")
    matches = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {'.'.join([*path, matches[0]])}?" if matches else f"there are {', '.join(sorted(known))}"
    return f"{key} is not a setting; {hint}"


def imported(name: str, key: str) -> types.ModuleType:
    """A user's module, named by the setting `key`. Raises ConfigError."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module is code, and may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            places = "in the current directory, beside the config file, or installed"
            raise wrong(key, name, f"a module that Python finds: {places}") from error
        raise ConfigError(f"{key} = {name!r} cannot be imported: {failure(error)}") from error


def function(name: str, key: str) -> Callable:
    """What a user's "module:function" names. Raises ConfigError."""
    module, _, attribute = name.partition(":")
    value = getattr(imported(module, key), attribute, None)
    if not callable(value):
        raise wrong(key, name, f'"{module}:function", and there is no function {attribute!r} in {module}')
    return value


def failure(error: Exception) -> str:
    """An error of a user's code in one line: its type, its text, and the last line that is no library's."""
    text = " ".join(str(error).split())[:300]
    libraries = ("site-packages", "<frozen", "importlib")
    frames = [x for x in traceback.extract_tb(error.__traceback__) if not any(y in x.filename for y in libraries)]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"
