"""Tiny random networks in the directory layout of the published checkpoints, so that both sides load the same files.

`save(root)` writes `root/stable-diffusion/{unet,vae,text_encoder,scheduler,tokenizer}` and `root/clip`. Weights are
drawn anew: libraries initialise towers so small that outputs hardly see their inputs, and a wrong port would agree.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib

import tokenizers

from tests.lazy import diffusers, nn, safetensors_torch, torch, transformers

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_MERGED_WORDS = ("red", "blue", "green", "circle", "square", "and", "photo")

BLIP_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_MERGED_WORDS, *"a ? . yes no picture of ##s".split()]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """About 100 byte-pair tokens and their merges: letters, marks and digits, a few whole words, the specials last."""
    letters = "abcdefghijklmnopqrstuvwxyz,."
    tokens = [*letters, *(c + "</w>" for c in letters + "0123456789")]
    merges = []
    for word in _MERGED_WORDS:
        left, rest = word[0], [*word[1:-1], word[-1] + "</w>"]
        for right in rest:
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    # The end token has the largest id, as in CLIP: both ways of finding the end (largest id, end id) agree.
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def tokenizer(length: int = 77) -> transformers.CLIPTokenizer:
    """A working `CLIPTokenizer` over `vocabulary()`; pads with the end token to `length`."""
    vocab, merges = vocabulary()
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def text_config(width: int = 32, length: int = 77, act: str = "quick_gelu") -> dict:
    """Keyword arguments of a two-layer CLIP text tower over `vocabulary()`."""
    vocab, _ = vocabulary()
    return dict(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        hidden_act=act,
        projection_dim=24,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )


def text_encoder(seed: int = 0, **overrides) -> transformers.CLIPTextModel:
    """Stable Diffusion's text encoder, two layers."""
    return redraw(transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**text_config(), **overrides})), seed)


def clip(seed: int = 1, image_size: int = 32, act: str = "quick_gelu") -> transformers.CLIPModel:
    """A two-tower referee, two layers each, patches of 8."""
    vision = dict(
        hidden_size=40,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=8,
        hidden_act=act,
        projection_dim=24,
    )
    config = transformers.CLIPConfig(text_config=text_config(act=act), vision_config=vision, projection_dim=24)
    return redraw(transformers.CLIPModel(config), seed)


def siglip(seed: int = 5, text: dict | None = None, vision: dict | None = None) -> transformers.SiglipModel:
    """SigLIP, two layers of text and three of vision, patches of 8 that leave 4 pixels over; `text` and `vision` change
    configs. The temperature is one at which neither sigmoid nor softmax is certain."""
    sizes = dict(hidden_size=32, intermediate_size=56, num_attention_heads=4)
    ids = dict(bos_token_id=None, eos_token_id=1, pad_token_id=0)
    config = transformers.SiglipConfig(
        text_config=sizes | ids | dict(vocab_size=len(gemma_tokenizer()), num_hidden_layers=2) | (text or {}),
        vision_config=sizes | dict(num_hidden_layers=3, image_size=36, patch_size=8) | (vision or {}),
    )
    return redraw_siglip(transformers.SiglipModel(config), seed)


def redraw_siglip(module: transformers.SiglipModel, seed: int) -> transformers.SiglipModel:
    """`redraw`, but for temperature and bias, which are no scalars here."""
    redraw(module, seed)
    with torch.no_grad():
        module.logit_scale.fill_(2.0)
        module.logit_bias.fill_(-1.0)
    return module


def gemma_tokenizer() -> transformers.Siglip2Tokenizer:
    """SigLIP 2's tokenizer, Gemma's byte pairs in lower case, over letters, marks and a few whole words."""
    vocab = {
        token: i
        for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁abcdefghijklmnopqrstuvwxyz.,"])
    }
    merges = []
    for word in _MERGED_WORDS:
        left = "▁"
        for right in word:
            if left + right not in vocab:
                merges.append((left, right))
                vocab[left + right] = len(vocab)
            left += right
    how = dict(add_bos_token=False, add_eos_token=True, padding_side="right", model_input_names=["input_ids"])
    return transformers.Siglip2Tokenizer(vocab=vocab, merges=merges, **how)


