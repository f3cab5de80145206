"""Prompts as attackers write them, through a whole run: they stay in its directory, in their pages, and the run goes on."""

import contextlib
import io
import json
import re
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from referee_jax import console
from referee_jax.items import Item
from referee_jax.runs import prompt_file
from referee_jax.storage import contact_sheet, images
from tests import pages
from tests.fakes import execute, lines


def every_script() -> list[str]:
    """A letter of each script there is, twenty to a text."""
    letters = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Lu", "Ll", "Lo")]
    of_script = list({unicodedata.name(c, "?").split()[0]: c for c in letters}.values())
    assert len(of_script) > 150
    return [" ".join(of_script[n : n + 20]) for n in range(0, len(of_script), 20)]


ACCEPTED = [
    "../../etc/passwd",
    "..",
    "/etc/passwd",
    "C:\\Windows\\system32\\con.png",
    "~/.ssh/id_rsa",
    "$(touch owned) `touch owned`; touch owned",
    "images/../../../owned.png",
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "</textarea></title></pre></style><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" \'',
    "javascript:alert(1)",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "{{7*7}} {% include '/etc/passwd' %} {# #} ${7*7} #{7*7}",
    "{} {0} {prompt.__class__} %s %n",
    "=cmd|' /C calc'!A0",
    "@SUM(1+1)*cmd",
    '{"text": "another", "id": "../../owned"}\\n{"id": "x"}',
    "\u202egnp.exe\u202c \u2066isolated\u2069 \u200f",
    "line\u2028separator\u2029and paragraph",
    "\ufeffin the \ufeffmiddle",
    "\U0001f469\u200d\U0001f680 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e007f \U0001f1e9\U0001f1ea",
    "a" + "\u0300" * 1500,
    "\ufffe\uffff \U0010ffff \ue000",
    "x" * 2000,
    "\u7ea2" * 2000,
    *every_script(),
]
REJECTED = [
    "nul\0byte.png",
    "\x1b[2J\x1b]0;owned\x07 red \x1b[31m",
    "bell\x07 and \x08\x08backspace",
    "\x9b31m as one character",
    "over\rwritten",
    "\ud800 half a character",
    "z" * 100_000,
    "one\ntwo",
]


def tree(path):
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def steers(text):
    """The characters that a terminal would not print."""
    return {c for c in text if not c.isprintable() and c != "\n"}


def test_a_run_of_hostile_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    accepted = [*ACCEPTED, str(tmp_path / "owned.png"), f"file://{tmp_path}/owned"]
    file = tmp_path / "list\x1b[31m\u202e.txt"
    in_file = [text.encode("utf-8", "surrogatepass") for text in [*accepted, *REJECTED[:-1]]]
    file.write_bytes(b"\n".join([*in_file[:3], b"\xff\xfe\xfd", *in_file[3:]]))
    work, before = tmp_path / "a" / "b" / "run", tree(tmp_path)
    arguments = [f"--prompts={file}", *(f"--prompt={text}" for text in REJECTED), "--prompt=a cat", f"--workdir={work}"]
    code, engine = execute(*arguments)
    out, err = capsys.readouterr()
    assert code == 0
    # Each is made once, in its order, and each of the others is told of.
    records = lines(work / "metadata.jsonl")
    assert [x["text"] for x in records] == [*accepted, "a cat"]
    assert [x["id"] for x in records] == [Item(x["text"], 0).id for x in records]
    assert sum(map(len, engine.begun)) == len(records)
    skipped = [x["reason"] for x in lines(work / "log.jsonl") if x["event"] == "skipped"]
    assert len(skipped) == 2 * len(REJECTED) and skipped.count("not UTF-8") == 2  # the odd bytes and the half character
    assert sum("control character or half a character" in x for x in skipped) == 5 + 7
    assert "100000 characters, at most 2000 are allowed" in skipped
    # Nothing lies anywhere else, and names are plain.
    assert {x for x in tree(tmp_path) - before if not x.startswith("a/b/run/")} == {"a", "a/b", "a/b/run"}
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for path in tree(work) for name in path.split("/"))
    assert len(tree(work / "images")) == len(records)
    assert all(images.read_settings(work / x["file_name"])["text"] == x["text"] for x in records)
    for journal in ("metadata.jsonl", "log.jsonl"):
        assert (work / journal).read_bytes().isascii()
    # Nothing steers the terminal, though it is told of them.
    assert steers(out) | steers(err) == set()
    assert "\\x1b[2J" in err and "list\\x1b[31m\\u202e.txt" in err
    # The page is the page of as many harmless prompts, and shows the texts as they are.
    page = pages.Page((work / "gallery.html").read_text(encoding="utf-8"))
    execute(*(f"--prompt=harmless {n}" for n in range(len(records))), f"--workdir={tmp_path / 'run'}")
    harmless = pages.Page((tmp_path / "run" / "gallery.html").read_text(encoding="utf-8"))
    assert page.skeleton == harmless.skeleton
    assert (page.texts["script"], page.texts["title"]) == (harmless.texts["script"], "run")
    assert [x["text"] for x in page.data["records"]] == [x["text"] for x in records]
    # The same command finds all of it done.
    code, engine = execute(*arguments)
    assert (code, engine) == (0, None)


