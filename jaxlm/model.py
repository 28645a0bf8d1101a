"""The decoder: a configuration, `init` and `forward`. Pure functions over a pytree of parameters.

Shapes: B batch, T time, N = B T, D model width, H heads, G key and value heads, K head width (D = H K), F feed-forward
width, V vocabulary. But for attention, the sequences of a batch are one list of N positions: products of two matrices
are what every backend does best.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.attention import Implementation, causal_attention, has_numba
from jaxlm.dropout import dropout
from jaxlm.norms import Norm
from jaxlm.parallel import has_triton
from jaxlm.tokenizers.base import InputError, check_types

Params = Any

# Larger numbers would change on their way to the device, which has int32 and float32.
LARGEST_INT, LARGEST_FLOAT = int(np.iinfo(np.int32).max), float(np.finfo(np.float32).max)
_MOST_LAYERS = 10_000  # each is traced
_FEW_IDS = 4_096  # for which a product costs little beside the model
# A GPU has at least so many multiprocessors, each of which computes a tile of a product of so many rows and columns.
_MULTIPROCESSORS, _TILE = 128, 192
_ROWS_OF_PART, _FEWEST_PARTS = 512, 4  # a product is split into parts of so many rows at least, and so many of them


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with norms before its parts. The defaults are the seed model (Radford et al. 2019)."""

    vocab_size: int
    context: int = 256  # tokens that a position may look at, itself included
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None  # heads of keys and values, each for several of queries; None: as many
    feed_forward_width: int = 512
    dropout: float = 0.2  # on attention weights, attention output and MLP output
    norm: Literal["layer", "rms"] = "layer"
    positions: Literal["learned", "rope"] = "learned"  # added to the input, or turning queries and keys
    rope_base: float = 1_000.0
    qk_norm: bool = False  # queries and keys scaled to a mean square of 1, scores doubled
    activation: Literal["relu", "relu2", "gelu", "swiglu"] = "relu"  # relu2 is the square of relu
    biases: bool = True  # of linear layers, those of queries, keys and values excepted
    zero_outputs: bool = False  # output projections and head begin at zero, see `init`
    window: int | None = None  # tokens that attention may look at, itself included; None is the context
    tied_head: bool = False  # the embedding, transposed, as head
    logit_cap: float | None = None  # a logit x becomes cap tanh(x / cap)
    input_tokens: int = 1  # a position's input is the sum of embeddings of so many last tokens, each from its own table

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "vocab_size", "context", "width", "num_layers", "num_heads", "feed_forward_width", "input_tokens",
        ):  # fmt: skip
            value = getattr(self, name)
            most = _MOST_LAYERS if name == "num_layers" else LARGEST_INT
            if not isinstance(value, int | np.integer) or not 1 <= value <= most:
                raise InputError(f"The model's {name} is a whole number from 1 to {most}, not {value!r}.")
        if self.context < 2:
            raise InputError("The model's context is at least 2 tokens, so that held-out windows can overlap by half.")
        if self.width % self.num_heads:
            raise InputError(
                f"The model's width {self.width} doesn't divide into {self.num_heads} heads; make it a multiple."
            )
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise InputError(
                f"{self.num_heads} heads don't divide among {self.num_kv_heads} of keys and values; make num_kv_heads "
                "a divisor of num_heads."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"The model's dropout is a share from 0 to below 1, not {self.dropout}.")
        if self.positions == "rope" and self.width // self.num_heads % 2:
            raise InputError(
                f"RoPE turns pairs of numbers, and heads of width {self.width // self.num_heads} are odd; change width "
                "or num_heads."
            )
        if self.input_tokens > self.context:
            raise InputError(
                f"input_tokens is at most the context of {self.context}, not {self.input_tokens}; make it smaller."
            )
        if self.window is not None and not 1 <= self.window <= self.context:
            raise InputError(f"The model's window is from 1 to its context of {self.context}, not {self.window}.")
        for name in ("rope_base", "logit_cap"):
            value = getattr(self, name)
            if not (value is None and name == "logit_cap") and not (value and 0 < value <= LARGEST_FLOAT):
                raise InputError(f"The model's {name} is a positive float32 number, not {value}.")


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters: weights normal with deviation 0.02, biases zero, gains one.

    With `zero_outputs`, output projections and head are zero, and other kernels have a deviation of fan-in^-1/2;
    embeddings and positions one of 0.2, unless the head is tied.
    """
    return Decoder(config).lazy_init(key, jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


@functools.cache
def abstract_params(config: ModelConfig) -> Params:
    """The shapes and types of the parameters, which aren't computed for it."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def forward(
    params: Params,
    tokens_BT: jax.Array,
    config: ModelConfig,
    *,
    dropout_key: jax.Array | None = None,
    attention: Implementation | None = None,
    dtype: Any = jnp.float32,
    rounded: bool = False,
) -> jax.Array:
    """Logits of the next token at each position: int (B, T) -> (B, T, V), for T up to `config.context`.

    Dropout is on if there is a key: a single one, or one for each sequence, whose masks then don't depend on the batch
    that it is in. Logits at position t depend on tokens up to t alone. `attention`: as for `causal_attention`. `dtype`:
    of the logits; None is that of the parameters, in which they are computed. `rounded`: whether factors of products
    are rounded to bfloat16, if `attention.rounds` says that they can be.
    """
    keys_B = dropout_key
    if dropout_key is not None and dropout_key.ndim == 0:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(dropout_key, jnp.arange(len(tokens_BT)))
    logits_NV: jax.Array = Decoder(config, attention, rounded).apply({"params": params}, tokens_BT, keys_B)  # type: ignore[assignment]
    return logits_NV.reshape(*tokens_BT.shape, config.vocab_size).astype(dtype or logits_NV.dtype)