def save_siglip(module: transformers.SiglipModel, path: pathlib.Path, **how) -> pathlib.Path:
    """Write network, tokenizer and preprocessing as SigLIP 2 is published; `how` is for save_pretrained."""
    module.save_pretrained(path, **how)
    gemma_tokenizer().save_pretrained(path)
    # The published files name Gemma's class, of which transformers 5 keeps no normaliser, and so not the lower case.
    file = path / "tokenizer_config.json"
    said = {"tokenizer_class": "GemmaTokenizer", "do_lower_case": True, "add_bos_token": False, "add_eos_token": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    save_siglip_preprocessing(path, module.config.vision_config.image_size)
    return path


def save_siglip_preprocessing(path: pathlib.Path, size: int) -> None:
    """Write preprocessor_config.json as Google did."""
    values = {"image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor", "resample": 2}
    values |= {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5), "size": {"height": size, "width": size}}
    values |= {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255}
    (path / "preprocessor_config.json").write_text(json.dumps(values))


def blip_config(vision: dict | None = None, **text) -> transformers.BlipConfig:
    """Three layers of text, two of vision, patches of 8; text and vision of one width, as question answering needs."""
    sizes = dict(hidden_size=48, intermediate_size=80, num_attention_heads=4)
    ids = dict(bos_token_id=len(BLIP_WORDS), sep_token_id=BLIP_WORDS.index("[SEP]"), eos_token_id=2)
    return transformers.BlipConfig(
        text_config=sizes
        | ids
        | dict(vocab_size=len(BLIP_WORDS) + 2, num_hidden_layers=3, max_position_embeddings=80)
        | text,
        vision_config=sizes | dict(num_hidden_layers=2, image_size=32, patch_size=8) | (vision or {}),
        image_text_hidden_size=20,
    )


def blip(
    kind: type[transformers.PreTrainedModel], seed: int = 4, vision: dict | None = None, **text
) -> transformers.PreTrainedModel:
    """One of the three BLIPs. Its words are about equally likely: "yes" would else be certain, without a gradient."""
    network = redraw(kind(blip_config(vision, **text)), seed)
    for name, p in network.named_parameters():
        if "predictions.transform.LayerNorm" in name:
            p.mul_(0.2)
    return network


def blip_tokenizer(length: int = 512) -> transformers.BertTokenizer:
    """Wordpieces over `BLIP_WORDS`. As in the published directories, [DEC] and [ENC] have ids but no entries."""
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(BLIP_WORDS)}, model_max_length=length)


def save_blip(module: transformers.PreTrainedModel, path: pathlib.Path, **how) -> pathlib.Path:
    """Write network and processor; `how` is for save_pretrained."""
    module.save_pretrained(path, **how)
    save_blip_processor(path, module.config.vision_config.image_size)
    return path


def save_blip_processor(path: pathlib.Path, size: int) -> None:
    """Write what BLIP's own processor does: tokenizer, and preprocessing in processor_config.json."""
    transformers.BlipProcessor(blip_image_processor(size), blip_tokenizer()).save_pretrained(path)


def blip_image_processor(size: int) -> transformers.BlipImageProcessorPil:
    """The published preprocessing, but for the size."""
    return transformers.BlipImageProcessorPil(
        size={"height": size, "width": size}, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )


def save_image_reward(
    path: pathlib.Path, seed: int = 5
) -> tuple[transformers.BlipForImageTextRetrieval, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Write the directory of a tiny ImageReward; returns its trunk, and matrices and biases of the layers behind it."""
    trunk = blip(transformers.BlipForImageTextRetrieval, seed)
    sizes = (trunk.config.text_config.hidden_size, 24, 16, 12, 6, 1)
    mlp = redraw(nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))), seed + 1)
    tensors = {n: x for n, x in trunk.state_dict().items() if n.startswith(("vision_model.", "text_encoder."))}
    tensors |= {f"mlp.layers.{name}": x for name, x in mlp.state_dict().items()}
    values = {"mlp_sizes": sizes[1:]}
    values |= {part: getattr(trunk.config, part).to_dict() for part in ("text_config", "vision_config")}
    (path / "config.json").write_text(json.dumps(values))
    safetensors_torch.save_file(tensors, path / "model.safetensors")
    save_blip_processor(path, trunk.config.vision_config.image_size)
    return trunk, [(layer.weight, layer.bias) for layer in mlp]


def blip_trunk(config, device: str = "meta") -> transformers.BlipForImageTextRetrieval:
    """transformers' BLIP of the sizes of one of our configs with `text_config` and `vision_config`."""
    parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("text_config", "vision_config")}
    with torch.device(device):
        return transformers.BlipForImageTextRetrieval(transformers.BlipConfig(**parts))


