"""Attention: who may look at whom, and the mixture of values that comes of it.

Shapes: B batch, T positions that ask, S positions (or slots of a cache) that are asked, H heads,
G heads of keys and values (H is a multiple of G; head h asks group h // (H/G)), K width of a head.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxeco.models import written
from jaxeco.models.written import FORBIDDEN

Chosen = Literal["einsum", "written", "xla", "cudnn"]
Method = Literal["auto", Chosen]


def attend(
    q_BxTxHxK: jax.Array,
    k_BxGxSxK: jax.Array,
    v_BxGxSxK: jax.Array,
    allowed_BxTxS: jax.Array | None,
    method: Method = "auto",
) -> jax.Array:
    """softmax(q·k / √K)·v over the positions allowed (Vaswani et al. 2017, eq. 1), by head.

    Args:
      allowed_BxTxS: booleans, also [1, T, S]; None: all.
      method: "einsum" is two plain products, "written" the same with a gradient written by hand;
        "xla" and "cudnn" are those of `jax.nn.dot_product_attention`, of which cudnn never writes
        the scores to memory. "auto" takes written on CPU, but einsum where one position asks;
        cudnn on a GPU in bfloat16 where the shapes suit it, else xla.

    Returns:
      [B, T, H, K], dtype of v. The softmax is taken in at least float32. A row with nothing allowed
      is the mean of all values, not NaN.
    """
    chosen = _fastest(q_BxTxHxK, k_BxGxSxK) if method == "auto" else method
    if chosen == "xla" or chosen == "cudnn":
        mask = None if allowed_BxTxS is None else allowed_BxTxS[:, None]
        k_BxSxGxK, v_BxSxGxK = k_BxGxSxK.swapaxes(1, 2), v_BxGxSxK.swapaxes(1, 2)
        return jax.nn.dot_product_attention(
            q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask, implementation=chosen
        )
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxGxSxK.shape[1]
    R = H // G
    q_BxGxRxTxK = (q_BxTxHxK * K**-0.5).reshape(B, T, G, R, K).transpose(0, 2, 3, 1, 4)
    if chosen == "written":
        if allowed_BxTxS is not None:
            rows, _, S = allowed_BxTxS.shape
            allowed_BxTxS = jnp.tile(jnp.broadcast_to(allowed_BxTxS, (rows, T, S)), (1, R, 1))
        o_BxGxRTxK = written.attention(
            q_BxGxRxTxK.reshape(B, G, R * T, K), k_BxGxSxK, v_BxGxSxK, allowed_BxTxS
        )
        return o_BxGxRTxK.reshape(B, H, T, K).swapaxes(1, 2)
    scores_BxGxRxTxS = jnp.einsum(
        "bgrtk,bgsk->bgrts", q_BxGxRxTxK, k_BxGxSxK,
        preferred_element_type=jnp.promote_types(q_BxTxHxK.dtype, jnp.float32),
    )  # fmt: skip
    if allowed_BxTxS is not None:
        scores_BxGxRxTxS = jnp.where(allowed_BxTxS[:, None, None], scores_BxGxRxTxS, FORBIDDEN)
    p_BxGxRxTxS = jax.nn.softmax(scores_BxGxRxTxS, axis=-1).astype(v_BxGxSxK.dtype)
    o_BxGxRxTxK = jnp.einsum("bgrts,bgsk->bgrtk", p_BxGxRxTxS, v_BxGxSxK)
    return o_BxGxRxTxK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _fastest(q_BxTxHxK: jax.Array, k_BxGxSxK: jax.Array) -> Chosen:
    if jax.default_backend() == "cpu":
        return "einsum" if q_BxTxHxK.shape[1] == 1 else "written"
    (_, T, _, K), S = q_BxTxHxK.shape, k_BxGxSxK.shape[2]
    lengths = T % 64 == 0 and S % 64 == 0
    suits = q_BxTxHxK.dtype == jnp.bfloat16 and lengths and K % 8 == 0 and K <= 128
    return "cudnn" if suits and jax.default_backend() == "gpu" else "xla"


def rotate(x_BxTxHxK: jax.Array, position_BxT: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary positions (Su et al. 2021, eq. 34): pair i turns by position · base^(-2i/K).

    The pairs are (x[i], x[i + K/2]), as in GPT-NeoX and Llama. Products of rotated queries and keys
    depend on the difference of their positions alone.
    """
    half = x_BxTxHxK.shape[-1] // 2
    frequency_K2 = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BxTx1xK2 = (position_BxT[..., None] * frequency_K2)[:, :, None]
    cos, sin = jnp.cos(angle_BxTx1xK2), jnp.sin(angle_BxTx1xK2)
    a, b = x_BxTxHxK[..., :half], x_BxTxHxK[..., half:]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return turned.astype(x_BxTxHxK.dtype)


def sinusoids(position_BxT: jax.Array, width: int) -> jax.Array:
    """Fixed positions [B, T, width] (Vaswani et al. 2017, section 3.5), sines before cosines."""
    half = width // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BxT[..., None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


def layout(
    tokens_BxS: jax.Array,
    first: Any,
    T: int,
    *,
    causal: bool,
    separator: int | None,
    pad: int | None,
    start_B: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Positions of T tokens, and which tokens they may look at.

    Args:
      tokens_BxS: all tokens so far, among them the T that ask: from slot `first` on.
      separator: stands before each document; positions count from it and no one looks beyond it.
      pad: a token that no one looks at.
      start_B: the slot where each row begins; None: the first.

    Returns:
      position_BxT, i32, also [1, T]; allowed_BxTxS, booleans, also [1, T, S], or None: all.
    """
    slot_S = jnp.arange(tokens_BxS.shape[1])
    ask_T = first + jnp.arange(T)
    begin_Bx1 = 0 if start_B is None else start_B[:, None]
    position_BxT = ask_T[None] - begin_Bx1
    allowed = slot_S <= ask_T[:, None] if causal else None
    if allowed is not None:
        allowed = allowed[None]
    if start_B is not None:
        allowed = _both(allowed, (slot_S >= begin_Bx1)[:, None])
    if separator is not None:
        opens_BxS = tokens_BxS == separator
        segment_BxS = jnp.cumsum(opens_BxS, 1)
        asks_BxT = jax.lax.dynamic_slice_in_dim(segment_BxS, first, T, 1)
        allowed = _both(allowed, asks_BxT[:, :, None] == segment_BxS[:, None])
        opened_BxS = jax.lax.cummax(jnp.where(opens_BxS, slot_S, begin_Bx1), 1)
        opened_BxT = jax.lax.dynamic_slice_in_dim(opened_BxS, first, T, 1)
        position_BxT = ask_T[None] - opened_BxT
    if pad is not None:
        allowed = _both(allowed, (tokens_BxS != pad)[:, None])
    return jnp.maximum(position_BxT, 0), allowed


def _both(a: jax.Array | None, b: jax.Array) -> jax.Array:
    return b if a is None else a & b
