"""The engine: one program whatever surrounds a prompt (batch, devices, transformation), and nothing compiled twice."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config, prompts, referees
from referee_jax import items as items_lib
from referee_jax.engine import builders, parallel, programs
from referee_jax.engine import inverter as inverter_lib
from referee_jax.method import inversion, objective
from referee_jax.performance import ahead_of_time, cost, flops, hlo
from referee_jax.runs import job
from tests import fakes
from tests.conftest import relative_l2
from tests.oracles import networks

PROMPTS = [
    "a red circle and a blue square",
    "a green square",
    "a blue circle",
    "red",
    "a photo",
    "blue and red",
    "b",
    "c",
]
# XLA tiles a batch of 8 otherwise than one of 1, and sums of floats depend on their order; the steps below are gentle
# enough that such differences (1e-7 at first) do not grow past this in 6 iterations.
TOLERANCE = 2e-5


def settings(checkpoints, **changes) -> config.Settings:
    sd, clip = map(str, checkpoints)
    values = {
        "steps": 6, "chunk": 4, "image_size": 32, "batch_size": 8, "output": "final",
        "generator": {"checkpoint": sd},
        "referees": (
            {
                "checkpoint": clip, "losses": {"cosine": 0.5, "contrastive": 1.0}, "near": 3,
                "exchange": (("red", "blue", "green"),),
            },
        ),
        "sds": {"weight": 1.5, "weight_final": 0.75, "weight_steps": 6, "guidance": 1.5},
        "referee": {"weight": 1.0, "weight_final": 1.0, "stop": 5, "noise": 0.1, "balance_epsilon": 1e-8},
        "optim": {"warmup": 2, "noise": 0.05}, "ema": {"start": 2, "every": 2}, "views": {"count": 3, "keep": 2},
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return config.from_config(values)


def build(checkpoints, devices: int = 1, **changes) -> inverter_lib.Inverter:
    return inverter_lib.Inverter.from_config(settings(checkpoints, **changes), jax.devices()[:devices])


@pytest.fixture(scope="module")
def inverter(checkpoints):
    return build(checkpoints)


@pytest.fixture(scope="module")
def straight(inverter):
    """All eight prompts in one batch on one device."""
    return inverter(PROMPTS, seed=3)


def test_result(inverter, straight):
    assert straight.images.shape == (8, 32, 32, 3) and straight.latents.shape == (8, 8, 8, 4)
    assert 0 <= straight.images.min() and straight.images.max() <= 1
    assert straight.history["loss"].shape == (8, 6)
    # The referees act in iterations 0 to 4.
    assert np.isfinite(straight.history["loss"][:, :5]).all() and np.isnan(straight.history["loss"][:, 5]).all()
    assert set(straight.scores[0]) == {"referee_0/cosine", "referee_0/probability"}
    # Different prompts and different samples make different pictures.
    flat = straight.latents.reshape(8, -1)
    assert min(relative_l2(flat[i], flat[j]) for i in range(8) for j in range(i)) > 0.5


def test_flops_are_of_one_image(checkpoints, inverter):
    """Whatever the batch, the chunk and the devices; more views cost more."""
    items = items_lib.expand(PROMPTS, 1)
    each = cost.step_flops(inverter, inverter.begin(items, 0))
    assert each > 1e6
    # As it is estimated from the networks' sizes alone.
    assert cost.estimate(inverter.settings).step == pytest.approx(each, rel=1e-6)
    spread = build(checkpoints, devices=2, batch_size=2, chunk=2)
    assert cost.step_flops(spread, spread.begin(items[:3], 0)) == pytest.approx(each)
    more = build(checkpoints, views={"count": 6, "keep": 4})
    assert cost.step_flops(more, more.begin(items, 0)) > each


def test_shapes_alone_make_the_same_program(checkpoints, inverter):
    """What is traced without weights is, to the letter, what is traced of real ones."""
    unloaded = ahead_of_time.unloaded(settings(checkpoints), jax.devices()[:1])
    batch = unloaded.shapes()
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((unloaded.networks, batch.state)))
    real = inverter.trace(inverter.begin(items_lib.expand(PROMPTS, 1), 0))
    assert str(unloaded.trace(batch).jaxpr) == str(real.jaxpr)
    assert cost.step_flops(unloaded, batch) > 1e6


@pytest.mark.parametrize("size", [1, 3])
def test_batch_independence(checkpoints, straight, size):
    small = build(checkpoints, batch_size=size)
    picked = [PROMPTS[i] for i in (5, 2, 0, 7)]
    result = small(picked, seed=3)
    for n, i in enumerate((5, 2, 0, 7)):
        assert relative_l2(result.latents[n], straight.latents[i]) < TOLERANCE


def test_samples_and_seed(inverter):
    first = inverter(PROMPTS[:2], samples=2, seed=0)
    assert [(item.prompt, item.sample) for item in first.items] == [(p, s) for p in PROMPTS[:2] for s in (0, 1)]
    again, other = inverter(PROMPTS[1:2], samples=1, seed=0), inverter(PROMPTS[1:2], samples=1, seed=1)
    assert relative_l2(again.latents[0], first.latents[2]) < TOLERANCE
    assert relative_l2(first.latents[3], first.latents[2]) > 0.5
    assert relative_l2(other.latents[0], first.latents[2]) > 0.5


def chunk_text(engine) -> str:
    batch = engine.begin(items_lib.expand(PROMPTS, 1), 0)
    args = engine.networks, batch.prompt, batch.hyper, batch.state, batch.keys, jnp.int32(0)
    return engine._program("step", referees_active=True).lower(*args).compile().as_text()


@pytest.fixture(scope="module")
def spread(checkpoints):
    """One item on each of eight devices."""
    return build(checkpoints, devices=8, batch_size=1)


def test_devices(spread, straight):
    """Eight devices with one prompt each, by shard_map: without a word between them."""
    assert spread.batch_size == 8
    result = spread(PROMPTS, seed=3)
    assert relative_l2(result.latents, straight.latents) < TOLERANCE
    text = chunk_text(spread)
    assert "fusion" in text  # it is the program
    assert hlo.collectives(text) == []


def test_no_program_of_a_run_speaks(checkpoints, monkeypatch):
    """Every one, as it is called in a run with candidates and a held-out referee on eight devices."""
    judge = {"checkpoint": str(checkpoints[1]), "losses": {"cosine": 1.0}}
    engine = build(
        checkpoints, devices=8, batch_size=1, init="sample", init_steps=2, init_candidates=2, look_every=2,
        referees=(judge, judge | {"role": "held_out"}),
    )  # fmt: skip
    seen, ask = {}, engine._program

    def watched(name, *swept, **static):
        compiled = ask(name, *swept, **static)

        def call(*args):
            placed = lambda x: x.sharding if getattr(x, "committed", False) else None
            told = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(x))
            seen[name, *static.items()] = compiled, jax.tree.map(lambda x: told(x) if hasattr(x, "shape") else x, args)
            return compiled(*args)

        return call

    monkeypatch.setattr(engine, "_program", watched)
    engine(PROMPTS, seed=3)
    assert {name for name, *_ in seen} == set(programs.PROGRAMS) and len(seen) == len(programs.PROGRAMS) + 1
    for compiled, shapes in seen.values():
        text = compiled.lower(*shapes).compile().as_text()
        assert "num_partitions=8" in text and hlo.collectives(text) == []


def test_weights_split_within_groups(checkpoints, straight, monkeypatch):
    """Four groups of two devices: each holds half of the large weights, and speaks to its neighbour alone."""
    monkeypatch.setattr(parallel, "LARGE", 256)
    split = build(checkpoints, devices=8, batch_size=2, mesh={"model": 2})
    assert split.batch_size == 8
    weights = jax.tree.leaves(split.networks)
    held, whole = sum(x.addressable_shards[0].data.size for x in weights), sum(x.size for x in weights)
    assert 0.5 <= held / whole < 0.6
    assert relative_l2(split(PROMPTS, seed=3).latents, straight.latents) < TOLERANCE
    found = [line for line in chunk_text(split).splitlines() if hlo.collectives(line)]
    assert found
    for line in found:
        said = re.search(r"(?:replica_groups|source_target_pairs)=(\S+)", line)[1]
        pairs = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", said)]
        # Neighbours, written out or as "four groups of two, counted through".
        assert said.startswith("[4,2]<=[8]") or pairs and all(a // 2 == b // 2 for a, b in pairs), line


def test_impossible_mesh(checkpoints):
    for mesh in ({"model": 3}, {"prompt": 5, "model": 2}):
        with pytest.raises(config.ConfigError, match="mesh: 8 devices do not make"):
            build(checkpoints, devices=8, mesh=mesh)


def test_transformations(inverter):
    """One iteration under jit, vmap, scan, shard_map and pmap."""
    networks, plan, hyper = inverter.networks, inverter.plan, inverter.hyper
    mesh = parallel.prompt_mesh(jax.devices())
    batch = inverter.begin(items_lib.expand(PROMPTS, 1), 3)
    prompt, state, keys = jax.device_get((batch.prompt, batch.state, jax.random.key_data(batch.keys)))
    networks = jax.device_get(networks)

    def step(networks, prompt, hyper, state, key, i):
        noise = inversion.draw(jax.random.wrap_key_data(key), networks, plan, hyper, i)
        return inversion.step(networks, prompt, hyper, plan, state, i, noise)[0].latents

    take = lambda tree, n: jax.tree.map(lambda x: x[n], tree)
    single = jax.jit(step)
    wanted = np.stack([single(networks, take(prompt, n), hyper, take(state, n), keys[n], 0) for n in range(8)])
    assert relative_l2(wanted, state.latents) > 1e-3
    over = (None, 0, None, 0, 0, None)
    batched = jax.vmap(step, in_axes=over)
    scanned = lambda *args: jax.lax.scan(lambda c, i: (c, batched(*args, i)), 0, jnp.arange(1))[1][0]
    made = {
        "vmap": jax.jit(batched)(networks, prompt, hyper, state, keys, 0),
        "scan": jax.jit(scanned)(networks, prompt, hyper, state, keys),
        "shard_map": jax.jit(parallel.across_devices(batched, mesh, [x == 0 for x in over]))(
            networks, prompt, hyper, state, keys, jnp.int32(0)
        ),
        "pmap": jax.pmap(step, in_axes=over)(networks, prompt, hyper, state, keys, 0),
    }
    for name, latents in made.items():
        assert relative_l2(latents, wanted) < TOLERANCE, name


def test_nothing_recompiles(checkpoints):
    """Over seeds, prompts, numbers and weights, of losses and of referees, of a watched run and of rows of a sweep."""
    spec = settings(checkpoints).referees[0]
    judges = lambda *weights: (
        dataclasses.replace(spec, weight=weights[0], losses={"cosine": weights[1], "contrastive": weights[2]}),
        dataclasses.replace(spec, role="held_out", weight=weights[3], losses={"cosine": weights[4]}),
    )
    inverter = build(checkpoints, batch_size=2, referees=judges(1.0, 0.5, 1.0, 1.0, 1.0), look_every=2)
    inverter(PROMPTS[:2], seed=0)
    inverter.sample(PROMPTS[:2], steps=4)
    run_rows(inverter, [inverter.hyper] * 2)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **kwargs: compiled.append(name) if "backend_compile" in name else None
    )
    inverter(PROMPTS[3:5], seed=17)
    changed = [
        settings(
            checkpoints, batch_size=2, sds={"guidance": guidance, "weight": 2.0, "t_max": 700}, look_every=2,
            referee={"weight": 3.0, "stop": 3}, optim={"lr": rate, "noise": 0.0}, ema={"every": 1},
            views={"affine_degrees": 3.0}, referees=judges(*weights),
        )
        for guidance, rate, weights in ((4.0, 0.5, (2.0, 0.5, 0.25, 3.0, 2.0)), (2.0, 0.25, (1.0, 1.5, 0.0, 0.5, 4.0)))
    ]  # fmt: skip
    asked = dataclasses.replace(inverter.settings, remat="auto")
    assert builders.structure(changed[0]) == builders.structure(changed[1]) == builders.structure(asked)
    rows = [builders.make_hyper(one) for one in changed]
    swept = run_rows(inverter, rows)
    for row, latents in zip(rows, swept, strict=True):
        inverter.hyper = row
        result = inverter(PROMPTS[:2], seed=0)
        assert relative_l2(result.latents[0], latents) < TOLERANCE
    inverter.sample(PROMPTS[2:4], steps=4, guidance=2.0)
    assert compiled == []
    assert relative_l2(swept[0], swept[1]) > 1e-2
    jax.jit(lambda x: x * 3.25)(np.ones(7, np.float32))
    assert len(compiled) == 1  # the counter counts
    assert np.isfinite(result.latents).all()


def test_after_a_warm_up_nothing_is_compiled(checkpoints, tmp_path):
    """Not for what a run begins with, nor for any of its phases, looks of a held-out referee, its end."""
    spec = settings(checkpoints).referees[0]
    asked = settings(
        checkpoints, batch_size=0, samples=3, init="sample", init_steps=2, init_candidates=2, steps=7, chunk=2, look_every=3,
        referee={"start": 3, "stop": 5}, referees=(spec, dataclasses.replace(spec, role="held_out")),
    )  # fmt: skip
    engine, compiled = inverter_lib.Inverter.from_config(asked, jax.devices()[:1]), []
    engine.at_once = functools.cache(engine.at_once)  # programs are kept with an engine
    command = fakes.command("--prompt=b", "--prompt=c", f"--workdir={tmp_path}")
    asked = dataclasses.replace(command, settings=asked)
    assert engine.batch_size > 6 and job.warm_up(asked, load=lambda _: engine) == 0
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **kwargs: compiled.append(name) if "backend_compile" in name else None
    )
    assert job.execute(asked, load=lambda _: engine) == 0
    assert compiled == [] and len(list((tmp_path / "images").iterdir())) == 6


def run_rows(inverter, hypers) -> list[np.ndarray]:
    """The latents of the first prompt with each row's numbers."""
    batch = inverter.begin(items_lib.expand(PROMPTS[:1], 1) * len(hypers), 0, hypers)
    while batch.step < inverter.steps:
        batch, _ = inverter.advance(batch)
    return [picture.latents for picture in inverter.finish(batch)]


