"""Prompt files with all kinds of content, texts made from prompts, and tokens."""

import copy
import json

import numpy as np
import pytest

from referee_jax import prompts
from referee_jax.runs import prompt_file
from referee_jax.shapes import tokens
from tests.lazy import transformers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokens.save(directory)
    return transformers.CLIPTokenizer.from_pretrained(directory)


def test_a_file_of_all_sorts(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(
        b"\xef\xbb\xbfa red circle\r\n"
        b"\n"
        b"  a blue square \n"
        b"caf\xe9\n"  # Latin-1
        b"a red circle\n"
        b"tab\there\n" + "👩‍🚀 rides, “quoted”\u2028one line\n".encode() + b"x" * 2001 + b"\nlast/no end"
    )
    texts, rejected = prompt_file.sift(prompt_file.read_prompts(file))
    assert texts == ["a red circle", "a blue square", "👩‍🚀 rides, “quoted”\u2028one line", "last/no end"]
    assert [(x.where, x.reason) for x in rejected] == [
        ("line 2 of list.txt", "blank"),
        ("line 4 of list.txt", "not UTF-8"),
        ("line 5 of list.txt", "the same as line 1 of list.txt"),
        ("line 6 of list.txt", "U+0009 at character 4 is a control character or half a character"),
        ("line 8 of list.txt", "2001 characters, at most 2000 are allowed"),
    ]
    assert str(rejected[2]) == "line 5 of list.txt ('a red circle'): the same as line 1 of list.txt"
    assert len(str(rejected[4])) < 150


TWO = ["a red circle", 'a "blue" square']


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("jsonl", '{"tag": "colors", "prompt": "a red circle"}\n\n{"prompt": "a \\"blue\\" square", "include": []}\n'),
        ("jsonl", '{"text": "a red circle"}\r\n{"Text": "a \\"blue\\" square", "prompts": 3}'),
        ("json", '[\n  "a red circle",\n  "a \\"blue\\" square"\n]\n'),
        ("json", '[{"prompt": "a red circle", "text": "not this"}, {"prompt": "a \\"blue\\" square"}]'),
        ("csv", 'id,prompt\n1,a red circle\n2,"a ""blue"" square"\n'),
        ("csv", 'text;note\r\na red circle;"x\r\ny"\r\n"a ""blue"" square";\r\n'),
        ("tsv", 'Prompt\tCategory\na red circle\tAbstract\na "blue" square\t\n'),
        ("tsv", 'id\tprompt\n1\ta red circle\n2\t"a ""blue"" square"\n'),
    ],
)
def test_prompts_of_records(tmp_path, ending, content, is_named):
    """Of a file with the format's ending, or of one without a name, as standard input."""
    file = tmp_path / (f"list.{ending}" if is_named else "list")
    file.write_bytes(b"\xef\xbb\xbf" + content.encode())
    texts, rejected = prompt_file.sift(prompt_file.read_prompts(file))
    assert (texts, rejected) == (TWO, [])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.jsonl",
            '{"prompt": "two dogs", "questions": [["How many dogs?", "two"], "Are they red?"]}\n{"prompt": "b"}',
        ),
        ("a.csv", 'prompt,questions\ntwo dogs,"[[""How many dogs?"", ""two""], ""Are they red?""]"\nb,\n'),
        ("a.jsonl", '{"prompt": "two dogs", "vqa_list": [["How many dogs?", "two"], ["Are they red?", "Yes"]]}\n"b"'),
    ],
)
def test_questions_of_prompts(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    entries = prompt_file.read_prompts(tmp_path / name)
    asked = prompt_file.questions(entries)
    assert [entry.text for entry in entries] == ["two dogs", "b"] and asked.keys() == {"two dogs"}
    assert [x[2:] for x in asked["two dogs"]] == [("How many dogs?", "two"), ("Are they red?", "yes")]


def test_plain_questions_and_their_kinds(tmp_path):
    (tmp_path / "a.tsv").write_text("prompt\tquestions\na\tIs it red? | Is it round?\na\tIs it blue?\n")
    asked = prompt_file.questions(prompt_file.read_prompts(tmp_path / "a.tsv"))
    assert [atom.question for atom in asked["a"]] == ["Is it red?", "Is it round?"]
    line = {"prompt": "a", "vqa_list": [["Is it red?", "Yes"], ["How many?", "3"]], "skills": ["attribute", "count"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    asked = prompt_file.questions(prompt_file.read_prompts(tmp_path / "a.jsonl"))
    assert [atom.kind for atom in asked["a"]] == ["attribute", "count"]


@pytest.mark.parametrize("asked", [[1], [["a", "b", "c"]], [["a", ""]], {"a": "yes"}, "[1", 5])
def test_questions_that_are_none(tmp_path, asked):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "questions": asked}))
    entries = prompt_file.read_prompts(tmp_path / "a.jsonl")
    assert entries[0].reason.startswith("its questions: ") and not prompt_file.questions(entries)


