"""The command: what it makes and what it refuses, and that an interrupted run loses nothing."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from referee_jax import config, run
from referee_jax import items as items_lib
from referee_jax.items import Item
from referee_jax.runs import job, worker
from referee_jax.storage import images
from referee_jax.storage import run_directory as run_directory_lib
from referee_jax.weights import convert, hub
from tests.fakes import ROOT, FakeInverter, colours, command, execute, lines, pixels, shown


def test_reward_hacking_is_told(tmp_path, capsys):
    (tmp_path / "with_held_out.py").write_text(
        "from referee_jax import config\n"
        "def get_config():\n"
        "    settings = config.default()\n"
        "    matching = config.referee(name='blip2', checkpoint='shapes/blip2', role='held_out', losses={'itm': 1.0})\n"
        "    settings.referees = (*settings.referees, matching)\n"
        "    return settings\n"
    )
    workdir, prompts = tmp_path / "run", ("--prompt=one", "--prompt=hacked one")
    execute(*prompts, f"--workdir={workdir}", path=tmp_path / "with_held_out.py")
    flagged = [line for line in lines(workdir / "metadata.jsonl") if line.get("hacked")]
    assert [line["text"] for line in flagged] == ["hacked one"]
    assert lines(workdir / "log.jsonl")[-1]["hacked"] == [flagged[0]["id"]]
    out = capsys.readouterr().out
    assert "pleases the referees more than its start did, and the held-out ones doubt it (1 of 2 images" in out
    assert flagged[0]["id"] in out


def test_a_chunk_is_the_mean_of_what_there_is(tmp_path):
    """A held-out loss is there in the iterations of a look alone."""
    run_directory = run_directory_lib.RunDirectory.open(tmp_path, config.from_config({}))
    nan = float("nan")
    looked = np.array([[nan, 1.0, nan, 2.0], [nan, nan, nan, nan]], np.float32)
    worker.log_chunk(run_directory, items_lib.expand(["one", "two"], 1), 4, {"held_out/loss": looked})
    assert lines(tmp_path / "log.jsonl")[-1]["metrics"] == {"held_out/loss": [1.5, None]}


def test_a_run(tmp_path, capsys):
    work = tmp_path / "run"
    code, engine = execute("--prompt=one", "--prompt=two", "--samples=2", "--seed=5", f"--workdir={work}")
    assert code == 0
    assert [len(batch) for batch in engine.begun] == [3, 1]
    records = lines(work / "metadata.jsonl")
    assert [(x["text"], x["sample"], x["seed"]) for x in records] == [
        ("one", 0, 5), ("one", 1, 5), ("two", 0, 5), ("two", 1, 5),
    ]  # fmt: skip
    assert all((work / x["file_name"]).is_file() for x in records)
    assert (work / "contact_sheet.png").is_file() and (work / "gallery.html").is_file()
    chunks = [x for x in lines(work / "log.jsonl") if x["event"] == "chunk"]
    assert [(len(x["items"]), x["step"]) for x in chunks] == [(3, 10), (3, 20), (3, 25), (1, 10), (1, 20), (1, 25)]
    assert chunks[2]["metrics"] == {"loss": [22.0] * 3, "norm": [None] * 3}
    assert chunks[3]["items"] == [Item("two", 1).id]
    out, err = capsys.readouterr()
    told = out.splitlines()
    assert told[1] == "compiling for fake x 1, 3 images at once"
    assert sum("compiling" in line for line in told) == 1
    work = "1.5 TFLOP for an image, 6 TFLOP for all 4; 2 MB of weights, 3 GB for a batch"
    assert told[2] == f"{work}; at least 0.00761 s an image on TPU v5e"
    assert told[3].startswith("4/4 images, 100/100 steps")  # a line now and then, and the last
    assert re.match(r"4 images done, 0 prompts skipped, \d+ s; see .*contact_sheet\.png and gallery\.html$", told[-1])
    assert len(told) == 5 and not err


def test_a_run_of_a_table(tmp_path):
    """A row's seed decides its image, its id the name; other columns come out; more samples go on."""
    table = [
        {"id": "x1", "prompt": "one", "seed": 7, "kind": "number"},
        {"id": "x2", "prompt": "one", "samples": 2},
        {"prompt": "one"},
        {"id": "x1", "prompt": "two"},
        {"prompt": "far too long", "negative": "none"},
    ]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, table)))
    code, _ = execute(f"--prompts={tmp_path / 'table.jsonl'}", "--seed=5", f"--workdir={tmp_path / 'run'}")
    records = {x["id"]: x for x in lines(tmp_path / "run" / "metadata.jsonl")}
    named = Item("one", 0).id
    assert code == 0 and {name: x["seed"] for name, x in records.items()} == {"x1": 7, "x2": 5, "x2-s001": 5, named: 5}
    assert [x.get("columns") for x in records.values()] == [{"kind": "number"}, None, None, None]
    seen = colours(tmp_path / "run")
    execute("--prompt=one", "--seed=7", f"--workdir={tmp_path / 'seven'}")
    assert seen["x1.png"] == colours(tmp_path / "seven")[f"{named}.png"] != seen["x2.png"] == seen[f"{named}.png"]
    skipped = [x for x in lines(tmp_path / "run" / "log.jsonl") if x["event"] == "skipped"]
    assert [x["reason"] for x in skipped] == [
        "its id 'x1' is that of line 1 of table.jsonl",
        "99 tokens, the prior reads 77",
    ]
    again = [f"--prompts={tmp_path / 'table.jsonl'}", "--seed=5", f"--workdir={tmp_path / 'run'}"]
    assert execute(*again)[1].begun == []  # what no network reads is asked again, and nothing made
    assert [item.id for part in execute(*again, "--samples=3")[1].begun for item in part] == [
        "x1-s001", "x1-s002", Item("one", 1).id, Item("one", 2).id,
    ]  # fmt: skip


