"""Metrics: against scikit-learn, and exact under padding and under any cut into batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import (
    confusion_matrix,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)

from jaxeco.metrics import (
    F1,
    Accuracy,
    BitsPerByte,
    ConfusionMatrix,
    Mean,
    PerClassAccuracy,
    Perplexity,
    Precision,
    Recall,
    SequenceAccuracy,
    TopK,
    cross_entropy,
)

K = 5
ALL = [Accuracy(), TopK(2), PerClassAccuracy(K), ConfusionMatrix(K), F1("macro")]
IDS = [m.name for m in ALL]


def data(n=101, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, K)).astype(np.float32), rng.integers(0, K, n).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def compiled(metric, z, y, mask):
    return metric(z, y, mask)


def run(metric, z, y, mask=None):
    mask = np.ones(y.shape[:1]) if mask is None else mask
    return compiled(metric, np.float32(z), y, np.float32(mask))


def test_mean_by_hand():
    mean = Mean.of(jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 0.5, 0.0]))
    assert (float(mean.total), float(mean.weight)) == (2.0, 1.5)
    assert mean.value() == 2 / 1.5 and isinstance(mean.value(), float)
    assert (mean + Mean(1.0, 0.5)).value() == 1.5


def test_mean_of_nothing_is_nan_entry_by_entry():
    assert np.isnan(Mean(0.0, 0.0).value())
    np.testing.assert_array_equal(
        Mean(np.array([1, 0, 0]), np.array([2, 0, 1])).value(), [0.5, np.nan, 0]
    )


def test_mean_divides_in_float64():
    third = Mean(jnp.float32(1), jnp.float32(3)).value()
    assert third == 1 / 3 and third != float(np.float32(1 / 3))


def test_a_masked_value_does_not_matter_even_if_nan():
    values, mask = jnp.array([1.0, jnp.nan, jnp.inf]), jnp.array([1.0, 0.0, 0.0])
    assert Mean.of(values, mask).value() == 1.0
    grad = jax.grad(lambda v: Mean.of(v, mask).total)(values)
    np.testing.assert_array_equal(grad, [1, 0, 0])


def test_one_weight_per_example_counts_for_all_its_positions():
    mean = Mean.of(jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([1.0, 0.0]))
    assert (float(mean.total), float(mean.weight)) == (4.0, 2.0)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 3\)"):
        Mean.of(jnp.ones((2, 3)), jnp.ones(3))


def test_against_sklearn():
    z, y = data()
    labels = list(range(K))
    matrix = confusion_matrix(y, z.argmax(1), labels=labels)
    assert run(Accuracy(), z, y).value() == pytest.approx((z.argmax(1) == y).mean(), abs=1e-12)
    for k in (1, 2, 4):
        expected = top_k_accuracy_score(y, z, k=k, labels=labels)
        assert run(TopK(k), z, y).value() == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(
        run(PerClassAccuracy(K), z, y).value(), recall_score(y, z.argmax(1), average=None)
    )
    confusion = run(ConfusionMatrix(K), z, y)
    np.testing.assert_array_equal(confusion.total, matrix)
    np.testing.assert_allclose(
        confusion.value(), confusion_matrix(y, z.argmax(1), labels=labels, normalize="true")
    )


def test_confusion_by_hand():
    z = np.eye(3)[[0, 1, 1, 0]]  # given: 0 1 1 0
    confusion = run(ConfusionMatrix(3), z, np.array([0, 0, 1, 1]))
    np.testing.assert_array_equal(confusion.total, [[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(confusion.weight, [[2], [2], [0]])
    np.testing.assert_array_equal(confusion.value(), [[0.5, 0.5, 0], [0.5, 0.5, 0], [np.nan] * 3])


@pytest.mark.parametrize("metric", ALL, ids=IDS)
def test_batches_with_padding_add_up_to_the_whole(metric):
    z, y = data()
    whole = run(metric, z, y)
    for batch in (7, 128):
        parts = Mean(0, 0)
        for i in range(0, len(y), batch):
            n = len(y[i : i + batch])
            padded = np.full((batch, K), np.nan, np.float32)
            padded[:n] = z[i : i + n]
            truth = np.resize(y[i : i + n], batch)
            parts += jax.device_get(run(metric, padded, truth, np.arange(batch) < n))
        for got, expected in zip(parts, whole, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("metric", [ALL[0], ALL[3]], ids=[IDS[0], IDS[3]])
def test_soft_labels_and_further_axes_and_uncompiled(metric):
    z, y = data(12)
    expected = run(metric, z, y)
    mask = jnp.ones(4)
    for other in (
        run(metric, z, np.eye(K, dtype=np.float32)[y] * 0.5 + 0.1),
        run(metric, z.reshape(4, 3, K), y.reshape(4, 3), mask),
        run(metric, z.reshape(4, 3, K), y.reshape(4, 3), jnp.ones((4, 3))),
        metric(jnp.asarray(z), jnp.asarray(y), jnp.ones(12)),  # uncompiled
        run(metric, z, y.astype(np.uint8)),
    ):
        for got, want in zip(other, expected, strict=True):
            np.testing.assert_array_equal(got, want)
            assert got.dtype == jnp.float32


def test_ties_go_to_the_earlier_class():
    z = np.zeros((K, K))  # all equal: the first k classes are "the k largest"
    y = np.arange(K)
    assert run(Accuracy(), z, y).value() == 1 / K
    assert run(TopK(3), z, y).value() == 3 / K
    assert run(TopK(K), z, y).value() == 1
    rng = np.random.default_rng(1)
    z, y = rng.integers(0, 3, (200, K)).astype(np.float32), rng.integers(0, K, 200)
    for k in (1, 3):
        chosen = np.asarray(jax.lax.top_k(z, k)[1])
        assert run(TopK(k), z, y).total == (chosen == y[:, None]).any(1).sum()
    assert run(TopK(1), z, y).total == run(Accuracy(), z, y).total == (z.argmax(1) == y).sum()


def test_nan_and_labels_that_are_no_class_are_wrong():
    z = np.array([[np.nan, 1, 0], [np.nan, 1, 0], [np.nan] * 3, [-3, -2, -1], [-3, -2, -1]])
    y = np.array([0, 1, 0, 3, -1])
    assert run(Accuracy(), z, y).total == 0
    assert run(TopK(3), z, y).total == 1  # of the second, whose own output is a number
    assert run(PerClassAccuracy(3), z, y).total.sum() == 0
    assert run(ConfusionMatrix(3), z, y).weight.sum() == 3


def test_inside_shard_map():
    z, y = data(32)
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("data",))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.jit(
        jax.shard_map(
            lambda z, y, mask: jax.lax.psum([m(z, y, mask) for m in ALL], "data"),
            mesh=mesh,
            in_specs=(spec, spec, spec),
            out_specs=jax.sharding.PartitionSpec(),
        )
    )(z, y, np.ones(32, np.float32))
    for metric, sums in zip(ALL, sharded, strict=True):
        for got, want in zip(sums, run(metric, z, y), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: run(Accuracy(), np.ones((4, 3)), np.zeros(5, int)), r"\(5,\).*\(4, 3\)"),
        (lambda: run(Accuracy(), np.ones((4, 3)), np.zeros(4)), r"soft labels of shape \(4,\)"),
        (lambda: run(Accuracy(), np.ones((4, 3)), np.zeros((4, 2))), r"\(4, 2\).*\(4, 3\)"),
        (lambda: run(Accuracy(), np.ones((4, 1)), np.zeros(4, int)), r"\(4, 1\).*classes >= 2"),
        (lambda: run(Accuracy(), np.ones((4, 3)), np.zeros(4, int), np.ones(3)), r"\(3,\).*\(4,\)"),
        (lambda: run(TopK(5), np.ones((4, 3)), np.zeros(4, int)), r"TopK\(5\).*\(4, 3\)"),
        (lambda: run(ConfusionMatrix(4), np.ones((4, 3)), np.zeros(4, int)), r"\(4, 3\)"),
        (lambda: run(PerClassAccuracy(4), np.ones((4, 3)), np.zeros(4, int)), r"\(4, 3\)"),
        (lambda: TopK(0), "TopK.k=0"),
    ],
)
def test_errors_name_the_shapes(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)


def test_names():
    expected = ["accuracy", "top2", "per_class_accuracy", "confusion_matrix", "macro_f1"]
    assert expected == IDS
    assert [m("binary").name for m in (Precision, Recall, F1)] == ["precision", "recall", "f1"]


def test_cross_entropy_of_a_large_vocabulary():
    rng = np.random.default_rng(2)
    z, y = rng.normal(size=(3, 2, 50_000)).astype(np.float32) * 5, rng.integers(0, 50_000, (3, 2))
    expected = -np.take_along_axis(log_softmax(np.float64(z), -1), y[..., None], -1)[..., 0]
    np.testing.assert_allclose(jax.jit(cross_entropy)(z, y), expected, rtol=1e-6)
    far = z + np.float32(2**14)  # exact in float32 up to 2^-10
    expected = -np.take_along_axis(log_softmax(np.float64(far), -1), y[..., None], -1)[..., 0]
    np.testing.assert_allclose(jax.jit(cross_entropy)(far, y), expected, rtol=1e-6)
    # -1 is not the last class; and uint8 will do for labels of more than 256 classes
    assert np.isnan(cross_entropy(z[0, :, :3], np.array([-1, 3]))).all()
    assert np.isfinite(cross_entropy(z[0, :, :300], np.array([7, 255], np.uint8))).all()


def test_perplexity():
    z, y = data()
    expected = np.exp(log_loss(y, softmax(np.float64(z), -1), labels=range(K)))
    assert Perplexity().result(run(Perplexity(), z, y)) == pytest.approx(expected, rel=1e-6)
    uniform = run(Perplexity(), np.zeros((4, 3, K)), np.zeros((4, 3), int), np.ones((4, 3)))
    assert Perplexity().result(uniform) == pytest.approx(K, rel=1e-6)


class Words:
    """A tokenizer's description whose tokens stand for 0, 1, 1, 2 and 4 bytes."""

    def open(self):
        return self

    def token_bytes(self):
        return np.array([0, 1, 1, 2, 4], np.int32)


