"""One iteration of an engine's method under JAX's transformations, for real networks and for toys."""

import jax
import jax.numpy as jnp
import numpy as np

from referee_jax import items
from referee_jax.engine import inverter, parallel
from referee_jax.method import inversion
from tests.conftest import relative_l2


def check(engine: inverter.Inverter, prompts: list[str], tolerance: float) -> None:
    """Latents after jit, vmap, scan, shard_map and pmap are those of each item alone; as many items as devices."""
    networks, plan, hyper = engine.networks, engine.plan, engine.hyper
    mesh = parallel.prompt_mesh(jax.devices())
    batch = engine.begin(items.expand(prompts, 1), 3)
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
        assert relative_l2(latents, wanted) < tolerance, name