def test_done_is_done(tmp_path, capsys):
    arguments = "--prompt=one", "--samples=2", f"--workdir={tmp_path}"
    execute(*arguments)
    before = pixels(tmp_path)
    code, engine = execute(*arguments)
    assert (code, engine) == (0, None)  # nothing is loaded where nothing is to be made
    assert "2 of 2 images are there already" in capsys.readouterr().out
    code, engine = execute("--prompt=zero", "--prompt=one", "--samples=3", f"--workdir={tmp_path}")
    assert [item.id for item in engine.begun[0]] == [Item("zero", n).id for n in range(3)]
    assert engine.begun[1] == (Item("one", 2),)
    assert before.items() <= pixels(tmp_path).items() and len(pixels(tmp_path)) == 6


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("call", [1, 4, 6])
def test_interrupted_and_continued(tmp_path, capsys, failure, call):
    arguments = "--prompt=one", "--prompt=two", "--samples=2"
    execute(*arguments, f"--workdir={tmp_path / 'whole'}")
    work = tmp_path / "cut"
    code, _ = execute(*arguments, f"--workdir={work}", failures={call: failure})
    assert code == (130 if failure is KeyboardInterrupt else 1)
    err = capsys.readouterr().err
    assert err.endswith(f"the finished images are in {work}, and the same command continues\n") and err.count("\n") == 1
    assert len(pixels(work)) == len(lines(work / "metadata.jsonl") if call > 3 else []) == (3 if call > 3 else 0)
    code, engine = execute(*arguments, f"--workdir={work}")
    assert code == 0 and sum(map(len, engine.begun)) == (1 if call > 3 else 4)
    assert len(colours(work)) == 4 and colours(work) == colours(tmp_path / "whole")


def test_bad_prompts_are_skipped_with_a_reason(tmp_path, capsys):
    file = tmp_path / "list.txt"
    file.write_bytes(b"a cat\n\ncaf\xe9\na dog\na cat\ntoo long\nbroken\n")
    work = tmp_path / "run"
    code, _ = execute(f"--prompts={file}", "--prompt=a bird", f"--workdir={work}")
    assert code == 0
    assert [x["text"] for x in lines(work / "metadata.jsonl")] == ["a cat", "a dog", "broken", "a bird"]
    assert [x["status"] for x in lines(work / "metadata.jsonl")] == ["done", "done", "nonfinite", "done"]
    skipped = [x for x in lines(work / "log.jsonl") if x["event"] == "skipped"]
    assert [(x["where"], x["reason"]) for x in skipped] == [
        ("line 2 of list.txt", "blank"),
        ("line 3 of list.txt", "not UTF-8"),
        ("line 5 of list.txt", "the same as line 1 of list.txt"),
        ("prompt", "99 tokens, the prior reads 77"),
    ]
    out, err = capsys.readouterr()
    assert "4 images done (1 of them not finite), 4 prompts skipped" in out
    assert err.splitlines()[-1] == "skipped prompt ('too long'): 99 tokens, the prior reads 77"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt= "], "no prompt can be used; --prompt 1: blank"),
        (["--prompt=too long"], "no prompt can be used; prompt ('too long'): 99 tokens, the prior reads 77"),
    ],
)
def test_no_prompt_is_left(tmp_path, capsys, arguments, message):
    code, _ = execute(*arguments, f"--workdir={tmp_path}")
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_other_settings_are_refused_before_weights_are_loaded(tmp_path, capsys):
    execute("--prompt=one", f"--workdir={tmp_path}")
    code, engine = execute("--prompt=two", "--config.sds.guidance=5", f"--workdir={tmp_path}")
    assert (code, engine) == (2, None)
    assert capsys.readouterr().err == (
        f"error: {tmp_path} was begun with other settings; choose another --workdir, go on with these by --resume=force, or "
        "take back:\nsds.guidance: 30.0 -> 5.0\n"
    )


