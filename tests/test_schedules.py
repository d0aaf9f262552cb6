"""Schedules: every endpoint by hand, the two evaluations against each other and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeco.schedules import Constant, Cosine, Linear, Step, Triangular

ALL = [
    Constant(0.3),
    Constant(0.3, warmup=0.2),
    Step(0.3, boundaries=(0.5, 15), factor=0.5, warmup=3),
    Linear(0.3, final=0.01, warmup=0.1),
    Cosine(0.3, final=0.01, warmup=4),
    Triangular(0.3, 0.25, start=0.05, final=0.02),
]


def rates(schedule, total):
    return [float(schedule.build(total)(t)) for t in range(total + 1)]


def test_constant_and_its_warm_up():
    assert rates(Constant(0.5), 3) == [0.5] * 4
    # a warm-up of 4 steps: fifths of the peak, which step 4 is the first to have
    np.testing.assert_allclose(
        rates(Constant(1.0, warmup=0.5), 8), [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]
    )


def test_linear_reaches_peak_and_final_exactly():
    np.testing.assert_allclose(rates(Linear(1.0), 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(
        rates(Linear(0.8, final=0.2, warmup=1), 4), [0.4, 0.8, 0.6, 0.4, 0.2]
    )
    values = rates(Linear(0.7, final=0.1, warmup=0.3), 10)
    assert values[3] == 0.7 and values[10] == 0.1


def test_cosine_by_hand():
    half = np.sqrt(0.5)
    expected = [1, (1 + half) / 2, 0.5, (1 - half) / 2, 0]
    np.testing.assert_allclose(rates(Cosine(1.0), 4), expected, atol=1e-15)
    values = rates(Cosine(0.9, final=0.1, warmup=2), 6)
    # thirds of the peak, the peak, half-way, and beyond the last step the end
    np.testing.assert_allclose(values[:3] + values[4:5], [0.3, 0.6, 0.9, 0.5])
    assert values[2] == 0.9 and values[6] == 0.1


def test_step_falls_on_its_boundaries():
    expected = [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01]
    np.testing.assert_allclose(rates(Step(1.0), 8), expected)
    np.testing.assert_allclose(rates(Step(1.0, boundaries=(4, 6)), 8), expected)
    np.testing.assert_allclose(
        rates(Step(1.0, boundaries=(2,), factor=0.5, warmup=1), 3), [0.5, 1, 0.5, 0.5]
    )


def test_triangular_by_hand():
    np.testing.assert_allclose(
        rates(Triangular(1.0, 0.5), 6), [0.25, 0.5, 0.75, 1, 2 / 3, 1 / 3, 0]
    )
    np.testing.assert_allclose(
        rates(Triangular(1.0, 1, start=0.5, final=0.2), 3), [0.75, 1, 0.6, 0.2]
    )


def test_fractions_follow_the_length_of_the_run_and_counts_do_not():
    assert rates(Linear(1.0, warmup=0.1), 1000)[100] == 1.0
    assert rates(Linear(1.0, warmup=0.1), 10)[1] == 1.0
    assert rates(Linear(1.0, warmup=5), 1000)[5] == 1.0
    # 0.29 * 100 is 28.999999999999996 in floating point; the nearest step is meant
    assert rates(Constant(1.0, warmup=0.29), 100)[29] == 1.0


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("total", [1, 2, 20])
def test_traced_equals_host(schedule, total):
    steps = np.arange(total + 3)
    traced = jax.jit(jax.vmap(schedule.build(total)))(jnp.asarray(steps))
    assert traced.dtype == jnp.float32
    host = [schedule.build(total)(int(t)) for t in steps]
    assert all(np.isfinite(host)) and min(host) >= 0
    np.testing.assert_allclose(traced, host, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_every_step_learns_and_none_exceeds_the_peak(schedule):
    values = rates(schedule, 20)
    assert min(values[:20]) > 0 and max(values) == 0.3


def test_equals_optax_where_optax_has_the_same():
    ours, theirs = Cosine(0.3, final=0.03).build(50), optax.cosine_decay_schedule(0.3, 50, 0.1)
    np.testing.assert_allclose(
        [ours(t) for t in range(60)], [theirs(t) for t in range(60)], rtol=1e-5
    )
    ours, theirs = Linear(0.3, final=0.1).build(50), optax.linear_schedule(0.3, 0.1, 50)
    np.testing.assert_allclose(
        [ours(t) for t in range(60)], [theirs(t) for t in range(60)], rtol=1e-5
    )


def test_the_host_evaluation_touches_no_device():
    with jax.transfer_guard("disallow_explicit"):
        assert not isinstance(Cosine(0.3, warmup=2).build(10)(3), jax.Array)


def test_a_traced_peak():
    values = jax.vmap(lambda peak: Cosine(peak, warmup=2).build(10)(6))(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(values, [0.05, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Constant(-0.1), r"Constant.peak=-0.1: expected a number of at least 0"),
        (lambda: Constant(float("nan")), "peak=nan"),
        (lambda: Constant("0.1"), "peak='0.1'"),
        (lambda: Linear(0.1, warmup=1.5), r"Linear.warmup=1.5: expected a fraction of the run"),
        (lambda: Linear(0.1, warmup=-1), "warmup=-1"),
        (lambda: Linear(0.1, warmup=True), "warmup=True"),
        (lambda: Cosine(0.1, final=-1.0), "Cosine.final=-1.0"),
        (lambda: Step(0.1, boundaries=(0.5, 2.0)), "Step.boundaries=2.0"),
        (lambda: Step(0.1, factor=0), "Step.factor=0"),
        (lambda: Triangular(0.1, at="half"), "Triangular.at='half'"),
        (lambda: Constant(0.1).build(0), "total_steps=0"),
    ],
)
def test_errors_say_what_is_wrong(make, says):
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
