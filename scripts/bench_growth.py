"""How cost grows: plots and fitted slopes of step time, compile time, memory and start-up.

    python scripts/bench_growth.py             # all; --only step, members, compile, memory or start
    python scripts/bench_growth.py --redraw    # table and picture from docs/bench/growth.json

Writes docs/bench/growth.json, docs/images/growth.png and a section of docs/benchmarks.md. A part
that runs replaces its own results and leaves the others'.

- step: the compiled training step of a small network, on noise, against one of its sizes.
- members: a step of each of many runs at once, against their number: mapped, and in turn.
- compile: tracing and compiling that step against depth, layers one by one and scanned over.
- memory: what the step needs beside its arguments, as XLA plans it, against the batch, with and
  without `remat`.
- start: from the end of the imports until a first batch can be fed, in a fresh process, against the
  size of the decoded data: where the cache is empty, and afterwards.

A slope is the power by which a cost grows: least squares through the logarithms of the medians,
± the slope's standard error. Its last value is that between the two largest sizes, where constant
costs weigh least. Sizes are measured in turn (A B C A B C ...).
"""

import argparse
import importlib.metadata
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxeco import runtime

runtime.configure()

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from report import write_section

from jaxeco import data, losses, models, optim, schedules
from jaxeco.data.prepare import prepare, without_tensorflow
from jaxeco.data.tokens import Present, Windows
from jaxeco.experiment import Experiment, MeshShape, Steps
from jaxeco.groups import Group, How
from jaxeco.plan import Plan, plan
from jaxeco.plots import COLOURS
from jaxeco.population import LONGEST
from jaxeco.programs import program

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/bench/growth.json"
PICTURE = ROOT / "docs/images/growth.png"
DOCUMENT = ROOT / "docs/benchmarks.md"
REPEATS, DEAR = 5, 3  # rounds of steps; of compiling and of starting
SECONDS = 0.05  # a step's time is that of so many steps as take this long
MIB = 2**20


@dataclass(frozen=True)
class Curve:
    """One cost against one size.

    Attributes:
      cost, axis: what y and x are, with their units.
      name: which of the curves of this cost against this size.
      x: sizes, ascending.
      y: for each size, what each repeat found.
      work: the highest power of the size in the work to be done.
    """

    cost: str
    cost_unit: str
    axis: str
    axis_unit: str
    name: str
    work: float
    x: Sequence[float]
    y: Sequence[Sequence[float]]

    @property
    def medians(self) -> list[float]:
        return [statistics.median(repeats) for repeats in self.y]


@dataclass(frozen=True)
class Fit:
    """y = scale * x^slope."""

    slope: float
    spread: float  # standard error of the slope; NaN for two points
    scale: float


