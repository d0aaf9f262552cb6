"""Convolutions and matrix products on a CPU by oneDNN, where its library is installed.

    pip install -e '.[cpu]'     # on x86-64 Linux; JAXECO_ONEDNN=off leaves it out again

They give what XLA's give, up to rounding. XLA has no fast path for bfloat16 on a CPU, and oneDNN
has, on one that multiplies bfloat16 (AVX-512 BF16 or AMX); in float32 the gain is smaller.

XLA calls a handler of ours through its foreign function interface (xla/ffi/api/c_api.h, whose
structures are written out below), with buffers and a text that describes the operation; the handler
calls oneDNN's C interface (oneapi-src.github.io/oneDNN). All of that through ctypes, so nothing is
compiled; a call costs some microseconds, more while Python is busy. A partitioner knows nothing of
such calls, so they are for one device. They have no second derivative and none in forward mode;
under `vmap` they run one after another.
"""

import atexit
import ctypes
import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import jax
import jax.numpy as jnp

from jaxeco import runtime
from jaxeco.errors import UserError

Pads = tuple[tuple[int, int], tuple[int, int]]  # rows before and after, columns before and after

PACKAGE = "onednn-cpu-gomp"
TARGET = "jaxeco_onednn"  # the handler's name in a compiled program


def version() -> str | None:
    """Of the library that is used, such as "3.2"; None where there is none, or it is off."""
    return None if (library := _library()) is None else ".".join(map(str, library.version))


# What layers ask for. All functions of arrays on one CPU device.


_left_out = ContextVar("left_out", default=False)


@contextmanager
def left_out() -> Iterator[None]:
    """What is traced within is XLA's alone: it counts no FLOPs of what is not its own."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


_alone = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """What is traced within computes on one device, though there be others."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def usable(*arrays: jax.Array) -> bool:
    """Whether arrays of these dtypes are oneDNN's business, here."""
    return (
        not _left_out.get()
        and jax.default_backend() == "cpu"
        and (jax.device_count() == 1 or _alone.get())
        and all(a.size for a in arrays)
        and {a.dtype.name for a in arrays} in ({"float32"}, {"bfloat16"})
        and _library() is not None
    )


