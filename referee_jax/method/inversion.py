"""Model inversion for ONE prompt and one sample: "Referee Can Play" (arXiv 2402.16305), pure.

    prompt -> referee's text side -> latents -> decoder -> random views -> referee's image side
           -> losses -> gradient of the latents, balanced with the prior's
           -> update, average, restart

An iteration is `step`: `gradients` of the prior and of the referees, then `update`. It is a
function of (networks, prompt, hyper, plan, state, i, noise); vmap adds prompts, samples and
settings, and devices come outside. What is moved, and how, is one of three ways (ways/), of which
score distillation is the paper's. All that is random in an iteration is drawn from one key by
`draw`. What is static, because it shapes the program, is in `Plan`; every number is traced, in
`Hyperparameters` (state.py). The loop over iterations is the caller's.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from referee_jax.method import latent_losses, objective, views
from referee_jax.method.state import Gradients, Hyperparameters, InversionState, Networks, Noise, Plan, Prompt
from referee_jax.method.ways import WAYS, sds


def init(
    networks: Networks | None,
    latents: Array,
    plan: Plan,
    hyper: Hyperparameters,
) -> InversionState:
    """The state before the first iteration, from latents `[h, w, C]`: noise, or a sample. Only "guided" reads the networks."""
    latents, carry = WAYS[plan.method].begin(networks, hyper, plan, latents)
    return InversionState(
        latents=latents,
        carry=carry,
        best=latents,
        best_loss=jnp.array(jnp.inf, jnp.float32),
        frozen=jnp.zeros((), bool),
    )


def draw(key: Array, networks: Networks, plan: Plan, hyper: Hyperparameters, i: Array) -> Noise:
    """The randomness of iteration `i`, from `key` and `i`."""
    key = jax.random.fold_in(key, i)
    t, latent, view, referee = jax.random.split(key, 4)
    eps, n1, n2 = jax.random.normal(latent, (3, *plan.latent))
    view_params, referee_noise = [], []
    for number, (view_plan, network) in enumerate(zip(plan.views, networks.referees, strict=True)):
        size = network.image_size
        view_params.append(
            views.sample(
                jax.random.fold_in(view, number),
                hyper.views,
                names=view_plan.augmentations,
                count=view_plan.count,
                size=size,
                shared_erase=plan.shared_erase,
            )
        )
        shape = (view_plan.keep, size, size, 3)
        referee_noise.append(jax.random.normal(jax.random.fold_in(referee, number), shape))
    return Noise(
        t=sds.sample_timestep(t, hyper.prior, i, networks.prior.timesteps),
        eps=eps,
        n1=n1,
        n2=n2,
        views=tuple(view_params),
        referee=tuple(referee_noise),
    )


@jax.named_scope("decode")
def decode(networks: Networks, latents: Array, plan: Plan) -> Array:
    """Latents `[h, w, C]` to the image `[H, W, 3]` in [0, 1]."""
    return objective.clamp(networks.vae.decode(latents[None])[0].astype(jnp.float32), plan.clamp)


def picture(networks: Networks, prompt: Prompt, hyper: Hyperparameters, plan: Plan, latents: Array) -> Array:
    """What a state's latents look like: `[h, w, C]`, rendered and decoded, to the image `[H, W, 3]` in [0, 1]."""
    return decode(networks, render(networks, prompt, hyper, plan, latents), plan)


@jax.named_scope("render")
def render(networks: Networks, prompt: Prompt, hyper: Hyperparameters, plan: Plan, latents: Array) -> Array:
    """Clean latents of a state's: themselves, or what the sampler makes of starting noise."""
    return WAYS[plan.method].render(networks, prompt, hyper, plan, latents)


def as_saved(image: Array) -> Array:
    """In steps of 1/255, as the file is (unless `outputs.stretch` saves another): what is judged here anyone can judge after."""
    return jnp.round(255 * image) / 255


