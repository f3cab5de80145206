"""Augmentations, one by one and chained, against torch and kornia at equal parameters: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.method import augmentations, views
from tests.conftest import VIEW_SIZE as SIZE
from tests.conftest import picture
from tests.lazy import functional, kornia, torch

TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


# Compiled as a whole: operation by operation they are hundreds of programs.
sample = jax.jit(views.sample, static_argnames=("names", "count", "size", "shared_erase"))
apply = jax.jit(views.apply, static_argnames=("names", "size", "dense"))


def to_torch(image):
    """float64 `[1, C, H, W]`: the oracle's own rounding is out of the comparison."""
    return torch.from_numpy(np.asarray(image, np.float64)).permute(2, 0, 1)[None]


def from_torch(image):
    return image[0].permute(1, 2, 0).detach().numpy()


def numbers(*values):
    """A float64 tensor with an axis of batch."""
    return torch.as_tensor(np.asarray(values, np.float64))[None]


def compare(ours, theirs, image, *, tolerance=TOLERANCE, moved=0.05):
    """Values and the pullback of one random cotangent; `moved` is the least mean change by the oracle."""
    inputs = to_torch(image).requires_grad_()
    expected = theirs(inputs)
    cotangent = np.random.default_rng(7).normal(size=from_torch(expected).shape).astype(np.float32)
    (gradient,) = torch.autograd.grad((expected * to_torch(cotangent)).sum(), inputs)
    expected, gradient = from_torch(expected), from_torch(gradient)

    @jax.jit
    def run(image, cotangent):
        value, pullback = jax.vjp(ours, image)
        return value, pullback(cotangent)[0]

    value, ours_gradient = run(image, cotangent)
    if expected.shape == image.shape:
        assert np.abs(expected - image).mean() > moved
    error = np.abs(np.asarray(value) - expected).max()
    relative = np.linalg.norm(np.asarray(ours_gradient) - gradient) / np.linalg.norm(gradient)
    print(f"max error {error:.1e}, gradient {relative:.1e}")
    assert error <= tolerance
    assert relative <= GRADIENT_TOLERANCE


def augmented(name, *, dense=False, **params):
    """One augmentation of the table at given parameters, as a function of a view."""
    warp = augmentations.dense_warp if dense else augmentations.gather_warp
    params = {leaf: jnp.asarray(value, jnp.int32 if leaf == "order" else jnp.float32) for leaf, value in params.items()}
    return lambda view: augmentations.AUGMENTATIONS[name].apply(view, params, warp)


def many(name, settings, count):
    """Parameters of one augmentation for many views of 224 pixels, without their noise."""
    row = augmentations.AUGMENTATIONS[name]
    uniforms = jax.random.uniform(jax.random.key(3), (count, row.draws))
    return jax.jit(jax.vmap(lambda u: row.sample(u, settings, 224)))(uniforms)


def drawn(name, seed, size=SIZE, **changes):
    """Parameters as `sample` draws them for one view."""
    params = sample(jax.random.key(seed), views.Settings(**changes), names=(name,), count=1, size=size)
    return {leaf: value[0] for leaf, value in params[name].items()}


def affine(image, matrix):
    return kornia.geometry.transform.warp_affine(image, matrix, image.shape[-2:], align_corners=False)


@pytest.fixture(params=[False, True], ids=["gathered", "dense"])
def dense(request):
    """Pixels gathered, and as products of matrices, which suits TPUs."""
    return request.param


