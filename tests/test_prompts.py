"""Prompt files with all kinds of content, texts made from prompts, and tokens."""

import copy

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