def num_parameters(config: ModelConfig) -> int:
    """How many numbers `init` would give, by formula: tracing takes its time for each layer, be there a billion."""
    width, biases = config.width, int(config.biases)
    norm = 2 * width if config.norm == "layer" else width
    kv_width = width // config.num_heads * (config.num_kv_heads or config.num_heads)
    attention = 2 * width * width + 2 * width * kv_width + biases * width
    ups = 2 if config.activation == "swiglu" else 1
    mlp = (ups + 1) * width * config.feed_forward_width + biases * (ups * config.feed_forward_width + width)
    tables = config.input_tokens * config.vocab_size * width
    tables += config.context * width if config.positions == "learned" else 0
    head = 0 if config.tied_head else config.vocab_size * (width + biases)
    return tables + config.num_layers * (attention + mlp + 2 * norm) + norm + head


def count_parameters(params: Params) -> int:
    """How many numbers there are in the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def embedding_parameters(params: Params) -> int:
    """Those that grow with the vocabulary: in embeddings of tokens and in the head, its bias included."""
    return sum(count_parameters(part) for name, part in params.items() if name.startswith(("embedding", "head")))


def flops_per_token(params: Params, config: ModelConfig) -> int:
    """Floating-point operations of a training step per token: 6 for each number of a matrix, and causal attention.

    A matrix takes 2 operations per number forward and 4 backward. Attention takes 4 D forward and 8 D backward for each
    position that a token sees, which are half of the context on average, fewer with a window. (Kaplan et al. 2020.)
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    matrices = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    matrices += config.vocab_size * config.width if config.tied_head else 0
    window = config.window or config.context
    seen = window * (2 * config.context - window + 1) / 2 / config.context
    return round(6 * matrices + 12 * config.num_layers * config.width * seen)


