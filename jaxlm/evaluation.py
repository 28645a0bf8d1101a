"""Held-out text scored in bits per byte, which can be compared across vocabularies; loss per token can't.

Shapes: B windows scored together, T = context.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxlm.data.shards import TokenStream
from jaxlm.model import ModelConfig, Params, forward
from jaxlm.parallel import compiler_options, divided, has_triton, sharding_beside
from jaxlm.tokenizers.base import InputError

WINDOWS_AT_ONCE = 32
_MANY_IDS = 4_096  # for which the logits of a row fill the threads of a kernel


@dataclass(frozen=True)
class Evaluation:
    """What a model scored.

    Attributes:
      loss: nats per token, end-of-text not among them.
      bits_per_byte: sum of nats / (ln 2 x UTF-8 bytes), over all documents.
      standard_error: of that ratio, over documents; NaN for a single one.
      documents, tokens, bytes: what was scored.
      document_nats: the nats of each document, float64.
    """

    loss: float
    bits_per_byte: float
    standard_error: float
    documents: int
    tokens: int
    bytes: int
    document_nats: npt.NDArray[np.float64] = field(repr=False, compare=False)


def evaluate(
    params: Params, config: ModelConfig, stream: TokenStream, end_of_text_id: int, *, num_documents: int | None = None
) -> Evaluation:
    """Scores the first `num_documents` documents of `stream` (None: all), each alone, after one end-of-text token."""
    sharding = sharding_beside(params, WINDOWS_AT_ONCE)
    mesh = sharding.mesh if sharding else None
    tokens = WINDOWS_AT_ONCE * config.context // (mesh.size if mesh else 1)
    scorer = _window_scorer(tokens * config.width)

    def score_windows(*windows: jax.Array) -> jax.Array:
        return scorer(params, config, mesh, jax.device_put(windows, sharding))

    nats = score_documents(score_windows, stream, end_of_text_id, config.context, num_documents=num_documents)
    num_bytes = stream.document_bytes[: len(nats)]
    num_tokens = int(stream.ends[len(nats) - 1]) - len(nats)
    return summarise(nats, num_bytes, num_tokens)


def summarise(nats: npt.NDArray[np.float64], num_bytes: npt.NDArray[np.int64], num_tokens: int) -> Evaluation:
    """Bits per byte from the nats and bytes of each document, with the standard error of a ratio.

    The ratio is R = sum x / sum b of bits x and bytes b; its variance over n documents is estimated by
    n / (n - 1) x sum (x - R b)^2 / (sum b)^2 (Cochran 1977, Sampling Techniques, 6.4).
    """
    bits = nats / math.log(2)
    ratio = bits.sum() / num_bytes.sum()
    n = len(nats)
    variance = n / (n - 1) * ((bits - ratio * num_bytes) ** 2).sum() / num_bytes.sum() ** 2 if n > 1 else math.nan
    return Evaluation(
        loss=float(nats.sum() / num_tokens),
        bits_per_byte=float(ratio),
        standard_error=math.sqrt(variance),
        documents=n,
        tokens=num_tokens,
        bytes=int(num_bytes.sum()),
        document_nats=nats,
    )


def score_documents(
    score_windows: Callable[[jax.Array, jax.Array], jax.Array],
    stream: TokenStream,
    end_of_text_id: int,
    context: int,
    *,
    num_documents: int | None = None,
) -> npt.NDArray[np.float64]:
    """The sum of nats of each document: float64, shape (documents,).

    Windows of `context` tokens advance by half of it, and each token is scored once, in the window in which it has the
    most context. `score_windows` gives the nats of targets after inputs, int (B, T) each -> float (B, T).
    """
    count = stream.num_documents if num_documents is None else min(num_documents, stream.num_documents)
    if count < 1:
        raise InputError(f"At least one document has to be evaluated, not {num_documents}.")
    nats = np.zeros(count)
    windows = (
        (index, *window)
        for index in range(count)
        for window in document_windows(stream.document(index), end_of_text_id, context)
    )
    for owners, inputs_BT, targets_BT, scored_BT in _batched(windows, context):
        window_nats = np.asarray(score_windows(jnp.asarray(inputs_BT), jnp.asarray(targets_BT)), np.float64)
        np.add.at(nats, owners, np.where(scored_BT, window_nats, 0.0)[: len(owners)].sum(axis=1))
    return nats


def document_windows(
    tokens: npt.NDArray[np.int32], end_of_text_id: int, context: int
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], int]]:
    """The windows in which one document is scored: inputs, targets, and the first target that counts."""
    inputs = np.concatenate([[end_of_text_id], tokens[:-1]]).astype(np.int32)
    stride = context // 2
    start = first = 0
    while start + first < len(tokens):
        yield inputs[start : start + context], tokens[start : start + context], first
        start += stride
        first = context - stride


def _batched(
    windows: Iterator[tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int32], int]], context: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
    """Windows in batches of one shape, padded at the end, where causality keeps the padding from being seen."""
    done = False
    while not done:
        owners = []
        inputs_BT, targets_BT = np.zeros((2, WINDOWS_AT_ONCE, context), np.int32)
        scored_BT = np.zeros((WINDOWS_AT_ONCE, context), bool)
        for row in range(WINDOWS_AT_ONCE):
            window = next(windows, None)
            if window is None:
                done = True
                break
            owner, inputs, targets, first = window
            owners.append(owner)
            inputs_BT[row, : len(inputs)] = inputs
            targets_BT[row, : len(targets)] = targets
            scored_BT[row, first : len(targets)] = True
        if owners:
            yield np.array(owners), inputs_BT, targets_BT, scored_BT


@functools.cache
def _window_scorer(activation: int) -> Callable[..., jax.Array]:
    """Compiled as training steps are; at its first use, as to ask for the options would start JAX."""

    @partial(jax.jit, static_argnums=(1, 2), compiler_options=compiler_options(activation))
    def score(params: Params, config: ModelConfig, mesh: Any, windows: tuple[jax.Array, jax.Array]) -> jax.Array:
        def nats(params: Params, windows: tuple[jax.Array, jax.Array]) -> jax.Array:
            inputs_BT, targets_BT = windows
            return token_nats(forward(params, inputs_BT, config), targets_BT)

        return divided(nats, mesh)(params, windows)

    return score


@jax.custom_vjp
def token_nats(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-ln p of each target: (B, T, V), int (B, T) -> (B, T)."""
    return _token_nats_forward(logits_BTV, targets_BT)[0]