def fitted(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares through (log x, log y), all of which are above 0; at least two points."""
    log_x, log_y = np.log(x), np.log(y)
    off = log_x - log_x.mean()
    slope = float(off @ log_y / (off @ off))
    intercept = float(log_y.mean() - slope * log_x.mean())
    residuals = log_y - intercept - slope * log_x
    freedom = len(log_x) - 2
    error = (residuals @ residuals / freedom / (off @ off)) ** 0.5 if freedom else np.nan
    return Fit(slope, float(error), float(np.exp(intercept)))


# Networks and their data


@dataclass(frozen=True)
class Noise:
    """Text of characters that mean nothing, in windows of `length`."""

    length: int

    def open(self) -> data.Dataset:
        tokens = np.random.default_rng(0).integers(0, 65, 200_000).astype(np.uint16)
        x = Windows(tokens, rows=len(tokens) - 1, length=self.length)
        y = replace(x, shift=1)
        fields = {"x": x, "y": y, "weights": Present(y)}
        return data.Dataset(fields, (), "noise", "0", stride=self.length)


def images(side: int, channels: int, examples: int = 4096) -> data.Arrays:
    noise = np.random.default_rng(0)
    x = noise.integers(0, 256, (examples, side, side, channels)).astype(np.uint8)
    return data.Arrays(x, noise.integers(0, 10, examples).astype(np.int32))


def planned(model: Any, train: Any, batch: int) -> Plan:
    image = isinstance(train, data.Arrays)
    return plan(
        Experiment(
            name="growth",
            train=train,
            evals={},
            preprocess=(data.Normalize(mean=(0.5,), sd=(0.25,)),) if image else (),
            model=model,
            loss=losses.SoftmaxCrossEntropy(),
            optimizer=optim.AdamW(schedules.Constant(1e-3)),
            batch=batch,
            length=Steps(10**6),
            mesh=MeshShape(data=1),
        )
    )


def mlp(batch: int = 64, width: int = 128, depth: int = 2) -> Plan:
    return planned(models.MLP(widths=(width,) * depth), images(8, 1), batch)


def resnet(batch: int = 16, width: int = 8, depth: int = 8) -> Plan:
    return planned(models.CifarResNet(depth=depth, width=width), images(32, 3, 512), batch)


def gpt(
    batch: int = 4,
    width: int = 64,
    depth: int = 2,
    context: int = 64,
    remat: bool = False,
    scan_layers: bool = False,
) -> Plan:
    trunk = models.Transformer(
        vocab_size=65,
        context=context,
        layers=depth,
        heads=4,
        width=width,
        bias=False,
        remat=remat,
        scan_layers=scan_layers,
    )
    return planned(models.LanguageModel(trunk), Noise(context), batch)


# Parts: each gives its curves, and says on stderr how far it is


def said(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def in_turn(actions: Sequence[Callable[[], float]], repeats: int) -> tuple[tuple[float, ...], ...]:
    """What each action gives, in so many rounds."""
    return tuple(zip(*([action() for action in actions] for _ in range(repeats))))


def per_step(p: Plan) -> Callable[[], float]:
    """An action that gives a step's time in ms; it has been compiled and taken before."""
    call, feed, state = p.compiled(), p.feed(), p.start()

    def steps(n: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for step in range(n):
            state, _ = call(state, feed.resident, feed.fed(step))
        jax.block_until_ready(state)
        return time.perf_counter() - began

    steps(1)
    n = max(1, round(SECONDS / min(steps(1), steps(1))))
    return lambda: steps(n) / n * 1e3


SWEEPS: tuple[tuple[str, str, Callable[..., Plan], tuple[int, ...], float], ...] = (
    ("batch", "MLP", mlp, (16, 64, 256, 1024, 4096), 1),
    ("batch", "ResNet", resnet, (4, 8, 16, 32, 64, 128), 1),
    ("batch", "GPT", gpt, (2, 4, 8, 16, 32, 64), 1),
    ("width", "MLP", mlp, (64, 128, 256, 512, 1024, 2048), 2),
    ("width", "ResNet", resnet, (4, 8, 16, 32, 64), 2),
    ("width", "GPT", gpt, (32, 64, 128, 256, 512), 2),
    ("depth", "MLP", mlp, (1, 2, 4, 8, 16, 32), 1),
    ("depth", "ResNet", resnet, (8, 14, 26, 50), 1),
    ("depth", "GPT", gpt, (1, 2, 4, 8), 1),
    ("context", "GPT", gpt, (32, 64, 128, 256, 512, 1024), 2),
)
UNITS = {"batch": "examples", "width": "features", "depth": "layers", "context": "tokens"}


def step() -> Iterator[Curve]:
    for axis, name, build, sizes, work in SWEEPS:
        said(f"step time of {name} against {axis}")
        actions = [per_step(build(**{axis: size})) for size in sizes]
        times = in_turn(actions, REPEATS)
        yield Curve("step time", "ms", axis, UNITS[axis], name, work, sizes, times)


POPULATIONS: tuple[tuple[str, Callable[..., Plan], tuple[int, ...], int], ...] = (
    ("MLP", mlp, (1, 4, 16, 64, 256), LONGEST),
    ("ResNet", resnet, (1, 2, 4, 8), 2),
    ("GPT", gpt, (1, 2, 4, 8, 16), 10),
)


def per_round(p: Plan, how: How, members: int, n_steps: int) -> Callable[[], float]:
    """An action that gives the time in ms in which each of so many members takes a step.

    Args:
      n_steps: of a call.
    """
    experiments = tuple(replace(p.ex, seed=seed) for seed in range(members))
    group = Group(tuple(range(members)), p, experiments, (), how)
    begin = jax.jit(p.init)
    runs, step = program(group, [begin(np.uint32(ex.seed)) for ex in experiments]), 0

    def calls(n: int) -> float:
        nonlocal step
        began = time.perf_counter()
        for _ in range(n):
            sums = runs.call(step, n_steps)
            step += n_steps
        jax.block_until_ready(sums)
        return time.perf_counter() - began

    calls(1)
    n = max(1, round(SECONDS / min(calls(1), calls(1))))
    return lambda: calls(n) / n / n_steps * 1e3


def members() -> Iterator[Curve]:
    for name, build, sizes, n in POPULATIONS:
        for how in get_args(How):
            said(f"a step of many {name}s, {how}")
            steps = n if how == "mapped" else 1
            actions = [per_round(build(), how, size, steps) for size in sizes]
            times = in_turn(actions, REPEATS)
            label = f"{name}, {how}"
            yield Curve("a step of all", "ms", "members", "runs", label, 1, sizes, times)


def lowered(p: Plan) -> Any:
    """A step, traced."""
    feed = p.feed()
    return p.compiled().lower(p.abstract_state(), feed.resident, feed.fed(0))


def compiling(p: Plan) -> float:
    """Seconds to trace and compile a step that no cache knows."""
    jax.clear_caches()
    began = time.perf_counter()
    lowered(p).compile()
    return time.perf_counter() - began


def compile_time() -> Iterator[Curve]:
    depths = (1, 2, 4, 8, 16)
    for scanned, name in ((False, "one by one"), (True, "scan_layers")):
        said(f"compile time of GPT, layers {name}")
        plans = [gpt(depth=depth, context=32, scan_layers=scanned) for depth in depths]
        compiling(plans[0])
        times = in_turn([lambda p=p: compiling(p) for p in plans], DEAR)
        work = 0 if scanned else 1  # a scanned layer is compiled once
        yield Curve("compile time", "s", "depth", UNITS["depth"], name, work, depths, times)


def memory() -> Iterator[Curve]:
    sizes = (8, 32, 128)
    for scanned in (False, True):
        for remat in (False, True):
            name = f"{'scan_layers' if scanned else 'one by one'}{', remat' if remat else ''}"
            said(f"memory of GPT, layers {name}")
            plans = [gpt(batch=n, depth=3, remat=remat, scan_layers=scanned) for n in sizes]
            held = [
                (lowered(p).compile().memory_analysis().temp_size_in_bytes / MIB,) for p in plans
            ]
            yield Curve("memory", "MiB", "batch", UNITS["batch"], name, 1, sizes, held)


OPENS = """
import json, sys, time
from jaxeco import runtime
runtime.configure()
import grain, jax, PIL.Image, tensorflow_datasets
from jaxeco import data
from jaxeco.data.pipeline import Feed, fits
jax.block_until_ready(jax.numpy.zeros(8) + 1)
found = {}
for name, words in json.loads(sys.argv[1]).items():
    source = eval(words, vars(data))
    began = time.perf_counter()
    opened = source.open()
    with Feed.training(opened, 64, 0, resident=fits(opened, 4 * 2**30)) as feed:
        jax.block_until_ready(feed.resident)
        feed.fed(0)
        found[name] = time.perf_counter() - began
    del feed, opened
print(json.dumps(found))
"""
SIDE = 128  # pixels of the generated images


def pictures(count: int) -> Iterator[tuple[bytes, int]]:
    """Generated images as PNG, smooth, and labels."""
    noise, files = np.random.default_rng(0), []
    for _ in range(16):
        image = Image.fromarray(noise.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    for i in range(count):
        yield files[i % len(files)], i % 10


def generated(folder: Path, count: int) -> dict[str, str]:
    """The same images as every kind of source, and as much text; sources as they are written."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Growth(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
            """Generated images."""

            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                label = tfds.features.ClassLabel(num_classes=10)
                image = tfds.features.Image(shape=(SIDE, SIDE, 3))
                features = tfds.features.FeaturesDict({"image": image, "label": label})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, _: Any) -> Any:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                for i, (png, label) in enumerate(pictures(count)):
                    yield i, {"image": io.BytesIO(png), "label": label}

        with without_tensorflow():
            prepare(Growth(data_dir=folder, file_format="array_record"))
    examples = ({"x": png, "y": np.int32(label)} for png, label in pictures(count))
    data.write_records(folder / "records", examples)
    for label in range(10):
        (folder / f"images/{label}").mkdir(parents=True)
    for i, (png, label) in enumerate(pictures(count)):
        (folder / f"images/{label}/{i}.png").write_bytes(png)
    tokens = count * SIDE * SIDE * 3 // 8  # of two bytes each: a quarter of the images
    line = b"".join(bytes([97 + i * i % 26]) for i in range(79)) + b"\n"
    (folder / "text.txt").write_bytes(line * (tokens // len(line)))
    sources = {
        "Tfds": data.Tfds("growth", "train", data_dir=str(folder)),
        "TextWindows": data.TextWindows(data.TextFiles(f"{folder}/text.txt"), data.Bytes(), 64),
        "ImageFolder": data.ImageFolder(f"{folder}/images", SIDE, "all"),
        "ArrayRecords": data.ArrayRecords(f"{folder}/records"),
    }
    return {name: repr(source) for name, source in sources.items()}


def opening(sources: dict[str, str], cache: Path) -> dict[str, float]:
    """Seconds from the imports' end to a first batch, of each source, in a fresh process."""
    words = [sys.executable, "-c", OPENS, json.dumps(sources)]
    env = os.environ | {"JAXECO_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(words, capture_output=True, text=True, env=env)
    if ran.returncode:
        sys.exit(ran.stderr)
    return json.loads(ran.stdout)


def start() -> Iterator[Curve]:
    counts = (100, 400, 1600, 6400)
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        sources = {}
        for count in counts:
            said(f"start-up: {count} generated images")
            sources[count] = generated(Path(name) / str(count), count)
        for turn in range(DEAR):
            for count in counts:
                said(f"start-up with {count} images, round {turn + 1}")
                cache = Path(name) / "cache"
                for use in ("first", "later"):
                    for kind, value in opening(sources[count], cache).items():
                        found[kind, use, count].append(value)
                shutil.rmtree(cache)
    sizes = tuple(count * SIDE * SIDE * 3 / MIB for count in counts)
    for kind, use in dict.fromkeys(key[:2] for key in found):
        times, work = [found[kind, use, count] for count in counts], int(use == "first")
        yield Curve(f"start-up, {use} use", "s", "decoded data", "MiB", kind, work, sizes, times)


PARTS = {
    "step": step,
    "members": members,
    "compile": compile_time,
    "memory": memory,
    "start": start,
}


# What is written


def described(part: str) -> dict[str, str]:
    """With what a part was measured."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "command": f"python scripts/bench_growth.py --only {part}",
        "device": f"{cores} cores, {processor()}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{n} {v}" for n, v in versions.items())]
        ),
    }


def processor() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ")[1]
    except (OSError, StopIteration):
        return platform.processor()


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def signed(fit: Fit) -> str:
    return f"{fit.slope:.2f} ± {fit.spread:.2f}"


def table(results: dict[str, Any]) -> str:
    """The section of the document: how it was measured, the picture, a row for each curve."""
    lines = [
        "A slope is the power by which a cost grows with a size: least squares through the"
        " logarithms of the medians, ± its standard error; then that between the two largest sizes"
        " alone, where constant costs weigh least; then the highest power in the work itself.",
        "",
        "![How cost grows](images/growth.png)",
        "",
    ]
    for part in PARTS:
        if part not in results:
            continue
        of = results[part]["with"]
        lines += [
            f"`{of['command']}`, on {of['device']}; {of['versions']}:",
            "",
            "| cost | of | against | cost there | slope | last | work | n |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for curve in curves(results, part):
            y, (low, high) = curve.medians, (curve.x[0], curve.x[-1])
            last = fitted(curve.x[-2:], y[-2:]).slope
            lines.append(
                f"| {curve.cost} | {curve.name} | {curve.axis} {number(low)} to {number(high)}"
                f" {curve.axis_unit} | {number(y[0])} to {number(y[-1])} {curve.cost_unit} |"
                f" {signed(fitted(curve.x, y))} | {last:.2f} | {curve.work:g} |"
                f" {len(curve.y[0])} |"
            )
        lines.append("")
    return "\n".join(lines)


def curves(results: dict[str, Any], part: str) -> list[Curve]:
    return [Curve(**curve) for curve in results[part]["curves"]] if part in results else []


STYLES = {
    "MLP": (COLOURS[0], "o"),
    "ResNet": (COLOURS[1], "s"),
    "GPT": (COLOURS[2], "^"),
    "MLP, mapped": (COLOURS[0], "o"),
    "MLP, in turn": (COLOURS[0], "D"),
    "ResNet, mapped": (COLOURS[1], "s"),
    "ResNet, in turn": (COLOURS[1], "D"),
    "GPT, mapped": (COLOURS[2], "^"),
    "GPT, in turn": (COLOURS[2], "D"),
    "one by one": (COLOURS[0], "o"),
    "one by one, remat": (COLOURS[1], "s"),
    "scan_layers": (COLOURS[2], "^"),
    "scan_layers, remat": (COLOURS[3], "D"),
    "Tfds": (COLOURS[0], "o"),
    "TextWindows": (COLOURS[1], "s"),
    "ImageFolder": (COLOURS[2], "^"),
    "ArrayRecords": (COLOURS[3], "D"),
}


def draw(drawn: Sequence[Curve], path: Path) -> None:
    """Small multiples, one for each panel: medians, least to most, and the fitted power."""
    panels: dict[tuple[str, str], list[Curve]] = defaultdict(list)
    for curve in drawn:
        panels[curve.cost, curve.axis].append(curve)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, ((cost, axis), here) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for curve in here:
            color, marker = STYLES[curve.name]
            x, y = np.array(curve.x), np.array(curve.medians)
            fit = fitted(x, y)
            bars = [y - [min(found) for found in curve.y], [max(found) for found in curve.y] - y]
            label = f"{curve.name}: {signed(fit)}"
            look = {"color": color, "marker": marker, "markersize": 5, "capsize": 2}
            if "remat" in curve.name or "in turn" in curve.name:  # a ring shows what it lies upon
                look |= {"fillstyle": "none", "markersize": 8}
            axes.errorbar(x, y, yerr=bars, linestyle="", elinewidth=1, label=label, **look)
            axes.plot(x, fit.scale * x**fit.slope, linewidth=1, alpha=0.6, color=color)
        sizes: list[float] = []
        for size in sorted({size for curve in here for size in curve.x}):
            if not sizes or size > 1.3 * sizes[-1]:  # else labels would overlap
                sizes.append(size)
        axes.set(xscale="log", yscale="log", title=f"{cost} against {axis}")
        axes.set(xlabel=f"{axis}, {here[0].axis_unit}", ylabel=f"{cost}, {here[0].cost_unit}")
        axes.set_xticks(sizes, [number(size) for size in sizes])
        axes.xaxis.minorticks_off()
        low, high = axes.get_ylim()
        high *= (high / low) ** (0.09 * len(here))  # room for the legend
        decades = np.log10(high / low)
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2.5 else (1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        axes.yaxis.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white")


def stored() -> dict[str, Any]:
    """What was measured so far, by part."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", choices=PARTS, help="one part")
    what.add_argument("--redraw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    # Each program is compiled here: what a cache holds says nothing of compile time, and what it
    # gives back knows nothing of its memory.
    jax.config.update("jax_enable_compilation_cache", False)
    for part in [] if options.redraw else [options.only] if options.only else PARTS:
        measured = [asdict(curve) for curve in PARTS[part]()]
        results = stored() | {part: {"with": described(part), "curves": measured}}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    results = stored()
    draw([curve for part in PARTS for curve in curves(results, part)], PICTURE)
    write_section(DOCUMENT, "growth", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
