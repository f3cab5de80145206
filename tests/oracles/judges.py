"""Referees in plain torch, on transformers' networks: what `tests.oracles.inversion` asks of one.

A judge has `image_size`, the side S of the views it takes, and two ways in, both batched over prompts:

    encode(...) -> text                    all that depends on the text alone, tensors by name with a leading axis B
    forward(views, text, names) -> losses  views [B, V, S, S, 3] in [0, 1], NHWC, to the named losses, each [B, V]
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

Text = dict[str, Tensor]


class Judge(nn.Module):
    """A network behind the checkpoint's normalisation of images."""

    def __init__(self, network: nn.Module, mean: Iterable[float], std: Iterable[float]):
        super().__init__()
        self.network, self.image_size = network, network.config.vision_config.image_size
        for name, values in {"mean": mean, "std": std}.items():
            self.register_buffer(name, torch.tensor(tuple(values)), persistent=False)

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The networks that compute in another type than float32, if any do."""
        return (self.network,)

    def pixels(self, views: Tensor) -> Tensor:
        """Views to normalised images [B V, 3, S, S], in the type of the network that sees them."""
        x = ((views - self.mean) / self.std).flatten(0, 1).permute(0, 3, 1, 2)
        return x.to(self.parts[0].dtype)


class Clip(Judge):
    """`cosine` and, where there are other texts, `contrastive` of a CLIPModel."""

    @classmethod
    def load(cls, directory: str | os.PathLike, mean: Iterable[float], std: Iterable[float]) -> "Clip":
        """The network of a directory."""
        return cls(transformers.CLIPModel.from_pretrained(directory), mean, std)

    @torch.no_grad()
    def encode(self, ids: Tensor, negatives: Tensor | None = None) -> Text:
        """Token ids int64[B, T], and of N other texts [B, N, T], to unit features [B, 1 + N, P], the text's own first."""
        ids = ids[:, None] if negatives is None else torch.cat([ids[:, None], negatives], 1)
        states = self.network.text_model(input_ids=ids.flatten(0, 1)).pooler_output
        features = self.network.text_projection(states)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return {"features": F.normalize(features, dim=-1).unflatten(0, ids.shape[:2])}

    def forward(self, views: Tensor, text: Text, names: tuple[str, ...]) -> dict[str, Tensor]:
        """See the top of this file."""
        states = self.network.vision_model(self.pixels(views)).pooler_output
        features = self.network.visual_projection(states).to(views.dtype)
        image = F.normalize(features, dim=-1).unflatten(0, views.shape[:2])
        cosines = torch.einsum("bvd,bnd->bvn", image, text["features"])
        losses = {}
        if "cosine" in names:
            losses["cosine"] = 1 - cosines[..., 0]
        if "contrastive" in names:
            losses["contrastive"] = -(self.network.logit_scale.exp() * cosines).log_softmax(-1)[..., 0]
        return losses