def _token_nats_forward(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    log_sums_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return log_sums_BT - chosen_BT, (logits_BTV, targets_BT, log_sums_BT)


def _token_nats_backward(saved: tuple[jax.Array, ...], d_nats_BT: jax.Array) -> tuple[jax.Array, None]:
    """The softmax less the one-hot target, in one pass; the gradient of a gather would be an array of its own."""
    logits_BTV, targets_BT, log_sums_BT = saved
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    softmax_BTV = jnp.exp(logits_BTV - log_sums_BT[..., None])
    return (softmax_BTV - is_target_BTV) * d_nats_BT[..., None], None


token_nats.defvjp(_token_nats_forward, _token_nats_backward)


def mean_nats(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The mean of `token_nats`; for many ids on a GPU in a kernel that puts the gradient in the place of the logits."""
    if not has_triton() or logits_BTV.shape[-1] < _MANY_IDS:
        return token_nats(logits_BTV.astype(jnp.float32), targets_BT).mean()
    return _mean_nats(logits_BTV.reshape(-1, logits_BTV.shape[-1]), targets_BT.reshape(-1))


@jax.custom_vjp
def _mean_nats(logits_NV: jax.Array, targets_N: jax.Array) -> jax.Array:
    return token_nats(logits_NV.astype(jnp.float32), targets_N).mean()


def _mean_nats_forward(logits_NV: jax.Array, targets_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    from jaxlm.rows_triton import nats_and_gradient  # pallas takes its time to import

    nats_N, d_NV = nats_and_gradient(logits_NV, targets_N)
    return nats_N.mean(), d_NV


# In a training step the gradient from above is 1, so that XLA drops this multiplication.
_mean_nats.defvjp(_mean_nats_forward, lambda d_NV, d: (d_NV * d.astype(d_NV.dtype), None))
