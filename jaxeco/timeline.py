"""What ran when on each device, and what it was for: from a profiler's trace and programs' texts.

An operation is an instruction of a compiled program. Its time is its own: control flow, such as the
loop around the steps of a call, counts only while nothing else of its device runs; and where k
operations of a device run at once, in threads or streams, each gets 1/k of that time. So the times
of all operations add up to the time in which the device was at work.

    CPU  threads of the host; each operation is an event with "hlo_op", and an event "end: ..."
         says when work that it handed to other threads was done
    GPU  a plane for each device; of its lines those of the streams, an event for each kernel
    TPU  a plane for each device; its line "XLA Ops" has an event for each operation
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL = re.compile(r"(while|call|conditional|async-\w+)\b")  # opcodes that only hold others
# of what is in a fusion, that which tells most
TELLING = "convolution dot custom-call scatter gather sort select-and-scatter reduce-window reduce"
TRIVIAL = "parameter constant bitcast tuple get-tuple-element iota broadcast"
# parts of an operation's name that come from how JAX runs a function, not from what it is for
MACHINERY = re.compile(
    r"while|body|cond|closed_call|branch_\d+_fun|checkpoint|rematted_computation|shard_map|pjit"
    r"|eval_jaxpr|custom_\w+_call|xla_\w+|"
)
Key = tuple[str, str]  # of an instruction: its program and its name
HELD = re.compile(r"(?:body|condition|calls|to_apply|_computation)=%?([\w.-]+)")
HOPS = 5  # from an operand to its own first operand, to find out where something comes from
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z0-9-]*)\((.*)")


@dataclass(frozen=True)
class Span:
    """An operation, running once."""

    device: str
    program: str  # name of the module; "" if the trace does not say
    name: str  # of the instruction, or of a GPU's kernel
    start: float  # ns
    end: float
    call: int | None = None  # of the program; None if the trace does not say


@dataclass(frozen=True)
class Instruction:
    kind: str  # its opcode; of a fusion, what is in it
    layer: str  # the path of modules that it belongs to; "" outside of any
    line: str  # of the code that it comes from, as file:number


@dataclass(frozen=True)
class Operation:
    """What an instruction costs in a step, on average over devices."""

    name: str
    kind: str
    layer: str
    line: str
    ms: float  # its own time
    share: float  # of the step
    calls: float

    @property
    def source(self) -> str:
        return self.layer or self.line


@dataclass(frozen=True)
class Usage:
    """Where the time of a step goes, on average over devices."""

    operations: tuple[Operation, ...]  # the most expensive first
    ms: float  # the whole step
    busy: float  # share of the step in which operations run
    between: float | None  # share that is between two calls; None if the trace does not say

    def by_kind(self) -> dict[str, float]:
        """Shares of the step, the largest first."""
        return self._shares(lambda operation: operation.kind)

    def by_layer(self) -> dict[str, float]:
        """Shares of the step, the largest first; "block_*/mlp" is that of all blocks."""
        return self._shares(lambda operation: re.sub(r"\d+(?=.*/)", "*", operation.source))

    def _shares(self, group: Callable[[Operation], str]) -> dict[str, float]:
        shares: dict[str, float] = defaultdict(float)
        for operation in self.operations:
            shares[group(operation)] += operation.share
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


def usage(spans: Sequence[Span], programs: Iterable[tuple[str, str]], ms: float, n: int) -> Usage:
    """Sums up what ran in n steps, of `ms` milliseconds each.

    Args:
      spans: all of them, none of another time.
      programs: name and text of each that may have run.
    """
    known = instructions(spans, programs)
    devices = defaultdict(list)
    for span in spans:
        devices[span.device].append(span)
    own: dict[Key, float] = defaultdict(float)
    busy = within = 0.0
    for of_device in devices.values():
        for key, ns in own_times(of_device, lambda span: is_control(known, span)).items():
            own[key] += ns
            busy += ns
        within += sum(end - start for start, end in runs(of_device))
    times = Counter((span.program, span.name) for span in spans)
    whole = ms * 1e6 * n * max(1, len(devices))  # ns
    found = []
    for (program, name), ns in sorted(own.items(), key=lambda item: -item[1]):
        of = known.get((program, name), Instruction(re.sub(r"[.\d]+$", "", name), "", ""))
        calls = times[program, name] / n / len(devices)
        found.append(
            Operation(name, of.kind, of.layer, of.line, ms * ns / whole, ns / whole, calls)
        )
    told = all(span.call is not None for span in spans)
    return Usage(tuple(found), ms, busy / whole, 1 - within / whole if told else None)


def is_control(known: Mapping[Key, Instruction], span: Span) -> bool:
    key = span.program, span.name
    return bool(CONTROL.match(known[key].kind if key in known else span.name))


def own_times(spans: Iterable[Span], control: Callable[[Span], bool]) -> dict[Key, float]:
    """ns of each instruction on one device, as the head of this file says.

    Args:
      control: whether a span only holds others.
    """
    edges = []
    for i, span in enumerate(spans):
        if span.end > span.start:
            edges += [(span.start, True, i, span), (span.end, False, i, span)]
    own: dict[Key, float] = defaultdict(float)
    working: dict[int, Key] = {}
    holding: dict[int, Key] = {}
    since = 0.0
    for at, begins, i, span in sorted(edges, key=lambda edge: edge[:3]):
        running = list(working.values()) or list(holding.values())[-1:]  # the innermost
        for key in running:
            own[key] += (at - since) / len(running)
        since = at
        active = holding if control(span) else working
        if begins:
            active[i] = (span.program, span.name)
        else:
            del active[i]
    return own


def runs(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """When calls of programs ran: the union of their times, from their first operation to the last.

    Spans that belong to no call count as one.
    """
    calls: dict[Any, tuple[float, float]] = {}
    for span in spans:
        start, end = calls.get(span.call, (span.start, span.end))
        calls[span.call] = min(start, span.start), max(end, span.end)
    union: list[tuple[float, float]] = []
    for start, end in sorted(calls.values()):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


# Traces


def read(trace: Any) -> list[Span]:
    """The operations of a `jax.profiler.ProfileData`."""
    found: list[Span] = []
    for plane in trace.planes:
        lines = list(plane.lines)
        if not plane.name.startswith("/device:"):
            found += _on_threads([event for line in lines for event in line.events])
            continue
        named = [line for line in lines if line.name == "XLA Ops"]
        for line in named or [line for line in lines if line.name.startswith("Stream")]:
            for event in line.events:
                about = dict(event.stats)
                name = about["hlo_op"] if "hlo_op" in about else event.name
                name = re.split(" = ", name)[0].lstrip("%")
                program = about["hlo_module"] if "hlo_module" in about else ""
                call = about["run_id"] if "run_id" in about else None
                found.append(Span(plane.name, program, name, event.start_ns, event.end_ns, call))
    return found


def _on_threads(events: list[Any]) -> Iterator[Span]:
    """Operations of the host's threads. An operation lasts until its "end: ..."."""
    ops, ends = [], {}
    for event in events:
        if event.name.startswith("end: "):
            about = dict(event.stats)
            if "_c" in about:
                ends[about["_ct"], about["_c"]] = event.start_ns
        elif event.duration_ns and "hlo_op" in (about := dict(event.stats)):
            ops.append((event, about))
    for event, about in ops:
        end = event.end_ns
        if "_p" in about:
            end = max(end, ends.get((about["_pt"], about["_p"]), end))
        device = f"cpu:{about['device_ordinal'] if 'device_ordinal' in about else 0}"
        call = about["run_id"] if "run_id" in about else None
        yield Span(device, about["hlo_module"], about["hlo_op"], event.start_ns, end, call)