class Decoder(nn.Module):
    """Embeddings, `num_layers` blocks, a final norm, a head."""

    config: ModelConfig
    attention: Implementation | None = None
    rounded: bool = False

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        config = self.config
        batch, time = tokens_BT.shape
        if time > config.context:
            raise ValueError(f"{time} tokens don't fit into a context of {config.context}.")
        # A head that is the embedding keeps the first logits small only if the embedding is.
        normal = nn.initializers.normal(0.2 if config.zero_outputs and not config.tied_head else 0.02)
        tables = [
            nn.Embed(
                config.vocab_size,
                config.width,
                embedding_init=normal,
                name=f"embedding_{back}" if back else "embedding",
            )
            for back in range(config.input_tokens)
        ]
        x_BTD = _look_up(tables[0].embedding, tokens_BT)
        for back, table in enumerate(tables[1:], start=1):
            x_BTD = x_BTD + _shift(_look_up(table.embedding, tokens_BT), back)
        if config.positions == "learned":
            positions_TD = self.param("positions", normal, (config.context, config.width), jnp.float32)[:time]
            x_BTD = _add_to_rows(x_BTD.reshape(batch, -1), positions_TD.reshape(-1))
        x_ND = x_BTD.reshape(batch * time, config.width)
        if config.norm == "rms":
            x_ND = _rms(x_ND)
        for layer in range(config.num_layers):
            x_ND = Block(config, self.attention, self.rounded, batch, name=f"block_{layer}")(
                x_ND, _fold_in(keys_B, layer)
            )
        _, x_ND = _norm(config, "final_norm")(x_ND)
        if not config.tied_head:
            logits_NV = _linear(self, config.vocab_size, "head", is_output=True)(x_ND)
        elif self.rounded:
            logits_NV = _product(x_ND, tables[0].embedding.T, rounded=True)
        else:
            logits_NV = tables[0].attend(x_ND)
        return logits_NV if config.logit_cap is None else config.logit_cap * jnp.tanh(logits_NV / config.logit_cap)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    attention: Implementation | None
    rounded: bool
    batch: int

    @nn.compact
    def __call__(self, x_ND: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        config = self.config
        keys = [_fold_in(keys_B, place) for place in range(3)]
        x_ND, h_ND = _norm(config, "attention_norm")(x_ND)
        h_ND = _linear(self, config.width, "attention_output", is_output=True)(self.attend(h_ND, keys[0]))
        x_ND = x_ND + self.drop(h_ND, keys[1])
        x_ND, h_ND = _norm(config, "mlp_norm")(x_ND)
        h_NF = _linear(self, config.feed_forward_width, "mlp_up")(h_ND)
        if config.activation == "swiglu":
            h_NF = h_NF * nn.silu(_linear(self, config.feed_forward_width, "mlp_gate")(h_ND))
        else:
            h_NF = _ACTIVATIONS[config.activation](h_NF)
        return x_ND + self.drop(_linear(self, config.width, "mlp_down", is_output=True)(h_NF), keys[2])

    def attend(self, h_ND: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        config = self.config
        num_kv_heads, head_width = config.num_kv_heads or config.num_heads, config.width // config.num_heads
        # The gradient of h is a sum of three products. A product can be added to what is there already, which XLA does
        # in a sum of two, not of three: so that of keys and values is made one of its own.
        also_h_ND = jax.lax.optimization_barrier(h_ND) if jax.default_backend() == "gpu" else h_ND
        q_BTHK, k_BTGK, v_BTGK = (
            _linear(self, heads * head_width, name, biases=False)(x_ND).reshape(self.batch, -1, heads, head_width)
            for name, heads, x_ND in (
                ("query", config.num_heads, h_ND),
                ("key", num_kv_heads, also_h_ND),
                ("value", num_kv_heads, also_h_ND),
            )
        )
        if config.qk_norm:
            q_BTHK, k_BTGK = 2.0 * _rms(q_BTHK), _rms(k_BTGK)
        if config.positions == "rope":
            q_BTHK, k_BTGK = _rotate(q_BTHK, config.rope_base), _rotate(k_BTGK, config.rope_base)
        out_BTHK = causal_attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            window=config.window,
            dropout_rate=config.dropout,
            dropout_keys_B=keys_B,
            implementation=self.attention,
            rounded=self.rounded,
        )
        return out_BTHK.reshape(h_ND.shape)

    def drop(self, x_ND: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        return dropout(x_ND.reshape(self.batch, -1, self.config.width), self.config.dropout, keys_B).reshape(x_ND.shape)


@jax.custom_jvp
def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


@_relu.defjvp
def _relu_gradient(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """From the result, which what follows keeps anyhow; of `y > 0` XLA would make `x > 0`, and keep x as well."""
    y = _relu(*primals)
    return y, jnp.where(y != 0, *tangents, 0)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": _relu,
    "relu2": lambda x: jnp.square(_relu(x)),
    "gelu": nn.gelu,
}


class Linear(nn.Module):
    """x kernel + bias."""

    features: int
    use_bias: bool
    rounded: bool
    kernel_init: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, x_NI: jax.Array) -> jax.Array:
        kernel_IO = self.param("kernel", self.kernel_init, (x_NI.shape[1], self.features), jnp.float32)
        y_NO = _product(x_NI, kernel_IO, self.rounded)
        if not self.use_bias:
            return y_NO
        return _add_to_rows(y_NO, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32))


