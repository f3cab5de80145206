"""The doctor: what it says of a machine that is well, and of each thing that can be wrong, the remedy beside it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import fsspec
import huggingface_hub
import jax
import pytest
from huggingface_hub import errors

from referee_jax import config, doctor
from referee_jax.hardware import devices
from referee_jax.storage import run_directory
from referee_jax.weights import hub
from tests import programs

ROOT = pathlib.Path(__file__).parents[2]
SHAPES = f"--config={ROOT / 'configs' / 'shapes_clip.py'}"


def command(*arguments):
    found, findings = doctor.read_command(["doctor", SHAPES, *arguments])
    assert not [x for x in findings if x.remedy], findings
    return found


def test_a_healthy_machine(tmp_path):
    """The program itself: nothing is wrong, exit code 0, and nothing is left in the run directory."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "referee_jax.doctor", SHAPES, f"--workdir={tmp_path / 'new'}", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["ok"], done.stdout
    names = [finding["name"] for finding in said["findings"]]
    assert {
        "config",
        "versions",
        "devices",
        "step",
        "cache",
        "workdir",
        "disk",
        "clock",
        "prompts",
        "checkpoint",
    } <= set(names)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_config_does_not_hide_the_rest():
    done = programs.command("referee_jax.doctor", SHAPES, "--config.sds.guidanc=3")
    assert done.returncode == 1
    assert (
        "wrong  config: sds.guidanc is not a setting; did you mean sds.guidance?\n       -> correct it" in done.stdout
    )
    assert "ok     step: a small program is compiled" in done.stdout and done.stdout.endswith("things are wrong\n")


def test_old_packages(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda name: ["numpy>=99", "jax>=0.1", "torch>=99; extra == 'x'"]
    )
    (found,) = doctor.versions(None)
    assert found.remedy == "pip install 'numpy>=99'" and f"jax {run_directory.versions()['jax']}" in found.text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Unable to initialize backend 'cuda'\nand more"), "Unable to initialize backend 'cuda'"),
        (AssertionError(), "JAX has no device to compute on"),
    ],
)
def test_no_device_and_an_unused_one(error, said, monkeypatch, tmp_path):
    def broken():
        raise error

    monkeypatch.setattr(jax, "local_devices", broken)
    (found,) = doctor.device(None)
    assert said in found.text and "JAX_PLATFORMS" in found.remedy
    assert len(doctor.examine(command(f"--workdir={tmp_path}"))) > 6  # the rest is looked at all the same
    monkeypatch.undo()
    assert doctor.device(None)[0].remedy == ""
    unused = devices.DeviceError("this machine has an NVIDIA GPU, but JAX does not use it")
    monkeypatch.setattr(devices, "choose", fail(unused))
    (found,) = doctor.device(None)
    assert found.text == str(unused) and "extra" in found.remedy
    asked = []
    monkeypatch.setattr(devices, "choose", asked.append)
    doctor.device(command("--device=cpu"))
    assert asked == ["cpu"]


def test_the_cache(tmp_path, monkeypatch):
    def found(place):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(place))
        jax.config.update("jax_enable_compilation_cache", True)
        try:
            return doctor.cache(None)[0]
        finally:
            jax.config.update("jax_enable_compilation_cache", False)
            jax.config.update("jax_compilation_cache_dir", None)

    tmp_path.chmod(0o700)
    assert found(tmp_path).remedy == "" and str(tmp_path) in found(tmp_path).text
    tmp_path.chmod(0o777)
    assert "others can write" in found(tmp_path).text and found(tmp_path).remedy
    assert found("/proc/cache").remedy


def test_the_price():
    """Of the shapes config, whose weights are some 10 million numbers; of none, nothing."""
    (found,) = doctor.price(command())
    assert re.search(r"[\d.]+ TFLOP for an iteration of an image", found.text) and "8 images at once" in found.text
    assert found.remedy == "" and doctor.price(None) == []
    (found,) = doctor.price(command("--config.referees[0].image_size=32"))
    assert "image_size = 32, but it reads" in found.text and found.remedy


def test_the_run_directory(monkeypatch, tmp_path):
    well = {x.name: x for x in doctor.workdir(command(f"--workdir={tmp_path / 'run'}"))}
    assert not any(x.remedy for x in well.values()) and not (tmp_path / "run").exists()
    (found,) = doctor.workdir(command("--workdir=/proc/run"))
    assert "/proc cannot be written" in found.text and found.remedy
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    disk = {x.name: x for x in doctor.workdir(command(f"--workdir={tmp_path}"))}["disk"]
    assert disk.text.startswith("1.0 GB free") and disk.remedy
    now = time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: now + 3600)
    clock = {x.name: x for x in doctor.workdir(command(f"--workdir={tmp_path}"))}["clock"]
    assert "behind" in clock.text and "NTP" in clock.remedy


