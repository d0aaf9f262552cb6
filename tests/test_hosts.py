"""Several processes on this machine as one run: really started, stopped, killed and resumed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxeco import cluster, interrupt, run
from jaxeco.checkpoint import load
from jaxeco.cluster import Place
from jaxeco.errors import UserError

STEPS = 24

# A network with batch norm and dropout. 360 test examples are no multiple of 64. Every line of the
# log takes $PAUSE seconds, so that a signal comes in the middle of the run.
EXPERIMENT = f"""
import os, time
import flax.linen as nn
from jaxeco import data, losses, metrics, optim
from jaxeco.experiment import Experiment, Steps
from jaxeco.models import BatchNorm, Dropout

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool):
        x = x.reshape(len(x), -1) / 16
        x = nn.relu(BatchNorm()(nn.Dense(16)(x), train=train))
        return nn.Dense(10)(Dropout(0.2)(x, train=train))

class Slow(metrics.Accuracy):
    def result(self, sums):
        time.sleep(float(os.environ["PAUSE"]))
        return super().result(sums)

def experiment() -> Experiment:
    return Experiment(
        name="tiny", train=data.Digits("train"), evals={{"test": data.Digits("test")}},
        model=Net(), loss=losses.SoftmaxCrossEntropy(), metrics=(Slow(),),
        optimizer=optim.SGD(lr=0.1), batch=32, length=Steps({STEPS}),
        eval_batch=64, eval_every=Steps(8), save_every=Steps(4), log_every=Steps(1),
        best="test/accuracy",
    )
"""

# Each of four processes compares what it restores with what one process reads, then trains on.
RESTORE = """
import sys
from pathlib import Path
import numpy as np
from jaxeco import cluster, command, config

def main(words):
    coordinator, process, file, folder = words
    cluster.join(cluster.Place.parse(coordinator, process))
    loaded = config.load(Path(file), ["mesh=data:2,fsdp:2"])
    import jax
    from jaxeco import outcome, session
    from jaxeco.checkpoint import Checkpoints, load
    from jaxeco.plan import plan
    from jaxeco.trees import named
    p = plan(loaded.experiment)
    path = Path(folder) / "checkpoints"
    with Checkpoints(path, description=outcome.identity(p)) as checkpoints:
        state, step = checkpoints.restore(p.abstract_state())
    whole, compared = named(load(path).state), []
    for name, array in named(state.replace(key=None)).items():
        for shard in array.addressable_shards:
            there = whole[name][shard.index]
            assert np.asarray(shard.data).tobytes() == there.tobytes(), name
            compared.append(there.size < array.size)
    print("restored", step, len(compared), sum(compared), flush=True)
    return session.run(loaded, Path(folder), True, None)

command.start(main)
"""

# What two processes agree on; then one of them gets a signal while it waits in C++, as for a
# compilation; then both save an array that they share; then the first is killed.
TALK = """
import os, signal, sys, threading, time
from pathlib import Path
from jaxeco import cluster, command, hosts
from jaxeco.errors import UserError