def test_what_else_may_become_of_a_run_directory(tmp_path, capsys):
    """By force it goes on with other settings, which are then its own, and what is there stays; or it is left alone."""
    execute("--prompt=one", f"--workdir={tmp_path}")
    before = pixels(tmp_path)
    changed = "--prompt=one", "--prompt=two", "--config.sds.guidance=5", f"--workdir={tmp_path}"
    assert execute(*changed, "--resume=never")[0] == 2
    assert "is a run already, and --resume=never" in capsys.readouterr().err
    code, engine = execute(*changed, "--resume=force")
    assert code == 0 and engine.begun == [(Item("two", 0),)]
    assert before.items() <= pixels(tmp_path).items() and len(pixels(tmp_path)) == 2
    events = [x for x in lines(tmp_path / "log.jsonl") if x["event"] == "settings"]
    assert [x["changes"] for x in events] == [["sds.guidance: 30.0 -> 5.0"]]
    assert execute(*changed)[0] == 0 and execute("--prompt=one", f"--workdir={tmp_path}")[0] == 2


def test_weights_that_cannot_be_loaded(tmp_path, capsys):
    def load(settings):
        raise convert.WeightsError("x/config.json is missing")

    assert run.main(command("--prompt=one", f"--workdir={tmp_path}"), load=load) == 2
    assert capsys.readouterr().err == "error: x/config.json is missing\n"


def test_a_misspelt_checkpoint_binds_no_directory(tmp_path, capsys):
    """The right one in the same place, and weights that were put right, make the images."""
    clip = tmp_path / "clip" / "model.safetensors"
    clip.parent.mkdir()
    clip.write_bytes(b"half")

    def load(settings):
        if settings.generator.checkpoint == "misspelt" or clip.read_bytes() == b"half":
            raise convert.WeightsError("it cannot be loaded")
        return FakeInverter(settings)

    asked = "--prompt=one", f"--workdir={tmp_path / 'run'}", f"--config.referees[0].checkpoint={clip.parent}"
    assert run.main(command(*asked, "--config.generator.checkpoint=misspelt"), load=load) == 2
    assert run.main(command(*asked), load=load) == 2
    clip.write_bytes(b"whole")
    assert run.main(command(*asked), load=load) == 0
    assert capsys.readouterr().err == "error: it cannot be loaded\n" * 2
    assert run.main(command(*asked, "--config.generator.checkpoint=misspelt"), load=load) == 2
    assert "was begun with other settings" in capsys.readouterr().err


def test_a_run_goes_on_with_the_commits_that_it_began_with(tmp_path, monkeypatch):
    """Whatever has become of the checkpoints on the hub meanwhile; a revision in the config stays what it is."""
    loaded, newest = [], "a" * 40

    def load(settings):
        loaded.append((settings.generator.revision, settings.referees[0].revision))
        return FakeInverter(settings)

    monkeypatch.setattr(hub, "commit", lambda name, revision: revision or newest)
    asked = [f"--workdir={tmp_path}", "--config.referees[0].revision=v1"]
    assert run.main(command("--prompt=one", *asked), load=load) == 0
    newest = "b" * 40
    assert run.main(command("--prompt=two", *asked), load=load) == 0
    assert run.main(command("--prompt=3", "--config.sds.guidance=1", "--resume=force", *asked), load=load) == 0
    assert loaded == [("", "v1"), ("a" * 40, "v1"), ("a" * 40, "v1")]
    commits = json.loads((tmp_path / "config.json").read_text())["commits"]
    assert commits == {config.Settings().generator.checkpoint: "a" * 40}


