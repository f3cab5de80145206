"""BERT's parts against transformers' torch classes that share its layout, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from referee_jax.models import bert
from referee_jax.weights import convert
from tests.conftest import gradient_memory, relative_l2
from tests.lazy import torch, transformers
from tests.oracles import networks

SIZES = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3)
SIZES |= dict(max_position_embeddings=11, layer_norm_eps=1e-12, hidden_act="gelu")
WIDTH = 20  # of what is cross-attended to
IDS = np.array([[2, 7, 31, 8, 3, 0, 0], [2, 44, 9, 9, 17, 5, 3]], np.int32)
MASK = IDS > 0
STATES = np.random.default_rng(0).normal(size=(2, 5, WIDTH)).astype(np.float32)
STATES_MASK = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]], bool)


def fill(oracle, build):
    tensors = {name: x.numpy() for name, x in oracle.state_dict().items()}
    tied = ("*.predictions.decoder.*",)
    return convert.fill(nnx.eval_shape(build), tensors, dtype=jnp.float32, ignore=tied)


def text_model():
    config = transformers.BlipTextConfig(**SIZES, encoder_hidden_size=WIDTH)
    oracle = networks.redraw(
        transformers.models.blip.modeling_blip_text.BlipTextModel(config, add_pooling_layer=False), seed=0
    )
    return oracle, fill(oracle, lambda: bert.Bert(bert.Config(**SIZES), cross_width=WIDTH, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_crossed", [False, True])
def test_states(is_causal, is_crossed):
    oracle, network = text_model()
    states = torch.from_numpy(STATES).requires_grad_()
    # transformers 5 drops the mask of cross-attention, so the oracle is not shown what it should
    # not see.
    rows = [
        oracle(
            input_ids=torch.from_numpy(IDS[n : n + 1]).long(),
            attention_mask=torch.from_numpy(MASK[n : n + 1]).long(),
            encoder_hidden_states=states[n : n + 1, STATES_MASK[n]] if is_crossed else None,
            is_decoder=is_causal,
        ).last_hidden_state
        for n in range(2)
    ]
    theirs = torch.cat(rows)

    @jax.jit
    def call(states, ids):
        crossed = dict(states=states, states_mask=STATES_MASK) if is_crossed else {}
        return network(ids, MASK, is_causal=is_causal, **crossed)

    ours, pullback = jax.vjp(lambda s: call(s, IDS), jnp.asarray(STATES))
    assert relative_l2(ours, theirs.detach()) < 1e-4
    if is_crossed:
        cotangent = np.random.default_rng(1).normal(size=ours.shape).astype(np.float32)
        (theirs * torch.from_numpy(cotangent)).sum().backward()
        gradient = pullback(jnp.asarray(cotangent))[0]
        assert relative_l2(gradient, states.grad) < 1e-4
        assert not np.asarray(gradient)[~STATES_MASK].any()
        assert relative_l2(call(STATES[::-1], IDS), ours) > 0.1
    # Neither padding nor, if causal, a later token is seen.
    changed = call(STATES, np.where(MASK, IDS, 13))
    assert relative_l2(changed[0, :5], ours[0, :5]) < 1e-6
    later = np.array(IDS)
    later[1, 3] = 20
    assert (relative_l2(call(STATES, later)[1, :3], ours[1, :3]) < 1e-6) == is_causal


def test_the_gradient_keeps_one_state_of_each_layer():
    def memory(depth):
        config = bert.Config(**SIZES | {"num_hidden_layers": depth})
        encoder = bert.Encoder(config, cross_width=24, rngs=nnx.Rngs(0))
        return gradient_memory(lambda states: encoder(x, None, False, states, None), x)

    x = jnp.zeros((64, 11, 24))
    assert (memory(10) - memory(2)) / 8 < 1.5 * x.nbytes  # all of a layer's inner states are over 20 times as much


def test_token_types_and_pooler():
    """ALIGN's text tower."""
    oracle = transformers.AlignTextModel(transformers.AlignTextConfig(**SIZES, type_vocab_size=2))
    oracle = networks.redraw(oracle, seed=1)
    build = lambda: bert.Bert(bert.Config(**SIZES), token_types=2, pooler=True, rngs=nnx.Rngs(0))
    network = fill(oracle, build)
    theirs = oracle(input_ids=torch.from_numpy(IDS).long(), attention_mask=torch.from_numpy(MASK).long())
    ours = jax.jit(lambda n: n(IDS, MASK))(network)
    assert relative_l2(ours, theirs.last_hidden_state) < 1e-4
    assert relative_l2(network.pooler(ours), theirs.pooler_output) < 1e-4
    assert relative_l2(ours[:1], ours[1:]) > 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_language_model(smoothing):
    config = transformers.BlipTextConfig(**SIZES, encoder_hidden_size=WIDTH, label_smoothing=smoothing)
    oracle = networks.redraw(transformers.models.blip.modeling_blip_text.BlipTextLMHeadModel(config), seed=2)
    assert oracle.cls.predictions.decoder.weight is oracle.bert.embeddings.word_embeddings.weight
    assert oracle.cls.predictions.decoder.bias is oracle.cls.predictions.bias
    network = fill(oracle, lambda: bert.LMHeadModel(bert.Config(**SIZES), cross_width=WIDTH, rngs=nnx.Rngs(0)))
    ids, states = torch.from_numpy(IDS).long(), torch.from_numpy(STATES).requires_grad_()
    theirs = oracle(
        input_ids=ids,
        attention_mask=torch.from_numpy(MASK).long(),
        encoder_hidden_states=states,
        labels=ids.masked_fill(ids == 0, -100),
    )
    theirs.loss.backward()

    def loss(states):
        logits = network(IDS, MASK, states=states)
        losses = bert.token_losses(logits, IDS, smoothing=smoothing)
        return losses.mean(where=MASK[:, 1:]), (logits, losses)

    (ours, (logits, losses)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(STATES))
    assert relative_l2(logits, theirs.logits.detach()) < 1e-4
    assert float(ours) == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert relative_l2(gradient, states.grad) < 1e-4
    assert losses.shape == (2, 6) and losses.std() > 0.1


def test_what_is_not_implemented_is_refused():
    with pytest.raises(ValueError, match="hidden_act='tanh' is not implemented; supported: quick_gelu, gelu,"):
        bert.Config(hidden_act="tanh")
    with pytest.raises(ValueError, match="hidden_size=768 does not divide into num_attention_heads=7"):
        bert.Config(num_attention_heads=7)
    _, network = text_model()
    with pytest.raises(ValueError, match="12 tokens, but this BERT has 11 positions"):
        network(np.zeros((1, 12), np.int32))