def test_settings_as_an_axis(inverter, monkeypatch):
    """Hyper-parameters per item, in one program, equal separate runs with each."""
    hypers = [
        inverter.hyper.replace(prior=inverter.hyper.prior.replace(guidance=jnp.float32(g))) for g in (1.5, 3.0, 6.0)
    ]
    swept = run_rows(inverter, hypers)
    for latents, hyper in zip(swept, hypers, strict=True):
        monkeypatch.setattr(inverter, "hyper", hyper)
        assert relative_l2(latents, inverter(PROMPTS[:1], seed=0).latents[0]) < TOLERANCE
    assert relative_l2(swept[0], swept[2]) > 1e-3


def test_rows_whose_referees_act_at_other_times(inverter, monkeypatch):
    """Each as it would be alone: from the start, later, never."""
    items = items_lib.expand(PROMPTS[:1], 1) * 3
    times = [(0, 2), (1, 2), (0, 0)]
    hypers = [
        inverter.hyper.replace(referee=inverter.hyper.referee.replace(start=jnp.int32(start), stop=jnp.int32(stop)))
        for start, stop in times
    ]
    batch, metrics = inverter.advance(inverter.begin(items, 0, hypers))
    losses = metrics["loss"][:, :2]
    assert np.isfinite(losses).tolist() == [[start <= i < stop for i in range(2)] for start, stop in times]
    while batch.step < inverter.steps:
        batch, _ = inverter.advance(batch)
    for picture, hyper in zip(inverter.finish(batch), hypers, strict=True):
        monkeypatch.setattr(inverter, "hyper", hyper)
        assert relative_l2(picture.latents, inverter(PROMPTS[:1], seed=0).latents[0]) < TOLERANCE


