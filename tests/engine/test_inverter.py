"""The engine: one program whatever surrounds a prompt (batch, devices, numbers), and nothing compiled twice.

With toy networks (tests/toys.py); test_real_networks.py has real ones.
"""

import concurrent.futures
import dataclasses
import functools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax import config
from referee_jax import items as items_lib
from referee_jax.engine import builders, parallel, programs
from referee_jax.engine import compiled as compiled_lib
from referee_jax.engine import inverter as inverter_lib
from referee_jax.hardware import devices
from referee_jax.method import objective
from referee_jax.performance import cost, hlo
from referee_jax.referees import questions
from referee_jax.runs import job, worker
from tests import fakes, tiny, toys
from tests.conftest import relative_l2
from tests.engine import transformations

# Sums of floats depend on their order, which is another in a batch of another size.
TOLERANCE = 1e-6


def build(devices: int = 1, **changes) -> inverter_lib.Inverter:
    return toys.engine(tiny.settings(**changes), jax.devices()[:devices])


@pytest.fixture(scope="module")
def inverter():
    return build()


@pytest.fixture(scope="module")
def straight(inverter):
    """All eight prompts in one batch on one device."""
    return inverter(tiny.PROMPTS, seed=3)


def test_flops_are_of_one_image(inverter):
    """Whatever the batch, the chunk and the devices; more views cost more."""
    items = items_lib.expand(tiny.PROMPTS, 1)
    each = cost.step_flops(inverter, inverter.begin(items, 0))
    assert each > 1e3
    spread = build(devices=2, batch_size=2, chunk=2)
    assert cost.step_flops(spread, spread.begin(items[:3], 0)) == pytest.approx(each)
    more = build(views={"count": 6, "keep": 4})
    assert cost.step_flops(more, more.begin(items, 0)) > each


@pytest.mark.parametrize("size", [1, 3])
def test_batch_independence(straight, size):
    small = build(batch_size=size)
    picked = [tiny.PROMPTS[i] for i in (5, 2, 0, 7)]
    result = small(picked, seed=3)
    for n, i in enumerate((5, 2, 0, 7)):
        assert relative_l2(result.latents[n], straight.latents[i]) < TOLERANCE


def test_samples_and_seed(inverter):
    first = inverter(tiny.PROMPTS[:2], samples=2, seed=0)
    assert [(item.prompt, item.sample) for item in first.items] == [(p, s) for p in tiny.PROMPTS[:2] for s in (0, 1)]
    again, other = inverter(tiny.PROMPTS[1:2], samples=1, seed=0), inverter(tiny.PROMPTS[1:2], samples=1, seed=1)
    assert relative_l2(again.latents[0], first.latents[2]) < TOLERANCE
    assert relative_l2(first.latents[3], first.latents[2]) > 0.5
    assert relative_l2(other.latents[0], first.latents[2]) > 0.5


def test_rows_with_seeds_and_negative_prompts(inverter):
    """In one batch: each has the image that it has under such settings."""
    prompt = tiny.PROMPTS[0]
    rows = [items_lib.Row(prompt), items_lib.Row(prompt, seed=4), items_lib.Row(prompt, negative="a grey ring")]
    batch = inverter.begin(list(items_lib.Items(rows, 1)), 3)
    while batch.step < inverter.steps:
        batch, _ = inverter.advance(batch)
    found = [picture.latents for picture in inverter.finish(batch)]
    led = build(sds={"negative_prompt": "a grey ring"})
    expected = [inverter([prompt], seed=3), inverter([prompt], seed=4), led([prompt], seed=3)]
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_l2(ours, theirs.latents[0]) < TOLERANCE
    assert relative_l2(found[1], found[0]) > 0.5 and relative_l2(found[2], found[0]) > 1e-3
    unguided = build(sds={"negative_prompt": inverter.settings.sds.prompt})
    assert unguided.check(prompt) is None
    assert (
        unguided.check(prompt, "grey")
        == "it has a negative prompt, and the config no guidance: sds.prompt is sds.negative_prompt"
    )


def test_a_batch_has_the_key_of_each_item(inverter):
    """As of the item alone: the first and the last seed, a prompt whose number is above 2**31, a batch that is padded."""
    seeds = (0, 2**31, 2**32 - 1)
    rows = [items_lib.Row(prompt, seed=seed) for seed in seeds for prompt in (tiny.PROMPTS[0], tiny.PROMPTS[2])]
    items = list(items_lib.Items(rows, 1))
    assert max(item.prompt_id for item in items) > 2**31 and len(items) < inverter.batch_size
    keys = jax.random.key_data(inverter.begin(items, 7).keys)
    for item, key in zip(items, keys, strict=False):
        alone = programs.item_key(item.seed, item.prompt_id, item.sample)
        np.testing.assert_array_equal(key, jax.random.key_data(alone))


