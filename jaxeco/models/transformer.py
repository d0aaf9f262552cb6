"""Transformers (Vaswani et al. 2017): one trunk, from tokens to vectors, and models upon it.

The trunk's parameters have the same names in every model: one model's weights can start another.

Shapes: B batch, T positions, S positions that are looked at (T, or slots of a cache), D width,
H heads, G heads of keys and values, K width of a head, F width of the MLP, V vocabulary.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxeco import axes
from jaxeco.models import written
from jaxeco.models.attention import Method, attend, layout, rotate, sinusoids
from jaxeco.models.layers import Dropout, check_choice, check_count, check_rate, logits

Norm = Literal["layer", "rms"]
Positions = Literal["learned", "sinusoidal", "rotary"]
MlpActivation = Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"]
Gradients = Literal["auto", "written", "derived"]

# What the axes of parameters are, by name, for meshes (`jaxeco.sharding`). As in Megatron (Shoeybi
# et al. 2019), devices of the tensor axis share the heads and the MLP's units: what they compute of
# a branch is summed once, after its last matrix.
LOGICAL_AXES = {
    r"(.*/)?token_embed/embedding": ("vocab", "embed"),
    r"(.*/)?position_embed/embedding": (None, "embed"),
    r"(.*/)?(cross_)?(query|key|value)/kernel": ("embed", "heads"),
    r"(.*/)?(cross_)?(query|key|value)/bias": ("heads",),
    r"(.*/)?(cross_)?out/kernel": ("heads", "embed"),
    r"(.*/)?(up|gate)/kernel": ("embed", "mlp"),
    r"(.*/)?(up|gate)/bias": ("mlp",),
    r"(.*/)?down/kernel": ("mlp", "embed"),
    r"head/kernel": ("embed", "vocab"),
}
STREAM = ("batch", "sequence", None)  # [B, T, D], between blocks


class Cache(NamedTuple):
    """What a decoder remembers of the tokens that it has seen, so as to see only new ones.

    Rows may differ in length: row b begins at slot start_B[b], what is to its left is padding.
    """

    keys: tuple[jax.Array, ...]  # of each layer, [B, G, S, K]: each head's lie together
    values: tuple[jax.Array, ...]
    tokens_BxS: jax.Array
    filled: jax.Array  # i32[]: slots that are taken
    start_B: jax.Array  # i32[B]


class Seen(NamedTuple):
    """What all layers share: where the tokens stand, and what they may look at."""

    position_BxT: jax.Array
    allowed_BxTxS: jax.Array | None
    first: Any  # the slot of a cache that the T tokens are written from
    memory_BxMxD: jax.Array | None  # of an encoder
    memory_allowed_Bx1xM: jax.Array | None


class Stack(nn.Module, kw_only=True):
    """The fields that a transformer shares with its blocks.

    Attributes:
      width: D, of the vectors between blocks.
      heads: H; each is width / heads wide.
      kv_heads: G, for grouped-query attention (Ainslie et al. 2023); None: as many as heads.
      mlp_width: F; None: 4·D, but for swiglu, which has a third matrix, 8/3·D, rounded up to a
        multiple of 32.
      norm: layer norm (Ba et al. 2016) or RMS norm (Zhang & Sennrich 2019).
      norm_first: norm inside each residual branch (GPT-2), else after each sum (BERT).
      activation: "gelu" is exact, "gelu_tanh" is GPT-2's approximation; "relu2" is max(x, 0)²
        (So et al. 2021); "swiglu" is silu(gate)·up (Shazeer 2020).
      qk_norm: RMS norm of queries and keys, by head (Dehghani et al. 2023).
      bias: whether linear layers, and layer norms, have one.
      dropout: after the embeddings and after each branch; attention's weights have none.
      cross: a second attention, to an encoder's outputs.
      init_sd: of the matrices; those that write into the residual stream begin at
        init_sd/√(2·layers), as GPT-2's, or at 0 with `zero_init` (Zhang et al. 2019).
      attention: how attention is computed, see `attention.attend`.
      gradients: of linear layers, norms and learned positions: "written" by hand, the faster on CPU
        (`written`), or "derived" by JAX; "auto": written on CPU.
    """

    width: int
    heads: int
    layers: int
    kv_heads: int | None = None
    mlp_width: int | None = None
    norm: Norm = "layer"
    norm_eps: float = 1e-5
    norm_first: bool = True
    positions: Positions = "learned"
    rotary_base: float = 10_000.0
    activation: MlpActivation = "gelu_tanh"
    qk_norm: bool = False
    bias: bool = True
    dropout: float | jax.Array = 0.0
    cross: bool = False
    init_sd: float = 0.02
    zero_init: bool = False
    attention: Method = "auto"
    gradients: Gradients = "auto"

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers"):
            check_count(name, getattr(self, name))
        for name in ("kv_heads", "mlp_width"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_choice("norm", self.norm, Norm)
        check_choice("positions", self.positions, Positions)
        check_choice("activation", self.activation, MlpActivation)
        check_choice("attention", self.attention, Method)
        check_choice("gradients", self.gradients, Gradients)
        check_rate("dropout", self.dropout)
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not divisible by heads={self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(
                f"positions='rotary' turns pairs: width={self.width} / heads={self.heads} is odd"
            )
        if not self.rotary_base > 0:
            raise ValueError(f"rotary_base={self.rotary_base}: expected a number above 0")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"positions='sinusoidal' pairs sine and cosine: width={self.width}")
        super().__post_init__()

    def shared(self) -> dict[str, Any]:
        """The fields above, by name."""
        return {name: getattr(self, name) for name in FIELDS}

    @property
    def written(self) -> bool:
        if self.gradients == "auto":
            return jax.default_backend() == "cpu"
        return self.gradients == "written"

    @nn.nowrap  # a part of whoever calls it
    def normed(self, name: str | None = None, kind: Norm | None = None) -> nn.Module:
        """This stack's norm, or one of another kind, which has no bias."""
        bias = self.bias and kind is None
        return _norm(kind or self.norm, self.norm_eps, bias, self.written, name)


