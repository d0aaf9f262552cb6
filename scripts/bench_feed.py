"""What a batch of CIFAR-size images costs the host: resident, from memory, from array_record.

python scripts/bench_feed.py
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxeco import data

EXAMPLES, BATCH, REPEATS, STEPS = 50_000, 256, 5, 100


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (EXAMPLES, 32, 32, 3), np.uint8)
    y = rng.integers(0, 10, EXAMPLES).astype(np.int32)
    memory = data.Arrays(x, y).open()
    with tempfile.TemporaryDirectory() as root:
        folder, begun = Path(root) / "records", time.perf_counter()
        examples = ({"x": image, "y": label} for image, label in zip(x, y, strict=True))
        data.write_records(folder, examples, shard_size=2**24)
        print(f"write_records: {EXAMPLES / (time.perf_counter() - begun):,.0f} examples/s")
        records = data.ArrayRecords(str(folder)).open()
        measure("resident (rows only)", memory, resident=True)
        measure("streamed from memory", memory)
        measure("array_record, threads", records)
        measure("array_record, 2 processes", records, workers=2)


def measure(name: str, dataset: data.Dataset, resident: bool = False, workers: int = 0) -> None:
    times = []
    with data.Feed.training(dataset, BATCH, 0, resident=resident, workers=workers) as feed:
        for step in range(20):
            feed.fed(step)
        for repeat in range(REPEATS):
            first = 20 + repeat * STEPS
            begun = time.perf_counter()
            for step in range(first, first + STEPS):
                feed.fed(step)
            times.append((time.perf_counter() - begun) / STEPS * 1e3)
    mean, sd = statistics.mean(times), statistics.stdev(times)
    print(f"{name:26} {mean:.2f} ± {sd:.2f} ms a batch of {BATCH} (n = {REPEATS} x {STEPS})")


if __name__ == "__main__":
    main()
