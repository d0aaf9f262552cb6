"""Models: parameters counted by hand, shapes, initial variances, and what must not change them."""

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import models

# Small ones of each kind, with batch normalisation and dropout wherever they can have them.
SMALL = {
    "mlp": models.MLP((9, 8), classes=5, activation="gelu", dropout=0.5, batch_norm=True),
    "lenet": models.LeNet(classes=5),
    "cifar_resnet": models.CifarResNet(depth=8, classes=5, width=4),
    "resnet18": models.ResNet(18, classes=5, stem="cifar", width=2),
    "resnet50": models.ResNet(50, classes=5, stem="imagenet", width=2),
}
EVERY = pytest.mark.parametrize("name", SMALL)


@cache
def images():
    return np.random.default_rng(0).normal(size=(6, 20, 18, 3)).astype(np.float32)


@cache
def variables(name):
    init = jax.jit(lambda key, x: SMALL[name].init(key, x, train=False))
    start = init(jax.random.key(0), images())
    # Away from the special values they start from: offsets of 0, scales and variances of 1.
    leaves, tree = jax.tree.flatten(start)
    rng = np.random.default_rng(1)
    leaves = [leaf + 0.1 * rng.random(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, leaves)


@cache
def evaluate(name):
    return jax.jit(lambda variables, x: SMALL[name].apply(variables, x, train=False))


def train(name, variables, x):
    return SMALL[name].apply(
        variables,
        x,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(3)},
    )


def parameters(model, *shape):
    start = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, *shape)), train=False), jax.random.key(0)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(start["params"]))


# Sizes


def cifar_resnet_parameters(n, classes):
    """6n+2 layers: 3x3 convolutions without bias, two numbers a channel for each norm, a head."""
    stem = 9 * 3 * 16 + 2 * 16
    first = 2 * n * (9 * 16 * 16 + 2 * 16)
    second = 9 * 16 * 32 + (2 * n - 1) * 9 * 32 * 32 + 2 * n * 2 * 32
    third = 9 * 32 * 64 + (2 * n - 1) * 9 * 64 * 64 + 2 * n * 2 * 64
    return stem + first + second + third + 64 * classes + classes


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        (models.MLP((), 10), (784,), 7840 + 10),
        (models.MLP((256, 128), 10), (28, 28, 1), 784 * 256 + 256 + 256 * 128 + 128 + 1280 + 10),
        (models.MLP((7,), 3, batch_norm=True), (5,), 5 * 7 + 2 * 7 + 7 * 3 + 3),
        # 75*6+6, 150*16+16, 400*120+120, 120*84+84, 84*10+10
        (models.LeNet(), (32, 32, 3), 456 + 2416 + 48120 + 10164 + 850),
        # 25*6+6 and 256*120+120 on 28x28x1
        (models.LeNet(), (28, 28, 1), 156 + 2416 + 30840 + 10164 + 850),
        (models.CifarResNet(20), (32, 32, 3), 269_722),
        *(
            (models.CifarResNet(6 * n + 2), (32, 32, 3), cifar_resnet_parameters(n, 10))
            for n in (3, 5, 7, 9, 18)
        ),
        # Two 1x1 convolutions and their norms more.
        (
            models.CifarResNet(20, shortcut="project"),
            (32, 32, 3),
            269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64,
        ),
        # As published for the authors' and PyTorch's networks.
        (models.ResNet(18, 10, stem="cifar"), (32, 32, 3), 11_173_962),
        (models.ResNet(18), (224, 224, 3), 11_689_512),
        (models.ResNet(34), (224, 224, 3), 21_797_672),
        (models.ResNet(50), (224, 224, 3), 25_557_032),
    ],
)
def test_parameter_count(model, shape, count):
    assert parameters(model, *shape) == count


@pytest.mark.parametrize(
    ("model", "side", "sides"),
    [
        (models.LeNet(), 32, [28, 10]),
        (models.CifarResNet(20), 32, [32] * 3 + [16] * 3 + [8] * 3),
        (models.ResNet(18, stem="cifar"), 32, [32, 32, 16, 16, 8, 8, 4, 4]),
        (models.ResNet(18), 224, [56, 56, 28, 28, 14, 14, 7, 7]),
        (models.ResNet(34), 225, [57] * 3 + [29] * 4 + [15] * 6 + [8] * 3),
    ],
)
def test_image_sizes_inside(model, side, sides):
    def run(key):
        x = jnp.zeros((1, side, side, 3))
        return model.init_with_output(key, x, train=False, capture_intermediates=True)

    seen = jax.eval_shape(run, jax.random.key(0))[1]["intermediates"]
    kind = "Conv" if isinstance(model, models.LeNet) else "Block"
    assert [seen[f"{kind}_{i}"]["__call__"][0].shape[1] for i in range(len(sides))] == sides


