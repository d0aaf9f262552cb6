"""Speed, side by side: jaxeco, plain Flax as its examples write it, and PyTorch.

    python scripts/bench.py                                        # against plain Flax
    python scripts/bench.py --torch .venv-torch/bin/python         # and PyTorch

PyTorch is never a dependency of ours; it wants an environment of its own:

    python -m venv .venv-torch && .venv-torch/bin/pip install torch==2.13.0

Each program is a process of its own (XLA's flags are settled once a process), kept alive and asked
in turn, A B C A B C ..., to train for a few seconds on the same shapes, while the others wait. So a
machine that is slow for a while is slow for all. What is printed is the ratio of medians.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORKERS = Path(__file__).parent / "bench_workers"
WORKLOADS = {  # and what a second's rate counts
    "lenet": ("LeNet, batch 4, SGD momentum 0.9", "examples"),
    "cifar_cnn": ("the network of experiments/cifar_cnn.py, batch 500", "examples"),
    "char_gpt": ("training of experiments/shakespeare_char.py, batch 12 x 64 characters", "tokens"),
    "generate": ("text from that network, context 256, one at a time, with a cache", "tokens"),
}

UNWRITTEN = {("pytorch", "cifar_cnn"), ("plain_flax", "generate")}
FILES = {
    ("pytorch", "char_gpt"): "pytorch_gpt",
    ("pytorch", "generate"): "pytorch_gpt",
    ("ours", "generate"): "ours_generate",
}


class Worker:
    """A program that answers each line on its input with the rate of a round."""

    def __init__(self, name: str, python: str, workload: str, seconds: float) -> None:
        self.name = name
        file = FILES[name, workload] if (name, workload) in FILES else name
        command = [python, str(WORKERS / f"{file}.py"), workload, str(seconds)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self.answer()  # when it is compiled and warm

    def answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def round(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()["per_second"]


def measure(workload: str, pythons: dict[str, str], rounds: int, seconds: float) -> None:
    written = {
        name: python for name, python in pythons.items() if (name, workload) not in UNWRITTEN
    }
    workers = [Worker(name, python, workload, seconds) for name, python in written.items()]
    rates: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            rates[worker.name].append(worker.round())
    ours = statistics.median(rates["ours"])
    title, unit = WORKLOADS[workload]
    print(f"\n{title}, n = {rounds} rounds of {seconds:g} s\n")
    print(f"| program | {unit}/s, median | least to most | jaxeco is faster by |")
    print("| --- | --- | --- | --- |")
    for worker in workers:
        got = rates[worker.name]
        median = statistics.median(got)
        ratio = f"{ours / median:.2f}" if worker.name != "ours" else ""
        spread = f"{min(got):,.0f} to {max(got):,.0f}"
        print(f"| {worker.about['name']} | {median:,.0f} | {spread} | {ratio} |", flush=True)
        worker.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", help="the Python of an environment that has PyTorch")
    parser.add_argument("--only", choices=WORKLOADS, help="one workload")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round")
    options = parser.parse_args()
    pythons = {"ours": sys.executable, "plain_flax": sys.executable}
    if options.torch:
        pythons["pytorch"] = options.torch
    print(f"{platform.machine()}, {platform.platform()}, Python {platform.python_version()}")
    for workload in WORKLOADS if options.only is None else [options.only]:
        measure(workload, pythons, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
