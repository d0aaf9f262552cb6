from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

from jaxeco import axes
from jaxeco.data.image import Crop, Cutout, Flip, Normalize, augmented

AUGMENTATIONS = [Flip(), Crop(3, "reflect"), Cutout(3)]


def images(count, height=6, width=5, channels=3, dtype=np.float32):
    # Distinct numbers from 1 on, so that a pixel tells where it comes from and is never the fill.
    x = np.arange(1, 1 + count * height * width * channels).reshape(count, height, width, channels)
    return x.astype(dtype)


def keys(count):
    return jax.jit(axes.example_keys, static_argnums=1)(jax.random.key(0), count)


def applied(transform, x):
    return np.asarray(jax.jit(transform)(keys(len(x)), {"x": jnp.asarray(x)})["x"])


def test_normalize_by_hand():
    x = np.array([0, 51, 102, 255, 204, 153], np.uint8).reshape(1, 1, 2, 3)
    out = Normalize(mean=(0.2, 0.4, 0.6), sd=(0.5, 0.1, 2.0))({"x": jnp.asarray(x), "y": 3})
    # intensities 0, 0.2, 0.4 | 1, 0.8, 0.6
    expected = [[[[-0.4, -2.0, -0.1], [1.6, 4.0, 0.0]]]]
    np.testing.assert_allclose(out["x"], expected, atol=1e-6)
    assert out["x"].dtype == jnp.float32 and out["y"] == 3


def test_normalize_one_number_for_all_channels_and_another_white():
    x = np.array([0, 4, 8, 16], np.uint8).reshape(1, 2, 2, 1).repeat(2, axis=-1)
    out = Normalize(mean=(0.5,), sd=(0.25,), white=16)({"x": jnp.asarray(x)})["x"]
    np.testing.assert_array_equal(out[0, ..., 1], [[-2, -1], [0, 2]])