# What they give


@EVERY
def test_logits(name):
    y = evaluate(name)(variables(name), images())
    assert y.shape == (6, 5)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, evaluate(name)(variables(name), images()))


@EVERY
def test_logits_are_float32_though_computed_in_bfloat16(name):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables(name)["params"])
    state = {**variables(name), "params": half}
    y, new = jax.eval_shape(lambda x: train(name, state, x), jnp.asarray(images(), jnp.bfloat16))
    assert y.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new))


@EVERY
def test_an_example_is_evaluated_without_regard_to_the_others(name):
    order = np.asarray([3, 0, 5, 1, 4, 2])
    y = evaluate(name)(variables(name), images())
    shuffled = evaluate(name)(variables(name), images()[order])
    np.testing.assert_allclose(shuffled, y[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "lenet", "cifar_resnet"])
def test_compiled_equals_uncompiled_and_float64(name):
    """Outputs and gradients of a training pass, under whatever XLA flags `runtime` has set."""

    def gradients(params, x):
        rest = {k: v for k, v in variables(name).items() if k != "params"}

        def loss(params):
            y, new = train(name, {**rest, "params": params}, x)
            return (jnp.sin(y) ** 2).sum(), (y, new)

        return jax.grad(loss, has_aux=True)(params)

    params = variables(name)["params"]
    compiled = jax.jit(gradients)(params, images())
    uncompiled = gradients(params, images())
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        exact = gradients(double, jnp.asarray(images(), jnp.float64))
    assert compiled[1][0].dtype == jnp.float32 and exact[1][0].dtype == jnp.float64
    for one, other, tolerance in [(compiled, uncompiled, 2e-5), (compiled, exact, 5e-5)]:
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            # Relative to the largest entry: rounding in a sum is relative to its terms.
            assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1)


@pytest.mark.parametrize("name", ["lenet", "cifar_resnet"])
def test_convolution_methods_agree(name):
    y = evaluate(name)(variables(name), images())
    for method in ("xla", "matmul"):
        model = SMALL[name].clone(conv=method)
        again = jax.jit(lambda v, model=model: model.apply(v, images(), train=False))
        np.testing.assert_allclose(again(variables(name)), y, rtol=1e-5, atol=1e-5)


