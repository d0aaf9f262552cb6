"""Speed, side by side: jaxeco, plain Flax as its examples write it, PyTorch, and the hardware.

    python scripts/bench.py                                        # against plain Flax
    python scripts/bench.py --torch .venv-torch/bin/python         # and PyTorch, eager and compiled
    python scripts/bench.py --only lenet_4 gpt2 --rounds 5 --torch ...
    python scripts/bench.py --quick            # in a minute: has a ratio to plain Flax fallen?

PyTorch is never a dependency of ours; it wants an environment of its own (and g++, to compile):

    python -m venv .venv-torch && .venv-torch/bin/pip install torch==2.13.0

Each program is a process of its own (XLA's flags are settled once a process), kept alive and asked
in turn, A B C A B C ..., to work for a few seconds, a step at least, on the same shapes, while the
others wait. So a machine that is slow for a while is slow for all. What counts is the ratio of
medians. A start is a fresh process each time, from its beginning to the end of its first call.

Raw rates go to docs/bench, from which the tables of docs/benchmarks.md and its plot are drawn anew;
workloads that are not measured keep theirs. With --json they go to that file instead, and nothing
else is written. --quick compares with the ratios of scripts/bench_ratios.json, which --store
rewrites, and ends with status 1 if one has fallen by more than the spread of the rounds.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import bench_report as of
import report

from jaxeco.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
WORKERS = Path(__file__).resolve().parent / "bench_workers"
RESULTS, DOCUMENT = ROOT / "docs/bench", ROOT / "docs/benchmarks.md"
PICTURE = "images/bench.png"  # beside the document
RATIOS = ROOT / "scripts/bench_ratios.json"


def convolution(side: int, size: int, channels: int, features: int) -> int:
    """FLOPs of a convolution, forward, computed directly: a product and a sum are two."""
    return 2 * side**2 * size**2 * channels * features


def airbench() -> int:
    """FLOPs of a training step, an image. The stem is not learnt: it only goes forward."""
    layers = (
        (31, 24, 64),
        (15, 64, 64),
        (15, 64, 256),
        (7, 256, 256),
        (7, 256, 256),
        (3, 256, 256),
    )
    filters = sum(convolution(side, 3, c, f) for side, c, f in layers)
    return convolution(31, 2, 3, 24) + 3 * (filters + 2 * 256 * 10)


def resnet18() -> int:
    """FLOPs of a training step, an image. The first layer has no gradient of its input."""
    total, channels = 0, 64
    for side, width in ((32, 64), (16, 128), (8, 256), (4, 512)):
        total += convolution(side, 3, channels, width) + 3 * convolution(side, 3, width, width)
        total += convolution(side, 1, channels, width) if channels != width else 0
        channels = width
    return 2 * convolution(32, 3, 3, 64) + 3 * (total + 2 * 512 * 10)


def transformer(vocabulary: int, layers: int, width: int, context: int) -> int:
    """FLOPs of forward and backward, a token: 6 for each weight of a matrix, and attention's.

    As in PaLM's appendix B (Chowdhery et al. 2022), which does not halve for causality.
    """
    return 6 * (12 * layers * width**2 + vocabulary * width) + 12 * layers * width * context


@dataclass(frozen=True)
class Workload:
    """What all programs do.

    Attributes:
      unit: what a rate counts.
      flops: of one unit; products of matrices are then measured beside the programs.
      programs: that have it.
      start: of "starts": the state of the caches, and which workload's first step it is.
    """

    title: str
    unit: str
    flops: int | None = None
    programs: tuple[str, ...] = ("ours", "pytorch", "pytorch_compile", "plain_flax")
    start: tuple[str, str] | None = None


LIMITS = tuple(of.LIMITS)
PIPELINE = ("ours", "pytorch")
HALF = ("ours", "pytorch", "pytorch_compile")
WORKLOADS = {
    "mlp": Workload("MNIST MLP 256-128, batch 128, Adam", "images"),
    "lenet_4": Workload("LeNet, batch 4, SGD", "images"),
    "lenet_128": Workload("LeNet, batch 128, SGD", "images"),
    "airbench_256": Workload("airbench CNN, batch 256, Nesterov SGD", "images", airbench()),
    "airbench_2000": Workload("airbench CNN, batch 2,000, Nesterov SGD", "images", airbench()),
    # without FLOPs: what they would be compared with is in float32
    "airbench_256_bf16": Workload("airbench CNN, batch 256, bfloat16", "images", programs=HALF),
    "resnet18": Workload("ResNet-18, 32x32, batch 64, SGD", "images", resnet18()),
    "char_gpt": Workload(
        "char-GPT 4x128, batch 12 x 64, AdamW", "tokens", transformer(65, 4, 128, 64)
    ),
    "char_gpt_bf16": Workload("char-GPT 4x128, 12 x 64, bfloat16", "tokens", programs=HALF),
    "generate": Workload("char-GPT, text of 250, one at a time", "tokens"),
    "gpt2": Workload(
        "GPT-2 124M, forward + backward, 1 x 256", "tokens", transformer(50_257, 12, 768, 256)
    ),
    "digits_1": Workload("digits MLP 128-64, batch 64, AdamW", "images", programs=PIPELINE),
    "digits_16": Workload("the same, 16 seeds", "images", programs=HALF),
    "mlp_16": Workload("MNIST MLP, batch 128, 16 seeds", "images", programs=HALF),
    "lenet_4_16": Workload("LeNet, batch 4, 16 seeds", "images", programs=HALF),
    "input_resident": Workload("input on the device, batch 256", "images", programs=PIPELINE),
    "input_streamed": Workload("input streamed, batch 256", "images", programs=PIPELINE),
    "start_mlp_cold": Workload("start, MNIST MLP, empty caches", "starts", start=("cold", "mlp")),
    "start_mlp_warm": Workload("start, MNIST MLP, caches full", "starts", start=("warm", "mlp")),
    "start_lenet_cold": Workload("start, LeNet, empty caches", "starts", start=("cold", "lenet_4")),
    "start_lenet_warm": Workload("start, LeNet, caches full", "starts", start=("warm", "lenet_4")),
    "matmul": Workload("product of 2048 x 2048 matrices, float32", "GFLOP", programs=LIMITS),
    "bandwidth": Workload("a += b of 128 MiB each, float32", "GB", programs=LIMITS),
    "airbench_16": Workload("airbench CNN, batch 16", "images", programs=("ours", "plain_flax")),
}
QUICK = ("mlp", "lenet_4", "lenet_128", "char_gpt", "airbench_16")
MEASURED = tuple(name for name in WORKLOADS if name != "airbench_16")  # which is --quick's alone


class Failed(Exception):
    """A program ended by itself."""


class Worker:
    """A program that answers each line on its input with the rate of a round."""

    def __init__(
        self, program: str, workload: str, seconds: float, torch: str | None, caches: Path | None
    ) -> None:
        """Starts it; `about` waits until it is compiled and warm.

        Args:
          seconds: of a round; 0: it is only to take its first step.
          caches: where it keeps what it compiles; None: wherever it does.
        """
        file, _, option = program.partition("_") if program != "plain_flax" else (program, "", "")
        python = torch if "pytorch" in program else sys.executable
        assert python is not None
        command = [python, str(WORKERS / f"{file}.py"), workload, str(seconds), *option.split()]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if program == "plain_flax":  # as it comes
            environment.pop("XLA_FLAGS", None)
        if caches:
            environment |= {"JAXECO_CACHE": str(caches), "TORCHINDUCTOR_CACHE_DIR": str(caches)}
        self.stderr = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.stderr.seek(0)
        raise Failed(why(self.stderr.read()) or f"status {status}")

    def round(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()["per_second"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()  # not for its pipes to close: processes of its own may hold them
        for file in (self.process.stdin, self.process.stdout, self.stderr):
            assert file is not None
            file.close()


def why(stderr: str) -> str:
    """Its last error, or its last line, without paths of this machine."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Failed)\b", line)]
    return re.sub(r"/\S*/", "", (errors or lines or [""])[-1])[:150]