def test_rows_with_numbers_of_their_own_share_the_weights(inverter):
    """What differs from row to row must not give each a copy of the networks: no convolution or product has groups for it."""
    items = items_lib.expand(PROMPTS[:1], 1) * 3
    shapes = []
    for hypers in (None, [inverter.hyper] * 3):
        batch = inverter.begin(items, 0, hypers)
        step = inverter._program("step", hypers is not None, referees_active=True)
        traced = step.trace(inverter.networks, batch.prompt, batch.hyper, batch.state, batch.keys, np.int32(0))
        shapes.append(sorted(weights(traced.jaxpr.jaxpr)))
    assert shapes[0] == shapes[1] and len(shapes[0]) > 20


def weights(jaxpr):
    """The shapes of all that images are convolved with, and groups."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn.invars[1].aval.shape, eqn.params["feature_group_count"], eqn.params["batch_group_count"]
        for inner in flops._inner(eqn.params):
            yield from weights(inner)


@pytest.mark.parametrize("what", ["latents", "loss"])
def test_a_nonfinite_prompt_is_frozen_alone(checkpoints, monkeypatch, what):
    """Where its latents would be not finite, or where a referee's loss is not, whatever its gradient."""
    inverter, gradient = build(checkpoints), objective.image_gradient

    def lost(referee, image, text, looks, weights, **drawn):
        found, losses = gradient(referee, image, text, looks, weights, **drawn)
        return found, losses | {"loss": losses["loss"] + jnp.where(weights.referee > 5, jnp.inf, 0)}

    monkeypatch.setattr(objective, "image_gradient", lost)
    items, numbers = items_lib.expand(PROMPTS[:3], 1), [inverter.hyper] * 3
    clean = inverter.begin(items, 0, numbers)
    if what == "loss":
        weights = (inverter.hyper.weights[0].replace(referee=jnp.float32(9)),)
        numbers = [numbers[0], inverter.hyper.replace(weights=weights), numbers[2]]
    broken = inverter.begin(items, 0, numbers)
    if what == "latents":
        cond = broken.prompt.cond.at[1].set(jnp.nan)
        broken = dataclasses.replace(broken, prompt=broken.prompt.replace(cond=cond))
    start = np.asarray(broken.state.latents[1])
    clean, broken = inverter.advance(clean)[0], inverter.advance(broken)[0]
    pictures, wanted = inverter.finish(broken), inverter.finish(clean)
    assert [picture.status for picture in pictures] == ["done", "nonfinite", "done"]
    np.testing.assert_array_equal(pictures[1].latents, start)
    for n in (0, 2):
        np.testing.assert_array_equal(pictures[n].latents, wanted[n].latents)