def convolves(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> bool:
    """Whether `convolve` can: this processor has the operation, forward and both gradients."""
    return usable(x, kernel) and all(
        _possible(_convolution(kind, x.shape, kernel.shape, x.dtype.name, stride, pads))
        for kind in ("convolution", "convolution_dx", "convolution_dkernel")
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x_BxHxWxC: jax.Array, kernel_IxJxCxF: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """2-D convolution as `jax.lax.conv_general_dilated` with NHWC and HWIO; sums in float32."""
    return _convolve(x_BxHxWxC, kernel_IxJxCxF, stride, pads)[0]


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> tuple[jax.Array, Any]:
    about = _convolution("convolution", x.shape, kernel.shape, x.dtype.name, stride, pads)
    return _call(about, x, kernel, out=(about["y"], x.dtype)), (x, kernel)


def _convolve_backward(
    stride: int, pads: Pads, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    shapes = x.shape, kernel.shape, x.dtype.name, stride, pads
    dx = _call(_convolution("convolution_dx", *shapes), dy, kernel, out=x)
    dkernel = _call(_convolution("convolution_dkernel", *shapes), x, dy, out=kernel)
    return dx, dkernel


convolve.defvjp(_convolve, _convolve_backward)


def normalises(x: jax.Array, epsilon: Any) -> bool:
    """Whether `batch_norm` can: this processor has the operation and its gradient."""
    return (
        isinstance(epsilon, float)
        and usable(x)
        and all(_possible(_norm(kind, x, epsilon)) for kind in ("batch_norm", "batch_norm_dx"))
    )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(
    x: jax.Array, scale_C: jax.Array, shift_C: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises the last axis of x by the batch (arXiv:1502.03167), then scales and shifts it.

    Returns:
      the result; mean and biased variance, [C] in float32, through which no gradient flows.
    """
    return _batch_norm(x, scale_C, shift_C, epsilon)[0]


def _batch_norm(x: jax.Array, scale: jax.Array, shift: jax.Array, epsilon: float) -> Any:
    y, mean, var = _call(_norm("batch_norm", x, epsilon), x, scale, shift, out=[x, scale, scale])
    return (y, mean, var), (x, mean, var, scale)


def _batch_norm_backward(epsilon: float, saved: Any, gradients: Any) -> Any:
    x, mean, var, scale = saved
    about = _norm("batch_norm_dx", x, epsilon)
    return tuple(_call(about, x, mean, var, gradients[0], scale, out=[x, scale, scale]))


batch_norm.defvjp(_batch_norm, _batch_norm_backward)


def multiplies(spec: str, a: jax.Array, b: jax.Array, gradients: bool = True) -> bool:
    """Whether `einsum` can: this processor has the product and, if asked, both gradients'."""
    if not usable(a, b) or not _possible(_product(spec, a.shape, b.shape, a.dtype.name)):
        return False
    if not gradients:
        return True
    left, right, out = _terms(spec)
    y = jax.eval_shape(partial(jnp.einsum, spec), a, b)
    name = a.dtype.name
    return _possible(_product(f"{out},{right}->{left}", y.shape, b.shape, name)) and _possible(
        _product(f"{left},{out}->{right}", a.shape, y.shape, name)
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays, where each letter is in two of the three terms, or in all.

    One letter is summed over; of the letters that only one argument has, each has one. Any order
    of the axes will do: it becomes strides. Sums in float32.
    """
    return _einsum(spec, a, b)[0]


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    about = _product(spec, a.shape, b.shape, a.dtype.name)
    return _call(about, a, b, out=(about["shape"], a.dtype)), (a, b)


def _einsum_backward(
    spec: str, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a, b = saved
    left, right, out = _terms(spec)
    return _einsum(f"{out},{right}->{left}", dy, b)[0], _einsum(f"{left},{out}->{right}", a, dy)[0]


einsum.defvjp(_einsum, _einsum_backward)


# Descriptions of operations: plain values, which become the text that a compiled program carries.


def _convolution(
    kind: str, x: Sequence[int], kernel: Sequence[int], dtype: str, stride: int, pads: Pads
) -> dict[str, Any]:
    (top, bottom), (left, right) = pads
    b, h, w, _ = x
    i, j, _, f = kernel
    y = (b, (h + top + bottom - i) // stride + 1, (w + left + right - j) // stride + 1, f)
    # of the last pads, what the windows reach: with a stride it may be less than was given
    bottom, right = (y[1] - 1) * stride + i - h - top, (y[2] - 1) * stride + j - w - left
    about = {"kind": kind, "dtype": dtype, "x": x, "kernel": kernel, "y": y, "stride": stride}
    return about | {"before": (top, left), "after": (bottom, right)}


def _product(spec: str, a: Sequence[int], b: Sequence[int], dtype: str) -> dict[str, Any]:
    left, right, out = _terms(spec)
    size = dict(zip(left + right, (*a, *b), strict=True))
    (m,) = (letter for letter in left if letter not in right)
    (n,) = (letter for letter in right if letter not in left)
    (k,) = (letter for letter in left if letter not in out)
    batch = "".join(letter for letter in out if letter not in (m, n))

    def seen(letters: str, order: str) -> dict[str, Any]:
        """The array with axes `letters`, as oneDNN is to see it: sizes and strides in `order`."""
        strides, step = {}, 1
        for letter in reversed(letters):
            # oneDNN refused to run with a small stride for an axis of 1
            strides[letter] = step if size[letter] > 1 else math.prod(size[c] for c in letters)
            step *= size[letter]
        return {"sizes": [size[c] for c in order], "strides": [strides[c] for c in order]}

    return {
        "kind": "product",
        "dtype": dtype,
        "a": seen(left, batch + m + k),
        "b": seen(right, batch + k + n),
        "out": seen(out, batch + m + n),
        "shape": [size[letter] for letter in out],
    }


def _norm(kind: str, x: jax.Array, epsilon: float) -> dict[str, Any]:
    b, *sides, c = x.shape
    h, w = sides if len(sides) == 2 else (1, math.prod(sides))
    return {"kind": kind, "dtype": x.dtype.name, "x": (b, h, w, c), "epsilon": epsilon}


def _terms(spec: str) -> tuple[str, str, str]:
    arguments, out = spec.split("->")
    left, right = arguments.split(",")
    return left, right, out


def _call(about: dict[str, Any], *arrays: jax.Array, out: Any) -> Any:
    """Runs an operation; `out` is like the result: an array, (shape, dtype), or a list of them."""
    assert _library() is not None, "ask first whether it is usable"
    wide = ("batch_norm", "batch_norm_dx")  # these take vectors in float32, too
    assert about["kind"] in wide or {a.dtype.name for a in arrays} == {about["dtype"]}
    like = [
        jax.ShapeDtypeStruct(tuple(one[0]), one[1]) if isinstance(one, tuple) else one
        for one in (out if isinstance(out, list) else [out])
    ]
    results = jax.ffi.ffi_call(TARGET, like, vmap_method="sequential")(
        *arrays, about=json.dumps(about)
    )
    return results if isinstance(out, list) else results[0]


def _possible(about: dict[str, Any]) -> bool:
    try:
        _operation(json.dumps(about).encode())
    except NotImplementedError:
        return False
    return True


# oneDNN's C interface: the library, and operations made ready once and run many times.

FORWARD, BACKWARD, DIRECT, SCALE_SHIFT = 64, 128, 1, 2 | 4  # dnnl_types.h
SRC, DST, WEIGHTS, DIFF_SRC, DIFF_DST, DIFF_WEIGHTS = 1, 17, 33, 129, 145, 161
MEAN, VARIANCE, SCALE, SHIFT, DIFF_SCALE, DIFF_SHIFT = 49, 50, 51, 52, 255, 256
QUERY_NAME, QUERY_WEIGHTS, QUERY_DIFF_WEIGHTS = 8, 131, 132
DTYPES = {"bfloat16": 2, "float32": 3}
UNIMPLEMENTED = 3
ANY = 1  # dnnl_format_tag_any
ALLOCATE = c_void_p(2**64 - 1)  # DNNL_MEMORY_ALLOCATE: the library finds the memory


class _Library:
    """The loaded library with an engine, and XLA's handler registered."""

    def __init__(self, path: str) -> None:
        self.dll = ctypes.CDLL(path)
        self.dll.dnnl_primitive_desc_query_md.restype = c_void_p
        self.dll.dnnl_version.restype = POINTER(c_int * 3)
        self.version = tuple(self.dll.dnnl_version().contents[:2])
        # One operation at a time: each takes all cores.
        self.lock = threading.Lock()
        self.engine, self.stream = c_void_p(), c_void_p()
        self.do("engine_create", byref(self.engine), 1, c_size_t(0))
        self.do("stream_create", byref(self.stream), self.engine, 1)
        ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
        ctypes.pythonapi.PyCapsule_New.argtypes = [c_void_p, c_char_p, c_void_p]
        capsule = ctypes.pythonapi.PyCapsule_New(
            ctypes.cast(_handler, c_void_p), b"xla._CUSTOM_CALL_TARGET", None
        )
        jax.ffi.register_ffi_target(TARGET, capsule, platform="cpu")
        atexit.register(_finish)

    def do(self, name: str, *args: Any) -> None:
        """Calls dnnl_<name>; raises NotImplementedError or RuntimeError for a status not 0."""
        status = getattr(self.dll, f"dnnl_{name}")(*args)
        if status == UNIMPLEMENTED:
            raise NotImplementedError(f"oneDNN has no {name} for this")
        if status:
            raise RuntimeError(f"oneDNN's {name} failed with status {status}")


def _finish() -> None:
    """Waits for what is in flight: it calls Python, which must still be there.

    A computation on the same device comes after all others, also those whose results are dropped.
    """
    jax.block_until_ready((jax.live_arrays(), jax.jit(jnp.negative)(jnp.ones(8))))


@cache
def _library() -> _Library | None:
    setting = os.environ["JAXECO_ONEDNN"] if "JAXECO_ONEDNN" in os.environ else "on"
    if setting not in ("on", "off"):
        raise UserError(f"JAXECO_ONEDNN={setting}: expected on or off")
    if setting == "off" or not runtime.tried_jaxlib():
        return None
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        return None
    for file in package.files or ():
        if file.name == "libdnnl.so.3":
            try:
                return _Library(str(package.locate_file(file)))
            except OSError as error:  # slim systems lack libgomp.so.1
                raise UserError(
                    f"oneDNN cannot be loaded: {error}; install what is missing (libgomp.so.1 is "
                    f"in the system's package libgomp1), or pip uninstall {PACKAGE}"
                ) from error
    return None


class _Argument(Structure):
    _fields_ = (("role", c_int), ("memory", c_void_p))


class _Operation:
    """Primitives made ready for one description, to be run on three buffers.

    Attributes:
      memories: what oneDNN calls the buffers, in XLA's order: the two arguments, then the result.
      steps: primitives with their arguments, run in order.
    """

    def __init__(self, library: _Library, about: dict[str, Any]) -> None:
        self.library = library
        kind = about.pop("kind")
        if kind == "product":
            self.memories, self.steps = self._product(**about)
        elif kind in ("batch_norm", "batch_norm_dx"):
            self.memories, self.steps = self._norm(kind, **about)
        else:
            self.memories, self.steps = self._convolution(kind, **about)

    def __call__(self, *buffers: int) -> None:
        library = self.library
        with library.lock:
            for memory, buffer in zip(self.memories, buffers, strict=True):
                library.do("memory_set_data_handle", memory, c_void_p(buffer))
            for primitive, arguments in self.steps:
                library.do(
                    "primitive_execute", primitive, library.stream, len(arguments), arguments
                )
            library.do("stream_wait", library.stream)

    def _norm(self, kind: str, dtype: str, x: Any, epsilon: float) -> Any:
        b, h, w, c = x
        layout = self._layout(dtype, (b, c, h, w), (h * w * c, 1, w * c, c))
        per_channel = self._layout("float32", (c,), (1,))
        number = c_float(epsilon)
        described = self._described(
            "batch_normalization_forward", FORWARD, layout, layout, number, SCALE_SHIFT, None
        )
        roles: tuple[int, ...] = (SRC, SCALE, SHIFT, DST, MEAN, VARIANCE)
        whole: tuple[int, ...] = (SRC, DST)
        if kind == "batch_norm_dx":
            described = self._described(
                "batch_normalization_backward",
                *(BACKWARD, layout, layout, layout, number, SCALE_SHIFT, described, None),
            )
            roles = (SRC, MEAN, VARIANCE, DIFF_DST, SCALE, DIFF_SRC, DIFF_SCALE, DIFF_SHIFT)
            whole = (SRC, DIFF_DST, DIFF_SRC)
        memories = [self._memory(layout if role in whole else per_channel) for role in roles]
        return memories, [self._step(described, roles, memories)]

    def _product(self, dtype: str, a: Any, b: Any, out: Any, shape: Any) -> Any:
        layouts = [self._layout(dtype, seen["sizes"], seen["strides"]) for seen in (a, b, out)]
        memories = [self._memory(layout) for layout in layouts]
        described = self._described("matmul", layouts[0], layouts[1], None, layouts[2], None)
        return memories, [self._step(described, (SRC, WEIGHTS, DST), memories)]

    def _convolution(
        self,
        kind: str,
        dtype: str,
        x: Any,
        kernel: Any,
        y: Any,
        stride: int,
        before: Any,
        after: Any,
    ) -> Any:
        i, j, c, f = kernel
        x_layout, y_layout = (
            self._layout(dtype, (n, depth, h, w), (h * w * depth, 1, w * depth, depth))
            for n, h, w, depth in (x, y)
        )
        kernel_layout = self._layout(dtype, (f, c, i, j), (1, f, j * c * f, c * f))
        any_layout = self._layout(dtype, (f, c, i, j), None)
        geometry = [_numbers(pair) for pair in ((stride, stride), (0, 0), before, after)]
        described = self._described(
            "convolution_forward",
            *(FORWARD, DIRECT, x_layout, any_layout, None, y_layout, *geometry, None),
        )
        query, roles = QUERY_WEIGHTS, (SRC, WEIGHTS, DST)
        if kind == "convolution_dx":
            arguments = (DIRECT, x_layout, any_layout, y_layout, *geometry, described, None)
            described = self._described("convolution_backward_data", *arguments)
            roles = (DIFF_SRC, WEIGHTS, DIFF_DST)
        elif kind == "convolution_dkernel":
            arguments = (DIRECT, x_layout, any_layout, None, y_layout, *geometry, described, None)
            described = self._described("convolution_backward_weights", *arguments)
            query, roles = QUERY_DIFF_WEIGHTS, (SRC, DIFF_WEIGHTS, DIFF_DST)
        # oneDNN chooses how the kernel is to lie; it is small, and so brought there and back.
        chosen_layout = c_void_p(self.library.dll.dnnl_primitive_desc_query_md(described, query, 0))
        chosen = self._memory(chosen_layout, ALLOCATE)
        x_memory, kernel_memory, y_memory = map(self._memory, (x_layout, kernel_layout, y_layout))
        main = self._step(described, roles, (x_memory, chosen, y_memory))
        if kind == "convolution_dkernel":
            back = self._reorder(chosen_layout, kernel_layout, chosen, kernel_memory)
            return (x_memory, y_memory, kernel_memory), [main, back]
        there = self._reorder(kernel_layout, chosen_layout, kernel_memory, chosen)
        if kind == "convolution_dx":
            return (y_memory, kernel_memory, x_memory), [there, main]
        return (x_memory, kernel_memory, y_memory), [there, main]

    def _layout(self, dtype: str, sizes: Sequence[int], strides: Sequence[int] | None) -> c_void_p:
        """A memory descriptor; without strides oneDNN may choose."""
        layout = c_void_p()
        start = (byref(layout), len(sizes), _numbers(sizes), DTYPES[dtype])
        if strides is None:
            self.library.do("memory_desc_create_with_tag", *start, ANY)
        else:
            self.library.do("memory_desc_create_with_strides", *start, _numbers(strides))
        return layout

    def _memory(self, layout: c_void_p, where: c_void_p | None = None) -> c_void_p:
        memory = c_void_p()
        self.library.do("memory_create", byref(memory), layout, self.library.engine, where)
        return memory

    def _described(self, name: str, *arguments: Any) -> c_void_p:
        described = c_void_p()
        create = f"{name}_primitive_desc_create"
        self.library.do(create, byref(described), self.library.engine, *arguments)
        way = c_char_p()
        self.library.do("primitive_desc_query", described, QUERY_NAME, 0, byref(way))
        if (way.value or b"ref").startswith(b"ref"):
            raise NotImplementedError(f"oneDNN has only plain loops for this {name}")
        return described

    def _step(
        self, described: c_void_p, roles: Sequence[int], memories: Sequence[c_void_p]
    ) -> tuple[c_void_p, Any]:
        primitive = c_void_p()
        self.library.do("primitive_create", byref(primitive), described)
        pairs = [_Argument(*pair) for pair in zip(roles, memories, strict=True)]
        return primitive, (_Argument * len(pairs))(*pairs)

    def _reorder(self, layout: c_void_p, other: c_void_p, memory: c_void_p, to: c_void_p) -> Any:
        described, engine = c_void_p(), self.library.engine
        self.library.do(
            "reorder_primitive_desc_create", byref(described), layout, engine, other, engine, None
        )
        return self._step(described, (SRC, DST), (memory, to))


def _numbers(values: Sequence[int]) -> Any:
    return (c_int64 * 12)(*values)  # DNNL_MAX_NDIMS


@cache
def _operation(about: bytes) -> _Operation:
    library = _library()
    assert library is not None
    return _Operation(library, json.loads(about))


# XLA's structures, as far as they are read: xla/ffi/api/c_api.h, version 0.1 of its interface.


class _Extension(Structure):
    _fields_ = (("size", c_size_t), ("type", c_int), ("next", c_void_p))


class _Version(Structure):
    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int))


class _Metadata(Structure):
    _fields_ = (("size", c_size_t), ("version", _Version), ("traits", c_uint32))


class _MetadataExtension(Structure):
    _fields_ = (("base", _Extension), ("metadata", POINTER(_Metadata)))


class _Buffer(Structure):
    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("dtype", c_int), ("data", c_void_p))


class _Text(Structure):
    _fields_ = (("start", c_void_p), ("length", c_size_t))


class _Buffers(Structure):  # XLA_FFI_Args, XLA_FFI_Rets
    _fields_ = (
        *(("size", c_size_t), ("extension", c_void_p), ("count", c_int64), ("types", c_void_p)),
        ("each", POINTER(POINTER(_Buffer))),
    )


class _Attributes(Structure):
    _fields_ = (
        *(("size", c_size_t), ("extension", c_void_p), ("count", c_int64), ("types", c_void_p)),
        *(("names", c_void_p), ("each", POINTER(POINTER(_Text)))),
    )


class _CreateError(Structure):
    _fields_ = (
        *(("size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int)),
    )


class _Api(Structure):
    _fields_ = (
        *(("size", c_size_t), ("extension", c_void_p), ("version", _Version)),
        ("internal", c_void_p),
        ("create_error", ctypes.CFUNCTYPE(c_void_p, POINTER(_CreateError))),
    )


class _Frame(Structure):
    _fields_ = (
        *(("size", c_size_t), ("extension", POINTER(_MetadataExtension)), ("api", POINTER(_Api))),
        *(("context", c_void_p), ("stage", c_int)),
        *(("arguments", _Buffers), ("results", _Buffers), ("attributes", _Attributes)),
    )


METADATA, INTERNAL = 1, 13


@ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))
def _handler(pointer: Any) -> int | None:
    """Runs the operation that the attribute describes; returns an error of XLA's, or nothing."""
    try:
        frame = pointer.contents
        if frame.extension and frame.extension.contents.base.type == METADATA:
            version = frame.extension.contents.metadata.contents.version
            version.major, version.minor = 0, 1
            return None
        about = frame.attributes.each[0].contents
        _operation(ctypes.string_at(about.start, about.length))(
            *(frame.arguments.each[n].contents.data for n in range(frame.arguments.count)),
            *(frame.results.each[n].contents.data for n in range(frame.results.count)),
        )
        return None
    except BaseException as error:  # nothing may pass into XLA but as its own error
        message = f"{type(error).__name__}: {error}".encode()
        create = _CreateError(ctypes.sizeof(_CreateError), None, message, INTERNAL)
        return pointer.contents.api.contents.create_error(create)
