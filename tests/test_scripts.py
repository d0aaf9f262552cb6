"""The scripts for clusters, against stand-ins for `gcloud` and `srun` that record what is asked.

The stand-in for gcloud carries out what it is told to run on a worker, in a folder per worker: so
quoting, detaching, stopping and resuming are tried for real, only the cloud is not.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
BASH = shutil.which("bash") or "bash"

GCLOUD = """
import json, os, shutil, subprocess, sys
from pathlib import Path

cloud, words = Path(os.environ["CLOUD"]), sys.argv[1:]
with (cloud / "calls").open("a") as file:
    file.write(json.dumps(words) + "\\n")
options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
assert words[:2] == ["compute", "tpus"] and options["zone"] == "here", words
state, workers = cloud / "state", [cloud / f"worker-{i}" for i in range(2)]
match words[2:4]:
    case "queued-resources", "create":
        for worker in workers:
            worker.mkdir()
        state.write_text("READY")
    case "queued-resources", "delete":
        for worker in workers:
            shutil.rmtree(worker)
        state.unlink()
    case "queued-resources", "describe":
        print("ACTIVE")
    case "tpu-vm", "describe":
        sys.exit("ERROR: (gcloud) NOT_FOUND") if not state.exists() else print(state.read_text())
    case "tpu-vm", "scp":
        for worker in workers:
            shutil.copy(words[4], worker / words[5].partition(":")[2])
    case "tpu-vm", "ssh":
        assert words[4] == "pod" and options["worker"] in ("all", "0")
        for worker in workers if options["worker"] == "all" else workers[:1]:
            env = os.environ | {"HOME": str(worker), "PATH": f"{cloud}/worker-bin:/usr/bin:/bin"}
            done = subprocess.run(["bash", "-c", options["command"]], env=env, cwd=worker)
            if done.returncode:
                sys.exit(done.returncode)
"""

# on a worker: `python3 -m uv venv` makes the environment, whose python is the run
PYTHON3 = """#!/usr/bin/env bash
case "$*" in
  *"uv venv"*) mkdir -p ~/jaxeco-env/bin && cp "$CLOUD/run" ~/jaxeco-env/bin/python ;;
esac
"""
RUN = f"""#!{sys.executable}
import json, os, signal, sys, time
with open(os.path.expanduser("~/argv"), "a") as file:
    print(json.dumps([os.getcwd(), os.environ["TFDS_DATA_DIR"], sys.argv[1:]]), file=file)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
limit = time.time() + 30
while not os.path.exists(os.environ["CLOUD"] + "/end") and time.time() < limit:
    time.sleep(0.02)