# Programs


def instructions(
    spans: Iterable[Span], programs: Iterable[tuple[str, str]]
) -> dict[Key, Instruction]:
    """What each (program, name) of the spans is.

    Of several programs with a name, the one that has most of what ran under it.
    """
    ran = defaultdict(set)
    for span in spans:
        ran[span.program].add(span.name)
    best: dict[str, dict[str, Instruction]] = {name: {} for name in ran}
    for program, text in programs:
        for name in {program, ""} & ran.keys():
            has = {k: v for k, v in parse(text).items() if k in ran[name]}
            best[name] = max(has, best[name], key=len)
    return {(program, name): of for program, has in best.items() for name, of in has.items()}


def parse(text: str) -> dict[str, Instruction]:
    """The instructions of a program, as XLA prints it optimised."""
    lines = text.splitlines()
    places = _places(lines)
    inside: dict[str, list[str]] = {}  # instructions of each computation, by its name
    held: dict[str, str] = {}  # by computation: the instruction that holds it
    within: dict[str, str] = {}  # by instruction: its computation
    found: dict[str, tuple[str, str]] = {}  # opcode and rest of the line
    computation = ""
    for line in lines:
        if match := INSTRUCTION.match(line):
            name, opcode, rest = match.groups()
            found[name] = opcode, rest
            within[name] = computation
            inside[computation].append(name)
            held |= dict.fromkeys(HELD.findall(rest), name)
        elif match := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = match[1]
            inside[computation] = []

    def own(name: str) -> tuple[str, str]:
        """Layer and line of an instruction, or of what a fusion holds."""
        called = re.search(r"calls=%?([\w.-]+)", found[name][1])
        for member in (name, *(reversed(inside[called[1]]) if called else ())):
            if any(said := _source(*found[member], places)):
                return said
        return "", ""

    def source(name: str) -> tuple[str, str]:
        """Layer and line; where there are none, of what comes before, or of what it is held by."""
        at, after = name, ""
        for _ in range(HOPS):
            if any(said := own(at)):
                return after * bool(said[0]) + said[0], said[1]
            operand = re.search(r"%([\w.-]+)", found[at][1].split("), ")[0])
            if operand is None or operand[1] not in found:
                break
            at, after = operand[1], "after "
        return source(held[within[name]]) if within[name] in held else ("", "")

    def kind(name: str) -> str:
        opcode, rest = found[name]
        if opcode == "custom-call" and (target := re.search(r'custom_call_target="([^"]*)"', rest)):
            # our own calls say what they are (onednn.py)
            what = re.search(r"\\22kind\\22: \\22(\w+)", rest)
            return what[1] if what else target[1].strip("_")
        called = re.search(r"calls=%?([\w.-]+)", rest)
        if opcode != "fusion" or called is None:
            return opcode
        holds = [found[member][0] for member in inside[called[1]]]
        real = [opcode for opcode in holds if opcode not in TRIVIAL.split()]
        telling = [opcode for opcode in TELLING.split() if opcode in real]
        return real[0] if len(real) == 1 else " ".join(["fusion", *telling[:1]])

    return {name: Instruction(kind(name), *source(name)) for name in found}


