"""Models: parameters counted by hand, shapes, initial variances, and what must not change them."""

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import models
from jaxeco.models.resnet import Block

# Small ones of each kind, with batch normalisation and dropout wherever they can have them.
SMALL = {
    "mlp": models.MLP((9,), num_classes=5, activation="gelu", dropout=0.5, batch_norm=True),
    "lenet": models.LeNet(num_classes=5),
    "cifar_resnet": models.CifarResNet(depth=8, num_classes=5, width=4),
}
EVERY = pytest.mark.parametrize("name", SMALL)
# Too slow to compile in a test; their blocks are tested by themselves.
LARGE = {
    "resnet18": models.ResNet(18, num_classes=5, stem="cifar", width=2),
    "resnet50": models.ResNet(50, num_classes=5, stem="imagenet", width=2),
}


@cache
def images():
    return np.random.default_rng(0).normal(size=(6, 20, 18, 3)).astype(np.float32)


def shapes(model, *shape):
    """What `init` returns, as shapes and dtypes."""
    return jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, *shape)), train=False), jax.random.key(0)
    )


def fill(shapes, seed=1):
    """Random variables of these shapes, away from the special values at which training starts."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape) * (leaf.size / leaf.shape[-1] + 1) ** -0.5
        return jnp.asarray(noise + (path[-1].key in ("scale", "var")) * 2, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@cache
def variables(name):
    return fill(shapes(SMALL[name], *images().shape[1:]))


@cache
def evaluate(name):
    return jax.jit(lambda variables, x: SMALL[name].apply(variables, x, train=False))


def train(model, variables, x):
    return model.apply(
        variables,
        x,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(3)},
    )


def parameters(model, *shape):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, *shape)["params"]))


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
        (models.LeNet(conv="matmul"), 32, [28, 10]),
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


@pytest.mark.parametrize("name", SMALL | LARGE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_and_statistics_are_float32_in_whatever_it_computes(name, dtype):
    model = (SMALL | LARGE)[name]

    def run(key, x):
        state = model.init(key, x, train=False)
        half = jax.tree.map(lambda leaf: leaf.astype(dtype), state["params"])
        return train(model, {**state, "params": half}, x.astype(dtype))

    y, new = jax.eval_shape(run, jax.random.key(0), images())
    assert (y.shape, y.dtype) == ((6, 5), jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new))


@EVERY
def test_an_example_is_evaluated_without_regard_to_the_others(name):
    order = np.asarray([3, 0, 5, 1, 4, 2])
    y = evaluate(name)(variables(name), images())
    shuffled = evaluate(name)(variables(name), images()[order])
    np.testing.assert_allclose(shuffled, y[order], rtol=1e-5, atol=1e-5)


@EVERY
def test_gradients_equal_those_in_float64(name):
    """Outputs and gradients of a training pass, under whatever XLA flags `runtime` has set."""

    def gradients(state, x):
        def loss(params):
            y, new = train(SMALL[name], {**state, "params": params}, x)
            return (jnp.sin(y) ** 2).sum(), (y, new)

        return jax.grad(loss, has_aux=True)(state["params"])

    compiled = jax.jit(gradients)(variables(name), images())
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables(name))
        exact = jax.device_get(jax.jit(gradients)(double, images().astype(np.float64)))
    assert exact[1][0].dtype == np.float64
    for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.float32
        # Relative to the largest entry, since a sum is rounded relative to its terms.
        assert np.abs(np.asarray(a) - b).max() <= 2e-5 * max(np.abs(b).max(), 1)


@EVERY
def test_compiled_equals_uncompiled(name):
    y = evaluate(name)(variables(name), images())
    with jax.disable_jit():
        again = SMALL[name].apply(variables(name), images(), train=False)
    np.testing.assert_allclose(again, y, rtol=1e-6, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize(("name", "method"), [("lenet", "xla"), ("cifar_resnet", "matmul")])
def test_convolution_methods_agree(name, method):
    model = SMALL[name].clone(conv=method)
    y = jax.jit(lambda state: model.apply(state, images(), train=False))(variables(name))
    np.testing.assert_allclose(y, evaluate(name)(variables(name), images()), rtol=1e-5, atol=1e-5)


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
    y = evaluate("lenet")(variables("lenet"), images())
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("bottleneck", [False, True])
def test_block(bottleneck):
    """Against flax's own layers."""
    block = Block(2, stride=2, bottleneck=bottleneck, shortcut="project")
    x = images()[..., :2]
    state = fill(jax.eval_shape(lambda k: block.init(k, x, train=False), jax.random.key(0)))

    def layer(x, conv, norm, size, stride):
        params, stats = state["params"], state["batch_stats"]
        features = params[conv]["kernel"].shape[-1]
        there = {"use_bias": False, "padding": size // 2}
        x = nn.Conv(features, (size, size), stride, **there).apply({"params": params[conv]}, x)
        norms = {"params": params[norm], "batch_stats": stats[norm]}
        return nn.BatchNorm(use_running_average=True).apply(norms, x)

    y = x
    for i, (size, stride) in enumerate(
        [(1, 1), (3, 2), (1, 1)] if bottleneck else [(3, 2), (3, 1)]
    ):
        y = layer(nn.relu(y) if i else y, f"Conv_{i}", f"BatchNorm_{i}", size, stride)
    y = nn.relu(y + layer(x, "project", "project_norm", 1, 2))
    assert y.shape == (6, 10, 9, 8 if bottleneck else 2)
    np.testing.assert_allclose(block.apply(state, x, train=False), y, rtol=1e-5, atol=1e-5)


def test_block_starts_as_its_shortcut_with_zero_init():
    x = np.abs(images())
    block = Block(5, stride=2, zero_init=True)
    init = jax.jit(lambda key, x: block.init_with_output(key, x, train=True)[0])
    y = init(jax.random.key(0), x)
    # "pad" takes every second pixel where the stride is 2 and adds channels of zeros.
    np.testing.assert_array_equal(y[..., :3], x[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 3:], 0)


@pytest.mark.parametrize("model", [models.CifarResNet, models.ResNet])
def test_zero_init_touches_the_last_norm_of_each_block(model):
    def scales(key):
        x = jnp.zeros((1, 32, 32, 3))
        off = model(width=2).init(key, x, train=False)["params"]
        on = model(width=2, zero_init=True).init(key, x, train=False)["params"]
        return (
            off["Block_1"]["BatchNorm_1"],
            on["Block_1"]["BatchNorm_0"],
            on["Block_1"]["BatchNorm_1"],
        )

    off, inner, last = jax.jit(scales)(jax.random.key(0))
    assert (off["scale"] == 1).all() and (inner["scale"] == 1).all() and (last["scale"] == 0).all()


# Where they start


def initial(model, path):
    """One array of a model's start; compiled alone, the compiler leaves out all the rest."""

    def draw(key):
        start = model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)["params"]
        for step in path.split("/"):
            start = start[step]
        return start

    return np.asarray(jax.jit(draw)(jax.random.key(0)))