def test_a_run_goes_on_with_the_weights_that_it_began_with(tmp_path, capsys):
    """Those of a directory are no part of the settings; by force it goes on with others, which are then its own."""
    weights = tmp_path / "clip" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"as they were")
    asked = [f"--workdir={tmp_path / 'run'}", f"--config.referees[0].checkpoint={weights.parent}"]
    assert execute("--prompt=one", *asked)[0] == 0
    weights.write_bytes(b"as they are.")
    assert execute("--prompt=two", *asked)[0] == 2
    message = (
        f"was begun with other files in {weights.parent}; choose another --workdir, go on with these by --resume=force"
    )
    assert message in capsys.readouterr().err
    assert execute("--prompt=two", "--resume=force", *asked)[0] == execute("--prompt=three", *asked)[0] == 0
    assert len(pixels(tmp_path / "run")) == 3


def test_users_questions(tmp_path, capsys):
    """They are asked where a referee asks some; an image that was made with others is not left beside its prompt."""
    file = tmp_path / "prompts.jsonl"
    config_file = tmp_path / "mine.py"
    config_file.write_text(
        "from referee_jax import config\n\n\ndef get_config():\n    c = config.default()\n"
        "    c.referees = (config.referee(name='blip_vqa', losses={'vqa': 1.0}, questions=4),)\n    return c\n"
    )
    write = lambda *asked: file.write_text(json.dumps({"prompt": "a red cat", "questions": asked}))
    write("Is it red?", "Is it a cat?")
    arguments = f"--prompts={file}", f"--workdir={tmp_path / 'run'}"
    code, engine = execute(*arguments, path=config_file)
    assert code == 0 and [atom.question for atom in engine.questions["a red cat"]] == ["Is it red?", "Is it a cat?"]
    assert "questions" not in lines(tmp_path / "run" / "metadata.jsonl")[0]  # a fake engine gives no answers
    journal = tmp_path / "run" / "metadata.jsonl"
    record = lines(journal)[0] | {
        "questions": {"referee_0": [{"question": "Is it red?", "answer": "yes", "probability": 0.5}]}
    }
    journal.write_text(json.dumps(record) + "\n")
    assert execute(*arguments, path=config_file)[0] == 0
    write("Is it blue?")
    assert execute(*arguments, path=config_file)[0] == 2
    assert "has an image of 'a red cat' with other questions, 'Is it red? yes'; choose" in capsys.readouterr().err
    assert execute(*arguments, "--resume=force", path=config_file)[0] == 0
    write(["Is it red?", "no"])  # another answer
    assert execute(*arguments, path=config_file)[0] == 2
    file.write_text(json.dumps({"prompt": "a red cat"}))  # by the parser: whether there is a cat
    assert execute(*arguments, "--samples=2", path=config_file)[0] == 2
    assert "has an image of 'a red cat' with other questions" in capsys.readouterr().err
    write("Is it red?")
    capsys.readouterr()
    assert execute(f"--prompts={file}", f"--workdir={tmp_path / 'plain'}")[0] == 0
    assert "the questions of 1 prompts are not asked" in capsys.readouterr().out


def test_a_run_notes_licenses(tmp_path):
    """Of what others made, in config.json and on the page, where their cards say."""
    card = tmp_path / "clip" / "README.md"
    card.parent.mkdir()
    card.write_text("---\nlicense: other\nlicense_name: <b>mine</b>\n---\n# CLIP\n")
    asked = [f"--workdir={tmp_path / 'run'}", f"--config.referees[0].checkpoint={card.parent}"]
    for prompt in ("one", "two"):
        assert run.main(command(f"--prompt={prompt}", *asked), load=FakeInverter) == 0
    licenses = json.loads((tmp_path / "run" / "config.json").read_text())["licenses"]
    assert licenses == {str(card.parent): "<b>mine</b>"}
    page = (tmp_path / "run" / "gallery.html").read_text()
    assert "&lt;b&gt;mine&lt;/b&gt;" in page and "<b>mine" not in page


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_stop_is_obeyed_after_the_chunk(tmp_path, capsys, call):
    """What is in flight is saved, and goes on in the middle; only a batch that is at its end is finished first."""
    arguments = [f"--prompt={n}" for n in range(4)]
    stop = worker.Stop()
    end = lambda: setattr(stop, "number", signal.SIGTERM)
    code, engine = execute(*arguments, f"--workdir={tmp_path / 'cut'}", failures={call: end}, stop=stop)
    assert code == 143 and engine.calls == call
    assert capsys.readouterr().err.endswith("and the same command continues\n")
    assert len(pixels(tmp_path / "cut")) == (3 if call > 2 else 0)
    code, engine = execute(*arguments, f"--workdir={tmp_path / 'cut'}")
    names = [Item(str(n), 0) for n in range(4)]
    resumed = {1: [(tuple(names[:3]), 10)], 2: [(tuple(names[:3]), 20)], 3: [], 4: [(tuple(names[3:]), 10)]}[call]
    assert code == 0 and engine.resumed == resumed
    assert sum(map(len, engine.begun)) == 4 - (3 if call > 2 else 0) - sum(len(items) for items, _ in resumed)
    execute(*arguments, f"--workdir={tmp_path / 'whole'}")
    assert colours(tmp_path / "cut") == colours(tmp_path / "whole")
    assert not (tmp_path / "cut" / "checkpoints").exists()


