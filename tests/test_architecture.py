"""Arrows between modules go down only, and nothing heavy is imported by accident."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "jaxeco"

# From top to bottom. A module may import from the floors below its own.
FLOORS = [
    "run compare diff report reproduce sweep weights sample replay prepare doctor verify".split(),
    ["session", "grid", "command"],
    ["population"],
    ["fit", "programs"],
    ["groups", "lr_find", "outcome", "profile", "recovery"],
    ["plan"],
    ["evaluate", "train", "pretrained", "runs", "sweeps", "watch"],
    "claims cluster guard generate forward parallel checkpoint log plots folder interrupt".split(),
    ["config"],
    ["experiment"],
    ["optim", "data", "models", "losses", "ranking", "ondisk", "trackers"],
    ["metrics", "onednn", "schedules", "sharding"],
    "axes culprit description hosts markup runtime stats storage threefry timeline trees".split(),
    ["errors"],
]
HEIGHT = {name: -floor for floor, names in enumerate(FLOORS) for name in names}


def room(module: str) -> str:
    """`jaxeco.data.order` is in the room `data`."""
    return module.split(".")[1]


def imports() -> list[tuple[str, str]]:
    """(importing, imported) modules of the package, also those inside functions, not for typing."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in typing_only:
                continue
            if isinstance(node, ast.Import):
                found += [(name, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = node.module == "jaxeco"
                found += [
                    (name, f"jaxeco.{alias.name}" if whole else node.module) for alias in node.names
                ]
    return [(a, b) for a, b in found if a.startswith("jaxeco.") and not a.endswith("__init__")]


def test_every_room_is_on_a_floor() -> None:
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert rooms - {"__init__"} == set(HEIGHT)


def test_arrows_go_down_only() -> None:
    inner = [(a, b) for a, b in imports() if b.startswith("jaxeco.") and room(a) != room(b)]
    assert len(inner) > 30  # or the test reads nothing
    upward = [(a, b) for a, b in inner if HEIGHT[room(a)] <= HEIGHT[room(b)]]
    # rooms of one floor may stand side by side, but do not know each other
    assert upward == []


def test_only_ondisk_knows_orbax() -> None:
    assert {a for a, b in imports() if b.split(".")[0] == "orbax"} == {"jaxeco.ondisk"}


def modules_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_reading_an_experiment_wakes_nothing_up() -> None:
    loaded = modules_after("import jaxeco.config, jaxeco.experiment, jaxeco.runtime")
    assert "jaxeco.config" in loaded
    assert not {"jax", "numpy", "flax"} & loaded


def test_importing_all_of_jaxeco_leaves_heavy_libraries_asleep() -> None:
    loaded = modules_after("import jaxeco.session")
    heavy = {
        "tensorflow",
        "torch",
        "orbax",
        "matplotlib",
        "sklearn",
        "tensorflow_datasets",
        "grain",
    }
    assert "jaxeco.train" in loaded
    assert not heavy & loaded