@given(st.lists(st.binary(max_size=40), max_size=5))
@settings(deadline=None, max_examples=15)
def test_a_file_of_any_bytes(tmp_path_factory, listed):
    path = tmp_path_factory.mktemp("any")
    (path / "list.txt").write_bytes(b"\n".join([b"a cat", *listed]))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code, _ = execute(f"--prompts={path / 'list.txt'}", f"--workdir={path / 'run'}")
    assert code == 0
    rows, rejected = prompt_file.sift(prompt_file.read_prompts(path / "list.txt"))
    kept = [row.prompt for row in rows]
    assert [x["text"] for x in lines(path / "run" / "metadata.jsonl")] == kept
    assert steers(out.getvalue() + err.getvalue()) == set()
    assert tree(path) - {f"run/{x}" for x in tree(path / "run")} == {"list.txt", "run"}
    page = pages.Page((path / "run" / "gallery.html").read_text(encoding="utf-8"))
    assert [x["text"] for x in page.data["records"]] == kept
    assert len([tag for tag, _ in page.skeleton if tag == "script"]) == 2  # the data, and the page's own


@pytest.mark.parametrize("option", ["--prompts=none\x1b[31m.txt", "--workdir=\udce9\x1b[31m/../caf\udce9", "\x1b[31m"])
def test_a_hostile_command(tmp_path, monkeypatch, capsys, option):
    """What the command itself says is as plain, also in bytes that are no text: a file name of another encoding."""
    monkeypatch.chdir(tmp_path)
    try:
        assert execute("--prompt=a cat", option)[0] == 0
    except ValueError as error:
        assert console.fail(2, str(error)) == 2
    said = "".join(capsys.readouterr())
    assert "\\x1b[31m" in said and steers(said) == set()


def test_what_a_terminal_is_told():
    assert console.printable("a\x1b[31m\u202e\ud800é\nb") == "a\\x1b[31m\\u202e\\ud800é\nb"
    assert console.printable("é 🙂", "latin-1") == "é \\U0001f642"
    assert console.printable("é 🙂", "ascii") == "\\xe9 \\U0001f642"


@pytest.mark.parametrize("text", ["x" * 2000, "\u7ea2" * 2000, "a" + "\u0300" * 1999, "a " * 1000])
def test_a_long_word_is_wrapped_at_once(text):
    """Measuring every length of every line took minutes."""
    begun = time.process_time()
    wrapped = contact_sheet.wrap(text, ImageFont.load_default(15), 192, lines=4)
    assert len(wrapped) <= 4 and time.process_time() - begun < 5


def test_json_in_a_prompt_is_no_line_of_the_journal(tmp_path):
    """A prompt that looks like the rest of a journal: one line remains one line."""
    text = '"}\u2028{"id": "owned", "text": "owned"}'
    execute(f"--prompt={text}", f"--workdir={tmp_path}")
    (line,) = (tmp_path / "metadata.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == text