def main(words):
    coordinator, process, folder = words
    cluster.join(cluster.Place.parse(coordinator, process), 30)
    import jax, numpy as np
    from jaxeco.checkpoint import Checkpoints
    from jaxeco.interrupt import Interrupt
    i = hosts.index()
    try:
        hosts.led(lambda: (_ for _ in ()).throw(UserError("by the first")) if i == 0 else 1)
    except UserError as error:
        said = str(error)
    values = [hosts.gather(i * 10), hosts.from_first(["a", i]), any(hosts.gather(i == 1)), said]
    with Interrupt() as interrupt:
        if i == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            try:
                hosts.client().blocking_key_value_get("never", 4000)
            except Exception:
                pass
            blocked_until = time.time()
        points = 0
        while not interrupt.asked():
            points += 1
            time.sleep(0.01)
        values += [points, interrupt.signal.name]
        stopped = time.time()
    times = hosts.gather(stopped if i == 0 else blocked_until)
    values.append(times[0] < times[1])
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    mesh = jax.make_mesh((4,), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    array = jax.make_array_from_callback(rows.shape, split, lambda index: rows[index])
    with Checkpoints(Path(folder), description={}) as checkpoints:
        checkpoints.save({"array": array}, step=1)
    print("values", values, flush=True)
    hosts.barrier("said")
    time.sleep(1 - i)  # so that the other is through the barrier, too
    if i == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    hosts.barrier("never")

command.start(main)
"""


@dataclass
class Ended:
    status: int
    out: str
    err: str


class Processes:
    """Started at once, each with its number: `word` stands for "HOST:PORT" and "I/N" in `words`."""

    def __init__(
        self, count: int, *words: str, devices: int = 1, only: Any = None, **env: str
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{free.getsockname()[1]}"
        self.by_index = {
            i: subprocess.Popen(
                [sys.executable, *(w.format(place=place, i=i, n=count) for w in words)],
                env=os.environ
                | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PAUSE": "0"}
                | env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in (range(count) if only is None else only)
        }

    def end(self) -> dict[int, Ended]:
        """Waits for all; none may hang."""
        try:
            with ThreadPoolExecutor(len(self.by_index)) as pool:
                said = list(pool.map(lambda p: p.communicate(timeout=180), self.by_index.values()))
        finally:
            for process in self.by_index.values():
                process.kill()
        return {i: Ended(process.returncode, *said.pop(0)) for i, process in self.by_index.items()}


JOIN = ("--coordinator", "{place}", "--process", "{i}/{n}")


def start(tmp_path: Path, count: int, *words: str, **options: Any) -> Processes:
    (tmp_path / "tiny.py").write_text(EXPERIMENT)
    return Processes(count, "-m", "jaxeco.run", str(tmp_path / "tiny.py"), *JOIN, *words, **options)


def lines(folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    try:
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return {}
    assert len({(line["step"], line["split"]) for line in found}) == len(found)
    return {(line["step"], line["split"]): line for line in found}


def alone(tmp_path: Path, *words: str) -> dict[tuple[int, str], dict[str, Any]]:
    """The lines of the same run by this process alone, with four devices."""
    (tmp_path / "tiny.py").write_text(EXPERIMENT)
    folder = tmp_path / "alone"
    assert run.main([str(tmp_path / "tiny.py"), "mesh=data:4", "--workdir", str(folder)]) == 0
    return lines(folder)


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for at, line in theirs.items():
        for name in ("loss", "accuracy"):
            assert ours[at][name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), (at, name)


def news(ended: Ended) -> list[str]:
    """What a process said, without what the CPU's collectives say of themselves."""
    # of several threads at once
    gloo = r"\[Gloo\] Rank |\d+ is connected to \d+ peer ranks|\.? ?Expected number of .* is : \d+"
    return [line for line in re.sub(gloo, "", ended.out).splitlines() if line.strip(". ")]


def test_two_processes_then_four_are_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAUSE", "0")
    folder = tmp_path / "run"
    ended = start(tmp_path, 2, "--workdir", str(folder), "--steps", "8", devices=2).end()
    assert [e.status for e in ended.values()] == [0, 0], ended
    assert not news(ended[1])  # the first speaks for all
    assert any(line.startswith("test at step 8") for line in news(ended[0]))
    assert {"curves.png", "examples.png", "result.json"} <= {p.name for p in folder.iterdir()}
    events = list((folder / "tensorboard").iterdir())
    assert len(events) == 1
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    assert len(sessions) == 1 and len(sessions[0]["devices"]) == 4

    (tmp_path / "restore.py").write_text(RESTORE)
    words = ("{place}", "{i}/{n}", str(tmp_path / "tiny.py"), str(folder))
    ended = Processes(4, str(tmp_path / "restore.py"), *words).end()
    assert [e.status for e in ended.values()] == [0] * 4, ended
    for i in range(4):
        (said,) = re.findall(r"restored 8 (\d+) (\d+)", ended[i].out)
        assert int(said[0]) > int(said[1]) > 0  # some arrays were split
    assert_same(lines(folder), alone(tmp_path))


def wait_for(folder: Path, step: int, processes: Processes) -> None:
    """Returns when training has come to this step."""
    deadline = time.monotonic() + 120
    while not any(at >= step for at, _ in lines(folder)):
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes.by_index.values())
        time.sleep(0.05)