def _source(opcode: str, rest: str, places: Mapping[str, str]) -> tuple[str, str]:
    """The layer and the line of code that an instruction's metadata names."""
    named = re.search(r'op_name="([^"]*)"', rest)
    if opcode == "parameter" and named and "/" not in named[1]:
        return named[1].replace("\\", ""), ""  # of the program: a part of the State, say
    path, backward = layer(named[1]) if named else ("", False)
    frame = re.search(r"stack_frame_id=(\d+)", rest)
    line = places[frame[1]] if frame and frame[1] in places else ""
    return f"{path} (backward)" if path and backward else path, line


def layer(op_name: str) -> tuple[str, bool]:
    """The path of modules in an operation's name, and whether it is of the gradient.

    "jit(f)/while/body/transpose(jvp(Net))/Conv_3/mul" is of ("Net/Conv_3", True). The path is ""
    for what is outside of any module.
    """
    if several := re.search(r"(?:^|/)\((.*)\)$", op_name):  # "f/(a/mul:b/mul)": made into one
        path, backward = layer(several[1].split(":")[0])
        return f"{path} and others" if path else "", backward
    parts: list[str] = []
    backward = False
    for part in op_name.split("/")[:-1]:
        while match := re.fullmatch(r"(\w+)\((.*)\)", part):
            backward |= match[1] == "transpose"
            part = "" if match[1] in ("jit", "pjit", "pmap") else match[2]
        if parts and part.startswith(f"{parts[-1]}."):  # a method that is not __call__
            part = part.removeprefix(f"{parts[-1]}.").lstrip("_")
        if not MACHINERY.fullmatch(part):
            parts.append(part)
    return "/".join(parts), backward


def _places(lines: list[str]) -> dict[str, str]:
    """file:line of each stack frame: the innermost line, as the head of a program lists them."""
    tables: dict[str, dict[str, str]] = {}
    table: dict[str, str] = {}
    for line in lines[1:]:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif match := re.match(r"(\d+) (.*)", line):
            table[match[1]] = match[2]
        elif line:
            break
    if "StackFrames" not in tables:
        return {}
    files = {i: _short(name.strip('"')) for i, name in tables["FileNames"].items()}
    locations = {
        i: f"{files[match[1]]}:{match[2]}"
        for i, text in tables["FileLocations"].items()
        if (match := re.search(r"file_name_id=(\d+) .*?\bline=(\d+)", text))
    }
    frames = {
        i: match[1]
        for i, text in tables["StackFrames"].items()
        if (match := re.search(r"file_location_id=(\d+)", text))
    }
    return {i: locations[at] for i, at in frames.items() if at in locations}


def _short(path: str) -> str:
    """A file as it is imported: from below site-packages, or from this package's parent."""
    ours = Path(__file__).parent.parent
    if "site-packages/" in path:
        return path.rpartition("site-packages/")[2]
    return str(Path(path).relative_to(ours)) if Path(path).is_relative_to(ours) else path
