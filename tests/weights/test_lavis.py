"""The authors' files: written from tiny oracles with the names spelled out here, converted, loaded, and compared."""

import argparse
import functools
import hashlib
import io
import json
import pathlib
import pickle
import re
import zipfile

import jax
import numpy as np
import pytest

from referee_jax import referees
from referee_jax.weights import convert, lavis, load
from tests.conftest import relative_l2
from tests.lazy import nn, torch, transformers
from tests.oracles import networks

IDS = np.array([[2, 6, 8, 10, 3, 0, 0], [2, 5, 9, 9, 16, 12, 3]], np.int32)
MASK = IDS > 0
SIZES = dict(hidden_size=128, intermediate_size=72, num_attention_heads=2)  # heads of 64, as in BLIP and BERT
BLIPS = {
    "blip_itm": "BlipForImageTextRetrieval",
    "blip_caption": "BlipForConditionalGeneration",
    "blip_vqa": "BlipForQuestionAnswering",
}


def renamed(state, *pairs):
    """The state with the first text of each pair replaced by the second in all names, in order."""
    actual = {}
    for name, x in state.items():
        for old, new in pairs:
            name = re.sub(old, new, name)
        actual[name] = x.clone()
    return actual


# The vision transformer of timm, as BLIP's code names it.
TIMM = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual_encoder.blocks.\1.norm"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv", r"visual_encoder.blocks.\1.attn.qkv"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection", r"visual_encoder.blocks.\1.attn.proj"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp", r"visual_encoder.blocks.\1.mlp"),
)
# The Q-Former, as LAVIS names it.
QFORMER = (
    (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^embeddings\.", "Qformer.bert.embeddings."),
    (r"^qformer\.encoder\.", "Qformer.bert.encoder."),
    (r"attention\.attention\.", "attention.self."),
    (r"^vision_projection\.", "vision_proj."),
    (r"^text_projection\.", "text_proj."),
)


def blip(kind):
    """An oracle of BLIP at 32 pixels, with the authors' epsilon and smoothing, and the state of their file."""
    ids = dict(bos_token_id=len(networks.BLIP_WORDS), sep_token_id=3, eos_token_id=2)
    text = SIZES | ids | dict(vocab_size=len(networks.BLIP_WORDS) + 2, num_hidden_layers=2, label_smoothing=0.1)
    config = transformers.BlipConfig(
        text_config=text | {"max_position_embeddings": 40},
        vision_config=SIZES | dict(num_hidden_layers=2, image_size=32, patch_size=8, layer_norm_eps=1e-6),
        image_text_hidden_size=20,
    )
    oracle = networks.redraw(getattr(transformers, BLIPS[kind])(config), 0)
    state = renamed(oracle.state_dict(), *TIMM, (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."))
    if kind == "blip_itm":  # what the authors train with
        state |= {"temp": torch.ones(()), "image_queue": torch.ones(20, 3), "ptr_queue": torch.ones(1).long()}
        state |= {"visual_encoder_m.blocks.0.norm1.weight": torch.ones(3), "text_proj_m.bias": torch.ones(20)}
        state["text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return oracle, state


def blip2(hidden_size=176, **vision):
    """An oracle of BLIP-2, and the states of LAVIS' two files; EVA's heads are 88 wide."""
    sizes = dict(hidden_size=hidden_size, num_attention_heads=2, num_hidden_layers=2) | vision
    oracle = networks.blip2(0, sizes, dict(hidden_size=128, num_attention_heads=2))
    oracle.vision_model.post_layernorm.eps = 1e-5
    state = oracle.state_dict()
    for name, x in state.items():
        if name.endswith("qkv.bias"):
            x[hidden_size : 2 * hidden_size] = 0
    state = renamed(state, *TIMM, *QFORMER, (r"^vision_model\.post_layernorm\.", "ln_vision."))
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        query, _, value = state.pop(name).chunk(3)
        state[name.replace("qkv.bias", "q_bias")], state[name.replace("qkv.bias", "v_bias")] = query, value
    seen = {name: state.pop(name) for name in list(state) if name.startswith("visual_encoder.")}
    seen = {name.removeprefix("visual_encoder."): x for name, x in seen.items()}
    # What LAVIS does not read of its file.
    seen |= {"blocks.39.norm1.weight": torch.ones(hidden_size), "norm.weight": torch.ones(hidden_size)}
    head = "Qformer.cls.predictions"
    words = state["Qformer.bert.embeddings.word_embeddings.weight"]
    generator = torch.Generator().manual_seed(1)
    state |= {
        f"{head}.transform.dense.weight": torch.randn(128, 128, generator=generator) / 8,
        f"{head}.transform.dense.bias": torch.randn(128, generator=generator) / 8,
        f"{head}.transform.LayerNorm.weight": torch.ones(128),
        f"{head}.transform.LayerNorm.bias": torch.zeros(128),
        f"{head}.decoder.weight": words.clone(),
        f"{head}.decoder.bias": torch.randn(len(words), generator=generator),
        f"{head}.bias": torch.zeros(len(words) - 1),  # from before there was [DEC]
        "Qformer.bert.embeddings.position_ids": torch.arange(40)[None],
        "temp": torch.ones(()),
    }
    return oracle, state, seen


def image_reward():
    """BLIP's vision tower and text encoder, the linear layers behind them, and the state of ImageReward's file."""
    oracle, state = blip("blip_itm")
    state = {f"blip.{name}": x for name, x in state.items() if "_m." not in name and "queue" not in name}
    sizes = (128, 24, 16, 12, 6, 1)
    linear = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    mlp = nn.Sequential(linear[0], nn.Dropout(0.2), linear[1], nn.Dropout(0.2), linear[2], nn.Dropout(0.1), *linear[3:])
    networks.redraw(mlp, 7)
    return oracle, mlp, state | {f"mlp.layers.{name}": x for name, x in mlp.state_dict().items()}


def open_clip(tower, pairs):
    """Names and fused matrices of one of transformers' towers as open_clip has them."""
    layers = ((r"encoder\.layers\.(\d+)\.layer_norm1", r"transformer.resblocks.\1.ln_1"),)
    layers += ((r"encoder\.layers\.(\d+)\.layer_norm2", r"transformer.resblocks.\1.ln_2"),)
    layers += ((r"encoder\.layers\.(\d+)\.mlp\.fc1", r"transformer.resblocks.\1.mlp.c_fc"),)
    layers += ((r"encoder\.layers\.(\d+)\.mlp\.fc2", r"transformer.resblocks.\1.mlp.c_proj"),)
    layers += ((r"encoder\.layers\.(\d+)\.self_attn\.", r"transformer.resblocks.\1.attn."),)
    state = renamed(tower, *layers, *pairs)
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return state


VISUAL = (
    (r"^embeddings\.class_embedding", "class_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^embeddings\.patch_embedding\.", "conv1."),
    (r"^pre_layrnorm\.", "ln_pre."),
    (r"^post_layernorm\.", "ln_post."),
)


def hps(width=160, act="gelu"):
    """An oracle of CLIP whose heads are 64 and 80 wide, as H/14's, and the state of HPS' file."""
    text = networks.text_config(128, act=act) | {"num_attention_heads": 2}
    vision = dict(hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    vision |= dict(patch_size=8, hidden_act=act, projection_dim=24)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    oracle = networks.redraw(transformers.CLIPModel(config), 0)
    names = (
        (r"^embeddings\.token_embedding", "token_embedding"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^final_layer_norm", "ln_final"),
    )
    state = open_clip(oracle.text_model.state_dict(), names)
    state |= {f"visual.{name}": x for name, x in open_clip(oracle.vision_model.state_dict(), VISUAL).items()}
    state["text_projection"] = oracle.text_projection.weight.T.clone()
    state["visual.proj"] = oracle.visual_projection.weight.T.clone()
    return oracle, state | {"logit_scale": oracle.logit_scale.clone(), "attn_mask": torch.ones(77, 77)}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Directories of the words that BLIP, BLIP-2 and CLIP begin with."""
    root = tmp_path_factory.mktemp("tokenizers")
    networks.blip_tokenizer().save_pretrained(root / "blip")
    words = {token: n for n, token in enumerate(networks.BLIP2_TOKENS)}
    transformers.BertTokenizer(vocab=words).save_pretrained(root / "blip2")
    networks.save_tokenizer(root / "clip")
    return root


def write(path, state, key="model"):
    torch.save({key: state, "epoch": 3} if key else state, path)
    return str(path)


def images(size=32):
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


def pixels(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def exact(network, oracle):
    """Every tensor of the oracle is the network's; the names of those that only the network has."""
    actual = convert.export(network)
    state = {name: x.numpy() for name, x in oracle.state_dict().items() if ".decoder." not in name}
    assert len(state) > 60
    for name, x in state.items():
        np.testing.assert_array_equal(actual[name], x, err_msg=name)
    return set(actual) - set(state)


@pytest.mark.parametrize("kind", BLIPS)
def test_blip(kind, tokenizers, tmp_path, capsys):
    oracle, state = blip(kind)
    names = ["visual_encoder.blocks.1.attn.qkv.bias", "visual_encoder.norm.weight", "visual_encoder.cls_token"]
    names += [
        "visual_encoder.patch_embed.proj.weight",
        "visual_encoder.pos_embed",
        "visual_encoder.blocks.0.mlp.fc1.bias",
    ]
    if kind != "blip_itm":
        names += ["text_decoder.cls.predictions.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"]
    assert set(names) <= set(state)
    file = write(tmp_path / "model.pth", state)
    assert lavis.main([file], tmp_path / "out", tokenizer=str(tokenizers / "blip")) == kind
    assert f"SHA-256 {hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()}  {file}\n" in capsys.readouterr().out
    network = load.load(kind, tmp_path / "out")
    assert exact(network, oracle) == set()
    config = network.config
    assert config.vision_config.layer_norm_eps == 1e-6 and config.vision_config.image_size == 32
    tokenizer = load.load_tokenizer(tmp_path / "out")
    dec = len(networks.BLIP_WORDS)
    assert config.text_config.bos_token_id == tokenizer.bos_token_id == tokenizer.get_vocab()["[DEC]"] == dec
    assert tokenizer.get_vocab()["[ENC]"] == dec + 1
    assert tokenizer("a red")["input_ids"] == [2, networks.BLIP_WORDS.index("a"), 5, 3]
    # What is not in the tensors (heads, epsilon, activation) shows in what the network says.
    x, ids = images(), torch.from_numpy(IDS).long()
    if kind == "blip_itm":
        expected = oracle(ids, pixels(x), attention_mask=torch.from_numpy(MASK)).itm_score
        actual = jax.jit(lambda n: n.match(n.vision_model(x), IDS, MASK))(network)
    elif kind == "blip_caption":
        expected = torch.stack(
            [oracle(p[None], i[None], labels=i[None]).loss for p, i in zip(pixels(x), ids, strict=True)]
        )
        actual = jax.jit(lambda n: n.token_losses(n.vision_model(x), IDS, smoothing=0.1).mean(-1))(network)
    else:
        # Question by question, without padding: transformers' decoder does not mask it.
        seen, start = oracle.vision_model(pixels(x))[0], torch.tensor([[dec]])
        read = [
            oracle.text_encoder(i[None, :n], encoder_hidden_states=v[None])[0]
            for i, n, v in zip(ids, MASK.sum(1), seen, strict=True)
        ]
        expected = torch.cat([oracle.text_decoder(start, encoder_hidden_states=r).logits[:, 0] for r in read])
        actual = jax.jit(lambda n: n.answer_logits(n.vision_model(x), IDS, MASK))(network)
    assert relative_l2(actual, expected.detach()) < 1e-4
    again, info = getattr(transformers, BLIPS[kind]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.vision_config.num_attention_heads == 2


def test_blip2(tokenizers, tmp_path):
    oracle, state, seen = blip2()
    assert {"Qformer.bert.encoder.layer.0.crossattention.self.query.weight", "ln_vision.bias"} <= set(state)
    assert {"Qformer.bert.encoder.layer.3.output_query.dense.weight", "vision_proj.bias"} <= set(state)
    assert {"blocks.1.attn.q_bias", "blocks.1.attn.v_bias", "blocks.0.attn.qkv.weight", "pos_embed"} <= set(seen)
    files = [write(tmp_path / "stage1.pth", state), write(tmp_path / "eva.pth", seen, key=None)]
    assert lavis.main(files, tmp_path / "out", tokenizer=str(tokenizers / "blip2")) == "blip2"
    network = load.load("blip2", tmp_path / "out")
    assert exact(network, oracle) == {
        "cls.predictions.bias",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.LayerNorm.bias",
    }
    np.testing.assert_array_equal(network.cls.predictions.bias[...], state["Qformer.cls.predictions.decoder.bias"])
    vision = network.config.vision_config
    assert (vision.layer_norm_eps, vision.post_layernorm_eps, vision.image_size) == (1e-6, 1e-5, 24)
    assert network.config.qformer_config.cross_attention_frequency == 2
    assert load.load_tokenizer(tmp_path / "out").bos_token_id == network.dec_token_id == len(networks.BLIP2_TOKENS)

    x, ids = images(24), np.array([[2, 7, 9, 12, 3, 0, 0], [2, 20, 8, 15, 21, 6, 3]])
    mask = (ids != 0).astype(np.int32)
    expected = oracle(pixels(x), torch.from_numpy(ids), torch.from_numpy(mask), use_image_text_matching_head=True)
    match = jax.jit(lambda n, ids: n.match(n.encode_image(x), n.encode_text(ids, mask)))(network, ids)
    assert relative_l2(match, expected.logits_per_image) < 1e-4

    # A fine-tuned file holds its vision transformer: then no second one is read, nor wanted.
    whole = write(tmp_path / "finetuned.pth", state | {f"visual_encoder.{name}": x for name, x in seen.items()})
    lavis.main([whole], tmp_path / "whole", tokenizer=str(tokenizers / "blip2"))
    jax.tree.map(np.testing.assert_array_equal, load.load("blip2", tmp_path / "whole"), network)
    with pytest.raises(load.WeightsError, match="finetuned.pth holds its vision transformer already: visual_encoder.b"):
        lavis.main([whole, files[1]], tmp_path / "no", tokenizer=str(tokenizers / "blip2"))
    with pytest.raises(load.WeightsError, match="stage1.pth: its vision transformer is another file: eva_vit_g.pth"):
        lavis.main(files[:1], tmp_path / "no", tokenizer=str(tokenizers / "blip2"))


@pytest.mark.parametrize("whole", [False, True])
def test_blip2_with_clip(whole, tokenizers, tmp_path):
    """The tower is CLIP's up to its last block: transformers' states before that, through LAVIS' norm."""
    sizes = dict(hidden_size=64, intermediate_size=48, num_hidden_layers=24, num_attention_heads=1, image_size=24)
    config = transformers.CLIPVisionConfig(**sizes, patch_size=8, hidden_act="quick_gelu")
    tower = networks.redraw(transformers.CLIPVisionModel(config), 0)
    state = {name.removeprefix("vision_model."): x for name, x in tower.state_dict().items()}
    seen = open_clip(state, VISUAL)
    assert {"transformer.resblocks.23.attn.in_proj_weight", "conv1.weight", "ln_pre.bias", "ln_post.bias"} <= set(seen)
    if not whole:
        ends = ("transformer.resblocks.23.", "ln_post.")
        seen = {name: x for name, x in seen.items() if not name.startswith(ends)}
    oracle, state, _ = blip2(hidden_size=64)
    files = [write(tmp_path / "stage1_vitL.pth", state), write(tmp_path / "clip.pth", seen, key=None)]
    lavis.main(files, tmp_path / "out", tokenizer=str(tokenizers / "blip2"))
    network = load.load("blip2", tmp_path / "out")
    vision = network.config.vision_config
    assert (vision.num_hidden_layers, vision.hidden_act, vision.layer_norm_eps) == (23, "quick_gelu", 1e-5)
    x = images(24)
    states = tower(pixels(x), output_hidden_states=True).hidden_states
    actual = jax.jit(lambda n: n.vision_model(x))(network)
    norm = oracle.vision_model.post_layernorm
    assert relative_l2(actual, norm(states[-2])) < 1e-4
    assert relative_l2(actual, norm(states[-1])) > 1e-2 and relative_l2(actual, norm(states[-3])) > 1e-2


def test_image_reward(tokenizers, tmp_path):
    oracle, mlp, state = image_reward()
    assert {"mlp.layers.0.weight", "mlp.layers.7.bias", "blip.visual_encoder.blocks.0.norm1.weight"} <= set(state)
    file = write(tmp_path / "ImageReward.pt", state, key=None)
    assert lavis.main([file], tmp_path / "out", tokenizer=str(tokenizers / "blip")) == "image_reward"
    network = load.load("image_reward", tmp_path / "out")
    assert network.config.mlp_sizes == (24, 16, 12, 6, 1)
    x = images()
    seen = oracle.vision_model(pixels(x)).last_hidden_state
    ids, mask = torch.from_numpy(IDS).long(), torch.from_numpy(MASK)
    text = oracle.text_encoder(ids, attention_mask=mask, encoder_hidden_states=seen, return_dict=True)
    expected = (mlp(text.last_hidden_state[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    actual = jax.jit(lambda n: n.reward(n.vision_model(x), IDS, MASK))(network)
    assert relative_l2(actual, expected) < 1e-4


def test_hps(tokenizers, tmp_path):
    oracle, state = hps()
    assert {"visual.transformer.resblocks.1.attn.in_proj_bias", "visual.proj", "text_projection"} <= set(state)
    assert {"transformer.resblocks.0.mlp.c_fc.weight", "ln_final.bias", "token_embedding.weight"} <= set(state)
    file = write(tmp_path / "HPS_v2_compressed.pt", state, key="state_dict")
    assert lavis.main([file], tmp_path / "out", tokenizer=str(tokenizers / "clip")) == "clip"
    network = load.load("clip", tmp_path / "out")
    assert exact(network, oracle) == set()
    tokenizer = load.load_tokenizer(tmp_path / "out")
    ids = tokenizer(["a red circle", "photo"], padding="max_length", return_tensors="np").input_ids
    x = images()
    expected = oracle(torch.from_numpy(ids), pixels(x))
    actual = jax.jit(lambda n: n.encode_image(x) @ n.encode_text(ids).T)(network)
    assert relative_l2(actual, expected.image_embeds @ expected.text_embeds.T) < 1e-4
    again, info = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["crop_size"] == {
        "height": 32,
        "width": 32,
    }


def scripted(state, path):
    """An archive of TorchScript with these tensors, in half precision, as OpenAI published its CLIPs."""
    top = torch.nn.Module()
    for name, x in state.items():
        *parts, last = name.split(".")
        module = top
        for part in parts:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, x.detach().half() if x.is_floating_point() else x)
    torch.jit.save(torch.jit.script(top), path)
    return str(path)


def test_openai(tokenizers, tmp_path):
    """The archive is read without torch.jit, and is transformers' CLIP with quick GELUs."""
    oracle, state = hps(128, act="quick_gelu")
    del state["attn_mask"]
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(93)}
    file = scripted(state | numbers, tmp_path / "ViT-B-32.pt")
    oracle = oracle.half().float()
    assert lavis.main([file], tmp_path / "out", tokenizer=str(tokenizers / "clip")) == "openai_clip"
    network = load.load("clip", tmp_path / "out")
    assert exact(network, oracle) == set() and network.config.vision_config.hidden_act == "quick_gelu"
    assert referees.name_of(str(tmp_path / "out")) == "clip"
    again, info = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.vision_config.hidden_act == again.config.text_config.hidden_act == "quick_gelu"
    # Their state alone does not say that it is OpenAI's.
    message = r"128 wide is not HPSv2's; .*get its directory in transformers' layout"
    fails(message, tokenizers, tmp_path, state, words="clip", out="other")


def test_an_archive_with_more_than_tensors(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Evil()))
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(
        load.WeightsError, match=r"x.pt is damaged, or no TorchScript archive .*\(builtins.print is not read"
    ):
        lavis.read(tmp_path / "x.pt")


def test_files_of_pretraining_need_the_kind(tokenizers, tmp_path):
    state = blip("blip_itm")[1] | blip("blip_caption")[1]
    file, words = write(tmp_path / "model_base.pth", state), str(tokenizers / "blip")
    with pytest.raises(load.WeightsError, match="do not say which kind this is; say --kind=blip2|"):
        lavis.main([file], tmp_path / "no", tokenizer=words)
    for kind in ("blip_itm", "blip_caption"):
        assert lavis.main([file], tmp_path / kind, kind=kind, tokenizer=words) == kind
        assert exact(load.load(kind, tmp_path / kind), blip(kind)[0]) == set()


def test_half_precision_and_old_files(tokenizers, tmp_path):
    """bfloat16, which numpy does not have, becomes float32.

    Torch's format before 1.6 is no zip file.
    """
    oracle, state = blip("blip_itm")
    state = {name: x.bfloat16() if x.is_floating_point() else x for name, x in state.items()}
    torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    lavis.main([str(tmp_path / "old.pth")], tmp_path / "out", tokenizer=str(tokenizers / "blip"))
    actual = convert.export(load.load("blip_itm", tmp_path / "out"))
    for name, x in oracle.state_dict().items():
        np.testing.assert_array_equal(actual[name], x.bfloat16().float().numpy())


# What is refused.


@pytest.fixture(scope="module")
def itm():
    return blip("blip_itm")[1]


@pytest.fixture(scope="module")
def stage1():
    return blip2()[1:]


def fails(message, tokenizers, tmp_path, state, *, words="blip", out="out", **how):
    file = write(tmp_path / "model.pth", state) if isinstance(state, dict) else str(state)
    with pytest.raises(load.WeightsError, match=message):
        lavis.main([file], tmp_path / out, tokenizer=str(tokenizers / words), **how)
    assert out != "out" or not (tmp_path / out).exists()


def test_unknown_tensor(itm, tokenizers, tmp_path):
    strange = {"visual_encoder.blocks.0.gamma_1": torch.ones(2), "text_encoder.adapter.weight": torch.ones(2)}
    first = dict(list(strange.items())[:1])
    fails(
        r"model\.pth: tensors that a blip_itm does not have: visual_encoder\.blocks\.0\.gamma_1$",
        tokenizers,
        tmp_path,
        itm | first,
    )
    second = dict(list(strange.items())[1:])
    fails(r"no part of the network: text_encoder\.adapter\.weight$", tokenizers, tmp_path, itm | second)


def test_missing_tensor(itm, tokenizers, tmp_path):
    name = "visual_encoder.blocks.1.norm2.bias"
    left = {key: x for key, x in itm.items() if key != name}
    fails(r"missing: visual_encoder\.blocks\.1\.norm2\.bias$", tokenizers, tmp_path, left)
    left = {key: x for key, x in itm.items() if key != "visual_encoder.pos_embed"}
    fails(r"there is no vision_model\.embeddings\.position_embedding, which says how large", tokenizers, tmp_path, left)


def test_half_of_a_pair(stage1, tokenizers, tmp_path):
    state, seen = stage1
    whole = state | {f"visual_encoder.{name}": x for name, x in seen.items()}
    for here, gone in (("q", "v"), ("v", "q")):
        left = {key: x for key, x in whole.items() if key != f"visual_encoder.blocks.1.attn.{gone}_bias"}
        message = rf"blocks\.1\.attn\.{here}_bias is there, but visual_encoder\.blocks\.1\.attn\.{gone}_bias is missing"
        fails(message, tokenizers, tmp_path, left, words="blip2")
    both = whole | {"visual_encoder.blocks.1.attn.qkv.bias": torch.ones(528)}
    fails("attn.q_bias and .*attn.v_bias and .*qkv.bias are the same part", tokenizers, tmp_path, both, words="blip2")


def test_wrong_shape(itm, tokenizers, tmp_path):
    turned = itm | {"itm_head.weight": itm["itm_head.weight"].T.contiguous()}
    message = r"of another shape: itm_head\.weight, as itm_head\.weight \(128, 2\) instead of \(2, 128\)$"
    fails(message, tokenizers, tmp_path, turned)
    odd = itm | {"visual_encoder.pos_embed": torch.ones(1, 16, 128)}
    fails(r"16 positions are not those of a class token and a square of patches", tokenizers, tmp_path, odd)
    _, state = hps()
    odd = state | {"transformer.resblocks.0.attn.in_proj_bias": torch.ones(100)}
    fails(r"resblocks\.0\.attn\.in_proj_bias: unexpected shape \(100,\)", tokenizers, tmp_path, odd, words="clip")


def test_head_that_is_not_tied(stage1, tokenizers, tmp_path):
    state, seen = stage1
    name = "Qformer.cls.predictions.decoder.weight"
    whole = state | {f"visual_encoder.{key}": x for key, x in seen.items()} | {name: state[name] + 1}
    fails(
        r"decoder\.weight differs from embeddings\.word_embeddings\.weight", tokenizers, tmp_path, whole, words="blip2"
    )


class Harm:
    """A pickle of this makes a file where it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.touch, (self.file,)


def test_pickles_that_run_code_are_not_run(itm, tokenizers, tmp_path):
    for new in (True, False):
        torch.save(
            {"model": itm, "x": Harm(tmp_path / "harm")}, tmp_path / "bad.pth", _use_new_zipfile_serialization=new
        )
        fails(
            r"bad\.pth is damaged, or holds more than tensors; nothing in it was run",
            tokenizers,
            tmp_path,
            tmp_path / "bad.pth",
        )
        assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "harm").exists()  # it would have


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (np.float64(3), "numpy._core.multiarray.scalar"),
        (pathlib.PurePosixPath("/a"), "pathlib.PurePosixPath"),
        (None, "torch.nn.modules.linear.Identity"),
        (functools.partial(print), "functools.partial"),
        (print, "print"),
    ],
)
def test_what_a_file_holds_besides_is_named(value, name, new, tmp_path):
    """In our sentence: torch's would have it loaded in spite of that."""
    file = tmp_path / "bad.pth"
    value = value or nn.Identity()
    torch.save({"model": {"a": torch.ones(1)}, "x": value}, file, _use_new_zipfile_serialization=new)
    with pytest.raises(load.WeightsError) as caught:
        lavis.read(file)
    assert str(caught.value) == (
        f"{file} is damaged, or holds more than tensors; nothing in it was run "
        f"(it asks for {name}: get its tensors alone, a state_dict, from the authors)"
    )


@pytest.mark.parametrize("data", [b"", b"garbage" * 100, b"PK\x03\x04" + bytes(500), b"\x80\x02}q\x00."])
def test_torchs_advice_is_not_repeated(data, tmp_path):
    (tmp_path / "bad.pth").write_bytes(data)
    with pytest.raises(load.WeightsError, match=r"bad\.pth (is damaged|does not hold)") as caught:
        lavis.read(tmp_path / "bad.pth")
    assert not any(word in str(caught.value) for word in ("weights_only", "Weights only", "trust", "\n", "\x1b"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_networks(prefix, itm, tokenizers, tmp_path):
    file = write(tmp_path / "wrapped.pth", {prefix + name: x for name, x in itm.items()})
    assert lavis.main([file], tmp_path / "out", tokenizer=str(tokenizers / "blip")) == "blip_itm"
    one = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(lavis.read(write(tmp_path / "one.pth", one))) == list(one)


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2fnuz", "bfloat16", "float16", "float64", "int8", "bool"]
)
def test_types_of_numbers(dtype, tmp_path):
    x = torch.arange(4).to(getattr(torch, dtype))
    array = lavis.read(write(tmp_path / "x.pth", {"a": x}))["a"]
    np.testing.assert_array_equal(array, x.to(torch.float64).numpy())
    assert array.dtype == (dtype if dtype in ("float16", "float64", "int8", "bool") else np.float32)


def test_types_that_numpy_does_not_have(tmp_path):
    with pytest.raises(
        load.WeightsError, match=r"x\.pth: a is of the type torch\.float32, torch\.sparse_coo, which is"
    ):
        lavis.read(write(tmp_path / "x.pth", {"a": torch.eye(2).to_sparse()}))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_truncated_file(keep, itm, tokenizers, tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": itm}, buffer)
    data, file = buffer.getvalue(), tmp_path / "short.pth"
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    fails(r"short\.pth is damaged, or holds more than tensors", tokenizers, tmp_path, file)


def test_files_without_tensors(tokenizers, tmp_path):
    fails(r"nowhere\.pth is missing$", tokenizers, tmp_path, tmp_path / "nowhere.pth")
    fails(r"should hold tensors by their names, but these are none: a, b$", tokenizers, tmp_path, {"a": 1, "b": [2]})
    for values in (torch.ones(3), {}, [torch.ones(3)]):
        torch.save(values, tmp_path / "values.pth")
        fails(r"values\.pth does not hold tensors by their names$", tokenizers, tmp_path, tmp_path / "values.pth")


def test_tokenizers_that_do_not_fit(itm, tokenizers, tmp_path):
    words = len(networks.BLIP2_TOKENS) + 2
    fails(
        rf"blip2 has {words} words, the network {len(networks.BLIP_WORDS) + 2}: it",
        tokenizers,
        tmp_path,
        itm,
        words="blip2",
    )
    message = (
        "the authors' files hold no tokenizer, and that of .*Copy the files of google-bert/bert-base-uncased .*--tok"
    )
    fails(message, tokenizers, tmp_path, itm, words="none")
    with pytest.raises(load.WeightsError, match=r"that of google-bert/bert-base-uncased cannot be had \(.*hf download"):
        lavis.main([str(tmp_path / "model.pth")], tmp_path / "out")


def test_directory_that_is_there_is_not_overwritten(itm, tokenizers, tmp_path):
    fails("is there already$", tokenizers, tmp_path, itm, out=".")


def test_command_line():
    args = lavis.parse(["in.pth", "out"])
    assert (args.input, args.vision, args.out, args.kind) == ("in.pth", None, "out", None)
    args = lavis.parse(["in.pth", "vision.pth", "out", "--kind=blip2", "--tokenizer=words"])
    assert (args.input, args.vision, args.out, args.kind) == ("in.pth", "vision.pth", "out", "blip2")
    assert args.tokenizer == "words"
    assert {row.network or kind for kind, row in lavis.KINDS.items()} <= set(load.KINDS)
