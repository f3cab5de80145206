"""Loading what transformers and diffusers write, from where it is."""

import inspect
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from referee_jax.hardware import kept
from referee_jax.models import clip
from referee_jax.models.diffusion import tiny_vae, unet, vae
from referee_jax.weights import config_json, convert, generators, hub, load, tokenizers
from tests import conftest
from tests.lazy import diffusers, pipelines, torch, transformers
from tests.oracles import networks
from tests.weights.checkpoints import edit_json, same


def test_single_file_has_the_oracles_weights(published):
    network = load.load("clip", published[1])
    oracle = networks.clip(seed=1)
    exported = convert.export(network)
    assert set(exported) == set(oracle.state_dict())
    for name, x in oracle.state_dict().items():
        np.testing.assert_array_equal(exported[name], x.numpy())


def test_shards_hold_the_same(published, tmp_path):
    networks.clip(seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    same(load.load("clip", tmp_path), load.load("clip", published[1]))


def test_float16_file_is_cast_to_the_asked_dtype(published, tmp_path):
    networks.clip(seed=1).half().save_pretrained(tmp_path)
    exact = load.load("clip", published[1])
    for dtype in (jnp.float32, jnp.bfloat16):
        network = load.load("clip", tmp_path, dtype=dtype)
        for a, b in zip(jax.tree.leaves(network), jax.tree.leaves(exact), strict=True):
            assert a.dtype == (dtype if a.ndim else jnp.float32)
            rounding = 2**-11 if dtype == jnp.float32 else 2**-8 + 2**-11
            np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=rounding, atol=1e-7)


def test_text_encoder_with_and_without_the_old_prefix(published, tmp_path):
    networks.text_encoder(0).save_pretrained(tmp_path)
    names = [
        set(safetensors.numpy.load_file(p / "model.safetensors")) for p in (tmp_path, published[0] / "text_encoder")
    ]
    assert names[0].isdisjoint(names[1])
    same(load.load("clip_text", tmp_path), load.load("clip_text", published[0], subfolder="text_encoder"))


def test_stable_diffusion(published):
    parts = generators.load_generator(published[0])
    assert isinstance(parts.denoiser, unet.UNet) and isinstance(parts.vae, vae.AutoencoderKL)
    assert isinstance(parts.text_encoder.text_encoder, clip.TextModel)
    assert parts.vae.config.scaling_factor == 0.18215
    assert parts.schedule.prediction_type == "epsilon"
    alphas_cumprod = parts.schedule.alphas_cumprod()
    assert alphas_cumprod.shape == (1000,) and alphas_cumprod.dtype == jnp.float32
    np.testing.assert_allclose(alphas_cumprod, networks.scheduler().alphas_cumprod.numpy(), rtol=1e-5)

    (tokenizer,) = parts.tokenizers
    ids = tokenizer("a red circle", padding="max_length", return_tensors="np").input_ids
    assert ids.shape == (1, tokenizer.model_max_length) == (1, 77)
    theirs = networks.text_encoder(0)(torch.from_numpy(ids)).last_hidden_state
    assert conftest.relative_l2(parts.text_encoder([ids]).states, theirs) < 1e-4


def test_another_unet(published, tmp_path):
    """In place of a checkpoint's own, which need not be there."""
    shutil.copytree(published[0], tmp_path / "sd", ignore=shutil.ignore_patterns("unet"))
    networks.unet(seed=9, sample_size=8).save_pretrained(tmp_path / "fast")
    parts = generators.load_generator(tmp_path / "sd", unet=tmp_path / "fast")
    same(parts.denoiser, load.load("unet", tmp_path / "fast"))
    same(parts.vae, load.load("vae_decoder", published[0], subfolder="vae"))
    load.check(tmp_path / "fast", "unet")
    networks.unet(seed=9, cross_attention_dim=16).save_pretrained(tmp_path / "narrow")
    with pytest.raises(convert.WeightsError, match="narrow: unet: cross_attention_dim=16 does not fit the other parts"):
        generators.load_generator(tmp_path / "sd", unet=tmp_path / "narrow")


