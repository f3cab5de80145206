"""Items: ids that are file names for any text, and work that is neither lost nor done twice."""

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from referee_jax import items as items_lib
from referee_jax.items import Item, Part
from referee_jax.runs import work as work_lib

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=300)  # lone surrogates too


def test_ids_are_what_they_were():
    # A run directory of an earlier version must be recognised: these may never change.
    assert Item("a red circle", 0).id == "a_red_circle-a1e4a280-s000"
    assert Item("a red circle", 0).prompt_id == 0xA1E4A280
    assert Item("A man's hat, 2 x.", 0).id == "A_man_s_hat_2_x-34782459-s000"
    assert Item('a/b\\c: "q" 🙂 é', 12).id == "a_b_c_q_e-b0e037bd346008fd-s012"
    assert Item("红色的圆", 1000).id == "prompt-4e9a0a4b919417c5-s1000"


@given(ANY_TEXT, st.integers(0, 10**6))
def test_ids_are_file_names(prompt, sample):
    name = Item(prompt, sample).id
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]{0,59}-([0-9a-f]{8}){1,2}-s[0-9]{3,7}", name)
    assert len(name.encode()) <= 86  # a member of a tar, with its ending, may have 100
    assert Item(prompt, sample).id == name


@given(st.lists(st.tuples(ANY_TEXT, st.integers(0, 2000)), unique=True, max_size=20))
def test_ids_tell_items_apart(pairs):
    # Also on a file system that takes upper for lower case.
    assert len({Item(*pair).id.lower() for pair in pairs}) == len(pairs)


def test_prompts_that_look_the_same_are_told_apart():
    texts = ["a cat", "A cat", "a  cat", "a-cat", "a cat ", "a" * 100, "a" * 101, "猫", "犬"]
    assert len({Item(text, 0).id.lower() for text in texts}) == len(texts)


THINGS = [
    f"{n}个{colour}色的{shape}" for n in "一二三四五六七八九" for colour in "红黄蓝绿紫白" for shape in "圆环星心方塔"
]
LONG = "a photograph, taken from far away on a rainy day in autumn, of "


@pytest.mark.parametrize(
    ("prompts", "pair"),
    [
        ([f"{a}和{b}" for a in THINGS for b in THINGS], ("一个紫色的环和七个白色的星", "二个黄色的环和五个蓝色的心")),
        ([f"{LONG}{n}" for n in range(100_000)], (f"{LONG}37943", f"{LONG}42528")),
    ],
    ids=["without ASCII letters", "with the same beginning"],
)
def test_a_hundred_thousand_prompts_are_told_apart(prompts, pair):
    """Where 32 bits of a hash do not: in both lists two prompts have the same."""
    assert set(pair) < set(prompts) and len({Item(prompt, 0).prompt_id for prompt in pair}) == 1
    assert len({Item(prompt, 0).id.lower() for prompt in prompts}) == len(prompts) > 99_999


@given(st.lists(ANY_TEXT, unique=True, max_size=12), st.integers(1, 3), st.integers(1, 5), st.data())
def test_what_is_missing_is_done_once(prompts, samples, size, data):
    wanted = items_lib.expand(prompts, samples)
    assert len(wanted) == len(prompts) * samples
    done = {item.id for item in wanted if data.draw(st.booleans())}
    batches = list(items_lib.batches(items_lib.missing(wanted, done), size))
    assert all(len(batch) == size for batch in batches[:-1]) and all(batches)
    assert [item for batch in batches for item in batch] == [item for item in wanted if item.id not in done]