def test_lenet_is_the_articles_network():
    """Against flax's own layers, put together as the articles do."""
    x = images()
    p = variables("lenet")["params"]
    for i, features in enumerate((6, 16)):
        x = nn.Conv(features, (5, 5), padding="VALID").apply({"params": p[f"Conv_{i}"]}, x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
    x = x.reshape(6, -1)
    for i, features in enumerate((120, 84, 5)):
        x = nn.Dense(features).apply({"params": p[f"Dense_{i}"]}, x)
        x = nn.relu(x) if i < 2 else x
    np.testing.assert_allclose(evaluate("lenet")(variables("lenet"), images()), x, atol=1e-5)


def test_mlp_without_widths_is_linear():
    model = models.MLP((), 3)
    x = images()[:, :2, :2]
    start = model.init(jax.random.key(0), x, train=False)
    layer = start["params"]["Dense_0"]
    expected = x.reshape(6, -1) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(model.apply(start, x, train=True), expected, atol=1e-6)


def test_mlp_under_a_sweep_over_dropout():
    start = models.MLP((8,), 3).init(jax.random.key(0), images(), train=False)

    def run(rate):
        model = models.MLP((8,), 3, dropout=rate)
        return model.apply(start, images(), train=True, rngs={"dropout": jax.random.key(1)})

    y = jax.vmap(run)(jnp.asarray([0.0, 0.5]))
    np.testing.assert_allclose(y[0], run(0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[1], run(0.5), rtol=1e-5, atol=1e-6)


def test_blocks_start_as_the_identity_with_zero_init():
    x = images()[..., :1]
    model = models.CifarResNet(depth=8, classes=5, width=4, zero_init=True)
    start = model.init(jax.random.key(0), x, train=False)
    _, state = model.apply(start, x, train=False, capture_intermediates=True)
    seen = state["intermediates"]
    stem, first = nn.relu(seen["BatchNorm_0"]["__call__"][0]), seen["Block_0"]["__call__"][0]
    np.testing.assert_array_equal(first, stem)
    # The next stage takes every second pixel and adds channels of zeros.
    second = seen["Block_1"]["__call__"][0]
    np.testing.assert_array_equal(second[..., :4], first[:, ::2, ::2])
    np.testing.assert_array_equal(second[..., 4:], 0)


# Where they start


def kernel(model, layer, shape=(32, 32, 3)):
    start = model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)["params"]
    for step in layer.split("/"):
        start = start[step]
    return np.asarray(start)


@pytest.mark.parametrize(
    ("model", "layer", "variance"),
    [
        (models.MLP((300,), activation="relu"), "Dense_0/kernel", 2 / 3072),
        (models.MLP((300,), activation="gelu"), "Dense_0/kernel", 2 / 3072),
        (models.MLP((300,), activation="tanh"), "Dense_0/kernel", 2 / (3072 + 300)),
        (models.MLP((300,), activation="sigmoid"), "Dense_0/kernel", 2 / (3072 + 300)),
        # U(±b) has variance b²/3.
        (models.LeNet(), "Dense_0/kernel", 1 / 400 / 3),
        (models.LeNet(), "Conv_1/kernel", 1 / 150 / 3),
        (models.LeNet(initial="he"), "Dense_0/kernel", 2 / 400),
        (models.LeNet(initial="glorot"), "Dense_0/kernel", 2 / (400 + 120)),
        (models.CifarResNet(20), "Block_8/Conv_1/kernel", 2 / (9 * 64)),
        (models.CifarResNet(20), "Block_6/Conv_0/kernel", 2 / (9 * 64)),  # 32 -> 64: fan-out
        (models.ResNet(18, 100, stem="cifar", width=16), "Dense_0/kernel", 1e-4),
    ],
)
def test_initial_variance(model, layer, variance):
    drawn = kernel(model, layer)
    # Five standard errors of a normal sample's variance; those of a uniform one are smaller.
    assert abs(drawn.var() / variance - 1) < 5 * np.sqrt(2 / drawn.size)
    assert abs(drawn.mean()) < 5 * np.sqrt(variance / drawn.size)


@pytest.mark.parametrize(("layer", "fan_in"), [("Conv_0", 75), ("Dense_0", 400), ("Dense_2", 84)])
def test_lenet_draws_biases_too_as_pytorch_does(layer, fan_in):
    for part in ("kernel", "bias"):
        drawn = kernel(models.LeNet(), f"{layer}/{part}") * np.sqrt(fan_in)
        assert (np.abs(drawn) <= 1).all()
        assert np.abs(drawn).max() > 0.5
    assert not kernel(models.LeNet(initial="he"), f"{layer}/bias").any()


# What they refuse


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        (models.MLP, "widths", (8, 0)),
        (models.MLP, "classes", 0),
        (models.MLP, "activation", "gelu_tanh"),
        (models.MLP, "dropout", 1.0),
        (models.LeNet, "classes", 2.5),
        (models.LeNet, "activation", "swish"),
        (models.LeNet, "initial", "torch"),
        (models.LeNet, "conv", "fft"),
        (models.CifarResNet, "depth", 21),
        (models.CifarResNet, "depth", 2),
        (models.CifarResNet, "width", -1),
        (models.CifarResNet, "shortcut", "A"),
        (models.ResNet, "depth", 20),
        (models.ResNet, "stem", "mnist"),
        (models.ResNet, "width", True),
    ],
)
def test_a_bad_field_fails_at_once(model, field, value):
    with pytest.raises(ValueError, match=f"^{field}: got .*expected"):
        model(**{field: value})
    with pytest.raises(ValueError, match=f"^{field}: got .*expected"):
        dataclasses.replace(model(), **{field: value})
    with pytest.raises(ValueError, match=f"^{field}: got .*expected"):
        model().clone(**{field: value})


@EVERY
def test_fields_are_the_whole_configuration(name):
    model = SMALL[name]
    same = dataclasses.replace(model)
    assert same == model and hash(same) == hash(model)
    assert dataclasses.replace(model, classes=7) != model
    assert dataclasses.replace(model, classes=7).classes == 7


def test_lenet_on_an_image_too_small():
    with pytest.raises(ValueError, match="kernel of 5x5 does not fit an image of 2x2"):
        models.LeNet().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
