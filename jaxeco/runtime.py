"""What must be settled before JAX wakes up: XLA flags, the compilation cache, where caches live.

Imports nothing heavy; `configure()` must run before the first `import jax`.
"""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# On CPU, XLA hands some operations to the library YNN. With jaxlib 0.10 a vmapped product, square
# and sum then comes out wrong (jax-ml/jax#39103; tests/test_layers.py has a test), and plain Flax,
# which leaves it so, is slower in scripts/bench.py; so nothing is handed to it. An XLA that does
# not know a flag ends the process, so the flag is set only where it has been tried.
CPU_FLAGS = {"--xla_cpu_experimental_ynn_fusion_type": ""}
TRIED_FROM, TRIED_BELOW = (0, 10), (0, 13)  # versions of jaxlib


def cache_dir() -> Path:
    """Where decoded data and compiled programs are kept: $JAXECO_CACHE, or ~/.cache/jaxeco."""
    if "JAXECO_CACHE" in os.environ:
        return Path(os.environ["JAXECO_CACHE"])
    try:
        return Path.home() / ".cache" / "jaxeco"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"jaxeco-{os.getuid()}"


def tried_jaxlib() -> bool:
    """Whether what depends on the insides of jaxlib has been tried with the one installed."""
    jaxlib = tuple(int(part) for part in version("jaxlib").split(".")[:2])
    return TRIED_FROM <= jaxlib < TRIED_BELOW


def restart_with_huge_pages() -> None:
    """Starts this process anew, once, with memory in large pages, where Linux asks programs.

    The C library takes them if its environment says so at its start. Each step on a CPU takes new
    memory for all that lies between its operations, and in pages of 4 KiB that takes long. A
    GLIBC_TUNABLES of the user's, be it empty, leaves all as it is.
    """
    try:
        asked = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:  # not Linux, or a container that hides it
        asked = False
    traced = sys.gettrace() is not None  # a debugger would lose its way
    if not asked or traced or not sys.executable or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def split_cpu() -> None:
    """Presents a CPU as one device for each of its cores; for many runs, which share out devices.

    XLA leaves cores idle in operations as small as theirs, which whole members keep busy. A count
    of the user's in XLA_FLAGS stays as it is; accelerators are what they are. It has to be called
    before JAX starts its devices.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = "--xla_force_host_platform_device_count"
    flags = os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else ""
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{name}={cores} {flags}".strip()


def configure(fake_devices: int | None = None) -> None:
    """Sets XLA's flags and JAX's environment; what the user has set already stays as it is.

    Args:
      fake_devices: present the CPU as this many devices, to try sharding on one machine.
    """
    assert "jax" not in sys.modules, "runtime.configure() must run before jax is imported"
    flags: dict[str, str] = {}
    if tried_jaxlib():
        flags |= CPU_FLAGS
    if fake_devices is not None:
        flags["--xla_force_host_platform_device_count"] = str(fake_devices)
    users = os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else ""
    added = [f"{name}={value}" for name, value in flags.items() if name not in users]
    os.environ["XLA_FLAGS"] = " ".join([*added, users]).strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's chatter, not its errors
