"""Generation: one token after another from a trained model, and the text as it grows.

Shapes: T = context, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.model import LARGEST_FLOAT, ModelConfig, Params, forward
from jaxlm.tokenizers.base import IdArray, InputError, Tokenizer


def sample_text(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    key: jax.Array,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Iterator[str]:
    """The text that follows `prompt`, piece by piece, until end-of-text or `num_tokens` tokens.

    The model sees end-of-text, then the prompt, as at the beginning of a document. No piece ends in half a character.
    """
    end_of_text_id = tokenizer.end_of_text_id
    if end_of_text_id is None:
        raise InputError(
            "The tokenizer has no end-of-text token, so there is no beginning of a document to start from."
        )
    prompt_ids = np.append(np.int32(end_of_text_id), tokenizer.encode(prompt, allowed_special="none"))
    drawn = generate(params, config, prompt_ids, key=key, temperature=temperature, top_k=top_k)
    ids = itertools.takewhile(lambda token_id: token_id != end_of_text_id, itertools.islice(drawn, num_tokens))
    yield from tokenizer.decode_iter(ids)


def generate(
    params: Params,
    config: ModelConfig,
    prompt_ids: IdArray,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Iterator[int]:
    """Token ids that follow a prompt of at least one, without end. Token i is drawn with the key folded with i.

    Args:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draws from the k most likely tokens alone; None from all.

    Raises:
      InputError: a negative temperature, or a top_k below 1 or above the vocabulary.
    """
    check_sampling(temperature, top_k, config.vocab_size)
    ids = [int(token_id) for token_id in prompt_ids]
    for index in itertools.count():
        window = ids[-config.context :]
        tokens_T = np.zeros(config.context, np.int32)
        tokens_T[: len(window)] = window
        next_id = _next_token(
            params, config, top_k, tokens_T, len(window), jnp.float32(temperature), jax.random.fold_in(key, index)
        )
        ids.append(int(next_id))
        yield ids[-1]


def check_sampling(temperature: float, top_k: int | None, vocab_size: int | None = None) -> None:
    """Raises InputError for what makes no sense, or not for a vocabulary of that size."""
    if not 0 <= temperature <= LARGEST_FLOAT:
        raise InputError(f"The temperature is a float32 number of at least 0, not {temperature}.")
    if top_k is not None and (top_k < 1 or (vocab_size is not None and top_k > vocab_size)):
        most = "the vocabulary's ids" if vocab_size is None else f"the vocabulary's {vocab_size} ids"
        raise InputError(f"top_k is from 1 to {most}, not {top_k}.")


@partial(jax.jit, static_argnums=(1, 2))
def _next_token(
    params: Params,
    config: ModelConfig,
    top_k: int | None,
    tokens_T: jax.Array,
    length: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Draws the token after the first `length` of `tokens_T`; causality hides the padding behind them."""
    logits_V = forward(params, tokens_T[None], config)[0, length - 1]
    if top_k is not None:
        # By index, not by the least logit among them, which tokens outside may share.
        kept = jax.lax.top_k(logits_V, top_k)[1]
        logits_V = jnp.full_like(logits_V, -jnp.inf).at[kept].set(logits_V[kept])
    drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))