def test_another_decoder(published, tmp_path):
    """A tiny one in the place of a checkpoint's own, or among its parts."""
    networks.tiny_vae().save_pretrained(tmp_path / "tiny")
    parts = generators.load_generator(published[0], vae=tmp_path / "tiny")
    assert isinstance(parts.vae, tiny_vae.AutoencoderTiny)
    load.check(tmp_path / "tiny", load.kind_of(tmp_path / "tiny"))
    shutil.copytree(published[0], tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "vae")
    shutil.copytree(tmp_path / "tiny", tmp_path / "sd" / "vae")
    generators.check(tmp_path / "sd")
    same(generators.load_generator(tmp_path / "sd").vae, parts.vae)
    networks.tiny_vae(latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(convert.WeightsError, match="unet: in_channels=4 does not fit the other parts, which have 16"):
        generators.load_generator(published[0], vae=tmp_path / "wide")
    edit_json(tmp_path / "tiny" / "config.json", _class_name="VQModel")
    with pytest.raises(convert.WeightsError, match="_class_name='VQModel' is not implemented; supported: UNet2D"):
        generators.load_generator(published[0], vae=tmp_path / "tiny")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shape", ["linear", "scaled_linear"])
@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_noise_schedules(name, shape, prediction, tmp_path):
    theirs = getattr(diffusers, name)(
        beta_schedule=shape, beta_start=0.00085, beta_end=0.012, prediction_type=prediction
    )
    theirs.save_pretrained(tmp_path)
    schedule = config_json.config_from_json(
        config_json.Schedule, config_json.read_json(tmp_path / "scheduler_config.json")
    )
    np.testing.assert_allclose(schedule.alphas_cumprod(), theirs.alphas_cumprod.numpy(), rtol=2e-5)
    assert schedule.prediction_type == prediction


def test_keys_that_a_sampler_does_not_read(tmp_path):
    """SDXL's file has one of the sampler that it was made of; Euler's ends without noise all the same."""
    values = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1}
    values |= {"set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False}
    assert config_json.schedule(values, where="").timesteps(4) == [751, 501, 251, 1, -1]
    values["_class_name"] = "DDIMScheduler"
    assert config_json.schedule(values, where="").timesteps(4) == [751, 501, 251, 1, 0]


# What we write.


def test_transformers_reads_what_we_write(published, tmp_path):
    network = load.load("clip", published[1])
    load.save_directory(tmp_path, network, config_json.read_json(published[1] / "config.json"))
    oracle, info = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, x in networks.clip(seed=1).state_dict().items():
        np.testing.assert_array_equal(oracle.state_dict()[name].numpy(), x.numpy())
    same(load.load("clip", tmp_path), network)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_parts_are_written_for_their_library(part, published, tmp_path):
    kind, cls = {
        "text_encoder": ("clip_text", transformers.CLIPTextModel),
        "unet": ("unet", diffusers.UNet2DConditionModel),
        "vae": ("vae_decoder", diffusers.AutoencoderKL),
    }[part]
    encoder = ("encoder.", "quant_conv.") if part == "vae" else ()  # which we neither read nor write
    network = load.load(kind, published[0], subfolder=part)
    load.save_directory(
        tmp_path, network, config_json.read_json(published[0] / part / "config.json"), dtype=jnp.float16
    )
    file = next(tmp_path.glob("*.safetensors"))
    assert {x.dtype for x in safetensors.numpy.load_file(file).values()} == {np.dtype(np.float16)}
    oracle, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("unexpected_keys", "mismatched_keys"))
    assert all(name.startswith(encoder) for name in info["missing_keys"])
    again = load.load(kind, tmp_path)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(network), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-11, atol=1e-7)
    sizes = [x.numel() for name, x in oracle.named_parameters() if not name.startswith(encoder)]
    assert sum(sizes) == sum(x.size for x in jax.tree.leaves(network))


# Samplers with which diffusers replaces Stable Diffusion's: a new one has keys that no test knows.
SAMPLERS = """DDIMInverse DDIM DDPM DEISMultistep DPMSolverMultistepInverse DPMSolverMultistep DPMSolverSinglestep
    EDMDPMSolverMultistep EDMEuler EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete
    KDPM2Discrete LCM LMSDiscrete PNDM SASolver TCD UniPCMultistep""".split()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_schedule_behind_any_sampler(name, prediction, tmp_path):
    """It is that of training, whichever sampler the checkpoint was saved with."""
    theirs = networks.scheduler(prediction)
    getattr(diffusers, f"{name}Scheduler").from_config(theirs.config).save_pretrained(tmp_path / "scheduler")
    schedule = generators.read_schedule(tmp_path)
    np.testing.assert_allclose(schedule.alphas_cumprod(), theirs.alphas_cumprod.numpy(), rtol=2e-5)
    assert schedule.prediction_type == prediction


