"""What the processes of one run agree on; with one process, all of it is the identity.

Values go through the coordination service of `jax.distributed`, from host to host: no device takes
part, nothing is compiled. All processes must make the same calls in the same order. A thread other
than the main one may do so, too, under names that only it uses.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from jaxeco.errors import RunFailed, UserError

FOREVER_MS = 2**31 - 1  # 24 days: a process that is waited for may be preparing data
_calls: Counter[str] = Counter()  # how often each name was used, so that every use has its own


def count() -> int:
    """How many processes the run has."""
    return _state().num_processes if "jax" in sys.modules else 1


def index() -> int:
    """Which of them this is, from 0."""
    return _state().process_id if "jax" in sys.modules else 0


def first() -> bool:
    """Whether this process writes and says what only one should."""
    return index() == 0


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    if count() > 1:
        client().wait_at_barrier(unique(name), FOREVER_MS)


def from_first(value: Any, name: str = "value") -> Any:
    """The first process's value, on all; what JSON can hold. Elsewhere `value` does not matter."""
    if count() == 1:
        return value
    key = unique(name)
    if first():
        client().key_value_set(key, json.dumps(value))
    return json.loads(client().blocking_key_value_get(key, FOREVER_MS))


def led(action: Callable[[], Any], name: str = "led") -> Any:
    """What `action` returns, done by the first alone; on all. What JSON can hold.

    Raises:
      UserError: the first's action has raised it; on all.
    """
    if count() == 1:
        return action()
    outcome: list[Any] = []
    if first():
        try:
            outcome = [action()]
        except UserError as error:
            outcome = [isinstance(error, RunFailed), str(error)]
    match from_first(outcome, name):
        case [value]:
            return value
        case [failed, message]:
            raise (RunFailed if failed else UserError)(message)


def gather(value: Any, name: str = "values") -> list[Any]:
    """The values of all processes, in their order, on all; what JSON can hold."""
    if count() == 1:
        return [value]
    key = unique(name)
    client().key_value_set(f"{key}/{index()}", json.dumps(value))
    client().wait_at_barrier(key, FOREVER_MS)
    found = dict(client().key_value_dir_get(f"{key}/"))
    return [json.loads(found[f"{key}/{i}"]) for i in range(count())]


def awaited(key: str) -> str:
    """The value of a key, as soon as a process has set it, however late."""
    while True:
        try:
            return client().blocking_key_value_get(key, FOREVER_MS)
        except Exception as error:  # jaxlib's
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def unique(name: str) -> str:
    """A key for this use of the name: the same on all processes, and never used before."""
    _calls[name] += 1
    return f"jaxeco/{name}/{_calls[name]}"


def client() -> Any:
    """Of the coordination service: keys and values, barriers, who is alive."""
    return _state().client


def _state() -> Any:
    from jax._src import distributed  # orbax reaches the coordination service so, too

    return distributed.global_state
