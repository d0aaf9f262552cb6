"""Pictures: written whole, showing what they should, without touching matplotlib's global state."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from jaxeco import plots
from jaxeco.errors import UserError


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph or a layout that fails is only warned of
        yield


def read(path, mode="L"):
    with Image.open(path) as image:
        return np.asarray(image.convert(mode))


def pixels(path, colour):
    """How many pixels of the picture have exactly this colour, "#rrggbb"."""
    image = read(path, "RGB")
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == wanted).all(-1).sum())


def lines(split, steps, **values):
    return [
        {"step": step, "split": split} | {name: f(step) for name, f in values.items()}
        for step in steps
    ]


def test_curves_show_every_split(tmp_path):
    train = lines("train", range(1, 1000), loss=lambda s: 3 / s, accuracy=lambda s: 1 - 1 / s)
    test = lines("test", (500, 999), loss=lambda s: 4 / s, accuracy=lambda s: 1 - 2 / s)
    blue, orange, green = plots.COLOURS[:3]
    plots.curves(train, tmp_path / "train.png")
    assert pixels(tmp_path / "train.png", blue) > 100
    assert pixels(tmp_path / "train.png", orange) == 0
    plots.curves(train + test, tmp_path / "both.png")
    assert pixels(tmp_path / "both.png", orange) > 100
    assert pixels(tmp_path / "both.png", green) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "train.png"]


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1, "split": "train", "loss": 2.0}],
        lines("train", range(500), loss=lambda s: float("nan") if s > 100 else 1.0),
        lines("train", range(3), loss=lambda s: float("nan")),
        lines("train", range(9), loss=lambda s: 10.0**-s, accuracy=lambda s: 0.5),
        lines("test", (5, 6), error=lambda s: 1.0),
        [x for i in range(9) for x in lines(f"split{i}", (1, 2), accuracy=lambda s: s / 9)],
    ],
    ids=["none", "one", "diverged", "all nan", "decades", "others", "many splits"],
)
def test_curves_of_odd_runs(tmp_path, metrics):
    plots.curves(metrics, tmp_path / "new" / "curves.png")
    height, width = read(tmp_path / "new" / "curves.png").shape
    assert width > 600 and height > 400


@pytest.mark.parametrize("k", [1, 2, 10, 25, 60])
def test_confusion_of_few_and_many_classes(tmp_path, k):
    counts = np.random.default_rng(0).integers(0, 2000, (k, k))
    counts[0] = 0  # a class without examples
    plots.confusion(counts, [f"class {i} " + "x" * i for i in range(k)], tmp_path / "a.png")
    height, width = read(tmp_path / "a.png").shape
    assert 500 < height <= width < 2000


@pytest.mark.parametrize("draw", [plots.roc, plots.precision_recall])
def test_curves_of_classes(tmp_path, draw):
    x = np.linspace(0, 1, 50)
    curves = np.stack([np.stack([x, x ** (1 / (k + 1))], 1) for k in range(14)])
    blue = plots.COLOURS[0]
    draw(curves[:1], ("no", "yes"), tmp_path / "one.png")
    assert pixels(tmp_path / "one.png", blue) > 100
    one = read(tmp_path / "one.png")
    curves[1] = np.nan  # a class without examples
    draw(curves, [f"class {k}" for k in range(14)], tmp_path / "many.png")
    many = read(tmp_path / "many.png")
    assert pixels(tmp_path / "many.png", blue) > 100
    assert (many < 128).sum() > 50 + (one < 128).sum()  # names


def test_curves_show_f1_where_it_was_measured(tmp_path):
    plots.curves(lines("test", (1, 2), loss=lambda s: 1 / s), tmp_path / "a.png")
    both = lines("test", (1, 2), loss=lambda s: 1 / s, macro_f1=lambda s: s / 3)
    plots.curves(both, tmp_path / "b.png")
    assert read(tmp_path / "b.png").shape[1] > 1.8 * read(tmp_path / "a.png").shape[1]


def test_a_perfect_confusion_matrix_is_dark_on_its_diagonal_alone(tmp_path):
    plots.confusion((np.eye(4, dtype=int) * 50).tolist(), (), tmp_path / "a.png")
    image = read(tmp_path / "a.png")[:, :520]  # without the scale
    dark = image < 90
    upper, lower = np.split(dark[: len(dark) // 2 * 2], 2)
    left, right = slice(0, 290), slice(310, 520)
    assert upper[:, left].sum() > 5 * upper[:, right].sum()
    assert lower[:, right].sum() > 5 * lower[:, left].sum()


@pytest.mark.parametrize("shape", [(40, 8, 8, 3), (40, 8, 8, 1), (5, 8, 12), (1, 4, 4, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_examples_are_coloured_right_and_wrong(tmp_path, shape, dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, shape).astype(dtype) - (0 if dtype == np.uint8 else 100)
    n = len(x)
    labels = rng.integers(0, 3, n)
    names = ("cat", "dog", "a name that is far too long for its place")
    p = np.full(n, 0.5)
    plots.examples(x, labels, labels, p, names, tmp_path / "right.png", columns=3, rows=2)
    plots.examples(x, labels, (labels + 1) % 3, p, names, tmp_path / "wrong.png", columns=2)
    assert pixels(tmp_path / "right.png", plots.RIGHT) > 20
    assert pixels(tmp_path / "right.png", plots.WRONG) == 0
    assert pixels(tmp_path / "wrong.png", plots.WRONG) > 20
    assert pixels(tmp_path / "wrong.png", plots.RIGHT) == 0


def test_uint8_keeps_its_brightness_and_floats_are_stretched(tmp_path):
    grey = np.full((1, 8, 8, 3), 100, np.uint8)
    plots.examples(np.repeat(grey, 40, 0), [0] * 40, [0] * 40, [1.0] * 40, (), tmp_path / "a.png")
    assert read(tmp_path / "a.png").shape == (1404, 1170)  # six by six
    assert pixels(tmp_path / "a.png", "#646464") > 10_000
    halves = np.concatenate([np.full((1, 8, 8, 1), -2.0), np.full((1, 8, 8, 1), 3.0)])
    plots.examples(halves, [0, 0], [0, 0], [1, 1], (), tmp_path / "b.png")
    assert pixels(tmp_path / "b.png", "#000000") > 10_000


def test_no_examples(tmp_path):
    plots.examples(np.zeros((0, 8, 8, 3), np.uint8), [], [], [], (), tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot write .*curves.png: (Not a directory|File exists)"
    ):
        plots.curves([], tmp_path / "file" / "curves.png")


def test_no_global_state():
    script = """
import sys
from jaxeco import plots
assert "matplotlib" not in sys.modules
import io, tempfile, pathlib
plots.curves([], pathlib.Path(tempfile.mkdtemp()) / "a.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