@pytest.mark.parametrize("form", ["webp", "webdataset"])
@pytest.mark.parametrize("call", [1, 4, 6])
def test_other_formats_lose_nothing_either(tmp_path, form, call):
    arguments = *(f"--prompt={n}" for n in range(5)), f"--config.outputs.format={form}", "--config.outputs.shard_size=2"
    execute(*arguments, f"--workdir={tmp_path / 'whole'}")
    work = tmp_path / "cut"
    code, _ = execute(*arguments, f"--workdir={work}", failures={call: OSError(5, "Input/output error")})
    assert code == 1 and len(shown(work)) == (3 if call > 3 else 0)
    code, engine = execute(*arguments, f"--workdir={work}")
    assert code == 0 and sum(map(len, engine.begun)) == (2 if call > 3 else 5)
    assert len(shown(work)) == 5 and shown(work) == shown(tmp_path / "whole")
    assert (work / "contact_sheet.png").is_file()
    assert [x.name for x in (work / ("images" if form == "webdataset" else "shards")).glob("*")] == []


def test_trajectories(tmp_path):
    execute("--prompt=one", "--config.outputs.trajectory=True", f"--workdir={tmp_path}")
    with Image.open(tmp_path / "trajectories" / f"{Item('one', 0).id}.webp") as image:
        assert (image.n_frames, image.size) == (3, (8, 8))


def test_a_progress_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    execute("--prompt=one", f"--workdir={tmp_path}")
    err = capsys.readouterr().err
    assert "1/1 images" in err and "25/25" in err and "loss 22" in err
    assert "nan" not in err  # of what was not measured nothing is shown


def test_a_batch_is_no_larger_than_what_there_is_to_make(tmp_path):
    """A size that is set is so for all of a command, so that one that goes on has the same programs; a chosen one for what
    is missing. Devices of a CPU share the batch; others have one each."""

    def size(count, missing, *, batch_size=8, split=1, groups=1, at_once=8):
        asked = command("--prompt=a", f"--config.batch_size={batch_size}", f"--workdir={tmp_path}")
        engine = FakeInverter(asked.settings).at_once(at_once)
        engine.groups = groups
        return job.fitted(engine, dataclasses.replace(asked, split=split), count, missing).settings.batch_size

    assert [size(20, 3), size(5, 3), size(5, 5), size(1, 1)] == [8, 5, 5, 1]
    assert [size(20, 3, batch_size=0), size(20, 20, batch_size=0)] == [3, 8]
    assert [size(20, 20, split=2, groups=2), size(5, 5, split=2, groups=2), size(1, 1, split=2, groups=2)] == [4, 3, 1]
    assert [size(20, 20, groups=2), size(5, 5, groups=2)] == [8, 3]


@pytest.mark.parametrize(
    ("flags", "split"),
    [
        (("--prompt=a", "--prompt=b", "--samples=2"), (4, True)),
        (("--prompt=a", "--samples=2", "--shard_count=2"), (1, True)),
        (("--prompt=a", "--samples=100"), (8, True)),
        (("--prompt=a", "--samples=2", "--config.generator.checkpoint=some/model"), (2, False)),
        (("--prompt=a", "--samples=2", "--config.mesh.prompt=1"), (2, False)),
        (("--prompt=a", "--samples=2", "--distributed"), (2, False)),
    ],
)
def test_what_a_cpu_is_split_for(flags, split, tmp_path):
    asked = command(*flags, f"--workdir={tmp_path}", path=ROOT / "configs" / "shapes.py")
    assert (asked.at_once, asked.fits_a_core) == split


