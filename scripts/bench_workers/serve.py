"""What the compared programs have in common: rounds of training, asked for line by line."""

import json
import sys
import time
from collections.abc import Callable


def serve(name: str, train: Callable[[], int]) -> None:
    """Answers each line on the input with the examples per second of a round.

    Args:
      name: of the program, with its version.
      train: takes a step or a few, waits for them, and returns how many examples they had.
    """
    seconds = float(sys.argv[2])
    for _ in range(3):
        train()
    print(json.dumps({"name": name}), flush=True)
    for _ in sys.stdin:
        began, examples = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < seconds:
            examples += train()
        print(json.dumps({"per_second": examples / passed}), flush=True)
