"""The method against the torch oracle, with injected noise: one step to 1e-5, five or twenty to 1e-3 (float32, CPU)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.engine import builders
from referee_jax.method import augmentations, inversion, objective
from referee_jax.method import state as state_lib
from referee_jax.method.ways import optim, sds
from referee_jax.referees import clip
from referee_jax.weights import generators, load
from tests.conftest import relative_l2
from tests.lazy import oracle, torch
from tests.oracles import networks as tiny
from tests.oracles.settings import Settings

STEPS, PROMPTS = 20, ("a red circle and a blue square", "a green square")
NEGATIVES = ("a blue circle and a red square", "a square")
# Small steps: with large ones the iteration is chaotic and float32 parts from float64 by itself.
GENTLE = Settings(
    steps=STEPS, sds_weight=1.5, sds_weight_final=0.75, sds_weight_steps=STEPS, sds_guidance=1.5,
    referee_weight=1.0, referee_start=0, referee_stop=16, referee_noise=0.1, referee_losses={"cosine": 0.5, "contrastive": 1.0},
    optim_warmup=4, optim_noise=0.05, ema_start=5, ema_every=4, ema_decay=0.8, views_count=4, views_keep=4,
    views_augmentations=("Af",),
)  # fmt: skip
ALL_FOUR = {"views_augmentations": ("Af", "Pe", "Ji", "Er")}
# Each part of the method off, or otherwise.
VARIANTS = {
    "faithful": ALL_FOUR,
    "without sds": {"use_sds": False},
    "without referee": {"use_referee": False},
    "without noise": {"optim_noise": 0.0, "optim_tail_noise": 0.0, "referee_noise": 0.0},
    "without restart": {"ema_start": 1000},
    "without augmentation": {"views_augmentations": ()},
    "affine alone": {},
    "hardest views": ALL_FOUR | {"views_keep": 2},
    "cosine alone": {"referee_losses": {"cosine": 1.0}},
    "contrastive alone": {"referee_losses": {"contrastive": 1.0}},
    "straight through": {"clamp": "straight_through"},
    "epsilon": {"referee_balance_epsilon": 0.05},
    "storage shared": {"ema_alias": True},
    "ema": {"output": "ema"},
    "best": {"output": "best"},
    "weighted timesteps": {"sds_alpha_power": 1.0, "sds_sigma_power": 0.5},
    "late referee": {"referee_start": 3, "referee_stop": 12},
}
# What shows late, all of it together included. A wrong formula shows in the first step, a wrong restart in the fifth.
LONG = {
    "faithful",
    "without sds",
    "without referee",
    "weighted timesteps",
    "storage shared",
    "ema",
    "best",
    "late referee",
}
SHORT = 5


@pytest.fixture(scope="module")
def sides(request, tmp_path_factory):
    """The same tiny random networks in torch and in JAX."""
    sd, judge = tiny.save(tmp_path_factory.mktemp(request.param), prediction_type=request.param)
    prior = generators.load_generator(sd)
    preprocessing = {"image_mean": tiny.CLIP_MEAN, "image_std": tiny.CLIP_STD}
    referee = clip.from_checkpoint(load.load("clip", judge), preprocessing)
    networks = state_lib.Networks(prior=builders.make_prior(prior), vae=prior.vae, referees=(referee,))
    ids = {"sds": oracle.tokens(sd / "tokenizer", PROMPTS), "empty": oracle.tokens(sd / "tokenizer", [""])}
    ids |= {"referee": oracle.tokens(judge, PROMPTS)}
    ids |= {"negative": oracle.tokens(judge, NEGATIVES)[None].expand(len(PROMPTS), -1, -1)}
    return sd, judge, networks, prior.text_encoder, ids


def ours(settings: Settings) -> tuple[state_lib.Plan, state_lib.Hyperparameters]:
    """The oracle's settings as a plan and numbers."""
    s = settings
    view_plan = objective.ViewPlan(
        losses=tuple(s.referee_losses),
        count=s.views_count,
        keep=s.views_keep,
        augmentations=s.views_augmentations,
    )
    plan = state_lib.Plan(
        latent=(8, 8, 4), views=(view_plan,), steps=s.steps, clamp=s.clamp, ema_alias=s.ema_alias, use_sds=s.use_sds
    )
    hyper = state_lib.Hyperparameters(
        prior=sds.Hyper(
            weight=s.sds_weight, weight_final=s.sds_weight_final, weight_steps=s.sds_weight_steps, guidance=s.sds_guidance,
            alpha_power=s.sds_alpha_power, sigma_power=s.sds_sigma_power,
        ),
        referee=objective.Hyper(
            weight=s.referee_weight, weight_final=s.referee_weight, start=s.referee_start if s.use_referee else s.referee_stop,
            stop=s.referee_stop, balance_epsilon=s.referee_balance_epsilon, noise=s.referee_noise,
        ),
        update=optim.Hyper(
            lr=s.optim_lr, lr_final=s.optim_lr_final, warmup=s.optim_warmup, noise=s.optim_noise,
            tail_noise=s.optim_tail_noise, ema_decay=s.ema_decay, ema_start=s.ema_start, ema_every=s.ema_every,
        ),
        views=augmentations.Settings(), weights=(objective.Weights(tuple(map(float, s.referee_losses.values()))),),
    )  # fmt: skip
    return plan, jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if isinstance(x, int) else jnp.float32), hyper)