@pytest.mark.parametrize(
    "lines",
    [
        ["[a red circle]", "[1] a cat"],
        ['{"prompt": "a"}', "a cat"],
        ["[" * 20_000],
        ["portrait, text", "a cat"],
        ["id,text", "a cat, a dog, a bird"],
        ["prompt", "a cat"],
        ["text\tprompt", "a cat"],
        ['a "red" circle', '"unmatched'],
    ],
)
def test_a_text_that_resembles_records_is_text(tmp_path, lines):
    file = tmp_path / "list.txt"
    file.write_text("\n".join(lines))
    assert [entry.text for entry in prompt_file.read_prompts(file)] == lines


@pytest.mark.parametrize(
    ("name", "content", "reasons"),
    [
        (
            "a.jsonl",
            b'{"caption": "a", "id": 1}\n{"prompt": "a cat"}\n{"prompt"\n[1]\n{"prompt": ["a"]}',
            {
                "line 1 of a.jsonl": "no field prompt or text; there are caption, id",
                "line 3 of a.jsonl": "not JSON (Expecting ':' delimiter: line 1 column 10 (char 9))",
                "line 4 of a.jsonl": "neither a text nor an object with a field prompt or text",
                "line 5 of a.jsonl": "prompt is not a text",
            },
        ),
        ("a.json", b'{\n"prompts": ["a"]}', {"line 1 of a.json": "no field prompt or text; there are prompts"}),
        ("a.csv", b"prompt,id\na cat,1\na, dog,2\n", {"line 3 of a.csv": "3 cells, and the first line has 2"}),
    ],
)
def test_records_without_a_prompt_are_told(tmp_path, name, content, reasons):
    (tmp_path / name).write_bytes(content)
    texts, rejected = prompt_file.sift(prompt_file.read_prompts(tmp_path / name))
    assert texts in ([], ["a cat"]) and {x.where: x.reason for x in rejected} == reasons


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'["a cat",\n"a dog"', "is not JSON: Expecting ',' delimiter: line 2"),
        ("a.csv", b"a cat\na dog\n", "has no column prompt or text in its first line, 'a cat'"),
        ("a.csv", b'prompt,id\n"a" cat,1\n', "is no table: ',' expected after '\"'"),
        ("a.jsonl", b'{"prompt": "caf\xe9"}', r"is not UTF-8 \(at byte 15\)"),
        ("a.yaml", b"- a cat\n", "is yaml; what can be read is a text file with one prompt per line, and JSON,"),
        ("a.txt", b"\x1f\x8b\x08\x00", "is gzip; what can be read is"),
        ("a.xlsx", b"PK\x03\x04", "is a zip archive or a spreadsheet; what"),
    ],
)
def test_what_holds_no_prompts_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(prompts.PromptError, match=message):
        prompt_file.read_prompts(tmp_path / name)


def test_empty_file_and_last_line(tmp_path):
    file = tmp_path / "empty.txt"
    file.write_bytes(b"")
    assert prompt_file.read_prompts(file) == []
    file.write_bytes(b"one\ntwo\n")
    assert [entry.text for entry in prompt_file.read_prompts(file)] == ["one", "two"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(prompts.PromptError, match=r"none.txt cannot be read: No such file"):
        prompt_file.read_prompts(tmp_path / "none.txt")
    with pytest.raises(prompts.PromptError, match="cannot be read: Is a directory"):
        prompt_file.read_prompts(tmp_path)
    file = tmp_path / "wide.txt"
    file.write_text("a red circle", encoding="utf-16")
    with pytest.raises(prompts.PromptError, match="is UTF-16; save it as UTF-8"):
        prompt_file.read_prompts(file)


@pytest.mark.parametrize("text", ["a", "ä", "🙂", "a" * 2000, "two\u00a0words", "👨‍👩‍👧"])
def test_good_prompts(text):
    assert prompt_file.check(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "blank"),
        (" \t ", "blank"),
        ("a" * 2001, "2001 characters, at most 2000 are allowed"),
        ("ab\x00", "U+0000 at character 3 is a control character or half a character"),
        ("a\nb", "U+000A at character 2 is a control character or half a character"),
        ("\x1b[31m", "U+001B at character 1 is a control character or half a character"),
        ("a\ud800", "U+D800 at character 2 is a control character or half a character"),
    ],
)
def test_bad_prompts(text, reason):
    assert prompt_file.check(text) == reason