FIELDS = tuple(name for name in Stack.__annotations__ if name not in ("name", "parent"))


def _norm(kind: Norm, eps: float, bias: bool, by_hand: bool, name: str | None = None) -> nn.Module:
    if by_hand:
        return WrittenNorm(eps, centred=kind == "layer", use_bias=bias, name=name)
    if kind == "rms":
        return nn.RMSNorm(eps, name=name)
    return nn.LayerNorm(eps, use_bias=bias, use_fast_variance=False, name=name)


class WrittenNorm(nn.Module):
    """`nn.LayerNorm` if centred, else `nn.RMSNorm`, by `written.norm`."""

    eps: float
    centred: bool
    use_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:])
        y = written.norm(x, scale_D, self.eps, self.centred)
        if self.use_bias and self.centred:
            y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(y.dtype)
        return y


class Block(Stack, kw_only=True):
    """Attention, [attention to an encoder,] MLP: each a branch that is added to the stream."""

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, seen: Seen, kv: Any, train: bool
    ) -> tuple[jax.Array, Any]:
        """The stream after this block, and the keys and values [B, G, S, K] of a cache."""

        def self_attention(x: jax.Array) -> jax.Array:
            nonlocal kv
            y, kv = self._attention("", x, x, seen, kv)
            return y

        def cross_attention(x: jax.Array) -> jax.Array:
            return self._attention("cross_", x, seen.memory_BxMxD, seen, None)[0]

        branches = [(self_attention, "norm1"), (self._mlp, "norm2")]
        if self.cross:
            branches.insert(1, (cross_attention, "cross_norm"))
        for branch, norm in branches:
            y = branch(self.normed(norm)(x_BxTxD) if self.norm_first else x_BxTxD)
            x_BxTxD = x_BxTxD + Dropout(self.dropout)(y, train=train)
            x_BxTxD = axes.constrain(x_BxTxD, *STREAM)
            if not self.norm_first:
                x_BxTxD = self.normed(norm)(x_BxTxD)
        return x_BxTxD, kv

    def _attention(
        self, name: str, x: jax.Array, y: jax.Array | None, seen: Seen, kv: Any
    ) -> tuple[jax.Array, Any]:
        """x looks at y, and with it at what the cache `kv` holds."""
        assert y is not None, "cross=True, but no encoder's outputs were given"
        K, H, G = self.width // self.heads, self.heads, self.kv_heads or self.heads
        q = self._linear(f"{name}query", H * K)(x).reshape(*x.shape[:2], H, K)
        k = self._linear(f"{name}key", G * K)(y).reshape(*y.shape[:2], G, K)
        v = self._linear(f"{name}value", G * K)(y).reshape(*y.shape[:2], G, K)
        if self.qk_norm:
            q = self.normed(f"{name}query_norm", "rms")(q)
            k = self.normed(f"{name}key_norm", "rms")(k)
        allowed = seen.memory_allowed_Bx1xM if name else seen.allowed_BxTxS
        if self.positions == "rotary" and not name:
            q, k = (rotate(a, seen.position_BxT, self.rotary_base) for a in (q, k))
        q = axes.constrain(q, "batch", "sequence", "heads", None)
        k, v = (axes.constrain(a.swapaxes(1, 2), "batch", "heads", None, None) for a in (k, v))
        if kv is not None:
            at = (0, 0, seen.first, 0)
            k, v = (jax.lax.dynamic_update_slice(old, new, at) for old, new in zip(kv, (k, v)))
            kv = (k, v)
        o = attend(q, k, v, allowed, self.attention)
        return self._linear(f"{name}out", self.width, last=True)(o.reshape(*x.shape)), kv

    def _mlp(self, x: jax.Array) -> jax.Array:
        gated = self.activation == "swiglu"
        width = self.mlp_width or (-(-self.width * 8 // 96) * 32 if gated else 4 * self.width)
        h = axes.constrain(self._linear("up", width)(x), "batch", "sequence", "mlp")
        h = jax.nn.silu(self._linear("gate", width)(x)) * h if gated else _activate(self, h)
        return self._linear("down", self.width, last=True)(h)

    def _linear(self, name: str, features: int, last: bool = False) -> nn.Dense:
        """A linear layer; `last`: it writes into the residual stream."""
        sd = self.init_sd / (2 * self.layers) ** 0.5 if last else self.init_sd
        init = nn.initializers.normal(sd)
        if last and self.zero_init:
            init = nn.initializers.zeros
        return nn.Dense(
            features,
            use_bias=self.bias,
            kernel_init=init,
            dot_general=written.dot_general if self.written else None,
            name=name,
        )


def _activate(of: Stack, h: jax.Array) -> jax.Array:
    match of.activation:
        case "relu":
            return jax.nn.relu(h)
        case "relu2":
            return jnp.square(jax.nn.relu(h))
        case _:
            return jax.nn.gelu(h, approximate=of.activation == "gelu_tanh")


class Transformer(Stack, kw_only=True):
    """The trunk: from tokens to hidden vectors; a decoder (GPT-2's layout as it stands) or encoder.

    Attributes:
      vocab_size: V; more than the tokenizer has is allowed.
      context: the longest text, in tokens, that is trained on and can be looked back at.
      causal: a token looks at itself and those before it (a decoder); else at all (an encoder).
      positions: learned vectors, fixed sines, or rotations of queries and keys.
      separator: the token before each document, to keep documents in one row apart; None: as one.
      pad: a token that fills rows up, which nobody looks at; None: there is none.
      embed_norm: norm the embeddings (BERT).
      remat: recompute each block in the backward pass rather than keep what it computed; on a CPU
        it saves memory only with scan_layers, since XLA otherwise recomputes at once
      scan_layers: compile one block and run it `layers` times: the parameters, under "blocks", have
        a first axis for the layer. Compiles faster; cannot decode until it is `unscanned`.
    """

    vocab_size: int
    context: int
    causal: bool = True
    separator: int | None = None
    pad: int | None = None
    embed_norm: bool = False
    remat: bool = False
    scan_layers: bool = False

    def __post_init__(self) -> None:
        check_count("vocab_size", self.vocab_size)
        check_count("context", self.context)
        for name in ("separator", "pad"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}={token}: expected a token below {self.vocab_size}")
        super().__post_init__()

    def setup(self) -> None:
        init = nn.initializers.normal(self.init_sd)
        self.token_embed = nn.Embed(self.vocab_size, self.width, embedding_init=init)
        if self.positions == "learned":
            self.position_embed = nn.Embed(self.context, self.width, embedding_init=init)
        if self.embed_norm:
            self.norm_in = self.normed()
        # numbers of arguments count from self, which is 0
        block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block
        if self.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.layers,
            )
            self.blocks = scanned(**self.shared())
        else:
            self.block = [block(**self.shared()) for _ in range(self.layers)]
        if self.norm_first:
            self.norm_out = self.normed()
        self.drop = Dropout(self.dropout)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        *,
        train: bool,
        cache: Cache | None = None,
        memory_BxMxD: jax.Array | None = None,
        memory_allowed_Bx1xM: jax.Array | None = None,
    ) -> Any:
        """Hidden vectors [B, T, D]; with a cache also the next cache.

        Raises:
          ValueError: the text is longer than `context`, or a cache is given to what cannot use one.
        """
        T = tokens_BxT.shape[1]
        if cache is None and T > self.context:
            raise ValueError(
                f"texts of {T} tokens, but the model's context is {self.context}: shorten them, or"
                f" set its context={T}"
            )
        if cache is not None and (self.scan_layers or not self.causal):
            raise ValueError("a cache serves causal models whose layers are not scanned")
        tokens_BxS, first, start_B = tokens_BxT, jnp.int32(0), None
        if cache is not None:
            first, start_B = cache.filled, cache.start_B
            tokens_BxS = jax.lax.dynamic_update_slice(cache.tokens_BxS, tokens_BxT, (0, first))
        position_BxT, allowed_BxTxS = layout(
            tokens_BxS, first, T, causal=self.causal,
            separator=self.separator, pad=self.pad, start_B=start_B,
        )  # fmt: skip
        seen = Seen(position_BxT, allowed_BxTxS, first, memory_BxMxD, memory_allowed_Bx1xM)
        x_BxTxD = self.drop(self._embedded(tokens_BxT, position_BxT), train=train)
        x_BxTxD = axes.constrain(x_BxTxD, *STREAM)
        kvs = [None] * self.layers if cache is None else list(zip(cache.keys, cache.values))
        if self.scan_layers:
            x_BxTxD, _ = self.blocks(x_BxTxD, seen, None, train)
        else:
            for i, block in enumerate(self.block):
                x_BxTxD, kvs[i] = block(x_BxTxD, seen, kvs[i], train)
        if self.norm_first:
            x_BxTxD = self.norm_out(x_BxTxD)
        if cache is None:
            return x_BxTxD
        keys, values = zip(*kvs)
        return x_BxTxD, Cache(keys, values, tokens_BxS, first + T, cache.start_B)

    def _embedded(self, tokens_BxT: jax.Array, position_BxT: jax.Array) -> jax.Array:
        x_BxTxD = self.token_embed(tokens_BxT)
        if self.positions == "learned":
            p = self.position_embed(position_BxT)
            if self.written and len(p) == 1:
                p = written.repeated(p, len(x_BxTxD))
            x_BxTxD = x_BxTxD + p
        elif self.positions == "sinusoidal":
            sines_BxTxD = sinusoids(position_BxT, self.width)
            x_BxTxD = x_BxTxD + sines_BxTxD.astype(x_BxTxD.dtype)
        return self.norm_in(x_BxTxD) if self.embed_norm else x_BxTxD

    def attend(self, x_BxTxD: jax.Array) -> jax.Array:
        """Logits [B, T, V] by the embeddings themselves: a tied head (Press & Wolf 2017)."""
        return self.token_embed.attend(x_BxTxD)

    def visible(self, tokens_BxT: jax.Array) -> jax.Array:
        """Which tokens are not padding, booleans [B, T]."""
        return jnp.ones(tokens_BxT.shape, bool) if self.pad is None else tokens_BxT != self.pad

    def empty_cache(self, batch: int, slots: int, start_B: jax.Array | None = None) -> Cache:
        """A cache with room for `slots` tokens a row, which begin at `start_B`, by default 0."""
        heads = self.kv_heads or self.heads
        shape = (batch, heads, slots, self.width // self.heads)
        dtype = self.token_embed.embedding.dtype
        keys, values = (
            tuple(jnp.zeros(shape, dtype) for _ in range(self.layers)) for _ in range(2)
        )
        start_B = jnp.zeros(batch, jnp.int32) if start_B is None else start_B
        return Cache(keys, values, jnp.zeros((batch, slots), jnp.int32), jnp.int32(0), start_B)


class LanguageModel(nn.Module):
    """Logits of the next token at each position (a causal trunk), or of each token (an encoder).

    Attributes:
      tied: the head is the embeddings; else a matrix of its own, which begins at 0.
      transform: a linear layer, gelu and norm before the head, and a bias after it (BERT).
      soft_cap: c, for logits c·tanh(logits/c) (Gemma 2); None: as they come.
    """

    trunk: Transformer
    tied: bool = True
    transform: bool = False
    soft_cap: float | None = None

    logical_axes = LOGICAL_AXES

    def __post_init__(self) -> None:
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap={self.soft_cap}: expected a number above 0, or None")
        super().__post_init__()

    def setup(self) -> None:
        trunk = self.trunk
        if self.transform:
            self.dense = nn.Dense(trunk.width, kernel_init=nn.initializers.normal(trunk.init_sd))
            self.norm = trunk.normed()
            self.bias = self.param("bias", nn.initializers.zeros, (trunk.vocab_size,))
        if not self.tied:
            self.head = nn.Dense(
                trunk.vocab_size, use_bias=False, kernel_init=nn.initializers.zeros
            )

    @property
    def vocab_size(self) -> int:
        return self.trunk.vocab_size

    @property
    def context(self) -> int:
        return self.trunk.context

    def __call__(self, tokens_BxT: jax.Array, *, train: bool) -> jax.Array:
        """Tokens, integers [B, T] -> logits f32[B, T, V]."""
        return self._logits(self.trunk(tokens_BxT, train=train))

    def decode(self, tokens_BxT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The same for T more tokens of texts whose beginnings the cache remembers."""
        x_BxTxD, cache = self.trunk(tokens_BxT, train=False, cache=cache)
        return self._logits(x_BxTxD), cache

    def empty_cache(self, batch: int, slots: int, start_B: jax.Array | None = None) -> Cache:
        return self.trunk.empty_cache(batch, slots, start_B)

    def _logits(self, x_BxTxD: jax.Array) -> jax.Array:
        if self.transform:
            x_BxTxD = self.norm(jax.nn.gelu(self.dense(x_BxTxD), approximate=False))
        out = logits(self.trunk.attend(x_BxTxD) if self.tied else self.head(x_BxTxD))
        out = axes.constrain(out, "batch", "sequence", "vocab")
        if self.transform:
            out = out + self.bias
        return out if self.soft_cap is None else self.soft_cap * jnp.tanh(out / self.soft_cap)


class TextClassifier(nn.Module):
    """Logits of a text's class, from the trunk's hidden vectors.

    Attributes:
      pool: "mean" over all tokens that are not padding, the "first" token, or the "last" of them.
      dropout: before the head.
    """

    trunk: Transformer
    num_classes: int
    pool: Literal["mean", "first", "last"] = "mean"
    dropout: float | jax.Array = 0.0

    logical_axes = LOGICAL_AXES

    def __post_init__(self) -> None:
        check_count("num_classes", self.num_classes)
        check_choice("pool", self.pool, Literal["mean", "first", "last"])
        check_rate("dropout", self.dropout)
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return self.trunk.vocab_size

    @property
    def context(self) -> int:
        return self.trunk.context

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, *, train: bool) -> jax.Array:
        """Tokens, integers [B, T] -> logits f32[B, num_classes]."""
        x_BxTxD = self.trunk(tokens_BxT, train=train)
        visible_BxT = self.trunk.visible(tokens_BxT)
        match self.pool:
            case "first":
                x_BxD = x_BxTxD[:, 0]
            case "last":
                last_B = jnp.maximum(jnp.sum(visible_BxT, 1) - 1, 0)
                x_BxD = jnp.take_along_axis(x_BxTxD, last_B[:, None, None], 1)[:, 0]
            case _:
                weight_BxTx1 = visible_BxT[..., None].astype(x_BxTxD.dtype)
                x_BxD = jnp.sum(x_BxTxD * weight_BxTx1, 1) / jnp.maximum(weight_BxTx1.sum(1), 1)
        x_BxD = Dropout(self.dropout)(x_BxD, train=train)
        init = nn.initializers.normal(self.trunk.init_sd)
        return logits(nn.Dense(self.num_classes, kernel_init=init, name="head")(x_BxD))


class EncoderDecoder(nn.Module):
    """A translator: the encoder reads the source, the decoder looks at it and writes the target."""

    encoder: Transformer
    decoder: Transformer

    logical_axes = LOGICAL_AXES

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    def __post_init__(self) -> None:
        if self.encoder.causal or not (self.decoder.causal and self.decoder.cross):
            raise ValueError("expected an encoder with causal=False, a decoder with cross=True")
        if self.encoder.width != self.decoder.width:
            raise ValueError(
                f"the encoder is {self.encoder.width} wide, the decoder {self.decoder.width};"
                " expected the same width"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: dict[str, jax.Array], *, train: bool) -> jax.Array:
        """{"source": [B, M], "target": [B, T]} -> logits f32[B, T, V] of what follows."""
        memory_BxMxD = self.encoder(x["source"], train=train)
        hidden_BxTxD = self.decoder(
            x["target"],
            train=train,
            memory_BxMxD=memory_BxMxD,
            memory_allowed_Bx1xM=self.encoder.visible(x["source"])[:, None],
        )
        return logits(self.decoder.attend(hidden_BxTxD))


def unscanned(model: LanguageModel, params: Any) -> tuple[LanguageModel, Any]:
    """The same model with a block of its own for each layer, and its parameters: it can decode."""
    trunk = model.trunk
    if not trunk.scan_layers:
        return model, params
    rest = {name: value for name, value in params["trunk"].items() if name != "blocks"}
    stacked = params["trunk"]["blocks"]
    blocks = {
        f"block_{i}": jax.tree.map(lambda a: a[i], stacked)  # noqa: B023  # used at once
        for i in range(trunk.layers)
    }
    return model.clone(trunk=trunk.clone(scan_layers=False)), {**params, "trunk": rest | blocks}
