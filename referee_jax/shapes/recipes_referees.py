"""Recipes of the shapes world's referees, like recipes_generator.py of the generator.

All see degraded pictures (`degrade`), learn to tell hard negatives apart, and have auxiliary heads. One labels each
patch with the attributes and relations of the objects in it, which teaches binding, since what is in one place
belongs together. Where text is read beside a picture, another labels each word as true or false. These heads are
dropped after training; with them it takes minutes instead of hours.
"""

import copy
import json
import pathlib

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from referee_jax.models import bert
from referee_jax.shapes import batches, tokens, world

Batch = dict[str, torch.Tensor]
TEXT = dict(
    vocab_size=len(tokens.VOCABULARY), hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=tokens.LENGTH, eos_token_id=tokens.END, bos_token_id=tokens.START, pad_token_id=tokens.END,
    projection_dim=128,
)  # fmt: skip
VISION = dict(
    hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=world.SIZE,
    patch_size=batches.PATCH, projection_dim=128,
)  # fmt: skip
BERT = dict(
    vocab_size=len(tokens.WORDPIECES), hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=tokens.LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
)  # fmt: skip
BLIP_VISION = {name: x for name, x in VISION.items() if name != "projection_dim"} | dict(
    num_hidden_layers=3, hidden_act="quick_gelu", layer_norm_eps=1e-5, initializer_range=0.02,
)  # fmt: skip
PAD, SEP, DEC, ENC, YES, NO = (tokens.WORDPIECES[piece] for piece in ("[PAD]", "[SEP]", "[DEC]", "[ENC]", "yes", "no"))


def degrade(images: torch.Tensor) -> torch.Tensor:
    """Fine and coarse noise, and a change of brightness, like those of pictures during an optimisation."""
    amounts = torch.rand(3, len(images), 1, 1, 1, device=images.device)
    amounts = amounts * (torch.rand_like(amounts) < 0.7)
    coarse = F.interpolate(torch.randn(len(images), 3, 8, 8, device=images.device), images.shape[-2:], mode="bilinear")
    noisy = images + 0.3 * amounts[0] * torch.randn_like(images) + 0.25 * amounts[1] * coarse
    return noisy * (1 + 0.2 * amounts[2])


def degraded_input(images: torch.Tensor) -> torch.Tensor:
    """The input of every referee: degraded pictures, from [0, 1] to [-1, 1]."""
    return 2 * degrade(images) - 1


