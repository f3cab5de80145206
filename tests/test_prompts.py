"""Prompt files with all kinds of content, texts made from prompts, and tokens."""

import copy
import csv
import json

import fsspec
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from referee_jax import items, prompts
from referee_jax.items import Row
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
    rows, rejected = prompt_file.sift(prompt_file.read_prompts(file))
    texts = [row.prompt for row in rows]
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
    rows, rejected = prompt_file.sift(prompt_file.read_prompts(file))
    texts = [row.prompt for row in rows]
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


TABLE = [
    {"id": "a-1", "prompt": "a cat", "seed": 7, "negative": "dogs", "samples": 2, "kind": "animal", "number": 3},
    {"id": "", "prompt": "a dog", "seed": None, "negative": " ", "samples": None, "kind": "animal", "number": 4},
]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_columns_of_a_table(tmp_path, ending):
    """A user's id, seed, negative prompt and number of samples are read, other columns carried, in every format."""
    file = tmp_path / f"list.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([x | {"picture": b"bytes are not carried"} for x in TABLE]), file)
    elif ending.startswith("json"):
        lines = list(map(json.dumps, TABLE))
        file.write_text("\n".join(lines) if ending == "jsonl" else f"[{', '.join(lines)}]")
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(TABLE[0]), delimiter={"csv": ",", "tsv": "\t"}[ending])
            writer.writeheader()
            writer.writerows(TABLE)
    rows, rejected = prompt_file.sift(prompt_file.read_prompts(file))
    assert rows == [Row("a cat", "a-1", 7, "dogs", 2), Row("a dog")] and not rejected
    assert [{x: str(y) for x, y in row.columns.items()} for row in rows] == [
        {"kind": "animal", "number": "3"},
        {"kind": "animal", "number": "4"},
    ]
    assert [item.id for item in items.Items(rows, 1)] == ["a-1", "a-1-s001", "a_dog-7dbdf68a-s000"]


def test_ids_of_a_table_are_checked(tmp_path):
    """Each bad row is named by its line with a reason, and stops no other."""
    cells = [
        "1,a cat,,", "1,a dog,,", "a/b,a cow,,", ".a,a fish,,", ",a bird,x,", ",a bee,1.5,", ",an ant,-1,", ",a fox,4294967296,",
        ",a hen,,0", ",a hen,,1", "1-s001,an owl,,", "2,a cat,,", ",a cat,,", ",a cat,,", ",a cat,5,", ",a cat,5,",
    ]  # fmt: skip
    (tmp_path / "a.csv").write_text("\n".join(["id,prompt,seed,samples", *cells]))
    rows, rejected = prompt_file.sift(prompt_file.read_prompts(tmp_path / "a.csv"))
    assert rows == [
        Row("a cat", "1"), Row("a hen", samples=1), Row("a cat", "2"), Row("a cat"), Row("a cat", seed=5),
    ]  # fmt: skip
    name = "cannot name an image: letters, digits and _ - = + @ can, at most 200, the first a letter or a digit"
    whole = "and not a whole number from"
    assert {x.where.split()[1]: x.reason for x in rejected} == {
        "3": "its id '1' is that of line 2 of a.csv",
        "4": f"its id 'a/b' {name}",
        "5": f"its id '.a' {name}",
        "6": f"its seed is 'x', {whole} 0 to 4294967295",
        "7": f"its seed is '1.5', {whole} 0 to 4294967295",
        "8": f"its seed is '-1', {whole} 0 to 4294967295",
        "9": f"its seed is '4294967296', {whole} 0 to 4294967295",
        "10": f"its samples is '0', {whole} 1 to 100000",
        "12": "its id '1-s001' is that of a further sample of line 2 of a.csv",
        "15": "the same as line 14 of a.csv",
        "17": "the same as line 16 of a.csv",
    }


def test_one_prompt_has_one_list_of_questions(tmp_path):
    table = [
        {"id": n, "prompt": "a", "questions": [x]} for n, x in enumerate(["Is it red?", "Is it blue?", "Is it red?"])
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, table)))
    rows, rejected = prompt_file.sift(prompt_file.read_prompts(tmp_path / "a.jsonl"))
    assert [row.name for row in rows] == ["0", "2"]
    assert [x.reason for x in rejected] == ["other questions than those about the same prompt at line 1 of a.jsonl"]


PUBLISHED = {
    "PartiPrompts.tsv": 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\nthe word "START"\tText\tWriting\tx\n',
    "DrawBench.csv": 'Prompts,Category\nbond,Colors\n"the word ""START""",Text\n',
    "anime.json": '["bond", "the word \\"START\\""]',  # of HPD v2
    "test.json": '[{"prompt": "bond", "image_path": ["1.jpg"], "rank": [1]}, {"prompt": "the word \\"START\\"", "rank": []}]',
    "evaluation_metadata.jsonl": '{"tag": "single_object", "include": [{"class": "bond", "count": 1}], "prompt": "bond"}\n'
    '{"tag": "two_object", "include": [], "prompt": "the word \\"START\\""}\n',  # of GenEval
    "color_val.txt": 'bond\nthe word "START"\n',  # of T2I-CompBench
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lists_load_as_they_are(tmp_path, name):
    (tmp_path / name).write_text(PUBLISHED[name])
    rows, rejected = prompt_file.sift(prompt_file.read_prompts(tmp_path / name))
    assert [row.prompt for row in rows] == ["bond", 'the word "START"'] and not rejected
    assert all(row.columns for row in rows) == (name not in ("anime.json", "color_val.txt"))


def test_prompts_in_a_bucket(tmp_path):
    with fsspec.open("memory://bucket/list.jsonl", "w") as file:
        file.write('{"prompt": "a cat"}\n{"prompt": ""}')
    rows, rejected = prompt_file.sift(prompt_file.read_prompts("memory://bucket/list.jsonl"))
    assert rows == [Row("a cat")] and rejected[0].where == "line 2 of list.jsonl"
    with pytest.raises(prompts.PromptError, match="the prompt file memory://bucket/none.txt cannot be read: "):
        prompt_file.read_prompts("memory://bucket/none.txt")
    with pytest.raises(prompts.PromptError, match="Protocol not known: nowhere"):
        prompt_file.read_prompts("nowhere://bucket/list.txt")


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(prompts.PromptError, match="a.parquet is not Parquet: "):
        prompt_file.read_prompts(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"caption": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(prompts.PromptError, match="b.parquet has no column prompt or text; there are caption"):
        prompt_file.read_prompts(tmp_path / "b.parquet")


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
        ("a.json", b'{\n"prompts": ["a"]}', {"line 1 of a.json": "prompts is not a text"}),
        ("a.csv", b"prompt,id\na cat,1\na, dog,2\n", {"line 3 of a.csv": "3 cells, and the first line has 2"}),
    ],
)
def test_records_without_a_prompt_are_told(tmp_path, name, content, reasons):
    (tmp_path / name).write_bytes(content)
    rows, rejected = prompt_file.sift(prompt_file.read_prompts(tmp_path / name))
    texts = [row.prompt for row in rows]
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