class Blip2(Judge):
    """`itm` and `itg` of a Blip2ForImageTextRetrieval and LAVIS' language head, which transformers does not have.

    One pass of the vision transformer, and one computation of its keys and values, serves both. The Q-Former is float32, as
    transformers keeps it: its own layers, in a loop that knows masks in which not all tokens see the same.
    """

    SMOOTHING = 0.1  # of the captions' targets, as BLIP-2 was trained

    def __init__(self, network: transformers.Blip2ForImageTextRetrieval, mean: Iterable[float], std: Iterable[float]):
        super().__init__(network, mean, std)
        config = network.config.qformer_config
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(config.hidden_size, config.hidden_size),
                "LayerNorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            }
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    @classmethod
    def load(cls, directory: str | os.PathLike, mean: Iterable[float], std: Iterable[float]) -> "Blip2":
        """The network of a directory, with its language head if it has one; that one's matrix is the table of words."""
        judge = cls(transformers.Blip2ForImageTextRetrieval.from_pretrained(directory), mean, std)
        head, tensors = "cls.predictions.", safetensors.torch.load_file(pathlib.Path(directory) / "model.safetensors")
        if f"{head}decoder.bias" in tensors:
            transform = {name: tensors[f"{head}transform.{name}"] for name in judge.transform.state_dict()}
            judge.transform.load_state_dict(transform)
            judge.bias.data = tensors[f"{head}decoder.bias"]
        return judge

    @property
    def parts(self) -> Sequence[nn.Module]:
        return (self.network.vision_model,)

    @torch.no_grad()
    def encode(self, ids: Tensor, mask: Tensor, dec_token_id: int) -> Text:
        """Token ids int64[B, T] and a mask that is 1 where they are not padding; captions begin with `dec_token_id`."""
        caption = torch.cat([torch.full_like(ids[:, :1], dec_token_id), ids[:, 1:-1]], 1)
        embed = lambda ids: self.network.qformer.layernorm(self.network.embeddings(input_ids=ids))
        return {"states": embed(ids), "caption": embed(caption), "targets": ids[:, 1:], "real": mask.bool()}

    def forward(self, views: Tensor, text: Text, names: tuple[str, ...]) -> dict[str, Tensor]:
        """See the top of this file."""
        batch, count = views.shape[:2]
        states = self.network.vision_model(self.pixels(views)).last_hidden_state.float()
        layers = self.network.qformer.encoder.layer
        image = [_keys(layer.crossattention, states) if layer.has_cross_attention else None for layer in layers]
        text = {name: x.repeat_interleave(count, 0) for name, x in text.items()}
        ask = {"itm": self._match, "itg": self._caption}
        return {name: ask[name](image, text).unflatten(0, (batch, count)) for name in names}

    def _match(self, image: list, text: Text) -> Tensor:
        """-log p(the text is this image's): queries and text see each other."""
        queries = self.network.query_tokens.shape[1]
        sees = F.pad(text["real"], (queries, 0), value=True)[:, None, None]
        states = self._qformer(text["states"], image, sees)[:, :queries]
        return -self.network.itm_head(states).mean(1).log_softmax(-1)[:, 1]

    def _caption(self, image: list, text: Text) -> Tensor:
        """Cross-entropy of the text's tokens: the queries see themselves alone, a token them and those before it."""
        queries, tokens = self.network.query_tokens.shape[1], text["caption"].shape[1]
        sees = torch.ones(queries + tokens, queries + tokens, dtype=torch.bool, device=text["caption"].device).tril()
        sees[:queries, :queries] = True
        x = self._qformer(text["caption"], image, sees)[:, queries:]
        x = self.transform["LayerNorm"](F.gelu(self.transform["dense"](x)))
        logits = F.linear(x, self.network.embeddings.word_embeddings.weight, self.bias)
        targets, real = text["targets"], text["real"][:, 1:]
        # Of rows of words: with the words in the middle, log_softmax is slow on a GPU.
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=self.SMOOTHING
        )
        return (losses.unflatten(0, targets.shape) * real).sum(1) / real.sum(1)

    def _qformer(self, text: Tensor, image: list, sees: Tensor) -> Tensor:
        """Queries, then `text` [B V, T, D], through the layers; `image` has the keys and values of those that read it."""
        queries = self.network.qformer.layernorm(self.network.query_tokens).expand(len(text), -1, -1)
        x, count = torch.cat([queries, text], 1), queries.shape[1]
        for layer, seen in zip(self.network.qformer.encoder.layer, image, strict=True):
            x = _attend(layer.attention, x, _keys(layer.attention, x), sees)
            query, text = x[:, :count], x[:, count:]
            if seen is not None:
                query = _attend(layer.crossattention, query, seen)
            x = torch.cat([layer.feed_forward_chunk_query(query), layer.feed_forward_chunk(text)], 1)
        return x


def _keys(attention: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    inner = attention.attention
    return _heads(inner, inner.key(states)), _heads(inner, inner.value(states))


def _attend(attention: nn.Module, x: Tensor, found: tuple[Tensor, Tensor], sees: Tensor | None = None) -> Tensor:
    """An attention of transformers' Q-Former, with its residual and norm, to given keys and values."""
    query = _heads(attention.attention, attention.attention.query(x))
    seen = F.scaled_dot_product_attention(query, *found, attn_mask=sees)
    return attention.output(seen.transpose(1, 2).flatten(2), x)


def _heads(inner: nn.Module, x: Tensor) -> Tensor:
    return x.unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)


# model_type of a config.json -> its judge.
JUDGES: dict[str, type[Judge]] = {"clip": Clip, "blip-2": Blip2}


def load(directory: str | os.PathLike, mean: Iterable[float], std: Iterable[float]) -> Judge:
    """The judge of a directory in the Hugging Face layout."""
    kind = json.loads((pathlib.Path(directory) / "config.json").read_text())["model_type"]
    return JUDGES[kind].load(directory, mean, std)
