"""What scripts/bench_growth.py computes of its measurements: slopes and their spread."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

SCRIPTS = str(Path(__file__).parent.parent / "scripts")


@pytest.fixture(scope="module")
def growth():
    """The script, which sets up JAX when it is run: here that has been done."""
    from jaxeco import runtime

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        patch.setattr(runtime, "configure", lambda: None)
        import bench_growth

        yield bench_growth


def curve(growth, x, y, name="GPT"):
    return growth.Curve("step time", "ms", "batch", "examples", name, 1, x, y)


def test_a_power_is_found_exactly(growth):
    x = [2.0, 3.0, 7.0, 100.0]
    fit = growth.fitted(x, [5 * value**1.5 for value in x])
    assert fit.slope == pytest.approx(1.5) and fit.scale == pytest.approx(5)
    assert fit.spread == pytest.approx(0, abs=1e-9)


def test_slope_and_spread_are_those_of_least_squares(growth):
    noise = np.random.default_rng(0)
    x = np.array([1, 2, 4, 8, 16, 64], float)
    y = 0.3 * x**0.8 * np.exp(noise.normal(0, 0.2, len(x)))
    fit = growth.fitted(x, y)
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    assert fit.slope == pytest.approx(slope) and math.log(fit.scale) == pytest.approx(intercept)
    theirs = scipy.stats.linregress(np.log(x), np.log(y))
    assert fit.spread == pytest.approx(theirs.stderr) and fit.spread > 0.01


def test_two_points_have_a_slope_and_no_spread(growth):
    fit = growth.fitted([1, 10], [4, 40])
    assert fit.slope == pytest.approx(1) and math.isnan(fit.spread)


def test_the_table_has_medians_and_the_last_slope(growth):
    # a constant of 1 ms hides the square at small sizes; one repeat went wrong
    x = (1.0, 10.0, 100.0, 1000.0)
    y = [(1 + 1e-3 * size**2,) * 2 + (1e9,) for size in x]
    results = {"step": {"with": {"command": "c", "device": "d", "versions": "v"}, "curves": []}}
    results["step"]["curves"] = [growth.asdict(curve(growth, x, y))]
    (row,) = [line for line in growth.table(results).splitlines() if "GPT" in line]
    cells = [cell.strip() for cell in row.split("|")]
    assert "batch 1 to 1,000 examples" in cells and "1 to 1,001 ms" in cells
    assert "1.96" in cells  # log10(1001 / 11)
    assert cells[-3:-1] == ["1", "3"]  # the work's power, n


def test_the_picture_is_drawn(growth, tmp_path):
    y = [(1.0, 2.0, 4.0), (3.0, 5.0, 5.0)]
    both = [curve(growth, (1, 2), y, name) for name in ("GPT", "MLP")]
    growth.draw(both, tmp_path / "new/growth.png")
    assert (tmp_path / "new/growth.png").read_bytes().startswith(b"\x89PNG")
