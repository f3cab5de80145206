"""ReNO with its four referees against torch, written from its equations (Eyring et al. 2024, arXiv 2406.04312).

z = (sigma / alpha) (n - unet(sigma n, 999)),  L = (1 - CLIP) + 5 (1 - HPS) + 5 (1 - PickScore) - ImageReward
g = grad L + 0.01 n (1 - (d - 1) / |n|^2), of length 0.1 at most;  b <- 0.9 b + g;  n <- n - lr (g + 0.9 b)
"""

import numpy as np
import pytest

from referee_jax import config
from referee_jax import items as items_lib
from referee_jax.engine import inverter
from tests import tiny
from tests.conftest import relative_l2
from tests.lazy import diffusers, torch, transformers
from tests.models import test_image_reward
from tests.oracles import networks

PROMPT, STEPS, RATE = "a red circle and a blue square", 20, 0.625
# Of the pictures' contrast: where a pixel is clamped in one of the two and by a bit not in the other, all that follows differs.
FAINT = 0.1
WEIGHTS = {"clip": 1.0, "hps": 5.0, "pickscore": 5.0}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Our engine, and torch's networks with what they read."""
    root = tmp_path_factory.mktemp("reno")
    sd, _ = networks.save(root)
    vae = diffusers.AutoencoderKL.from_pretrained(sd / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.weight *= FAINT
        vae.decoder.conv_out.bias *= FAINT
    vae.save_pretrained(sd / "vae")
    for seed, name in enumerate(WEIGHTS):
        networks.save_clip(root / name, seed=10 + seed)
    (root / "image_reward").mkdir()
    trunk, mlp = networks.save_image_reward(root / "image_reward")
    specs = [
        config.RefereeSpec(name=name, checkpoint=str(root / name), losses={"cosine": weight}, template="{}", near=0)
        for name, weight in WEIGHTS.items()
    ]
    specs.append(config.RefereeSpec(name="image_reward", checkpoint=str(root / "image_reward"), losses={"reward": 1.0}))
    settings = config.override(
        tiny.settings((sd, root / "clip")),
        {
            "method": "noise", "steps": STEPS, "batch_size": 1, "output": "best", "referees": tuple(specs), "noise.lr": RATE,
            "views.count": 1, "views.keep": 1, "views.augmentations": (), "views.noise": 0.0, "referee.noise": 0.0,
            "referee.weight": 1.0, "referee.weight_final": 1.0, "referee.stop": STEPS, "referee.balance": False,
        },
    )  # fmt: skip
    engine = inverter.Inverter.from_config(settings)
    return engine, Oracle(sd, root, trunk, mlp, engine)


class Oracle:
    """The loss of a starting noise `[1, 4, h, w]`, by torch's classes."""

    def __init__(self, sd, root, trunk, mlp, engine):
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(sd / "unet").eval()
        self.vae = diffusers.AutoencoderKL.from_pretrained(sd / "vae").eval()
        self.trunk, self.mlp = trunk, mlp
        tokenizer = transformers.CLIPTokenizer.from_pretrained(sd / "tokenizer")
        read = lambda text: tokenizer([text], padding="max_length", return_tensors="pt").input_ids
        encoder = transformers.CLIPTextModel.from_pretrained(sd / "text_encoder").eval()
        self.states = encoder(
            read(engine.settings.sds.prompt.format(PROMPT, caption=PROMPT))
        ).last_hidden_state.detach()
        self.towers = {name: transformers.CLIPModel.from_pretrained(root / name).eval() for name in WEIGHTS}
        self.ids = read(PROMPT)
        self.reward_ids = np.array(engine.judges[-1].tokenizer(PROMPT)["input_ids"], np.int32)[None]
        abar = torch.from_numpy(np.array(engine.networks.prior.alphas_cumprod))[999].double()
        self.sigma, self.alpha = float((1 - abar).sqrt()), float(abar.sqrt())
        assert (self.sigma, self.sigma / self.alpha) == pytest.approx((0.997667, 14.6146), rel=1e-4)

    def loss(self, n):
        z = self.sigma / self.alpha * (n - self.unet(self.sigma * n, torch.tensor([999]), self.states).sample)
        x = self.vae.decode(z / self.vae.config.scaling_factor).sample / 2 + 0.5
        assert 0 < x.min() and x.max() < 1
        shape = (1, 3, 1, 1)
        pixels = (x - torch.tensor(networks.CLIP_MEAN).view(shape)) / torch.tensor(networks.CLIP_STD).view(shape)
        total = -test_image_reward.theirs(self.trunk, self.mlp, pixels, self.reward_ids, self.reward_ids > 0)[0]
        for name, weight in WEIGHTS.items():
            out = self.towers[name](input_ids=self.ids, pixel_values=pixels)
            total = total + weight * (1 - (out.image_embeds * out.text_embeds).sum())
        return total


def test_twenty_iterations(sides):
    """The noise, its losses, and which is kept."""
    engine, oracle = sides
    batch = engine.begin(items_lib.expand([PROMPT], 1), 3)
    start = np.asarray(batch.state.latents)[0]
    n, b, losses, noises = torch.from_numpy(start.transpose(2, 0, 1)[None].copy()), 0.0, [], []
    for _ in range(STEPS):
        n.requires_grad_()
        loss = oracle.loss(n)
        (g,) = torch.autograd.grad(loss, n)
        n = n.detach()
        losses.append(loss.item())
        noises.append(n)
        g = g + 0.01 * n * (1 - (n.numel() - 1) / n.square().sum())
        g = g * min(1.0, 0.1 / g.norm().item())
        b = 0.9 * b + g
        n = n - RATE * (g + 0.9 * b)
    history = []
    while batch.step < engine.steps:
        batch, metrics = engine.advance(batch)
        history.append(metrics["loss"])
    assert relative_l2(np.concatenate(history, axis=1)[0], losses) < 1e-3
    assert relative_l2(np.asarray(batch.state.latents)[0], n[0].permute(1, 2, 0)) < 1e-3
    assert np.ptp(losses) > 0.05 and relative_l2(n[0].permute(1, 2, 0), start) > 0.05
    best = noises[int(np.argmin(losses))]
    assert relative_l2(np.asarray(batch.state.best)[0], best[0].permute(1, 2, 0)) < 1e-3
