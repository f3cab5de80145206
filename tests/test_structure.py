"""Dependencies point one way (the package's docstring): a walk over the imports holds it."""

import ast
import pathlib

import pytest

import referee_jax

ROOT = pathlib.Path(referee_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


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


def files(*names: str) -> list[pathlib.Path]:
    chosen = [file for file in FILES if any(str(file.relative_to(ROOT)).startswith(name) for name in names)]
    assert chosen, names
    return chosen


# Who -> what it must not import.
RULES = {
    ("models/",): ["referee_jax.weights", "referee_jax.referees", "referee_jax.method.inversion", "referee_jax.config", "transformers"],
    ("weights/",): ["referee_jax.method.inversion", "referee_jax.engine.inverter", "referee_jax.referees", "referee_jax.config"],
    ("inversion.py", "objective.py", "sds.py", "optim.py", "views.py", "augment.py", "sampler.py"): [
        "referee_jax.engine.inverter", "referee_jax.config", "referee_jax.weights", "referee_jax.runs.work", "referee_jax.storage.run_directory",
        "referee_jax.engine.parallel", "referee_jax.shapes", "transformers", "absl",
    ],
    ("inverter.py", "assembly.py"): ["referee_jax.run", "referee_jax.storage.run_directory", "referee_jax.shapes", "absl"],
    ("config.py", "queue.py", "prompts.py", "outputs.py", "writers.py", "formats.py"): [
        "referee_jax.engine.inverter", "referee_jax.run", "referee_jax.method.inversion",
    ],
    ("writers.py", "formats.py"): ["referee_jax.storage.run_directory"],
    ("shards.py",): ["referee_jax.storage.run_directory", "referee_jax.storage.writer", "referee_jax.storage.images", "referee_jax.config"],
    ("disk.py",): ["referee_jax"],
    ("remote.py",): ["referee_jax.config", "referee_jax.storage.run_directory", "referee_jax.run", "referee_jax.engine.inverter"],
    ("program.py", "memory.py"): ["referee_jax"],
    ("cost.py", "sizes.py"): ["referee_jax.run", "referee_jax.storage.run_directory", "transformers", "absl"],
}  # fmt: skip


@pytest.mark.parametrize("who", RULES, ids=lambda who: who[0])
def test_directions(who):
    found = {str(file.relative_to(ROOT)): uses(file, *RULES[who]) for file in files(*who)}
    assert {name: names for name, names in found.items() if names} == {}


def test_torch_only_in_training_and_conversion():
    found = {str(file.relative_to(ROOT)) for file in FILES if uses(file, "torch", "diffusers", "pickle")}
    # The last reads, once, files that are pickles of torch; what it writes, and the program reads, are safetensors.
    training = {f"shapes/{name}.py" for name in ("train", "recipes_generator", "recipes_referees")}
    assert found == training | {"weights/lavis.py"}
    assert not any(uses(file, "referee_jax.weights.lavis") for file in FILES)


def test_only_the_outermost_reads_flags_and_devices():
    flags = {str(file.relative_to(ROOT)) for file in FILES if uses(file, "absl.flags")}
    programs = {
        "command.py",
        "run.py",
        "doctor.py",
        "score.py",
        "evaluate.py",
        "shapes/train.py",
        "benchmarks/methods.py",
        "sweep.py",
        "bench.py",
        "benchmarks/binding.py",
    }
    assert flags == programs
    devices = {
        str(f.relative_to(ROOT)) for f in FILES if "jax.devices(" in f.read_text() or "local_devices(" in f.read_text()
    }
    assert devices <= {"run.py", "devices.py", "doctor.py", "parallel.py", "outputs.py"}


def test_one_file_knows_buckets():
    assert {str(file.relative_to(ROOT)) for file in FILES if uses(file, "fsspec")} == {"remote.py"}


def test_the_walk_sees_imports():
    assert "referee_jax.method.inversion" in imports(ROOT / "inverter.py")
    assert "torch" in imports(ROOT / "shapes" / "train.py")