def test_a_batch_of_frozen_items_is_over(inverter):
    batch = inverter.begin(items_lib.expand(PROMPTS[:2], 1), 0)
    batch = dataclasses.replace(batch, prompt=batch.prompt.replace(cond=batch.prompt.cond * jnp.nan))
    batch, _ = inverter.advance(batch)
    assert inverter.chunk < inverter.steps and batch.step == inverter.steps
    assert [picture.status for picture in inverter.finish(batch)] == ["nonfinite"] * 2


@pytest.mark.parametrize("init", ["noise", "sample"])
def test_start(checkpoints, init):
    inverter = build(checkpoints, init=init, init_steps=3, steps=1, batch_size=1)
    start = np.asarray(inverter.begin(items_lib.expand(PROMPTS[:1], 1), 0).state.latents[0])
    sampled = inverter.sample(PROMPTS[:1], steps=3, guidance=7.5).latents[0]
    assert (relative_l2(start, sampled) < 1e-5) == (init == "sample")


def test_candidates(inverter):
    """Of several samples the referees' favourite is taken, item by item."""
    one, some = (inverter.sample(PROMPTS[:4], steps=3, candidates=n) for n in (1, 3))
    kept = [relative_l2(a, b) < TOLERANCE for a, b in zip(some.latents, one.latents, strict=True)]
    assert not all(kept)

    def loss(scores: dict[str, float]) -> float:  # as the settings weigh it
        return 0.5 * (1 - scores["referee_0/cosine"]) - np.log(scores["referee_0/probability"])

    for a, b, same in zip(some.scores, one.scores, kept, strict=True):
        assert same or loss(a) < loss(b)


