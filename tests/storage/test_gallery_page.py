"""The gallery page: complete, self-contained, and safe for any prompt."""

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from referee_jax import cli, config, gallery, items
from referee_jax.items import Item
from referee_jax.storage import gallery_page, run_directory
from tests import pages
from tests.storage.test_run_directory import SETTINGS, WITH_HELD_OUT, picture

MARKUP = [
    "</script>",
    "<script>",
    "<!--",
    "</textarea>",
    "</pre>",
    "</title>",
    "<img src=x onerror=y>",
    '"',
    "'",
    ">",
    "&lt;",
    "{{",
]
# Including lone surrogates, control characters and markup.
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=200),
    st.lists(st.one_of(st.sampled_from(MARKUP), st.text(max_size=3)), max_size=8).map("".join),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with one image."""
    directory = run_directory.RunDirectory.open(tmp_path_factory.mktemp("run") / "mine", SETTINGS, device="cpu x 1")
    directory.write(picture(), seconds=1.5)
    return directory


def read(run):
    return pages.Page((run.path / "gallery.html").read_text(encoding="utf-8"))


def open_image(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))


def test_what_the_page_shows(tmp_path):
    run = run_directory.RunDirectory.open(tmp_path / "mine", WITH_HELD_OUT, device="cpu x 1")
    run.write(picture(), seconds=1.5)
    losses = {"referee": (2.0, 1.0), "held_out": (0.5, 0.75)}
    row = {"question": "Is there a ring?", "kind": "object", "answer": "yes", "probability": 0.25}
    asked = {"referee_0": [row, row | {"probability": float("nan")}]}
    other = dataclasses.replace(
        picture("a blue ring", 2, losses=losses, questions=asked), scores={"cosine": float("nan"), "itm": 0.25}
    )
    run.write(other, seconds=2, frames=[np.zeros((16, 16, 3), np.uint8)] * 2)
    assert gallery_page.write(run, run.finished()) == run.path / "gallery.html"
    page = read(run)
    first, second = page.data["records"]
    thumbnail = first.pop("thumbnail")
    assert first == {
        "text": "a red circle",
        "sample": 0,
        "seed": 7,
        "scores": {"cosine": 0.125, "held_out": 0.5},
        "status": "done",
        "seconds": 1.5,
        "image": f"./images/{Item('a red circle', 0).id}.png",
    }
    # Small pictures are embedded without loss.
    original = Image.open(run.images / f"{Item('a red circle', 0).id}.png")
    np.testing.assert_array_equal(open_image(thumbnail).convert("RGB"), original)
    assert (second["scores"], second["status"], second["hacked"]) == ({"cosine": None, "itm": 0.25}, "nonfinite", True)
    assert second["losses"] == {"referee": [2.0, 1.0], "held_out": [0.5, 0.75]}
    assert second["questions"] == {"referee_0": [row, row | {"probability": None}]}
    assert second["trajectory"] == f"./trajectories/{other.item.id}.webp"
    assert page.data["scores"] == ["cosine", "held_out", "itm"]
    assert json.loads(page.texts["pre"]) == config.image_settings(WITH_HELD_OUT)
    assert (page.texts["title"], page.texts["h1"]) == ("mine", "mine")
    chosen = [attributes["value"] for tag, attributes, _ in page.elements if tag == "option" and "value" in attributes]
    assert chosen.count("scores.itm") == 2 and "hacked" in chosen  # to sort by, and to filter by
    assert ("body", {"class": "small"}) in page.skeleton


def test_nothing_is_asked_of_a_network(run):
    gallery_page.write(run, run.finished())
    page = read(run)
    named = [
        x for _, attributes, _ in page.elements for name, x in attributes.items() if name in ("src", "href", "action")
    ]
    assert named == []  # images are in the page, or are named in its data
    assert not re.search(r"https?:|//\w", page.texts["script"] + page.texts["style"])
    (policy,) = [x["content"] for _, x, _ in page.elements if x.get("http-equiv") == "Content-Security-Policy"]
    nonces = {nonce for tag, _, nonce in page.elements if tag in ("script", "style")}
    assert len(nonces) == 1 and f"script-src 'nonce-{nonces.pop()}'" in policy and "default-src 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy
    # Every element that the script names exists.
    ids = {attributes["id"] for _, attributes, _ in page.elements if "id" in attributes}
    assert set(re.findall(r'\$\("(\w+)"\)', page.texts["script"])) <= ids


def test_many_pictures_are_beside_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery_page, "EMBEDDED", 2)
    run = run_directory.RunDirectory.open(tmp_path, SETTINGS)
    for sample in range(3):
        run.write(picture(sample=sample), seconds=1)
        gallery_page.write(run, run.finished())
        records = read(run).data["records"]
        assert all(x["thumbnail"].startswith("data:") for x in records) == (sample < 2)
    assert all(x["thumbnail"] == x["image"] for x in records)
    # A lost image is not shown, and no temporary file is left.
    (run.images / f"{Item('a red circle', 0).id}.png").unlink()
    gallery_page.write(run, run.finished())
    assert [x["sample"] for x in read(run).data["records"]] == [1, 2]
    assert not list(run.path.glob(".*"))


def test_large_pictures_are_shrunk(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.full((200, 400, 3), 128, np.uint8)).save(file)
    assert open_image(gallery_page.thumbnail(file)).size == (256, 128)


@pytest.mark.parametrize(
    "name", ["javascript:alert(1)", "//evil.example/a", "data:text/html,x", 'a" onerror="x', "%2e"]
)
def test_a_link_stays_below_the_page(name):
    link = gallery_page._link(name)
    assert re.fullmatch(r"\./[A-Za-z0-9_.~/%-]*", link)


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
@settings(deadline=None, max_examples=100)
def test_no_text_is_markup(run, text, score, status):
    """Any text gives the elements and attributes of a harmless one, and is in the page's data."""
    (record,) = run.finished()
    hostile = record | {"text": text, "scores": {score: 0.5}, "status": status}
    page = pages.Page(gallery_page.page(run, [hostile]).encode("utf-8", "replace").decode())
    harmless = pages.Page(gallery_page.page(run, [record | {"scores": {"cosine": 0.5}}]))
    assert [tag for tag, _ in page.skeleton] == [tag for tag, _ in harmless.skeleton]
    assert [x.keys() for _, x in page.skeleton] == [x.keys() for _, x in harmless.skeleton]
    assert page.texts["script"] == harmless.texts["script"] and page.texts["style"] == harmless.texts["style"]
    (shown,) = page.data["records"]
    assert (shown["text"], shown["scores"], shown["status"]) == (text, {score: 0.5}, status)


