"""How a prompt is read: by each tokenizer once from its check to its batch, and why it may be refused."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from referee_jax import config, prompts, referees
from referee_jax.engine import inverter as inverter_lib
from referee_jax.engine import texts as texts_lib
from referee_jax.items import expand
from referee_jax.weights import generators
from tests.lazy import transformers
from tests.oracles import networks

PROMPT = "a red circle and a blue square"


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.fixture(scope="module")
def engine(checkpoints, tmp_path_factory):
    """CLIP with hard negatives and BLIP with a template; BLIP-2 is held out."""
    sd, clip = map(str, checkpoints)
    blip, blip2 = (tmp_path_factory.mktemp(name) for name in ("blip", "blip2"))
    networks.save_blip(networks.blip(transformers.BlipForConditionalGeneration), blip)
    networks.save_blip2(blip2, lm_head=False)
    negatives = {"negatives": ("a photo",), "near": 3, "exchange": (("red", "blue", "green"),)}
    specs = (
        {"checkpoint": clip, "losses": {"contrastive": 1.0}, **negatives},
        {"name": "blip_caption", "checkpoint": str(blip), "losses": {"caption": 1.0}},
        {"name": "blip2", "checkpoint": str(blip2), "losses": {"itm": 1.0}, "role": "held_out"},
    )
    settings = config.from_config(
        {"generator": {"checkpoint": sd}, "image_size": 32, "batch_size": 2, "referees": specs}
    )
    prior = generators.load_generator(sd)
    loaded = [referees.load_referee(spec) for spec in settings.referees]
    return inverter_lib.Inverter(settings, prior, loaded, jax.devices()[:1])


@pytest.fixture
def counted(engine):
    """The engine with nothing read, and the tokenizers of its prior and of its three referees."""
    counting = lambda judges: [dataclasses.replace(judge, tokenizer=Counting(judge.tokenizer)) for judge in judges]
    texts, engine = engine.texts, copy.copy(engine)
    judges, held_out, prior = counting(texts.judges), counting(texts.held_out), [Counting(texts.tokenizers[0])]
    engine.texts = texts_lib.Texts(texts.settings, prior, judges, held_out)
    return engine, [*prior, *(judge.tokenizer for judge in (*judges, *held_out))]


def test_a_prompt_is_read_once_from_the_check_to_its_batch(counted):
    engine, tokenizers = counted
    calls = lambda: [tokenizer.calls for tokenizer in tokenizers]
    assert engine.check(PROMPT) is None and engine.check("a star") is None
    assert calls() == [2] * 4
    batch = engine.begin(expand([PROMPT], 2), seed=0)
    assert calls() == [2] * 4 and batch.step == 0
    engine.texts.tokens("a green square")  # of a prompt that was not checked
    assert calls() == [3] * 4


def test_the_prior_reads_a_text_repaired(engine):
    """As the CLIP that it has learnt from."""
    odd, plain = (
        engine.texts.tokens(text)["prior"] for text in ("it\u2019s a \uff52\uff45\uff44 circle", "it's a red circle")
    )
    np.testing.assert_array_equal(odd, plain)


def test_few_prompts_are_kept(counted, monkeypatch):
    engine, _ = counted
    monkeypatch.setattr(texts_lib, "TOKENIZED", 3)
    for n in range(10):
        engine.check("red " * n + "circle")
    assert list(engine.texts._tokens) == [("red " * n + "circle", None) for n in (7, 8, 9)]
    # One that was dropped is read again, and is the same.
    again = engine.texts.tokens("circle")["referees"][0]["input_ids"]
    np.testing.assert_array_equal(again, engine.judges[0].read("circle")["input_ids"])


def test_why_a_prompt_cannot_be_read(engine):
    assert engine.check("red " * 31) == "33 tokens, blip2 reads 32"
    assert engine.check("(...)") == "nothing in it that blip_caption reads"
    assert engine.check("red " * 59) == "78 tokens, the prior reads 77"
    blip2 = engine.held_out[0]
    assert engine.check("a <image>") == f"it holds <image>, for which {blip2.spec.name} has no word"
    for text, reason in (("(...)", "nothing in it that blip2 reads"), ("red " * 31, "33 tokens, blip2 reads 32")):
        with pytest.raises(prompts.PromptError, match="the prompt '.*': " + reason.replace("(", r"\(")) as error:
            blip2.read(text)
        assert error.value.reason == reason
    # Scores may be asked for any text, also one of which nothing is left.
    assert blip2.tokenize("(...)")["attention_mask"].sum() == 2