def test_check(inverter):
    assert inverter.check(PROMPTS[0]) is None
    assert re.fullmatch(r"\d+ tokens, the prior reads 77", inverter.check("red circle " * 60))
    with pytest.raises(ValueError, match="the prior reads 77"):
        inverter(["red circle " * 60])


def test_a_prompt_is_counted_as_each_referee_reads_it(inverter, tmp_path, monkeypatch):
    networks.save_blip2(tmp_path, lm_head=False)
    judge = referees.load_referee(config.RefereeSpec(name="blip2", checkpoint=str(tmp_path), losses={"itm": 1.0}))
    monkeypatch.setattr(inverter, "held_out", [judge])
    quoted = '"red" ' * 11
    assert prompts.token_count(judge.tokenizer, quoted) == 35  # but marks are not read
    assert judge.read(quoted)["attention_mask"].sum() == 13 and inverter.check(quoted) is None
    assert inverter.check("red " * 30) is None
    assert inverter.check("red " * 31) == "33 tokens, blip2 reads 32"
    assert inverter.check("(...)") == "nothing in it that blip2 reads"


@pytest.mark.parametrize("watched", [False, True])
def test_a_batch_goes_on_from_a_snapshot(checkpoints, inverter, straight, watched):
    """All of it to the bit; some of its items, in other rows, as in any batch. A state of other settings is refused."""
    if watched:
        clip = str(checkpoints[1])
        specs = inverter.settings.referees[0], {"checkpoint": clip, "role": "held_out", "losses": {"cosine": 1.0}}
        inverter = build(checkpoints, referees=specs, look_every=2, output="best_held_out")
        straight = inverter(PROMPTS, seed=3)
    items = items_lib.expand(PROMPTS, 1)
    batch, _ = inverter.advance(inverter.begin(items, 3))
    part = inverter.snapshot(batch)
    assert part.step == 4 and part.items == tuple(items)
    for kept in (items, items[5:1:-2]):
        resumed = inverter.resume(part.only(kept), 3)
        resumed, metrics = inverter.advance(resumed)
        assert resumed.step == 6 and metrics["loss"].shape == (len(kept), 2)
        rows = [n for n, item in enumerate(items) if item in kept]
        latents = np.stack([picture.latents for picture in inverter.finish(resumed)])
        if kept is items:
            np.testing.assert_array_equal(latents, straight.latents)
        else:
            assert relative_l2(latents, straight.latents[rows]) < TOLERANCE
    if watched:
        with pytest.raises(ValueError, match="not one of these settings"):
            build(checkpoints).resume(part, 3)


def test_another_number_of_devices_goes_on(inverter, spread, straight):
    """What one device has begun eight finish, and the other way round."""
    items = items_lib.expand(PROMPTS, 1)
    for before, after in ((inverter, spread), (spread, inverter)):
        batch, _ = before.advance(before.begin(items, 3))
        resumed, _ = after.advance(after.resume(before.snapshot(batch), 3))
        assert resumed.step == after.steps
        latents = np.stack([picture.latents for picture in after.finish(resumed)])
        assert relative_l2(latents, straight.latents) < TOLERANCE


def test_halved(checkpoints, straight):
    """Smaller batches of the same images, down to one at once."""
    engine, sizes = build(checkpoints), []
    while engine:
        sizes.append(engine.batch_size)
        engine, smaller = engine.halved(), engine
    assert sizes == [8, 4, 2, 1]
    part = inverter_lib.Inverter.halved(build(checkpoints)).begin(items_lib.expand(PROMPTS[:4], 1), 3)
    assert part.state.latents.shape[0] == 4
    found = smaller(PROMPTS[:2], seed=3)
    assert relative_l2(found.latents, straight.latents[:2]) < TOLERANCE