def loss_names(plan: Plan) -> tuple[str, ...]:
    """The losses of an iteration: their weighted sum "loss", then each as "referee_0/itm"."""
    optimised = [(n, view_plan) for n, view_plan in enumerate(plan.views) if view_plan.has_gradient]
    return "loss", *(f"referee_{n}/{name}" for n, view_plan in optimised for name in view_plan.losses)


def referees_gradient(
    networks: Networks, prompt: Prompt, hyper: Hyperparameters, plan: Plan, latents: Array, noise: Noise
) -> tuple[Array, dict[str, Array]]:
    """d(sum of the referees' losses)/d(latents), and the losses: one decode, one pullback."""
    image, pullback = jax.vjp(lambda z: picture(networks, prompt, hyper, plan, z), latents)
    cotangent, metrics = jnp.zeros_like(image), {"loss": jnp.zeros(())}
    for n, view_plan in enumerate(plan.views):
        if not view_plan.has_gradient:
            continue
        with jax.named_scope(f"referee_{n}"):
            gradient, losses = objective.image_gradient(
                networks.referees[n],
                image,
                prompt.texts[n],
                view_plan,
                hyper.weights[n],
                params=noise.views[n],
                noise=hyper.referee.noise * noise.referee[n],
            )
        if plan.normalise:
            weight = hyper.weights[n].referee
            gradient = objective.normalised(gradient, weight, hyper.referee.normalise_epsilon)
        cotangent += gradient
        metrics["loss"] += losses.pop("loss")
        metrics |= {f"referee_{n}/{name}": value for name, value in losses.items()}
    with jax.named_scope("decode_pullback"):
        return pullback(cotangent)[0], metrics


def gradients(
    networks: Networks,
    prompt: Prompt,
    hyper: Hyperparameters,
    plan: Plan,
    state: InversionState,
    i: Array,
    noise: Noise,
    *,
    referees_active: bool = True,
) -> Gradients:
    """All gradients at iteration `i`.

    Args:
        networks: the prior, the autoencoder and the referees.
        prompt: the encoded prompt.
        hyper: the numbers.
        plan: what is static.
        state: before the iteration.
        i: the iteration, int32.
        noise: of `draw`.
        referees_active: static. False leaves the referees out: their gradient is zero and their
            losses are NaN. True evaluates them at every iteration, and has the same result where
            `hyper.referee.is_active(i)` is false.
    """
    with jax.named_scope("prior"):
        look = WAYS[plan.method].prior(networks, prompt, hyper, plan, state, i, noise)
    referee, losses = jnp.zeros_like(look.at), dict.fromkeys(loss_names(plan), jnp.full((), jnp.nan))
    if referees_active:
        # Selected, not branched: where rows of a sweep differ, a branch would compute both sides.
        evaluated = referees_gradient(networks, prompt, hyper, plan, look.at, noise)
        referee, losses = optax.tree.where(hyper.referee.is_active(i), evaluated, (referee, losses))
    if not plan.latent_losses:
        return Gradients(look.gradient, referee, losses, look.at, look.carry)
    with jax.named_scope("latent_losses"):
        term, term_losses = latent_losses.gradient(plan.latent_losses, hyper.latent_losses, look.at)
    return Gradients(look.gradient, referee, losses | term_losses, look.at, look.carry, term)


