"""The method in plain torch: the oracle of `referee_jax.method.inversion`, and a fair peer for its speed.

Implements arXiv 2402.16305 step for step on diffusers' U-Net and VAE and a judge (judges.py), batched over prompts.
Axes: B prompts, V views, K kept views, h x w latents, H x W image, S the referee's input side; NHWC throughout (a
permuted view of it is what torch calls channels_last). All randomness of a step is injected, in one dict:

    t int64[B]    eps, n1, n2 float32[B, h, w, 4]    referee_noise float32[B, K, S, S, 3]
    views: parameters of `referee_jax.method.views.sample`, with a leading axis B

With gs, gv the score-distillation and referee gradients, both at the same z, one step is, while the referee is on,

    z <- z - lr_i (w r gv + noise n1)       r = ||gs|| / (||gv|| + balance_epsilon), per prompt
    z <- z - lr gs + noise n2               outside: z <- z - lr gs + tail_noise n2

and then the average: ema = z at first, later ema <- decay ema + (1 - decay) z; at a restart z <- ema.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import kornia
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.oracles import judges
from tests.oracles.settings import Settings

Noise = Mapping[str, Any]
Metrics = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text, computed once.

    `cond`, `uncond` [B, T, D] are the U-Net's text states; `text` is what the judge makes of it.
    """

    cond: Tensor
    uncond: Tensor
    text: judges.Text


