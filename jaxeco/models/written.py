"""Operations of a transformer with gradients written by hand: on CPU, XLA is slow at derived ones.

There it sums over an array's last axis one number at a time, sums over other axes what it computes
anew for the sum, and transposes the wider of two matrices. So sums are products with a vector here,
and the order of matrices is chosen. Each function says what it equals, up to rounding. None has a
derivative in forward mode (`jax.jvp`).

Shapes: N rows, C numbers in, F out, D width; B batch, G groups of heads, M positions that ask, of
all heads of a group, S positions that are asked, K width of a head.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxeco import onednn

FORBIDDEN = -1e30  # a score that no softmax sees, and yet finite: a row may be forbidden as a whole
TRANSPOSED = (((0,), (0,)), ((), ()))  # of dot_general: aᵀb


def _sums(x: jax.Array, weight_D: jax.Array | None = None) -> jax.Array:
    """Σ_d x[..., d]·weight[d], [..., 1]; without a weight, Σ_d x[..., d]."""
    weight_D = jnp.ones(x.shape[-1], x.dtype) if weight_D is None else weight_D
    return jnp.dot(x, weight_D)[..., None]


def _column_sums(x_NxD: jax.Array) -> jax.Array:
    """Σ_n x[n], [D]."""
    return jnp.dot(jnp.ones(len(x_NxD), x_NxD.dtype), x_NxD)


# Linear layers.


def dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> Any:
    """`product` as `nn.Dense(dot_general=...)` asks for it.

    In bfloat16, which XLA has no fast product of, oneDNN's where it is installed.
    """
    assert dimensions == (((x.ndim - 1,), (0,)), ((), ())) and precision is None, dimensions
    x_NxC = x.reshape(-1, x.shape[-1])
    if x.dtype == jnp.bfloat16 and onednn.multiplies("nc,cf->nf", x_NxC, kernel):
        return onednn.einsum("nc,cf->nf", x_NxC, kernel).reshape(*x.shape[:-1], -1)
    return product(x, kernel)


@jax.custom_vjp
def product(x: jax.Array, kernel_CxF: jax.Array) -> jax.Array:
    """x @ kernel: [..., C] to [..., F]."""
    return (x.reshape(-1, x.shape[-1]) @ kernel_CxF).reshape(*x.shape[:-1], -1)


def _product(x: jax.Array, kernel_CxF: jax.Array) -> tuple[jax.Array, Any]:
    return product(x, kernel_CxF), (x, kernel_CxF)


def _product_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel_CxF = saved
    C, F = kernel_CxF.shape
    x_NxC, dy_NxF = x.reshape(-1, C), dy.reshape(-1, F)
    dx_NxC = dy_NxF @ kernel_CxF.T
    if C <= F:
        dkernel_CxF = jax.lax.dot_general(x_NxC, dy_NxF, TRANSPOSED)
    else:  # the barrier keeps XLA from turning it round again
        dkernel_FxC = jax.lax.dot_general(dy_NxF, x_NxC, TRANSPOSED)
        dkernel_CxF = jax.lax.optimization_barrier(dkernel_FxC).T
        dkernel_CxF = jax.lax.optimization_barrier(dkernel_CxF)  # transposed once, for all uses
    return dx_NxC.reshape(x.shape), dkernel_CxF


product.defvjp(_product, _product_backward)


# Norms.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def norm(x: jax.Array, scale_D: jax.Array, eps: float, centred: bool) -> jax.Array:
    """`nn.LayerNorm(eps, use_bias=False, use_fast_variance=False)` if centred, else `nn.RMSNorm`.

    Computes in at least float32; the result has the dtype to which x and scale promote.
    """
    return _norm(x, scale_D, eps, centred)[0]


def _norm(x: jax.Array, scale_D: jax.Array, eps: float, centred: bool) -> tuple[jax.Array, Any]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_D = jnp.full(x.shape[-1], 1 / x.shape[-1], wide.dtype)
    middle = _sums(wide, mean_D) if centred else jnp.zeros((), wide.dtype)
    rate = jax.lax.rsqrt(_sums(jnp.square(wide - middle), mean_D) + eps)
    y = (wide - middle) * rate * scale_D
    return y.astype(jnp.result_type(x, scale_D)), (x, middle, rate, scale_D)


def _norm_backward(
    eps: float, centred: bool, saved: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, middle, rate, scale_D = saved
    dy = dy.astype(rate.dtype)
    unit = (x - middle) * rate
    along = dy * unit
    share_D = scale_D.astype(rate.dtype) / x.shape[-1]
    dx = dy * scale_D - unit * _sums(along, share_D)
    if centred:
        dx = dx - _sums(dy, share_D)
    dscale_D = _column_sums(along.reshape(-1, x.shape[-1]))
    return (dx * rate).astype(x.dtype), dscale_D.astype(scale_D.dtype)


norm.defvjp(_norm, _norm_backward)


# Attention.


@jax.custom_vjp
def attention(
    q_BxGxMxK: jax.Array,
    k_BxGxSxK: jax.Array,
    v_BxGxSxK: jax.Array,
    allowed_BxMxS: jax.Array | None,
) -> jax.Array:
    """softmax(q·k)·v over what is allowed (booleans, also [1, M, S]; None: all).

    Returns [B, G, M, K], dtype of v. The softmax is taken in at least float32.
    """
    return _attention(q_BxGxMxK, k_BxGxSxK, v_BxGxSxK, allowed_BxMxS)[0]


def _products(a: jax.Array, b: jax.Array, over: tuple[int, int], dtype: Any = None) -> jax.Array:
    """For each of [B, G] a matrix product, summed over these axes of a and b.

    By oneDNN where it is installed and `dtype` is that of a: XLA takes one core for all of them.
    """
    spec = {(3, 3): "bgmk,bgsk->bgms", (3, 2): "bgms,bgsk->bgmk", (2, 2): "bgms,bgmk->bgsk"}[over]
    if dtype in (None, a.dtype) and onednn.multiplies(spec, a, b, gradients=False):
        return onednn.einsum(spec, a, b)
    dimensions = (((over[0],), (over[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


def _greatest(x: jax.Array) -> jax.Array:
    """max over the last axis, [..., 1]: XLA compares halves in lanes, but numbers one at a time."""
    while x.shape[-1] >= 32 and x.shape[-1] % 2 == 0:
        x = jnp.maximum(*jnp.split(x, 2, -1))
    return jnp.max(x, -1, keepdims=True)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, allowed: Any) -> tuple[jax.Array, Any]:
    scores = _products(q, k, (3, 3), jnp.promote_types(q.dtype, jnp.float32))
    if allowed is not None:
        scores = jnp.where(allowed[:, None], scores, FORBIDDEN)
    e = jnp.exp(scores - _greatest(scores))
    p = (e / _sums(e)).astype(v.dtype)
    o = _products(p, v, (3, 2))
    return o, (q, k, v, p, o, allowed)


def _attention_backward(saved: Any, do: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, p, o, allowed = saved
    dv = _products(p, do, (2, 2))
    dp = _products(do, v, (3, 3), jnp.promote_types(q.dtype, jnp.float32))
    mean = _sums(do.astype(dp.dtype) * o)  # = Σ_s p·dp (Dao et al. 2022, appendix B.4)
    dscores = p * (dp - mean)
    if allowed is not None:  # where nothing is, p is not 0
        dscores = jnp.where(allowed[:, None], dscores, 0)
    dscores = dscores.astype(q.dtype)
    return _products(dscores, k, (3, 2)), _products(dscores, q, (2, 2)), dv, None


attention.defvjp(_attention, _attention_backward)


# Positions.


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeated(x_1xTxD: jax.Array, B: int) -> jax.Array:
    """`jnp.repeat(x, B, axis=0)`."""
    return jnp.broadcast_to(x_1xTxD, (B, *x_1xTxD.shape[1:]))


def _repeated(x_1xTxD: jax.Array, B: int) -> tuple[jax.Array, None]:
    return repeated(x_1xTxD, B), None


def _repeated_backward(B: int, saved: None, dy_BxTxD: jax.Array) -> tuple[jax.Array]:
    return (_column_sums(dy_BxTxD.reshape(B, -1)).reshape(1, *dy_BxTxD.shape[1:]),)


repeated.defvjp(_repeated, _repeated_backward)