def test_the_command(run, tmp_path, capsys):
    (run.path / "gallery.html").unlink(missing_ok=True)
    before = run.log_file.read_bytes()
    assert cli.tell(lambda: gallery.main(flags.FLAGS, str(run.path))) == 0
    assert capsys.readouterr().out == f"{run.path / 'gallery.html'}\n"
    assert read(run).data["records"][0]["text"] == "a red circle"
    assert run.log_file.read_bytes() == before  # the command starts no run: another process may be working


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "{} is not a run directory (no config.json that can be read)"),
        ("[]", "{} is not a run directory (no config.json that can be read)"),
        ('{"settings": {"stepz": 3}}', "stepz is not a setting; did you mean steps?"),
        (json.dumps({"settings": config.to_dict(SETTINGS)}), "{} holds no finished image"),
    ],
)
def test_mistakes(tmp_path, capsys, made, message):
    if made is not None:
        (tmp_path / "config.json").write_text(made)
    assert cli.tell(lambda: gallery.main(flags.FLAGS, str(tmp_path))) == 2
    assert capsys.readouterr().err == f"error: {message.format(tmp_path)}\n"


def test_images_in_shards(tmp_path, monkeypatch):
    """The first ones are in the page, with the number of the others; links go to the shard."""
    monkeypatch.setattr(gallery_page, "EMBEDDED", 2)
    settings = dataclasses.replace(SETTINGS, outputs=config.Outputs(format="webdataset"))
    directory = run_directory.RunDirectory.open(tmp_path, settings)
    with directory.writing() as writer:
        for item in items.expand(["one", "two", "three"], 1):
            writer.write(picture(item.prompt, item.sample), seconds=1.0)
    gallery_page.write(directory, directory.finished())
    assert "2 images of 2 prompts; 1 more are in the shards" in " ".join(
        directory.path.joinpath("gallery.html").read_text().split()
    )
    (shard,) = (tmp_path / "shards").glob("*.tar")
    records = read(directory).data["records"]
    assert [record["image"] for record in records] == [f"./shards/{shard.name}"] * 2
    assert all(record["thumbnail"].startswith("data:image/webp;base64,") for record in records)