@pytest.mark.parametrize(("height", "width"), [(96, 40), (81, 97), (40, 96), (512 // 7, 224 // 3)])
def test_pool_is_torchs_adaptive_pooling(height, width, dense):
    def theirs(image):
        return (functional.adaptive_avg_pool2d(image, SIZE) + functional.adaptive_max_pool2d(image, SIZE)) / 2

    compare(lambda x: views.pool(x, SIZE, dense=dense), theirs, picture(height=height, width=width), tolerance=1e-6)


def test_pool_at_the_papers_size(dense):
    image = np.random.default_rng(0).uniform(size=(512, 512, 3)).astype(np.float32)
    pooled = views.pool(jnp.asarray(image), 224, dense=dense)
    inputs = to_torch(image)
    expected = (functional.adaptive_avg_pool2d(inputs, 224) + functional.adaptive_max_pool2d(inputs, 224)) / 2
    np.testing.assert_allclose(pooled, from_torch(expected), atol=1e-6)
    # The maximum brightens: 3 or 4 pixels a side of uniform noise have a mean near 1/2 and a maximum near 11/12.
    assert 0.65 < pooled.mean() < 0.75


def test_pool_of_the_same_size_is_the_identity():
    image = picture()
    np.testing.assert_array_equal(views.pool(jnp.asarray(image), SIZE), image)


def test_pool_enlarges_a_small_image_bilinearly():
    def theirs(image):
        return functional.interpolate(image, (SIZE, SIZE), mode="bilinear", align_corners=False)

    compare(lambda x: views.pool(x, SIZE), theirs, picture(height=SIZE)[:16, :16], tolerance=1e-6)


@pytest.mark.parametrize(("angle", "shift"), [(30.0, (0.0, 3.7)), (-17.3, (-2.2, 0.4)), (0.0, (0.0, -4.0))])
def test_affine(angle, shift, dense):
    def theirs(image):
        centre = numbers((SIZE - 1) / 2, (SIZE - 1) / 2)
        matrix = kornia.geometry.transform.get_affine_matrix2d(
            numbers(*shift), centre, numbers(1.0, 1.0), numbers(angle)[0]
        )
        return affine(image, matrix[:, :2])

    compare(augmented("Af", dense=dense, angle=angle, shift=shift), theirs, picture())


def test_affine_draws_stay_in_range_and_the_papers_never_move_sideways():
    params = many("Af", views.Settings(), count=400)
    angle, shift = np.asarray(params["angle"]), np.asarray(params["shift"])
    assert 28 < np.abs(angle).max() <= 30
    assert np.all(shift[:, 0] == 0)
    assert 21 < np.abs(shift[:, 1]).max() <= 22.4
    both = views.Settings(affine_translate=(0.1, 0.1))
    shift = np.asarray(many("Af", both, count=400)["shift"])
    assert 21 < np.abs(shift[:, 0]).max() <= 22.4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("distortion", [0.2, 0.6])
def test_perspective(seed, distortion, dense):
    corners = np.asarray(drawn("Pe", seed, perspective_distortion=distortion)["corners"])
    start = np.array([[0, 0], [SIZE - 1, 0], [SIZE - 1, SIZE - 1], [0, SIZE - 1]])
    # Corners move inward only, by at most half the distortion of the side.
    inward = (corners - start) * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    assert np.all((inward >= -1e-5) & (inward <= distortion * SIZE / 2 + 1e-5))

    def theirs(image):
        matrix = kornia.geometry.transform.get_perspective_transform(numbers(*start), numbers(*corners))
        return kornia.geometry.transform.warp_perspective(image, matrix, (SIZE, SIZE), align_corners=False)

    compare(augmented("Pe", dense=dense, corners=corners), theirs, picture())


JITTERS = (
    lambda image, p: kornia.enhance.adjust_brightness_accumulative(image, p["brightness"]),
    lambda image, p: kornia.enhance.adjust_contrast_with_mean_subtraction(image, p["contrast"]),
    lambda image, p: kornia.enhance.adjust_saturation_with_gray_subtraction(image, p["saturation"]),
    lambda image, p: kornia.enhance.adjust_hue(image, p["hue"] * 2 * np.pi),
)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1), (1, 0, 3, 2), (3, 0, 1, 2), (0, 2, 3, 1)])
def test_jitter_in_every_kind_of_order(order):
    params = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.4, "hue": 0.083}

    def theirs(image):
        for step in order:
            image = JITTERS[step](image, params)
        return image

    compare(augmented("Ji", order=order, **params), theirs, picture())


def test_jitter_order_matters():
    params = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.4, "hue": 0.083}
    image = jnp.asarray(picture())
    outputs = [augmented("Ji", order=order, **params)(image) for order in [(0, 1, 2, 3), (1, 2, 0, 3), (3, 1, 0, 2)]]
    assert all(abs(a - b).max() > 0.05 for a, b in zip(outputs, outputs[1:] + outputs[:1], strict=True))


