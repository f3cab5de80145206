"""The engine: networks and compiled programs; prompts in, images and metrics out.

    inverter = Inverter.from_config(settings)
    result = inverter(["a red circle and a blue square"], samples=2, seed=0)

A batch is a fixed number of items (prompt, sample) at the same iteration; a shorter one is padded.
`begin`, `advance` by a chunk of iterations, and `finish` are the parts of the loop, for callers that
need to stop or inspect between chunks. It reads no files but checkpoints, and writes none.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from referee_jax import config, referees
from referee_jax import items as items_lib
from referee_jax.engine import builders, capacity, compiled, parallel
from referee_jax.engine import particles as particles_lib
from referee_jax.engine.particles import Particle
from referee_jax.engine.results import Batch, Picture, Result, Start
from referee_jax.engine.texts import Texts
from referee_jax.hardware import chips, compile_cache
from referee_jax.hardware import devices as hardware_devices
from referee_jax.items import Item, Part
from referee_jax.method import held_out, inversion
from referee_jax.method import state as state_lib
from referee_jax.referees.questions import Atom
from referee_jax.weights import generators
from referee_jax.weights.generators import Generator

CHOICE = held_out.LOSSES.index("choice")


def _some(texts: Sequence[str], samples: int) -> list[items_lib.Item]:
    """The items of the prompts. ValueError where there are none."""
    if not texts or samples < 1:
        raise ValueError(f"there are {len(texts)} prompts and {samples} samples of each: nothing to make")
    return items_lib.expand(texts, samples)


class Inverter:
    """The method with its networks on this process's devices.

    With abstract networks (jax.ShapeDtypeStructs) the devices need not be there, and only
    `trace(shapes())` can be called.
    """

    def __init__(
        self,
        settings: config.Settings,
        prior: Generator,
        judges: Sequence[referees.Judge],
        devices: Sequence[jax.Device] | None = None,
    ):
        hardware_devices.check_numbers()
        self.mesh = builders.make_mesh(settings, devices)
        limit = chips.memory_limit(self.mesh.devices.flat[0])
        self.settings = settings = capacity.fitting(settings, prior, judges, limit)
        self.steps, self.chunk = settings.steps, settings.chunk
        self.groups = self.mesh.shape[parallel.AXIS]
        self.batch_size = settings.batch_size * self.groups
        self.judges = [judge for judge in judges if not judge.spec.is_held_out]
        self.held_out = [judge for judge in judges if judge.spec.is_held_out]
        self.texts = Texts(settings, prior.tokenizers, self.judges, self.held_out)
        hardware = chips.traits(self.mesh.devices.flat[0], group=self.mesh.shape[parallel.MODEL])
        networks = builders.make_networks(prior, self.judges, self.held_out, remat=settings.remat, hardware=hardware)
        self.networks = parallel.place(networks, self.mesh, batched=False)
        self.text_encoder, self.schedule = prior.text_encoder, prior.schedule
        self.plan = builders.make_plan(settings, prior, self.judges, self.held_out, dense=hardware.dense)
        self.hyper = builders.make_hyper(settings)
        gradients = [view_plan.has_gradient for view_plan in self.plan.views]
        self.is_optimised, self.losses = any(gradients), held_out.LOSSES[: 2 if all(gradients) else 3]
        self.compiled, self._programs = False, compiled.Programs(self.plan, self.mesh)
        self._encode = compiled.jit(jax.vmap(builders.encode, in_axes=(None, None, 0)), self.mesh)

    @classmethod
    def from_config(
        cls, settings: config.Settings | ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
    ) -> "Inverter":
        """Loads the networks that `settings` names, onto `devices` (default: all of this process).

        Raises ConfigError for impossible settings, WeightsError where a checkpoint cannot be had or does not fit,
        DeviceError where JAX's options would give other pictures.
        """
        settings = config.from_config(settings)
        dtype, mesh = builders.DTYPES[settings.precision], builders.make_mesh(settings, devices)
        put = functools.partial(parallel.place, mesh=mesh, batched=False)
        prior = generators.load_generator(
            settings.generator.checkpoint,
            revision=settings.generator.revision or None,
            unet=settings.generator.unet,
            unet_revision=settings.generator.unet_revision or None,
            vae=settings.generator.vae,
            vae_revision=settings.generator.vae_revision or None,
            loras=[(lora.file, lora.weight) for lora in settings.generator.loras],
            prediction=settings.generator.prediction,
            dtype=dtype,
            put=put,
            # It is needed once a prompt, and too large to stay.
            put_t5=lambda weights: weights,
        )
        judges = [referees.load_referee(spec, dtype=dtype, put=put) for spec in settings.referees]
        return cls(settings, prior, judges, devices)

    @property
    def is_judged(self) -> bool:
        """Whether latents are judged beside the iterations: to choose, or by held-out referees."""
        return self.settings.init_candidates > 1 or self.settings.particles > 1 or bool(self.held_out)

    @property
    def devices(self) -> str:
        """The devices in words: "cpu x 1"."""
        return f"{self.mesh.devices.flat[0].device_kind} x {self.mesh.size}"

    @property
    def compiling(self) -> str:
        """A message about the compilation: devices, images at once, where programs are kept."""
        directory = compile_cache.directory()
        cache = f"; programs are kept in {directory}" if directory else ""
        return f"compiling for {self.devices}, {self.batch_size} images at once{cache}"

    def asking(self, questions: Mapping[str, Sequence[Atom]]) -> "Inverter":
        """The same, with its compiled programs, where some prompts have questions of their user's."""
        other = copy.copy(self)
        other.texts = self.texts.asking(questions)
        return other

    def check(self, prompt: str, negative: str | None = None) -> str | None:
        """Why this prompt, with a negative prompt of its own, cannot be used, or None."""
        return self.texts.refusal(prompt, negative)

    def begin(
        self,
        items: Sequence[Item],
        seed: int,
        *,
        look: Callable[[Batch, str], None] | None = None,
        hypers: Sequence[state_lib.Hyperparameters] | None = None,
    ) -> Batch:
        """A batch before its first iteration.

        Args:
            items: its items.
            seed: of those that have none of their own.
            look: called with a batch of the best of the first samples, and their number, as soon as `preview` is compiled.
            hypers: each item's own numbers (one more vmapped axis).
        """
        settings = self.settings
        start = Start(settings.init, settings.init_steps, settings.init_guidance, settings.init_candidates)
        return self._initial_batch(items, seed, start, hypers, look)

    def _initial_batch(
        self,
        items: Sequence[Item],
        seed: int,
        start: Start,
        hypers: Sequence[state_lib.Hyperparameters] | None = None,
        look: Callable[[Batch, str], None] | None = None,
    ) -> Batch:
        prompt, hyper, keys = self._encode_items(items, seed, hypers)

        def begun(best: list[tuple[Array, Array]]) -> Batch:
            init, zeros = self._programs("init", hypers is not None), jnp.zeros_like(best[0][0][:, 0, 0, 0])
            particles = [
                Particle(init(self.networks, latents, losses if self.held_out else None, hyper), own, zeros, zeros)
                for (latents, losses), own in zip(best, keys, strict=False)
            ]
            return Batch(tuple(items), 0, prompt, hyper, tuple(particles))

        count, best = self.settings.particles, []
        for number in range(max(start.candidates, count)):  # one after the other, for the memory of one
            latents, losses = self._programs("noise")(keys[0], jnp.int32(number)), None
            if start.init == "sample":
                latents = self._denoise(prompt, latents, start)
            if start.candidates > 1 or self.held_out:
                losses = self._judge(prompt, hyper, latents)
            best.append((latents, losses))
            if start.candidates > 1:
                best = particles_lib.ranked(self._take, best, [-losses[:, CHOICE] for _, losses in best], count)
                if look and self._programs.waits("finish", output=self.settings.output):
                    look(begun(best), f"the best of {number + 1} of {start.candidates} samples")
        return begun(best)

    def _take(self, trees: Sequence[Any], row: np.ndarray) -> Any:
        """See particles.Take."""
        return self._programs("take")(tuple(trees), parallel.place(jnp.asarray(row), self.mesh, batched=True))

    def _judge(self, prompt: state_lib.Prompt, hyper: state_lib.Hyperparameters, latents: Array) -> Array:
        """Clean losses in the order of held_out.LOSSES, `[item, 3]`."""
        is_swept = jax.tree.leaves(hyper)[0].ndim > 0
        return self._programs("judge", is_swept)(self.networks, prompt, hyper, latents)

    def _denoise(self, prompt: state_lib.Prompt, latents: Array, start: Start) -> Array:
        """Noise to the latents of a sample of the prior, by DDIM at its published sampler's timesteps."""
        program = self._programs("denoise", is_guided=start.guidance != 1)
        guidance, timesteps = np.float32(start.guidance), self._timesteps(start.steps)
        scale = np.float32(self.schedule.first_scale(timesteps[0]))
        for t, after in itertools.pairwise(timesteps):
            latents = program(self.networks, prompt, latents, scale, t, after, guidance)
            scale = np.float32(1)
        return latents

    def _timesteps(self, steps: int) -> list[np.generic]:
        """The published sampler's, of its prior's type."""
        timesteps = self.schedule.timesteps(steps)
        return list(np.asarray(timesteps, np.int32 if isinstance(timesteps[0], int) else np.float32))

    def _encode_items(
        self, items: Sequence[Item], seed: int, hypers: Sequence[state_lib.Hyperparameters] | None = None
    ) -> tuple[state_lib.Prompt, state_lib.Hyperparameters, list[Array]]:
        """Encoded prompts, numbers and the keys of each particle of a batch, padded and on the devices."""
        if not 0 < len(items) <= self.batch_size:
            raise ValueError(f"{len(items)} items for a batch of 1 to {self.batch_size}")
        items = self._padded(list(items))
        place = functools.partial(parallel.place, mesh=self.mesh, batched=True)
        stacked = jax.tree.map(lambda *x: np.stack(x), *(self.texts.tokens(*item.texts) for item in items))
        # A T5 is on the host, and on the devices for this call alone; a group splits it.
        encoder = parallel.place(self.text_encoder, self.mesh, batched=False)
        prompt = place(self._encode(self.networks, encoder, stacked))
        seeds = [seed if item.seed is None else item.seed for item in items]
        numbers = [seeds, [item.prompt_id for item in items], [item.sample for item in items]]
        keys = self._programs("keys", particles=self.settings.particles)(*place([np.uint32(x) for x in numbers]))
        if hypers is None:
            return prompt, parallel.place(self.hyper, self.mesh, batched=False), keys
        return prompt, place(jax.tree.map(lambda *x: jnp.stack(x), *self._padded(list(hypers)))), keys

    def _padded(self, rows: list) -> list:
        """Repeats the last row up to the batch size."""
        return rows + rows[-1:] * (self.batch_size - len(rows))

    def snapshot(self, batch: Batch) -> Part:
        """The state of a batch between two chunks as arrays, to be saved."""
        saved = [particle.saved for particle in batch.particles] if self.settings.particles > 1 else batch.state
        leaves = jax.tree_util.tree_leaves_with_path(saved)
        state = {jax.tree_util.keystr(path): np.asarray(x)[: len(batch.items)] for path, x in leaves}
        return Part(batch.items, batch.step, state | self.texts.asked(batch.items))

    def resume(self, part: Part, seed: int) -> Batch:
        """The batch of a part of `snapshot`, of this or another batch. ValueError for a state of other settings."""
        prompt, hyper, keys = self._encode_items(part.items, seed)
        is_one, abstract = self.settings.particles == 1, self._abstract_state(hyper)
        if not is_one:
            abstract = particles_lib.abstract(
                abstract, particles_lib.survivors(self.settings, part.step), self.batch_size
            )
        paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
        expected = {jax.tree_util.keystr(path): x for path, x in paths}
        saved = dict(part.state or {})
        asked = self.texts.asked(part.items)
        if any(not np.array_equal(saved.pop(name, None), x) for name, x in asked.items()):
            raise ValueError("the saved state is one of other questions")
        types = lambda arrays: {name: (x.shape[1:], x.dtype) for name, x in arrays.items()}
        if types(expected) != types(saved):
            raise ValueError("the saved state is not one of these settings")
        leaves = [np.stack(self._padded(list(saved[name]))) for name in expected]
        saved = parallel.place(jax.tree.unflatten(structure, leaves), self.mesh, batched=True)
        zeros = jnp.zeros(self.batch_size)
        saved = [(saved, zeros, zeros)] if is_one else saved
        particles = [Particle(state, own, *numbers) for (state, *numbers), own in zip(saved, keys, strict=False)]
        return Batch(part.items, part.step, prompt, hyper, tuple(particles))

    def _abstract_state(self, hyper: state_lib.Hyperparameters) -> state_lib.InversionState:
        latents = jax.ShapeDtypeStruct((self.batch_size, *self.plan.latent), jnp.float32)
        losses = jax.ShapeDtypeStruct((self.batch_size, len(held_out.LOSSES)), jnp.float32) if self.held_out else None
        latents, losses = parallel.place((latents, losses), self.mesh, batched=True)
        return jax.eval_shape(self._programs("init"), self.networks, latents, losses, hyper)

    def halved(self) -> "Inverter | None":
        """The same with half as many items at once; None where it is one already."""
        return None if self.settings.batch_size == 1 else self.at_once(self.settings.batch_size // 2)

    def at_once(self, size: int) -> "Inverter":
        """The same with `size` items at once on each device."""
        other = copy.copy(self)
        other.settings = dataclasses.replace(self.settings, batch_size=size)
        other.batch_size = size * self.groups
        other.compiled, other._programs = False, compiled.Programs(self.plan, self.mesh)
        return other

    def advance(self, batch: Batch) -> tuple[Batch, dict[str, np.ndarray]]:
        """One chunk of iterations, at most to the next selection. Donates the batch: go on with the result.

        Returns:
            The batch, which is at its last step where no item moves any more, and the metrics of
            each iteration, `[item, iteration]`; of the first particle, where there are several.
        """
        count = min(self.chunk, self.steps - batch.step, particles_lib.until_selection(self.settings, batch.step))
        moved = [self._iterate(batch, particle, count) for particle in batch.particles]
        self.compiled = True
        items, particles = len(batch.items), tuple(particle for particle, _ in moved)
        over = [np.asarray(inversion.is_over(particle.state, self.plan))[:items].all() for particle in particles]
        step = self.steps if all(over) else batch.step + count
        batch = dataclasses.replace(batch, step=step, particles=particles)
        if particles_lib.is_selected(self.settings, step):
            values = self._values(batch, [particle.state.latents for particle in particles])
            chosen = particles_lib.select(
                self.settings, particles, values, step, self._take, self._programs("resampled")
            )
            batch = dataclasses.replace(batch, particles=chosen)
        return batch, moved[0][1]

    def _values(self, batch: Batch, latents: Sequence[Array]) -> list[Array]:
        """How well the referees that choose like what each of several latents looks like, `[item]` each."""
        return [-self._judge(batch.prompt, batch.hyper, x)[:, CHOICE] for x in latents]

    def _iterate(self, batch: Batch, particle: Particle, count: int) -> tuple[Particle, dict[str, np.ndarray]]:
        """`count` iterations of one particle, and their metrics `[item, iteration]`."""
        state, rows, is_swept = particle.state, [], self._is_swept(batch)
        # The loop and the referees' phase are the host's: within a loop or a branch XLA:CPU works at less than half its
        # speed. Nothing is waited for: an iteration's metrics are copied to the host while the next ones run.
        steps = range(batch.step, batch.step + count)
        for i, active in zip(steps, self._active(batch.hyper, steps), strict=True):
            step = self._programs("step", is_swept, referees_active=active)
            state, metrics = step(self.networks, batch.prompt, batch.hyper, state, particle.keys, jnp.int32(i))
            if self.held_out:
                loss = np.full(self.batch_size, np.nan, np.float32)
                if (i + 1) % self.plan.evaluate_every == 0:
                    losses = self._judge(batch.prompt, batch.hyper, state.latents)
                    state, loss = self._programs("record_evaluation")(state, losses)
                metrics["held_out/loss"] = loss
            rows.append(metrics)
            for value in metrics.values():
                if isinstance(value, Array):
                    value.copy_to_host_async()
        items = len(batch.items)
        metrics = {name: np.stack([np.asarray(row[name])[:items] for row in rows], axis=1) for name in rows[0]}
        return particle._replace(state=state), metrics

    def _active(self, hyper: state_lib.Hyperparameters, steps: range) -> list[bool]:
        """Whether the referees move anything in each of these iterations."""
        referee = jax.tree.map(np.asarray, hyper.referee)
        return [self.is_optimised and bool(np.any(referee.is_active(i))) for i in steps]

    def shapes(self) -> Batch:
        """An abstract batch, for `trace`."""
        item = Item("any", 0)
        tokens = jax.tree.map(lambda x: np.stack([x] * self.batch_size), self.texts.tokens(item.prompt))
        place = functools.partial(parallel.place, mesh=self.mesh)
        encoder = place(jax.eval_shape(lambda: self.text_encoder), batched=False)
        prompt = place(jax.eval_shape(self._encode, self.networks, encoder, tokens), batched=True)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch_size))
        keys, hyper = place(keys, batched=True), place(jax.eval_shape(lambda: self.hyper), batched=False)
        state = place(self._abstract_state(hyper), batched=True)
        numbers = jax.ShapeDtypeStruct((self.batch_size,), jnp.float32)
        return Batch((item,) * self.batch_size, 0, prompt, hyper, (Particle(state, keys, numbers, numbers),))

    def trace(self, batch: Batch, name: str = "step", *, active: bool = True) -> jax.stages.Traced:
        """A program before it is compiled: "step" with its referees or without, "denoise", "judge" or "finish".

        JAX keeps it, so that it is not traced again where it is called.
        """
        static = {
            "step": {"referees_active": active},
            "denoise": {"is_guided": self.settings.init_guidance != 1},
            "judge": {},
            "finish": {"output": self.settings.output},
        }[name]
        is_swept = name != "denoise" and self._is_swept(batch)
        return self._programs.trace(name, is_swept, self._arguments(name, batch), **static)

    def _arguments(self, name: str, batch: Batch) -> tuple:
        """What a program is called with for a batch."""
        if name == "denoise":
            number, t = np.float32(1), self._timesteps(1)[0]
            return self.networks, batch.prompt, batch.state.latents, number, t, t, number
        shared = self.networks, batch.prompt, batch.hyper
        own = {
            "step": (batch.state, batch.keys, np.int32(0)),
            "judge": (batch.state.latents,),
            "finish": (batch.state,),
        }
        return *shared, *own[name]

    def ahead(self) -> contextlib.AbstractContextManager:
        """Compiles what the first batch needs in threads, while its samples are made.

        Not on GPUs, whose compiler measures kernels, and would measure them beside the samples.
        """
        if self.compiled or self.mesh.devices.flat[0].platform == "gpu":
            return contextlib.nullcontext()
        batch, phases = self.shapes(), dict.fromkeys(self._active(self.hyper, range(self.steps)))
        wanted: list[tuple[str, dict[str, Any]]] = [("judge", {})] if self.is_judged else []
        wanted.append(("finish", {"output": self.settings.output}))  # as the first look
        wanted += [("step", {"referees_active": x}) for x in phases]
        return self._programs.ahead([(name, static, self._arguments(name, batch)) for name, static in wanted])

    def preview(self, batch: Batch) -> np.ndarray:
        """The current images, uint8 `[item, H, W, 3]`."""
        images = np.asarray(self._outputs(batch)[2])[: len(batch.items)]
        return np.round(images * 255).astype(np.uint8)  # not by JAX, which would compile it

    def _outputs(self, batch: Batch) -> tuple[Array, Array, Array, dict[str, Array]]:
        """Chosen latents as they are moved, clean latents, images and scores."""
        program = self._programs("finish", self._is_swept(batch), output=self.settings.output)
        return program(self.networks, batch.prompt, batch.hyper, batch.state)

    def finish(self, batch: Batch) -> list[Picture]:
        """The chosen output of each item, of its best particle, decoded and scored by all referees."""
        if len(batch.particles) > 1:
            program, states = self._programs("output", output=self.settings.output), [p.state for p in batch.particles]
            values = self._values(batch, [program(state) for state in states])
            (state,) = particles_lib.ranked(self._take, states, values, 1)
            batch = dataclasses.replace(batch, particles=(batch.particles[0]._replace(state=state),))
        outputs = self._outputs(batch)
        first = last = None
        if self.held_out:
            first, last = batch.state.held_out.first, self._judge(batch.prompt, batch.hyper, outputs[0])
        arrays = jax.tree.map(np.asarray, (*outputs, batch.state.frozen, first, last))
        _, latents, images, scores, frozen, first, last = arrays
        pictures = []
        for n, item in enumerate(batch.items):
            item_scores = {name: float(value[n]) for name, value in scores.items()}
            losses = None
            if self.held_out:
                pairs = zip(held_out.LOSSES, first[n], last[n], strict=True)
                losses = {name: (float(start), float(end)) for name, start, end in pairs if name in self.losses}
            status = "nonfinite" if frozen[n] else "done"
            asked = self.texts.answered(item.prompt, item_scores)
            pictures.append(Picture(item, images[n], item_scores, latents[n], status, losses, asked))
        return pictures

    def __call__(self, texts: Sequence[str], *, samples: int = 1, seed: int = 0) -> Result:
        """All of `texts` x `samples`, batch by batch. ValueError for a prompt that cannot be used, and for none."""
        for text in texts:
            if reason := self.check(text):
                raise ValueError(f"prompt {text[:80]!r}: {reason}")
        items = _some(texts, samples)
        pictures, histories = [], []
        for part in items_lib.batches(items, self.batch_size):
            batch, history = self.begin(part, seed), []
            while batch.step < self.steps:
                batch, metrics = self.advance(batch)
                history.append(metrics)
            histories.append({name: self._whole([h[name] for h in history]) for name in history[0]})
            pictures += self.finish(batch)
        return Result.of(pictures, {name: np.concatenate([h[name] for h in histories]) for name in histories[0]})

    def _whole(self, chunks: list[np.ndarray]) -> np.ndarray:
        """`[item, steps]` of a metric's chunks; NaN after all items have stopped."""
        values = np.concatenate(chunks, axis=1)
        return np.pad(values, ((0, 0), (0, self.steps - values.shape[1])), constant_values=np.nan)

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
        """The baseline: DDIM samples of the prior, for the same items and from the same noise.

        Args:
            texts: prompts.
            samples: images of each prompt.
            seed: of the noise.
            steps: of DDIM.
            guidance: of classifier-free guidance.
            candidates: samples of which the referees choose the one with the lowest loss.

        Returns:
            All results, without a history.
        """
        pictures, start, engine = [], Start("sample", steps, guidance, candidates), self
        if self.plan.method != "sds" or self.settings.particles > 1:  # whose latents are not those of a sample
            engine = copy.copy(self)
            engine.settings = dataclasses.replace(self.settings, particles=1)
            engine.plan = self.plan.replace(method="sds")
            engine._programs = compiled.Programs(engine.plan, self.mesh)
        for part in items_lib.batches(_some(texts, samples), self.batch_size):
            pictures += engine.finish(engine._initial_batch(part, seed, start))
        return Result.of(pictures, {})

    def _is_swept(self, batch: Batch) -> bool:
        return jax.tree.leaves(batch.hyper)[0].ndim > 0
