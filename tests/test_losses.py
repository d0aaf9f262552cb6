"""Losses: by hand, against scipy and scikit-learn, at extreme logits, and by their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit, log_softmax, softmax
from sklearn.metrics import log_loss, mean_squared_error

from jaxeco.losses import (
    MeanSquaredError,
    SigmoidBinaryCrossEntropy,
    SoftmaxCrossEntropy,
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
    squared_error,
)

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(6, 4)).astype(np.float32) * 3
Y = np.array([0, 1, 2, 3, 1, 1], np.int32)
SOFT = RNG.dirichlet(np.ones(4), 6).astype(np.float32)


softmax_compiled = jax.jit(softmax_cross_entropy)


def cross_entropy(z, y, a=0.0):
    return np.asarray(softmax_compiled(z, y, a))


def test_softmax_by_hand():
    z = np.log([[1.0, 1.0, 2.0]])  # probabilities 1/4, 1/4, 1/2
    np.testing.assert_allclose(cross_entropy(z, np.array([2])), [np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(
        cross_entropy(z, np.array([[0.5, 0.0, 0.5]])), [1.5 * np.log(2)], rtol=1e-6
    )
    # smoothing by 0.3 over three classes: target 0.1, 0.1, 0.8
    np.testing.assert_allclose(cross_entropy(z, np.array([2]), 0.3), [1.2 * np.log(2)], rtol=1e-6)


def test_softmax_against_scipy_and_sklearn():
    reference = log_softmax(Z.astype(np.float64), -1)
    np.testing.assert_allclose(cross_entropy(Z, Y), -reference[np.arange(6), Y], rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(Z, SOFT), -(SOFT * reference).sum(-1), rtol=1e-5)
    assert cross_entropy(Z, Y).mean() == pytest.approx(
        log_loss(Y, softmax(Z.astype(np.float64), -1), labels=range(4)), rel=1e-5
    )
    for a in (0.1, 0.9):
        target = np.eye(4)[Y] * (1 - a) + a / 4
        np.testing.assert_allclose(cross_entropy(Z, Y, a), -(target * reference).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("a", [0.0, 0.2])
@pytest.mark.parametrize("y", [Y, SOFT], ids=["integer", "soft"])
def test_softmax_gradient_is_softmax_minus_target(y, a):
    grad = jax.grad(lambda z: softmax_cross_entropy(z, jnp.asarray(y), a).sum())(jnp.asarray(Z))
    target = (np.eye(4)[y] if y.ndim == 1 else y) * (1 - a) + a / 4
    np.testing.assert_allclose(grad, softmax(Z, -1) - target, atol=1e-6)


def test_softmax_at_extreme_logits():
    z = jnp.array([[1e4, -1e4], [1e4, -1e4], [-1e4, -1e4], [1e4, 1e4]])
    y = jnp.array([0, 1, 0, 1])
    expected = [0, 2e4, np.log(2), np.log(2)]
    np.testing.assert_allclose(softmax_cross_entropy(z, y), expected, rtol=1e-6)
    grad = jax.grad(lambda z: softmax_cross_entropy(z, y).sum())(z)
    np.testing.assert_allclose(grad, [[0, 0], [1, -1], [-0.5, 0.5], [0.5, -0.5]])


def test_softmax_over_a_text_and_of_bfloat16():
    z = np.stack([Z, Z[::-1]])  # [2, 6, 4]
    y = np.stack([Y, Y[::-1]])
    losses = cross_entropy(z, y)
    np.testing.assert_allclose(losses, np.stack([cross_entropy(Z, Y), cross_entropy(Z, Y)[::-1]]))
    low = jnp.asarray(Z, jnp.bfloat16)
    assert softmax_cross_entropy(low, jnp.asarray(Y)).dtype == jnp.float32
    np.testing.assert_array_equal(
        softmax_cross_entropy(low, jnp.asarray(Y)), cross_entropy(low.astype(jnp.float32), Y)
    )


def test_a_label_that_is_no_class_gives_nan_not_zero():
    losses = cross_entropy(Z[:3], np.array([-1, 4, 0]))
    assert np.isnan(losses).tolist() == [True, True, False]


def test_class_weights_and_mask_by_hand():
    loss = SoftmaxCrossEntropy(class_weights=(1.0, 2.0, 0.0, 4.0))
    losses = np.asarray(loss(jnp.asarray(Z), jnp.asarray(Y)))
    np.testing.assert_array_equal(losses, cross_entropy(Z, Y))  # unweighted
    mask = np.array([1, 1, 1, 1, 0, 1], np.float32)
    weight = np.array([1, 2, 0, 4, 0, 2])
    mean = loss.mean(jnp.asarray(Z), jnp.asarray(Y), jnp.asarray(mask))
    assert float(mean.weight) == 9
    assert mean.value() == pytest.approx((losses * weight).sum() / 9, rel=1e-6)
    assert mean.value() == pytest.approx(
        log_loss(Y, softmax(Z.astype(float), -1), labels=range(4), sample_weight=weight), rel=1e-5
    )
    # soft labels that are certain weigh as the integers do; others in between
    hot = jnp.asarray(np.eye(4, dtype=np.float32)[Y])
    np.testing.assert_array_equal(loss.weights(hot), loss.weights(jnp.asarray(Y)))
    np.testing.assert_allclose(loss.weights(jnp.array([[0.5, 0.25, 0.0, 0.25]])), [2.0])


def test_mask_per_example_counts_positions():
    z, y = jnp.asarray(np.stack([Z, Z * 2])), jnp.asarray(np.stack([Y, Y]))
    loss = SoftmaxCrossEntropy()
    mean = loss.mean(z, y, jnp.array([1.0, 0.0]))
    assert float(mean.weight) == 6
    assert mean.value() == pytest.approx(cross_entropy(Z, Y).mean(), rel=1e-6)
    per_position = jnp.zeros((2, 6)).at[1, :2].set(1)
    mean = loss.mean(z, y, per_position)
    assert mean.value() == pytest.approx(cross_entropy(Z[:2] * 2, Y[:2]).mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "outputs", "y"),
    [
        (SoftmaxCrossEntropy(0.1, (1.0, 2.0, 3.0, 4.0)), Z, Y),
        (SigmoidBinaryCrossEntropy(2.0), Z, (SOFT > 0.3).astype(np.float32)),
        (MeanSquaredError(), Z, SOFT),
    ],
    ids=lambda v: type(v).__name__,
)
def test_padding_changes_neither_the_mean_nor_its_gradient(loss, outputs, y):
    def objective(outputs, y, mask):
        mean = loss.mean(outputs, y, mask)
        return mean.total / mean.weight

    padded = np.concatenate([outputs, np.full((2, 4), 7.0, np.float32)])
    y_padded = np.concatenate([y, y[:2]])
    mask = jnp.array([1.0] * 6 + [0.0] * 2)
    value, grad = jax.value_and_grad(objective)(outputs, jnp.asarray(y), jnp.ones(6))
    value_p, grad_p = jax.jit(jax.value_and_grad(objective))(padded, jnp.asarray(y_padded), mask)
    assert float(value) == pytest.approx(float(value_p), rel=1e-6)
    np.testing.assert_allclose(grad, grad_p[:6], rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(grad_p[6:], 0)


def test_sigmoid_by_hand_and_against_scipy():
    z = np.array([0.0, np.log(3), -np.log(3)])  # probabilities 1/2, 3/4, 1/4
    y = np.array([1.0, 0.0, 0.5])
    got = sigmoid_binary_cross_entropy(jnp.asarray(z), jnp.asarray(y))
    expected = [np.log(2), np.log(4), 0.5 * np.log(4) + 0.5 * np.log(4 / 3)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    y = (SOFT > 0.3).astype(np.int32)
    z64 = Z.astype(np.float64)
    np.testing.assert_allclose(
        sigmoid_binary_cross_entropy(jnp.asarray(Z), jnp.asarray(y), 3.0),
        -(3 * y * log_expit(z64) + (1 - y) * log_expit(-z64)),
        rtol=1e-5,
    )


def test_sigmoid_at_extreme_logits():
    z, y = jnp.array([1e4, -1e4, 1e4, -1e4, 0.0]), jnp.array([1, 0, 0, 1, 1])
    losses = sigmoid_binary_cross_entropy(z, y)
    np.testing.assert_allclose(losses, [0, 0, 1e4, 1e4, np.log(2)], rtol=1e-6)
    grad = jax.grad(lambda z: sigmoid_binary_cross_entropy(z, y).sum())(z)
    np.testing.assert_allclose(grad, [0, 0, 1, -1, -0.5])


def test_sigmoid_loss_of_an_example():
    y = (SOFT > 0.3).astype(np.float32)
    elements = np.asarray(sigmoid_binary_cross_entropy(jnp.asarray(Z), jnp.asarray(y)))
    z, y = jnp.asarray(Z), jnp.asarray(y)
    np.testing.assert_allclose(SigmoidBinaryCrossEntropy()(z, y), elements.mean(1), rtol=1e-6)
    weighted = SigmoidBinaryCrossEntropy(class_weights=(1.0, 0.0, 2.0, 5.0))(z, y)
    np.testing.assert_allclose(weighted, elements @ [1, 0, 2, 5] / 8, rtol=1e-5)
    pos = SigmoidBinaryCrossEntropy(pos_weight=(1.0, 2.0, 3.0, 4.0))(z, y)
    by_hand = (elements * np.where(y == 1, [1, 2, 3, 4], 1)).mean(1)
    np.testing.assert_allclose(pos, by_hand, rtol=1e-5)
    # one output per example: [B, 1] and [B] are the same
    np.testing.assert_array_equal(SigmoidBinaryCrossEntropy()(z[:, :1], y[:, 0]), elements[:, 0])
    np.testing.assert_array_equal(SigmoidBinaryCrossEntropy()(z[:, 0], y[:, 0]), elements[:, 0])


def test_squared_error():
    np.testing.assert_array_equal(squared_error(jnp.array([1.0, 2.0]), jnp.array([3, 2])), [4, 0])
    loss = MeanSquaredError()
    mean = loss.mean(jnp.asarray(Z), jnp.asarray(SOFT), jnp.ones(6))
    assert mean.value() == pytest.approx(mean_squared_error(SOFT, Z), rel=1e-6)
    images = jnp.asarray(np.stack([Z, -Z]))[..., None]
    np.testing.assert_allclose(loss(images, jnp.zeros_like(images)), [(Z**2).mean()] * 2, rtol=1e-6)
    np.testing.assert_array_equal(loss(jnp.array([[1.0], [2.0]]), jnp.array([0, 0])), [1, 4])
    assert loss(images.astype(jnp.bfloat16), images).dtype == jnp.float32


def test_a_traced_smoothing():
    a = jnp.array([0.0, 0.3])
    losses = jax.vmap(lambda a: SoftmaxCrossEntropy(label_smoothing=a)(Z, jnp.asarray(Y)))(a)
    np.testing.assert_allclose(losses, [cross_entropy(Z, Y), cross_entropy(Z, Y, 0.3)], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: cross_entropy(Z, Y[:5]), r"\(6, 4\) and int32 labels of shape \(5,\)"),
        (lambda: cross_entropy(Z, SOFT[:, :3]), r"\(6, 4\) and float32 labels of shape \(6, 3\)"),
        (lambda: cross_entropy(Z, Y.astype(np.float32)), r"float32 labels of shape \(6,\)"),
        (lambda: cross_entropy(Z, Y[:, None]), r"\(6, 1\)"),
        (lambda: cross_entropy(Z[:, :1], Y), r"K >= 2"),
        (lambda: SigmoidBinaryCrossEntropy()(jnp.ones((4, 2)), jnp.ones(4)), r"\(4, 2\).*\(4,\)"),
        (lambda: MeanSquaredError()(jnp.ones(4), jnp.ones((4, 1))), r"\(4,\).*\(4, 1\)"),
        (lambda: SoftmaxCrossEntropy(class_weights=(1.0, 2.0))(Z, Y), r"2 class_weights.*\(6, 4\)"),
        (lambda: SoftmaxCrossEntropy(1.0), "label_smoothing=1.0"),
        (lambda: SoftmaxCrossEntropy(class_weights=(1.0, -1.0)), r"\(1.0, -1.0\)"),
        (lambda: SoftmaxCrossEntropy(class_weights=(0.0, 0.0)), "not all of them 0"),
        (lambda: SigmoidBinaryCrossEntropy(-1.0), "pos_weight"),
    ],
)
def test_errors_name_the_shapes(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