@pytest.mark.parametrize("step", range(4))
def test_each_jitter_alone(step):
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    name = list(neutral)[step]
    params = neutral | {name: (1.2, 0.6, 0.6, -0.21)[step]}
    image = picture()
    compare(augmented("Ji", order=(0, 1, 2, 3), **params), lambda x: JITTERS[step](x, params), image, moved=0.02)


def test_jitter_clamps_and_cuts_the_gradient_of_what_it_clamps():
    params = {"brightness": 2.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "order": (0, 1, 2, 3)}
    view = jnp.full((4, 4, 3), 0.25).at[0].set(0.8)
    value, pullback = jax.vjp(augmented("Ji", **params), view)
    np.testing.assert_allclose(value[0], 1.0)
    np.testing.assert_allclose(value[1:], 0.5, atol=1e-6)
    gradient = pullback(jnp.ones_like(value))[0]
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_allclose(gradient[1:], 2, atol=1e-5)


def test_erasing():
    box = (5.0, 11.0, 20.0, 9.0)

    def theirs(image):
        params = dict(zip(("xs", "ys", "widths", "heights"), (numbers(b)[0] for b in box), strict=True))
        return kornia.augmentation.RandomErasing(p=1.0).apply_transform(
            image, params | {"values": torch.zeros(1)}, {}, None
        )

    compare(augmented("Er", box=box), theirs, picture())


def test_erasing_draws_the_papers_rectangles():
    params = many("Er", views.Settings(), count=2000)
    left, top, width, height = np.asarray(params["box"]).T
    assert np.all((left >= 0) & (top >= 0) & (left + width <= 224) & (top + height <= 224))
    assert np.all(np.asarray(params["box"]) == np.round(params["box"]))
    inside = (width < 224) & (height < 224)
    area, ratio = (width * height / 224**2)[inside], (height / width)[inside]
    assert 0.098 < area.min() < 0.105 and 0.39 < area.max() < 0.403
    assert 0.29 < ratio.min() < 0.33 and 3.1 < ratio.max() < 3.4
    # A coin decides between lying and standing rectangles.
    assert 0.45 < (height < width).mean() < 0.55


def test_flip():
    compare(augmented("Hf"), lambda image: image.flip(-1), picture(), tolerance=0)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.8])
def test_sharpness(factor):
    # Off the ends of the range, where rounding would decide what the clamps let through.
    image = 0.05 + 0.9 * picture()
    compare(augmented("Sh", factor=factor), lambda x: kornia.enhance.sharpness(x, factor), image)


def test_gaussian():
    noise = np.random.default_rng(1).normal(size=(SIZE, SIZE, 3)) * 0.2
    compare(augmented("Gn", noise=noise.astype(np.float32)), lambda image: image + to_torch(noise), picture())
    params = sample(jax.random.key(0), views.Settings(gaussian=0.3), names=("Gn",), count=20, size=SIZE)
    assert 0.29 < params["Gn"]["noise"].std() < 0.31


def test_rotation(dense):
    def theirs(image):
        return kornia.geometry.transform.rotate(image, numbers(21.0)[0], align_corners=False)

    compare(augmented("Ro", dense=dense, angle=21.0), theirs, picture())


@pytest.mark.parametrize(("sigma", "alpha"), [(32.0, 4.0), (6.0, 0.7)])
def test_elastic(sigma, alpha, dense):
    noise = np.random.default_rng(2).uniform(-1, 1, size=(SIZE, SIZE, 2)).astype(np.float32)
    shift = augmentations.elastic_shift(noise, sigma=sigma, alpha=alpha)
    assert abs(shift).max() > 0.5  # pixels

    def theirs(image):
        return kornia.geometry.transform.elastic_transform2d(
            image, to_torch(noise), sigma=(sigma, sigma), alpha=(alpha, alpha), align_corners=False
        )

    compare(augmented("Et", dense=dense, shift=shift), theirs, picture(), tolerance=1e-3 if alpha > 1 else TOLERANCE)


