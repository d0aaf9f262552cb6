"""The report: what the page says of runs' folders that are written by hand, and what it does."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxeco import report
from jaxeco.errors import UserError
from jaxeco.markup import number, tag

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HASH = "0123456789abcdef"


def evaluation(step: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "split": "test", "time": step / 10, "loss": 1 - accuracy,
            "accuracy": accuracy, **more}  # fmt: skip


def leave(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    *words: str,
    name: str = "tiny",
    seed: int = 0,
    of: int | None = None,
    ended: bool = True,
    patience: int | None = None,
    session: Mapping[str, Any] | None = None,
) -> None:
    """Writes a run's folder. Words such as lr=0.1 are fields of its experiment, too."""
    fields = dict(word.split("=", 1) for word in words)
    resolved = {"type": "Experiment", "name": name, "seed": seed, "best": "test/accuracy",
                "patience": patience, **fields}  # fmt: skip
    data = {"name": "ten dots", "examples": 10, "fingerprint": HASH, "classes": ["cat", "dog"]}
    usual = {"started": "2026-01-01T00:00:00+0000", "command": [], "python": "3.11.7",
             "platform": "Linux", "git": "abc", "versions": {"jax": "0.10.2"}, "hosts": ["one"],
             "code": {"experiment": HASH, "jaxeco": HASH}, "devices": ["cpu:0 cpu", "cpu:1 cpu"],
             "data": {"train": data, "test": data}}  # fmt: skip
    record = {"file": "tiny.py", "assignments": [*words, f"seed={seed}"], "resolved": resolved,
              "sessions": [{**usual, **(session or {})}]}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ended:
        step = lines[-1]["step"]
        found = [x for x in lines if x["split"] == "test"]
        best = max(found, key=lambda line: (line["accuracy"], line["step"]))
        result = {"step": step, "of": of or step, "seed": seed, "seconds": lines[-1]["time"]}
        result["best"] = {"step": best["step"], "test/accuracy": best["accuracy"]}
        (folder / "result.json").write_text(json.dumps(result))