@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries beside z. `best` is the z with the lowest `best_loss` [B] of those a referee has scored."""

    ema: Tensor | None = None
    aliased: bool = False
    best: Tensor | None = None
    best_loss: Tensor | None = None


class Oracle:
    """Frozen networks and the method; `compiled` runs each network through torch.compile."""

    def __init__(
        self,
        text_encoder: nn.Module,
        unet: nn.Module,
        vae: nn.Module,
        judge: judges.Judge,
        alphas_cumprod: Tensor,
        *,
        settings: Settings,
        prediction_type: str = "epsilon",
        channels_last: bool = False,
        compiled: bool = False,
    ):
        networks = [m.eval().requires_grad_(False) for m in (text_encoder, unet, vae, judge)]
        if channels_last:
            networks = [m.to(memory_format=torch.channels_last) for m in networks]
        self.text_encoder, self.unet, self.vae, self.judge = networks
        self.settings, self.prediction_type = settings, prediction_type
        # Networks compute in their own type; latents, images, losses and the update in that of z. Convolutions go by the
        # layout of what comes in, too, and latents are NHWC.
        self.dtype, layout = unet.dtype, torch.channels_last if channels_last else torch.contiguous_format
        self.alphas_cumprod = alphas_cumprod.to(unet.device)
        enter = lambda z: z.to(self.dtype).contiguous(memory_format=layout)
        compile_ = torch.compile if compiled else lambda fn: fn
        self._unet = compile_(lambda z, t, text: self.unet(enter(z), t, encoder_hidden_states=text).sample)
        self._decode = compile_(lambda z: self.vae.decode(enter(z)).sample)
        self._judge = compile_(judge)

    @torch.no_grad()
    def encode_text(self, sds_ids: Tensor, empty_ids: Tensor, *texts: Any) -> Prompt:
        """Token ids int64[B, T] to all that depends on text; `empty_ids` may be [1, T], `texts` go to the judge."""
        cond, uncond = (self.text_encoder(input_ids=x).last_hidden_state for x in (sds_ids, empty_ids))
        return Prompt(cond, uncond.expand_as(cond), self.judge.encode(*texts))

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents [B, h, w, 4] to images [B, H, W, 3] in [0, 1]; the only place where z meets the decoder."""
        x = self._decode(_nchw(z / self.vae.config.scaling_factor)).to(z.dtype) / 2 + 0.5
        return _nhwc(x.clamp(0, 1) if self.settings.clamp == "hard" else _StraightThroughClamp.apply(x))

    @torch.no_grad()
    def sds_gradient(self, z: Tensor, t: Tensor, eps: Tensor, cond: Tensor, uncond: Tensor, i: int) -> Tensor:
        """Score distillation by its closed form, weight_i w_t (e - eps) / (h w): no gradient passes the U-Net."""
        s = self.settings
        abar = self.alphas_cumprod[t].to(z.dtype)[:, None, None, None]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        zt = alpha * z + sigma * eps
        out = _nhwc(self._unet(_nchw(zt.repeat(2, 1, 1, 1)), t.repeat(2), torch.cat([uncond, cond]))).to(z.dtype)
        out_uncond, out_text = out.chunk(2)
        e = out_uncond + s.sds_guidance * (out_text - out_uncond)
        # Conversion is affine with fixed z_t, so it may follow the guidance.
        if self.prediction_type == "v_prediction":
            e = alpha * e + sigma * zt
        elif self.prediction_type == "sample":
            e = (zt - alpha * e) / sigma
        wt = 2 * alpha**s.sds_alpha_power * sigma**s.sds_sigma_power
        return s.sds_weight_at(i) * wt * (e - eps) / (z.shape[1] * z.shape[2])

    def view_losses(self, views: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """Views [B, V, S, S, 3] in [0, 1] to each named loss, [B, V]."""
        return self._judge(views, prompt.text, tuple(self.settings.referee_losses))

    def referee_gradient(
        self, z: Tensor, view_params: Any, referee_noise: Tensor | None, prompt: Prompt
    ) -> tuple[Tensor, Metrics]:
        """d(weighted losses, mean over kept views)/dz with one decode; `loss`, each loss [B] and `image` [B, H, W, 3].

        `referee_weight` is no part of it: it belongs to the update, and inside a norm it would cancel.
        """
        s = self.settings
        z = z.detach().requires_grad_()
        image = self.decode(z)
        size = self.judge.image_size
        total = lambda losses: sum(weight * losses[name] for name, weight in s.referee_losses.items())
        if s.use_views:
            views = render(image, view_params, size=size, names=s.views_augmentations)
        else:
            views = resize(image, size)[:, None].expand(-1, s.views_count, -1, -1, -1)
        if s.views_keep < s.views_count:
            with torch.no_grad():
                hardest = total(self.view_losses(views, prompt)).topk(s.views_keep, dim=1).indices
            views = views[torch.arange(len(views), device=views.device)[:, None], hardest]
        if s.use_noise and s.referee_noise:
            views = views + s.referee_noise * referee_noise
        losses = {name: x.mean(1) for name, x in self.view_losses(views, prompt).items()}
        loss = total(losses)
        # Prompts do not meet in the forward pass, so the gradient of the sum is the gradient of each.
        (gv,) = torch.autograd.grad(loss.sum(), z)
        return gv, {"loss": loss.detach(), **{k: x.detach() for k, x in losses.items()}, "image": image.detach()}

    def step(self, z: Tensor, state: State, i: int, noise: Noise, prompt: Prompt) -> tuple[Tensor, State, Metrics]:
        """One iteration. Metrics: norms `gs`, `gv` [B], `ratio` [B] and, with the referee on, those of its gradient."""
        s = self.settings
        amount = float(s.use_noise)
        gs = torch.zeros_like(z)
        if s.use_sds:
            gs = self.sds_gradient(z, noise["t"], noise["eps"], prompt.cond, prompt.uncond, i)
        metrics = {"gs": _norm(gs).flatten()}
        start, moved = z, None
        if s.referee_on(i):
            gv, scores = self.referee_gradient(z, noise.get("views"), noise.get("referee_noise"), prompt)
            ratio = _norm(gs) / (_norm(gv) + s.referee_balance_epsilon) if s.use_sds else torch.ones_like(_norm(gv))
            moved = -s.lr_at(i) * (s.referee_weight * ratio * gv + amount * s.optim_noise * noise["n1"])
            z = z + moved - s.optim_lr * gs + amount * s.optim_noise * noise["n2"]
            metrics |= {**scores, "gv": _norm(gv).flatten(), "ratio": ratio.flatten()}
        else:
            z = z - s.optim_lr * gs + amount * s.optim_tail_noise * noise["n2"]
        z, state = self._average(z, state, i, moved)
        return z, self._keep_best(state, start, metrics.get("loss")), metrics

    def run(self, z0: Tensor, noises: Iterable[Noise], prompt: Prompt) -> tuple[list[Tensor], State, list[Metrics]]:
        """As many steps as there are noises, from `z0` [B, h, w, 4]: the latents from `z0` on, last state, metrics but images."""
        trajectory, state, history = [z0], State(), []
        for i, noise in enumerate(noises):
            z, state, metrics = self.step(trajectory[-1], state, i, noise, prompt)
            trajectory.append(z)
            history.append({name: x for name, x in metrics.items() if name != "image"})
        return trajectory, state, history

    def output(self, z: Tensor, state: State) -> Tensor:
        """The latents a run ends with: the last, their average, or the best scored."""
        chosen = {"final": z, "ema": state.ema, "best": state.best}[self.settings.output]
        return z if chosen is None else chosen

    def _average(self, z: Tensor, state: State, i: int, moved: Tensor | None) -> tuple[Tensor, State]:
        s = self.settings
        if not s.use_ema:
            return z, state
        ema = state.ema
        if state.aliased and moved is not None:
            # After a restart the authors' z and average share storage: their in-place referee step, only, moves both.
            ema = ema + moved
        ema = z if ema is None else s.ema_decay * ema + (1 - s.ema_decay) * z
        restart = s.restart_after(i)
        return (ema if restart else z), dataclasses.replace(state, ema=ema, aliased=s.ema_alias and restart)

    def _keep_best(self, state: State, z: Tensor, loss: Tensor | None) -> State:
        if loss is None:
            return state
        if state.best is None:
            return dataclasses.replace(state, best=z, best_loss=loss)
        better = loss < state.best_loss
        best = torch.where(better[:, None, None, None], z, state.best)
        return dataclasses.replace(state, best=best, best_loss=torch.where(better, loss, state.best_loss))


class _StraightThroughClamp(torch.autograd.Function):
    """Clamp to [0, 1] whose cotangent also passes outside, where a descent step along it leads back inside."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x > 1) & (g < 0) | (x < 0) & (g > 0), 0, g)


def load(
    sd: str | os.PathLike,
    referee: str | os.PathLike,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    mean: Iterable[float] = (0.48145466, 0.4578275, 0.40821073),
    std: Iterable[float] = (0.26862954, 0.26130258, 0.27577711),
    **kwargs: Any,
) -> Oracle:
    """An oracle from a Stable Diffusion and a judge's directory in the Hugging Face layout; `kwargs` go to `Oracle`."""
    text_encoder = transformers.CLIPTextModel.from_pretrained(sd, subfolder="text_encoder")
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
    vae = diffusers.AutoencoderKL.from_pretrained(sd, subfolder="vae")
    scheduler = diffusers.DDIMScheduler.from_pretrained(sd, subfolder="scheduler")
    judge = judges.load(referee, mean, std).to(device, torch.float32)
    for m in (text_encoder, unet, vae, *judge.parts):
        m.to(device, dtype)
    numbers = {"alphas_cumprod": scheduler.alphas_cumprod, "prediction_type": scheduler.config.prediction_type}
    return Oracle(text_encoder, unet, vae, judge, **numbers, **kwargs)


def tokens(path: str | os.PathLike, texts: list[str]) -> Tensor:
    """Padded token ids int64[len(texts), T] of the CLIP tokenizer in a directory."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path)
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def render(
    image: Tensor, params: Mapping[str, Any], *, size: int, names: Iterable[str] = ("Af", "Pe", "Ji", "Er")
) -> Tensor:
    """Views [B, V, S, S, 3] of image [B, H, W, 3] by kornia, with `params` of `referee_jax.method.views.sample` vmapped."""
    count = params["noise"].shape[1]
    views = pool(_nchw(image), size).repeat_interleave(count, 0)
    for name in names:
        changed = _AUGMENTATIONS[name](views, params[name])
        views = torch.where(params[name]["on"].flatten()[:, None, None, None], changed, views)
    return _nhwc(views).unflatten(0, (-1, count)) + params["noise"]


def pool(x: Tensor, size: int) -> Tensor:
    """Mean of adaptive average and maximum pooling, [B, 3, H, W] -> [B, 3, S, S]; a side below S is enlarged first."""
    height, width = x.shape[2:]
    if min(height, width) < size:
        x = F.interpolate(x, (max(height, size), max(width, size)), mode="bilinear", align_corners=False)
    return x if x.shape[2:] == (size, size) else (F.adaptive_avg_pool2d(x, size) + F.adaptive_max_pool2d(x, size)) / 2


def _affine(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    angle, shift = params["angle"].flatten(), params["shift"].flatten(0, 1)
    centre = torch.full_like(shift, x.shape[-1] / 2 - 0.5)
    matrix = kornia.geometry.get_affine_matrix2d(shift, centre, torch.ones_like(shift), angle)
    return kornia.geometry.warp_affine(x, matrix[:, :2], x.shape[2:], align_corners=False)


def _perspective(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    end = params["corners"].flatten(0, 1)
    start = (x.shape[-1] - 1) * end.new_tensor([[0, 0], [1, 0], [1, 1], [0, 1]]).expand_as(end)
    return kornia.geometry.warp_perspective(
        x, kornia.geometry.get_perspective_transform(start, end), x.shape[2:], align_corners=False
    )


def _jitter(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    steps = (
        lambda x, p: kornia.enhance.adjust_brightness_accumulative(x, p["brightness"]),
        lambda x, p: kornia.enhance.adjust_contrast_with_mean_subtraction(x, p["contrast"]),
        lambda x, p: kornia.enhance.adjust_saturation_with_gray_subtraction(x, p["saturation"]),
        lambda x, p: kornia.enhance.adjust_hue(x, 2 * math.pi * p["hue"]),
    )
    prompts = []
    for b, views in enumerate(x.chunk(len(params["order"]))):
        for index in params["order"][b, 0].tolist():
            views = steps[index](views, {name: value[b] for name, value in params.items()})
        prompts.append(views)
    return torch.cat(prompts)


def _erase(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    left, top, width, height = params["box"].flatten(0, 1).T[:, :, None, None]
    pixel = torch.arange(x.shape[-1], device=x.device)
    column, row = pixel[None, None, :], pixel[None, :, None]
    inside = (column >= left) & (column < left + width) & (row >= top) & (row < top + height)
    return torch.where(inside[:, None], 0, x)


_AUGMENTATIONS = {"Af": _affine, "Pe": _perspective, "Ji": _jitter, "Er": _erase}


def draw(generator: torch.Generator, settings: Settings, *, batch: int, latent: tuple[int, int], size: int) -> Noise:
    """All randomness of one step as the authors draw it (no x-shift, one rectangle per prompt)."""
    device, shape, views = generator.device, (batch, *latent, 4), (batch, settings.views_count)
    normal = lambda *s: torch.randn(s, generator=generator, device=device)
    uniform = lambda s, low=0.0, high=1.0: low + (high - low) * torch.rand(s, generator=generator, device=device)
    zero = torch.zeros(views, device=device)
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], device=device)
    ratio = torch.where(uniform((batch,)) < 0.5, uniform((batch,), 0.3, 1.0), uniform((batch,), 1.0, 3.33))
    area = uniform((batch,), 0.1, 0.4) * size**2
    sides = torch.stack([area / ratio, area * ratio], -1).sqrt().round().clamp(1, size)
    box = torch.cat([(uniform((batch, 2)) * (size - sides + 1)).floor(), sides], -1)
    factors = {name: uniform(views, 0.9, 1.1) for name in ("brightness", "contrast", "saturation")}
    shift = size * uniform(views, -0.1, 0.1)
    augmentations = {
        "Af": {"on": zero == 0, "angle": uniform(views, -30, 30), "shift": torch.stack([zero, shift], -1)},
        "Pe": {
            "on": uniform(views) < 0.4,
            "corners": (size - 1) * corner + 0.1 * size * (1 - 2 * corner) * uniform((*views, 4, 2)),
        },
        "Ji": {
            "on": uniform(views) < 0.5,
            **factors,
            "hue": uniform(views, -0.1, 0.1),
            "order": uniform((batch, 1, 4)).argsort(-1).cpu(),  # it is the host that asks for it
        },
        "Er": {"on": zero == 0, "box": box[:, None].expand(*views, 4)},
        "noise": uniform((*views, 1, 1, 1), 0.0, 0.1) * normal(*views, size, size, 3),
    }
    return {
        "t": torch.randint(50, 949, (batch,), generator=generator, device=device),
        "eps": normal(*shape),
        "n1": normal(*shape),
        "n2": normal(*shape),
        "referee_noise": normal(batch, settings.views_keep, size, size, 3),
        "views": augmentations,
    }


def resize(image: Tensor, size: int) -> Tensor:
    """Antialiased bilinear, [B, H, W, 3] -> [B, size, size, 3]: the image without views."""
    return _nhwc(F.interpolate(_nchw(image), (size, size), mode="bilinear", antialias=True))


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each prompt's latents, [B, 1, 1, 1]."""
    return x.flatten(1).norm(dim=1)[:, None, None, None]