def test_spline(dense):
    points = np.asarray(drawn("Ts", 5)["points"])
    start = numbers([-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [0.0, 0.0])
    assert 0.1 < np.abs(points - start[0].numpy()).max() <= 0.2

    def theirs(image):
        kernel, linear = kornia.geometry.transform.get_tps_transform(numbers(*points), start)
        return kornia.geometry.transform.warp_image_tps(image, start, kernel, linear, align_corners=False)

    compare(augmented("Ts", dense=dense, points=points), theirs, picture())


@pytest.mark.parametrize("offset", [(3, -4), (0, 4), (-4, -1)])
def test_crop_is_pad_and_cut(offset, dense):
    def theirs(image):
        padded = functional.pad(image, (4, 4, 4, 4))
        return padded[..., 4 + offset[1] : 4 + offset[1] + SIZE, 4 + offset[0] : 4 + offset[0] + SIZE]

    compare(augmented("Cr", dense=dense, offset=np.array(offset, np.float32)), theirs, picture(), tolerance=0)
    drawn_offsets = sample(jax.random.key(0), views.Settings(), names=("Cr",), count=300, size=SIZE)["Cr"]["offset"]
    assert set(np.unique(drawn_offsets)) == set(range(-4, 5))


@pytest.mark.parametrize("box", [(3.0, 7.0, 20.0, 31.0), (0.0, 0.0, 12.0, 12.0)])
def test_resized_crop(box, dense):
    left, top, width, height = box
    right, bottom = left + width - 1, top + height - 1

    def theirs(image):
        crop = kornia.augmentation.RandomResizedCrop((SIZE, SIZE), align_corners=True, cropping_mode="slice")
        corners = numbers([left, top], [right, top], [right, bottom], [left, bottom])
        return crop.apply_transform(image, {"src": corners}, crop.flags, None)

    compare(augmented("Re", dense=dense, box=box), theirs, picture())


def test_resized_crop_draws_inside_the_view():
    params = sample(jax.random.key(3), views.Settings(), names=("Re",), count=1000, size=64)["Re"]
    left, top, width, height = np.asarray(params["box"]).T
    assert np.all((left >= 0) & (top >= 0) & (left + width <= 64) & (top + height <= 64))
    area = width * height / 64**2
    assert area.min() < 0.13 and area.max() > 0.9
    assert 0.7 < (width / height).min() < 0.8


def test_a_chain_is_kornias_chain(dense):
    """The paper's default chain of one view, pooled, with noise, at drawn parameters."""
    image = picture(height=90, width=96)
    names = ("Af", "Pe", "Ji", "Er")
    certain = views.Settings(perspective_p=1.0, jitter_p=1.0)
    params = sample(jax.random.key(11), certain, names=names, count=3, size=SIZE, shared_erase=True)
    values = apply(jnp.asarray(image), params, size=SIZE, names=names, dense=dense)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    start = numbers([0, 0], [SIZE - 1, 0], [SIZE - 1, SIZE - 1], [0, SIZE - 1])
    centre = numbers((SIZE - 1) / 2, (SIZE - 1) / 2)
    for i in range(3):
        x = to_torch(image)
        x = (functional.adaptive_avg_pool2d(x, SIZE) + functional.adaptive_max_pool2d(x, SIZE)) / 2
        angle, shift = numbers(p["Af"]["angle"][i])[0], numbers(*p["Af"]["shift"][i])
        x = affine(x, kornia.geometry.transform.get_affine_matrix2d(shift, centre, numbers(1.0, 1.0), angle)[:, :2])
        matrix = kornia.geometry.transform.get_perspective_transform(start, numbers(*p["Pe"]["corners"][i]))
        x = kornia.geometry.transform.warp_perspective(x, matrix, (SIZE, SIZE), align_corners=False)
        for step in params["Ji"]["order"][i]:
            factors = {name: float(value[i]) for name, value in p["Ji"].items() if name != "order"}
            x = JITTERS[int(step)](x, factors)
        left, top, width, height = p["Er"]["box"][0].astype(int)
        x[..., top : top + height, left : left + width] = 0
        expected = from_torch(x) + p["noise"][i]
        np.testing.assert_allclose(values[i], expected, atol=TOLERANCE)
        assert np.abs(expected).max() > 0.8