def _linear(part: Decoder | Block, features: int, name: str, *, biases: bool = True, is_output: bool = False) -> Linear:
    config = part.config
    kernel_init = nn.initializers.normal(0.02)
    if config.zero_outputs:
        kernel_init = nn.initializers.zeros if is_output else nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    return Linear(features, biases and config.biases, part.rounded, kernel_init, name=name)


def _product(x_NI: jax.Array, kernel_IO: jax.Array, rounded: bool) -> jax.Array:
    """x kernel. On a CPU in a kernel of ours, if it has one for it and there is a device for each core.

    Otherwise the transpose of a kernel that is higher than wide is laid out first there. That takes a moment, and the
    gradient of what is wide takes XLA 40 % less time than that of what is high.
    """
    if rounded:
        from jaxlm.products_numba import rounded_product  # numba takes its time to import

        return rounded_product(x_NI, kernel_IO)
    if jax.default_backend() == "gpu":
        return _split_product(x_NI, kernel_IO)
    if jax.default_backend() != "cpu":
        return x_NI @ kernel_IO
    if has_numba():
        from jaxlm.products_numba import fits, product  # numba takes its time to import

        if fits(x_NI, kernel_IO):
            return product(x_NI, kernel_IO)
    if kernel_IO.shape[0] <= kernel_IO.shape[1]:
        return x_NI @ kernel_IO
    kernel_OI = jax.lax.optimization_barrier(kernel_IO.T)  # or XLA would see through it
    return jax.lax.dot_general(x_NI, kernel_OI, (((1,), (1,)), ((), ())))


