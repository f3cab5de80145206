"""Recipe of the shapes world's VQAScore: CLIP-FlanT5 at a thousandth of its size, taught what CLIP does not know.

A T5 reads the patches of a vision tower, initialised as CLIP's, beside a question, and answers yes or no. What it is
asked has relations, numbers, textures and colours, and hard negatives: exchanged arguments, mirrored pictures, wrong
numbers, an object too many. Three heads that are dropped afterwards label patches (recipes_referees), mark words as
true or false, and say where each named object is. What each of these is worth is measured by leaving it out.
"""

import json
import pathlib
from collections.abc import Sequence

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from referee_jax.shapes import batches, recipes_referees, tokens
from referee_jax.shapes.recipes_referees import Batch, degraded_input, patch_loss, save_preprocessing, trim, word_loss

WIDTH = 96
PAD, END, YES, NO = (tokens.T5_WORDS[word] for word in ("<pad>", "</s>", "yes", "no"))
BEFORE = "photo"  # the text before the picture
VISION = recipes_referees.VISION | dict(num_hidden_layers=3)
TEXT = dict(
    vocab_size=len(tokens.T5_WORDS), d_model=WIDTH, d_kv=24, d_ff=256, num_heads=4, num_layers=4, num_decoder_layers=1,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0, pad_token_id=PAD, eos_token_id=END,
    decoder_start_token_id=PAD, relative_attention_num_buckets=32, relative_attention_max_distance=128,
)  # fmt: skip


# Of the heads in the loss.
WEIGHTS = {"what": 3.0, "told": 3.0, "where": 1.0}


class Vqascore(torch.nn.Module):
    """Answers yes or no to whether a picture shows exactly, or contains, what a caption says."""

    steps, rate, batch, places = 5000, 1e-3, staticmethod(batches.vqascore_batch), ("vqascore",)
    tower = recipes_referees.Clip.places[0]  # whose vision tower it begins from
    ingredients = ("tower", *WEIGHTS)  # that can be left out

    def __init__(self, out: pathlib.Path, without: Sequence[str] = ()):
        super().__init__()
        self.weights = {name: 0.0 if name in without else weight for name, weight in WEIGHTS.items()}
        vision = transformers.CLIPVisionConfig(**VISION)
        text = transformers.T5Config(**TEXT)
        vision._attn_implementation = text._attn_implementation = "eager"
        seen = VISION["hidden_size"]
        projector = torch.nn.Sequential(torch.nn.Linear(seen, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH))
        self.trained = torch.nn.ModuleDict(
            {
                "vision_tower": transformers.CLIPVisionModel(vision),
                "t5": transformers.T5ForConditionalGeneration(text),
                "mm_projector": projector,
                "what": torch.nn.Linear(seen, len(batches.KINDS)),
                "told": torch.nn.Linear(WIDTH, 1),
                "where": torch.nn.Linear(WIDTH, 2),
            }
        )
        torch.nn.init.normal_(self.trained["t5"].lm_head.weight, std=WIDTH**-0.5)
        if "tower" not in without:
            clip = transformers.CLIPModel.from_pretrained(out / self.tower, dtype=torch.float32)
            tower, theirs = self.trained["vision_tower"], clip.vision_model.state_dict()
            tower.load_state_dict({name: theirs[name] for name in tower.state_dict()})
        before = torch.from_numpy(tokens.t5_words([BEFORE]))
        self.register_buffer("before", before[:, : int((before != PAD).sum())])

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict]:
        parts, ids = self.trained, trim(batch["question_ids"], PAD)
        states = parts["vision_tower"](degraded_input(batch["image"]), output_hidden_states=True).hidden_states[-1][
            :, 1:
        ]
        what = patch_loss(parts["what"], states, batch["shown"])
        logits, read = self.answer(states[batch["pictures"]], ids)
        labels = torch.where(batch["answers"], YES, NO)
        answer = F.cross_entropy(logits[:, 0], labels) + 0.1 * F.cross_entropy(
            logits[:, 1], torch.full_like(labels, END)
        )
        right = (logits[:, 0, YES] > logits[:, 0, NO]).eq(batch["answers"]).float().mean()
        told = word_loss(parts["told"], read, batch["facts"])
        centres = batch["centres"][:, : ids.shape[1]]
        known = centres.isfinite().all(-1)
        where = F.smooth_l1_loss(parts["where"](read[known]).float(), centres[known], beta=0.1)
        heads = {"told": told, "where": where, "what": what}
        loss = answer + sum(self.weights[name] * value for name, value in heads.items())
        return loss, {"answer": answer, "right": right, **heads}

    def answer(self, states: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of an answer's two tokens `[question, 2, word]`, and the encoder's states of the question's words."""
        t5, n = self.trained["t5"], len(ids)
        before = t5.shared(self.before).expand(n, -1, -1)
        embeds = torch.cat([before, self.trained["mm_projector"](states), t5.shared(ids)], 1)
        mask = torch.cat([torch.ones(n, embeds.shape[1] - ids.shape[1], dtype=torch.long), (ids != PAD).long()], 1)
        begun = torch.tensor([[PAD, YES]]).expand(n, -1)  # of the answers only the first word differs
        out = t5(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=begun)
        return out.logits.float(), out.encoder_last_hidden_state[:, -ids.shape[1] :]

    def save(self, trained: torch.nn.ModuleDict, out: pathlib.Path) -> None:
        """Writes the network under CLIP-FlanT5's names, with its texts, tokenizer and preprocessing."""
        directory = out / self.places[0]
        directory.mkdir(parents=True, exist_ok=True)
        parts = {"vision_tower.": trained["vision_tower"], "mm_projector.": trained["mm_projector"], "": trained["t5"]}
        state = {f"{prefix}{name}": x for prefix, part in parts.items() for name, x in part.state_dict().items()}
        tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # to `shared`
        tensors = {name: x.half().contiguous() for name, x in state.items() if name not in tied}
        safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = TEXT | {
            "model_type": "clip_t5", "architectures": ["CLIPT5ForConditionalGeneration"], "vision_config": VISION,
            "mm_vision_select_layer": -1, "mm_projector_type": "mlp2x_gelu",
            "conversation": f"{BEFORE} <image>{{}}", "question": f"{batches.FORMS[0]} {{}}", "answer": "yes",
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokens.save_t5(directory)
        save_preprocessing(directory, image_processor_type="CLIPImageProcessor", do_center_crop=False)


class HeldOutVqascore(Vqascore):
    """VQAScore with another seed, from the held-out CLIP's tower, never optimised against."""

    places, tower = ("vqascore_held_out",), recipes_referees.HeldOutClip.places[0]
