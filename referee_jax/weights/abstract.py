"""Networks of shapes alone: what a program is traced and compiled with where no weight is needed, or none is there.

Sizes are those of the checkpoint's config.json; for the checkpoints of configs/ that are not on disk, the published ones.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from referee_jax.models import blip2, clip, unet, vae
from referee_jax.weights import configs, convert, load

_CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)

# Checkpoint -> kind of network (load.KINDS) -> its config, from the config.json of the published files.
PUBLISHED: dict[str, dict[str, Any]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "clip_text": clip.TextConfig(**_CLIP_L),
        "unet": unet.Config(),
        "vae_decoder": vae.Config(),
    },
    "openai/clip-vit-large-patch14": {
        "clip": clip.Config(
            text_config=clip.TextConfig(**_CLIP_L),
            vision_config=clip.VisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
            ),
            projection_dim=768,
        )
    },
    "Salesforce/blip2-itm-vit-g": {"blip2": blip2.Config()},
    "checkpoints/blip2-stage1": {"blip2": blip2.Config(lm_head=True)},  # as configs/paper.py has LAVIS' files converted
}


def is_published(path_or_id: str | Path) -> bool:
    """Whether nothing is on disk and the sizes are those of `PUBLISHED`."""
    return str(path_or_id) in PUBLISHED and not Path(path_or_id).is_dir()


def network(
    kind: str,
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> nnx.Module:
    """What `load.load` would return, its leaves jax.ShapeDtypeStructs. Of a hub id, only config.json is fetched.

    Raises WeightsError where the network's sizes are not known.
    """
    row, name = load.KINDS[kind], str(path_or_id)
    if is_published(name) and kind in PUBLISHED[name]:
        config = PUBLISHED[name][kind]
    else:
        directory = load.resolve(name, revision, [str(Path(subfolder, "config.json"))]) / subfolder
        config = row.config(configs.read_json(directory / "config.json"), where=str(directory / "config.json"))
        if any(directory.glob(f"{row.stem}*.safetensors")):
            config = dataclasses.replace(config, **load.optional_parts(row, load.Tensors(directory, row.stem)))
    module = nnx.eval_shape(lambda: row.network(config, rngs=nnx.Rngs(0)))
    return convert.abstract(module, dtype=dtype, float32=row.float32)


def stable_diffusion(
    path_or_id: str | Path, *, revision: str | None = None, dtype: jax.typing.DTypeLike = jnp.float32
) -> load.StableDiffusion:
    """What `load.load_stable_diffusion` would return, of shapes alone; the prediction's type, which shapes nothing, is any."""
    names = {"text_encoder": "clip_text", "unet": "unet", "vae": "vae_decoder"}
    parts = {
        subfolder: network(kind, path_or_id, revision=revision, subfolder=subfolder, dtype=dtype)
        for subfolder, kind in names.items()
    }
    steps = configs.Schedule().num_train_timesteps
    return load.StableDiffusion(
        **parts,
        tokenizer=tokenizer(path_or_id, subfolder="tokenizer"),
        alphas_cumprod=jax.ShapeDtypeStruct((steps,), jnp.float32),
        prediction_type="epsilon",
    )


def tokenizer(path_or_id: str | Path, *, subfolder: str = "") -> Any:
    """That of a local directory; of any other checkpoint `Words`."""
    return load.load_tokenizer(path_or_id, subfolder=subfolder) if Path(path_or_id).is_dir() else Words()


class Words:
    """A tokenizer of one word, which stands for any: what it gives has the right shape, and says nothing."""

    pad_token_id, unk_token_id, bos_token_id, name_or_path = 0, None, None, "any words"
    model_max_length = 77  # CLIP's; other families of referees have lengths of their own

    def __call__(self, texts: str | Sequence[str], *, max_length: int = 1, **_: Any) -> dict[str, list]:
        """As transformers' tokenizers: `input_ids` of a text, or of each of some, padded to `max_length`."""
        row = [1] + [self.pad_token_id] * (max_length - 1)
        return {"input_ids": row if isinstance(texts, str) else [row for _ in texts]}

    def get_vocab(self) -> dict[str, int]:
        """No word has a name."""
        return {}