def test_a_signal_then_a_death_then_one_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = tmp_path / "run", {"devices": 2, "PAUSE": "0.3"}
    both = start(tmp_path, 2, "--workdir", str(folder), **options)
    wait_for(folder, 2, both)
    both.by_index[1].send_signal(signal.SIGTERM)
    ended = both.end()
    assert [e.status for e in ended.values()] == [143, 143], ended
    (said,) = re.findall(r"SIGTERM: saved step (\d+);", ended[0].out)
    step = int(said)
    assert 2 <= step < STEPS and not news(ended[1])

    words = ("--workdir", str(folder), "--resume", "--timeout", "15")
    both = start(tmp_path, 2, *words, **options)
    wait_for(folder, step + 4, both)
    both.by_index[1].kill()
    began = time.monotonic()
    ended = both.end()
    assert time.monotonic() - began < 60
    assert ended[0].status == 1
    assert "Traceback" not in ended[0].err
    (said,) = [line for line in ended[0].err.splitlines() if line.startswith("error: ")]
    assert "process 1 of 2 is gone, without a sign of life" in said and "--resume" in said

    monkeypatch.setenv("PAUSE", "0")
    words = (str(tmp_path / "tiny.py"), "mesh=data:4", "--workdir", str(folder), "--resume")
    assert run.main([*words]) == 0
    assert_same(lines(folder), alone(tmp_path))


def test_what_two_processes_agree_on_and_the_death_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(TALK)
    words = (str(tmp_path / "talk.py"), "{place}", "{i}/{n}", str(tmp_path / "saved"))
    ended = Processes(2, *words, devices=2).end()
    values = [
        json.loads(
            re.sub(
                "'",
                '"',
                e.out.split("values ")[1]
                .splitlines()[0]
                .replace("True", "true")
                .replace("False", "false"),
            )
        )
        for e in ended.values()
    ]
    assert values[0] == values[1]
    *agreed, points, name, before = values[0]
    assert agreed == [[0, 10], ["a", 0], True, "by the first"]
    assert name == "SIGTERM" and points > 0
    assert before  # the notice did not wait until the process that got it was free
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert load(tmp_path / "saved").state["array"].tobytes() == rows.tobytes()
    assert [e.status for e in ended.values()] == [-signal.SIGKILL, 1]
    assert "error: process 0 of 2 is gone" in ended[1].err and "Traceback" not in ended[1].err


def test_an_error_is_said_once_or_with_the_number_of_its_process(tmp_path: Path) -> None:
    of_all, of_one = (start(tmp_path, 2, word) for word in ("seed={i}", "batch=8{i}"))
    ended = of_all.end()
    assert [(e.status, e.err) for e in ended.values()] == [
        (
            2,
            "error: process 1 of 2 differs from the first in seed: start all with the same words,"
            " the same files and the same data\n",
        ),
        (2, ""),
    ]
    ended = of_one.end()
    said = "batch=81 is not divisible by 2 devices; try batch=80 or 82\n"
    assert (ended[1].status, ended[1].err) == (2, f"error: process 1 of 2: {said}")
    assert (ended[0].status, ended[0].err) == (1, f"error: process 1 of 2 ended: {said}")


def test_who_does_not_arrive_is_named(tmp_path: Path) -> None:
    began = time.monotonic()
    some = start(tmp_path, 5, "--timeout", "5", only=(0, 2))
    lost = start(tmp_path, 2, "--timeout", "5", only=(1,))
    ended, nobody = some.end(), lost.end()
    assert time.monotonic() - began < 40
    for e in ended.values():
        assert e.status == 2
        assert e.err == (
            "error: processes 1, 3, 4 of 5 did not arrive within 5 s: start them with"
            " --process 1/5, --process 3/5, --process 4/5\n"
        )
    assert nobody[1].status == 2
    assert re.fullmatch("error: nobody answers at 127.0.0.1:.*\n", nobody[1].err)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port} .Address already in"):
            cluster.call_roll(Place("127.0.0.1", port, 0, 2), 5)


