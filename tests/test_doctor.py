"""The doctor: what it says of facts, and that no machine can make it hang or fail."""

import dataclasses
import os
import re
import subprocess
import sys
import time

import pytest

from jaxeco import doctor
from jaxeco.doctor import GIB, Device, Facts, Folder, Probe

CPU, H100 = Device("cpu", "cpu", None), Device("gpu", "NVIDIA H100", 60 * GIB)
V4 = Device("tpu", "TPU v4", 30 * GIB)
WHERE = ("cache", "compiled programs", "data sets", "runs")
HEALTHY = Facts(
    python=(3, 12, 1),
    versions={"jaxeco": "1", "jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6"},
    requirements=("jax>=0.10.2", "numpy >=2.0", "jaxlib<=0.10.2,>=0.10.1"),
    probe=Probe((CPU,)),
    environment={},
    gpus=0,
    driver=None,
    tpus=0,
    tpu_holders={},
    tpu_lock="",
    pod_hosts=1,
    folders=tuple(Folder(what, f"/somewhere/{what}", True, 50 * GIB) for what in WHERE),
    data_sets={"mnist/3.0.1": "array_record"},
    memory=16 * GIB,
    open_files=4096,
    shared_memory=8 * GIB,
)
PLUGIN = {"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}


def versions(**more: str) -> dict:
    return {"versions": HEALTHY.versions | {k.replace("_", "-"): v for k, v in more.items()}}


def without(name: str) -> dict:
    return {"versions": {k: v for k, v in HEALTHY.versions.items() if k != name}}


def unwritable(what: str) -> dict:
    folders = [dataclasses.replace(f, writable=f.what != what) for f in HEALTHY.folders]
    return {"folders": tuple(folders)}


GPU = {"gpus": 2, "driver": "580.65.06"}
HANGS = {"probe": Probe(problem="no answer within 30 s")}
POD = "pass --multihost"

CASES = {  # what is changed: (the one finding that is not ok, words of it)
    "old python": ({"python": (3, 10, 4)}, "error", "expected 3.11"),
    "no numpy": (without("numpy"), "error", "pip install 'numpy>=2.0'"),
    "old jax": (versions(jax="0.9.9"), "error", "jax 0.9.9 is installed, expected >=0.10.2"),
    "new jaxlib": (versions(jaxlib="0.11.0"), "error", "pip install 'jaxlib<=0.10.2,>=0.10.1'"),
    "not installed": (without("jaxeco"), "warning", "pip install -e ."),
    "gpu, no plugin": (GPU, "error", "pip install -U 'jax[cuda13]==0.10.2'"),
    "gpu, older driver": (GPU | {"driver": "550.54"}, "error", "'jax[cuda12]==0.10.2'"),
    "gpu, oldest driver": (GPU | {"driver": "470.1"}, "error", "install 525 or newer"),
    "gpu, driver for 12, plugin for 13": (
        GPU | {"driver": "550.54"} | versions(jax_cuda13_plugin="0.10.2"),
        "error",
        "too old for CUDA 13",
    ),
    "gpu, kept from it": (
        GPU | {"environment": {"JAX_PLATFORMS": "cpu"}},
        "error",
        "unset JAX_PLATFORMS",
    ),
    "gpu, another CUDA": (
        GPU | versions(**PLUGIN) | {"environment": {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}},
        "error",
        "unset LD_LIBRARY_PATH",
    ),
    "gpu, unknown": (
        GPU | versions(**PLUGIN) | {"probe": Probe((CPU,), said="one\nno cuDNN found\n")},
        "error",
        "no cuDNN found",
    ),
    "gpu, in use, with TensorFlow": (
        GPU | versions(**PLUGIN, tensorflow="2.19.0") | {"probe": Probe((H100, H100))},
        "warning",
        "pip uninstall tensorflow",
    ),
    "gpus in a container": (
        GPU | versions(**PLUGIN) | {"probe": Probe((H100,)), "shared_memory": 2**26},
        "warning",
        "--shm-size",
    ),
    "plugin of another jaxlib": (
        versions(**PLUGIN | {"jax-cuda12-plugin": "0.9.0"}),
        "error",
        "does not belong to jaxlib 0.10.2",
    ),
    "no answer": (HANGS, "error", "no answer within 30 s"),
    "bad flag": (
        {"probe": Probe(problem="Unknown flag in XLA_FLAGS: --x")},
        "error",
        "take the flag out of XLA_FLAGS",
    ),
    "tpu without libtpu": ({"tpus": 4}, "error", "pip install -e '.[tpu]'"),
    "tpu taken": (
        {"tpus": 4, "tpu_holders": {4711: "python train.py"}, "probe": Probe((V4,))},
        "error",
        "kill 4711",
    ),
    "tpu taken by another user": (
        {"tpus": 4, "probe": Probe(problem="The TPU is already in use by a process")},
        "error",
        "sudo lsof",
    ),
    "tpu locked": ({"tpu_lock": "/tmp/libtpu_lockfile"}, "error", "sudo rm /tmp/libtpu_lockfile"),
    "pod": ({"tpus": 4, "pod_hosts": 4, "probe": Probe((V4,))}, "warning", POD),
    "pod, one host alone": (HANGS | {"pod_hosts": 4}, "error", "on all of them together"),
    "slurm": ({"environment": {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}}, "warning", POD),
    "slurm without srun": ({"environment": {"SLURM_NTASKS": "8"}}, "warning", "through srun"),
    "kubernetes": (
        {"environment": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}}
        | versions(kubernetes="32.0"),
        "warning",
        POD,
    ),
    "fake devices": (
        {"environment": {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}},
        "warning",
        "for trials only",
    ),
    "cache read-only": (unwritable("cache"), "error", "JAXECO_CACHE"),
    "data read-only": (unwritable("data sets"), "warning", "none can be added"),
    "disk full": (
        {"folders": (Folder("runs", "/runs", True, 2**20),)},
        "warning",
        "/runs, 1 MiB free: make room",
    ),
    "tfrecord": (
        {"data_sets": {"mnist/3.0.1": "array_record", "lm1b/1.1.0": "tfrecord"}},
        "warning",
        "lm1b/1.1.0 is prepared as tfrecord",
    ),
    "few files": ({"open_files": 256}, "warning", "ulimit -n 4096"),
}