sys.exit(int(open(os.environ["CLOUD"] + "/end").read()))
"""
RECORD = '#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>"$CLOUD/sudo"\n'
MULTIHOST = ("--multihost", "--resume", "--workdir")
AWKWARD = ['name=it\'s a "name"', "note=$HOME `date` \\ *\n;"]


class Cloud:
    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout = folder, folder / "checkout"
        for place in ("bin", "worker-bin", "checkout/scripts", "checkout/experiments"):
            (folder / place).mkdir(parents=True)
        shutil.copy(SCRIPTS / "tpu_vm.sh", self.checkout / "scripts")
        (self.checkout / "experiments/a b.py").write_text("# an experiment\n")
        (self.checkout / ".gitignore").write_text("runs/\n")
        (self.checkout / "runs").mkdir()
        (self.checkout / "runs/large").touch()
        subprocess.run(["git", "init", "-q", str(self.checkout)], check=True)
        self.program("bin/gcloud", f"#!{sys.executable}\n{GCLOUD}")
        self.program("worker-bin/python3", PYTHON3)
        self.program("worker-bin/sudo", RECORD)
        self.program("worker-bin/mountpoint", "#!/bin/sh\nexit 1\n")
        self.program("run", RUN)

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def start(self, *words: str, **settings: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin",
            "HOME": str(self.folder),
            "CLOUD": str(self.folder),
            "ZONE": "here",
            "TYPE": "v4-16",
            "STORE": "/mnt/a store",
            "INTERVAL": "0.1",
        }
        return subprocess.Popen(
            [BASH, str(self.checkout / "scripts/tpu_vm.sh"), *words],
            env={name: value for name, value in (environment | settings).items() if value},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, *words: str, **settings: str) -> tuple[int, str]:
        process = self.start(*words, **settings)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    def changes(self) -> list[str]:
        """What was asked for, in order, but for looking."""
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        found = [f"{words[2]} {words[3]}" for words in calls]
        return [call for call in found if "describe" not in call and "ssh" not in call]

    def runs(self, worker: int) -> list:
        path = self.folder / f"worker-{worker}/argv"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, true) -> None:
        limit = time.monotonic() + 20
        while not true():
            assert time.monotonic() < limit, (self.folder / "calls").read_text()
            time.sleep(0.02)

    def kill_workers(self) -> None:
        for path in self.folder.glob("worker-*/jaxeco.pid"):
            os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    (tmp_path / "end").write_text("0")  # whatever still runs there


def test_a_run_on_all_workers_that_comes_back_after_preemption(cloud) -> None:
    assert cloud.call("create", "pod", SPOT="1")[0] == 0
    status, said = cloud.call("setup", "pod", NFS="10.0.0.2:/a b")
    assert status == 0, said
    assert "mount -t nfs 10.0.0.2:/a b /mnt/a store" in (cloud.folder / "sudo").read_text()
    for worker in ("worker-0", "worker-1"):
        copied = cloud.folder / worker / "jaxeco"
        assert (copied / "experiments/a b.py").exists() and not (copied / "runs").exists()

    words = ["experiments/a b.py", *AWKWARD, "--steps", "7"]
    watching = cloud.start("run", "pod", *words, SPOT="1")
    cloud.until(lambda: cloud.runs(0) and cloud.runs(1))
    expected = [
        "/mnt/a store/tensorflow_datasets",
        ["-m", "jaxeco.run", *words, *MULTIHOST, "/mnt/a store/runs/pod"],
    ]
    first = [cloud.runs(worker) for worker in (0, 1)]
    assert [runs[0][1:] for runs in first] == [expected, expected]
    assert [Path(runs[0][0]).name for runs in first] == ["jaxeco", "jaxeco"]

    cloud.kill_workers()
    (cloud.folder / "state").write_text("PREEMPTED")
    # made again, with empty folders: what is there now was started after the preemption
    cloud.until(lambda: cloud.changes().count("queued-resources create") == 2)
    cloud.until(lambda: cloud.runs(0) and cloud.runs(1))
    assert [cloud.runs(worker)[0][1:] for worker in (0, 1)] == [expected, expected]
    assert watching.poll() is None
    (cloud.folder / "end").write_text("0")
    said, _ = watching.communicate(timeout=20)
    assert watching.returncode == 0 and "the run is complete" in said, said
    made = ["queued-resources create", "tpu-vm scp"]
    assert cloud.changes() == [*made, "queued-resources delete", *made]
    creations = [c for c in (cloud.folder / "calls").read_text().splitlines() if '"create"' in c]
    assert all('"--spot"' in c and '"--accelerator-type=v4-16"' in c for c in creations)


def test_stop_lets_the_run_save_and_a_watcher_leaves_it_alone(cloud) -> None:
    cloud.call("create", "pod")
    cloud.call("setup", "pod")
    watching = cloud.start("run", "pod", "experiments/a b.py")
    cloud.until(lambda: cloud.runs(0) and cloud.runs(1))
    watching.kill()  # a laptop is closed; then somebody watches again
    watching.communicate()
    watching = cloud.start("run", "pod", "experiments/a b.py")
    time.sleep(0.5)
    assert cloud.call("stop", "pod")[0] == 0
    said, _ = watching.communicate(timeout=20)
    assert watching.returncode == 143 and "was stopped" in said
    assert [len(cloud.runs(worker)) for worker in (0, 1)] == [1, 1]  # started once, not twice
    statuses = [cloud.folder / f"worker-{i}/jaxeco.status" for i in (0, 1)]
    assert [path.read_text() for path in statuses] == ["143\n", "143\n"]


def test_a_lost_process_is_started_again_and_a_failed_run_is_reported(cloud) -> None:
    cloud.call("create", "pod")
    cloud.call("setup", "pod")
    watching = cloud.start("run", "pod", "experiments/a b.py")
    cloud.until(lambda: cloud.runs(0) and cloud.runs(1))
    os.kill(int((cloud.folder / "worker-0/jaxeco.pid").read_text()), signal.SIGTERM)  # maintenance
    cloud.until(lambda: len(cloud.runs(0)) == 2 and len(cloud.runs(1)) == 2)
    (cloud.folder / "end").write_text("2")
    said, _ = watching.communicate(timeout=20)
    assert watching.returncode == 1 and "failed with status 2" in said


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        ([], {}, "no command given"),
        (["start", "pod"], {}, "unknown command 'start': expected create, setup, run"),
        (["create"], {}, "expected the NAME of a TPU"),
        (["create", "a b"], {}, "expected the NAME of a TPU, such as pod-1, got 'a b'"),
        (["logs", "pod", "more"], {}, "logs takes NAME only, got 'more'"),
        (["create", "pod"], {"ZONE": ""}, "ZONE is not set"),
        (["create", "pod"], {"TYPE": ""}, "TYPE is not set"),
        (["setup", "pod"], {"STORE": ""}, "STORE is not set"),
        (["run", "pod"], {}, "run: expected NAME FILE"),
        (["run", "pod", "experiments/none.py"], {}, "no file experiments/none.py"),
        (["run", "pod", "experiments/a b.py", "--workdir=x"], {}, "leave --workdir out"),
        (["run", "pod", "experiments/a b.py"], {}, "there is no pod in here"),
        (["logs", "pod"], {"PATH": "/nowhere"}, "gcloud is not installed"),
    ],
)
def test_mistakes(cloud, words, settings, said) -> None:
    status, output = cloud.call(*words, **settings)
    assert status == 2 and output.startswith("error: ") and said in output
    assert output.count("\n") == 1


def slurm(tmp_path: Path, srun: str, *words: str) -> tuple[int, str, Path]:
    """Runs the batch script as SLURM would; srun's words come back one in a line, after `srun`."""
    for name, text in (
        ("srun", f'printf "%s\\n" "$@" >"{tmp_path}/words"\n{srun}'),
        ("scontrol", f'echo "$@" >"{tmp_path}/requeued"'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NAME": "my job",
        "SLURM_JOB_ID": "17",
        "PYTHON": "/a/python",
    }
    done = subprocess.run(
        ["bash", str(SCRIPTS / "slurm.sbatch"), *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, tmp_path / "requeued"


def test_slurm_runs_the_command_and_queues_itself_again_when_time_is_over(tmp_path) -> None:
    (tmp_path / "a b.py").touch()
    status, _, requeued = slurm(tmp_path, "exit 0", "a b.py", "note=$HOME it's")
    assert status == 0 and not requeued.exists()
    assert (tmp_path / "words").read_text().splitlines() == [
        *("--wait=600", "/a/python", "-m", "jaxeco.run", "a b.py", "note=$HOME it's"),
        *(*MULTIHOST, "runs/my job-17"),
    ]
    assert slurm(tmp_path, "exit 1", "a b.py")[0] == 1 and not requeued.exists()
    # scancel: the script is told as well as the tasks
    status, _, _ = slurm(tmp_path, "kill -TERM $PPID; exit 143", "a b.py")
    assert status == 143 and not requeued.exists()
    status, said, _ = slurm(tmp_path, "exit 143", "a b.py")
    assert status == 143 and requeued.read_text() == "requeue 17\n" and "queued again" in said
    assert slurm(tmp_path, "exit 0", "none.py")[0] == 2


def test_the_shell_scripts_are_clean() -> None:
    for name in ("tpu_vm.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if not (shellcheck := shutil.which("shellcheck", path=folders)):
        pytest.skip("shellcheck is not installed")
    command = [shellcheck, str(SCRIPTS / "tpu_vm.sh"), str(SCRIPTS / "slurm.sbatch")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, shlex.join(command) + done.stdout