def test_bits_per_byte():
    metric = BitsPerByte(Words())
    z, y = np.zeros((2, 3, 8)), np.array([[0, 4, 3], [1, 2, 7]])  # 3 bits each; 7: room to spare
    sums = run(metric, z, y, np.array([[1, 1, 1], [1, 1, 0]]))
    assert metric.result(sums) == pytest.approx(15 / 8, rel=1e-6)
    parts = run(metric, z[:1], y[:1]) + run(metric, z[1:], y[1:], np.array([[1, 1, 0]]))
    assert metric.result(parts) == pytest.approx(15 / 8, rel=1e-6)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) are fewer than the tokenizer's 5 tokens"):
        run(metric, z[..., :4], y)


def test_a_sequence_is_right_if_all_that_counts_of_it_is():
    y = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 2], [2, 1, 0]])
    z = np.eye(3)[np.array([[0, 1, 2], [0, 1, 0], [1, 1, 2], [0, 0, 0]])]
    weights = np.array([[1, 1, 1], [1, 2, 0], [1, 1, 1], [0, 0, 0]])
    sums = run(SequenceAccuracy(), z, y, weights)
    assert (float(sums.total), float(sums.weight)) == (2, 3)  # the last has nothing that counts
    sums = run(SequenceAccuracy(), z, y, np.array([1, 1, 0, 1]))
    assert (float(sums.total), float(sums.weight)) == (1, 3)
    assert run(SequenceAccuracy(), z[:, 0], y[:, 0]).value() == 0.5  # of one position: accuracy