class Page(HTMLParser):
    """A page's tables by caption, as rows of texts; its tags, and the texts of its scripts."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._rows: list[list[str]] = []
        self._within: list[str] = []
        self._caption = ""
        self.feed(self.source)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))
        self._within.append(name)
        if name == "table":
            self._rows = []
        if name == "tr":
            self._rows.append([])
        if name in ("td", "th"):
            self._rows[-1].append("")
        if name == "script":
            self.scripts.append("")

    def handle_endtag(self, name: str) -> None:
        while self._within and self._within.pop() != name:
            pass
        if name == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, text: str) -> None:
        inner = self._within[-1] if self._within else ""
        if inner == "caption":
            self._caption = text
        elif inner in ("td", "th"):
            self._rows[-1][-1] += text
        elif inner == "script":
            self.scripts[-1] += text
        else:
            self.words.append(text)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])

    def column(self, caption: str, name: str) -> list[str]:
        head, *rows = self.tables[caption]
        return [row[head.index(name)] for row in rows]


Report = Callable[..., Page]


@pytest.fixture
def reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Report:
    """Makes the page of all runs in tmp_path/runs."""

    def make(*words: str) -> Page:
        output = tmp_path / "report.html"
        assert report.main([str(tmp_path / "runs"), "-o", str(output), *words]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{output}: ") and said.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "runs"]
        return Page(output)

    return make


def test_settings_are_summarised_and_the_best_comes_first(tmp_path: Path, reported: Report) -> None:
    for seed, accuracy in enumerate((0.5, 0.52, 0.54)):
        leave(tmp_path / "runs" / f"a{seed}", [evaluation(10, accuracy)], "lr=0.1", seed=seed)
    for seed, accuracy in enumerate((0.90, 0.94)):
        leave(tmp_path / "runs" / f"b{seed}", [evaluation(10, accuracy)], "lr=0.3", seed=seed)
    leave(tmp_path / "runs" / "c", [evaluation(10, 0.7)], "lr=1")

    page = reported()

    assert page.column("Settings", "setting") == ["tiny lr=0.3", "tiny lr=1", "tiny lr=0.1"]
    assert page.column("Settings", "runs") == ["2", "1", "3"]
    # sd of 0.90 and 0.94: sqrt(2) * 0.02
    assert page.column("Settings", "test/accuracy") == ["0.920 ± 0.028", "0.7", "0.520 ± 0.020"]
    # t of 2 and of 1 degrees: 4.30265 * 0.02 / sqrt(3) = 0.04968; 12.7062 * 0.02 = 0.2541
    intervals = ["0.6659 to 1.1741", "", "0.4703 to 0.5697"]
    assert page.column("Settings", "95 % interval") == intervals
    assert ("th", {"scope": "col", "aria-sort": "descending"}) in page.tags
    assert "6 runs of 3 settings; by test/accuracy, highest first" in "".join(page.words)
    assert any("a single run" in words and "tiny lr=1" in words for words in page.words)
    assert page.tables["Where settings of tiny differ"] == [
        ["setting", "lr"], ["tiny lr=0.3", "0.3"], ["tiny lr=1", "1"], ["tiny lr=0.1", "0.1"],
    ]  # fmt: skip


def test_of_a_loss_the_lowest_comes_first(tmp_path: Path, reported: Report) -> None:
    for lr, accuracy in (("0.1", 0.5), ("0.3", 0.9)):
        leave(tmp_path / "runs" / lr, [evaluation(10, accuracy)], f"lr={lr}")
    page = reported("--metric", "test/loss")
    assert page.column("Settings", "test/loss") == ["0.1", "0.5"]
    assert ("th", {"scope": "col", "aria-sort": "ascending"}) in page.tags


def test_how_runs_ended_is_told_and_what_diverged_is_not_in_the_mean(
    tmp_path: Path, reported: Report
) -> None:
    runs = tmp_path / "runs"
    leave(runs / "0 complete", [evaluation(10, 0.8)], seed=0)
    stalling = [evaluation(2, 0.6), evaluation(4, 0.6), evaluation(6, 0.5)]
    leave(runs / "1 stopped early", stalling, seed=1, of=10, patience=2)
    leave(runs / "2 interrupted", [evaluation(5, 0.6)], seed=2, of=10)
    leave(runs / "3 diverged", [evaluation(5, 0.1)], seed=3, ended=False)
    (runs / "3 diverged" / "diverged").mkdir()
    leave(runs / "4 unfinished", [evaluation(5, 0.4)], seed=4, ended=False)
    leave(runs / "5 unfinished", [evaluation(5, 0.1)], seed=5)  # ended once, then it went on
    with (runs / "5 unfinished" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(6, 0.2)) + "\n")
    leave(runs / "6 unfinished", [], seed=6, ended=False)

    page = reported()

    for path, ended in zip(page.column("Runs", "run"), page.column("Runs", "ended"), strict=True):
        assert Path(path).name.split(" ", 1)[1] == ended
    # patience is one of the settings, so that there are two; 0.8, 0.6, 0.4 and 0.2 have a mean of
    # 0.5 and an sd of sqrt((0.09 + 0.01 + 0.01 + 0.09) / 3)
    by_setting = dict(zip(*(page.column("Settings", c) for c in ("runs", "test/accuracy"))))
    assert by_setting == {"4 of 6": "0.50 ± 0.26", "1": "0.5"}
    for said in (
        "1 of 6 runs diverged: left",
        "1 of 6 runs interrupted:",
        "3 of 6 runs unfinished:",
    ):
        assert any(said in words for words in page.words)


def test_a_setting_whose_runs_ran_on_other_code_is_warned_of(
    tmp_path: Path, reported: Report
) -> None:
    code = {"code": {"experiment": HASH, "jaxeco": "f" * 16}, "git": "def"}
    leave(tmp_path / "runs" / "a", [evaluation(10, 0.8)])
    leave(tmp_path / "runs" / "b", [evaluation(10, 0.8)], session=code)
    page = reported()
    warnings = [words for words in page.words if words.startswith("tiny:")]
    assert warnings == [
        "tiny: of seed 0 only the last run counts",
        "tiny: its runs differ in code.jaxeco",
        "tiny: a single run: nothing tells how sure its numbers are",
    ]
    head, *rows = page.tables["Where runs differ"]
    assert head == ["run", "runs", "git", "code.jaxeco"]
    assert [row[1:] for row in rows] == [["1", "abc", HASH], ["1", "def", "f" * 16]]
    common = dict(row for row in page.tables["The same for all runs"])
    assert common["devices"] == "2 x cpu" and "code.experiment" in common


EVIL = "</script><script>alert(1)</script><!--"


def test_nothing_in_a_file_becomes_markup(tmp_path: Path, reported: Report) -> None:
    matrix = {"confusion_matrix": [[3, 1], [0, 2]]}
    data = {"name": EVIL, "examples": 1, "fingerprint": "\"'&", "classes": [EVIL, '" onload="x']}
    folder = tmp_path / "runs" / "<b>&amp;"
    word = 'note="a\'b"<i>'
    leave(folder, [evaluation(1, 0.5, **matrix, **{f"{EVIL}x": 1.0})], word, name=EVIL,
          session={"data": {"test": data, "train": data}})  # fmt: skip
    (folder / "samples.txt").write_text(EVIL + "😀")

    page = reported()

    names = [name for name, _ in page.tags]
    assert names.count("script") == 2 and not {"b", "i"} & set(names)
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert page.column("Runs", "run") == [str(folder)]
    assert page.column("Runs", "words") == [word]
    assert page.column("Settings", "setting") == [EVIL]
    assert page.data["settings"][0]["label"] == EVIL
    assert any(words.startswith(EVIL) and words.endswith("😀") for words in page.words)


def test_the_page_may_run_its_own_script_and_load_nothing(tmp_path: Path, reported: Report) -> None:
    leave(tmp_path / "runs" / "a", [evaluation(10, 0.8)])
    page = reported()
    rules = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    allowed = dict(rule.strip().split(" ", 1) for rule in str(rules[0]).split(";"))
    assert allowed == {"default-src": "'none'", "img-src": "data:",
                       "style-src": "'unsafe-inline'",
                       "script-src": f"'sha256-{digest}'"}  # fmt: skip
    sources = [a[k] for _, a in page.tags for k in ("src", "href") if k in a]
    assert all(str(source).startswith(("data:", "#")) for source in sources)
    assert "@import" not in page.source and "url(" not in page.source


def test_what_is_no_number_leaves_a_gap(tmp_path: Path, reported: Report) -> None:
    leave(tmp_path / "runs" / "a", [evaluation(1, 0.5), evaluation(2, 0.75)])
    lines = [*map(json.dumps, [evaluation(1, float("nan")), evaluation(2, float("inf"))]),
             '{"step": 3, "split": "test", "time": 1, "accuracy": null}',
             '{"step": 4, "spl']  # fmt: skip
    leave(tmp_path / "runs" / "b", [evaluation(3, 0.5)], seed=1)
    (tmp_path / "runs" / "b" / "metrics.jsonl").write_text("\n".join(lines))
    page = reported()
    curve = page.data["settings"][0]["curves"]["test/accuracy"]
    assert page.data["grids"][curve["grid"]] == [1, 2, 3]
    assert curve["mean"] == [0.5, 0.75, None] and curve["n"] == [1, 1, 0]
    assert page.column("Settings", "test/accuracy") == ["nan"]
    assert page.column("Runs", "test/accuracy") == ["0.7500", "nan"]


def test_a_band_is_over_the_runs_that_came_so_far() -> None:
    curves = [{10: 1.0, 20: 2.0, 30: 6.0}, {10: 3.0, 15: 9.0, 20: 4.0}, {10: 2.0, 20: 3.0, 30: 4.0}]
    steps, band = report.banded(curves, 100)
    assert steps == (10, 20, 30)  # at 15 one of three was evaluated
    assert band == {"mean": [2, 3, 5], "low": [1, 2, 4], "high": [3, 4, 6], "n": [3, 3, 2]}
    assert report.banded([{1: 5.0}], 100) == ((1,), {"mean": [5], "n": 1})
    # nothing in common: all there is
    assert report.banded([{1: 5.0, 3: 5.0}, {2: 7.0, 4: 7.0}], 100)[0] == (1, 2, 3, 4)


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    steps, band = report.banded([{step: step / 2 for step in range(1, 10_001)}], 300)
    assert len(steps) == len(band["mean"]) == 300
    assert (steps[0], steps[-1]) == (1, 10_000)
    assert np.diff(steps).min() >= 33 and np.diff(steps).max() <= 34
    assert band["mean"] == [step / 2 for step in steps]


def test_many_runs_make_a_small_page(tmp_path: Path, reported: Report) -> None:
    values = np.random.default_rng(0).random(100).tolist()
    matrix = np.eye(10, dtype=int).tolist()
    for i in range(64):
        lines = [evaluation(t, v + i, confusion_matrix=matrix) for t, v in enumerate(values, 1)]
        train = [{**line, "split": "train", "data_wait": 0.0} for line in lines]
        leave(tmp_path / "runs" / f"{i}", [*train, *lines], f"lr={i}")
    page = reported()
    assert len(page.tables["Runs"]) == 1 + 64
    assert len(page.source) < 700_000
    assert len(page.data["grids"]) == 1  # which all curves share


def test_all_curves_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ALL_POINTS", 200)
    curve = {step: 0.0 for step in range(100)}
    run = SimpleNamespace(seed=0, ended="complete")
    curves = {"test/loss": curve, "train/loss": curve}
    told = [SimpleNamespace(run=run, curves=curves) for _ in range(4)]
    settings: Any = [report.Setting(f"{i}", [told[i]]) for i in range(4)]  # type: ignore[list-item]
    drawn = report.drawn(settings, "test/loss")
    lengths = {len(c["mean"]) for s in drawn["settings"] for c in s["curves"].values()}
    assert lengths == {25}


def test_matrices_are_means_over_runs_and_named_by_class(tmp_path: Path, reported: Report) -> None:
    for seed, matrix in enumerate(([[4, 0], [1, 3]], [[2, 2], [0, 4]])):
        lines = [evaluation(9, 0.5, confusion_matrix=[[9, 9], [9, 9]]),
                 evaluation(10, 0.5, confusion_matrix=matrix)]  # fmt: skip
        leave(tmp_path / "runs" / f"{seed}", lines, seed=seed)
    page = reported()
    (rows,) = [rows for caption, rows in page.tables.items() if caption.startswith("Truth by row")]
    assert rows == [["", "cat", "dog"], ["cat", "3", "1"], ["dog", "0.5", "3.5"]]
    # 0.5 of 4 is an eighth, and the shade its root
    assert ("td", {"style": "--shade:0.35", "title": "dog taken for cat: 12.5%"}) in page.tags


def test_pictures_lie_in_the_page_scaled_down(tmp_path: Path, reported: Report) -> None:
    from PIL import Image

    folder = tmp_path / "runs" / "a"
    leave(folder, [evaluation(10, 0.8)])
    Image.new("RGB", (3000, 1500), "red").save(folder / "examples.png")
    (folder / "roc.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    page = reported()
    (source,) = [str(a["src"]) for name, a in page.tags if name == "img"]
    kind, contents = source.split(",", 1)
    assert kind == "data:image/webp;base64"
    (tmp_path / "runs" / "out.webp").write_bytes(base64.b64decode(contents))
    with Image.open(tmp_path / "runs" / "out.webp") as image:
        assert image.size == (1000, 500)
        assert np.abs(np.asarray(image, int)[250, 500] - (255, 0, 0)).max() < 8


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere"], "no such folder"),
        (["."], "holds no run"),
        (["runs", "-o", "."], "is a folder: expected a file, such as report.html"),
        (["runs", "-o", "no/such.html"], "cannot write no/such.html: No such file or directory"),
        (["runs", "--metric", "test/f1"], "no run has measured 'test/f1': expected one of test/lo"),
        ([], "required"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "runs" in words:
        leave(Path("runs/a"), [evaluation(10, 0.8)])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        report.main(words)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_needs_no_jax() -> None:
    heavy = "jax", "scipy", "PIL"
    code = f"import jaxeco.report, sys; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_numbers_and_tags() -> None:
    shown = {1200: "1,200", 0.97312: "0.9731", 0.0: "0.0000", 3.21e-6: "3.21e-06", 1e5: "1e+05"}
    assert {value: number(value) for value in shown} == shown
    assert tag("a", "<", 3, None, ["x", tag("br")], href='"', hidden=True, id=None) == (
        '<a href="&quot;" hidden>&lt;3x<br></a>'
    )


# In a browser


def browsed(path: Path, *options: str) -> str:
    """The document of a page after its scripts have run."""
    own = f"--user-data-dir={path.parent / 'profile'}"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", own, *options,
               "--dump-dom", path.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_in_a_browser_tables_sort_and_filter_and_curves_follow(
    tmp_path: Path, reported: Report
) -> None:
    for lr, best in (("0.1", 0.5), ("0.3", 0.9), ("1", 0.7)):
        for seed in (0, 1):
            lines = [evaluation(10, best / 2), evaluation(20, best + 0.01 * seed)]
            leave(tmp_path / "runs" / f"{lr} {seed}", lines, f"lr={lr}", seed=seed)
    page = reported()

    whole = browsed(tmp_path / "report.html")  # as it is: what the page allows itself is enough
    assert whole.count('class="mean"') == 3 and "0.9050 (0.9000 to 0.9100, n = 2)" in whole

    (tmp_path / "tried.html").write_text(
        re.sub("<meta http-equiv[^>]*>", "", page.source)
        + """<script>{
        const said = {}, table = document.querySelector("#settings table");
        const shown = () => [...table.tBodies[0].rows].filter((row) => !row.hidden)
          .map((row) => row.cells[0].textContent);
        const legend = () => [...document.querySelectorAll("#panels figure:first-child li span")]
          .map((span) => span.textContent);
        const values = () => [...document.querySelectorAll("#panels data")]
          .map((data) => data.textContent);
        const sort = table.tHead.rows[0].cells[2].querySelector("button");
        said.begin = shown();
        sort.click(); said.up = shown(); said.legendUp = legend();
        sort.click(); said.down = shown();
        said.aria = table.tHead.rows[0].cells[2].getAttribute("aria-sort");
        const field = table.parentElement.previousElementSibling.querySelector("input");
        field.value = "LR=0"; field.dispatchEvent(new Event("input"));
        said.filtered = shown(); said.legend = legend();
        said.count = table.parentElement.previousElementSibling.querySelector("output").value;
        const plot = document.querySelector("#panels svg.plot");
        said.last = values();
        plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
        said.before = values();
        const box = plot.getBoundingClientRect();
        plot.dispatchEvent(new PointerEvent("pointerdown", { clientX: box.right - 9 }));
        said.tapped = values();
        const [metric, log] = document.querySelectorAll("#curves select, #curves input");
        metric.value = "loss"; log.checked = true; metric.dispatchEvent(new Event("change"));
        said.titles = [...document.querySelectorAll("#panels h3")].map((h) => h.textContent);
        said.bad = document.getElementById("panels").innerHTML.includes("NaN");
        said.wide = document.documentElement.scrollWidth > innerWidth;
        document.body.append(JSON.stringify(said) + "END");
        }</script>"""
    )
    dom = browsed(tmp_path / "tried.html", "--window-size=390,844")
    found = re.search(r'(\{"begin".*\})END', dom)
    assert found is not None
    said = json.loads(found[1])
    assert said["begin"] == ["tiny lr=0.3", "tiny lr=1", "tiny lr=0.1"]
    assert said["up"] == said["legendUp"] == ["tiny lr=0.1", "tiny lr=1", "tiny lr=0.3"]
    assert said["down"] == said["begin"] and said["aria"] == "descending"
    assert said["filtered"] == said["legend"] == ["tiny lr=0.3", "tiny lr=0.1"]
    assert said["count"] == "2 of 3 rows"
    ends = ["0.9050 (0.9000 to 0.9100, n = 2)", "0.5050 (0.5000 to 0.5100, n = 2)"]
    starts = ["0.4500 (0.4500 to 0.4500, n = 2)", "0.2500 (0.2500 to 0.2500, n = 2)"]
    assert (said["last"], said["before"], said["tapped"]) == (ends, starts, ends)
    assert said["titles"] == ["test/loss"] and not said["bad"]
    assert not said["wide"]  # tables scroll within themselves
