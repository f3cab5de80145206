"""T5 and CLIP-FlanT5 in torch: transformers' classes, and how the authors of VQAScore put them together."""

import json
import pathlib
import string

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from tests.oracles import networks

IMAGE_ID = -200  # in the place of the image among token ids
WORDS = (
    "red blue green circle square and photo a the left right of "
    "Does this figure show Please answer yes or no USER ASSISTANT Yes"
)
# A short conversation, of the published one's form: long ones make tests slow.
TEXTS = {"conversation": "a photo USER: <image>\n{} ASSISTANT: ", "question": 'Does this show "{}"?', "answer": "Yes"}
SIZES = dict(vocab_size=120, d_model=32, d_kv=12, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=3)
VISION = dict(
    hidden_size=40, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
)


def t5_config(**changes) -> transformers.T5Config:
    """Two layers read, three write; gated, with a head of its own, as version 1.1."""
    published = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    return transformers.T5Config(**SIZES | published | changes)


def redraw(module: nn.Module, seed: int) -> nn.Module:
    """`networks.redraw`, with norms about 1 and a head that is not the table of words, as transformers 5 makes it."""
    if isinstance(module, transformers.T5ForConditionalGeneration):
        module.lm_head.weight = nn.Parameter(module.lm_head.weight.clone())
    networks.redraw(module, seed)
    for name, p in module.named_parameters():
        if name.endswith("layer_norm.weight"):
            p.add_(1)
        elif name.endswith("Attention.q.weight"):  # there is no such factor in T5's attention: it is learned
            p.mul_(module.config.d_kv**-0.5)
    return module


def t5(seed: int = 7, **changes) -> transformers.T5ForConditionalGeneration:
    """A T5 of version 1.1."""
    return redraw(transformers.T5ForConditionalGeneration(t5_config(**changes)), seed)


def t5_encoder(seed: int = 7, **changes) -> transformers.T5EncoderModel:
    """The encoder alone."""
    return redraw(transformers.T5EncoderModel(t5_config(**changes)), seed)


def tokenizer(length: int = 64) -> transformers.T5Tokenizer:
    """T5's own, over words, letters and marks; case is kept."""
    pieces = ["▁", *(f"▁{word}" for word in WORDS.split()), *"\":?.,'<>-()"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in dict.fromkeys(pieces))]
    vocab += [(letter, -9.0) for letter in string.ascii_letters]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