@pytest.mark.parametrize("init", ["noise", "sample"])
def test_a_first_look_comes_before_the_first_image(tmp_path, capsys, init):
    """At the start, where that is a picture, or after the first chunk; it goes with the first batch."""
    looks = []
    asked = f"--config.init={init}", "--prompt=one", "--prompt=two", "--samples=2", f"--workdir={tmp_path}"
    preview = tmp_path / "preview.png"
    see = lambda: looks.append(preview.exists() and Image.open(preview).size)
    execute(*asked, failures={n: see for n in range(1, 7)})
    width = 12 + 3 * (192 + 12)  # three pictures
    assert [look and look[0] for look in looks] == [
        width if init == "sample" else False,
        width,
        width,
        False,
        False,
        False,
    ]
    assert not preview.exists() and f"a first look will be in {preview}\n" in capsys.readouterr().out
    preview.touch()  # of a process that was killed, whose images others have made
    execute(*asked)
    assert not preview.exists()
    execute(*asked, "--prompt=three")
    assert "first look" not in capsys.readouterr().out


def test_outputs_are_what_the_engine_gave(tmp_path):
    execute("--prompt=one", "--seed=5", "--config.outputs.stretch=False", f"--workdir={tmp_path}")
    name = Item("one", 0).id
    assert colours(tmp_path)[f"{name}.png"] == tuple(hashlib.sha256(b"one 0 5").digest()[:3])
    assert images.read_settings(tmp_path / "images" / f"{name}.png")["settings"]["steps"] == 25


def test_estimate_needs_no_prompts_weights_or_directory(tmp_path):
    """The whole command in a process of its own, where there is neither a checkpoint nor a network."""
    arguments = [
        "-m",
        "referee_jax.run",
        f"--config={ROOT / 'configs' / 'shapes_clip.py'}",
        "--estimate",
        "--config.prompts=()",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("denoiser", "clip: forward + backward", "each image at once", "TPU v5e"):
        assert word in done.stdout
    assert not any(tmp_path.iterdir())


def test_an_estimate_that_cannot_be_made_is_a_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    asked = command("--estimate", f"--config.referees[0].checkpoint={tmp_path}", f"--workdir={tmp_path / 'run'}")
    assert run.main(asked, work=run.estimate) == 2
    assert "preprocessor_config.json is missing" in capsys.readouterr().err and not (tmp_path / "run").exists()


OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much")


def test_a_warmup_halves_as_a_run_does(tmp_path, capsys):
    engines = []
    load = lambda settings: engines.append(FakeInverter(settings, {1: OUT_OF_MEMORY})) or engines[-1]
    assert run.main(command("--warmup", f"--workdir={tmp_path / 'run'}"), load=load, work=job.warm_up) == 0
    assert engines[0].batch_size == 1
    assert "the device's memory is too small, going on with --config.batch_size=1" in capsys.readouterr().out


def test_a_warmup_compiles_what_a_share_runs(tmp_path, monkeypatch):
    """Of the usable prompts, and of this process's alone; and of "guided" where its window begins."""
    counts, steps = [], []
    monkeypatch.setattr(job, "fitted", lambda engine, command, *count: counts.append(count) or engine)
    advance = FakeInverter.advance
    monkeypatch.setattr(FakeInverter, "advance", lambda self, batch: steps.append(batch.step) or advance(self, batch))
    prompts = [f"--prompt={text}" for text in ("a", "b", "c", "d", "d", "")]
    asked = command(
        "--warmup", *prompts, "--samples=2", "--shard_index=1", "--shard_count=2", "--config.method=guided",
        "--config.steps=160", f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert run.main(asked, load=FakeInverter, work=job.warm_up) == 0
    levels = config.guided_levels(asked.settings)
    first = next(i for i, t in enumerate(levels) if t <= asked.settings.guided.high)
    assert counts == [(4, 4)] and 0 < first < 159 and first in steps


def test_warmup_compiles_and_writes_nothing(tmp_path, capsys):
    engines = []
    load = lambda settings: engines.append(FakeInverter(settings)) or engines[-1]
    asked = command("--warmup", "--seed=3", "--config.referee.stop=50", f"--workdir={tmp_path / 'run'}")
    before = jax.config.jax_compilation_cache_dir  # whoever runs the tests may have one
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert run.main(asked, load=load, work=job.warm_up) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    (engine,) = engines
    assert engine.calls == 2 and len(engine.begun) == 1 and not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    assert "compiled in 0 s" in out and "JAX_COMPILATION_CACHE_DIR names no directory" in out