@jax.custom_vjp
def _split_product(x_NI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return x_NI @ kernel_IO


def _split_product_backward(saved: tuple[jax.Array, jax.Array], d_NO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the gradient of a small kernel in parts, so that each multiprocessor of a GPU gets its tile."""
    x_NI, kernel_IO = saved
    tiles = -(-kernel_IO.shape[0] // _TILE) * -(-kernel_IO.shape[1] // _TILE)
    most = max(1, min(_MULTIPROCESSORS // tiles, len(x_NI) // _ROWS_OF_PART))
    parts = math.gcd(len(x_NI), 1 << most.bit_length() - 1)
    if parts < _FEWEST_PARTS:
        return d_NO @ kernel_IO.T, x_NI.T @ d_NO
    x_PNI, d_PNO = (array.reshape(parts, -1, array.shape[1]) for array in (x_NI, d_NO))
    d_kernel_PIO = jnp.einsum("pni,pno->pio", x_PNI, d_PNO, preferred_element_type=jnp.float32)
    return d_NO @ kernel_IO.T, d_kernel_PIO.sum(axis=0).astype(kernel_IO.dtype)


_split_product.defvjp(
    lambda x_NI, kernel_IO: (_split_product(x_NI, kernel_IO), (x_NI, kernel_IO)), _split_product_backward
)


@jax.custom_vjp
def _add_to_rows(x_NX: jax.Array, row_X: jax.Array) -> jax.Array:
    return x_NX + row_X


def _add_to_rows_backward(_: None, d_NX: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of the rows; on a CPU as a product with ones, which takes XLA half of the time."""
    if jax.default_backend() != "cpu":
        return d_NX, d_NX.sum(axis=0)
    ones_N = jax.lax.optimization_barrier(jnp.ones(len(d_NX), d_NX.dtype))  # or XLA would see through it
    return d_NX, ones_N @ d_NX


_add_to_rows.defvjp(lambda x_NX, row_X: (_add_to_rows(x_NX, row_X), None), _add_to_rows_backward)


def _norm(config: ModelConfig, name: str) -> Norm:
    is_layer = config.norm == "layer"
    return Norm(is_layer, 1e-5 if is_layer else 1e-6, name=name)  # the first is that of the seed recipe


def _rms(x: jax.Array) -> jax.Array:
    """Scaled to a mean square of 1 along the last axis (Zhang and Sennrich 2019)."""
    mean_square = jnp.square(x.astype(jnp.float32)).mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6).astype(x.dtype)


def _rotate(x_BTHK: jax.Array, base: float) -> jax.Array:
    """RoPE (Su et al. 2021): numbers i and i + K / 2 turn by t / base^(2 i / K), so scores see distances alone."""
    time, half = x_BTHK.shape[1], x_BTHK.shape[3] // 2
    angles_T1K = jnp.arange(time)[:, None, None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles_T1K).astype(x_BTHK.dtype), jnp.sin(angles_T1K).astype(x_BTHK.dtype)
    a, b = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The rows of tokens. JAX's own gradient adds a token's rows one after the other, which only a CPU does fast."""
    if jax.default_backend() == "cpu":
        return jnp.take(table_VD, tokens_BT, axis=0)
    return _rows(table_VD, tokens_BT)


@jax.custom_vjp
def _rows(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return jnp.take(table_VD, tokens_BT, axis=0)


def _rows_backward(saved: tuple[jax.Array, jax.Array], d_rows_BTD: jax.Array) -> tuple[jax.Array, None]:
    """A product with one-hot rows, which is the same each time and needs no waiting; for many ids, a kernel of sums."""
    table_VD, tokens_BT = saved
    if len(table_VD) <= _FEW_IDS:
        one_hot_BTV = jax.nn.one_hot(tokens_BT, len(table_VD), dtype=d_rows_BTD.dtype)
        d_table_VD = jnp.einsum("btv,btd->vd", one_hot_BTV, d_rows_BTD, preferred_element_type=jnp.float32)
    elif has_triton():
        from jaxlm.rows_triton import sums_by_token  # pallas takes its time to import

        d_table_VD = sums_by_token(tokens_BT.reshape(-1), d_rows_BTD.reshape(-1, table_VD.shape[1]), len(table_VD))
    else:
        d_table_VD = jnp.zeros(table_VD.shape, jnp.float32).at[tokens_BT].add(d_rows_BTD.astype(jnp.float32))
    return d_table_VD.astype(table_VD.dtype), None


_rows.defvjp(lambda table_VD, tokens_BT: (_rows(table_VD, tokens_BT), (table_VD, tokens_BT)), _rows_backward)


def _shift(x_BTD: jax.Array, back: int) -> jax.Array:
    """Each position gets what stood `back` positions before it, the first ones zero."""
    return jnp.pad(x_BTD, ((0, 0), (back, 0), (0, 0)))[:, : x_BTD.shape[1]]


def _fold_in(keys_B: jax.Array | None, data: int) -> jax.Array | None:
    return None if keys_B is None else jax.vmap(lambda key: jax.random.fold_in(key, data))(keys_B)
