"""README and docs: the site builds, pages are what the code says, commands and snippets are what the program takes."""

import dataclasses
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings

import numpy as np
import PIL.Image
import pytest
from absl import flags

import referee_jax
from referee_jax import cli, config, sweep
from referee_jax.runs import command
from referee_jax.storage import images
from referee_jax.weights import hub, lavis

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "quickstart.ipynb"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"(<!-- needs: [^\n]+ -->\n)?^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; one that CI cannot run has a comment `<!-- needs: ... -->` before it."""

    page: str
    language: str
    text: str
    needs: bool


BLOCKS = [
    Block(str(page.relative_to(ROOT)), language, text, bool(needs))
    for page in PAGES
    for needs, _, language, text in BLOCK.findall(page.read_text())
]
COMMANDS = [
    (block.page, line)
    for block in BLOCKS
    if not block.language
    for line in re.sub(r"\\\n *", "", block.text).splitlines()
    if re.match(r"(python|pip|pytest|mkdocs) ", line)
]
MARKS = {re.split(r"\W", line)[0] for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"][
    "ini_options"]["markers"]}  # fmt: skip


# --- commands ---------------------------------------------------------------------------------------------------------


def parse_program(module, arguments, monkeypatch):
    """The flags of a program, parsed as it parses them, without its work."""
    before, was_parsed, values = set(flags.FLAGS), flags.FLAGS.is_parsed(), {}

    def start(main, *, arguments=0, hint=""):
        rest = cli.parse_argv(sys.argv, flags.FLAGS)
        assert len(rest) <= 1 + arguments, rest
        values.update({name: flags.FLAGS[name].value for name in set(flags.FLAGS) - before})

    monkeypatch.setattr(cli, "start", start)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
            runpy.run_module(module, run_name="__main__")
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        if not was_parsed:
            flags.FLAGS.unparse_flags()
    return values


def check_program(module, arguments, monkeypatch):
    """Raises where a program of the package would not begin with these arguments."""
    if module == "referee_jax.weights.lavis":
        lavis.parse(arguments)
        return
    if module == "referee_jax.ray":
        from referee_jax.ray import __main__ as ray_command  # imports Ray, which takes seconds

        assert len(command.parse_flags([module, *arguments], flags.FlagValues(), ray_command.define_flags)) == 1
        return
    if module in ("referee_jax.run", "referee_jax.doctor"):
        if module == "referee_jax.doctor":
            arguments = [x for x in arguments if not x.startswith(("--json", "--compile-for"))]
        values = flags.FlagValues()
        assert len(command.parse_flags([module, *arguments], values)) == 1
        config.from_config(values.config)
        return
    values = parse_program(module, arguments, monkeypatch)
    if "config" in values:
        config.from_config(values["config"])
    if "sweep" in values:
        assert set(values["variant"]) <= set(sweep.read(values["sweep"], values["vary"]))


def check_command(words, monkeypatch):
    """Raises where a command's program, flags, config, files, extras or marks do not exist."""
    assert all(hub.is_embedded(name) for word in words for name in re.findall(r"=(shapes/\w+)", word))
    program, *arguments = words
    if program == "python" and arguments[0] == "-m":
        if arguments[1].startswith("referee_jax."):
            check_program(arguments[1], arguments[2:], monkeypatch)
        else:
            assert (ROOT / arguments[1].replace(".", "/")).with_suffix(".py").is_file()
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    elif program == "pip":
        wanted = set(re.findall(r"\.\[(\w+)\]", " ".join(arguments)))
        assert wanted <= set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.M))
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
        assert all(mark in MARKS for option, mark in zip(arguments, arguments[1:], strict=False) if option == "-m")


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_what_programs_take(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    for part in re.split(r" (?:&&|\|) ", line):
        if part != "sh":
            check_command(shlex.split(part), monkeypatch)


def test_a_wrong_command_is_seen(monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in (
        "python -m referee_jax.run --config=configs/shapes.py --promt=a",
        "python -m referee_jax.run --config=configs/shapes.py --config.sds.guidanse=3",
        "python -m referee_jax.run --config=configs/none.py",
        "python -m referee_jax.sweep --sweep=configs/ablation.py --variant=none",
        "python -m referee_jax.evaluate --workdir=x --benchmark=none",
        "python -m tests.tools.none",
        "python docs/none.py",
        'pip install -e ".[none]"',
        "pytest tests/none.py",
    ):
        with pytest.raises((Exception, SystemExit)):
            check_command(shlex.split(line), monkeypatch)


def test_the_main_commands_stand_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for line in (
        "pip install -e . && python -m referee_jax.run --config=configs/shapes.py",
        'pip install -e ".[test]" && pytest',
    ):
        assert f"\n{line}\n" in text
    assert len(COMMANDS) > 40


def test_names_of_tests_exist():
    text = (DOCS / "testing.md").read_text()
    defined = {
        name for file in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert set(re.findall(r"`(test_\w+)`", text)) <= defined
    assert all((ROOT / name).exists() for name in re.findall(r"`(tests/[\w/.]+)`", text))


# --- snippets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", sorted({block.page for block in BLOCKS if block.language == "python" and not block.needs})
)
def test_snippets_run(page, monkeypatch):
    """In few steps from noise, on one device."""

    def load_config(path):
        settings = config.load(path)
        cheap = {"steps": 2, "init": "noise", "init_candidates": 1, "batch_size": 2, "mesh.prompt": 1}
        return config.override(settings, cheap)

    picture = PIL.Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(referee_jax, "load_config", load_config)
    monkeypatch.setattr(images, "read_image", lambda file: picture)
    names = {"picture": picture}
    for block in BLOCKS:
        if block.page == page and block.language == "python" and not block.needs:
            exec(compile(block.text, page, "exec"), names)
    if "result" in names:
        assert names["result"].images.shape == (2, 64, 64, 3)


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "configuration.html").is_file()


@pytest.mark.parametrize("name", ["configuration.md", "architecture.md"])
def test_pages_are_what_the_code_says(name):
    pages = runpy.run_path(str(DOCS / "make_configuration.py"))["PAGES"]
    assert (DOCS / name).read_text() == pages[name](), "write it anew: python docs/make_configuration.py"


def test_readme_is_short_and_its_links_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert max(map(len, text.splitlines())) <= 120
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links and all((ROOT / link).is_file() for link in links)


def test_pictures_are_small():
    for name in ("sampling_and_method.png", "trajectory.webp"):
        assert (DOCS / "images" / name).stat().st_size < 150_000
    assert NOTEBOOK.stat().st_size < 400_000


def test_the_notebook_has_its_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(DOCS)}}).execute()
