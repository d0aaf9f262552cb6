"""What is installed, which devices JAX sees, what is wrong and how to mend it.

    python -m jaxeco.doctor

Facts are gathered first, none in a way that can fail or hang: JAX is asked in a process of its own,
under a time limit, so that a driver that hangs, or an installation that does not even import, ends
in a line of the report. The report, `findings`, is a pure function of the facts.
"""

import contextlib
import glob
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxeco import command, runtime
from jaxeco.errors import UserError

GIB = 2**30
TIME_LIMIT = 30.0  # seconds for JAX to start its devices and multiply two matrices
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
EXTRAS = (
    *("libtpu", "tensorboardx", "wandb", "mlflow-skinny", "optuna"),
    *("torch", "kubernetes", "hypothesis", "pytest"),
)
TENSORFLOW = ("tensorflow", "tensorflow-cpu", "tf-nightly", "tensorflow-gpu")
TELLING = re.compile("(JAX|XLA|TPU|MEGASCALE|JAXECO|TFDS|CUDA|NCCL|LD_LIBRARY_PATH|TF_CPP).*")
# of Google's PCI devices, those that are TPUs: v3, plc, v4, v5p, v5e, v6e, 7x; as JAX knows them
TPU_CHIPS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
# an oldest driver for each CUDA, of NVIDIA's "CUDA compatibility"
DRIVERS = {13: 580, 12: 525}
MULTIHOST = "pass --multihost to jaxeco.run, in every process, or each trains alone"

PROBE = """
import json, os
from jaxeco import runtime
runtime.configure()
import jax, jax.numpy as jnp
devices = jax.devices()
assert float(jax.jit(jnp.dot)(jnp.ones(8), jnp.ones(8))) == 8
print()
print(json.dumps({
    "flags": os.environ["XLA_FLAGS"],
    "devices": [
        (d.platform, d.device_kind, (d.memory_stats() or {}).get("bytes_limit")) for d in devices
    ],
}))
"""


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warning", "error"]
    text: str  # one line: what is so; if it is wrong, then how to mend it


@dataclass(frozen=True)
class Device:
    platform: str
    kind: str
    memory: int | None  # bytes that JAX may use; None where it does not say, as on a CPU


@dataclass(frozen=True)
class Probe:
    """What a process that started JAX said."""

    devices: tuple[Device, ...] = ()
    flags: str = ""  # XLA_FLAGS as a run has them
    problem: str = ""  # why there was no answer; "" if there was one
    said: str = ""  # its standard error


@dataclass(frozen=True)
class Folder:
    what: str
    path: str
    writable: bool
    free: int  # bytes


@dataclass(frozen=True)
class Facts:
    python: tuple[int, ...]
    versions: Mapping[str, str]  # of all distributions, by their normalised names
    requirements: tuple[str, ...]  # of jaxeco, and those of jax on jaxlib: "jax>=0.10.2"
    probe: Probe
    environment: Mapping[str, str]
    gpus: int  # NVIDIA's, as the system sees them
    driver: str | None  # NVIDIA's, such as "580.65.06"
    tpus: int  # chips, as the system sees them
    tpu_holders: Mapping[int, str]  # other processes that have a TPU open: {process id: command}
    tpu_lock: str  # a lock file of libtpu's that this user may not write; "" if there is none
    pod_hosts: int  # hosts of the TPU slice that this one belongs to, 1 if there is none
    folders: tuple[Folder, ...]
    data_sets: Mapping[str, str]  # prepared by tfds: {"mnist/3.0.1": "array_record"}
    memory: int  # bytes of the host that this process may use
    open_files: int  # how many files a process may have open
    shared_memory: int  # bytes of /dev/shm


def findings(facts: Facts) -> list[Finding]:
    """The report."""
    return [
        *packages(facts),
        *devices(facts),
        *tpu(facts),
        *environment(facts),
        *hosts(facts),
        *storage(facts),
        *limits(facts),
    ]


