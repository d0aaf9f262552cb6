"""Optimizers: each against the paper's equations, worked out in numpy for three steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeco import optim
from jaxeco.optim import SGD, AdaGrad, Adam, AdamW, Layerwise, Momentum, Muon, Partition, RMSProp
from jaxeco.schedules import Cosine, Linear
from jaxeco.trees import map_named

LR = 0.1
PARAMS = {
    "dense": {"kernel": np.array([[1.0, -2.0], [0.0, 0.5]]), "bias": np.array([0.3, -0.7])},
    "norm": {"scale": np.array([1.5, 0.5])},
}
GRADS = [jax.tree.map(lambda w, i=i: np.cos(3 * w + i) * 0.4 + 0.1 * i, PARAMS) for i in range(3)]


def train(optimizer, params=PARAMS, grads=GRADS, total=10):
    """What the optimizer makes of the parameters, after each of the gradients."""
    params, *grads = (jax.tree.map(np.float32, tree) for tree in (params, *grads))
    tx = optimizer.build(total)

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state, path = tx.init(params), []
    for g in grads:
        params, state = step(params, state, g)
        path.append(params)
    return path


def by_hand(direction, lr=lambda t: LR, l1=0.0, l2=0.0, decay=0.0, params=PARAMS, grads=GRADS):
    """`direction(g, memory, t)` -> d, in float64; the penalties are on kernels only.

    `memory` is a dict that each parameter keeps from step to step; t counts from 1.
    """
    params = jax.tree.map(np.float64, params)
    memories = {(a, b): {} for a in params for b in params[a]}
    path = []
    for t, grad in enumerate(grads):
        new = {a: {} for a in params}
        for (a, b), memory in memories.items():
            w, on = params[a][b], float(b == "kernel")
            g = grad[a][b] + on * (l1 * np.sign(w) + l2 * w)
            new[a][b] = w - lr(t) * (direction(g, memory, t + 1) + on * decay * w)
        params = new
        path.append(params)
    return path


def check(optimizer, direction, **kwargs):
    got, expected = train(optimizer), by_hand(direction, **kwargs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, expected)
    return got


def plain(g, memory, t):
    return g


def heavy_ball(gamma, nesterov=False, averaged=False):
    def direction(g, memory, t):
        g = (1 - gamma) * g if averaged else g
        memory["v"] = gamma * memory.setdefault("v", 0.0) + g
        return gamma * memory["v"] + g if nesterov else memory["v"]

    return direction


def adam(b1=0.9, b2=0.999, eps=1e-8):
    def direction(g, memory, t):
        memory["m"] = b1 * memory.setdefault("m", 0.0) + (1 - b1) * g
        memory["s"] = b2 * memory.setdefault("s", 0.0) + (1 - b2) * g**2
        return memory["m"] / (1 - b1**t) / (np.sqrt(memory["s"] / (1 - b2**t)) + eps)

    return direction


def test_sgd():
    got = check(SGD(LR), plain)
    # the first step of one number, in full: 1 - 0.1 * 0.4 cos 3
    assert float(got[0]["dense"]["kernel"][0, 0]) == pytest.approx(1 + 0.1 * 0.4 * 0.98999250)


def test_l1_and_l2_are_coupled_and_spare_bias_and_scale():
    check(SGD(LR, l1=0.03, l2=0.2), plain, l1=0.03, l2=0.2)
    check(Adam(LR, l1=0.03, l2=0.2), adam(), l1=0.03, l2=0.2)
    check(AdaGrad(LR, l2=0.2), adagrad(), l2=0.2)


def test_l2_is_the_gradient_of_half_the_square():
    def loss(params):
        return 0.2 / 2 * jnp.sum(params["dense"]["kernel"] ** 2) + 0.03 * jnp.sum(
            jnp.abs(params["dense"]["kernel"])
        )

    zeros = [jax.tree.map(np.zeros_like, PARAMS)]
    params = jax.tree.map(jnp.float32, PARAMS)
    expected = jax.tree.map(lambda w, g: w - LR * g, params, jax.grad(loss)(params))
    got = train(SGD(LR, l1=0.03, l2=0.2), grads=zeros)[0]
    # at w = 0 the slope of |w| is taken as 0 here, as the sign says; jax.grad takes 1
    keep = np.asarray(PARAMS["dense"]["kernel"]) != 0
    np.testing.assert_allclose(
        got["dense"]["kernel"][keep], expected["dense"]["kernel"][keep], rtol=1e-6
    )
    assert got["dense"]["kernel"][1, 0] == 0


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
def test_momentum(nesterov, averaged):
    check(
        Momentum(LR, momentum=0.8, nesterov=nesterov, averaged=averaged, l2=0.2, weight_decay=0.3),
        heavy_ball(0.8, nesterov, averaged),
        l2=0.2,
        decay=0.3,
    )


def test_averaged_momentum_is_classic_at_a_lower_rate():
    averaged = train(Momentum(LR, momentum=0.8, averaged=True))
    classic = train(Momentum(LR * (1 - 0.8), momentum=0.8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), averaged, classic)


def test_nesterov_is_sutskevers_form_at_the_looked_ahead_parameters():
    # Sutskever et al. 2013: v <- γv - lr·∇f(θ + γv), θ <- θ + v, on f = θ²/2. Ours holds θ + γv.
    theta, v, ahead = 1.0, 0.0, {"w": jnp.float32(1.0)}
    tx = Momentum(LR, momentum=0.8, nesterov=True).build(10)  # uncompiled
    state = tx.init(ahead)
    for _ in range(4):
        v = 0.8 * v - LR * (theta + 0.8 * v)
        theta += v
        updates, state = tx.update(ahead, state, ahead)
        ahead = optax.apply_updates(ahead, updates)
        assert float(ahead["w"]) == pytest.approx(theta + 0.8 * v, rel=1e-5)


def adagrad(eps=1e-10, initial=0.0):
    def direction(g, memory, t):
        memory["s"] = memory.setdefault("s", initial) + g**2
        return g / (np.sqrt(memory["s"]) + eps)

    return direction


def test_adagrad():
    got = check(AdaGrad(LR), adagrad())
    # the first step is lr·sign(g), wherever the epsilon is negligible
    sign = np.sign(GRADS[0]["dense"]["kernel"])
    np.testing.assert_allclose(
        got[0]["dense"]["kernel"], PARAMS["dense"]["kernel"] - LR * sign, rtol=1e-5, atol=1e-7
    )
    check(AdaGrad(LR, eps=0.5, initial=0.1), adagrad(0.5, 0.1))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_rmsprop(centered, gamma):
    def direction(g, memory, t):
        memory["s"] = 0.7 * memory.setdefault("s", 0.0) + 0.3 * g**2
        memory["m"] = 0.7 * memory.setdefault("m", 0.0) + 0.3 * g
        spread = memory["s"] - memory["m"] ** 2 if centered else memory["s"]
        memory["v"] = gamma * memory.setdefault("v", 0.0) + g / (np.sqrt(spread) + 1e-3)
        return memory["v"]

    check(RMSProp(LR, rho=0.7, eps=1e-3, momentum=gamma, centered=centered), direction)


def test_centered_rmsprop_survives_a_constant_gradient():
    # s - m² is 0 but for rounding, to which side depends on the number: so try many of them
    grads = [{"w": np.linspace(0.1, 10, 1000)}] * 60
    path = train(RMSProp(1e-9, rho=0.5, centered=True), {"w": np.ones(1000)}, grads)
    assert np.isfinite(path[-1]["w"]).all()


def test_adam():
    check(Adam(LR), adam())
    check(Adam(LR, b1=0.5, b2=0.9, eps=0.1), adam(0.5, 0.9, 0.1))


def test_adamw():
    check(AdamW(LR, weight_decay=0.3), adam(), decay=0.3)
    # at a gradient of 0 all that is left is lr·weight_decay·w, on kernels
    zeros = [jax.tree.map(np.zeros_like, PARAMS)]
    got = train(AdamW(LR, weight_decay=0.3), grads=zeros)[0]
    np.testing.assert_allclose(got["dense"]["kernel"], PARAMS["dense"]["kernel"] * 0.97, rtol=1e-6)
    np.testing.assert_allclose(got["dense"]["bias"], PARAMS["dense"]["bias"], rtol=1e-6)


def test_coupled_and_decoupled_differ_except_for_plain_sgd():
    def kernel(optimizer):
        return np.asarray(train(optimizer)[-1]["dense"]["kernel"])

    np.testing.assert_allclose(kernel(SGD(LR, l2=0.3)), kernel(SGD(LR, weight_decay=0.3)), 1e-5)
    coupled, decoupled = kernel(Momentum(LR, l2=0.3)), kernel(Momentum(LR, weight_decay=0.3))
    assert np.abs(coupled - decoupled).max() > 5e-3


def test_what_is_spared_can_be_said():
    everything = train(SGD(LR, l2=0.5, no_decay=()), grads=[jax.tree.map(np.zeros_like, PARAMS)])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 0.95 * b, rtol=1e-6), everything[0], PARAMS
    )
    kernels_only = SGD(LR, l2=0.5, no_decay=("b.*", "kernel"))
    got = train(kernels_only, grads=[jax.tree.map(np.zeros_like, PARAMS)])[0]
    np.testing.assert_allclose(got["norm"]["scale"], 0.95 * PARAMS["norm"]["scale"], rtol=1e-6)
    np.testing.assert_allclose(got["dense"]["kernel"], PARAMS["dense"]["kernel"])


def newton_schulz(g, steps=5):
    """Jordan et al. 2024: x <- a·x + b·(x·xᵀ)x + c·(x·xᵀ)²x, from x of Frobenius norm 1."""
    x = g / np.linalg.norm(g)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_muon():
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (2, 2, 3, 5), "bias": (5,)},
        "head": {"kernel": (4, 6), "bias": (6,)},
        "embed": {"embedding": (3, 4)},
    }
    params, *grads = (
        jax.tree.map(lambda s: rng.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple))
        for _ in range(4)
    )
    optimizer = Muon(LR, rest=Adam(0.01), weight_decay=0.2, l2=0.1)
    got = train(optimizer, params, grads)

    for name, rows in (("conv", 2 * 2 * 3), ("head", 4)):
        w, m, beta = params[name]["kernel"], 0.0, 0.95
        columns = w.shape[-1]
        for t, grad in enumerate(grads, start=1):
            g = grad[name]["kernel"] + 0.1 * w
            m = beta * m + (1 - beta) * g
            ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            d = newton_schulz(ahead.reshape(rows, columns))
            d = d * np.sqrt(max(1, columns / rows))
            w = w - LR * (d.reshape(w.shape) + 0.2 * w)
            np.testing.assert_allclose(got[t - 1][name]["kernel"], w, rtol=1e-3, atol=1e-4)
        # nearly orthogonal: all singular values of a direction lie around 1
        singular = np.linalg.svd(d.reshape(rows, columns), compute_uv=False)
        assert singular.min() > 0.4 and singular.max() < 1.6

    rest = {"a": {"bias": params["conv"]["bias"], "embedding": params["embed"]["embedding"]}}
    rest_grads = [
        {"a": {"bias": g["conv"]["bias"], "embedding": g["embed"]["embedding"]}} for g in grads
    ]
    expected = by_hand(adam(), lr=lambda t: 0.01, params=rest, grads=rest_grads)[-1]["a"]
    np.testing.assert_allclose(got[-1]["conv"]["bias"], expected["bias"], rtol=1e-4)
    np.testing.assert_allclose(got[-1]["embed"]["embedding"], expected["embedding"], rtol=1e-4)


def test_muon_with_consistent_size():
    grads = [{"kernel": np.random.default_rng(0).normal(size=(64, 16))}]
    params = {"kernel": np.zeros((64, 16))}
    got = train(Muon(1.0, rest=Adam(1.0), consistent_rms=0.2), params, grads)[0]["kernel"]
    assert float(jnp.sqrt(jnp.mean(got**2))) == pytest.approx(0.2, rel=0.2)  # AdamW's size


def test_muon_with_fixed_norm():
    rng = np.random.default_rng(0)
    params, *grads = ({"kernel": rng.normal(size=(3, 3, 4, 8))} for _ in range(3))
    plain = train(Muon(LR, rest=Adam(LR)), params, grads)
    got = train(Muon(LR, rest=Adam(LR), fixed_norm=True), params, grads)
    w, plain_before = params["kernel"], params["kernel"]
    for t in range(2):
        update = plain[t]["kernel"] - plain_before  # does not depend on w: no decay, no penalty
        w = w * np.sqrt(8) / np.sqrt((w**2).sum()) + update
        np.testing.assert_allclose(got[t]["kernel"], w, rtol=1e-4, atol=1e-5)
        plain_before = plain[t]["kernel"]


def test_muon_needs_a_matrix():
    tx = Muon(LR, rest=Adam(LR)).build(10)
    with pytest.raises(ValueError, match="there are a/bias, b/weight"):
        tx.init({"a": {"bias": jnp.ones(2)}, "b": {"weight": jnp.ones((2, 2))}})


def test_partition_follows_its_first_matching_rule():
    optimizer = Partition((("norm/.*", None), (".*/bias", SGD(1.0)), (".*", AdamW(LR))))
    got = train(optimizer)
    np.testing.assert_array_equal(got[-1]["norm"]["scale"], np.float32(PARAMS["norm"]["scale"]))
    expected = by_hand(plain, lr=lambda t: 1.0)[-1]["dense"]["bias"]
    np.testing.assert_allclose(got[-1]["dense"]["bias"], expected, rtol=1e-5)
    expected = by_hand(adam(), decay=0.01)[-1]["dense"]["kernel"]
    np.testing.assert_allclose(got[-1]["dense"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert optimizer.learning_rate(0, 10) == 1.0


def test_partition_nests_with_muon():
    optimizer = Partition((("norm/.*", SGD(LR)), (".*", Muon(LR, rest=Adam(LR)))))
    muon = train(Muon(LR, rest=Adam(LR)))[-1]["dense"]
    nested = train(optimizer)[-1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), nested["dense"], muon)
    np.testing.assert_allclose(
        nested["norm"]["scale"], by_hand(plain)[-1]["norm"]["scale"], rtol=1e-5
    )


def test_partition_leaves_no_parameter_and_no_rule_unused():
    params = jax.tree.map(jnp.float32, PARAMS)
    with pytest.raises(ValueError, match=r"no rule matches the parameter 'norm/scale'"):
        Partition((("dense/.*", SGD(LR)),)).build(10).init(params)
    for rules in (
        ((".*", SGD(LR)), ("norm/.*", None)),  # comes too late
        (("head", SGD(LR)), (".*", SGD(LR))),  # names nothing
        (("norm", SGD(LR)), (".*", SGD(LR))),  # only a part of a path
    ):
        unused = "norm/.*" if rules[0][0] == ".*" else rules[0][0]
        with pytest.raises(ValueError, match="no parameter falls under") as error:
            Partition(rules).build(10).init(params)
        assert repr(unused) in str(error.value)


TRUNK = {
    "trunk": {
        "token_embed": {"embedding": np.full((4, 2), 2.0)},
        "block_0": {"up": {"kernel": np.full((2, 3), 2.0)}, "norm1": {"scale": np.ones(2)}},
        "block_1": {"up": {"kernel": np.full((2, 3), 2.0)}},
        "norm_out": {"scale": np.ones(2)},
    },
    "head": {"kernel": np.full((2, 5), 2.0)},
}


@pytest.mark.parametrize("outer", ["", "base"])
def test_layerwise_scales_the_whole_update(outer):
    params = {outer: TRUNK} if outer else TRUNK
    ones = jax.tree.map(np.ones_like, params)
    optimizer = Layerwise(SGD(LR, weight_decay=0.5), decay=0.5, layers=2)
    got = train(optimizer, params, [ones])[0]
    got = got[outer] if outer else got
    # -lr·(g + weight_decay·w) = -0.1·(1 + 0.5·2) of kernels, -0.1 of scales; w is 2, and 1
    trunk = got["trunk"]
    for leaf, expected in (
        (got["head"]["kernel"], 2 - 0.2),
        (trunk["norm_out"]["scale"], 1 - 0.1),
        (trunk["block_1"]["up"]["kernel"], 2 - 0.2 / 2),
        (trunk["block_0"]["up"]["kernel"], 2 - 0.2 / 4),
        (trunk["block_0"]["norm1"]["scale"], 1 - 0.1 / 4),
        (trunk["token_embed"]["embedding"], 2 - 0.2 / 8),
    ):
        np.testing.assert_allclose(leaf, np.full(leaf.shape, expected), rtol=1e-6)
    assert optimizer.learning_rate(0, 10) == pytest.approx(LR)


def test_layerwise_counts_blocks_as_numbers_and_needs_one():
    params = {f"block_{i}": {"kernel": np.zeros(2)} for i in range(11)}
    ones = jax.tree.map(np.ones_like, params)
    got = train(Layerwise(SGD(1.0), decay=0.5, layers=11), params, [ones])[0]
    np.testing.assert_allclose([got[f"block_{i}"]["kernel"][0] for i in (2, 10)], [-(2**-9), -0.5])
    with pytest.raises(ValueError, match="matches no parameter; there are dense/bias"):
        train(Layerwise(SGD(LR), decay=0.5, layers=2))
    with pytest.raises(ValueError, match="layers=10: the model has 11 blocks"):
        train(Layerwise(SGD(1.0), decay=0.5, layers=10), params, [ones])


def test_what_is_frozen_is_known_and_does_not_count_when_gradients_are_clipped():
    inner = Partition((("trunk/.*norm.*", None), (".*", SGD(1.0))))
    muon = Muon(1.0, rest=inner, matrices=".*block.*kernel")
    optimizer = Layerwise(Partition((("trunk/block_0/.*", None), (".*", muon))), 0.5, layers=2)
    trains = map_named(optimizer.trains, TRUNK)
    assert trains == {
        "trunk": {
            "token_embed": {"embedding": True},
            "block_0": {"up": {"kernel": False}, "norm1": {"scale": False}},
            "block_1": {"up": {"kernel": True}},
            "norm_out": {"scale": False},
        },
        "head": {"kernel": True},
    }
    assert all(jax.tree.leaves(map_named(AdamW(LR).trains, PARAMS)))

    frozen = Partition((("norm/.*", None), (".*", SGD(1.0))))
    learnt = functools.partial(map_named, frozen.trains)
    tx = optax.chain(optax.masked(optim.clip_by_global_norm(1.0), learnt), frozen.build(1))
    params = {"dense": {"kernel": jnp.zeros(2)}, "norm": {"scale": jnp.zeros(1)}}
    grads = {"dense": {"kernel": jnp.array([3.0, 4.0])}, "norm": {"scale": jnp.array([1e6])}}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], [-0.6, -0.8], rtol=1e-6)
    assert updates["norm"]["scale"] == 0


def test_the_learning_rate_of_a_step_is_the_schedules():
    schedule = Linear(0.4, final=0.1, warmup=1)
    rates = [0.2, 0.4, 0.3]  # of a run of 4 steps
    got = train(SGD(schedule), total=4)
    expected = by_hand(plain, lr=lambda t: rates[t])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)
    assert [SGD(schedule).learning_rate(t, 4) for t in range(3)] == pytest.approx(rates)
    assert isinstance(SGD(schedule).learning_rate(0, 4), float)
    assert Muon(schedule, rest=Adam(1.0)).learning_rate(1, 4) == 0.4


ALL = [
    SGD(LR, l2=0.1),
    Momentum(LR, nesterov=True, weight_decay=0.1),
    AdaGrad(LR),
    RMSProp(LR, momentum=0.5, centered=True),
    Adam(LR, l1=0.1),
    AdamW(Cosine(LR, warmup=2)),
    Muon(LR, rest=AdamW(LR)),
    Partition((("norm/.*", None), (".*", Adam(LR)))),
]
names = pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)


def loop(optimizer, grads):
    """Three steps within one program; what sweeps and compiled runs do."""
    tx = optimizer.build(10)
    params = jax.tree.map(jnp.float32, PARAMS)
    state = tx.init(params)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), grads)[0]


STACKED = jax.tree.map(lambda *g: jnp.float32(np.stack(g)), *GRADS)


@names
def test_under_scan_and_shard_map(optimizer):
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("data",))
    spec = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        lambda grads: loop(optimizer, grads), mesh=mesh, in_specs=spec, out_specs=spec
    )
    got, state = jax.jit(mapped)(STACKED)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        got,
        train(optimizer)[-1],
    )
    # scan has shown that structure, shapes and dtypes of the state stay; all of it is arrays
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "optimizer", [SGD(LR), AdamW(LR), Muon(LR, rest=SGD(LR))], ids=lambda o: type(o).__name__
)
def test_many_learning_rates_in_one_program(optimizer):
    rates = jnp.array([0.01, 0.1])
    many, state = jax.jit(
        jax.vmap(lambda lr: loop(dataclasses.replace(optimizer, lr=lr), STACKED))
    )(rates)
    one = train(dataclasses.replace(optimizer, lr=0.01))[-1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=2e-4, atol=2e-5), many, one)
    alone = jax.eval_shape(optimizer.build(10).init, PARAMS)
    assert jax.tree.structure(alone) == jax.tree.structure(state)


def test_every_number_may_be_traced():
    def run(v):
        return loop(
            Momentum(Cosine(v), momentum=v, l1=v, l2=v, weight_decay=v, averaged=True), STACKED
        )[0]

    many = jax.vmap(run)(jnp.array([0.1, 0.2]))
    one = train(
        Momentum(Cosine(0.2), momentum=0.2, l1=0.2, l2=0.2, weight_decay=0.2, averaged=True)
    )[-1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5), many, one)


def test_the_state_does_not_depend_on_how_the_learning_rate_is_given():
    structures = {
        jax.tree.structure(jax.eval_shape(Adam(lr, l2=l2).build(10).init, PARAMS))
        for lr in (0.1, Cosine(0.1))
        for l2 in (0.0, 0.1)
    }
    assert len(structures) == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SGD(-0.1), r"SGD.lr=-0.1: expected a number of at least 0"),
        (lambda: SGD("0.1"), "SGD.lr='0.1'"),
        (lambda: SGD(0.1, l2=-1.0), "SGD.l2=-1.0"),
        (lambda: SGD(0.1, l1=float("inf")), "SGD.l1=inf"),
        (lambda: SGD(0.1, no_decay=("(",)), r"SGD.no_decay: '\(' is not a regular expression"),
        (lambda: Momentum(0.1, momentum=1.0), "Momentum.momentum=1.0"),
        (lambda: AdaGrad(0.1, eps=0), "AdaGrad.eps=0"),
        (lambda: RMSProp(0.1, rho=-0.1), "RMSProp.rho=-0.1"),
        (lambda: Adam(0.1, b2=1), "Adam.b2=1: expected a number of at least 0 and below 1"),
        (lambda: AdamW(0.1, weight_decay=-0.1), "AdamW.weight_decay=-0.1"),
        (lambda: Muon(0.1, rest=0.1), "Muon.rest=0.1"),
        (lambda: Muon(0.1, rest=SGD(0.1), ns_steps=0), "Muon.ns_steps=0"),
        (lambda: Partition(((".*", 0.1),)), "expected an optimizer, or None"),
        (lambda: Partition(((".*", None),)), "expected one optimizer or more"),
        (lambda: Partition((("(", SGD(0.1)),)), "not a regular expression"),
        (lambda: Partition((SGD(0.1),)), r"expected \(pattern, optimizer\)"),
        (lambda: Layerwise(0.1, 0.5, 2), "Layerwise.optimizer=0.1"),
        (lambda: Layerwise(SGD(0.1), 1.5, 2), "Layerwise.decay=1.5: expected .* at most 1"),
        (lambda: Layerwise(SGD(0.1), 0.5, 2, block="block"), "expected a group"),
    ],
)
def test_errors_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0])
def test_clipping_is_optaxs(scale):
    rng = np.random.default_rng(0)
    grads = {"a": scale * rng.normal(size=(3, 4)), "b": scale * rng.normal(size=5)}
    ours, theirs = optim.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
    got, _ = ours.update(grads, ours.init(grads), grads)
    expected, _ = theirs.update(grads, theirs.init(grads), grads)
    for name in grads:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6)


def test_muon_refuses_matrices_of_several_layers_in_one():
    params = {"blocks": {"up": {"kernel": jnp.zeros((2, 4, 4))}}}
    with pytest.raises(ValueError, match="scan_layers=False"):
        Muon(0.1, rest=SGD(0.1)).build(1).init(params)