@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep", "FlowMatchEulerDiscrete", "FlowMatchLCM"])
def test_samplers_of_networks_of_another_training(name, tmp_path):
    getattr(diffusers, f"{name}Scheduler")().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(load.WeightsError, match=r"scheduler_config\.json: .*(is not implemented|is not known)"):
        generators.read_schedule(tmp_path)


# How images are prepared.


def blip_directory(path, size=32):
    """What is read of a checkpoint besides its network."""
    path.mkdir()
    networks.save_blip_processor(path, size)
    return path


def older_file(path, **changes):
    """Adds what transformers 4 would have written beside."""
    networks.blip_image_processor(32).save_pretrained(path)
    edit_json(path / "preprocessor_config.json", **changes)


def test_preprocessing_of_a_processor_saved_today(tmp_path):
    """It is one part of one file, as the processor itself reads it."""
    path = blip_directory(tmp_path / "blip", 48)
    assert not (path / "preprocessor_config.json").exists()
    settings = load.read_preprocessing(path)
    assert settings["size"] == {"height": 48, "width": 48} and settings["image_mean"] == list(networks.CLIP_MEAN)
    processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
    assert processor.to_dict() == transformers.BlipProcessor.from_pretrained(path).image_processor.to_dict()


def test_preprocessing_in_a_file_of_its_own(tmp_path):
    """As published checkpoints have it.

    Beside it, their processor_config.json says other things, or nothing is there.
    """
    path = blip_directory(tmp_path / "blip")
    older_file(path, size={"height": 40, "width": 40})
    (path / "processor_config.json").write_text('{"num_query_tokens": 32, "processor_class": "Blip2Processor"}')
    for _ in range(2):
        assert load.read_preprocessing(path)["size"] == {"height": 40, "width": 40}
        assert dict(transformers.AutoImageProcessor.from_pretrained(path, backend="pil").size) == {
            "height": 40,
            "width": 40,
        }
        (path / "processor_config.json").unlink(missing_ok=True)


def test_of_two_preprocessings_the_one_that_transformers_takes(tmp_path):
    path = blip_directory(tmp_path / "blip")
    older_file(path, size={"height": 40, "width": 40}, image_mean=[0.0, 0.0, 0.0])
    settings, processor = (
        load.read_preprocessing(path),
        transformers.AutoImageProcessor.from_pretrained(path, backend="pil"),
    )
    assert settings["size"] == dict(processor.size) == {"height": 32, "width": 32}
    assert settings["image_mean"] == list(processor.image_mean) == list(networks.CLIP_MEAN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            None,
            r"preprocessor_config\.json is missing, and there is no processor_config\.json that says how an image is",
        ),
        (
            "{}",
            r"preprocessor_config\.json is missing, and there is no processor_config\.json that says how an image is",
        ),
        (
            '{"image_processor": null}',
            r"preprocessor_config\.json is missing, and there is no processor_config\.json that says how an image is",
        ),
        ("[]", r"processor_config\.json does not hold a JSON object$"),
        ("{", r"processor_config\.json is not valid JSON"),
        ('{"image_processor": [1]}', r"processor_config\.json: image_processor does not hold a JSON object$"),
    ],
)
def test_without_preprocessing(tmp_path, text, message):
    path = blip_directory(tmp_path / "blip")
    (path / "processor_config.json").unlink()
    if text is not None:
        (path / "processor_config.json").write_text(text)
    with pytest.raises(load.WeightsError, match=message) as caught:
        load.read_preprocessing(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_hub_id_that_is_not_there_offline():
    """The message is one line with the exact command for another machine."""
    with pytest.raises(load.WeightsError) as caught:
        load.load("clip", "openai/clip-vit-base-patch32", revision="3d74acf9")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "openai/clip-vit-base-patch32 is not a local directory, and getting it from the Hugging Face hub"
    )
    assert message.endswith(
        "run: hf download openai/clip-vit-base-patch32 --revision 3d74acf9 --include config.json "
        "--include model.safetensors --include model.safetensors.index.json --include 'model-?????-of-?????.safetensors' "
        "--include README.md"
    )