def packages(facts: Facts) -> Iterable[Finding]:
    versions = facts.versions
    python = ".".join(map(str, facts.python))
    if facts.python < (3, 11):
        yield Finding("error", f"Python {python}: expected 3.11 or newer; make a new environment")
    else:
        yield Finding("ok", f"Python {python}")
    if "jaxeco" not in versions:
        yield Finding("warning", "jaxeco is not installed: pip install -e . in its folder")
    names = [_split(requirement)[0] for requirement in facts.requirements]
    shown = [name for name in dict.fromkeys([*names, "jaxlib", *PLUGINS, *EXTRAS])]
    there = [f"{name} {versions[name]}" for name in shown if name in versions]
    yield Finding("ok", f"installed: {', '.join(there) or 'nothing of what is needed'}")
    for requirement in facts.requirements:
        name, wanted = _split(requirement)
        if name not in versions:
            yield Finding("error", f"{name} is not installed: pip install '{name}{wanted}'")
        elif not meets(versions[name], wanted):
            yield Finding(
                "error",
                f"{name} {versions[name]} is installed, expected {wanted}:"
                f" pip install '{name}{wanted}'",
            )
    for name in PLUGINS:
        if name in versions and versions[name] != versions.get("jaxlib"):
            extra = "cuda13" if "13" in name else "cuda12"
            yield Finding(
                "error",
                f"{name} {versions[name]} does not belong to jaxlib {versions.get('jaxlib')}, JAX"
                f" leaves it out and uses the CPU: pip install -U"
                f" 'jax[{extra}]=={versions.get('jax', versions[name])}'",
            )
    if len({name for name in PLUGINS[:2] if name in versions}) == 2:
        yield Finding(
            "warning",
            "jax-cuda12-plugin and jax-cuda13-plugin are both installed, JAX takes one of them:"
            " pip uninstall that and its -pjrt which is not for your driver",
        )
    for name in TENSORFLOW:
        if name in versions and name != "tensorflow-cpu" and facts.gpus:
            yield Finding(
                "warning",
                f"{name} {versions[name]} is installed; jaxeco never imports it, but where it is"
                " imported it takes the GPU's memory, and brings CUDA libraries that can push JAX"
                f" onto the CPU: pip uninstall {name}, or install tensorflow-cpu instead",
            )
        elif name in versions:
            yield Finding("ok", f"{name} {versions[name]} is installed; jaxeco never imports it")


def devices(facts: Facts) -> Iterable[Finding]:
    probe, asked = facts.probe, facts.environment.get("JAX_PLATFORMS", "")
    if probe.problem:
        yield Finding("error", f"JAX does not start: {probe.problem}{_mend(facts)}")
        return
    groups: dict[Device, int] = {}
    for device in probe.devices:
        groups[device] = groups.get(device, 0) + 1
    for device, count in groups.items():
        memory = f", {_size(device.memory)} each" if device.memory else ""
        yield Finding("ok", f"JAX sees {count} x {device.platform} ({device.kind}){memory}")
    platforms = {device.platform for device in probe.devices}
    for kind, count, name in (("gpu", facts.gpus, "NVIDIA GPU"), ("tpu", facts.tpus, "TPU")):
        if not count or kind in platforms:
            continue
        if asked and not {kind, "cuda"} & set(asked.split(",")):
            mend = f"JAX_PLATFORMS={asked} keeps JAX from it: unset JAX_PLATFORMS"
        elif kind == "tpu":
            mend = "pip install -e '.[tpu]'" if "libtpu" not in facts.versions else _told(probe)
        else:
            mend = _mend_gpu(facts)
        yield Finding("error", f"this machine has {count} x {name}, but JAX uses the CPU: {mend}")


def _mend_gpu(facts: Facts) -> str:
    versions, jax = facts.versions, facts.versions.get("jax", "")
    plugins = [name for name in PLUGINS[:2] if name in versions]
    major = int(match[0]) if (match := re.match(r"\d+", facts.driver or "")) else None
    cuda = next((c for c, oldest in DRIVERS.items() if major is None or major >= oldest), None)
    if cuda is None:
        return f"its driver {facts.driver} is too old for CUDA 12: install {DRIVERS[12]} or newer"
    if not plugins:
        return f"pip install -U 'jax[cuda{cuda}]=={jax}'"
    if plugins == [PLUGINS[1]] and cuda == 12:
        return (
            f"its driver {facts.driver} is too old for CUDA 13: install {DRIVERS[13]} or newer, or"
            f" pip uninstall jax-cuda13-plugin jax-cuda13-pjrt and"
            f" pip install -U 'jax[cuda12]=={jax}'"
        )
    if "cuda" in facts.environment.get("LD_LIBRARY_PATH", "").lower():
        return "LD_LIBRARY_PATH names another CUDA, which hides JAX's own: unset LD_LIBRARY_PATH"
    return _told(facts.probe)