def encode(networks, text_encoder, ids) -> state_lib.Prompt:
    """Both prompts' encodings, leading axis the prompt."""
    judge = networks.referees[0]
    texts = np.concatenate([ids["referee"].numpy()[:, None], ids["negative"].numpy()], axis=1)
    features = jax.vmap(judge.encode)({"input_ids": texts, "real": np.ones(texts.shape[:2], bool)})
    cond = text_encoder([jnp.asarray(ids["sds"].numpy())])
    uncond = text_encoder([jnp.asarray(ids["empty"].numpy())])
    uncond = jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape), uncond, cond)
    return state_lib.Prompt(cond=cond, uncond=uncond, texts=(features,))


def as_torch(noise: state_lib.Noise) -> dict:
    """One step's noise of all prompts under the oracle's names."""
    tensor = lambda x: torch.from_numpy(np.array(x))
    noise = jax.tree.map(tensor, noise)
    return {
        "t": noise.t.long(), "eps": noise.eps, "n1": noise.n1, "n2": noise.n2,
        "views": noise.views[0], "referee_noise": noise.referee[0],
    }  # fmt: skip


# Compiled once for all variants that differ in numbers alone: a plan has no leaves, only structure.
draw = jax.jit(jax.vmap(inversion.draw, in_axes=(0, None, None, None, None)))
step_at_level = {
    level: jax.jit(
        jax.vmap(inversion.step, in_axes=(None, 0, None, None, 0, None, 0)),
        compiler_options={"xla_backend_optimization_level": level},
    )
    for level in (0, 1)
}


def trajectories(sides, variant: dict, steps: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """Latents `[step, prompt, h, w, C]` of the oracle and of ours, and the outputs and losses of both."""
    sd, judge, networks, text_encoder, ids = sides
    settings = dataclasses.replace(GENTLE, **variant)
    plan, hyper = ours(settings)
    theirs = oracle.load(sd, judge, settings=settings, mean=tiny.CLIP_MEAN, std=tiny.CLIP_STD)
    prompt, prompt_torch = encode(networks, text_encoder, ids), theirs.encode_text(*ids.values())
    keys = jax.random.split(jax.random.key(7), (steps, len(PROMPTS)))
    drawn = plan.replace(clamp="hard", ema_alias=False, use_sds=True)  # not asked when noise is drawn: one program less
    noises = [draw(keys[i], networks, drawn, hyper, i) for i in range(steps)]
    start = jax.random.normal(jax.random.key(1), (len(PROMPTS), *plan.latent))
    wanted, last, history = theirs.run(torch.from_numpy(np.array(start)), map(as_torch, noises), prompt_torch)
    wanted_output = theirs.output(wanted[-1], last).numpy()
    wanted = np.stack(wanted)

    state = jax.vmap(lambda z: inversion.init(None, z, plan, hyper))(start)
    # Half of the variants share one program, which so runs often enough to be worth some optimisation.
    step = step_at_level[int(plan == ours(GENTLE)[0])]
    made, losses = [np.asarray(start)], []
    for i, noise in enumerate(noises):
        state, metrics = step(networks, prompt, hyper, plan, state, i, noise)
        made.append(np.asarray(state.latents))
        losses.append(metrics["loss"])
    output = jax.vmap(lambda s: inversion.output(s, settings.output))(state)
    measured = [h["loss"].numpy() for h in history if "loss" in h]
    on = [np.asarray(x) for x in losses if np.isfinite(x).all()]
    return wanted, np.stack(made), {"output": (output, wanted_output), "loss": (on, measured)}


@pytest.mark.parametrize(
    ("sides", "name"), [("v_prediction", "faithful"), *(("epsilon", name) for name in VARIANTS)], indirect=["sides"]
)
def test_trajectory(sides, name):
    wanted, made, others = trajectories(sides, VARIANTS[name], STEPS if name in LONG else SHORT)
    # The first step begins from equal latents; its update is measured against its own length.
    assert relative_l2(made[1] - made[0], wanted[1] - wanted[0]) <= 1e-5
    assert relative_l2(made[1:], wanted[1:]) <= 1e-3
    assert relative_l2(made[-1], wanted[-1]) <= 1e-3
    assert relative_l2(*others["output"]) <= 1e-3
    assert len(others["loss"][0]) == len(others["loss"][1])
    if others["loss"][1]:
        assert relative_l2(*map(np.stack, others["loss"])) <= 1e-3
    # The latents move, or the agreement would say nothing.
    assert relative_l2(wanted[-1], wanted[0]) > 0.1 or name == "without referee"