@pytest.mark.parametrize("name", ["/no/such/place", "./clip", "a/b/c", "two words", "~/nothing here", ""])
def test_path_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(load.WeightsError, match="is not a directory, nor the id of a repository on the hub$"):
        load.load("clip", name)


def test_file_for_a_directory(directory):
    with pytest.raises(load.WeightsError, match=r"model\.safetensors is not a directory: say .*/clip$"):
        load.load("clip", directory / "model.safetensors")


def test_hub_is_asked_for_the_needed_files_at_the_revision(published, monkeypatch):
    requests = []

    def download(name, **kwargs):
        requests.append((name, kwargs))
        return str(published[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    generators.load_generator("someone/some-model", revision="abc")
    assert all(name == "someone/some-model" and kwargs["revision"] == "abc" for name, kwargs in requests)
    configs, patterns = (kwargs["allow_patterns"] for _, kwargs in requests)
    assert not [name for name in configs if "safetensors" in name or "*" in name] and "unet/config.json" in configs
    needed = [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/config.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    ]
    others = [
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "safety_checker/model.safetensors",
        "feature_extractor/preprocessor_config.json",
    ]
    filtered = list(huggingface_hub.utils.filter_repo_objects([*needed, *others], allow_patterns=patterns))
    assert filtered == needed


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "KolorsPipeline"}, "_class_name='KolorsPipeline' is not implemented"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
    ],
)
def test_what_is_not_implemented_is_refused_before_the_download(
    published, monkeypatch, tmp_path, file, changes, message
):
    asked, directory = [], tmp_path / "sd"
    shutil.copytree(published[0], directory, ignore=shutil.ignore_patterns("*.safetensors"))
    values = config_json.read_json(directory / file) if (directory / file).exists() else {}
    (directory / file).write_text(json.dumps(values | changes))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.append(how) or str(directory))
    with pytest.raises(load.WeightsError, match=message):
        generators.load_generator("someone/some-model")
    assert len(asked) == 1 and not [name for name in asked[0]["allow_patterns"] if "safetensors" in name]


def test_either_file_of_preprocessing_is_fetched(monkeypatch, tmp_path):
    requests = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **how: requests.append(how["allow_patterns"]) or str(tmp_path),
    )
    networks.save_blip_processor(tmp_path, 32)
    load.fetch_referee("someone/some-model")
    files = ["preprocessor_config.json", "processor_config.json"]
    (patterns,) = requests
    assert list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns)) == files


LOAD = """
import json, resource, sys, time
import jax.numpy as jnp
from referee_jax.weights import load
start = time.monotonic()
network = load.load("blip2", sys.argv[1], dtype=jnp.bfloat16)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
dtype = str(network.vision_model.post_layernorm.bias.dtype)
print(json.dumps({"seconds": time.monotonic() - start, "peak": peak, "dtype": dtype}))
"""