BLIP2_TOKENS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *_MERGED_WORDS,
    *"abcdefghij",
    *(f"##{c}" for c in "abcdefghij"),
)


def blip2_tokenizer() -> transformers.BertTokenizer:
    """A working BERT tokenizer over `BLIP2_TOKENS`, and [DEC] behind them."""
    return transformers.BertTokenizer(vocab={token: n for n, token in enumerate(BLIP2_TOKENS)}, bos_token="[DEC]")


def blip2(
    seed: int = 0, vision: dict | None = None, qformer: dict | None = None
) -> transformers.Blip2ForImageTextRetrieval:
    """BLIP-2's image-text judge: three and four layers, patches of 8, five queries; `vision` and `qformer` change configs."""
    sizes = dict(
        hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=8
    )
    bert = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3, max_position_embeddings=40
    )
    bert |= dict(vocab_size=len(BLIP2_TOKENS) + 1, use_qformer_text_input=True)
    config = transformers.Blip2Config(
        vision_config=sizes | (vision or {}),
        qformer_config=bert | (qformer or {}),
        num_query_tokens=5,
        image_text_hidden_size=16,
    )
    return redraw_blip2(transformers.Blip2ForImageTextRetrieval(config), seed)


def redraw_blip2(module: nn.Module, seed: int) -> nn.Module:
    """`redraw`, with tables that are no Embeddings as loud as those that are, and the image heard in the queries."""
    redraw(module, seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("query_tokens", "position_embedding", "class_embedding")):
                p.copy_(0.7 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
            elif name.endswith("crossattention.output.dense.weight"):
                p.mul_(5)
    return module


def blip2_processor(size: int = 24, queries: int = 5) -> transformers.Blip2Processor:
    """BLIP-2's own processor; with an image, it puts <image> before a text for each of the queries."""
    return transformers.Blip2Processor(blip_image_processor(size), blip2_tokenizer(), num_query_tokens=queries)


def save_blip2(path: pathlib.Path, *, lm_head: bool, seed: int = 0, older: bool = False) -> None:
    """Write `blip2()` and its processor, in the files of transformers 4 if `older`; `lm_head` adds what only stage-1 weights
    have."""
    module, processor = blip2(seed), blip2_processor()
    module.save_pretrained(path)
    if older:
        processor.tokenizer.save_pretrained(path)
        processor.image_processor.save_pretrained(path)
    else:
        processor.save_pretrained(path)
    if not lm_head:
        return
    width, vocab = module.config.qformer_config.hidden_size, module.config.qformer_config.vocab_size
    transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width)})
    predictions = nn.ModuleDict({"transform": transform, "decoder": nn.Linear(width, vocab)})
    head = redraw(nn.ModuleDict({"predictions": predictions}), seed + 2)
    for p in transform["LayerNorm"].parameters():  # or the next word would be certain
        p.mul_(0.3)
    file = path / "model.safetensors"
    tensors = safetensors_torch.load_file(file) | {f"cls.{name}": x for name, x in head.state_dict().items()}
    # Tied, as LAVIS has it.
    tensors["cls.predictions.decoder.weight"] = tensors["embeddings.word_embeddings.weight"].clone()
    safetensors_torch.save_file(tensors, file, metadata={"format": "pt"})


