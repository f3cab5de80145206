"""Inverter: networks and one compiled program; prompts in, images and metrics out. Knows no files but checkpoints.

    inverter = Inverter.from_config(settings)
    result = inverter(["a red circle and a blue square"], samples=2, seed=0)

A batch is a fixed number of items (prompt, sample) at the same iteration; a shorter one is padded. `begin`, `advance` by a
chunk of iterations, and `finish` are the pieces of the loop, for who wants to look or stop in between.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from referee_jax import config, prompts, referees
from referee_jax import items as items_lib
from referee_jax.engine import builders, capacity, parallel, programs
from referee_jax.hardware import chips, compile_cache
from referee_jax.items import Item, Part
from referee_jax.method import ddim, inversion
from referee_jax.weights import load

TOKENIZED = 4096  # prompts whose tokens stay in memory, some kilobytes each


@dataclasses.dataclass(frozen=True)
class Picture:
    """One result. `scores` are the referees' on the clean image, `latents` the scaled latents `[h, w, C]` it was decoded from.

    `losses`, where there are held-out referees: those of `referee` and `held_out`, each a pair of first and last (watch.py).
    """

    item: Item
    image: np.ndarray
    scores: dict[str, float]
    latents: np.ndarray
    status: str = "done"
    losses: dict[str, tuple[float, float]] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """All results of a call, in the order prompts x samples; `history` has `[item, step]` per metric."""

    items: list[Item]
    images: np.ndarray
    scores: list[dict[str, float]]
    latents: np.ndarray
    history: dict[str, np.ndarray]


class Start(NamedTuple):
    """What the first latents are: "noise", or a "sample" of the prior, the referees' favourite of so many `candidates`."""

    init: str
    steps: int
    guidance: float
    candidates: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch between two chunks: its real items, and what the compiled program carries, padded to the batch size."""

    items: tuple[Item, ...]
    step: int
    prompt: inversion.Prompt
    hyper: inversion.Hyperparameters
    state: inversion.InversionState
    keys: Array


class Inverter:
    """The method with its networks on this process's devices.

    Of abstract networks (jax.ShapeDtypeStructs), whose devices need not be there, `trace` of `shapes` can be asked.
    """

    def __init__(
        self,
        settings: config.Settings,
        prior: load.StableDiffusion,
        judges: Sequence[referees.Judge],
        devices: Sequence[jax.Device] | None = None,
    ):
        self.mesh, self.tokenizer = builders.make_mesh(settings, devices), prior.tokenizer
        limit = chips.memory_limit(self.mesh.devices.flat[0])
        self.settings = settings = capacity.fitting(settings, prior, judges, limit)
        self.steps, self.chunk = settings.steps, settings.chunk
        self.groups = self.mesh.shape[parallel.AXIS]
        self.batch_size = settings.batch_size * self.groups
        self.judges = [judge for judge in judges if judge.spec.role == "optimise"]
        self.held_out = [judge for judge in judges if judge.spec.role == "held_out"]
        networks = builders.make_networks(prior, self.judges, self.held_out, remat=settings.remat)
        self.networks = parallel.place(networks, self.mesh, batched=False)
        self.text_encoder = prior.text_encoder
        chip = chips.of(self.mesh.devices.flat[0].device_kind)
        dense = chip is not None and chip.dense
        self.plan = builders.make_plan(settings, prior, self.judges, self.held_out, dense=dense)
        self.hyper = builders.make_hyper(settings)
        self.compiled, self._programs, self._tokens = False, {}, {}
        self._encode = self._jit(jax.vmap(builders.encode, in_axes=(None, None, 0)))

    @classmethod
    def from_config(
        cls, settings: config.Settings | ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
    ) -> "Inverter":
        """Loads the networks that `settings` names, onto `devices` (default: all of this process).

        Raises ConfigError for impossible settings, WeightsError where a checkpoint cannot be had or does not fit.
        """
        settings = config.from_config(settings)
        dtype = builders.DTYPES[settings.precision]
        prior = load.load_stable_diffusion(
            settings.generator.checkpoint,
            revision=settings.generator.revision or None,
            dtype=dtype,
        )
        return cls(settings, prior, [referees.load_referee(spec, dtype=dtype) for spec in settings.referees], devices)

    @property
    def devices(self) -> str:
        """What it runs on, in words."""
        return f"{self.mesh.devices.flat[0].device_kind} x {self.mesh.size}"

    @property
    def compiling(self) -> str:
        """What is compiled, and how long that may take, in words."""
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.networks))
        took = compile_cache.expected(self.mesh.devices.flat[0].platform, size)
        return f"compiling for {self.devices}, {self.batch_size} images at once: {took}"

    def check(self, prompt: str) -> str | None:
        """Why this prompt cannot be done, or None."""
        try:
            self._tokenize(prompt)
        except prompts.Unreadable as error:
            return error.reason
        return None

    def begin(
        self, items: Sequence[Item], seed: int, hypers: Sequence[inversion.Hyperparameters] | None = None
    ) -> Batch:
        """A batch before its first iteration; `hypers` gives each item its own numbers (one more vmapped axis)."""
        settings = self.settings
        start = Start(settings.init, settings.init_steps, settings.init_guidance, settings.init_candidates)
        return self._begin(items, seed, start, hypers)

    def _begin(
        self,
        items: Sequence[Item],
        seed: int,
        start: Start,
        hypers: Sequence[inversion.Hyperparameters] | None = None,
    ) -> Batch:
        """`begin` from a `start` of its own."""
        prompt, hyper, keys = self._ready(items, seed, hypers)
        found = None
        for number in range(start.candidates):  # one after the other: memory is that of one
            latents = self._program("noise")(keys, jnp.int32(number))
            if start.init == "sample":
                latents = self._sample(prompt, latents, start)
            if start.candidates > 1 or self.held_out:
                judge = self._program("judge", hypers is not None)
                judged = latents, judge(self.networks, prompt, hyper, latents)
                found = judged if found is None else self._program("better")(found, judged)
        latents, losses = found or (latents, None)
        state = self._program("init", hypers is not None)(latents, losses if self.held_out else None, hyper)
        return Batch(tuple(items), 0, prompt, hyper, state, keys)

    def _sample(self, prompt: inversion.Prompt, latents: Array, start: Start) -> Array:
        """Latents of noise to those of a sample of the prior."""
        total, program = len(self.networks.prior.alphas_cumprod), self._program("denoise")
        stride, guidance = jnp.int32(total // start.steps), jnp.float32(start.guidance)
        for t in ddim.timesteps(total, start.steps):
            latents = program(self.networks, prompt, latents, jnp.int32(t), stride, guidance)
        return latents

    def _ready(
        self, items: Sequence[Item], seed: int, hypers: Sequence[inversion.Hyperparameters] | None = None
    ) -> tuple[inversion.Prompt, inversion.Hyperparameters, Array]:
        """What a batch is given, padded and on the devices: encoded prompts, numbers, keys."""
        if not 0 < len(items) <= self.batch_size:
            raise ValueError(f"{len(items)} items for a batch of 1 to {self.batch_size}")
        padded = self._padded(list(items))
        tokens = jax.tree.map(lambda *x: np.stack(x), *[self._tokenize(item.prompt) for item in padded])
        place = functools.partial(parallel.place, mesh=self.mesh, batched=True)
        prompt = place(self._encode(self.networks, self.text_encoder, tokens))
        keys = place(jnp.stack([programs.item_key(seed, item) for item in padded]))
        if hypers is None:
            return prompt, self.hyper, keys
        return prompt, place(jax.tree.map(lambda *x: jnp.stack(x), *self._padded(list(hypers)))), keys

    def _padded(self, rows: list) -> list:
        """To the batch size, with the last one again and again."""
        return rows + rows[-1:] * (self.batch_size - len(rows))

    def snapshot(self, batch: Batch) -> Part:
        """A batch between two chunks as arrays of its items, to be saved."""
        leaves = jax.tree_util.tree_leaves_with_path(batch.state)
        state = {jax.tree_util.keystr(path): np.asarray(x)[: len(batch.items)] for path, x in leaves}
        return Part(batch.items, batch.step, state)

    def resume(self, part: Part, seed: int) -> Batch:
        """The batch of a part that `snapshot` gave, of this or another batch. ValueError for a state of other settings."""
        prompt, hyper, keys = self._ready(part.items, seed)
        state = self._begun(hyper)
        paths, structure = jax.tree_util.tree_flatten_with_path(state)
        wanted = {jax.tree_util.keystr(path): x for path, x in paths}
        saved = part.state or {}
        if {name: (x.shape[1:], x.dtype) for name, x in wanted.items()} != {
            name: (x.shape[1:], x.dtype) for name, x in saved.items()
        }:
            raise ValueError("the saved state is not one of these settings")
        leaves = [np.stack(self._padded(list(saved[name]))) for name in wanted]
        placed = parallel.place(jax.tree.unflatten(structure, leaves), self.mesh, batched=True)
        return Batch(part.items, part.step, prompt, hyper, placed, keys)

    def _begun(self, hyper: inversion.Hyperparameters) -> inversion.InversionState:
        """The shapes of a batch's state."""
        latents = jax.ShapeDtypeStruct((self.batch_size, *self.plan.latent), jnp.float32)
        losses = jax.ShapeDtypeStruct((self.batch_size, 2), jnp.float32) if self.held_out else None
        return jax.eval_shape(self._program("init"), latents, losses, hyper)

    def halved(self) -> "Inverter | None":
        """The same with half as many items at once, where that is possible."""
        return None if self.settings.batch_size == 1 else self.at_once(self.settings.batch_size // 2)

    def at_once(self, size: int) -> "Inverter":
        """The same with so many items at once on each device."""
        smaller = copy.copy(self)
        smaller.settings = dataclasses.replace(self.settings, batch_size=size)
        smaller.batch_size = smaller.settings.batch_size * self.groups
        smaller.compiled, smaller._programs = False, {}
        return smaller

    def advance(self, batch: Batch) -> tuple[Batch, dict[str, np.ndarray]]:
        """One chunk of iterations; the metrics of each, `[item, iteration]`. Donates the batch: go on with the result.

        A batch whose items have all stopped, or are frozen, is at its last step.
        """
        state, told, is_swept = batch.state, [], self._is_swept(batch)
        done = min(self.chunk, self.steps - batch.step)
        # Loop and phases are the host's: XLA:CPU works at less than half its speed within a loop or a branch. Nothing is waited
        # for in between; what an iteration tells is on its way to the host while the next ones run.
        numbers = jax.tree.map(np.asarray, batch.hyper.referee)
        for i in range(batch.step, batch.step + done):
            active = bool(self.judges) and bool(np.any(numbers.is_active(i)))
            run = self._program("step", is_swept, referees_active=active)
            state, metrics = run(self.networks, batch.prompt, batch.hyper, state, batch.keys, jnp.int32(i))
            if self.held_out and (i + 1) % self.plan.evaluate_every == 0:
                state, loss = self._program("evaluate_held_out", is_swept)(
                    self.networks, batch.prompt, batch.hyper, state
                )
            elif self.held_out:
                loss = np.full(self.batch_size, np.nan, np.float32)
            told.append(metrics | ({"held_out/loss": loss} if self.held_out else {}))
            for value in metrics.values():
                value.copy_to_host_async()
        count = len(batch.items)
        metrics = {name: np.stack([np.asarray(x[name])[:count] for x in told], axis=1) for name in told[0]}
        self.compiled = True
        over = np.asarray(inversion.is_over(state, self.plan))[:count].all()
        return dataclasses.replace(batch, step=self.steps if over else batch.step + done, state=state), metrics

    def shapes(self) -> Batch:
        """A batch of shapes alone, for `trace`."""
        item = Item("any", 0)
        tokens = jax.tree.map(lambda x: np.stack([x] * self.batch_size), self._tokenize(item.prompt))
        place = functools.partial(parallel.place, mesh=self.mesh)
        prompt = place(jax.eval_shape(self._encode, self.networks, self.text_encoder, tokens), batched=True)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch_size))
        keys, hyper = place(keys, batched=True), place(jax.eval_shape(lambda: self.hyper), batched=False)
        state = place(self._begun(hyper), batched=True)
        return Batch((item,) * self.batch_size, 0, prompt, hyper, state, keys)

    def trace(self, batch: Batch) -> jax.stages.Traced:
        """The program of an iteration, before it is compiled."""
        args = self.networks, batch.prompt, batch.hyper, batch.state, batch.keys, np.int32(0)
        return self._program("step", self._is_swept(batch), referees_active=True).trace(*args)

    def preview(self, batch: Batch) -> np.ndarray:
        """The images as they are, uint8 `[item, H, W, 3]`."""
        images = self._finished(batch)[1]
        return np.asarray(jnp.round(images[: len(batch.items)] * 255)).astype(np.uint8)

    def _finished(self, batch: Batch) -> tuple[Array, Array, dict[str, Array], dict[str, Array]]:
        program = self._program("finish", self._is_swept(batch), output=self.settings.output)
        return program(self.networks, batch.prompt, batch.hyper, batch.state)

    def finish(self, batch: Batch) -> list[Picture]:
        """The chosen output of each item, decoded and scored by all referees."""
        made = self._finished(batch)
        latents, images, scores, losses, frozen = jax.tree.map(np.asarray, (*made, batch.state.frozen))
        pictures = []
        for n, item in enumerate(batch.items):
            own = {name: float(value[n]) for name, value in scores.items()}
            status = "nonfinite" if frozen[n] else "done"
            pairs = losses and {name: tuple(map(float, value[n])) for name, value in losses.items()}
            pictures.append(Picture(item, images[n], own, latents[n], status, pairs or None))
        return pictures

    def __call__(self, texts: Sequence[str], *, samples: int = 1, seed: int = 0) -> Result:
        """All of `texts` x `samples`, batch by batch. ValueError for a prompt that cannot be done."""
        for text in texts:
            if reason := self.check(text):
                raise ValueError(f"prompt {text[:80]!r}: {reason}")
        items = items_lib.expand(texts, samples)
        pictures, histories = [], []
        for share in items_lib.batches(items, self.batch_size):
            batch, history = self.begin(share, seed), []
            while batch.step < self.steps:
                batch, metrics = self.advance(batch)
                history.append(metrics)
            histories.append({name: self._whole([h[name] for h in history]) for name in history[0]})
            pictures += self.finish(batch)
        return _result(pictures, {name: np.concatenate([h[name] for h in histories]) for name in histories[0]})

    def _whole(self, chunks: list[np.ndarray]) -> np.ndarray:
        """`[item, steps]` of a metric's chunks; NaN after all items have stopped."""
        found = np.concatenate(chunks, axis=1)
        return np.pad(found, ((0, 0), (0, self.steps - found.shape[1])), constant_values=np.nan)

    def sample(
        self,
        texts: Sequence[str],
        *,
        samples: int = 1,
        seed: int = 0,
        steps: int = 50,
        guidance: float = 7.5,
        candidates: int = 1,
    ) -> Result:
        """The baseline: plain DDIM sampling of the prior for the same items and from the same noise.

        Of several `candidates` per item the one that the referees like best is taken.
        """
        pictures, start = [], Start("sample", steps, guidance, candidates)
        for share in items_lib.batches(items_lib.expand(texts, samples), self.batch_size):
            pictures += self.finish(self._begin(share, seed, start))
        return _result(pictures, {})

    def _tokenize(self, prompt: str) -> dict[str, Any]:
        """A prompt's tokens. Those of the last TOKENIZED are kept: `begin` need not read again after `check`."""
        if prompt not in self._tokens:
            tokens = builders.tokenize(self.settings, self.tokenizer, self.judges, self.held_out, prompt)
            if len(self._tokens) == TOKENIZED:
                del self._tokens[next(iter(self._tokens))]
            self._tokens[prompt] = tokens
        return self._tokens[prompt]

    def _is_swept(self, batch: Batch) -> bool:
        return jax.tree.leaves(batch.hyper)[0].ndim > 0

    def _program(self, name: str, swept: bool = False, **static: Any) -> Any:
        """The compiled program of this name (see PROGRAMS) of a batch over all devices."""
        key = name, swept, *sorted(static.items())
        if key not in self._programs:
            self._programs[key] = self._make_program(name, swept, static)
        return self._programs[key]

    def _make_program(self, name: str, swept: bool, static: dict[str, Any]) -> Any:
        fn, batched, donated = programs.PROGRAMS[name]
        batched = [swept if x == "hyper" else x for x in batched]
        fn = jax.vmap(functools.partial(fn, plan=self.plan, **static), in_axes=[0 if x else None for x in batched])
        return self._jit(parallel.across_devices(fn, self.mesh, batched), donate_argnums=donated)

    def _jit(self, fn: Callable, **how: Any) -> Any:
        platform = self.mesh.devices.flat[0].platform
        return jax.jit(fn, compiler_options=chips.compiler_options(platform), **how)


def _result(pictures: Sequence[Picture], history: dict[str, np.ndarray]) -> Result:
    return Result(
        items=[picture.item for picture in pictures],
        images=np.stack([picture.image for picture in pictures]),
        scores=[picture.scores for picture in pictures],
        latents=np.stack([picture.latents for picture in pictures]),
        history=history,
    )


# --- the compiled pieces, for one item -----------------------------------------------------------------------------------
