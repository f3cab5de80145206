"""The rules that move starting noise, by their known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.method.ways import noise

SHAPE = (64, 64, 4)


def gaussian(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def spectrum(v):
    f = np.fft.rfft(v.ravel().astype(np.float64), norm="ortho")
    return np.abs(np.concatenate([(f[:1].real + 1j * f[-1:].real) / np.sqrt(2), f[1:-1]])).reshape(-1, noise.BLOCK)


@pytest.mark.parametrize("shape", [SHAPE, (8, 8, 4)])
def test_gaussian_like(shape):
    project, size = jax.jit(noise.gaussian_like), int(np.prod(shape))
    v = gaussian(shape=shape)
    made = np.asarray(project(v))
    y = spectrum(made)
    np.testing.assert_allclose(y.sum(1), np.sqrt(np.pi) / 2 * noise.BLOCK, rtol=1e-4)
    np.testing.assert_allclose(np.square(y).sum(1), noise.BLOCK, rtol=1e-4)
    assert np.square(made.astype(np.float64)).sum() == pytest.approx(size, rel=1e-6)
    np.testing.assert_allclose(project(made), made, atol=2e-5)
    cosine = (v * made).sum() / np.linalg.norm(v) / np.linalg.norm(made)
    assert 0.98 < cosine < 0.995
    if shape == SHAPE:
        assert 0.9893 - 5e-4 < cosine < 0.9898 + 5e-4


def test_it_whitens():
    """A smooth direction comes out as noise; zeros and ties are no numbers that are not finite."""
    wave = np.sin(np.linspace(0, 6, 16384)).astype(np.float32).reshape(SHAPE)
    made = np.asarray(jax.jit(noise.gaussian_like)(wave))
    assert abs((wave * made).sum() / np.linalg.norm(wave) / np.linalg.norm(made)) < 0.1
    for flat in (np.zeros(SHAPE, np.float32), np.eye(1, 16384, dtype=np.float32).reshape(SHAPE)):
        assert np.isfinite(jax.jit(noise.gaussian_like)(flat)).all()
    with pytest.raises(ValueError, match="48 elements are not a multiple of 32"):
        noise.gaussian_like(np.zeros((4, 4, 3)))


def test_the_norms_gradient():
    """That of minus the logarithm of the density of the length; none at the length that is likeliest."""
    n, d = gaussian(shape=(8, 8, 4)), 256
    k = lambda n: jnp.square(n).sum() / 2 - (d - 1) * jnp.log(jnp.linalg.norm(n))
    np.testing.assert_allclose(noise.norm_gradient(n), jax.grad(k)(n), rtol=1e-4, atol=1e-6)
    likeliest = n * np.sqrt((d - 1) / np.square(n).sum())
    assert np.abs(noise.norm_gradient(likeliest)).max() < 1e-5


def test_reno():
    """torch's SGD with Nesterov's momentum, on the clipped gradient."""
    hyper, n, b = noise.Hyper(lr=5.0, clip=0.1), jnp.asarray(gaussian(1)), jnp.zeros(SHAPE)
    wanted, momentum = np.array(n, np.float64), np.zeros(SHAPE)
    for step in range(3):
        slope = gaussian(2 + step)
        n, b = noise.RULES["reno"].move(hyper, n, slope, jnp.float32(1.0), b, None)
        g = slope + 0.01 * wanted * (1 - (wanted.size - 1) / np.square(wanted).sum())
        g *= min(1, 0.1 / np.linalg.norm(g))
        momentum = 0.9 * momentum + g
        wanted -= 5 * (g + 0.9 * momentum)
        np.testing.assert_allclose(n, wanted, rtol=1e-5, atol=1e-6)
    still, _ = noise.RULES["reno"].move(hyper.replace(norm_weight=0.0), n, 0 * n, jnp.float32(1), 0 * b, None)
    np.testing.assert_array_equal(still, n)


def test_sphere_and_gper_keep_the_length():
    hyper, n = noise.Hyper(lr=1.5, momentum=0.5, clip=0.03), jnp.asarray(gaussian(1))
    for name in ("sphere", "gper"):
        rule = noise.RULES[name]
        moved, _ = rule.move(hyper, n, gaussian(2), jnp.float32(1.0), rule.start(n), None)
        assert float(jnp.square(moved).sum()) == pytest.approx(n.size, rel=1e-5)
        assert float(jnp.linalg.norm(moved - n)) > 0.5


def test_langevin_has_the_stationary_law_of_the_tilted_prior():
    """In one dimension: N(0, 1) with R = -(x - 2)^2 / 2 at temperature 1 is N(1, 1/2)."""
    hyper, rule = noise.Hyper(gamma=0.02, eta=0.5), noise.RULES["langevin"]

    def step(n, key):
        loss = jnp.square(n - 2) / 2
        return rule.move(hyper, n, n - 2, loss, (), jax.random.normal(key, n.shape))[0], None

    keys = jax.random.split(jax.random.key(0), 3000)
    n, _ = jax.jit(lambda n: jax.lax.scan(step, n, keys))(jnp.zeros(20_000))
    assert float(n.mean()) == pytest.approx(0.998, abs=0.02) and float(n.var()) == pytest.approx(0.510, abs=0.02)
