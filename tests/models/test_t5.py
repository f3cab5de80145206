"""T5 against transformers' torch classes, with the same weights, and as directories."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.models.flan_t5 import t5
from referee_jax.weights import convert, load
from tests.conftest import cosine, gradient_memory, relative_l2
from tests.lazy import t5_oracles, torch, transformers
from tests.weights.checkpoints import edit_json, edit_tensors, same

LENGTHS = (9, 5)
MASK = np.arange(9) < np.array(LENGTHS)[:, None]
ANSWER = np.array([[5, 7, 1], [9, 1, 1]], np.int32)
# Each branch: what differs from a T5 of version 1.1 as transformers before 5 wrote it.
BRANCHES = {
    "published": {},
    "other buckets": {
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 6,
        "layer_norm_epsilon": 1e-2,
    },
    "other activation, as deep": {"feed_forward_proj": "gated-silu", "num_decoder_layers": None},
}


def build(kind="t5", **changes):
    """The oracle, its tensors, and our config of it."""
    oracle = t5_oracles.t5(**changes) if kind == "t5" else t5_oracles.t5_encoder(**changes)
    values = json.loads(oracle.config.to_json_string()) | {"tie_word_embeddings": False}
    tensors = t5_oracles.numpy(oracle.state_dict())
    config = load.KINDS[kind].config(values, where="config.json")
    return oracle, tensors, config


def fill(config, tensors, dtype=jnp.float32, kind="t5"):
    row = load.KINDS[kind]
    return convert.fill(
        load.unfilled(row, config), tensors, dtype=dtype, renames=row.renames, ignore=(*row.ignore, *row.ties)
    )


def embeddings(width=32, seed=0):
    return np.random.default_rng(seed).normal(size=(2, 9, width)).astype(np.float32)


@jax.jit
def ours(network, x, cotangents):
    """States and logits, and the gradients of each with respect to the embeddings."""

    def both(x):
        states = network.encoder(x, MASK)
        return states.astype(jnp.float32), network.logits(jnp.asarray(ANSWER), states, MASK)

    out, pullback = jax.vjp(both, x)
    zeros = jax.tree.map(jnp.zeros_like, cotangents)
    return out, (pullback((cotangents[0], zeros[1]))[0], pullback((zeros[0], cotangents[1]))[0])


@pytest.mark.parametrize("branch", BRANCHES)
def test_matches_transformers(branch):
    oracle, tensors, config = build(**BRANCHES[branch])
    network = fill(config, tensors)
    x = torch.from_numpy(embeddings()).requires_grad_()
    mask = torch.from_numpy(MASK).long()
    encoded = oracle.encoder(inputs_embeds=x, attention_mask=mask)
    logits = oracle(encoder_outputs=encoded, attention_mask=mask, labels=torch.from_numpy(ANSWER).long()).logits
    expected = encoded.last_hidden_state, logits
    # States of padding are nobody's.
    rng = np.random.default_rng(1)
    cotangents = tuple(rng.normal(size=y.shape).astype(np.float32) for y in expected)
    cotangents[0][~MASK] = 0
    actual, gradients = ours(network, embeddings(), cotangents)
    assert relative_l2(actual[0] * MASK[..., None], expected[0].detach() * mask[..., None]) < 1e-5
    assert relative_l2(actual[1], expected[1].detach()) < 1e-5
    for y, cotangent, gradient in zip(expected, cotangents, gradients, strict=True):
        exact = torch.autograd.grad((y * torch.from_numpy(cotangent)).sum(), x, retain_graph=True)[0]
        assert relative_l2(gradient, exact) < 1e-4
        assert exact.abs().max() > 1e-2 and exact[1, 5:].abs().max() == 0 == np.abs(gradient[1, 5:]).max()
    # The second text, as long as it is, alone and without a mask.
    alone = network.encoder(embeddings()[1:, :5])
    assert relative_l2(alone, actual[0][1:, :5]) < 1e-5
    # Words, positions and the start of the answer are seen.
    turned = network.logits(jnp.asarray(ANSWER), network.encoder(embeddings()[:, ::-1], MASK), MASK)
    assert relative_l2(turned[0], actual[1][0]) > 0.1 and relative_l2(actual[1][1, 1], actual[1][0, 1]) > 0.1


def test_tied_words_scale_the_last_states():
    """As the first T5 and transformers 5's new networks: no head of its own."""
    oracle, tensors, config = build()
    oracle.lm_head.weight = oracle.shared.weight
    oracle.config.scale_decoder_outputs = True
    tied = dataclasses.replace(config, lm_head=False, tie_word_embeddings=True, scale_decoder_outputs=None)
    network = fill(tied, {name: x for name, x in tensors.items() if name != "lm_head.weight"})
    states = torch.from_numpy(embeddings())
    expected = oracle(encoder_outputs=(states,), labels=torch.from_numpy(ANSWER).long()).logits
    assert relative_l2(network.logits(jnp.asarray(ANSWER), embeddings()), expected) < 1e-5


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("count", "longest"), [(32, 128), (8, 20)])
def test_buckets_are_transformers(both_ways, count, longest):
    distances = np.arange(-700, 701)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        torch.from_numpy(distances), bidirectional=both_ways, num_buckets=count, max_distance=longest
    )
    mine = t5.buckets(distances, count=count, longest=longest, both_ways=both_ways)
    np.testing.assert_array_equal(mine, theirs)
    assert len(set(mine)) == count - both_ways  # no key after the query has the distance 0