def test_tokens(tokenizer):
    texts = ["a red circle", "a blue square and a yellow star", ""]
    ids = prompts.tokenize(tokenizer, texts)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, tokens.encode(texts))
    assert (ids[0, 0], ids[0, 4], ids[0, -1]) == (tokens.START, tokens.END, tokens.END)
    assert prompts.tokenize(tokenizer, texts[:1], 7).shape == (1, 7)
    assert prompts.tokenize(tokenizer, [], 7).shape == (0, 7)
    left_padded = copy.deepcopy(tokenizer)
    left_padded.padding_side = "left"
    np.testing.assert_array_equal(prompts.tokenize(left_padded, texts), ids)
    assert prompts.token_count(tokenizer, "a red circle") == 5


def test_nothing_is_cut(tokenizer):
    text = "a red circle and a blue square and a yellow star and a pink cross and a black ring"
    count = prompts.token_count(tokenizer, text)
    assert count == 21
    with pytest.raises(
        prompts.PromptError, match=r"the prompt 'a red circle .*': 21 tokens, the text encoder reads 20"
    ):
        prompts.tokenize(tokenizer, ["a star", text])
    assert prompts.tokenize(tokenizer, ["a star", text], 21).shape == (2, 21)


@pytest.mark.parametrize(
    "text, caption",
    [
        ('A "Red" Book, and (two) cats!', "a red book, and two cats"),
        ("  It's  a dog-house: #1; ~5*3.\n", "it's a dog-house 1 5 3"),
        ("a\t\tb\nc", "a b\nc"),
        ("?!", "?"),
        ("...", ""),
        ("word " * 60, ("word " * 60).strip()),
    ],
)
def test_caption(text, caption):
    assert prompts.caption(text) == caption


@pytest.mark.parametrize(
    "template, prompt, text",
    [
        ("A photo exactly contains {caption}", "A Red Book!", "A photo exactly contains a red book"),
        ("{}", "A Red Book!", "A Red Book!"),
        ("a photo", "A Red Book!", "a photo"),
        ("a {} ", "{caption} of {}", "a {caption} of {} "),
    ],
)
def test_fill(template, prompt, text):
    assert prompts.fill(template, prompt) == text


@pytest.mark.parametrize(
    "text, question",
    [
        ("A red circle.", "a red circle"),
        ("  A dog-house: #1; (It's ~5*3)!", "a dog-house 1 it's 53"),
        ("?!", "?"),
        ("...", ""),
    ],
)
def test_question(text, question):
    assert prompts.question(text) == question


# What OpenAI's and open_clip's own tokenizers make of them, as words of theirs.
REPAIRED = {
    "It\u2019s a \u201cdog\u201d &amp; cat": 'It\'s a "dog" & cat',
    "a &lt;b&gt; &quot;x&quot;": 'a <b> "x"',
    "A&amp;amp;B": "A&B",
    "\uff46\uff55\uff4c\uff4c width": "full width",
    "\ufb01ne ligature": "fine ligature",
    "sch\u00c3\u00b6n": "sch\u00f6n",
    " a circle ": "a circle",
}
UNCHANGED = (
    "a red circle and a blue square",
    "caf\u00e9 na\u00efve \u00df",
    "a \u2013 b \u2014 c",
    "\U0001f469\u200d\U0001f680 rides",
    "\u6f22\u5b57 \u3072\u3089\u304c\u306a",
    '5,000 cats!! it\'s ("quoted")',
)


def test_repaired():
    assert {text: prompts.repaired(text) for text in REPAIRED} == REPAIRED
    assert [prompts.repaired(text) for text in UNCHANGED] == list(UNCHANGED)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a cat left of a dog", ["a dog left of a cat", "a cat right of a dog"]),
        ("A cat is on the left of a dog.", ["A dog is on the left of a cat.", "A cat is on the right of a dog."]),
        ("a ring above a disc", ["a disc above a ring", "a ring below a disc"]),
        ("a cup on top of the book", ["the book on top of a cup", "a cup on bottom of the book"]),
        ("two men in front of one bus", ["one bus in front of two men", "two men behind one bus"]),
        ("a cat to the right side of a car", ["a car to the right side of a cat", "a cat to the left side of a car"]),
        # Of two relations no arguments change places: which they are is not known.
        ("a cup left of a mug over a rug", ["a cup right of a mug over a rug", "a cup left of a mug under a rug"]),
        ("a cat left of a cat", ["a cat right of a cat"]),
        ("a red circle and a blue square", []),
        ("a cat next to a dog", []),
        ("the left shoe, leftover of a man", []),
        ("above", []),
    ],
)  # fmt: skip
def test_exchanged(prompt, texts):
    assert prompts.exchanged(prompt) == texts