@pytest.fixture(scope="module")
def spread():
    """One item on each of eight devices."""
    return build(devices=8, batch_size=1)


def test_devices(spread, straight):
    """Eight devices with one prompt each."""
    assert spread.batch_size == 8
    assert relative_l2(spread(tiny.PROMPTS, seed=3).latents, straight.latents) < TOLERANCE


def test_no_program_of_a_run_speaks(monkeypatch):
    """Every one, as it is called in a run with candidates, particles and a held-out referee on eight devices."""
    judge = {"losses": {"cosine": 1.0}}
    engine = build(
        devices=8, batch_size=1, init="sample", init_steps=2, init_candidates=3, look_every=2,
        referees=(judge, judge | {"role": "held_out"}), particles=3, select="smc", select_every=2,
    )  # fmt: skip
    seen, ask = {}, engine._programs

    def watched(name, *swept, **static):
        def call(*args):
            key = name, *static.items(), jax.tree.structure(args)
            seen[key] = seen.get(key) or ask(name, *swept, **static).lower(*args).compile()
            return seen[key](*args)

        return call

    monkeypatch.setattr(engine, "_programs", watched)
    engine(tiny.PROMPTS, seed=3)
    assert {name for name, *_ in seen} == set(programs.PROGRAMS)
    for program in seen.values():
        text = program.as_text()
        assert "num_partitions=8" in text and hlo.collectives(text) == []


def test_impossible_mesh():
    for mesh in ({"model": 3}, {"prompt": 5, "model": 2}):
        with pytest.raises(config.ConfigError, match="mesh: 8 devices do not make"):
            build(devices=8, mesh=mesh)


def test_transformations(inverter):
    transformations.check(inverter, tiny.PROMPTS, TOLERANCE)


