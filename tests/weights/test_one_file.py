"""A generator in one file, and with LoRAs, is the generator of the directory with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from referee_jax import config
from referee_jax.performance import abstract_networks
from referee_jax.performance.published import GENERATORS
from referee_jax.weights import generators, hub, load
from tests.lazy import pipelines
from tests.oracles import networks, original

DOWN, UP = "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def save(family, directory, **changes):
    """The networks, and the file of them beside the tokenizers."""
    directory.mkdir(exist_ok=True)
    parts = original.tiny(family)
    values = {n: np.ascontiguousarray(x) for n, x in original.arrays(original.one_file(family, parts)).items()}
    safetensors.numpy.save_file(values | changes, directory / "model.safetensors")
    networks.save_tokenizer(directory / "tokenizer")
    pipelines.padded_with_zero().save_pretrained(directory / "tokenizer_2")
    return parts, directory / "model.safetensors"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_file(family, tmp_path):
    parts, file = save(family, tmp_path)
    loaded = generators.load_generator(file)
    for name, network in (("unet", loaded.denoiser), ("vae", loaded.vae)):
        parts[name].save_pretrained(tmp_path / name)
        same = load.load("unet" if name == "unet" else "vae_decoder", tmp_path / name)
        assert all(map(np.array_equal, jax.tree.leaves(network), jax.tree.leaves(same)))  # but for the scale of latents
    ids = [t(["a red circle"], padding="max_length", return_tensors="np").input_ids for t in loaded.tokenizers]
    text = loaded.text_encoder(ids)
    assert (text.pooled is not None) == (family == "sdxl") and np.isfinite(text.states).all()
    generators.check(file)
    published = GENERATORS[{"sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5"}.get(family, SDXL)]
    assert loaded.schedule == published.schedule
    assert hub.version(str(file)) == hub.digest(file) and hub.is_local(str(file))


def test_what_a_file_costs(tmp_path):
    """Sizes are its own; tokenizers are not needed."""
    _, file = save("sdxl", tmp_path)
    for name in ("tokenizer", "tokenizer_2"):
        for path in (tmp_path / name).glob("*"):
            path.unlink()
        (tmp_path / name).rmdir()
    settings = config.from_config({"generator": {"checkpoint": str(file)}, "referees": ()} | NO_REFEREES)
    sized = abstract_networks.abstract(settings)
    assert not sized.assumed
    assert sized.prior.denoiser.config.cross_attention_dim == original.TINY_UNETS["sdxl"]["cross_attention_dim"]


NO_REFEREES = {"referee": {"weight": 0.0, "weight_final": 0.0}}


def test_a_lora_of_a_transformer(tmp_path):
    pipelines.save("FLUX.1-schnell", tmp_path / "flux")
    rng, name = np.random.default_rng(0), "transformer.single_transformer_blocks.1.attn.to_q"
    down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 32), (32, 2)))
    values = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    safetensors.numpy.save_file(values, tmp_path / "style.safetensors")
    plain = generators.load_generator(tmp_path / "flux")
    merged = generators.load_generator(tmp_path / "flux", loras=[(tmp_path / "style.safetensors", 1.0)])
    kernel = lambda parts: parts.denoiser.single_transformer_blocks.layer.attn.to_q.kernel[...]
    np.testing.assert_array_equal(kernel(merged)[0], kernel(plain)[0])
    np.testing.assert_allclose(kernel(merged)[1] - kernel(plain)[1], (up @ down).T, rtol=1e-4, atol=1e-5)


def test_a_silent_file_is_asked(tmp_path):
    """Those of Stable Diffusion 2 do not say whether they predict noise or velocity."""
    _, file = save("sd2", tmp_path)
    with pytest.raises(
        load.WeightsError, match=r"model\.safetensors: .* say generator\.prediction, epsilon .* or v_pred"
    ):
        generators.load_generator(file)
    for prediction in ("epsilon", "v_prediction"):
        assert generators.load_generator(file, prediction=prediction).schedule.prediction_type == prediction


def test_parts_that_are_missing(tmp_path):
    parts = original.tiny("sd1")
    values = original.arrays(original.one_file("sd1", parts))
    values = {n: np.ascontiguousarray(x) for n, x in values.items() if not n.startswith("first_stage_model.")}
    networks.save_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(values, file)
    with pytest.raises(load.WeightsError, match="it has no vae$"):
        generators.load_generator(file)
    parts["vae"].save_pretrained(tmp_path / "vae")
    assert generators.load_generator(file, vae=tmp_path / "vae").vae.config.latent_channels == 4


@pytest.mark.parametrize("is_file", [True, False])
def test_loras(is_file, tmp_path):
    """Merged while weights are read, into a file's or a directory's, by W + weight x alpha / rank x B A."""
    rng, weight = np.random.default_rng(0), 0.5
    if is_file:
        parts, checkpoint = save("sd1", tmp_path)
        module, matrix = MODULE, parts["unet"].state_dict()[f"{MODULE}.weight"].numpy()
    else:
        checkpoint, _ = networks.save(tmp_path)
        module, matrix = MODULE, networks.unet(2, sample_size=8).state_dict()[f"{MODULE}.weight"].numpy()
    down, up = rng.normal(size=(2, matrix.shape[1])), rng.normal(size=(matrix.shape[0], 2))
    width = 64 if is_file else 32
    text = rng.normal(size=(2, width)).astype(np.float32), rng.normal(size=(width, 2)).astype(np.float32)
    flat = module.replace(".", "_")
    tensors = {DOWN.format(flat): down.astype(np.float32), UP.format(flat): up.astype(np.float32)}
    tensors[f"lora_unet_{flat}.alpha"] = np.array(1.0, np.float32)
    te = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    tensors |= {f"{te}.lora_down.weight": text[0], f"{te}.lora_up.weight": text[1]}
    safetensors.numpy.save_file(tensors, tmp_path / "style.safetensors")
    plain = generators.load_generator(checkpoint)
    merged = generators.load_generator(checkpoint, loras=[(tmp_path / "style.safetensors", weight)])
    kernel = lambda parts: parts.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.kernel[...]
    np.testing.assert_allclose(kernel(plain), matrix.T, rtol=1e-6)
    np.testing.assert_allclose(kernel(merged), (matrix + weight * 0.5 * up @ down).T, rtol=1e-4, atol=1e-5)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), plain.denoiser, merged.denoiser)
    assert sum(jax.tree.leaves(changed)) == 1
    texts = [jax.tree.leaves(parts.text_encoder) for parts in (plain, merged)]
    assert sum(bool(jnp.any(a != b)) for a, b in zip(*texts, strict=True)) == 1
    tensors["lora_unet_other.lora_down.weight"] = tensors["lora_unet_other.lora_up.weight"] = text[0]
    safetensors.numpy.save_file(tensors, tmp_path / "strange.safetensors")
    with pytest.raises(
        load.WeightsError, match=r"strange\.safetensors: lora_unet_other\S+ is for no weight of the unet"
    ):
        generators.load_generator(checkpoint, loras=[(tmp_path / "strange.safetensors", 1.0)])
