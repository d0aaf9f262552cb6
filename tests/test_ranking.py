"""Rankings: against scikit-learn, with ties and with classes that are empty."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logit, logsumexp, softmax
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from jaxeco import ranking
from jaxeco.ranking import (
    AveragePrecision,
    PrecisionRecallCurve,
    RocAuc,
    RocCurve,
    log_odds,
)

RNG = np.random.default_rng(0)


def binary(n, levels):
    """Scores in ties, and truths."""
    return {"scores": RNG.integers(0, levels, (n, 1)) / 8, "truth": RNG.integers(0, 2, n)}


@pytest.mark.parametrize(("n", "levels"), [(5, 3), (60, 4), (500, 40), (300, 10**6), (9, 1)])
def test_two_classes_against_sklearn(n, levels):
    kept = binary(n, levels)
    kept["truth"][:2] = 0, 1
    truth, scores = kept["truth"], kept["scores"][:, 0]
    assert RocAuc().result(kept) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    expected = average_precision_score(truth, scores)
    assert AveragePrecision().result(kept) == pytest.approx(expected, abs=1e-12)
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    (curve,) = RocCurve(points=400).result(kept)
    np.testing.assert_allclose(curve[: len(true)], np.stack([false, true], 1), atol=1e-12)
    np.testing.assert_array_equal(curve[len(true) :], 1)
    precision, recall, _ = precision_recall_curve(truth, scores)
    (curve,) = PrecisionRecallCurve(points=400).result(kept)
    expected = np.stack([recall, precision], 1)[::-1]
    np.testing.assert_allclose(curve[: len(recall)], expected, atol=1e-12)
    np.testing.assert_array_equal(
        curve[len(recall) :], np.broadcast_to(expected[-1], (400, 2))[len(recall) :]
    )


def test_each_class_against_the_rest():
    scores, truth = RNG.integers(0, 9, (80, 4)), RNG.integers(0, 3, 80)  # nobody is of class 3
    kept = {"scores": scores, "truth": truth}
    for metric, reference in (
        (RocAuc(), roc_auc_score),
        (AveragePrecision(), average_precision_score),
    ):
        expected = np.mean([reference(truth == k, scores[:, k]) for k in range(3)])
        assert metric.result(kept) == pytest.approx(expected, abs=1e-12)
    for metric in (RocCurve(points=50), PrecisionRecallCurve(points=50)):
        curves = metric.result(kept)
        assert curves.shape == (4, 50, 2)
        assert np.isfinite(curves[:3]).all() and np.isnan(curves[3]).all()


def test_by_hand():
    # yes 3, no 2, yes 2, no 1: of the 4 pairs 3 in order and one a tie
    kept = {"scores": np.array([[3.0], [2], [2], [1]]), "truth": np.array([1, 0, 1, 0])}
    assert RocAuc().result(kept) == 3.5 / 4
    assert AveragePrecision().result(kept) == 0.5 * 1 + 0.5 * 2 / 3
    np.testing.assert_array_equal(
        RocCurve(points=5).result(kept), [[[0, 0], [0, 0.5], [0.5, 1], [1, 1], [1, 1]]]
    )
    backwards = {"scores": -kept["scores"], "truth": kept["truth"]}
    assert RocAuc().result(backwards) == 0.5 / 4


def test_what_has_no_answer_is_nan():
    for truth in (np.zeros(5, int), np.ones(5, int)):
        kept = {"scores": np.arange(5.0)[:, None], "truth": truth}
        assert np.isnan(RocAuc().result(kept)) and np.isnan(AveragePrecision().result(kept))
        assert np.isnan(RocCurve().result(kept)).all()
    kept = {"scores": np.array([[np.nan], [1.0], [-9.0]]), "truth": np.array([1, 1, 0])}
    assert RocAuc().result(kept) == 0.5  # NaN ranks below all


def test_a_long_curve_is_thinned_to_points_of_its_own():
    n = 3000
    kept = {"scores": RNG.normal(size=(n, 1)), "truth": RNG.integers(0, 2, n)}
    kept["scores"][:, 0] += 2 * kept["truth"]
    for metric in (RocCurve, PrecisionRecallCurve):
        (whole,), (thin,) = metric(points=n + 1).result(kept), metric(points=100).result(kept)
        assert {tuple(p) for p in thin} <= {tuple(p) for p in whole}
        np.testing.assert_array_equal(thin[[0, -1]], whole[[0, -1]])
        assert np.abs(np.diff(thin, axis=0)).sum(1).max() < 0.06


def test_log_odds():
    z = RNG.normal(size=(50, 4)) * 20
    p = log_softmax(z, -1)
    rest = [logsumexp(np.delete(p, k, axis=1), axis=1) for k in range(4)]
    np.testing.assert_allclose(log_odds(jnp.asarray(z)), p - np.stack(rest, 1), rtol=1e-4)
    two = np.array([[0.0, 30.0], [0.0, 31.0]])  # both have a chance of 1 in float32
    np.testing.assert_array_equal(log_odds(jnp.asarray(two)), [[30], [31]])


def test_what_is_kept_of_a_batch():
    z, y = jnp.array([-1.0, 0.5, 2.0]), jnp.array([0, 1, 1])
    for outputs, truth in (
        (z, y),
        (z, y > 0),
        (z[:, None], y.astype(jnp.float32)),
        (jnp.stack([0 * z, z], 1), y),
        (jnp.stack([0 * z, z], 1), jnp.eye(2)[y]),
    ):
        kept = RocAuc().keep(outputs, truth)
        np.testing.assert_array_equal(kept["scores"], z[:, None])
        np.testing.assert_array_equal(kept["truth"], y)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: RocAuc().keep(jnp.ones((4, 3, 2)), jnp.ones((4, 3), int)), r"\(4, 3, 2\)"),
        (lambda: RocAuc().keep(jnp.ones((4, 3)), jnp.ones(5, int)), r"\(5,\).*\(4, 3\)"),
        (lambda: RocCurve(points=1), "RocCurve.points=1: expected at least 2"),
    ],
)
def test_errors_name_the_shapes(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_scores_do_not_depend_on_the_order_of_classes():
    outputs_BxK = np.random.default_rng(0).integers(0, 4, (200, 5)).astype(np.float32)
    scores_BxK = np.asarray(ranking.log_odds(jnp.asarray(outputs_BxK)))
    order = np.array([3, 0, 4, 2, 1])
    np.testing.assert_array_equal(
        ranking.log_odds(jnp.asarray(outputs_BxK[:, order])), scores_BxK[:, order]
    )
    p_BxK = softmax(outputs_BxK.astype(np.float64), 1)
    np.testing.assert_allclose(scores_BxK, logit(p_BxK), rtol=1e-5, atol=1e-6)