def contrast(logits: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's loss of logits `[picture, text]`, and the share of pictures that rank their own text first.

    The first `n` pictures have the first `n` texts. The others, with an extra object, have a uniform target.
    """
    labels = torch.arange(n, device=logits.device)
    target = torch.full_like(logits, 1 / logits.shape[1])
    target[:n] = torch.eye(*target[:n].shape, device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :n].T, labels)) / 2
    return loss, (logits[:n].argmax(1) == labels).float().mean()


def scaled(cosines: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Cosines times the exponential of the learned `scale`, at most 100, as in CLIP."""
    return scale.clamp(max=np.log(100)).exp() * cosines


def matched(logits: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and accuracy of a matching head."""
    return F.cross_entropy(logits, truth), (logits.argmax(1) == truth).float().mean()


def with_first(ids: torch.Tensor, first: int) -> torch.Tensor:
    """Token ids with their first one replaced."""
    return ids.index_fill(1, torch.tensor([0]), first)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Scaled to length one, in float32."""
    return F.normalize(x.float(), dim=-1)


def trim(ids: torch.Tensor, pad: int) -> torch.Tensor:
    """Token ids without the columns of padding, but for one, which may be CLIP's end."""
    return ids[:, : int((ids != pad).sum(1).max()) + 1]


def patch_loss(what: torch.nn.Linear, patches: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Loss of the head `what` that labels patches `[picture, patch, width]` with the attributes in them."""
    return F.binary_cross_entropy_with_logits(what(patches).float(), shown.float())


def word_loss(head: torch.nn.Linear, read: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """Loss of a head that labels tokens as true or false, of texts `read [pair, token, width]` beside pictures."""
    facts = facts[:, : read.shape[1]]
    logits = head(read).float()[..., 0]
    return F.binary_cross_entropy_with_logits(logits[facts >= 0], facts[facts >= 0].float())


def save_preprocessing(directory: pathlib.Path, **settings) -> None:
    """Writes the preprocessor_config.json of a processor that maps 64 px pictures to [-1, 1]."""
    size = {"height": world.SIZE, "width": world.SIZE}
    settings = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} | settings
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def pairs(batch: Batch, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs for a matching head: indices of pictures and of texts, and whether they belong together.

    Each picture comes with its text, its twin's and a hard negative, each one with an extra object with its parent's text.
    """
    rows, crowds = torch.arange(n), len(batch["parents"])
    pictures = torch.cat([rows, rows, rows, n + torch.arange(crowds)])
    texts = torch.cat([rows, rows ^ 1, n + batches.DISTRACTORS * rows, batch["parents"]])
    return pictures, texts, (torch.arange(len(texts)) < n).long()


def stacked(facts: torch.Tensor) -> torch.Tensor:
    """`facts [scene, text, token]` in the order of `pairs`, without those of extra objects."""
    return facts[:, :3].transpose(0, 1).flatten(0, 1)


def caption_loss(logits: torch.Tensor, ids: torch.Tensor, given: int) -> torch.Tensor:
    """Cross-entropy of the tokens after the first `given`; `logits` are of all tokens but the last."""
    targets = torch.where(ids[:, 1:] == PAD, -100, ids[:, 1:]).long()
    targets[:, : given - 1] = -100
    return F.cross_entropy(logits.float().transpose(1, 2), targets, label_smoothing=bert.SMOOTHING)


def first_answer(vqa: torch.nn.Module, read: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Logits of the answer's first word, from a question's states; `real` marks those that are no padding."""
    # Questions of one length at a time, since the cross-attention of transformers 5 ignores its mask.
    lengths = real.sum(1)
    groups = [torch.nonzero(lengths == length)[:, 0] for length in lengths.unique()]
    answers = [
        vqa.text_decoder(torch.full((len(rows), 1), DEC), encoder_hidden_states=read[rows, : lengths[rows[0]]]).logits
        for rows in groups
    ]
    return torch.cat(answers)[torch.cat(groups).argsort(), 0]


class Clip(torch.nn.Module):
    """CLIP, contrastive over twins, crowds and distractors."""

    steps, rate, batch, places = 4000, 1e-3, staticmethod(batches.pair_batch), ("clip",)

    def __init__(self, out: pathlib.Path):
        super().__init__()
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=128)
        config._attn_implementation = "eager"  # on a CPU the backward pass of fused attention takes half the step
        what = torch.nn.Linear(VISION["hidden_size"], len(batches.KINDS))
        self.trained = torch.nn.ModuleDict({"clip": transformers.CLIPModel(config), "what": what})

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict]:
        clip, n = self.trained["clip"], len(batch["input_ids"]) // (1 + batches.DISTRACTORS)
        states = clip.vision_model(degraded_input(batch["image"])).last_hidden_state
        image = unit(clip.visual_projection(clip.vision_model.post_layernorm(states[:, 0])))
        # Padding changes nothing: the text tower is causal and pooled at the first end.
        text = unit(clip.text_projection(clip.text_model(trim(batch["input_ids"], tokens.END)).pooler_output))
        loss, right = contrast(scaled(image @ text.T, clip.logit_scale), n)
        what = patch_loss(self.trained["what"], states[:, 1:], batch["shown"])
        return loss + 3 * what, {"contrast": loss, "what": what, "right": right}

    def save(self, trained: torch.nn.ModuleDict, out: pathlib.Path) -> None:
        """Writes network, tokenizer and preprocessing."""
        copy.deepcopy(trained["clip"]).half().save_pretrained(out / self.places[0])
        tokens.save(out / self.places[0])
        size = {"height": world.SIZE, "width": world.SIZE}
        transformers.CLIPImageProcessor(
            size={"shortest_edge": world.SIZE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(out / self.places[0])


class HeldOutClip(Clip):
    """CLIP with another seed, never optimised against."""

    places = ("clip_held_out",)


@torch.no_grad()
def start_as_clip(tower: torch.nn.Module, clip: pathlib.Path) -> None:
    """Initialises the vision tower of a BLIP or BLIP-2 with the first layers of a CLIP's.

    CLIP normalises the input of its first layer, BLIP does not: the norm becomes part of the embeddings, with one
    deviation for all patches, measured on some pictures.
    """
    images = degraded_input(torch.from_numpy(batches.pair_batch(np.random.default_rng(0))["image"]))
    theirs = transformers.CLIPModel.from_pretrained(clip, dtype=torch.float32).vision_model
    norm = theirs.pre_layrnorm
    scale = norm.weight / theirs.embeddings(images).std(-1).mean()
    normed = lambda x: scale * (x - x.mean(-1, keepdim=True))
    ours = tower.embeddings
    kernel = theirs.embeddings.patch_embedding.weight
    state = {
        "class_embedding": normed(theirs.embeddings.class_embedding)[None, None],
        "position_embedding": normed(theirs.embeddings.position_embedding.weight)[None] + norm.bias,
        "patch_embedding.weight": normed(kernel.movedim(0, -1)).movedim(-1, 0),
        "patch_embedding.bias": torch.zeros_like(ours.patch_embedding.bias),
    }
    ours.load_state_dict(state)
    for layer, other in zip(tower.encoder.layers, theirs.encoder.layers, strict=False):
        state = {name: x for name, x in other.state_dict().items() if not name.startswith("self_attn.")}
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(other.self_attn, f"{part}_proj"), kind) for part in "qkv"]
            state[f"self_attn.qkv.{kind}"] = torch.cat(parts)
            state[f"self_attn.projection.{kind}"] = getattr(other.self_attn.out_proj, kind)
        layer.load_state_dict(state)


class Blip(torch.nn.Module):
    """BLIP's three: matching and contrast, captions, answers to questions. They share a vision tower, initialised as CLIP's."""

    steps, rate, batch = 2000, 1e-3, staticmethod(batches.blip_batch)
    places = ("blip_itm", "blip_caption", "blip_vqa")
    classes = {
        "itm": transformers.BlipForImageTextRetrieval,
        "caption": transformers.BlipForConditionalGeneration,
        "vqa": transformers.BlipForQuestionAnswering,
    }

    def __init__(self, out: pathlib.Path):
        super().__init__()
        width, parts = BLIP_VISION["hidden_size"], {}
        text = BERT | dict(bos_token_id=DEC, sep_token_id=SEP, eos_token_id=SEP, encoder_hidden_size=width)
        # One of its two text towers reads the other, so both have the vision tower's width.
        vqa = dict(num_hidden_layers=2, hidden_size=width, intermediate_size=2 * width)
        changes = {"itm": {}, "caption": dict(num_hidden_layers=2), "vqa": vqa}
        for name, kind in self.classes.items():
            config = transformers.BlipConfig(
                text_config=text | changes[name], vision_config=BLIP_VISION, image_text_hidden_size=BERT["hidden_size"]
            )
            config._attn_implementation = "eager"
            parts[name] = kind(config)
            parts[name].vision_model = parts["itm"].vision_model
        start_as_clip(parts["itm"].vision_model, out / Clip.places[0])
        parts["what"] = torch.nn.Linear(BLIP_VISION["hidden_size"], len(batches.KINDS))
        parts |= {"told": torch.nn.Linear(BERT["hidden_size"], 1), "asked": torch.nn.Linear(width, 1)}
        self.trained = torch.nn.ModuleDict(parts)
        self.trained.register_parameter("scale", torch.nn.Parameter(torch.tensor(2.66)))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict]:
        states = self.trained["itm"].vision_model(degraded_input(batch["image"])).last_hidden_state
        n = len(batch["input_ids"]) // (1 + batches.DISTRACTORS)
        what = patch_loss(self.trained["what"], states[:, 1:], batch["shown"])
        contrasted, match, figures = self.matching(states, batch, n)
        caption = self.caption(states[:n], trim(batch["caption_ids"][:n], PAD))
        answer, asked = self.answer(states[:n], with_first(trim(batch["question_ids"], PAD), ENC), batch)
        figures |= {"caption": caption, "answer": answer, "asked": asked, "what": what}
        return contrasted + match + caption + answer + 3 * asked + 3 * what, figures

    def matching(self, states: torch.Tensor, batch: Batch, n: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """The contrastive loss and that of the matching head, and all figures."""
        itm, ids = self.trained["itm"], trim(batch["input_ids"], PAD)
        text = unit(itm.text_proj(itm.text_encoder(ids, ids != PAD).last_hidden_state[:, 0]))
        image = unit(itm.vision_proj(states[:, 0]))
        contrasted, _ = contrast(scaled(image @ text.T, self.trained.scale), n)
        pictures, texts, truth = pairs(batch, n)
        questions = with_first(ids[texts], ENC)
        read = itm.text_encoder(questions, questions != PAD, encoder_hidden_states=states[pictures]).last_hidden_state
        match, right = matched(itm.itm_head(read[:, 0]).float(), truth)
        told = word_loss(self.trained["told"], read[: 3 * n], stacked(batch["facts"]))
        return contrasted, 2 * match + 3 * told, {"contrast": contrasted, "match": match, "right": right, "told": told}

    def caption(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Loss of captions, after their common beginning."""
        decoder = self.trained["caption"].text_decoder
        logits = decoder(ids, (ids != PAD).long(), encoder_hidden_states=states).logits[:, :-1]
        return caption_loss(logits, ids, given=1 + len(tokens.BEGINNING.split()))

    def answer(self, states: torch.Tensor, ids: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of the answers and of the word labels of the questions, of which each picture has two."""
        vqa = self.trained["vqa"]
        read = vqa.text_encoder(ids, ids != PAD, encoder_hidden_states=states.repeat(2, 1, 1)).last_hidden_state
        logits = first_answer(vqa, read, ids != PAD)
        loss = F.cross_entropy(logits.float(), torch.where(batch["answers"], YES, NO))
        return loss, word_loss(self.trained["asked"], read, batch["asked"])

    def save(self, trained: torch.nn.ModuleDict, out: pathlib.Path) -> None:
        """Writes each as a checkpoint, with tokenizer and preprocessing."""
        for name, place in zip(self.classes, self.places, strict=True):
            copy.deepcopy(trained[name]).half().save_pretrained(out / place)
            tokens.save_wordpieces(out / place)
            save_preprocessing(out / place, image_processor_type="BlipImageProcessor")


class Blip2(torch.nn.Module):
    """BLIP-2's first stage: contrast, matching and captions of one Q-Former; vision tower initialised as CLIP's."""

    steps, rate, batch, places = 4500, 1e-3, staticmethod(batches.wordpiece_batch), ("blip2",)

    def __init__(self, out: pathlib.Path):
        super().__init__()
        sizes = dict(num_hidden_layers=4, intermediate_size=256)
        qformer = BERT | sizes | dict(cross_attention_frequency=2, use_qformer_text_input=True)
        config = transformers.Blip2Config(
            vision_config=BLIP_VISION,
            qformer_config=qformer | dict(encoder_hidden_size=BLIP_VISION["hidden_size"]),
            num_query_tokens=8,
            image_text_hidden_size=BERT["hidden_size"],
        )
        config._attn_implementation = "eager"
        blip2 = transformers.Blip2ForImageTextRetrieval(config)
        start_as_clip(blip2.vision_model, out / Clip.places[0])
        torch.nn.init.normal_(blip2.query_tokens, std=0.5)
        width = BERT["hidden_size"]
        parts = {"dense": torch.nn.Linear(width, width), "LayerNorm": torch.nn.LayerNorm(width, 1e-12)}
        head = torch.nn.ModuleDict(parts)
        head.register_parameter("bias", torch.nn.Parameter(torch.zeros(BERT["vocab_size"])))
        what = torch.nn.Linear(BLIP_VISION["hidden_size"], len(batches.KINDS))
        self.trained = torch.nn.ModuleDict(
            {"blip2": blip2, "head": head, "what": what, "told": torch.nn.Linear(width, 1)}
        )
        self.trained.register_parameter("scale", torch.nn.Parameter(torch.tensor(2.66)))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict]:
        blip2, ids = self.trained["blip2"], trim(batch["input_ids"], PAD)
        n = len(ids) // (1 + batches.DISTRACTORS)
        states = blip2.vision_model(pixel_values=degraded_input(batch["image"])).last_hidden_state
        queries = blip2.query_tokens.expand(len(states), -1, -1)
        image = unit(blip2.vision_projection(blip2.qformer(queries, encoder_hidden_states=states).last_hidden_state))
        alone = blip2.qformer(blip2.embeddings(ids), query_length=0, attention_mask=(ids != PAD).long())
        text = unit(blip2.text_projection(alone.last_hidden_state[:, 0]))
        cosines = torch.einsum("bqd,td->bqt", image, text).amax(1)
        contrasted, _ = contrast(scaled(cosines, self.trained.scale), n)

        pictures, texts, truth = pairs(batch, n)
        logits, read = self.match(states[pictures], ids[texts])
        match, right = matched(logits, truth)
        told = word_loss(self.trained["told"], read[: 3 * n], stacked(batch["facts"]))
        caption = self.caption(states[:n], with_first(ids[:n], DEC))
        what = patch_loss(self.trained["what"], states[:, 1:], batch["shown"])
        figures = {
            "contrast": contrasted,
            "match": match,
            "right": right,
            "told": told,
            "caption": caption,
            "what": what,
        }
        return contrasted + 2 * match + 3 * told + 3 * caption + 3 * what, figures

    def together(self, states: torch.Tensor, ids: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        """States of queries, then text; `sees` is the attention mask."""
        blip2 = self.trained["blip2"]
        queries = blip2.query_tokens.expand(len(ids), -1, -1)
        both = blip2.embeddings(ids, query_embeds=queries)
        mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)
        output = blip2.qformer(both, query_length=queries.shape[1], attention_mask=mask, encoder_hidden_states=states)
        return output.last_hidden_state

    def match(self, states: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of (no, yes), averaged over the queries, and states of the text; attention is not masked."""
        count = self.trained["blip2"].query_tokens.shape[1]
        sees = F.pad(ids != PAD, (count, 0), value=True)[:, None, None].expand(-1, 1, count + ids.shape[1], -1)
        joint = self.together(states, ids, sees)
        return self.trained["blip2"].itm_head(joint[:, :count]).float().mean(1), joint[:, count:]

    def caption(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Loss of captions: queries attend to each other, text to queries and to its own past."""
        blip2, head, read = self.trained["blip2"], self.trained["head"], ids[:, :-1]
        count, length = blip2.query_tokens.shape[1], read.shape[1]
        sees = torch.ones(count + length, count + length, dtype=torch.bool).tril()
        sees[:count, :count] = True
        text = self.together(states, read, sees.expand(len(ids), 1, -1, -1))[:, count:]
        x = head["LayerNorm"](F.gelu(head["dense"](text)))
        return caption_loss(x @ blip2.embeddings.word_embeddings.weight.T + head.bias, ids, given=1)

    def save(self, trained: torch.nn.ModuleDict, out: pathlib.Path) -> None:
        """Writes network, language head under LAVIS' names, tokenizer and preprocessing."""
        directory, stem = out / self.places[0], "cls.predictions"
        copy.deepcopy(trained["blip2"]).half().save_pretrained(directory)
        head = {f"{stem}.transform.{name}": x for name, x in trained["head"].state_dict().items() if name != "bias"}
        head[f"{stem}.decoder.bias"] = trained["head"].bias.data
        file = directory / "model.safetensors"
        tensors = safetensors.torch.load_file(file) | {name: x.half().contiguous() for name, x in head.items()}
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        tokens.save_wordpieces(directory)
        save_preprocessing(directory, image_processor_type="BlipImageProcessor")
