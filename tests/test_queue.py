"""Items: ids that are file names for any text, and work that is neither lost nor done twice."""

import re

from hypothesis import given
from hypothesis import strategies as st

from referee_jax import queue

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=300)  # lone surrogates too


def test_ids_are_what_they_were():
    # A run directory of an earlier version must be recognised: these may never change.
    assert queue.Item("a red circle", 0).id == "a_red_circle-a1e4a280-s000"
    assert queue.Item("a red circle", 0).prompt_id == 0xA1E4A280
    assert queue.Item('a/b\\c: "q" 🙂 é', 12).id == "a_b_c_q_e-b0e037bd-s012"
    assert queue.Item("红色的圆", 1000).id == "prompt-4e9a0a4b-s1000"


@given(ANY_TEXT, st.integers(0, 10**6))
def test_ids_are_file_names(prompt, sample):
    name = queue.Item(prompt, sample).id
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]{0,59}-[0-9a-f]{8}-s[0-9]{3,7}", name)
    assert len(name.encode()) <= 80
    assert queue.Item(prompt, sample).id == name


@given(st.lists(st.tuples(ANY_TEXT, st.integers(0, 2000)), unique=True, max_size=20))
def test_ids_tell_items_apart(pairs):
    # Also on a file system that takes upper for lower case.
    assert len({queue.Item(*pair).id.lower() for pair in pairs}) == len(pairs)


def test_prompts_that_look_the_same_are_told_apart():
    texts = ["a cat", "A cat", "a  cat", "a-cat", "a cat ", "a" * 100, "a" * 101, "猫", "犬"]
    assert len({queue.Item(text, 0).id.lower() for text in texts}) == len(texts)


@given(st.lists(ANY_TEXT, unique=True, max_size=12), st.integers(1, 3), st.integers(1, 5), st.data())
def test_what_is_missing_is_done_once(prompts, samples, size, data):
    wanted = queue.items(prompts, samples)
    assert len(wanted) == len(prompts) * samples
    done = {item.id for item in wanted if data.draw(st.booleans())}
    batches = list(queue.batches(queue.missing(wanted, done), size))
    assert all(len(batch) == size for batch in batches[:-1]) and all(batches)
    assert [item for batch in batches for item in batch] == [item for item in wanted if item.id not in done]
