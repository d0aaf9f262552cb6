"""What measured rates come to: ratios, tables, a plot, and whether a ratio has fallen.

A result is what `scripts/bench.py` measured of one workload in one go:

    {"workload": "lenet_4", "title": "LeNet, batch 4", "unit": "images", "flops": null,
     "device": "2 cores of AMD EPYC", "versions": {"JAX": "0.10.2", ...}, "command": "...",
     "rounds": 7, "seconds": 3.0,
     "programs": {"ours": {"rates": [...]}, "pytorch_compile": {"error": "..."}, ...}}

`rates` are per second, one of each round. A rate of "starts" is shown as the seconds of one.
"""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]

OURS = "ours"
PEERS = {
    "pytorch": "PyTorch eager",
    "pytorch_compile": "torch.compile",
    "plain_flax": "plain Flax",
}
LIMITS = {"limit_numpy": "numpy", "limit_xla": "XLA", "limit_pytorch": "PyTorch"}
LEAST_FALL = 0.05  # a ratio that is lower by less has not fallen, however small the spread


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: the ratio of medians; least and most of the rounds' own ratios."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"

    @property
    def spread(self) -> float:
        return (self.most - self.least) / 2


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of rates that were measured in turn, so that round i of both saw the same machine."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(ours) / statistics.median(theirs), min(rounds), max(rounds))


def fallen(stored: Ratio, now: Ratio) -> bool:
    """Whether a ratio is lower than it was by more than both spreads, and by 5 % or more."""
    allowed = max(stored.spread + now.spread, LEAST_FALL * stored.median)
    return now.median < stored.median - allowed


def rates(result: Result, program: str) -> list[float] | None:
    """None if the program took no part, or failed."""
    of = result["programs"]
    return of[program]["rates"] if program in of and "rates" in of[program] else None


def against(result: Result, peer: str) -> Ratio | None:
    ours, theirs = rates(result, OURS), rates(result, peer)
    return ratio(ours, theirs) if ours and theirs else None


def stored(folder: Path) -> list[Result]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def store(result: Result, folder: Path) -> None:
    """In the place of an older result of the same workload on the same device and JAX."""
    place = f"{result['device']} jax {result['versions']['JAX']}".lower()
    path = folder / re.sub(r"[^a-z0-9.]+", "-", place) / f"{result['workload']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def groups(results: Iterable[Result]) -> list[list[Result]]:
    """By device and JAX's version; the group that has most workloads first."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result["device"], result["versions"]["JAX"]), []).append(result)
    return sorted(found.values(), key=len, reverse=True)


def section(results: Sequence[Result], workloads: Sequence[str], picture: str) -> str:
    """Markdown: for each device and version of JAX its tables, with `picture` at the first.

    Args:
      workloads: their names, in the order of the rows.
    """
    parts = []
    for i, group in enumerate(groups(results)):
        group = sorted(group, key=lambda result: workloads.index(result["workload"]))
        versions = {k: v for result in group for k, v in result["versions"].items()}
        said = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts.append(f"## {group[0]['device']}, JAX {versions['JAX']}\n\n{said}.")
        if i == 0:
            parts.append(f"![How many times as fast as its peers jaxeco is]({picture})")
        parts += [compared(group), arithmetic(group), limits(group)]
    return "\n\n".join(part for part in parts if part)


def compared(results: Sequence[Result]) -> str:
    """A row for each workload: our rate, and how many times each peer's that is."""
    rows = [
        [
            result["title"],
            speed(result, OURS),
            *(cell(result, peer) for peer in PEERS),
            f"{result['rounds']}",
            f"`{result['command']}`",
        ]
        for result in results
        if rates(result, OURS)
    ]
    names = (f"x {name}" for name in PEERS.values())
    return table(["work", "jaxeco: median (least to most)", *names, "n", "command"], rows)


def speed(result: Result, program: str) -> str:
    """Median (least to most) of a program's rates, in words."""
    got = rates(result, program)
    assert got
    if result["unit"] == "starts":
        times = [1 / rate for rate in got]
        return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) s"
    return f"{number(statistics.median(got))} ({number(min(got))} to {number(max(got))})" + (
        f" {result['unit']}/s"
    )


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(result: Result, peer: str) -> str:
    if found := against(result, peer):
        return f"**{found.median:.2f}** ({found.least:.2f} to {found.most:.2f})"
    return f"failed: {result['programs'][peer]['error']}" if peer in result["programs"] else ""


def arithmetic(results: Sequence[Result]) -> str:
    """GFLOP/s of each program, and what share that is of products of matrices in the same run."""
    rows = []
    for result in results:
        products = [statistics.median(got) for name in LIMITS if (got := rates(result, name))]
        if not result["flops"] or not products:
            continue
        cells = []
        for program in (OURS, *PEERS):
            gflops = statistics.median(rates(result, program) or [0]) * result["flops"] / 1e9
            share = f"{number(gflops)} ({100 * gflops / max(products):.0f} %)"
            cells.append(share if gflops else "")
        rows.append([result["title"], number(max(products)), *cells])
    header = ["work: GFLOP/s (of those of the product)", "product of matrices", "jaxeco"]
    return table([*header, *PEERS.values()], rows)


def limits(results: Sequence[Result]) -> str:
    rows = [
        [
            result["title"],
            *(speed(result, name) if rates(result, name) else "" for name in LIMITS),
            f"{result['rounds']}",
            f"`{result['command']}`",
        ]
        for result in results
        if not rates(result, OURS)
    ]
    return table(["limit", *LIMITS.values(), "n", "command"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; "" without a row. Columns that are empty throughout are left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[header[i] for i in kept], ["---"] * len(kept)]
    lines += [[row[i] for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def draw(results: Sequence[Result], workloads: Sequence[str], path: Path) -> None:
    """Bars of the ratios to each peer, of the largest group; whiskers from least to most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    group = [result for result in groups(results)[0] if rates(result, OURS)]
    group = sorted(group, key=lambda result: workloads.index(result["workload"]), reverse=True)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.62 * len(group)), layout="constrained")
    colours = ("#c44e52", "#dd8452", "#4c72b0")
    height = 0.8 / len(PEERS)
    seen = [1.0]
    for i, (peer, name) in enumerate(PEERS.items()):
        found = [(place, r) for place, of in enumerate(group) if (r := against(of, peer))]
        if not found:
            continue
        seen += [end for _, r in found for end in (r.least, r.most)]
        axes.barh(
            [place + (1 - i) * height for place, _ in found],
            [r.median - 1 for _, r in found],
            height,
            left=1,
            xerr=[[r.median - r.least for _, r in found], [r.most - r.median for _, r in found]],
            color=colours[i],
            error_kw={"lw": 0.8, "capsize": 1.5},
            label=name,
        )
        for place, r in found:
            at = max(r.most, 1.0) * 1.03
            axes.text(at, place + (1 - i) * height, f"{r.median:.2f}", va="center", fontsize=7)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(seen) / 1.15, max(seen) * 1.35)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if min(seen) / 1.15 <= t]
    axes.set_xticks([t for t in ticks if t <= max(seen) * 1.35], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(group)), [result["title"] for result in group], fontsize=8)
    axes.set_ylim(-0.6, len(group) - 0.4)
    of = f"{group[0]['device']}, JAX {group[0]['versions']['JAX']}"
    axes.set_xlabel(f"jaxeco's speed over its peer's; whiskers: least, most; {of}", fontsize=8)
    figure.legend(fontsize=8, loc="outside upper center", ncols=len(PEERS))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