@given(
    st.lists(ANY_TEXT, unique=True, min_size=1, max_size=5), st.integers(1, 5), st.integers(0, 3), st.integers(1, 4), st.data()
)  # fmt: skip
def test_items_are_made_as_they_are_needed(prompts, samples, index, count, data):
    """They are those of a list, and so are their number, their share, what is missing, and work on it."""
    listed, items = items_lib.expand(prompts, samples), items_lib.Items(prompts, samples)
    own, lazy = (items_lib.share(x, index % count, count) for x in (listed, items))
    assert list(items) == listed and list(lazy) == own and len(lazy) == len(own)
    some = st.lists(st.sampled_from(listed), unique=True)
    done = {item.id for item in data.draw(some)} | {Item("another", 0).id, "x-s1", f"{listed[0].id}0"}
    more, unfit = {item.id for item in data.draw(some)}, set(data.draw(st.lists(st.sampled_from(prompts))))
    for left, expected in (
        (items_lib.missing(lazy, done), [x for x in own if x.id not in done]),
        (items_lib.missing(items_lib.missing(lazy, done), more), [x for x in own if x.id not in done | more]),
        (
            items_lib.missing(lazy, done).without((x, None) for x in unfit),
            [x for x in own if x.id not in done and x.prompt not in unfit],
        ),
    ):
        assert list(left) == expected and len(left) == len(expected)
        assert left.texts == list(dict.fromkeys(item.texts for item in expected))
        assert [item for item in listed if item in left] == expected
        assert items_lib.named(left, more) == [item for item in expected if item.id in more]
        work = work_lib.Work(left, [Part(tuple(data.draw(some)), 3)])
        given_out = []
        while part := work.take(3):
            given_out += part.items
        assert sorted(given_out) == sorted(expected)


def test_a_hundred_million_items_take_no_time():
    begun = time.process_time()
    items = items_lib.share(items_lib.Items(["a cat", "a dog"], 10**8), 1, 3)
    left = items_lib.missing(items, {Item("a cat", 4).id, Item("a cat", 5).id})
    work = work_lib.Work(left)
    assert len(left) == len(items) - 1 and [item.sample for item in work.take(3).items] == [1, 7, 10]
    assert time.process_time() - begun < 1


@given(st.integers(0, 40), st.integers(1, 7))
def test_shares_are_a_partition(count, processes):
    wanted = items_lib.expand(list(map(str, range(count))), 1)
    shares = [items_lib.share(wanted, index, processes) for index in range(processes)]
    assert sorted(item for own in shares for item in own) == sorted(wanted)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


ITEMS = items_lib.expand(list("abcdef"), 1)


def begun(items, step):
    return Part(tuple(items), step, {"x": np.array([item.prompt_id for item in items])})


@given(
    st.lists(st.tuples(st.lists(st.sampled_from(ITEMS), unique=True, max_size=6), st.integers(1, 50)), max_size=4),
    st.lists(st.sampled_from(ITEMS), unique=True),
    st.integers(1, 4),
)
def test_work_hands_out_each_item_once(parts, wanted, size):
    """From the furthest of the states that there are of it, with its own row."""
    work, given_out = work_lib.Work(wanted, [begun(*part) for part in parts]), []
    while part := work.take(size):
        assert 0 < len(part.items) <= size
        if part.state:
            assert part.state["x"].tolist() == [item.prompt_id for item in part.items]
        given_out += [(item, part.step) for item in part.items]
    furthest = {item: max([step for items, step in parts if item in items], default=0) for item in wanted}
    assert dict(given_out) == furthest and len(given_out) == len(wanted)


def test_what_is_put_back_comes_first():
    """From where it was, in pieces that fit."""
    work = work_lib.Work(ITEMS, [begun(ITEMS[3:5], 7)])
    part = work.take(2)
    assert part.items == tuple(ITEMS[3:5]) and part.step == 7
    work.put_back(part)
    assert [(x.items, x.step, x.state["x"].tolist()) for x in (work.take(1), work.take(1))] == [
        ((item,), 7, [item.prompt_id]) for item in ITEMS[3:5]
    ]
    fresh = work.take(2)
    work.put_back(fresh)
    assert work.take(3) == Part((*fresh.items, ITEMS[2]))