@jax.named_scope("update")
def update(
    hyper: Hyperparameters,
    plan: Plan,
    state: InversionState,
    i: Array,
    noise: Noise,
    found: Gradients,
    *,
    referees_active: bool = True,
) -> tuple[InversionState, dict[str, Array]]:
    """The state after iteration `i`, and its metrics.

    An item that has stopped, or is frozen, does not move.

    Args:
        hyper: the numbers.
        plan: what is static.
        state: before the iteration.
        i: the iteration, int32.
        noise: of `draw`.
        found: of `gradients`.
        referees_active: as of `gradients`.

    Returns:
        The new state, and scalars: the losses, the norms of both gradients, their ratio, and the
        standard deviation of the latents. Of an item that has stopped all of them are NaN.
    """
    prior, referee, losses = found.prior, found.referee, found.losses
    active = hyper.referee.is_active(i) if referees_active else jnp.zeros((), bool)
    epsilon = hyper.referee.balance_epsilon
    ratio = objective.balance(prior, referee, epsilon) if plan.use_balance else jnp.ones(())
    ratio = jnp.where(active, ratio, 0.0)
    pull = hyper.referee.weight_at(i) * ratio * referee
    latents, carry = WAYS[plan.method].move(hyper, plan, state, i, noise, found, pull, active)
    better = losses["loss"] < state.best_loss
    new = state.replace(
        latents=latents,
        carry=carry,
        best=jnp.where(better, found.at, state.best),
        best_loss=jnp.where(better, losses["loss"], state.best_loss),
    )
    broken = ~jnp.isfinite(new.latents).all() | (active & ~jnp.isfinite(losses["loss"]))
    frozen, stopped = state.frozen | broken, is_stopped(state, plan)
    new = optax.tree.where(frozen | stopped, state, new).replace(frozen=frozen)
    metrics = losses | {
        "prior_norm": jnp.linalg.norm(prior),
        "referee_norm": jnp.linalg.norm(referee),
        "ratio": ratio,
        "latent_std": new.latents.std(),
    }
    return new, jax.tree.map(lambda x: jnp.where(stopped, jnp.nan, x), metrics) if plan.patience else metrics


def step(
    networks: Networks,
    prompt: Prompt,
    hyper: Hyperparameters,
    plan: Plan,
    state: InversionState,
    i: Array,
    noise: Noise,
    *,
    referees_active: bool = True,
) -> tuple[InversionState, dict[str, Array]]:
    """Iteration `i`: `gradients`, then `update`, whose arguments and results these are."""
    on = {"referees_active": referees_active}
    found = gradients(networks, prompt, hyper, plan, state, i, noise, **on)
    return update(hyper, plan, state, i, noise, found, **on)


@jax.named_scope("clean_losses")
def clean_losses(networks: Networks, prompt: Prompt, hyper: Hyperparameters, plan: Plan, image: Array) -> Array:
    """Weighted sums of the losses on an image as it is saved, in the order of held_out.LOSSES: float32 `[3]`."""
    image, zero = as_saved(image), jnp.zeros(())
    groups = (
        (networks.referees, prompt.texts, plan.views, hyper.weights),
        (networks.held_out, prompt.held_out, plan.held_out, hyper.held_out),
    )
    judged, held_out = (
        [objective.clean_loss(referee, image, *rest) for referee, *rest in zip(*group, strict=True)] for group in groups
    )
    optimised = [loss for loss, view_plan in zip(judged, plan.views, strict=True) if view_plan.has_gradient]
    return jnp.stack([sum(losses, zero) for losses in (optimised, held_out, judged)])


def record_evaluation(plan: Plan, state: InversionState, losses: Array) -> tuple[InversionState, Array]:
    """The state after an evaluation by the held-out referees, and their loss; NaN for an item that moves no more.

    `losses` are `clean_losses` of the image of `state.latents`.
    """
    over, loss = is_over(state, plan), losses[1]
    measured = optax.tree.where(over, state.held_out, state.held_out.evaluated(state.latents, loss))
    return state.replace(held_out=measured), jnp.where(over, jnp.nan, loss)


def is_stopped(state: InversionState, plan: Plan) -> Array:
    """Whether the held-out loss has not improved for `plan.patience` evaluations."""
    if state.held_out is None or not plan.patience:
        return jnp.zeros((), bool)
    return state.held_out.since >= plan.patience


def is_over(state: InversionState, plan: Plan) -> Array:
    """Whether the latents move no more: the item has stopped, or is frozen."""
    return state.frozen | is_stopped(state, plan)


def output(state: InversionState, which: str) -> Array:
    """The latents that a run ends with: `final`, `ema` (their average), `best` or `best_held_out` (the lowest loss)."""
    if which == "best_held_out":
        return state.held_out.best
    if which == "best":
        return jnp.where(jnp.isfinite(state.best_loss), state.best, state.latents)
    return {"final": state.latents, "ema": state.average}[which]
