"""Writes what the docs take from the code: `python docs/make_configuration.py`.

docs/configuration.md is written from the dataclasses of referee_jax/config/settings.py, and the table of rooms in
docs/architecture.md from tests/test_structure.py.
"""

import ast
import dataclasses
import inspect
import pathlib
import re
import runpy
import typing

from referee_jax import config
from referee_jax.method import augmentations

DOCS = pathlib.Path(__file__).parent
STRUCTURE = DOCS.parent / "tests" / "test_structure.py"
ROOMS = "| room | may import, besides itself |\n|---|---|\n"  # the beginning of the table of rooms
HEAD = """# Configuration

*Written by `python docs/make_configuration.py` from `referee_jax/config/settings.py`; change it there.*

A config file is Python with a function `get_config` that returns `config.default()` with changes, as
`configs/shapes.py`. On the command line `--config.sds.guidance=7.5` changes a value,
`--config.referees[0].weight=2.0` one of a referee. A wrong key, type or value is an error of one sentence. Default
numbers are those of the paper; its referee, `ema.alias` and `outputs.stretch` are set in `configs/paper.py`. `seed`,
`samples` and `workdir` are flags of their own as well.
"""
# Group in the settings -> its class.
GROUPS = {
    "": config.Settings,
    "generator": config.Generator,
    "generator.loras[n]": config.Lora,
    "sds": config.Sds,
    "guided": config.Guided,
    "noise": config.Noise,
    "referee": config.Referee,
    "referees[n]": config.RefereeSpec,
    "optim": config.Optim,
    "ema": config.Ema,
    "views": config.Views,
    "outputs": config.Outputs,
    "mesh": config.Mesh,
}
WORDS = {"low": "at least", "above": "more than", "high": "at most"}


def comments(cls: type) -> dict[str, str]:
    """The comment of each field: at the end of its line, or on the lines above it."""
    lines = inspect.getsource(cls).splitlines()
    texts = {}
    for node in ast.parse("\n".join(lines)).body[0].body:
        if isinstance(node, ast.AnnAssign):
            line = lines[node.end_lineno - 1][node.end_col_offset :]
            above = []
            for text in reversed(lines[: node.lineno - 1]):
                if not text.strip().startswith("#"):
                    break
                above.insert(0, text.strip().lstrip("# "))
            texts[node.target.id] = line.partition("#")[2].strip() or " ".join(above)
    return texts


def type_name(hint: typing.Any) -> str:
    """A type as users write it."""
    return re.sub(r"\b\w+\.", "", hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint))


def default_of(field: dataclasses.Field) -> typing.Any:
    """The value of a field that is left out."""
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def rounded(value: typing.Any) -> str:
    """A value as it is written in a config; fractions with six digits."""
    if isinstance(value, tuple):
        return f"({', '.join(map(rounded, value))}{',' * (len(value) == 1)})"
    return f"{value:.6g}" if isinstance(value, float) and value != round(value, 6) else repr(value)


def limits(name: str, field: dataclasses.Field) -> str:
    """The range of a field in words; those of magnitudes are in `config.checks`."""
    if "allowed" in field.metadata:
        return ", ".join(f"`{value!r}`" for value in field.metadata["allowed"])
    if words := [f"{WORDS[kind]} {rounded(bound)}" for kind, bound in field.metadata.items()]:
        return ", ".join(words)
    if name not in {x.name for x in dataclasses.fields(augmentations.Settings)}:
        return ""
    if name.endswith("_p"):
        return "0 to 1"
    if name.endswith("_area"):
        return "0 < low <= high <= 1"
    if name.endswith("_ratio"):
        return "0 < low <= high"
    return "more than 0" if name == "elastic_sigma" else "at least 0"


def table(cls: type) -> list[str]:
    """The rows of a class, those of the class that it inherits from after its own; groups are tables of their own."""
    hints, rows = typing.get_type_hints(cls), ["| setting | type | default | range | what |", "|---|---|---|---|---|"]
    texts = {name: text for base in reversed(cls.__mro__[:-1]) for name, text in comments(base).items()}
    fields = sorted(dataclasses.fields(cls), key=lambda x: x.name not in cls.__annotations__)
    for field in fields:
        hint, default = hints[field.name], default_of(field)
        if dataclasses.is_dataclass(hint) or field.name == "referees":
            continue
        cells = [f"`{field.name}`", f"`{type_name(hint)}`", f"`{rounded(default)}`", limits(field.name, field)]
        rows.append(
            "| " + " | ".join([*cells, texts.get(field.name, "").replace("|", "\\|").replace("<", "&lt;")]) + " |"
        )
    return rows


def configuration() -> str:
    """The whole page of settings."""
    parts = [HEAD]
    for group, cls in GROUPS.items():
        parts += [f"## {group or 'Top level'}", "", inspect.cleandoc(cls.__doc__), ""]
        if cls is config.Views:
            parts += [inspect.cleandoc(augmentations.Settings.__doc__), ""]
        if cls is config.RefereeSpec:
            rows = "\n".join(f"| `{name}` | {', '.join(map('`{}`'.format, x))} |" for name, x in config.LOSSES.items())
            parts += [
                "`config.referee(name=..., ...)` makes one entry of the tuple `referees`. The losses of each name:",
                "",
            ]
            parts += ["| name | losses |", "|---|---|", rows, ""]
        parts += [*table(cls), ""]
    return "\n".join(parts).rstrip() + "\n"


def architecture() -> str:
    """The page of the rooms, as it is, with today's table."""
    structure = runpy.run_path(str(STRUCTURE))
    rows = [
        f"| `{room}` | {', '.join(f'`{name}`' for name in sorted(below)) or 'nothing of ours'} |"
        for room, below in structure["TABLE"].items()
        if room not in (*structure["COMMANDS"], "__init__")
    ]
    rows += [
        "| the commands | everything but each other |",
        "| `__init__` | `config`, `engine`, `hardware.interrupts`, `referees` |",
    ]
    before, _, rest = (DOCS / "architecture.md").read_text(encoding="utf-8").partition(ROOMS)
    return before + ROOMS + "\n".join(rows) + "\n" + rest[rest.index("\n\n") + 1 :]


PAGES = {"configuration.md": configuration, "architecture.md": architecture}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