def test_a_bucket(monkeypatch):
    """Can it be written, and does its clock agree; what cannot be reached is told with the remedy."""
    asked = command("--workdir=memory://doctor/run")
    assert asked.workdir == "memory://doctor/run"
    assert [(x.name, x.remedy) for x in doctor.workdir(asked)] == [("workdir", ""), ("clock", "")]
    assert not fsspec.filesystem("memory").find("/doctor")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100)
    assert "NTP" in doctor.workdir(asked)[1].remedy

    def forbidden(*args, **kwargs):
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", forbidden)
    (found,) = doctor.workdir(asked)
    assert "403" in found.text and "the right to write" in found.remedy
    (found,) = doctor.workdir(command("--workdir=nothing://bucket/run"))
    assert "nothing" in found.text and found.remedy


def test_prompts():
    (found,) = doctor.prompts_of(command("--prompt=a", "--prompt= "))
    assert found.text.startswith("1 of 2 can be used; --prompt 2: blank") and not found.remedy
    assert doctor.prompts_of(command("--prompt= "))[0].remedy


class Api:
    """A hub that answers as `answer` does."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self):
        return self

    def model_info(self, name, revision, timeout):
        return self.answer()

    def auth_check(self, name):
        return self.answer()


def fail(error):
    def raises(*_):
        raise error

    return raises


def ask_hub(monkeypatch, answer):
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.5)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api(answer))
    begun = time.monotonic()
    found = doctor.checkpoint("someone/network", "")
    assert time.monotonic() - begun < 5
    return found


def test_the_hub(monkeypatch):
    assert ask_hub(monkeypatch, lambda: None) == ("someone/network is not here; the Hugging Face hub has it", "")
    text, remedy = ask_hub(monkeypatch, fail(ConnectionError("no route\nto host")))
    assert text.endswith("does not answer: no route") and "hf download someone/network" in remedy
    text, remedy = ask_hub(monkeypatch, lambda: time.sleep(60))
    assert text.endswith("does not answer: nothing in 0.5 s") and remedy
    missing = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    text, remedy = ask_hub(monkeypatch, fail(missing))
    assert text == "someone/network is not here; nor on the hub" and "correct the name" in remedy
    gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
    text, remedy = ask_hub(monkeypatch, fail(gated))
    assert text == "someone/network is not here; the hub gives someone/network to those who accept its terms"
    assert remedy.startswith("accept them at https://") and "hf auth login" in remedy
    revision = errors.RevisionNotFoundError.__new__(errors.RevisionNotFoundError)
    text, remedy = ask_hub(monkeypatch, fail(revision))
    assert "has no revision" in text and remedy.endswith("/commits/main")


def test_checkpoints_offline():
    """The tests are offline (HF_HUB_OFFLINE)."""
    assert [x.remedy for x in doctor.checkpoints(command())] == ["", "", ""]
    text, remedy = doctor.checkpoint("someone/network", "")
    assert "(HF_HUB_OFFLINE)" in text and remedy.startswith("unset HF_HUB_OFFLINE")
    assert doctor.checkpoint("/nowhere/clip", "") == (
        "/nowhere/clip is not here", "correct the path, or make the checkpoint as the config's docstring says",
    )  # fmt: skip
    assert doctor.checkpoint("shapes/nothing", "")[1]
    assert [x.remedy for x in doctor.checkpoints(None)] == [""]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("stable-diffusion", "tokenizer/merges.txt"),
        ("stable-diffusion", "unet/diffusion_pytorch_model.safetensors"),
        ("stable-diffusion", "vae/config.json"),
        ("stable-diffusion", "scheduler/scheduler_config.json"),
        ("clip", "merges.txt"),
        ("clip", "model.safetensors"),
        ("clip", "preprocessor_config.json"),
    ],
)
def test_a_checkpoint_without_a_part(name, file, tmp_path):
    """It is named, with the file; whole, nothing is wrong."""
    directory = shutil.copytree(hub.ASSETS / name, tmp_path / name)
    setting = "generator" if name == "stable-diffusion" else "referees[0]"
    asked = command(f"--config.{setting}.checkpoint={directory}")
    assert not any(x.remedy for x in doctor.checkpoints(asked))
    (directory / file).unlink()
    (found,) = [x for x in doctor.checkpoints(asked) if x.remedy]
    assert found.text.startswith(f"{directory} is here, but ") and pathlib.Path(file).name in found.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compile-for=v5e:2x4"], "--compile-for needs --config"),
        (["--compile-for=h100:8", SHAPES], "'h100:8' is no slice, as v5e:16x16 or v4:4x4x4 are"),
        (["--compile-for=v5e:2x4", SHAPES, "--config.steps=0"], "steps = 0 is not possible"),
    ],
)
def test_compile_for_refuses(arguments, said):
    done = programs.command("referee_jax.doctor", *arguments)
    assert done.returncode == 1 and said in done.stdout and "Traceback" not in done.stderr


def test_a_command_is_that_of_run(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    found = command(f"--prompts={tmp_path / 'prompts.txt'}", "--samples=3", f"--workdir={tmp_path}")
    assert len(found.entries) == 2 and found.settings.samples == 3 and found.workdir == tmp_path
    assert isinstance(found.settings, config.Settings)
    assert doctor.read_command(["doctor"]) == (None, [])