def test_a_healthy_machine() -> None:
    assert {finding.level for finding in doctor.findings(HEALTHY)} == {"ok"}


@pytest.mark.parametrize("case", CASES)
def test_finds_what_is_wrong(case: str) -> None:
    changes, level, words = CASES[case]
    found = doctor.findings(dataclasses.replace(HEALTHY, **changes))
    wrong = [finding for finding in found if finding.level == level and words in finding.text]
    assert len(wrong) == 1, found
    others = [f for f in found if f.level != "ok" and f not in wrong]
    assert not others or case == "pod, one host alone", others  # which has the pod's warning, too
    assert all("\n" not in finding.text for finding in found)


@pytest.mark.parametrize(
    ("version", "wanted", "met"),
    [
        ("0.10.2", ">=0.10.1,<=0.10.2", True),
        ("0.10.10", ">=0.10.2", True),
        ("0.9", ">=0.10", False),
        ("2.0.0", "==2", True),
        ("0.0.42.1", "==0.0.42.*", True),
        ("0.0.43", "==0.0.42.*", False),
        ("1.5", "~=1.4", True),
        ("2.0", "~=1.4", False),
        ("1.5", "!=1.5", False),
        ("3.1", "", True),
    ],
)
def test_versions(version: str, wanted: str, met: bool) -> None:
    assert doctor.meets(version, wanted) == met


def test_names_the_process_that_holds_a_device(tmp_path) -> None:
    device = tmp_path / "accel0"
    device.touch()
    code = f"f = open({str(device)!r}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout and holder.stdin
        holder.stdout.readline()
        found = doctor.holders(re.escape(str(tmp_path)) + r"/accel\d+")
        holder.communicate(b"\n")
    assert list(found) == [holder.pid] and "input()" in found[holder.pid]


def test_prepared_data_sets(tmp_path) -> None:
    for name, text in (
        ("mnist/3.0.1", '{"fileFormat": "array_record"}'),
        ("emnist/balanced/3.1.0", '{"fileFormat": "tfrecord"}'),
        ("broken/1.0.0", "[1"),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "dataset_info.json").write_text(text)
    assert doctor.data_sets(tmp_path) == {
        "mnist/3.0.1": "array_record",
        "emnist/balanced/3.1.0": "tfrecord",
        "broken/1.0.0": "something that cannot be read",
    }


def run(tmp_path, jax: str, **environment: str) -> tuple[int, str, float]:
    """The doctor where `import jax` runs the given text."""
    (tmp_path / "jax.py").write_text(jax)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "jaxeco.doctor", "--time-limit", "1.5"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout, time.monotonic() - began


def test_jax_that_does_not_import(tmp_path) -> None:
    status, said, _ = run(tmp_path, "raise ImportError('libcudart.so.12: no such file')")
    assert status == 1
    assert "error    JAX does not start: ImportError: libcudart.so.12: no such file; " in said


def test_a_driver_that_hangs(tmp_path) -> None:
    blocked = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    status, said, seconds = run(tmp_path, blocked, JAXECO_CACHE=str(tmp_path / "cache"))
    assert status == 1 and "no answer within 1.5 s" in said
    assert f"cache: {tmp_path / 'cache'}" in said
    assert seconds < 15
