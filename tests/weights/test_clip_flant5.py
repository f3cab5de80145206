"""The authors' directory of CLIP-FlanT5, of pickled shards, becomes one that is read as a referee."""

import json

import numpy as np
import pytest

from referee_jax import config, referees
from referee_jax.weights import lavis, load
from tests.lazy import t5_oracles, torch, transformers
from tests.models import test_clip_t5
from tests.oracles import networks
from tests.weights.checkpoints import same


@pytest.fixture(scope="module")
def oracle():
    return t5_oracles.clip_t5()


@pytest.fixture
def authors(oracle, tmp_path):
    """Directories of the authors, in two pickled shards without the tower, of the tower, and of the tokenizer."""
    directory, tower, words = (tmp_path / name for name in ("clip-flant5-xl", "clip", "words"))
    for path in (directory, tower, words):
        path.mkdir()
    tensors = {name: x for name, x in oracle.tensors().items() if not name.startswith("vision_tower.")}
    names = sorted(tensors)
    for n, part in enumerate((names[:40], names[40:]), 1):
        torch.save({name: tensors[name] for name in part}, directory / f"pytorch_model-0000{n}-of-00002.bin")
    values = {name: x for name, x in oracle.values().items() if name != "vision_config"}
    (directory / "config.json").write_text(json.dumps(values | {"mm_vision_tower": str(tower)}))
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=networks.text_config(), vision_config=oracle.tower.config.to_dict(), projection_dim=24
        )
    )
    state = {name.removeprefix("vision_model."): x for name, x in oracle.tower.state_dict().items()}
    clip.vision_model.load_state_dict(state)
    clip.save_pretrained(tower)
    t5_oracles.save_preprocessing(tower, 32)
    t5_oracles.tokenizer(512).save_pretrained(words)
    return directory, tower, words


def convert(authors, out, **how):
    directory, _, words = authors
    return lavis.main([str(directory)], out, tokenizer=str(words), **how)


def test_the_tower_is_put_beside_the_words(oracle, authors, tmp_path):
    out = tmp_path / "out"
    assert convert(authors, out) == "clip_t5"
    assert len(list(out.glob("*.safetensors"))) == 3 and not list(tmp_path.glob(".*"))
    network = load.load("clip_t5", out)
    same(network, test_clip_t5.fill(network.config, t5_oracles.numpy(oracle.tensors())))
    judge = referees.load_referee(config.RefereeSpec(name="vqascore", checkpoint=str(out), losses={"vqa": 1.0}))
    assert judge.template == 'Does this figure show "{}"? Please answer yes or no.' and judge.length == 128
    assert referees.name_of(str(out)) == "vqascore"


def test_a_tower_among_the_words_is_kept(oracle, authors, tmp_path):
    """And safetensors are taken, where there are some."""
    directory, tower, _ = authors
    other = {name: 2 * x for name, x in oracle.tensors().items() if name.startswith("vision_tower.")}
    torch.save(other, directory / "pytorch_model-00003-of-00003.bin")
    convert(authors, tmp_path / "out")
    bias = "vision_tower.vision_tower.vision_model.pre_layrnorm.bias"
    np.testing.assert_array_equal(load.load("clip_t5", tmp_path / "out").vision_tower.pre_layrnorm.bias, other[bias])


def test_what_does_not_fit_is_named_and_nothing_is_left(authors, tmp_path):
    directory, tower, _ = authors
    out = tmp_path / "out"
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(
        load.WeightsError, match=rf"{directory}: parameters without a tensor: .*decoder.final_layer_norm.weight"
    ):
        convert(authors, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))
    (tower / "model.safetensors").unlink()
    with pytest.raises(load.WeightsError, match=rf"{tower} has no weights: neither pytorch_model\*.bin nor model"):
        convert(authors, out)