def measure(name: str, rounds: int, seconds: float, torch: str | None) -> of.Result:
    """Asks all programs in turn.

    Raises:
      UserError: ours fails, or the networks are not of one size.
    """
    workload = WORKLOADS[name]
    programs = [*workload.programs, *(LIMITS if workload.flops else ())]
    programs = [program for program in programs if torch or "pytorch" not in program]
    ask = started if workload.start else asked
    abouts, rates, errors = ask(name, programs, rounds, seconds, torch)
    if of.OURS in errors:
        raise UserError(f"{name}: ours failed: {errors[of.OURS]}")
    sizes = {program: about["parameters"] for program, about in abouts.items()}
    sizes = {program: size for program, size in sizes.items() if size}
    if len(set(sizes.values())) > 1:
        raise UserError(f"{name}: the networks differ in how many parameters they learn: {sizes}")
    versions = {k: v for about in abouts.values() for k, v in about["versions"].items()}
    device = versions.pop("device")
    command = f"--only {name} --rounds {rounds} --seconds {seconds:g}" + " --torch PYTHON" * bool(
        torch
    )
    return {
        "workload": name,
        **{k: v for k, v in asdict(workload).items() if k in ("title", "unit", "flops")},
        "device": device if device != "cpu" else processor(),
        "versions": versions,
        "command": f"scripts/bench.py {command}",
        "rounds": rounds,
        "seconds": seconds,
        "programs": {
            program: {"error": errors[program]}
            if program in errors
            else {"parameters": abouts[program]["parameters"], "rates": rates[program]}
            for program in programs
        },
    }