def _told(probe: Probe) -> str:
    lines = [line.strip() for line in probe.said.splitlines() if line.strip()]
    return f"JAX said: {lines[-1][:300]}" if lines else "JAX said nothing of why"


def _mend(facts: Facts) -> str:
    said = facts.probe.problem + facts.probe.said
    if "XLA_FLAGS" in said:
        return "; take the flag out of XLA_FLAGS"
    if facts.tpu_holders or facts.tpu_lock:
        return "; see what is said of the TPU below"
    if facts.tpus and "in use" in said:
        return "; by another user's process: sudo lsof -w /dev/accel* /dev/vfio/* names it"
    if facts.pod_hosts > 1:
        return "; of a pod JAX starts on all hosts at once: run this on all of them together"
    if facts.gpus or facts.tpus:
        return "; JAX_PLATFORMS=cpu goes round the accelerator until that is mended"
    if (asked := facts.environment.get("JAX_PLATFORMS", "")) not in ("", "cpu"):
        return f"; JAX_PLATFORMS={asked} asks for what is not here: unset it"
    return "; python -c 'import jax; jax.devices()' shows all that JAX says"


def tpu(facts: Facts) -> Iterable[Finding]:
    for process, words in facts.tpu_holders.items():
        yield Finding(
            "error",
            f"the TPU is in use by process {process} ({words[:80]}), and takes one process at a"
            f" time: wait for it, or kill {process}",
        )
    if facts.tpu_lock:
        yield Finding(
            "error",
            f"{facts.tpu_lock} is another user's, and keeps JAX from the TPU:"
            f" sudo rm {facts.tpu_lock}, once nobody uses the TPU",
        )


def environment(facts: Facts) -> Iterable[Finding]:
    if flags := facts.probe.flags:
        yield Finding("ok", f"XLA_FLAGS of a run: {flags}")
    if "xla_force_host_platform_device_count" in facts.environment.get("XLA_FLAGS", ""):
        yield Finding(
            "warning",
            "XLA_FLAGS presents the CPU as several devices, which is slower than one and for trials"
            " only: take xla_force_host_platform_device_count out of it",
        )
    for name, value in sorted(facts.environment.items()):
        if TELLING.fullmatch(name) and name != "XLA_FLAGS":
            yield Finding("ok", f"{name}={value[:200]}")
    if facts.environment.get("JAX_DISABLE_JIT", "").lower() in ("1", "true"):
        yield Finding("warning", "JAX_DISABLE_JIT compiles nothing, a run will crawl: unset it")


def hosts(facts: Facts) -> Iterable[Finding]:
    env = facts.environment
    if facts.pod_hosts > 1:
        yield Finding("warning", f"one of {facts.pod_hosts} hosts of a TPU slice: {MULTIHOST}")
    elif (tasks := env.get("SLURM_NTASKS", "1")) != "1":
        where = "" if "SLURM_PROCID" in env else "; start it through srun, see docs/pods.md"
        yield Finding("warning", f"a SLURM job of {tasks} tasks: {MULTIHOST}{where}")
    elif "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        yield Finding("warning", f"a pod of an indexed Kubernetes Job: {MULTIHOST}")
        if "kubernetes" not in facts.versions:
            yield Finding("error", "JAX finds the other pods through: pip install 'jax[k8s]'")
    else:
        yield Finding("ok", "one host")