@pytest.mark.slow
def test_full_size_blip2_is_read_tensor_by_tensor(tmp_path):
    """ViT-g and Q-Former, 1.17 billion random parameters, float32 on disk -> bfloat16 and float32 in memory, in a fresh process.

    Measured on one core beside other work: 28 s, peak 5.3 GB of resident memory.
    """
    config = transformers.Blip2Config(
        qformer_config={"vocab_size": 30523, "use_qformer_text_input": True},
        image_text_hidden_size=256,
        num_query_tokens=32,
    )
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in transformers.Blip2ForImageTextRetrieval(config).state_dict().items()}
    rng, directory = np.random.default_rng(0), tmp_path / "blip2"
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    values = json.loads(config.to_json_string()) | {"architectures": ["Blip2ForImageTextRetrieval"]}
    load.save_directory(directory, tensors, values)
    size = sum(x.nbytes for x in tensors.values())
    assert size > 4.5e9
    del tensors
    done = subprocess.run([sys.executable, "-c", LOAD, directory], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    print(figures)
    assert figures["dtype"] == "bfloat16"
    # The file's pages and the weights together would be more.
    assert figures["peak"] < 7e9


def test_pytorch_is_not_recommended(tmp_path, monkeypatch):
    """By transformers, which says while it is imported that it is missing; the user's own variable stays as it was."""
    advice = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    (tmp_path / "transformers.py").write_text(
        f"import os\nfirst = os.environ.get({advice!r})\n"
        f"def __getattr__(name):\n    return name, first, os.environ.get({advice!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for before in (None, "0"):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "transformers", raising=False)
            patch.delenv(advice, raising=False) if before is None else patch.setenv(advice, before)
            assert tokenizers.transformers_class("Auto") == ("Auto", "1", "1") and os.environ.get(advice) == before
    assert "import transformers" not in inspect.getsource(tokenizers.read)


LOAD_SDXL = """
import json, resource, sys, time
import jax, jax.numpy as jnp
from referee_jax.weights import generators
start = time.monotonic()
parts = generators.load_generator(sys.argv[1], dtype=jnp.bfloat16)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
count = sum(x.size for x in jax.tree.leaves((parts.text_encoder, parts.denoiser, parts.vae)))
print(json.dumps({"seconds": time.monotonic() - start, "peak": peak, "count": count}))
"""


def save_random(directory, shapes, config, stem, *, shard=2**30):
    """Random float16 tensors of these shapes in shards, as a directory of transformers' or diffusers' has them."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    rng, places, shards, current = np.random.default_rng(0), {}, [{}], 0
    for name, shape in shapes.items():
        if current > shard:
            shards, current = [*shards, {}], 0
        shards[-1][name] = shape
        current += 2 * int(np.prod(shape))
    for n, part in enumerate(shards, 1):
        file = f"{stem}-{n:05}-of-{len(shards):05}.safetensors"
        drawn = {
            name: (0.02 * rng.standard_normal(shape, np.float32)).astype(np.float16) for name, shape in part.items()
        }
        safetensors.numpy.save_file(drawn, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.slow
def test_full_size_sdxl_is_read_from_float16(tmp_path):
    """3.3 billion random parameters, float16 on disk -> bfloat16 in memory, in a fresh process.

    Measured on one core beside other work: 26 s, peak 7.1 GB of resident memory.
    """
    root = tmp_path / "sdxl"
    pipeline = pipelines.save("SDXL", root)  # its tokenizers, scheduler and index
    words = dict(vocab_size=len(pipeline.tokenizer), bos_token_id=0, eos_token_id=len(pipeline.tokenizer) - 1)
    with torch.device("meta"):
        encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_L | words))
        encoder_2 = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**BIG_G | words))
        unet = diffusers.UNet2DConditionModel(**SDXL_UNET)
        vae = diffusers.AutoencoderKL(**SDXL_VAE)
    for folder, network in (("text_encoder", encoder), ("text_encoder_2", encoder_2), ("unet", unet), ("vae", vae)):
        shutil.rmtree(root / folder)
        is_text = folder.startswith("text")
        config = json.loads(network.config.to_json_string()) if is_text else dict(network.config)
        shapes = {name: tuple(x.shape) for name, x in network.state_dict().items()}
        save_random(root / folder, shapes, config, load.TRANSFORMERS if is_text else load.DIFFUSERS)
    done = subprocess.run([sys.executable, "-c", LOAD_SDXL, root], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    print(figures)
    assert figures["count"] > 3.2e9
    assert figures["peak"] < 9e9 and figures["seconds"] < 60


CLIP_L = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77
)
BIG_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
    projection_dim=1280, max_position_embeddings=77,
)  # fmt: skip
SDXL_UNET = dict(
    block_out_channels=[320, 640, 1280], down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20], cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
SDXL_VAE = dict(
    block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=2,
    up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.13025,
)  # fmt: skip


def test_a_second_process_builds_no_network(monkeypatch, tmp_path):
    """Of the referees and the U-Net of the shapes world: a network without weights comes as it was built."""
    monkeypatch.setattr(kept, "directory", lambda: tmp_path / "traced")
    names = {"unet": "stable-diffusion/unet", "vae_decoder": "stable-diffusion/vae", "clip": "clip", "blip2": "blip2"}
    names |= {"blip_itm": "blip_itm", "clip_t5": "vqascore"}
    build = lambda: [load.load(kind, hub.local_path(f"shapes/{name}")) for kind, name in names.items()]
    first = build()
    load._unfilled.cache_clear()
    monkeypatch.setattr(nnx, "eval_shape", lambda *_: pytest.fail("a network was built"))
    for network, again in zip(first, build(), strict=True):
        assert jax.tree.structure(network) == jax.tree.structure(again)
        assert all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (network, again)), strict=True))
