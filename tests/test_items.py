"""Items: what identifies them; their ids are in runs/test_work.py."""

import hashlib
import pickle

from referee_jax.items import Item


def test_the_text_is_hashed_once(monkeypatch):
    """However often an item is asked for its ids; it is what it was by prompt and sample."""
    hashed, sha256 = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(data) or sha256(data))
    item, other = Item("a cat", 1), Item("a cat", 1)
    before = pickle.dumps(item)
    for _ in range(3):
        assert item.id == "a_cat-51e46741-s001" and item.prompt_id == 0x51E46741
    assert hashed == [b"a cat"]
    assert item == other and hash(item) == hash(other) and Item("a cat", 0) < item < Item("a dog", 0)
    assert pickle.dumps(item) == before and pickle.loads(before) == item
