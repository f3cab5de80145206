"""What the method holds: networks, an encoded prompt, numbers, what is static, and the state between two iterations."""

from typing import Any, NamedTuple

import optax
from flax import struct
from jax import Array

from referee_jax.method import augmentations, objective, views
from referee_jax.method import held_out as held_out_lib
from referee_jax.method.referee import Referee
from referee_jax.method.ways import guided as guided_lib
from referee_jax.method.ways import noise as noise_lib
from referee_jax.method.ways import optim, sds
from referee_jax.method.ways import prior as prior_lib
from referee_jax.models.diffusion import tiny_vae
from referee_jax.models.diffusion import vae as vae_lib
from referee_jax.models.diffusion.text import Text


class Networks(struct.PyTreeNode):
    """Everything with weights."""

    prior: prior_lib.Prior
    vae: vae_lib.AutoencoderKL | tiny_vae.AutoencoderTiny
    referees: tuple[Referee, ...]
    held_out: tuple[Referee, ...] = ()


class Prompt(struct.PyTreeNode):
    """What depends on the text alone: what the generator's network reads of it, and each referee's own encoding.

    `uncond` is None where the prior is not guided.
    """

    cond: Text
    uncond: Text | None
    texts: tuple[Any, ...]
    held_out: tuple[Any, ...] = ()


class Hyperparameters(struct.PyTreeNode):
    """Every number of the method, traced; may have a leading axis for a sweep under vmap.

    `weights` has one entry per referee, `held_out` one per held-out referee, `latent_losses` one per
    name of the plan's.
    """

    prior: sds.Hyper = sds.Hyper()
    guided: guided_lib.Hyper = guided_lib.Hyper()
    noise: noise_lib.Hyper = noise_lib.Hyper()
    referee: objective.Hyper = objective.Hyper()
    update: optim.Hyper = optim.Hyper()
    views: augmentations.Settings = augmentations.Settings()
    weights: tuple[objective.Weights, ...] = ()
    held_out: tuple[objective.Weights, ...] = ()
    latent_losses: tuple[Array | float, ...] = ()


class Plan(struct.PyTreeNode):
    """What is static: it shapes the compiled program.

    Attributes:
        latent: (h, w, channels).
        method: a key of ways.WAYS, how the picture is moved.
        views: one entry per referee; `held_out` one per held-out referee.
        evaluate_every: iterations between two evaluations of the held-out referees.
        patience: an item stops after so many evaluations without a better one; 0: never.
        steps: iterations in all.
        clamp: "hard" or "straight_through", see objective.clamp.
        shared_erase: whether all views lose the same rectangle.
        optimizer: a key of optim.OPTIMIZERS.
        ema_alias: see optim.ema_restart.
        use_sds: whether the prior has a gradient.
        use_balance: whether the referees' gradient is brought to the prior's length.
        normalise: whether each referee's gradient is brought to its weight's length.
        latent_losses: keys of latent_losses.LATENT_LOSSES.
        levels: timesteps: of each iteration of "guided"; of the sampler's steps, noisiest first, of "noise".
        rule: a key of noise.RULES.
        is_guided: whether the sampler of "noise" has classifier-free guidance, which doubles its cost.
    """

    latent: tuple[int, int, int] = struct.field(pytree_node=False)
    views: tuple[objective.ViewPlan, ...] = struct.field(pytree_node=False)
    held_out: tuple[objective.ViewPlan, ...] = struct.field(pytree_node=False, default=())
    evaluate_every: int = struct.field(pytree_node=False, default=10)
    patience: int = struct.field(pytree_node=False, default=0)
    steps: int = struct.field(pytree_node=False, default=160)
    clamp: str = struct.field(pytree_node=False, default="hard")
    shared_erase: bool = struct.field(pytree_node=False, default=True)
    optimizer: str = struct.field(pytree_node=False, default="sgd")
    ema_alias: bool = struct.field(pytree_node=False, default=False)
    use_sds: bool = struct.field(pytree_node=False, default=True)
    use_balance: bool = struct.field(pytree_node=False, default=True)
    normalise: bool = struct.field(pytree_node=False, default=False)
    latent_losses: tuple[str, ...] = struct.field(pytree_node=False, default=())
    method: str = struct.field(pytree_node=False, default="sds")
    levels: tuple[float, ...] = struct.field(pytree_node=False, default=())
    rule: str = struct.field(pytree_node=False, default="reno")
    is_guided: bool = struct.field(pytree_node=False, default=False)


class InversionState(struct.PyTreeNode):
    """The loop's carry for one prompt and sample.

    Attributes:
        latents: what is moved, float32 `[h, w, C]`: clean latents, or starting noise.
        carry: the way's: the optimiser's state with the average, the noise of "guided", the momentum of "noise".
        best: the latents that the referees liked best so far, and `best_loss`.
        frozen: whether an update or a loss was not finite; the latents stay what they were before.
        held_out: what the held-out referees have measured, where there are any.
    """

    latents: Array
    carry: Any
    best: Array
    best_loss: Array
    frozen: Array
    held_out: held_out_lib.HeldOutState | None = None

    @property
    def average(self) -> Array:
        """The running average of the latents."""
        return optax.tree.get(self.carry, "average")


class Noise(struct.PyTreeNode):
    """All that is random in one iteration.

    Attributes:
        t: the timestep, int32.
        eps: noise of the prior; n1: of the referees' step, or the fresh noise of another way; n2: of each step of "sds"; each
            `[h, w, C]`.
        views: one entry per referee.
        referee: added to the views, `[keep, S, S, 3]` per referee.
    """

    t: Array
    eps: Array
    n1: Array
    n2: Array
    views: tuple[views.Params, ...]
    referee: tuple[Array, ...]


class Gradients(NamedTuple):
    """Of the latents `[h, w, C]`: the prior's, the referees', and that of losses of the latents, None without any.

    Attributes:
        losses: by name.
        at: the latents that the referees saw.
        carry: as of the state, after the prior.
    """

    prior: Array
    referee: Array
    losses: dict[str, Array]
    at: Array
    carry: Any
    latents: Array | None = None