@pytest.mark.parametrize(
    ("model", "layer", "variance"),
    [
        (models.MLP((300,), activation="relu"), "Dense_0/kernel", 2 / 3072),
        (models.MLP((300,), activation="tanh"), "Dense_0/kernel", 2 / (3072 + 300)),
        # U(±b) has variance b²/3.
        (models.LeNet(), "Dense_0/kernel", 1 / 400 / 3),
        (models.LeNet(), "Conv_1/kernel", 1 / 150 / 3),
        (models.LeNet(initial="he"), "Dense_0/kernel", 2 / 400),
        (models.LeNet(initial="glorot"), "Dense_0/kernel", 2 / (400 + 120)),
        # From 32 to 64 features: fan-out.
        (models.CifarResNet(8), "Block_2/Conv_0/kernel", 2 / (9 * 64)),
        (models.ResNet(18, 100, stem="cifar", width=16), "Dense_0/kernel", 1e-4),
    ],
)
def test_initial_variance(model, layer, variance):
    drawn = initial(model, layer)
    # Five standard errors of a normal sample's variance; those of a uniform one are smaller.
    assert abs(drawn.var() / variance - 1) < 5 * np.sqrt(2 / drawn.size)
    assert abs(drawn.mean()) < 5 * np.sqrt(variance / drawn.size)


@pytest.mark.parametrize(("layer", "fan_in"), [("Conv_0", 75), ("Dense_2", 84)])
def test_lenet_draws_biases_too_as_pytorch_does(layer, fan_in):
    drawn = initial(models.LeNet(), f"{layer}/bias") * np.sqrt(fan_in)
    assert (np.abs(drawn) <= 1).all()
    assert np.abs(drawn).max() > 0.5 and len(np.unique(drawn)) == len(drawn)
    assert not initial(models.LeNet(initial="he"), f"{layer}/bias").any()


# What they refuse


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        (models.MLP, "widths", (8, 0)),
        (models.MLP, "num_classes", 0),
        (models.MLP, "activation", "gelu_tanh"),
        (models.MLP, "dropout", 1.0),
        (models.LeNet, "num_classes", 2.5),
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
    assert dataclasses.replace(model, num_classes=7) != model
    assert dataclasses.replace(model, num_classes=7).num_classes == 7


def test_lenet_on_an_image_too_small():
    with pytest.raises(ValueError, match="kernel of 5x5 does not fit an image of 2x2"):
        shapes(models.LeNet(), 8, 8, 1)