def test_flip_is_a_mirror_and_half_of_them_are_flipped():
    x = images(2000, 2, 3, 1)
    out = applied(Flip(), x)
    flipped = (out == x[:, :, ::-1]).all((1, 2, 3))
    kept = (out == x).all((1, 2, 3))
    assert (flipped ^ kept).all()
    assert stats.binomtest(int(flipped.sum()), 2000).pvalue > 1e-3


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_crop_is_a_slice_of_the_padded_image_and_all_places_are_equally_likely(mode, dtype):
    pad, count, height, width = 2, 1500, 6, 5
    x = np.tile(images(1, height, width, 2, dtype), (count, 1, 1, 1))
    out = applied(Crop(pad, mode), x)
    padded = np.pad(
        x[0], ((pad, pad), (pad, pad), (0, 0)), "constant" if mode == "zero" else "reflect"
    )
    places = {
        padded[i : i + height, j : j + width].tobytes(): (i, j)
        for i in range(2 * pad + 1)
        for j in range(2 * pad + 1)
    }
    assert len(places) == 25
    counts = np.zeros((5, 5))
    for image in out:
        counts[places[image.tobytes()]] += 1  # a KeyError: not a slice at all
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_crop_keeps_each_example_its_own():
    out = applied(Crop(1), images(50, 4, 4, 1))
    owners = [set((image[image > 0] - 1).astype(int) // 16) for image in out]
    assert owners == [{i} for i in range(50)]


@pytest.mark.parametrize(("size", "height", "width"), [(1, 3, 4), (2, 5, 4), (3, 6, 5), (8, 4, 5)])
def test_cutout_is_a_clipped_square_around_a_uniform_centre(size, height, width):
    count = 1200
    x = np.tile(images(1, height, width, 2), (count, 1, 1, 1))
    expected = {}
    for row in range(height):
        for column in range(width):
            image = x[0].copy()
            top, left = row - size // 2, column - size // 2
            image[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
            expected[image.tobytes()] = expected.get(image.tobytes(), 0) + 1 / (height * width)
    counts = dict.fromkeys(expected, 0)
    for image in applied(Cutout(size), x):
        counts[image.tobytes()] += 1
    if len(counts) > 1:
        frequencies = np.array(list(expected.values())) * count
        assert stats.chisquare(list(counts.values()), frequencies).pvalue > 1e-3


@pytest.mark.parametrize("transform", AUGMENTATIONS, ids=str)
def test_jit_equals_eager_and_only_x_is_touched(transform):
    batch = {"x": jnp.asarray(images(16)), "y": jnp.arange(16), "mask": jnp.ones(16)}
    eager = transform(keys(16), batch)
    compiled = jax.jit(transform)(keys(16), batch)
    assert eager["x"].dtype == batch["x"].dtype and eager["x"].shape == batch["x"].shape
    assert (eager["x"] != batch["x"]).any()
    assert eager["y"] is batch["y"] and eager["mask"] is batch["mask"]
    np.testing.assert_array_equal(eager["x"], compiled["x"])


@pytest.mark.parametrize("transform", AUGMENTATIONS, ids=str)
def test_an_example_does_not_depend_on_its_neighbours(transform):
    x = images(12)
    crowd = x.copy()
    crowd[np.arange(12) != 5] = 7
    np.testing.assert_array_equal(applied(transform, crowd)[5], applied(transform, x)[5])


def test_normalize_jit_equals_eager():
    normalize = Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    batch = {"x": jnp.asarray(images(4, dtype=np.uint8))}
    np.testing.assert_allclose(jax.jit(normalize)(batch)["x"], normalize(batch)["x"], atol=1e-6)


def augment(x_BxHxWxC):
    keys_B = axes.example_keys(jax.random.key(3), len(x_BxHxWxC))
    return augmented(AUGMENTATIONS, keys_B, {"x": x_BxHxWxC})["x"]


def test_eight_devices_equal_one():
    x = jnp.asarray(images(24))
    single = np.asarray(jax.jit(augment)(x))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(augment, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    np.testing.assert_array_equal(mapped(x), single)
    sharding = NamedSharding(mesh, P("data"))
    sharded = jax.jit(augment, out_shardings=sharding)
    x = jax.device_put(x, sharding)
    np.testing.assert_array_equal(sharded(x), single)
    program = sharded.lower(x).compile().as_text()
    assert "all-gather" not in program and "all-reduce" not in program


def test_one_key_gives_two_transforms_draws_of_their_own():
    x = jnp.asarray(images(200, 4, 4, 1))
    once = applied(partial(augmented, [Flip()]), x)
    twice = applied(partial(augmented, [Flip(), Flip()]), x)
    # The same draw twice would undo every flip.
    first, both = ((out != x).any((1, 2, 3)) for out in (once, twice))
    assert 0.3 < first.mean() < 0.7 and 0.3 < both.mean() < 0.7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalize((0.5,), (0.5, 0.5)), "1 means and 2 sds"),
        (lambda: Normalize((), ()), "0 means"),
        (lambda: Normalize((0.5,), (0.0,)), "sd: got 0.0, expected positive"),
        (lambda: Normalize((float("nan"),), (1.0,)), "mean.*finite"),
        (lambda: Normalize((0.5,), (0.5,), white=-1), "white: got -1"),
        (lambda: Crop(0), "pad: got 0"),
        (lambda: Crop(2, "wrap"), 'mode: got "wrap", expected "zero" or "reflect"'),
        (lambda: Cutout(0), "size: got 0"),
        (lambda: applied(Crop(5), images(2)), "got 5, expected less than.*6x5"),
        (lambda: applied(Flip(), np.zeros((3, 4))), r"shape \(3, 4\), expected images"),
        (lambda: Normalize((0.0,) * 2, (1.0,) * 2)({"x": images(1)}), "got 2 means.*3 channels"),
    ],
)
def test_errors_say_what_was_got_and_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