def storage(facts: Facts) -> Iterable[Finding]:
    for folder in facts.folders:
        about = f"{folder.what}: {folder.path}, {_size(folder.free)} free"
        if not folder.writable and folder.what == "data sets":
            yield Finding("warning", f"{about}; cannot be written, so that none can be added")
        elif not folder.writable:
            yield Finding("error", f"{about}; cannot be written: {_elsewhere(folder.what)}")
        elif folder.free < GIB:
            yield Finding("warning", f"{about}: make room, or {_elsewhere(folder.what)}")
        else:
            yield Finding("ok", about)
    usable = [name for name, kind in facts.data_sets.items() if kind == "array_record"]
    if usable:
        yield Finding("ok", f"prepared data sets: {', '.join(sorted(usable))}")
    else:
        yield Finding("ok", "no data set is prepared; a run that wants one downloads it")
    for name, kind in sorted(facts.data_sets.items()):
        if kind != "array_record":
            yield Finding(
                "warning",
                f"{name} is prepared as {kind}, which has no random access: remove its folder to"
                " have it prepared as array_record",
            )


def _elsewhere(what: str) -> str:
    return {
        "cache": "name another folder in JAXECO_CACHE",
        "compiled programs": "name another folder in JAX_COMPILATION_CACHE_DIR",
        "data sets": "name another folder in TFDS_DATA_DIR",
        "runs": "start from another folder, or give --workdir",
    }[what]


def limits(facts: Facts) -> Iterable[Finding]:
    yield Finding("ok", f"memory of the host: {_size(facts.memory)}")
    if facts.open_files < 1024:
        yield Finding(
            "warning",
            f"a process may open {facts.open_files} files, too few for checkpoints and data of many"
            " files: ulimit -n 4096",
        )
    else:
        yield Finding("ok", f"a process may open {facts.open_files:,} files")
    if facts.gpus > 1 and facts.shared_memory < GIB:
        yield Finding(
            "warning",
            f"/dev/shm has {_size(facts.shared_memory)}, through which the GPUs talk: start the"
            " container with --shm-size=8g",
        )
    else:
        yield Finding("ok", f"shared memory: {_size(facts.shared_memory)}")


def meets(version: str, wanted: str) -> bool:
    """Whether a version is within ">=0.10.1,<=0.10.2"; of a pre-release only its numbers count."""
    have = _numbers(version)
    for clause in filter(None, wanted.replace(" ", "").split(",")):
        operator, text = re.fullmatch(r"([<>=!~]+)(.*)", clause).groups()  # type: ignore[union-attr]
        want = _numbers(text)
        met = {
            ">=": have >= want,
            "<=": have <= want,
            ">": have > want,
            "<": have < want,
            "==": have[: len(want)] == want if text.endswith("*") else have == want,
            "!=": have != want,
            "~=": have >= want and have[: len(want) - 1] == want[:-1],
        }
        if not met[operator]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(n) for n in re.match(r"[\d.]*", version)[0].split(".") if n]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _split(requirement: str) -> tuple[str, str]:
    """("jax", ">=0.10.2") of "jax[k8s] >=0.10.2; marker"."""
    name, wanted = re.match(r"([\w.-]+)(?:\[.*?\])?\s*\(?([^;)]*)", requirement).groups()  # type: ignore[union-attr]
    return _normal(name), wanted.strip()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _size(n: float) -> str:
    return f"{n / GIB:.1f} GiB" if n >= GIB else f"{n / 2**20:.0f} MiB"


# Gathering


