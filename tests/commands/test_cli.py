"""Commands: what flags say, and that a mistake in one is a sentence and code 2, never a traceback."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from absl import flags

from referee_jax import cli, config, run
from referee_jax.hardware import interrupts
from referee_jax.runs import command as command_lib
from referee_jax.runs.command import CommandError
from tests import programs
from tests.fakes import ROOT, command


def test_impossible_shares():
    with pytest.raises(CommandError, match="shard_index=2 is not one of 0 to 1"):
        command("--prompt=one", "--shard_index=2", "--shard_count=2")


def test_flags_change_the_config(tmp_path):
    asked = command(
        "--prompt=a", "--samples=3", "--seed=9", "--config.sds.guidance=7", "--config.views.affine_translate=0.1,0.2"
    )
    assert (asked.settings.samples, asked.settings.seed, asked.settings.sds.guidance) == (3, 9, 7.0)
    assert asked.settings.views.affine_translate == (0.1, 0.2)
    assert asked.workdir == pathlib.Path("runs", f"paper-{config.fingerprint(asked.settings)[:8]}")
    assert command("--prompt=a", "--workdir=x").workdir == pathlib.Path("x")
    asked = command(path=ROOT / "configs" / "shapes.py")
    assert (asked.entries[0].text, asked.entries[0].where) == (asked.settings.prompts[0], "prompt 1 of the config")
    assert command("--prompt=b", path=ROOT / "configs" / "shapes.py").entries[0].text == "b"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("referees[0].negatives=a,b", ("a", "b")),
        ("referees[0].negatives=a-b, c", ("a-b", "c")),
        ("referees[0].negatives=a", ("a",)),
        ("referees[0].negatives=('a cat, asleep', 'b')", ("a cat, asleep", "b")),
        ("referees[0].negatives=['a', 'b']", ("a", "b")),
        *((f"referees[0].negatives={nothing}", ()) for nothing in ("None", "", "()", "[]")),
        ("referees[0].exchange=('red','blue'),('cat','dog')", (("red", "blue"), ("cat", "dog"))),
        ("views.augmentations=Af,Pe", ("Af", "Pe")),
        ("views.affine_translate=0.1,0.2", (0.1, 0.2)),
        ("prompts=one,two", ("one", "two")),
        *(
            (f"{key}=None", "")
            for key in ("referees[0].revision", "generator.revision", "sds.negative_prompt", "workdir")
        ),
        ("sds.negative_prompt=a,b", "a,b"),
    ],
)
def test_lists_and_none_on_the_command_line(argument, value):
    settings = command(f"--config.{argument}", path=ROOT / "configs" / "shapes_clip.py").settings
    for name in argument.partition("=")[0].replace("[0]", ".0").split("."):
        settings = settings[0] if name == "0" else getattr(settings, name)
    assert settings == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.referees[0].negatives=(a, 'b')"],
            "referees[0].negatives = \"(a, 'b')\" is not possible: a tuple of texts",
        ),
        (["--config.prompts=a cat, asleep"], "prompts = 'a cat, asleep' is not possible: Error while parsing string"),
        (["--config.prompts=1,2"], "prompts[0] = 1 is not possible: it must be a text"),
        (
            ["--config.referees[0].exchange=red,blue"],
            "referees[0].exchange[0] = 'red' is not possible: it must be a tuple",
        ),
        (
            ["--config.views.affine_translate=None"],
            "views.affine_translate = () is not possible: it must be a tuple of 2",
        ),
        (["--config.steps=None"], "steps = 'None' is not possible: "),
        (["--config.sds.prompt=None"], "sds.prompt = None is not possible: it must be a text"),
        (["--config.generator.checkpoint=None"], "generator.checkpoint = None is not possible: it must be a text"),
        (["--config.outputs.format=None"], "outputs.format = None is not possible: it must be a text"),
        (["--config.stepz=3"], "stepz is not a setting; did you mean steps?"),
        (["--config.sds.guidanse=3"], "sds.guidanse is not a setting; did you mean sds.guidance?"),
        (["--config.referees[0].rolle=held_out"], "referees[0].rolle is not a setting; did you mean referees[0].role?"),
        (["--config.steps=many"], "steps = 'many' is not possible: invalid literal for int()"),
        (["--config.steps=0"], "steps = 0 is not possible: it must be at least 1"),
        (["--seed=-1"], "seed = -1 is not possible: it must be at least 0"),
        (["--samples=two"], "flag --samples=two: invalid literal for int()"),
        (["--promt=a"], "Unknown command line flag 'promt'. Did you mean: prompt"),
        (["a", "cat"], "unexpected argument 'a'; prompts are given with --prompt or --prompts"),
        (["--config.referees[3].name=clip"], "referees[3].name cannot be set: tuple index out of range"),
        (["--config.referees[0].losses.l2=1"], "referees[0].losses.l2 cannot be set: "),
        (["--config.ema=3"], "ema = '3' is not possible: "),
        (["--prompts=none.txt"], "the prompt file none.txt cannot be read: No such file or directory"),
    ],
)
def test_mistakes_in_the_command(arguments, message):
    with pytest.raises(ValueError) as caught:
        command(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_prompts_are_needed(capsys, tmp_path):
    """Of who wants images; what a config costs, and whether a machine is fit for it, can be asked without."""
    asked = command(f"--workdir={tmp_path / 'none'}")
    assert run.main(asked) == 2 and not asked.workdir.exists()
    assert "there are no prompts; give --prompts=FILE, --prompt=TEXT or config.prompts" in capsys.readouterr().err


def test_without_a_config_the_embedded_default_runs():
    def parsed(*arguments):
        values = flags.FlagValues()
        return command_lib.read_command(values, command_lib.parse_flags(["run", *arguments], values)[1:])

    file = ROOT / "configs" / "shapes.py"
    for arguments in ([], ["--config=shapes"], ["--config", "shapes"], [f"--config={file}"]):
        asked = parsed(*arguments, "--prompt=a", "--config.steps=7")
        assert asked.settings == dataclasses.replace(config.load(str(file)), steps=7)
        assert [entry.text for entry in asked.entries] == ["a"] and asked.workdir.name.startswith("shapes-")
    with pytest.raises(CommandError, match=r"there is no config 'shapez'; there are ablation, clip, .*shapes, .*\.py"):
        parsed("--config=shapez", "--prompt=a")


def test_an_installed_package_has_the_configs(tmp_path):
    """Built as it is installed, and run from elsewhere: by name, without a checkout."""
    build = ["setup.py", "-q", "build", f"--build-base={tmp_path / 'base'}", f"--build-lib={tmp_path / 'lib'}"]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    script = (
        "import referee_jax, sys; from referee_jax import config, sweep\n"
        "assert referee_jax.__file__.startswith(sys.argv[1]), referee_jax.__file__\n"
        "print(config.load('shapes').steps, config.load('clip').clamp, len(sweep.read('ablation')))\n"
    )
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["10", "straight_through", "12"], done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the config file cannot be read: No such file or directory: "),
        ("x = (", "the config file fails: '(' was never closed (mine.py, line 5)"),
        ("settings.stepz = 3", "stepz is not a setting; did you mean steps?"),
        ("settings.steps = 'a'", "the config file fails: TypeError: "),
        (
            "config.referee(rolle='a')",
            "the config file fails: referee.rolle is not a setting; did you mean referee.role?",
        ),
    ],
)
def test_mistakes_in_the_config_file(tmp_path, text, message):
    file = tmp_path / "mine.py"
    if text is not None:
        body = f"    settings = config.default()\n    {text}\n    return settings\n"
        file.write_text(f"from referee_jax import config\n\ndef get_config():\n{body}")
    with pytest.raises(CommandError) as caught:
        command("--prompt=a", path=file)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_program_fails_without_a_traceback(tmp_path):
    done = programs.command("referee_jax.run", "--config=configs/paper.py", "--config.sds.guidanse=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: sds.guidanse is not a setting; did you mean sds.guidance?\n"


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        ("evaluate", ["--benchmark=nothing"], "flag --benchmark=nothing: value should be one of"),
        ("sweep", ["--samples=0"], "flag --samples=0"),
        ("evaluate", ["--workdir=gs://bucket/run", "--benchmark=shapes"], "is in a bucket: copy it down first"),
        ("score", ["--nothing=1"], "Unknown command line flag 'nothing'"),
        ("bench", ["--config=configs/shapes.py", "--config.sds.guidanse=3"], "sds.guidanse is not a setting; did you mean"),
        ("bench", ["--batches=0"], "--batches=0: numbers of images are needed"),
        ("benchmarks.methods", ["--config=nothing.py"], "the config file cannot be read: No such file"),
        ("shapes.train", [], "Flag --network must have a value other than None"),
        ("shapes.train", ["--network=clip", "more"], "unexpected argument 'more'"),
        ("score", ["cat.png"], "unexpected argument 'cat.png'; texts are given with --text"),
        ("gallery", ["one", "two"], "unexpected argument 'two'"),
        ("gallery", [], "name one run directory"),
        ("sweep", ["--sweep=tests/fakes.py", "--workdir=nowhere"], "fakes.py' fails: it has no function get_config"),
        ("run", ["--config=configs/shapes.py", "--prompt=a", "--distributed"], "JAX finds no job that this process belongs to"),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence(program, arguments, said):
    done = programs.command(f"referee_jax.{program}", *arguments)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") <= 3, done.stderr


COMMANDS = ("run", "score", "evaluate", "sweep", "bench", "doctor", "gallery", "benchmarks.methods", "weights.lavis")


@pytest.mark.parametrize("module", COMMANDS)
def test_an_interrupt_while_a_command_starts_is_a_line(tmp_path, module):
    """In the middle of the first import that takes long, which here takes for ever, and loses exceptions."""
    (tmp_path / "jax.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    line = [sys.executable, "-m", f"referee_jax.{module}", "--help"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_interrupted_command_is_a_line(capsys):
    def work():
        raise KeyboardInterrupt

    assert cli.tell(work) == 130 and capsys.readouterr().err == "interrupted\n"


def test_only_a_command_of_the_package_is_guarded(monkeypatch):
    """Who imports it has their own ways with signals."""
    before = signal.getsignal(signal.SIGINT)
    try:
        for argv, orig, is_guarded in (
            (["-m", "x"], ["python", "-m", "referee_jax.run", "x"], True),
            (["-m"], ["python", "-mreferee_jax.score"], True),
            (["-m"], ["python", "-m", "pytest"], False),
            (["/x/pytest/__main__.py"], ["python", "-m", "pytest", "referee_jax.run"], False),
            (["mine.py"], ["python", "mine.py"], False),
        ):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            monkeypatch.setattr(sys, "argv", argv)
            monkeypatch.setattr(sys, "orig_argv", orig)
            interrupts.guard()
            assert (signal.getsignal(signal.SIGINT) is interrupts.leave) == is_guarded
            interrupts.release()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_help_is_no_mistake():
    done = programs.command("referee_jax.sweep", "--helpshort")
    assert "--vary" in done.stdout and "Traceback" not in done.stderr
