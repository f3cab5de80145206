"""Model inversion for ONE prompt and one sample: "Referee Can Play" (arXiv 2402.16305), pure.

    prompt -> referee's text side -> latents -> decoder -> random views -> referee's image side -> losses
           -> gradient of the latents, balanced with score distillation -> update, average, restart

`step` is a function of (networks, prompt, hyper, state, i, noise); vmap adds prompts, samples and settings, and devices come
outside. All randomness of an iteration is `draw`n from one key and handed to `step`. What is static, because it shapes the
program, is in `Plan`; every number is traced, in `Hyper`. The loop over iterations is the caller's, who may know beforehand
whether the referees are in their phase.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from referee_jax.method import augmentations, held_out, objective, optim, sds, views
from referee_jax.method.referee import Referee
from referee_jax.models import unet as unet_lib
from referee_jax.models import vae as vae_lib


class Networks(struct.PyTreeNode):
    """Everything with weights, and the noise schedule float32 `[timesteps]` of the prior."""

    unet: unet_lib.UNet
    vae: vae_lib.AutoencoderKL
    alphas_cumprod: Array
    referees: tuple[Referee, ...]
    held_out: tuple[Referee, ...] = ()
    prediction_type: str = struct.field(pytree_node=False, default="epsilon")


class Prompt(struct.PyTreeNode):
    """What depends on the text alone: the U-Net's states `[T, D]`, and each referee's own encoding.

    `uncond` is None where the prior is not guided.
    """

    cond: Array
    uncond: Array | None
    texts: tuple[Any, ...]
    held_out: tuple[Any, ...] = ()


class Hyper(struct.PyTreeNode):
    """Every number of the method, traced; may have a leading axis for a sweep under vmap.

    `weights` has one entry per referee, `held_out` one per held-out referee.
    """

    prior: sds.Hyper = sds.Hyper()
    referee: objective.Hyper = objective.Hyper()
    update: optim.Hyper = optim.Hyper()
    views: augmentations.Settings = augmentations.Settings()
    weights: tuple[objective.Weights, ...] = ()
    held_out: tuple[objective.Weights, ...] = ()


class Plan(struct.PyTreeNode):
    """What is static: it shapes the compiled program. `latent` is (h, w, channels); `looks` has one entry per referee.

    The held-out ones look every `look_every` iterations; after `patience` looks (0: never) without a better one an item stops.
    """

    latent: tuple[int, int, int] = struct.field(pytree_node=False)
    looks: tuple[objective.ViewPlan, ...] = struct.field(pytree_node=False)
    held_out: tuple[objective.ViewPlan, ...] = struct.field(pytree_node=False, default=())
    look_every: int = struct.field(pytree_node=False, default=10)
    patience: int = struct.field(pytree_node=False, default=0)
    steps: int = struct.field(pytree_node=False, default=160)
    clamp: str = struct.field(pytree_node=False, default="hard")
    shared_erase: bool = struct.field(pytree_node=False, default=True)
    optimizer: str = struct.field(pytree_node=False, default="sgd")
    ema_alias: bool = struct.field(pytree_node=False, default=False)
    use_sds: bool = struct.field(pytree_node=False, default=True)
    use_balance: bool = struct.field(pytree_node=False, default=True)
    normalise: bool = struct.field(pytree_node=False, default=False)


class InversionState(struct.PyTreeNode):
    """The loop's carry for one prompt and sample.

    Attributes:
        latents: float32 `[h, w, C]`, scaled.
        optimizer: of optim.build; holds the average.
        best: the latents, before their update, with the lowest loss so far, and `best_loss`.
        frozen: whether an update or a loss was not finite; the latents stay what they were before it.
        watched: by the held-out referees, where there are any.
    """

    latents: Array
    optimizer: optax.OptState
    best: Array
    best_loss: Array
    frozen: Array
    watched: held_out.HeldOutState | None = None

    @property
    def average(self) -> Array:
        """The running average of the latents."""
        return optax.tree.get(self.optimizer, "average")


class Noise(struct.PyTreeNode):
    """All that is random in one iteration; `views` and `referee` have one entry per referee."""

    t: Array
    eps: Array
    n1: Array
    n2: Array
    views: tuple[views.Params, ...]
    referee: tuple[Array, ...]


def init(latents: Array, plan: Plan, hyper: Hyper, seen: held_out.HeldOutState | None = None) -> InversionState:
    """The state before the first iteration, from latents `[h, w, C]`."""
    return InversionState(
        latents=latents,
        optimizer=_optimizer(plan, hyper).init(latents),
        best=latents,
        best_loss=jnp.array(jnp.inf, jnp.float32),
        frozen=jnp.zeros((), bool),
        watched=seen,
    )


def draw(key: Array, networks: Networks, plan: Plan, hyper: Hyper, i: Array) -> Noise:
    """The randomness of iteration `i`, from `key` and `i`."""
    key = jax.random.fold_in(key, i)
    t, eps, n1, n2, view, referee = jax.random.split(key, 6)
    sizes = [referee.image_size for referee in networks.referees]
    drawn, noises = [], []
    for number, (looks, size) in enumerate(zip(plan.looks, sizes, strict=True)):
        drawn.append(
            views.sample(
                jax.random.fold_in(view, number), hyper.views, names=looks.augmentations, count=looks.count, size=size,
                shared_erase=plan.shared_erase,
            )
        )  # fmt: skip
        noises.append(jax.random.normal(jax.random.fold_in(referee, number), (looks.keep, size, size, 3)))
    return Noise(
        t=sds.sample_timestep(t, hyper.prior, i, len(networks.alphas_cumprod)),
        eps=jax.random.normal(eps, plan.latent),
        n1=jax.random.normal(n1, plan.latent),
        n2=jax.random.normal(n2, plan.latent),
        views=tuple(drawn),
        referee=tuple(noises),
    )


def decode(networks: Networks, latents: Array, plan: Plan) -> Array:
    """Latents `[h, w, C]` to the image `[H, W, 3]` in [0, 1]."""
    return objective.clamp(networks.vae.decode(latents[None])[0].astype(jnp.float32), plan.clamp)


def referees_gradient(
    networks: Networks, prompt: Prompt, hyper: Hyper, plan: Plan, latents: Array, noise: Noise
) -> tuple[Array, dict[str, Array]]:
    """d(sum of the referees' losses)/d(latents), and the losses: one decode, one pullback."""
    image, pullback = jax.vjp(lambda z: decode(networks, z, plan), latents)
    cotangent, metrics = jnp.zeros_like(image), {"loss": jnp.zeros(())}
    for number, looks in enumerate(plan.looks):
        gradient, losses = objective.image_gradient(
            networks.referees[number], image, prompt.texts[number], looks, hyper.weights[number],
            params=noise.views[number], noise=hyper.referee.noise * noise.referee[number],
        )  # fmt: skip
        if plan.normalise:
            gradient = objective.normalised(gradient, hyper.weights[number].share, hyper.referee.normalise_epsilon)
        cotangent += gradient
        metrics["loss"] += losses.pop("loss")
        metrics |= {f"{name}_{number}" if number else name: value for name, value in losses.items()}
    return pullback(cotangent)[0], metrics


def loss_names(plan: Plan) -> tuple[str, ...]:
    """The losses that an iteration tells of: their weighted sum, then each; those of a second referee end in _1, and so on."""
    own = [f"{name}_{n}" if n else name for n, looks in enumerate(plan.looks) for name in looks.losses]
    return "loss", *own


def clean_losses(networks: Networks, prompt: Prompt, hyper: Hyper, plan: Plan, image: Array) -> Array:
    """Losses of the optimised and of the held-out referees on a decoded image as it is, weighted and added: float32 `[2]`."""
    totals = []
    for parties in (
        (networks.referees, prompt.texts, plan.looks, hyper.weights),
        (networks.held_out, prompt.held_out, plan.held_out, hyper.held_out),
    ):
        losses = [objective.clean_loss(judge, image, *rest) for judge, *rest in zip(*parties, strict=True)]
        totals.append(sum(losses, jnp.zeros(())))
    return jnp.stack(totals)


def step(
    networks: Networks,
    prompt: Prompt,
    hyper: Hyper,
    plan: Plan,
    state: InversionState,
    i: Array,
    noise: Noise,
    on: bool | None = None,
) -> tuple[InversionState, dict[str, Array]]:
    """Iteration `i`. Metrics: losses, norms of both gradients, their ratio, the learning rates' effect on the latents.

    `on` says whether the referees are in their phase where that is known beforehand; else they are asked, and heard if they are
    (no branch: of rows that differ it would take both, with networks of its own for each). Off it the losses are NaN. What has
    stopped, or is frozen, does not move; of what has stopped all metrics are NaN.
    """
    z = state.latents
    prior = jnp.zeros_like(z)
    if plan.use_sds:
        prior = sds.gradient(
            networks.unet, z, t=noise.t, eps=noise.eps, cond=prompt.cond, uncond=prompt.uncond, hyper=hyper.prior, i=i,
            alphas_cumprod=networks.alphas_cumprod, prediction_type=networks.prediction_type,
        )  # fmt: skip
    referee, metrics = jnp.zeros_like(z), dict.fromkeys(loss_names(plan), jnp.full((), jnp.nan))
    if on is None or on:
        judged = referees_gradient(networks, prompt, hyper, plan, z, noise)
        on = hyper.referee.is_on(i) if on is None else on
        referee, metrics = optax.tree.where(on, judged, (referee, metrics))
    ratio = objective.balance(prior, referee, hyper.referee.balance_epsilon) if plan.use_balance else jnp.ones(())
    ratio = jnp.where(on, ratio, 0.0)

    rate = optim.referee_rate(hyper.update, i, plan.steps)
    pull = hyper.referee.weight_at(i) * ratio * referee
    shake = jnp.where(on, -rate * hyper.update.noise * noise.n1, 0.0)
    gradient = prior + rate / hyper.update.lr * pull
    updates, optimizer = _optimizer(plan, hyper).update(
        gradient, state.optimizer, z, step=i, moved=-rate * pull + shake,
        noise=shake + jnp.where(on, hyper.update.noise, hyper.update.tail_noise) * noise.n2,
    )  # fmt: skip
    better = metrics["loss"] < state.best_loss
    new = InversionState(
        latents=optax.apply_updates(z, updates),
        optimizer=optimizer,
        best=jnp.where(better, z, state.best),
        best_loss=jnp.where(better, metrics["loss"], state.best_loss),
        frozen=state.frozen,
        watched=state.watched,
    )
    broken = ~jnp.isfinite(new.latents).all() | (jnp.asarray(on) & ~jnp.isfinite(metrics["loss"]))
    frozen, stopped = state.frozen | broken, is_stopped(state, plan)
    new = optax.tree.where(frozen | stopped, state, new).replace(frozen=frozen)
    metrics |= {"prior_norm": jnp.linalg.norm(prior), "referee_norm": jnp.linalg.norm(referee), "ratio": ratio}
    metrics |= {"latent_std": new.latents.std()}
    return new, jax.tree.map(lambda x: jnp.where(stopped, jnp.nan, x), metrics) if plan.patience else metrics


def evaluate_held_out(
    networks: Networks, prompt: Prompt, hyper: Hyper, plan: Plan, state: InversionState
) -> tuple[InversionState, Array]:
    """The state after a look of the held-out referees, and their loss; NaN for what has stopped or is frozen."""
    loss = clean_losses(networks, prompt, hyper, plan, decode(networks, state.latents, plan))[1]
    is_still = is_over(state, plan)
    watched = optax.tree.where(is_still, state.watched, state.watched.looked(state.latents, loss))
    return state.replace(watched=watched), jnp.where(is_still, jnp.nan, loss)


def is_stopped(state: InversionState, plan: Plan) -> Array:
    """Whether the held-out referees have seen nothing better for `plan.patience` looks."""
    if state.watched is None or not plan.patience:
        return jnp.zeros((), bool)
    return state.watched.since >= plan.patience


def is_over(state: InversionState, plan: Plan) -> Array:
    """Whether the latents move no more: what has stopped, or is frozen."""
    return state.frozen | is_stopped(state, plan)


def output(state: InversionState, which: str) -> Array:
    """The latents that a run ends with: `final`, `ema` (their average), `best` or `best_held_out` (the lowest loss)."""
    if which == "best_held_out":
        return state.watched.best
    if which == "best":
        return jnp.where(jnp.isfinite(state.best_loss), state.best, state.latents)
    return {"final": state.latents, "ema": state.average}[which]


def _optimizer(plan: Plan, hyper: Hyper) -> optax.GradientTransformationExtraArgs:
    return optim.build(hyper.update, stop=hyper.referee.stop, name=plan.optimizer, alias=plan.ema_alias)
