"""Kills a run with SIGKILL at random moments, resumes it each time, and compares the end with a run
that was never stopped: parameters, optimizer state and all must be the same to the bit.

    python scripts/kill_trial.py --kills 20

Every other kill is timed to fall into a save: a checkpoint that is being written is watched for,
and the run is killed while it is there. Exit status 0 if the end is the same, else 1.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

COMMAND = [
    *(sys.executable, "-m", "jaxeco.run", "experiments/digits_mlp.py"),
    *("epochs=1500", "save_every.count=1", "eval_every.count=20", "steps_per_call=1"),
]


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "--workdir", str(folder), "--resume"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.tmp"))


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the run failed with status {process.returncode}:\n{errors}")


def final_state(folder: Path) -> dict[str, bytes]:
    from jaxeco.checkpoint import load

    def leaves(tree: dict, path: str = "") -> dict[str, bytes]:
        found = {}
        for name, value in tree.items():
            inner = f"{path}/{name}"
            found |= leaves(value, inner) if isinstance(value, dict) else {inner: leaf(value)}
        return found

    def leaf(value: Any) -> bytes:
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        return np.asarray(value).tobytes()

    loaded = load(folder / "checkpoints")
    return {"step": str(loaded.step).encode(), **leaves(loaded.state)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        began = time.monotonic()
        finish(start(whole))
        length = time.monotonic() - began
        print(f"uninterrupted: {length:.1f} s", flush=True)
        in_save = done = 0
        while done < options.kills:
            process = start(killed)
            time.sleep(moments.uniform(2.0, 6.0))  # a start takes about 3 s
            if done % 2 == 0:  # wait for a save to fall into
                limit = time.monotonic() + 5
                while not saving(killed) and process.poll() is None and time.monotonic() < limit:
                    time.sleep(0.0005)
            running = process.poll() is None
            process.kill()
            process.communicate()
            if not running:
                print("the run ended before its kill: no more can be tried")
                break
            done += 1
            in_save += saving(killed)
            steps = [int(p.name) for p in (killed / "checkpoints").glob("*") if p.name.isdigit()]
            print(f"kill {done}: newest checkpoint {max(steps, default=None)}", flush=True)
        finish(start(killed))
        same = final_state(whole) == final_state(killed)
    print(f"{done} kills, {in_save} of them during a save; end state identical: {same}")
    return 0 if same and done == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
