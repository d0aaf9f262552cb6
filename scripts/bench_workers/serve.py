"""What the compared programs have in common: rounds of work, asked for line by line."""

import json
import sys
import time
from collections.abc import Callable

WORKLOAD, SECONDS = sys.argv[1], float(sys.argv[2])
START = SECONDS == 0  # only the first step is wanted


def serve(work: Callable[[], float], parameters: int = 0, **versions: str) -> None:
    """Answers each line on the input with the rate of a round; if START, only says that it began.

    Args:
      work: takes a step or a few, waits for them, and returns how much that was.
      parameters: how many numbers the network learns.
      versions: of the libraries at work.
    """
    work()
    if not START:
        work()  # what the first call left to be done once
    print(json.dumps({"parameters": parameters, "versions": versions}), flush=True)
    for _ in sys.stdin:
        began, done = time.perf_counter(), 0.0
        while (passed := time.perf_counter() - began) < SECONDS or not done:
            done += work()
        print(json.dumps({"per_second": done / passed}), flush=True)