def gather(time_limit: float = TIME_LIMIT) -> Facts:
    """The facts of this machine; takes as long as JAX takes to start."""
    env = dict(os.environ)
    cache, tfds = runtime.cache_dir(), env.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    compiled = env.get("JAX_COMPILATION_CACHE_DIR", str(cache / "compiled"))
    places = {"cache": str(cache), "compiled programs": compiled, "data sets": tfds, "runs": "runs"}
    tpus = _tpus()
    return Facts(
        python=sys.version_info[:3],
        versions=_versions(),
        requirements=_requirements(),
        probe=ask(PROBE, time_limit),
        environment=env,
        gpus=len(glob.glob("/dev/nvidia[0-9]*")) or len(glob.glob("/dev/dxg")),
        driver=_found(r"Module\D*([\d.]+)", _text("/proc/driver/nvidia/version")),
        tpus=tpus,
        tpu_holders=holders(r"/dev/(accel\d+|vfio/\d+)") if tpus else {},
        tpu_lock=_foreign_lock("/tmp/libtpu_lockfile"),
        pod_hosts=_pod_hosts(env, tpus),
        folders=tuple(_folder(what, Path(path).expanduser()) for what, path in places.items()),
        data_sets=data_sets(Path(tfds).expanduser()),
        memory=_memory(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
    )


def ask(code: str, time_limit: float) -> Probe:
    """Runs `code`, which prints its answer as a last line of JSON, in a process of its own."""
    # a GPU's memory is not taken for the moment that this lasts
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        answer, said = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # in a driver nothing can end it
            process.communicate(timeout=2)
        return Probe(problem=f"no answer within {time_limit:g} s; a driver hangs")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if process.returncode:
        how = f"ended by signal {-process.returncode}" if process.returncode < 0 else "failed"
        telling = [line for line in lines if re.search(r"Error|Unknown flag|FAILED", line)] or lines
        return Probe(problem=telling[-1][:300] if telling else how, said=said)
    found = json.loads(answer.splitlines()[-1])
    return Probe(tuple(Device(*device) for device in found["devices"]), found["flags"], said=said)


def holders(pattern: str) -> dict[int, str]:
    """Other processes with an open file whose path matches, as far as this user may look."""
    found = {}
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        process = int(link.split("/")[2])
        with contextlib.suppress(OSError):
            if process != os.getpid() and re.fullmatch(pattern, os.readlink(link)):
                words = _text(f"/proc/{process}/cmdline").replace("\0", " ").strip()
                found[process] = words or "its command is not known"
    return found


def data_sets(folder: Path) -> dict[str, str]:
    """What tfds has prepared there: {"name/config/version": file format}."""
    found = {}
    for depth in ("*/*", "*/*/*"):
        for path in folder.glob(f"{depth}/dataset_info.json"):
            try:
                kind = json.loads(path.read_text())["fileFormat"]
            except (OSError, ValueError, LookupError, TypeError):
                kind = "something that cannot be read"
            found[path.parent.relative_to(folder).as_posix()] = str(kind)
    return found


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        with contextlib.suppress(Exception):  # a broken one does not hide the others
            found.setdefault(_normal(distribution.metadata["Name"]), distribution.version)
    return found


def _requirements() -> tuple[str, ...]:
    found: list[str] = []
    for name, kept in (("jaxeco", ""), ("jax", "jaxlib")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            wanted = importlib.metadata.requires(name) or []
            found += [line for line in wanted if line.startswith(kept) and "extra ==" not in line]
    return tuple(found)


def _tpus() -> int:
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    google = [path for path in vendors if _text(path).strip() == "0x1ae0"]
    return sum(_text(path[: -len("vendor")] + "device").strip() in TPU_CHIPS for path in google)


def _foreign_lock(path: str) -> str:
    return path if os.path.exists(path) and not os.access(path, os.W_OK) else ""


def _pod_hosts(env: Mapping[str, str], tpus: int) -> int:
    """Hosts of the TPU slice: of GKE's environment, or of the metadata server of a TPU VM."""
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in env:
            return len(env[name].split(","))
    if not tpus or "TPU_SKIP_MDS_QUERY" in env:
        return 1
    address = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{address}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return len(answer.read().decode().split(","))
    except (OSError, ValueError):
        return 1


def _folder(what: str, path: Path) -> Folder:
    path = path.absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return Folder(what, str(path), writable, shutil.disk_usage(there).free)


def _memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _found(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def main(words: list[str]) -> int:
    """Prints the report; returns 1 if there is an error in it."""
    parser = command.Parser(prog="python -m jaxeco.doctor", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT, help="seconds for JAX to start (30)"
    )
    limit = parser.parse_args(words).time_limit
    if not limit > 0:
        parser.error(f"--time-limit {limit:g}: expected a number above 0")
    found = findings(gather(limit))
    for finding in found:
        print(f"{finding.level:<8} {finding.text}")
    counts = {level: sum(f.level == level for f in found) for level in ("error", "warning")}
    print(f"\nerrors: {counts['error']}, warnings: {counts['warning']}")
    return 1 if counts["error"] else 0


if __name__ == "__main__":  # not through command.start: it wants an installation that is whole
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