def test_bfloat16_gradient_points_the_same_way():
    _, tensors, config = build()
    cotangents = np.zeros((2, 9, 32), np.float32), np.ones((2, 3, 120), np.float32) * np.arange(120)
    exact, half = (
        ours(fill(config, tensors, dtype), embeddings(), cotangents) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half[0][1].dtype == half[1][1].dtype == jnp.float32
    assert cosine(half[1][1], exact[1][1]) >= 0.99
    assert relative_l2(half[1][1], exact[1][1]) > 1e-4  # bfloat16 was really used


def test_large_states_keep_their_small_parts():
    """A channel of some 10^5, as trained T5s have: in bfloat16 nothing of what layers add to it would be left."""
    _, tensors, config = build()
    x = embeddings()
    x[..., 0] = 3e5
    exact, half = (fill(config, tensors, dtype).encoder(x, MASK) for dtype in (jnp.float32, jnp.bfloat16))
    assert np.isfinite(half).all() and relative_l2(half.astype(jnp.float32)[..., 1:], exact[..., 1:]) < 0.05


def test_the_gradient_keeps_one_state_of_each_layer():
    def memory(depth):
        config = t5.Config(d_model=48, d_kv=12, d_ff=96, num_heads=4, num_layers=depth)
        return gradient_memory(t5.Encoder(config, rngs=nnx.Rngs(0)), x)

    x = jnp.zeros((16, 33, 48))
    assert (memory(10) - memory(2)) / 8 < 1.5 * x.nbytes


@pytest.mark.parametrize(("kind", "shards"), [("t5", "20KB"), ("t5_encoder", "5GB")])
def test_directory(kind, shards, tmp_path):
    oracle, tensors, config = build(kind)
    oracle.save_pretrained(tmp_path, max_shard_size=shards)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)  # as files before transformers 5 have it
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (kind == "t5")
    network = load.load(kind, tmp_path)
    same(network, fill(config, tensors, kind=kind))
    assert network.config == config


def test_what_transformers_5_writes_of_tied_words(tmp_path):
    """No tensor of the head, and a key of its own for what is scaled."""
    transformers.T5ForConditionalGeneration(t5_oracles.t5_config()).save_pretrained(tmp_path)
    network = load.load("t5", tmp_path)
    assert network.lm_head is None and network.config.output_scale == 1.0
    edit_json(tmp_path / "config.json", scale_decoder_outputs=None)
    assert load.load("t5", tmp_path).config.output_scale == pytest.approx(32**-0.5)


def test_every_tensor_is_accounted_for(tmp_path):
    oracle, _, _ = build("t5_encoder")
    oracle.save_pretrained(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda x: x.update({"encoder.other.weight": np.ones(3, np.float32)}))
    with pytest.raises(load.WeightsError, match="tensors that no parameter takes: encoder.other.weight"):
        load.load("t5_encoder", tmp_path)
    copy = {"encoder.embed_tokens.weight": np.ones((120, 32), np.float32)}
    edit_tensors(tmp_path / "model.safetensors", lambda x: (x.pop("encoder.other.weight"), x.update(copy)))
    with pytest.raises(load.WeightsError, match="encoder.embed_tokens.weight differs from shared.weight"):
        load.load("t5_encoder", tmp_path)
    with pytest.raises(load.WeightsError, match=r"of another kind of network: t5_encoder \(T5EncoderModel\), not t5"):
        load.load("t5", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, r"feed_forward_proj='relu' is not implemented; supported: gated-"),
        ({"feed_forward_proj": None}, r"feed_forward_proj=None is of the wrong type"),
        ({"relative_attention_num_buckets": 30}, r"num_buckets=30 is not implemented; supported: multiples of 4"),
        ({"model_type": "mt5"}, r"model_type='mt5' is not implemented; supported: 't5'"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(load.WeightsError, match=message):
        load.KINDS["t5"].config(PUBLISHED["google/flan-t5-xl"] | change, where="config.json")
    with pytest.raises(load.WeightsError, match="feed_forward_proj='relu'"):  # the first version has no such key
        load.KINDS["t5"].config({"model_type": "t5"}, where="config.json")


# The published config.json files.
COMMON = {"architectures": ["T5ForConditionalGeneration"], "d_kv": 64, "decoder_start_token_id": 0, "dropout_rate": 0.1}
COMMON |= {"eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True}
COMMON |= {
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_decoder_layers": 24,
    "num_layers": 24,
}
COMMON |= {"output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128, "tie_word_embeddings": False}
COMMON |= {
    "relative_attention_num_buckets": 32,
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 32128,
}
PUBLISHED = {
    "google/flan-t5-xl": COMMON | {"d_model": 2048, "d_ff": 5120, "num_heads": 32},
    "google/flan-t5-xxl": COMMON | {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    """Names and shapes of all parameters are as transformers reads them, of both halves and of the encoder alone."""
    for kind, cls in (("t5", "T5ForConditionalGeneration"), ("t5_encoder", "T5EncoderModel")):
        row = load.KINDS[kind]
        config = row.config(PUBLISHED[name], where="config.json")
        with torch.device("meta"):
            oracle = getattr(transformers, cls)(transformers.T5Config.from_dict(PUBLISHED[name]))
        expected = {n: tuple(x.shape) for n, x in oracle.state_dict().items() if n not in row.ties}
        actual = {
            n: target.source_shape for target in convert.targets(load.unfilled(row, config)) for n in target.names
        }
        block = "block.0.layer.0.SelfAttention."
        assert {n.replace(".relative", f".{block}relative"): x for n, x in actual.items()} == expected
        assert config.output_scale == 1.0 and config.hidden_act == "gelu_new"