@pytest.mark.parametrize("average", ["binary", "macro", "micro"])
def test_counted_metrics_against_sklearn(average):
    rng = np.random.default_rng(3)
    k = 2 if average == "binary" else 6
    for case in range(4):
        z = rng.normal(size=(40, k)).astype(np.float32)
        y = rng.integers(0, k, 40)
        mask = (rng.random(40) < 0.8).astype(np.float32)
        if case == 1:  # class 2 is neither true nor given, class 3 never true, class 0 never given
            z[:, 2 % k], z[:, 0] = -9, -9
            y[y == 2], y[y == 3] = 1, 1
        if case == 2:
            y[:] = 0
        weights = mask * (rng.integers(1, 4, 40) if case == 3 else 1)
        given, kept = z.argmax(1), mask > 0
        for metric, reference in (
            (Precision(average), precision_score),
            (Recall(average), recall_score),
            (F1(average), f1_score),
        ):
            expected = reference(
                y[kept], given[kept], average=average, sample_weight=weights[kept], zero_division=0
            )
            got = metric.result(run(metric, z, y, weights))
            assert got == pytest.approx(expected, abs=1e-12), (metric, case)
    nothing = run(F1(average), z, y, 0 * mask)
    assert np.isnan(F1(average).result(nothing))


def test_a_model_with_one_output_says_yes_above_0():
    z, y = np.array([-1.0, 0.0, 2.0, 3.0]), np.array([0, 1, 1, 0])
    for outputs in (z, z[:, None], np.stack([0 * z, z], 1)):
        for truth in (y, y.astype(np.int8)) if outputs.ndim == 2 else (y, y > 0, y.astype(float)):
            assert F1("binary").result(run(F1("binary"), outputs, truth)) == 0.5
    with pytest.raises(ValueError, match=r"average='binary'.*\(4, 3\) are not of 2 classes"):
        run(F1("binary"), np.ones((4, 3)), y)
    with pytest.raises(ValueError, match=r"Recall.average='weighted': expected binary"):
        Recall("weighted")
