"""Layers, against values by hand, loops of numpy in float64, and themselves on one device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxeco.models.layers import Activation, BatchNorm, Conv, Dropout, activate, max_pool

DEVICES = 8


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def by_jit(f, x):
    """Runs f(shard) -> per-example output with the batch sharded under jit, and likewise below."""
    sharding = NamedSharding(mesh(), P("data"))
    return jax.jit(f, in_shardings=sharding)(jax.device_put(x, sharding))


def by_shard_map(f, x):
    split = {"mesh": mesh(), "in_specs": P("data"), "out_specs": P("data")}
    return jax.jit(jax.shard_map(f, **split, check_vma=False))(x)


def by_pmap(f, x):
    y = jax.pmap(f, axis_name="data")(x.reshape(DEVICES, -1, *x.shape[1:]))
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), y)


WAYS = pytest.mark.parametrize("way", [by_jit, by_shard_map, by_pmap])


# Activations


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [
        ("relu", [-2.0, 0.0, 3.0], [0.0, 0.0, 3.0]),
        ("sigmoid", [0.0, np.log(3)], [0.5, 0.75]),
        ("tanh", [0.0, np.log(2)], [0.0, 0.6]),
        # x Φ(x), from a table of the normal distribution; the tanh formula gives 0.841192.
        ("gelu", [1.0, -2.0], [0.8413447, -2 * 0.0227501]),
    ],
)
def test_activation(name, x, y):
    np.testing.assert_allclose(activate(name, jnp.asarray(x)), y, rtol=1e-5, atol=1e-7)


def test_activation_typo():
    with pytest.raises(ValueError, match=r"'rleu', expected one of relu, .*did you mean 'relu'\?"):
        activate("rleu", jnp.ones(1))


def test_every_activation_is_there():
    for name in Activation.__args__:
        assert activate(name, jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


# Conv


def convolve(x, k, dy, stride, padding):
    """The convolution of x by k, and the gradients of sum(y * dy), as float64 loops."""
    x, k, dy = (np.asarray(a, np.float64) for a in (x, k, dy))
    size = k.shape[0]
    pads = []
    for side in x.shape[1:3]:
        missing = max((-(-side // stride) - 1) * stride + size - side, 0)
        same = (missing // 2, missing - missing // 2)
        pads.append({"SAME": same, "VALID": (0, 0)}[padding] if padding != 1 else (1, 1))
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = ((side - size) // stride + 1 for side in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, k.shape[-1]))
    dx, dk = np.zeros_like(x), np.zeros_like(k)
    for r in range(rows):
        for c in range(columns):
            here = np.s_[:, r * stride : r * stride + size, c * stride : c * stride + size]
            y[:, r, c] = np.einsum("bijc,ijcf->bf", x[here], k)
            if dy.shape == y.shape:
                dk += np.einsum("bijc,bf->ijcf", x[here], dy[:, r, c])
                dx[here] += np.einsum("bf,ijcf->bijc", dy[:, r, c], k)
    (top, bottom), (left, right) = pads
    return y, dx[:, top : dx.shape[1] - bottom, left : dx.shape[2] - right], dk


@pytest.mark.parametrize("method", ["xla", "matmul"])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        (1, 1, "VALID"),
        (1, 2, "SAME"),
        (3, 1, "SAME"),
        (3, 2, "SAME"),
        (3, 2, "VALID"),
        (3, 2, 1),
        (5, 1, "VALID"),
        (5, 2, "SAME"),
        (5, 1, 1),
    ],
)
def test_conv_and_its_gradients(method, size, stride, padding):
    x, k = normal(0, 2, 7, 6, 3), normal(1, size, size, 3, 4)
    shape = convolve(x, k, np.zeros(()), stride, padding)[0].shape
    dy = normal(2, *shape)
    expected = convolve(x, k, dy, stride, padding)
    conv = Conv(4, (size, size), stride, padding, use_bias=False, method=method)

    @jax.jit
    def actual(x, k):
        y, pull = jax.vjp(lambda x, k: conv.apply({"params": {"kernel": k}}, x), x, k)
        return y, *pull(dy)

    for a, e in zip(actual(x, k), expected, strict=True):
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("method", ["xla", "matmul"])
def test_conv_of_many_models_at_once(method):
    conv = Conv(4, (3, 3), method=method)
    x, k, b = normal(0, 2, 5, 5, 3), normal(1, 3, 3, 3, 3, 4), normal(2, 3, 4)
    y = jax.vmap(conv.apply, in_axes=(0, None))({"params": {"kernel": k, "bias": b}}, x)
    for model in range(3):
        expected = convolve(x, k[model], np.zeros(()), 1, "SAME")[0] + b[model]
        np.testing.assert_allclose(y[model], expected, rtol=1e-5, atol=2e-5)


def test_conv_has_the_parameters_of_flax():
    x = normal(0, 2, 5, 4, 3)
    ours, theirs = Conv(4, (3, 2)), nn.Conv(4, (3, 2))
    variables = theirs.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, ours.init(jax.random.key(0), x))
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "channels", "calls_xla"),
    [("xla", 3, True), ("matmul", 16, False), ("auto", 3, False), ("auto", 16, True)],
)
def test_conv_method(method, channels, calls_xla):
    x = normal(0, 1, 4, 4, channels)
    conv = Conv(2, (3, 3), method=method)
    variables = conv.init(jax.random.key(0), x)
    assert ("conv_general_dilated" in str(jax.make_jaxpr(conv.apply)(variables, x))) == calls_xla


@pytest.mark.parametrize("method", ["xla", "matmul"])
def test_conv_stays_in_bfloat16(method):
    conv = Conv(2, (3, 3), method=method)
    x = normal(0, 1, 4, 4, 3)
    variables = conv.init(jax.random.key(0), x)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (variables, jnp.asarray(x)))
    y = conv.apply(*half)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), conv.apply(variables, x), atol=0.05)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("features", 0),
        ("kernel_size", (3, 0)),
        ("stride", 1.5),
        ("padding", "SMAE"),
        ("padding", -1),
        ("method", "im2col"),
    ],
)
def test_conv_refuses(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got "):
        Conv(**{"features": 1, "kernel_size": (3, 3), field: value})


@pytest.mark.parametrize("padding", ["VALID", 0])
def test_conv_kernel_larger_than_the_image(padding):
    with pytest.raises(ValueError, match="kernel of 5x5 does not fit an image of 4x7"):
        Conv(1, (5, 5), padding=padding).init(jax.random.key(0), jnp.zeros((1, 4, 7, 1)))


# Pooling


def test_max_pool_by_hand():
    x = jnp.asarray([[1, 2, 5, 0], [4, 3, 6, 7], [0, 0, -1, -2], [8, 0, -3, -4.0]])
    y = max_pool(x.reshape(1, 4, 4, 1), 2)
    np.testing.assert_array_equal(y[0, :, :, 0], [[4, 7], [8, -1]])


@pytest.mark.parametrize(("h", "w", "window"), [(4, 6, 2), (6, 3, 3), (5, 4, 2), (7, 7, 3)])
def test_max_pool_and_its_gradient(h, w, window):
    x = normal(0, 2, h, w, 3)
    dy = normal(1, 2, h // window, w // window, 3)
    y, pull = jax.vjp(lambda x: max_pool(x, window), x)
    dx = np.zeros_like(x)
    for r, c in np.ndindex(h // window, w // window):
        square = np.s_[:, r * window : (r + 1) * window, c * window : (c + 1) * window]
        top = x[square].max((1, 2))
        np.testing.assert_array_equal(y[:, r, c], top)
        dx[square] = (x[square] == top[:, None, None]) * dy[:, None, None, r, c]
    np.testing.assert_array_equal(pull(dy)[0], dx)


def test_max_pool_shares_the_gradient_of_a_tie():
    x = jnp.asarray([[3.0, 1], [0, 3]]).reshape(1, 2, 2, 1)
    dx = jax.grad(lambda x: max_pool(x, 2).sum())(x)
    np.testing.assert_array_equal(dx[0, :, :, 0], [[0.5, 0], [0, 0.5]])


def test_max_pool_refuses():
    with pytest.raises(ValueError, match="window of 3 does not fit an image of 4x2"):
        max_pool(jnp.zeros((1, 4, 2, 1)), 3)
    with pytest.raises(ValueError, match="window: got 0"):
        max_pool(jnp.zeros((1, 4, 2, 1)), 0)


# BatchNorm


def norm_of(x, momentum=0.9):
    """(output, running mean, running variance) after one step, in float64."""
    x = x.astype(np.float64)
    over = tuple(range(x.ndim - 1))
    mean, var = x.mean(over), x.var(over)
    y = (x - mean) / np.sqrt(var + 1e-5)
    return y, (1 - momentum) * mean, momentum + (1 - momentum) * var


def test_batch_norm_trains_on_the_batch_and_evaluates_on_the_running_averages():
    norm, x = BatchNorm(momentum=0.75), 3 * normal(0, 6, 2, 2, 3) + 1
    variables = norm.init(jax.random.key(0), x, train=False)
    y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    expected, mean, var = norm_of(x, 0.75)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], var, rtol=1e-5)
    y = norm.apply({**variables, **new}, x, train=False)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-5, atol=1e-6)


def test_batch_norm_parameters():
    x = normal(0, 4, 3)
    params = BatchNorm().init(jax.random.key(0), x, train=True)["params"]
    assert jax.tree.map(jnp.shape, params) == {"bias": (3,), "scale": (3,)}
    params = BatchNorm(use_scale=False).init(jax.random.key(0), x, train=True)["params"]
    assert jax.tree.map(jnp.shape, params) == {"bias": (3,)}


@WAYS
def test_batch_norm_sees_the_global_batch(way):
    # Shards that differ in their mean, so that statistics of one shard would be far off.
    x = normal(0, 16, 5) + np.arange(16)[:, None].astype(np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False)

    def step(x):
        y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, *(jnp.broadcast_to(new["batch_stats"][k], x.shape) for k in ("mean", "var"))

    for actual, expected in zip(way(step, x), norm_of(x), strict=True):
        np.testing.assert_allclose(actual, np.broadcast_to(expected, x.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [by_shard_map, by_pmap])
def test_batch_norm_gradients_summed_over_shards_are_those_of_the_whole_batch(way):
    x = normal(0, 16, 5) + np.arange(16)[:, None].astype(np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False)

    def loss(factor_C, x):
        y, _ = norm.apply(variables, x * factor_C, train=True, mutable=["batch_stats"])
        return (jnp.sin(y) * x).sum()

    factor_C = 1 + normal(1, 5) / 4
    expected = jax.grad(loss)(factor_C, x)

    def gradient(x):
        g_C = jax.lax.psum(jax.grad(loss)(factor_C, x), "data")
        return jnp.broadcast_to(g_C, x.shape)

    for actual in way(gradient, x):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_of_bfloat16_keeps_float32_statistics():
    # Averaged in bfloat16, 4096 values near 1 would lose every digit of their mean.
    x = jnp.asarray(1 + normal(0, 4096, 2) / 8, jnp.bfloat16)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False)
    y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    expected, mean, var = norm_of(np.asarray(x, np.float32))
    assert y.dtype == jnp.bfloat16
    assert new["batch_stats"]["mean"].dtype == jnp.float32
    np.testing.assert_allclose(new["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], var, rtol=1e-5)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)


def test_batch_norm_of_many_models_at_once():
    norm, x = BatchNorm(), normal(0, 3, 8, 2) * np.asarray([1, 2, 3], np.float32)[:, None, None]
    variables = norm.init(jax.random.key(0), x[0], train=False)
    y, new = jax.vmap(lambda x: norm.apply(variables, x, train=True, mutable=["batch_stats"]))(x)
    for model in range(3):
        expected, mean, _ = norm_of(x[model])
        np.testing.assert_allclose(y[model], expected, atol=1e-5)
        np.testing.assert_allclose(new["batch_stats"]["mean"][model], mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("field", "value"), [("momentum", 1.0), ("epsilon", 0.0)])
def test_batch_norm_refuses(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got "):
        BatchNorm(**{field: value})


# Dropout


def drop(x, rate=0.25, seed=0):
    return Dropout(rate).apply({}, x, train=True, rngs={"dropout": jax.random.key(seed)})


def test_dropout_is_inverted_and_drops_at_its_rate():
    y = np.asarray(drop(jnp.ones((100, 400))))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    # 40,000 draws: 5 standard errors are 0.011.
    assert abs((y == 0).mean() - 0.25) < 0.011
    assert len(np.unique(y, axis=0)) == 100  # each example has a mask of its own


@WAYS
def test_dropout_does_not_see_the_devices(way):
    x = jnp.ones((16, 3, 7))
    np.testing.assert_array_equal(way(drop, x), drop(x))


def test_dropout_of_an_example_does_not_depend_on_the_size_of_the_batch():
    np.testing.assert_array_equal(drop(jnp.ones((4, 9))), drop(jnp.ones((12, 9)))[:4])


def test_dropout_does_not_see_the_precision():
    x = jnp.ones((4, 50))
    with jax.enable_x64(True):
        double = np.asarray(drop(jnp.ones((4, 50), jnp.float64)))
    assert double.dtype == np.float64
    np.testing.assert_allclose(drop(x), double, rtol=1e-6)
    np.testing.assert_array_equal(drop(x.astype(jnp.bfloat16)) == 0, double == 0)


def test_dropout_depends_on_key_and_place():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dropout(0.5)(x, train=True), Dropout(0.5)(x, train=True)

    x = jnp.ones((4, 50))
    a, b = Two().apply({}, x, rngs={"dropout": jax.random.key(0)})
    c, _ = Two().apply({}, x, rngs={"dropout": jax.random.key(1)})
    assert (a != b).any() and (a != c).any()


def test_dropout_that_does_nothing_needs_no_key():
    x = normal(0, 4, 5)
    assert Dropout(0.5).apply({}, x, train=False) is x
    assert Dropout(0.0).apply({}, x, train=True) is x


def test_dropout_takes_a_traced_rate():
    x, rates = jnp.ones((8, 50)), jnp.asarray([0.0, 0.25, 0.5])
    y = jax.jit(jax.vmap(lambda rate: drop(x, rate)))(rates)
    for rate, one in zip([0.0, 0.25, 0.5], y, strict=True):
        np.testing.assert_allclose(one, drop(x, rate), rtol=1e-6)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_refuses(rate):
    with pytest.raises(ValueError, match=r"^rate: got .*, expected a number in \[0, 1\)$"):
        Dropout(rate)


# The compiler


def test_matvec_square_sum_is_compiled_rightly():
    """jax-ml/jax#39103: on CPU jaxlib 0.10.2 is wrong beyond 32,768 rows unless told otherwise.

    There YNN fuses the product with the sum; `runtime.configure` picks flags under which it does
    not.
    """
    x, matrix = normal(0, 33_000, 3), normal(1, 3, 3)
    compiled = jax.jit(lambda m, x: jax.vmap(lambda row: ((m @ row) ** 2).sum())(x))(matrix, x)
    expected = ((x.astype(np.float64) @ matrix.T) ** 2).sum(1)
    np.testing.assert_allclose(compiled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["xla", "matmul"])
def test_statistics_of_a_convolution_are_compiled_rightly(method):
    """The same chain of product, square and sum as a model has it, over 33,792 rows."""
    x, k = normal(0, 33, 32, 32, 3), normal(1, 1, 1, 3, 3)
    conv, norm = Conv(3, (1, 1), use_bias=False, method=method), BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False)

    @jax.jit
    def stats(x, k):
        y = conv.apply({"params": {"kernel": k}}, x)
        return norm.apply(variables, y, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    _, mean, var = norm_of(x.astype(np.float64) @ k[0, 0])
    actual = stats(x, k)
    np.testing.assert_allclose(actual["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(actual["var"], var, rtol=1e-5)
