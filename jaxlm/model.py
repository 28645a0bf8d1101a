"""The decoder: a configuration, `init` and `forward`. Pure functions over a pytree of parameters.

Shapes: B batch, T time, D model width, H heads, K head width (D = H K), F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.attention import causal_attention, dropout
from jaxlm.tokenizers.base import InputError

Params = Any


@dataclass(frozen=True)
class ModelConfig:
    """A pre-LayerNorm decoder with learned positions (Radford et al. 2019). The defaults are the seed model."""

    vocab_size: int
    context: int = 256  # tokens that a position may look at, itself included
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    feed_forward_width: int = 512
    dropout: float = 0.2  # on attention weights, attention output and MLP output

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "width", "num_layers", "num_heads", "feed_forward_width"):
            if getattr(self, name) < 1:
                raise InputError(f"The model's {name} is at least 1, not {getattr(self, name)}.")
        if self.context < 2:
            raise InputError("The model's context is at least 2 tokens, so that held-out windows can overlap by half.")
        if self.width % self.num_heads:
            raise InputError(
                f"The model's width {self.width} doesn't divide into {self.num_heads} heads; make it a multiple."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"The model's dropout is a share from 0 to below 1, not {self.dropout}.")


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters: weights from N(0, 0.02), biases zero, gains one."""
    return Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def forward(
    params: Params, tokens_BT: jax.Array, config: ModelConfig, *, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Logits of the next token at each position: int (B, T) -> float32 (B, T, V), for T up to `config.context`.

    Dropout is on if there is a key. Logits at position t depend on tokens up to t alone.
    """
    logits_BTV: jax.Array = Decoder(config).apply({"params": params}, tokens_BT, dropout_key)  # type: ignore[assignment]
    return logits_BTV


def count_parameters(params: Params) -> int:
    """How many numbers there are in the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class Decoder(nn.Module):
    """Embedding and positions, `num_layers` blocks, a final LayerNorm, an untied head."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        config = self.config
        time = tokens_BT.shape[1]
        if time > config.context:
            raise ValueError(f"{time} tokens don't fit into a context of {config.context}.")
        positions_TD = self.param("positions", _normal, (config.context, config.width))
        x_BTD = nn.Embed(config.vocab_size, config.width, embedding_init=_normal, name="embedding")(tokens_BT)
        x_BTD = x_BTD + positions_TD[:time]
        for layer in range(config.num_layers):
            x_BTD = Block(config, name=f"block_{layer}")(x_BTD, _fold_in(dropout_key, layer))
        return _dense(config.vocab_size, name="head")(_layer_norm("final_norm")(x_BTD))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        config, rate = self.config, self.config.dropout
        keys = [_fold_in(dropout_key, place) for place in range(3)]
        h_BTD = _layer_norm("attention_norm")(x_BTD)
        q_BTHK, k_BTHK, v_BTHK = (
            _dense(config.width, name, use_bias=False)(h_BTD).reshape(*h_BTD.shape[:2], config.num_heads, -1)
            for name in ("query", "key", "value")
        )
        attended_BTHK = causal_attention(q_BTHK, k_BTHK, v_BTHK, dropout_rate=rate, dropout_key=keys[0])
        x_BTD = x_BTD + dropout(
            _dense(config.width, "attention_output")(attended_BTHK.reshape(x_BTD.shape)), rate, keys[1]
        )
        h_BTF = nn.relu(_dense(config.feed_forward_width, "mlp_up")(_layer_norm("mlp_norm")(x_BTD)))
        return x_BTD + dropout(_dense(config.width, "mlp_down")(h_BTF), rate, keys[2])


_normal = nn.initializers.normal(0.02)


def _dense(features: int, name: str, use_bias: bool = True) -> nn.Dense:
    return nn.Dense(features, use_bias=use_bias, kernel_init=_normal, name=name)


def _layer_norm(name: str) -> nn.LayerNorm:
    # E[(x - E x)^2], which doesn't cancel, and the epsilon of the recipe that the seed model is measured against.
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


def _fold_in(key: jax.Array | None, data: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, data)