class ClipT5(nn.Module):
    """CLIP-FlanT5: tower, projector and T5, under the names of the authors' class."""

    def __init__(self, text: transformers.T5Config, vision: transformers.CLIPVisionConfig):
        super().__init__()
        self.text = transformers.T5ForConditionalGeneration(text)
        self.tower = transformers.CLIPVisionModel(vision)
        width = text.d_model
        self.projector = nn.Sequential(nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width))

    def tensors(self) -> dict[str, Tensor]:
        """What the authors' class saves: the table of words by four names, two prefixes before CLIP's own."""
        words = {"embed_tokens.weight": self.text.shared.weight}
        # transformers 5 has dropped the second of CLIP's prefixes.
        tower = {f"vision_model.{name.removeprefix('vision_model.')}": x for name, x in self.tower.state_dict().items()}
        return {
            **self.text.state_dict(),
            **words,
            **{f"vision_tower.vision_tower.{name}": x for name, x in tower.items()},
            **{f"mm_projector.{name}": x for name, x in self.projector.state_dict().items()},
        }

    def values(self) -> dict:
        """config.json: the authors' keys, and ours."""
        values = json.loads(self.text.config.to_json_string())
        values |= {"architectures": ["CLIPT5ForConditionalGeneration"], "model_type": "clip_t5"}
        values |= {"tie_word_embeddings": False, "mm_hidden_size": self.tower.config.hidden_size, "use_mm_proj": True}
        values |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
        values |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_use_im_start_end": False}
        values |= {"mm_use_im_patch_token": False, "freeze_mm_mlp_adapter": False, "tune_mm_mlp_adapter": False}
        return values | {"vision_config": json.loads(self.tower.config.to_json_string())}

    def forward(self, pixels: Tensor, ids: list[list[int]], labels: list[int]) -> Tensor:
        """Logits of the labels [B, L, V]: of token ids with IMAGE_ID, padded at the end, where keys are masked."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        rows = []
        for image, row in zip(self.projector(states), ids, strict=True):
            at = row.index(IMAGE_ID)
            before, after = (
                self.text.shared(torch.tensor(part, dtype=torch.long)) for part in (row[:at], row[at + 1 :])
            )
            rows.append(torch.cat([before, image, after]))
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
        embeddings = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return self.text(
            inputs_embeds=embeddings, attention_mask=mask, labels=torch.tensor([labels] * len(rows))
        ).logits


def clip_t5(seed: int = 16, vision: dict | None = None, **text) -> ClipT5:
    """A tiny CLIP-FlanT5."""
    network = ClipT5(t5_config(**text), transformers.CLIPVisionConfig(**VISION | (vision or {})))
    redraw(network.text, seed)
    networks.redraw(network.tower, seed + 1)
    networks.redraw(network.projector, seed + 2)
    # The answer's words are likely in some pictures, each of the others in none.
    answer = tokenizer()(TEXTS["answer"])["input_ids"]
    head = network.eval().requires_grad_(False).text.lm_head.weight.mul_(0.1)
    head[answer] *= 40
    return network


@torch.no_grad()
def draw_gently(network: ClipT5) -> None:
    """Draws a network as for training, so that rounding does not grow from layer to layer.

    It may be empty, as after a start on the device "meta".
    """
    for _, x in network.tower.named_buffers():  # position_ids
        x.copy_(torch.arange(x.numel()).reshape(x.shape))
    network.text.set_input_embeddings(network.text.shared)  # what is moved from "meta" is no longer one
    network.text.lm_head.weight = nn.Parameter(network.text.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(0)
    for name, p in network.eval().requires_grad_(False).named_parameters():
        if p.ndim == 1:
            p.fill_("norm" in name and name.endswith("weight"))
            continue
        spread = 1.0 if "shared" in name else p[0].numel() ** -0.5
        spread *= network.text.config.d_kv**-0.5 if name.endswith("Attention.q.weight") else 1.0
        p.normal_(0, spread, generator=generator)


def token_ids(words: transformers.PreTrainedTokenizerBase, text: str) -> list[int]:
    """As t2v_metrics reads a text with <image>: each part by itself, so each ends with </s>."""
    before, after = (words(part)["input_ids"] for part in text.split("<image>"))
    return [*before, IMAGE_ID, *after]


def save_clip_t5(network: ClipT5, path: pathlib.Path, *, texts: dict | None = None, length: int = 64) -> pathlib.Path:
    """Write the directory that the conversion makes of the authors' files."""
    tensors = {name: x.clone() for name, x in network.tensors().items()}
    safetensors.torch.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    values = network.values() | {"model_type": "t5"} | (TEXTS if texts is None else texts)
    (path / "config.json").write_text(json.dumps(values))
    tokenizer(length).save_pretrained(path)
    save_preprocessing(path, network.tower.config.image_size)
    return path


def save_preprocessing(path: pathlib.Path, size: int) -> None:
    """Write CLIP's preprocessor_config.json."""
    values = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}, "resample": 3}
    values |= {"crop_size": {"height": size, "width": size}, "do_center_crop": True}
    values |= {"image_mean": networks.CLIP_MEAN, "image_std": networks.CLIP_STD}
    (path / "preprocessor_config.json").write_text(json.dumps(values))


def numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The tensors as arrays."""
    return {name: x.detach().numpy() for name, x in tensors.items()}