def test_nothing_recompiles():
    """Over seeds, prompts, numbers and weights, of losses and of referees, of a watched run and of rows of a sweep."""
    spec = tiny.settings().referees[0]
    judges = lambda *weights: (
        dataclasses.replace(spec, weight=weights[0], losses={"cosine": weights[1], "contrastive": weights[2]}),
        dataclasses.replace(spec, role="held_out", weight=weights[3], losses={"cosine": weights[4]}),
    )
    inverter = build(batch_size=2, referees=judges(1.0, 0.5, 1.0, 1.0, 1.0), look_every=2)
    inverter(tiny.PROMPTS[:2], seed=0)
    inverter.sample(tiny.PROMPTS[:2], steps=4)
    run_rows(inverter, [inverter.hyper] * 2)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **kwargs: compiled.append(name) if "backend_compile" in name else None
    )
    inverter(tiny.PROMPTS[3:5], seed=17)
    changed = [
        tiny.settings(
            batch_size=2, sds={"guidance": guidance, "weight": 2.0, "t_max": 700}, look_every=2,
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
        result = inverter(tiny.PROMPTS[:2], seed=0)
        assert relative_l2(result.latents[0], latents) < TOLERANCE
    inverter.sample(tiny.PROMPTS[2:4], steps=4, guidance=2.0)
    assert compiled == []
    assert relative_l2(swept[0], swept[1]) > 1e-2
    jax.jit(lambda x: x * 3.25)(np.ones(7, np.float32))
    assert len(compiled) == 1  # the counter counts
    assert np.isfinite(result.latents).all()


def test_nothing_is_traced_twice(monkeypatch):
    """What a run costs is read off the program that it then compiles; a held-out referee looks by that of the choice."""
    traced = []

    def watched(name, fn):
        return lambda *args, **static: traced.append((name, *sorted(static.items()))) or fn(*args, **static)

    watching = {name: (watched(name, fn), *rest) for name, (fn, *rest) in programs.PROGRAMS.items()}
    monkeypatch.setattr(programs, "PROGRAMS", watching)
    monkeypatch.setattr(builders, "encode", watched("encode", builders.encode))
    spec = tiny.settings().referees[0]
    engine = build(
        init="sample", init_steps=3, init_candidates=2, steps=4, referee={"stop": 2}, look_every=2,
        referees=(spec, dataclasses.replace(spec, role="held_out")),
    )  # fmt: skip
    worker.costs(engine)
    assert {name for name, *_ in traced} == {"encode", "init", "step"}
    engine(tiny.PROMPTS[:2], seed=0)
    names = [name for name, *_ in traced]
    assert {name: names.count(name) for name in names} == dict.fromkeys(names, 1) | {"step": 2}, traced


def test_what_threads_compile_is_not_compiled_again(monkeypatch):
    """With and without a thread each program is compiled once; what the first batch needs last is compiled by a thread."""
    spec, compiled = tiny.settings().referees[0], []
    names = lambda name, _, **about: (
        compiled.append(threading.current_thread().name) if "backend_compile" in name else None
    )
    jax.monitoring.register_event_duration_secs_listener(names)
    counts, latents = [], []
    for cores in (1, 1, 3):  # the first time, what JAX keeps for any engine is compiled too
        monkeypatch.setattr(devices, "cores", lambda cores=cores: cores)
        engine = build(
            init="sample", init_steps=2, init_candidates=2, steps=4, referee={"stop": 2}, look_every=2,
            referees=(spec, dataclasses.replace(spec, role="held_out")),
        )  # fmt: skip
        compiled.clear()
        with engine.ahead():
            latents.append(engine(tiny.PROMPTS[:2], seed=0).latents)
        counts.append([len(compiled), sum(name.startswith("compile") for name in compiled)])
    assert counts[1][0] == counts[2][0] and counts[1][1] == 0 < counts[2][1], counts
    np.testing.assert_array_equal(*latents[1:])


def test_what_has_not_begun_is_left(monkeypatch):
    """At the end, and whoever needs a program that waits for its turn compiles it."""
    monkeypatch.setattr(devices, "cores", lambda: 2)
    engine, order, turn = build(), [], threading.Event()

    def slow(program, args):
        order.append(args)
        turn.wait(10)

    monkeypatch.setattr(compiled_lib, "_compile", slow)
    wanted = [("noise", {}, ("first",)), ("output", {"output": "final"}, ("second",)), ("take", {}, ("third",))]
    with engine._programs.ahead(wanted):
        assert engine._programs("output", output="final") is engine._programs("output", output="final")
        threading.Timer(0.1, turn.set).start()
        engine._programs("noise")
        assert turn.is_set()
    assert order[0] == ("first",) and ("second",) not in order


def test_counting_leaves_programs_to_the_thread(monkeypatch):
    """Who traces a program for its FLOPs does not take it from the thread that would compile it."""
    monkeypatch.setattr(devices, "cores", lambda: 2)
    engine, compiled, turn = build(), [], threading.Event()
    monkeypatch.setattr(compiled_lib, "_compile", lambda program, args: turn.wait(10) and compiled.append(program))
    with engine.ahead():
        cost.running(engine, engine.shapes()).image  # noqa: B018, counts when first asked
        futures = list(engine._programs._begun.values())
        turn.set()
        concurrent.futures.wait(futures)
    assert len(futures) == len(compiled) > 1


def test_a_first_look_is_at_a_sample(monkeypatch):
    """At the best of the first ones, once, and as soon as a thread has compiled what draws it."""
    monkeypatch.setattr(devices, "cores", lambda: 2)
    spec, looks = tiny.settings().referees[0], []
    engine = build(init="sample", init_steps=2, init_candidates=3, steps=2, batch_size=2, referees=(spec,))
    look = lambda batch, what: looks.append((what, batch.step, engine.preview(batch)))
    items = items_lib.expand(tiny.PROMPTS[:2], 1)
    chosen = engine.begin(items, 0, look=look)
    assert not looks  # nothing is compiled beforehand
    with engine.ahead():
        for future in engine._programs._begun.values():
            future.result()
        again = engine.begin(items, 0, look=look)
    assert [(what, step) for what, step, _ in looks] == [("the best of 1 of 3 samples", 0)]
    np.testing.assert_array_equal(again.state.latents, chosen.state.latents)
    first = engine.sample(tiny.PROMPTS[:2], seed=0, steps=2, guidance=engine.settings.init_guidance)
    np.testing.assert_allclose(looks[0][2], np.round(255 * first.images), atol=1)


@pytest.mark.parametrize("group", [1, 2])
def test_after_a_warm_up_nothing_is_compiled(tmp_path, monkeypatch, group):
    """Not for what a run begins with, nor for any of its phases, looks of a held-out referee, its end; on a device, or a group
    over which weights are split."""
    monkeypatch.setattr(parallel, "LARGE", 16)
    spec = tiny.settings().referees[0]
    asked = tiny.settings(
        batch_size=0, samples=3, init="sample", init_steps=2, init_candidates=2, steps=7, chunk=2, look_every=3,
        referee={"start": 3, "stop": 5}, referees=(spec, dataclasses.replace(spec, role="held_out")), mesh={"model": group},
    )  # fmt: skip
    engine, compiled = toys.engine(asked, jax.devices()[:group]), []
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
    batch = inverter.begin(items_lib.expand(tiny.PROMPTS[:1], 1) * len(hypers), 0, hypers=hypers)
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
        assert relative_l2(latents, inverter(tiny.PROMPTS[:1], seed=0).latents[0]) < TOLERANCE
    assert relative_l2(swept[0], swept[2]) > 1e-3


def test_rows_whose_referees_act_at_other_times(inverter, monkeypatch):
    """Each as it would be alone: from the start, later, never."""
    items = items_lib.expand(tiny.PROMPTS[:1], 1) * 3
    times = [(0, 2), (1, 2), (0, 0)]
    hypers = [
        inverter.hyper.replace(referee=inverter.hyper.referee.replace(start=jnp.int32(start), stop=jnp.int32(stop)))
        for start, stop in times
    ]
    batch, metrics = inverter.advance(inverter.begin(items, 0, hypers=hypers))
    losses = metrics["loss"][:, :2]
    assert np.isfinite(losses).tolist() == [[start <= i < stop for i in range(2)] for start, stop in times]
    while batch.step < inverter.steps:
        batch, _ = inverter.advance(batch)
    for picture, hyper in zip(inverter.finish(batch), hypers, strict=True):
        monkeypatch.setattr(inverter, "hyper", hyper)
        assert relative_l2(picture.latents, inverter(tiny.PROMPTS[:1], seed=0).latents[0]) < TOLERANCE


@pytest.mark.parametrize("what", ["latents", "loss"])
def test_a_nonfinite_prompt_is_frozen_alone(monkeypatch, what):
    """Where its latents would be not finite, or where a referee's loss is not, whatever its gradient."""
    inverter, gradient = build(), objective.image_gradient

    def lost(referee, image, text, looks, weights, **drawn):
        found, losses = gradient(referee, image, text, looks, weights, **drawn)
        return found, losses | {"loss": losses["loss"] + jnp.where(weights.referee > 5, jnp.inf, 0)}

    monkeypatch.setattr(objective, "image_gradient", lost)
    items, numbers = items_lib.expand(tiny.PROMPTS[:3], 1), [inverter.hyper] * 3
    clean = inverter.begin(items, 0, hypers=numbers)
    if what == "loss":
        weights = (inverter.hyper.weights[0].replace(referee=jnp.float32(9)),)
        numbers = [numbers[0], inverter.hyper.replace(weights=weights), numbers[2]]
    broken = inverter.begin(items, 0, hypers=numbers)
    if what == "latents":
        cond = jax.tree.map(lambda x: x.at[1].set(jnp.nan), broken.prompt.cond)
        broken = dataclasses.replace(broken, prompt=broken.prompt.replace(cond=cond))
    start = np.asarray(broken.state.latents[1])
    clean, broken = inverter.advance(clean)[0], inverter.advance(broken)[0]
    pictures, wanted = inverter.finish(broken), inverter.finish(clean)
    assert [picture.status for picture in pictures] == ["done", "nonfinite", "done"]
    np.testing.assert_array_equal(pictures[1].latents, start)
    for n in (0, 2):
        np.testing.assert_array_equal(pictures[n].latents, wanted[n].latents)


def test_a_batch_of_frozen_items_is_over(inverter):
    batch = inverter.begin(items_lib.expand(tiny.PROMPTS[:2], 1), 0)
    cond = jax.tree.map(lambda x: x * jnp.nan, batch.prompt.cond)
    batch = dataclasses.replace(batch, prompt=batch.prompt.replace(cond=cond))
    batch, _ = inverter.advance(batch)
    assert inverter.chunk < inverter.steps and batch.step == inverter.steps
    assert [picture.status for picture in inverter.finish(batch)] == ["nonfinite"] * 2


@pytest.mark.parametrize("init", ["noise", "sample"])
def test_start(init):
    inverter = build(init=init, init_steps=3, steps=1, batch_size=1)
    start = np.asarray(inverter.begin(items_lib.expand(tiny.PROMPTS[:1], 1), 0).state.latents[0])
    sampled = inverter.sample(tiny.PROMPTS[:1], steps=3, guidance=7.5).latents[0]
    assert (relative_l2(start, sampled) < 1e-5) == (init == "sample")


def test_candidates(inverter):
    """Of several samples the referees' favourite is taken, item by item."""
    one, some = (inverter.sample(tiny.PROMPTS[:4], steps=3, candidates=n) for n in (1, 3))
    kept = [relative_l2(a, b) < TOLERANCE for a, b in zip(some.latents, one.latents, strict=True)]
    assert not all(kept)

    def loss(scores: dict[str, float]) -> float:  # as the settings weigh it
        return -0.5 * np.log(scores["referee_0/cosine"]) - np.log(scores["referee_0/contrastive"])

    for a, b, same in zip(some.scores, one.scores, kept, strict=True):
        assert same or loss(a) < loss(b)


def test_check(inverter):
    assert inverter.check(tiny.PROMPTS[0]) is None
    assert re.fullmatch(r"\d+ tokens, the prior reads 77", inverter.check("red circle " * 60))
    with pytest.raises(ValueError, match="the prior reads 77"):
        inverter(["red circle " * 60])


ASKS = {"name": "blip_vqa", "losses": {"vqa": 1.0}, "questions": 5}


def test_questions():
    """A prompt's atoms, or the user's questions, with the answers in the result; a saved state knows which they were."""
    engine = build(referees=(ASKS, ASKS | {"role": "held_out"}), steps=2, chunk=1)
    given = {tiny.PROMPTS[1]: questions.given("Is it red? | Is it blue?")}
    asking = engine.asking(given)
    items = items_lib.expand(tiny.PROMPTS[:2], 1)
    batch, _ = asking.advance(asking.begin(items, 0))
    part = asking.snapshot(batch)
    pictures = asking.finish(asking.advance(asking.resume(part, 0))[0])
    for picture, asked in zip(pictures, [questions.atoms(tiny.PROMPTS[0]), given[tiny.PROMPTS[1]]], strict=True):
        assert picture.scores.keys() == {"referee_0/vqa", "held_out_0/vqa"}
        assert picture.questions.keys() == {"referee_0", "held_out_0"}
        for rows in picture.questions.values():
            assert [row["question"] for row in rows] == [atom.question for atom in asked]
            assert all(0 < row["probability"] < 1 for row in rows)
    assert not engine.finish(batch)[1].questions["referee_0"][0]["question"].startswith("Is it")
    with pytest.raises(ValueError, match="of other questions"):
        engine.resume(part, 0)
    with pytest.raises(ValueError, match="of other questions"):
        build(referees=(ASKS | {"questions": 0}, ASKS | {"role": "held_out"}), steps=2).resume(part, 0)
    assert engine.resume(part.only(items[:1]), 0).step == 1
    too_many = "a red cat, a blue dog and a green bird"
    assert asking.check(too_many) == "6 questions, blip_vqa is asked 5 (its setting questions)"


@pytest.mark.parametrize("watched", [False, True])
def test_a_batch_goes_on_from_a_snapshot(inverter, straight, watched):
    """All of it to the bit; some of its items, in other rows, as in any batch. A state of other settings is refused."""
    if watched:
        specs = inverter.settings.referees[0], {"role": "held_out", "losses": {"cosine": 1.0}}
        inverter = build(referees=specs, look_every=2, output="best_held_out")
        straight = inverter(tiny.PROMPTS, seed=3)
    items = items_lib.expand(tiny.PROMPTS, 1)
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
            build().resume(part, 3)


def test_another_number_of_devices_goes_on(inverter, spread, straight):
    """What one device has begun eight finish, and the other way round."""
    items = items_lib.expand(tiny.PROMPTS, 1)
    for before, after in ((inverter, spread), (spread, inverter)):
        batch, _ = before.advance(before.begin(items, 3))
        resumed, _ = after.advance(after.resume(before.snapshot(batch), 3))
        assert resumed.step == after.steps
        latents = np.stack([picture.latents for picture in after.finish(resumed)])
        assert relative_l2(latents, straight.latents) < TOLERANCE


def test_halved(straight):
    """Smaller batches of the same images, down to one at once."""
    engine, sizes = build(), []
    while engine:
        sizes.append(engine.batch_size)
        engine, smaller = engine.halved(), engine
    assert sizes == [8, 4, 2, 1]
    part = inverter_lib.Inverter.halved(build()).begin(items_lib.expand(tiny.PROMPTS[:4], 1), 3)
    assert part.state.latents.shape[0] == 4
    found = smaller(tiny.PROMPTS[:2], seed=3)
    assert relative_l2(found.latents, straight.latents[:2]) < TOLERANCE


def test_nothing_to_make_is_an_error():
    engine = build(devices=1)
    for make in (engine, engine.sample):
        with pytest.raises(ValueError, match="there are 0 prompts and 1 samples of each: nothing to make"):
            make([])
        with pytest.raises(ValueError, match="nothing to make"):
            make(["a red circle"], samples=0)
