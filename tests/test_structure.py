"""Which room may import which: the picture of docs/architecture.md as a table."""

import ast
import pathlib

import pytest

import referee_jax

ROOT = pathlib.Path(referee_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

COMMANDS = ("run", "score", "evaluate", "sweep", "bench", "doctor", "gallery")
# Room -> rooms, or files in them, that it may import besides itself; from the ground up.
TABLE = {
    "prompts": {},
    "items": {},
    "schema": {},
    "console": {},
    "hardware": {"console"},
    "models": {"hardware"},
    "method": {"models"},
    "weights": {"models", "console", "hardware.kept"},
    "config": {"method", "schema", "prompts"},
    "referees": {
        "config", "schema", "method", "models", "weights", "prompts", "hardware.chips", "storage.images",
    },
    "storage": {"config", "items", "hardware.processes", "method.held_out"},
    "cli": {"config", "hardware", "console", "schema"},
    "networks": {"referees", "weights", "config", "prompts", "storage.images"},
    "engine": {
        "config", "method", "models.layers", "referees", "weights", "hardware", "items", "prompts",
    },
    "performance": {
        "engine", "config", "method", "models", "referees", "weights", "hardware", "prompts", "console", "items",
    },
    "shapes": {"models.bert", "referees.questions", "cli"},
    "benchmarks": {
        "engine", "referees", "storage", "shapes", "config", "cli", "console", "items", "prompts", "weights.hub",
        "method.held_out", "performance.cost",
    },
    "runs": {
        "performance", "engine", "storage", "config", "cli", "console", "hardware", "items", "prompts", "weights",
        "referees.questions",
    },
    "ray": {"runs", "storage", "config", "cli", "console", "hardware", "items", "prompts", "referees.questions"},
}  # fmt: skip
TABLE |= {command: {*TABLE, "benchmarks", "runs"} for command in COMMANDS}
TABLE["__init__"] = {"config", "engine", "hardware.interrupts", "referees"}


def imports(file: pathlib.Path) -> set[str]:
    """Full names of what a file imports, modules and their members alike."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def uses(file: pathlib.Path, *prefixes: str) -> list[str]:
    return sorted(n for n in imports(file) if any(n == p or n.startswith(p + ".") for p in prefixes))


def using(*prefixes: str) -> set[str]:
    return {str(file.relative_to(ROOT)) for file in FILES if uses(file, *prefixes)}


def room_of(file: pathlib.Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("room", TABLE)
def test_a_room_imports_what_it_may(room):
    allowed = {room, *TABLE[room]}
    for file in FILES:
        if room_of(file) == room:
            names = {name.removeprefix("referee_jax.") for name in uses(file, "referee_jax")}
            wrong = [n for n in names if not any(n == x or n.startswith(x + ".") for x in allowed)]
            assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_the_table_is_complete_and_has_no_circle():
    assert {room_of(file) for file in FILES} == set(TABLE)
    left = {room: {name.partition(".")[0] for name in names} for room, names in TABLE.items()}
    while left:
        ground = {room for room, below in left.items() if not below & left.keys()}
        assert ground, f"a circle among {sorted(left)}"
        left = {room: below for room, below in left.items() if room not in ground}


def test_rooms_are_small():
    assert len(list(ROOT.glob("*.py"))) <= 14
    rooms = {room: len(list((ROOT / room).glob("*.py"))) - 1 for room in TABLE if (ROOT / room).is_dir()}
    assert max(rooms.values()) <= 12, rooms  # the package's face aside


def test_torch_only_in_training_and_conversion():
    training = {f"shapes/{name}.py" for name in ("train", "recipes_generator", "recipes_referees", "recipes_vqascore")}
    # The last reads, once, files that are pickles of torch; what it writes, and the program reads, are safetensors.
    assert using("torch", "diffusers") == training | {"weights/lavis.py"}
    # Its own files, beside programs that would be run, in a directory that others cannot write to.
    assert using("pickle") == {"weights/lavis.py", "hardware/kept.py"}
    assert not using("referee_jax.weights.lavis")


def test_only_commands_read_flags():
    trainings = {"shapes/train.py", "benchmarks/methods.py", "benchmarks/binding.py", "benchmarks/hacking.py"}
    parsers = {"cli.py", "runs/command.py"}
    # The command of a room of its own: with __main__.py beside its parts the root stays as it is.
    commands = {*(f"{name}.py" for name in COMMANDS), "ray/__main__.py"}
    assert using("absl.flags") <= trainings | parsers | commands
    assert {"run.py", "cli.py", "shapes/train.py"} <= using("absl.flags")


def test_only_few_ask_for_devices():
    asking = {
        str(f.relative_to(ROOT)) for f in FILES if "jax.devices(" in f.read_text() or "local_devices(" in f.read_text()
    }
    assert {x for x in asking if not x.startswith("hardware/")} <= {
        "runs/job.py", "doctor.py", "engine/parallel.py", "storage/run_directory.py",
    }  # fmt: skip


def test_libraries_that_one_room_knows():
    assert using("fsspec") == {"storage/objects.py"}
    assert {file.partition("/")[0] for file in using("ray")} == {"ray"}
    assert {file.partition("/")[0] for file in using("pyarrow")} <= {"runs", "storage", "ray"}
    assert {file.partition("/")[0] for file in using("transformers")} <= {"weights", "shapes"}
    assert {file.partition("/")[0] for file in using("flax.nnx")} <= {"models", "weights", "referees"}


def test_the_walk_sees_imports():
    assert "referee_jax.method.inversion" in imports(ROOT / "engine" / "inverter.py")
    assert "torch" in imports(ROOT / "shapes" / "train.py")