def asked(
    name: str, programs: list[str], rounds: int, seconds: float, torch: str | None
) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, str]]:
    """(what each says of itself, its rates, what went wrong), by program."""
    abouts, rates, errors = {}, {}, {}
    with ExitStack() as stack:
        # what torch.compile leaves behind when it is killed would make it fail the next time
        fresh = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        workers = {}
        for program in programs:
            what = "matmul" if program in LIMITS and name != "bandwidth" else name
            caches = fresh if program == "pytorch_compile" else None
            workers[program] = stack.enter_context(Worker(program, what, seconds, torch, caches))
        for program, worker in workers.items():
            try:
                abouts[program], rates[program] = worker.answer(), []
            except Failed as error:
                errors[program] = str(error)
        for _ in range(rounds):
            for program in abouts:
                if program not in errors:
                    try:
                        rates[program].append(workers[program].round())
                    except Failed as error:
                        errors[program] = str(error)
    return abouts, rates, errors


def started(
    name: str, programs: list[str], rounds: int, seconds: float, torch: str | None
) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, str]]:
    """As `asked`, where a round is a start; the caches are a folder that is new, or was filled."""
    del seconds
    how, what = WORKLOADS[name].start or ("", "")
    abouts, rates, errors = {}, {program: [] for program in programs}, {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + (how == "warm")):
            for program in programs:
                caches = Path(folder) / program / ("warm" if how == "warm" else str(turn))
                began = time.perf_counter()
                with Worker(program, what, 0, torch, caches) as worker:
                    try:
                        abouts[program] = worker.answer()
                    except Failed as error:
                        errors[program] = str(error)
                    passed = time.perf_counter() - began
                if turn or how == "cold":
                    rates[program].append(1 / passed)
    return abouts, rates, errors


def processor() -> str:
    """Such as "2 cores of AMD EPYC"."""
    try:
        cores = len(os.sched_getaffinity(0))
        info = Path("/proc/cpuinfo").read_text()
        model = re.search(r"model name\s*: (.*)", info)
    except (AttributeError, OSError):
        cores, model = os.cpu_count() or 1, None
    name = model[1].strip() if model else platform.machine()
    return f"{cores} core{'s' * (cores > 1)} of {name}"


def quick(store: bool) -> int:
    """Prints our ratios to plain Flax beside those of the table; the exit status."""
    before = json.loads(RATIOS.read_text()) if RATIOS.exists() else {"on": "", "ratios": {}}
    now, on, status = {}, "", 0
    for name in QUICK:
        result = measure(name, rounds=5, seconds=0.5, torch=None)
        on = f"{result['device']}, JAX {result['versions']['JAX']}"
        found = of.against(result, "plain_flax")
        if found is None:
            raise UserError(f"{name}: plain Flax failed: {result['programs']['plain_flax']}")
        now[name] = {key: round(value, 3) for key, value in asdict(found).items()}
        said = "no ratio is stored"
        if name in before["ratios"]:
            old = of.Ratio(**before["ratios"][name])
            fell = of.fallen(old, found)
            status |= fell and not store
            said = f"was {old}{'   FELL' if fell else ''}"
        print(f"{name:12} {found}   {said}", flush=True)
    if before["on"] not in ("", on):
        print(f"the stored ratios are of another machine: {before['on']}; this is {on}")
    if store:
        RATIOS.write_text(json.dumps({"on": on, "ratios": now}, indent=1) + "\n")
    return status


def rebuild() -> None:
    """Draws section and plot of the document from the stored results."""
    results, order = of.stored(RESULTS), list(WORKLOADS)
    if not results:
        raise UserError(f"{RESULTS} holds no results: measure something first")
    of.draw(results, order, DOCUMENT.parent / PICTURE)
    report.write_section(DOCUMENT, "bench", of.section(results, order, PICTURE))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", help="the Python of an environment that has PyTorch")
    parser.add_argument("--only", nargs="+", choices=MEASURED, metavar="WORKLOAD", help=NAMES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round")
    parser.add_argument("--json", type=Path, help="a file for the raw rates")
    parser.add_argument("--rebuild", action="store_true", help="measure nothing: tables and plot")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--store", action="store_true", help="with --quick")
    options = parser.parse_args(words)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("expected at least one round, of more than 0 seconds")
    if options.store and not options.quick:
        parser.error("--store goes with --quick")
    asked_for = [bool(options.torch or options.only or options.json), options.quick]
    if sum([*asked_for, options.rebuild]) > 1:
        parser.error("--quick and --rebuild stand alone")
    if options.quick:
        return quick(options.store)
    results = []
    for name in [] if options.rebuild else options.only or MEASURED:
        result = measure(name, options.rounds, options.seconds, options.torch)
        results.append(result)
        tables = (of.compared([result]), of.arithmetic([result]), of.limits([result]))
        print("\n\n".join(filter(None, tables)), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
        else:
            of.store(result, RESULTS)
    if not options.json:
        rebuild()
    return 0


NAMES = f"one or more of {', '.join(MEASURED)}"

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