def align_config(text: dict | None = None, vision: dict | None = None, width: int = 24) -> transformers.AlignConfig:
    """ALIGN with two layers of text and three stages of an EfficientNet: five blocks, of both strides and ratios."""
    bert = dict(
        vocab_size=len(BLIP_WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=70,
    )
    stages = dict(
        width_coefficient=1.0,
        depth_coefficient=1.2,
        kernel_sizes=[3, 3, 5],
        in_channels=[32, 8, 16],
        out_channels=[8, 16, width],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 1],
        expand_ratios=[1, 3, 2],
        hidden_dim=64,
        image_size=33,
    )
    return transformers.AlignConfig(
        text_config=bert | (text or {}), vision_config=stages | (vision or {}), projection_dim=width
    )


def align(seed: int = 5, **config) -> transformers.AlignModel:
    """ALIGN's two towers; the temperature is one at which texts are told apart, but not with certainty."""
    network = redraw_align(transformers.AlignModel(align_config(**config)), seed)
    network.temperature.fill_(0.1)
    return network


def redraw_align(module: transformers.AlignModel, seed: int) -> transformers.AlignModel:
    """`redraw`, with running statistics drawn about those of noise of `config.vision_config.image_size`.

    With any others activations grow or shrink from block to block. Where they are large, swish is a step at zero: then
    torch itself, in float32, differs from itself in float64, by 1 in the 55 blocks of a B7.
    """
    redraw(module, seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        # Before the norm is applied, so that those behind it see what it gives.
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        a, b = torch.randn((2, len(mean)), generator=generator)
        norm.running_mean.copy_(mean + 0.3 * a * variance.sqrt())
        norm.running_var.copy_(variance * (0.3 * b).exp())

    size, tower = module.config.vision_config.image_size, module.vision_model
    hooks = [m.register_forward_pre_hook(draw) for m in tower.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        blots = torch.rand((8, 3, 5, 5), generator=generator)
        noise = torch.rand((8, 3, size, size), generator=generator)
        tower(nn.functional.interpolate(blots, (size, size), mode="bilinear") + noise - 1)
    for hook in hooks:
        hook.remove()
    return module


def align_processor(side: int = 33, resized: int = 40, **changes) -> transformers.EfficientNetImageProcessorPil:
    """The published preprocessing, but for the sizes and what `changes`."""
    settings = dict(
        size={"height": resized, "width": resized},
        crop_size={"height": side, "width": side},
        do_center_crop=True,
        resample=2,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        do_normalize=False,
        include_top=False,
    )
    return transformers.EfficientNetImageProcessorPil(**settings | changes)


def save_align(
    module: transformers.AlignModel, path: pathlib.Path, *, side: int = 33, resized: int = 40, **how
) -> pathlib.Path:
    """Write network and ALIGN's own processor of these sizes; `how` is for save_pretrained."""
    module.save_pretrained(path, **how)
    transformers.AlignProcessor(align_processor(side, resized), blip_tokenizer(64)).save_pretrained(path)
    return path


def qwen3_vl_config(text: dict | None = None, vision: dict | None = None, **how) -> transformers.Qwen3VLConfig:
    """Four layers each, three of which deepstack adds to; patches of 4 and 6 x 6 learned positions; the sections of the
    rotary positions leave frequencies over."""
    sizes = dict(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={
            "mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_theta": 5e6, "rope_type": "default",
        },
    )  # fmt: skip
    tower = dict(
        depth=4,
        hidden_size=32,
        intermediate_size=40,
        num_heads=4,
        patch_size=4,
        out_hidden_size=32,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0, 1, 2],
    )
    words = qwen_tokenizer().get_vocab()
    ids = {f"{name}_token_id": words[f"<|{mark}|>"] for name, mark in (("image", "image_pad"), ("video", "video_pad"))}
    ids |= {f"vision_{end}_token_id": words[f"<|vision_{end}|>"] for end in ("start", "end")}
    return transformers.Qwen3VLConfig(
        text_config=sizes | (text or {}),
        vision_config=tower | (vision or {}),
        **ids | {"tie_word_embeddings": True} | how,
    )


def qwen3_vl(seed: int = 6, **config) -> transformers.Qwen3VLForConditionalGeneration:
    """Qwen3-VL, the sizes of `qwen3_vl_config`."""
    return redraw_qwen3_vl(transformers.Qwen3VLForConditionalGeneration(qwen3_vl_config(**config)), seed)


def redraw_qwen3_vl(module: transformers.Qwen3VLForConditionalGeneration, seed: int) -> nn.Module:
    """`redraw`, with norms that are no LayerNorms about 1 too; the last is small, so that no next word is certain.

    Matrices are a fifth smaller: with larger ones torch's own gradients in bfloat16 point elsewhere than in float32.
    """
    redraw(module, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.ndim == 1 and "language_model" in name:
            p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
        elif p.ndim > 1 and "embed" not in name and "lm_head" not in name:
            p.mul_(0.8)
    module.model.language_model.norm.weight.mul_(module.config.text_config.hidden_size**-0.5)
    return module


QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_WORDS = [
    *"Does this image show Answer the question with Yes yes or No user assistant".split(), *_MERGED_WORDS
]  # fmt: skip


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """Qwen's tokenizer, pairs of bytes, over all bytes and a few whole words, with its marks of a conversation."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # one for each byte
    vocab, merges = {letter: n for n, letter in enumerate(letters)}, {}
    for word in (start + word for word in _QWEN_WORDS for start in ("", "\u0120")):  # the latter stands for a space
        parts = list(word)
        while known := [pair for pair in itertools.pairwise(parts) if pair in merges]:
            n = list(itertools.pairwise(parts)).index(min(known, key=merges.get))
            parts[n : n + 2] = ["".join(parts[n : n + 2])]
        for n in range(1, len(parts)):
            left = "".join(parts[:n])
            merges[left, parts[n]] = len(merges)
            vocab[left + parts[n]] = len(vocab)
    marks = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=list(merges), eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512,
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{mark}|>" for mark in marks]})
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def qwen_image_processor(least: int = 16**2, most: int = 40**2) -> transformers.Qwen2VLImageProcessorPil:
    """The published preprocessing, but for the patches and the numbers of pixels."""
    return transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": least, "longest_edge": most}, patch_size=4, temporal_patch_size=2, merge_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip


def qwen_processor(**sizes) -> transformers.Qwen3VLProcessor:
    """Qwen3-VL's own processor, without the part for videos, which needs torchvision; `sizes` of `qwen_image_processor`."""

    class Processor(transformers.Qwen3VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            return type(argument)

    return Processor(qwen_image_processor(**sizes), qwen_tokenizer(), None, chat_template=QWEN_TEMPLATE)


def save_qwen3_vl(path: pathlib.Path, module: nn.Module | None = None, **how) -> pathlib.Path:
    """Write `qwen3_vl()`, or a network, and the files of tokenizer and processor; `how` is for save_pretrained."""
    (module or qwen3_vl()).save_pretrained(path, **how)
    qwen_tokenizer().save_pretrained(path)
    qwen_image_processor().save_pretrained(path)
    return path


def unet(
    seed: int = 2, cross_attention_dim: int = 32, spread: float = 1.0, **overrides
) -> diffusers.UNet2DConditionModel:
    """Two levels, Stable Diffusion 1 style: `attention_head_dim` is, as misnamed there, the number of heads.

    `spread` multiplies matrices. Where many layers of attention follow one another it should be below 1: else rounding in
    float32 moves a random network's gradients by more than 1e-4, torch's own as well.
    """
    config = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
    )
    module = redraw(diffusers.UNet2DConditionModel(**{**config, **overrides}), seed)
    for p in module.parameters():
        if p.ndim > 1:
            p.mul_(spread)
    return module


def exact(oracle: nn.Module, time: nn.Module) -> nn.Module:
    """A network in float64, its sinusoids of `time` included, which diffusers computes in float32 whatever the network's dtype.

    float32 angles near 1000 are off by 3e-5, torch's as much as ours, and a random network's
    gradient makes that 1e-4.
    """

    def features(timesteps):
        half = time.num_channels // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - time.downscale_freq_shift)
        angles = timesteps.double()[:, None] * exponents.exp()
        parts = [angles.sin(), angles.cos()]
        return torch.cat(parts[::-1] if time.flip_sin_to_cos else parts, dim=-1)

    time.forward = features
    return oracle.double()


def vae(seed: int = 3, **overrides) -> diffusers.AutoencoderKL:
    """KL autoencoder of three levels (f = 4); decoded values spread beyond [-1, 1], so that clamping has work to do."""
    config = dict(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.18215,
    )
    return redraw(diffusers.AutoencoderKL(**{**config, **overrides}), seed)


def tiny_vae(seed: int = 10, **overrides) -> diffusers.AutoencoderTiny:
    """As TAESD, of three levels (f = 4)."""
    config = dict(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(2, 1, 1),
    )
    return redraw(diffusers.AutoencoderTiny(**{**config, **overrides}), seed)


def scheduler(prediction_type: str = "epsilon") -> diffusers.DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def redraw(module: nn.Module, seed: int) -> nn.Module:
    """Draw every weight, norm and bias anew, with a spread at which outputs move with inputs; frozen, in eval mode.

    The temperature of a two-tower model is left alone: drawn at random it would saturate the contrastive loss.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d
    norms = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, kinds)}
    embeddings = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 0:
                continue
            x = torch.randn(p.shape, generator=generator)
            if name in norms:
                p.copy_(1 + 0.3 * x)
            elif name in embeddings:
                p.copy_(0.7 * x)
            elif p.ndim == 1:
                p.copy_(0.3 * x)
            elif p.ndim == 3:  # tables that are no nn.Embedding: [1, tokens, width]
                p.copy_(0.7 * x)
            else:
                p.copy_(_gain(name) * x / math.sqrt(p[0].numel()))
    return module.eval().requires_grad_(False)


# Spread of a matrix relative to 1/sqrt(inputs); peaked, loud attention, or text and image would whisper.
_GAINS = {
    "q_proj": 2.0, "k_proj": 2.0, "to_q": 2.0, "to_k": 2.0, "self.query": 2.0, "self.key": 2.0, "qkv": 2.0, "in_proj": 2.0,
    "attn2.to_v": 3.0, "attn2.to_out": 3.0, "self_attn.out_proj": 3.0, "time_emb_proj": 3.0, "self.value": 3.0,
    "crossattention.output.dense": 2.0, "attention.output.dense": 4.0,
}  # fmt: skip


def _gain(name: str) -> float:
    return next((gain for part, gain in _GAINS.items() if part in name), 1.3)


def save(
    root: str | os.PathLike,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    image_size: int = 32,
    latent_size: int = 8,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Write the two checkpoints (float32 safetensors) and returns `(root/stable-diffusion, root/clip)`.

    `image_size` is the referee's input, `latent_size` the side of the latents (images are four times as wide).
    """
    sd, referee = pathlib.Path(root) / "stable-diffusion", pathlib.Path(root) / "clip"
    unet(seed + 2, sample_size=latent_size).save_pretrained(sd / "unet")
    vae(seed + 3, sample_size=4 * latent_size).save_pretrained(sd / "vae")
    scheduler(prediction_type).save_pretrained(sd / "scheduler")
    save_text_encoder(text_encoder(seed), sd / "text_encoder")
    save_tokenizer(sd / "tokenizer")
    save_clip(referee, seed=seed + 1, image_size=image_size)
    return sd, referee


def save_clip(path: pathlib.Path, *, seed: int = 1, image_size: int = 32) -> None:
    """Write `clip()`, tokenizer and preprocessing in the files of the published directories, which are transformers 4's."""
    clip(seed, image_size).save_pretrained(path)
    save_tokenizer(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": image_size},
                "crop_size": {"height": image_size, "width": image_size},
                "image_mean": CLIP_MEAN,
                "image_std": CLIP_STD,
            }
        )
    )


def save_text_encoder(module: transformers.CLIPTextModel, path: pathlib.Path) -> None:
    """Write with the published names, `text_model.*`, which transformers 5 reads but no longer writes."""
    module.save_pretrained(path)
    file = path / "model.safetensors"
    tensors = {name.removeprefix("text_model."): x for name, x in safetensors_torch.load_file(file).items()}
    safetensors_torch.save_file({f"text_model.{k}": x for k, x in tensors.items()}, file, metadata={"format": "pt"})


def save_tokenizer(path: pathlib.Path, length: int = 77) -> None:
    """Write tokenizer.json and the older vocab.json and merges.txt, all of the same `vocabulary()`."""
    tokenizer(length).save_pretrained(path)
    vocab, merges = vocabulary()
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