def test_the_roll_call_knows_strangers_doubles_and_other_counts() -> None:
    def call(*words: Any) -> tuple[str, list[Any]]:
        """What the first of two says, where these come; and what they hear."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with ThreadPoolExecutor() as pool:
            roll = pool.submit(cluster.call_roll, Place("127.0.0.1", port, 0, 3), 3)
            heard = []
            for word in words:
                while True:
                    try:
                        caller = socket.create_connection(("127.0.0.1", port))
                        break
                    except OSError:
                        time.sleep(0.02)
                caller.sendall(word)
                heard.append(caller)
            error = roll.exception()
            return str(error), [caller.makefile().readline() for caller in heard]

    one, two = (b'{"process": %d, "of": 3}\n' % i for i in (1, 2))
    said, heard = call(b"GET / HTTP/1.0\n", one, two)
    assert said == "None" and heard[1:] == ['{"verdict": null}\n'] * 2
    said, heard = call(one, one)
    assert said == "two processes were started as --process 1/3"
    assert all(said in line for line in heard)
    said, heard = call(one, b'{"process": 1, "of": 2}\n')
    assert said.startswith("process 1 was started as one of 2, the first as one of 3")
    assert all(said in line for line in heard)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--process", "0/2"], "--coordinator HOST:PORT and --process I/N go together"),
        (["--coordinator", "a:1"], "--coordinator HOST:PORT and --process I/N go together"),
        (["--multihost", "--coordinator", "a:1", "--process", "0/2"], "leave out either"),
        (["--timeout", "9"], "--timeout is for several processes"),
        (["--coordinator", "a:1", "--process", "0/2", "--timeout", "1"], "at least 5 seconds"),
        (["--coordinator", "a:1", "--process", "2/2"], "expected 0/2 to 1/2"),
        (["--coordinator", "a:1", "--process", "0/0"], "expected I/N"),
        (["--coordinator", "a:1", "--process", "-1/2"], "expected (one argument|I/N)"),
        (["--coordinator", "a:1", "--process", "1of2"], "expected I/N"),
        (["--coordinator", "a", "--process", "0/2"], "expected HOST:PORT"),
        (["--coordinator", "a:0", "--process", "0/2"], "expected HOST:PORT"),
        (["--coordinator", "a:99999", "--process", "0/2"], "expected HOST:PORT"),
        (["--multihost"], "--multihost: found no TPU pod, SLURM or Kubernetes job"),
    ],
)
def test_words_that_make_no_sense(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")  # afterwards as before
    with pytest.raises(UserError, match=message):
        run.main(["experiments/digits_mlp.py", *words])


def test_a_process_of_slurm_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "JOB_ID": "7",
        "STEP_NODELIST": "node[03-04]",
        "NTASKS": "2",
        "PROCID": "1",
        "LOCALID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")  # afterwards as before
    place = Place.detect(5)
    assert (place.host, place.index, place.count) == ("node03", 1, 2)


def test_addresses() -> None:
    assert Place.parse("10.0.0.2:1234", "1/4") == Place("10.0.0.2", 1234, 1, 4)
    place = Place.parse("[::1]:1234", "0/1")
    assert (place.host, place.address) == ("::1", "[::1]:1234")


def test_a_machine_that_is_to_be_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Google's metadata server: it answers when the value is another than that of `last_etag`."""
    taken, asked = threading.Event(), []

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            known = self.path.split("last_etag=")[1]
            if known == "0":  # no value is known yet: this one
                version, value = "a", "FALSE"
            else:
                taken.wait(20)
                version, value = "b", "TRUE"
            self.send_response(200)
            self.send_header("ETag", version)
            self.end_headers()
            self.wfile.write(value.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_address[1]}")
        with interrupt.Interrupt() as request:
            deadline = time.monotonic() + 20
            while len(asked) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not request.asked()
            taken.set()
            while not request.asked() and time.monotonic() < deadline:
                time.sleep(0.02)
        server.shutdown()
    assert request.signal is signal.SIGTERM and request.exit_status == 143
    path, flavor = asked[1]
    assert path.startswith("/computeMetadata/v1/instance/preempted?wait_for_change=true")
    assert path.endswith("last_etag=a") and flavor == "Google"


def test_no_other_machine_asks_google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    for product, server in {
        "Google Compute Engine\n": "metadata.google.internal",
        "OptiPlex 7050\n": None,
    }.items():
        (tmp_path / "product_name").write_text(product)
        monkeypatch.setattr(interrupt, "MACHINE", tmp_path / "product_name")
        assert interrupt.metadata_server() == server
    monkeypatch.setattr(interrupt, "MACHINE", tmp_path / "nothing")
    assert interrupt.metadata_server() is None


def test_a_signal_is_noted_and_a_second_one_acts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interrupt.Interrupt() as request:
        assert not request.asked() and request.signal is None
        signal.raise_signal(signal.SIGTERM)
        assert request.asked() and request.asked()
        assert signal.getsignal(signal.SIGTERM) == before
    assert request.exit_status == 143
