"""Bits per byte: closed forms, the definition of the windows token by token, and the standard error of a ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.shards import TokenStream
from jaxlm.evaluation import Evaluation, evaluate, score_documents, summarise, token_nats
from jaxlm.model import ModelConfig, Params, abstract_params, forward
from jaxlm.tokenizers.base import InputError

Ids = npt.NDArray[np.int32]
END = 12
EVEN = ModelConfig(vocab_size=13, context=6, width=8, num_layers=1, num_heads=2, feed_forward_width=8, dropout=0.3)
ODD = ModelConfig(vocab_size=13, context=7, width=8, num_layers=1, num_heads=2, feed_forward_width=8, dropout=0.3)


def make_stream(documents: Sequence[Sequence[int] | Ids], num_bytes: Sequence[int] = (), end: int = END) -> TokenStream:
    """A stream of documents; without `num_bytes` a document has three bytes a token."""
    tokens = np.concatenate([np.append(document, end) for document in documents]).astype(np.uint16)
    ends = np.cumsum([len(document) + 1 for document in documents])
    lengths = num_bytes or [3 * len(document) for document in documents]
    return TokenStream((tokens,), ends, np.array(lengths, np.int64))


def random_documents(lengths: Sequence[int], seed: int = 0) -> list[Ids]:
    random = np.random.default_rng(seed)
    return [random.integers(END, size=length, dtype=np.int32) for length in lengths]


def lively(config: ModelConfig, seed: int = 0) -> Params:
    """Parameters with which every token of the context makes a difference."""
    random = np.random.default_rng(seed)
    shapes = abstract_params(config)
    return jax.tree.map(lambda leaf: random.normal(0.0, 0.7, leaf.shape).astype(np.float32), shapes)


def without_context(params: Params, logits_V: npt.ArrayLike) -> Params:
    """The same model, except that it gives these logits whatever it sees."""
    kernel = np.zeros_like(params["head"]["kernel"])
    return {**params, "head": {"kernel": kernel, "bias": np.asarray(logits_V, np.float32)}}


# ---- closed forms


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary() -> None:
    documents = random_documents([1, 5, 6, 7, 40])
    stream = make_stream(documents, [4, 9, 6, 12, 55])
    found = evaluate(without_context(lively(EVEN), np.full(13, 2.5)), EVEN, stream, END)
    assert (found.documents, found.tokens, found.bytes) == (5, 59, 86)
    assert found.loss == pytest.approx(math.log(13), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(13) * 59 / 86, rel=1e-6)


def test_a_model_of_token_frequencies_scores_its_cross_entropy() -> None:
    documents = random_documents([3, 17, 30, 2], seed=1)
    stream = make_stream(documents, [5, 40, 50, 2])
    logits = np.random.default_rng(2).normal(size=13)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount(np.concatenate(documents), minlength=13)
    assert counts[END] == 0
    bits = -(counts * np.log2(probabilities)).sum()
    found = evaluate(without_context(lively(EVEN), logits), EVEN, stream, END)
    assert found.bits_per_byte == pytest.approx(bits / 97, rel=1e-6)
    assert found.loss == pytest.approx(bits * math.log(2) / 52, rel=1e-6)


def test_token_nats_is_minus_the_logarithm_of_the_softmax() -> None:
    random = np.random.default_rng(3)
    logits_BTV = random.normal(size=(2, 3, 5)) * 4
    targets_BT = random.integers(5, size=(2, 3))
    probabilities = np.exp(logits_BTV) / np.exp(logits_BTV).sum(axis=-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, targets_BT[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(token_nats(jnp.asarray(logits_BTV), targets_BT), expected, rtol=1e-5)
    np.testing.assert_allclose(token_nats(jnp.array([[[0.0, 1e4]]]), jnp.array([[0]])), [[1e4]])


def test_the_gradient_of_token_nats_is_that_of_the_formula() -> None:
    random = np.random.default_rng(5)
    logits = random.normal(size=(2, 7, 11)).astype(np.float32) * 5
    targets = random.integers(11, size=(2, 7))
    above = random.normal(size=(2, 7)).astype(np.float32)

    def formula(logits: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], axis=-1)[..., 0]

    for function in (lambda x: token_nats(x, targets), jax.jit(lambda x: token_nats(x, targets))):
        values, pull_back = jax.vjp(function, logits)
        expected, formula_pull_back = jax.vjp(formula, logits)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(pull_back(above)[0], formula_pull_back(above)[0], atol=2e-6)


def test_names_of_tokens_mean_nothing() -> None:
    """Ids permuted together with embedding rows and head columns are the same model of the same text."""
    params, documents = lively(ODD), random_documents([1, 6, 15, 30])
    new_id = np.random.default_rng(4).permutation(13).astype(np.int32)
    old_id = np.argsort(new_id)
    head = params["head"]
    permuted = {
        **params,
        "embedding": {"embedding": params["embedding"]["embedding"][old_id]},
        "head": {"kernel": head["kernel"][:, old_id], "bias": head["bias"][old_id]},
    }
    end = int(new_id[END])
    before = evaluate(params, ODD, make_stream(documents), END)
    after = evaluate(permuted, ODD, make_stream([new_id[document] for document in documents], end=end), end)
    assert after.bits_per_byte == pytest.approx(before.bits_per_byte, rel=1e-6)
    assert after.standard_error == pytest.approx(before.standard_error, rel=1e-5)
    unpermuted = evaluate(params, ODD, make_stream([new_id[document] for document in documents], end=end), end)
    assert unpermuted.bits_per_byte != pytest.approx(before.bits_per_byte, rel=1e-3)


# ---- the definition, token by token


def window_start(position: int, context: int) -> int:
    """Where the window begins that gives the token at `position` the most context."""
    starts = range(0, position + 1, context // 2)
    return min(start for start in starts if position < start + context)


def seen_by(tokens: Ids, position: int, context: int) -> list[int]:
    """The tokens that the one at `position` is predicted from."""
    return [END, *tokens.tolist()][window_start(position, context) : position + 1]


@pytest.mark.parametrize("config", [EVEN, ODD], ids=["even", "odd"])
def test_scores_are_those_of_single_predictions(config: ModelConfig) -> None:
    params = lively(config)
    documents = random_documents([1, 2, 5, 6, 7, 8, 13, 29])

    @jax.jit
    def predict(inputs_NT: jax.Array, lengths_N: jax.Array) -> jax.Array:
        logits_NTV = forward(params, inputs_NT, config)
        return jax.nn.log_softmax(logits_NTV[jnp.arange(len(lengths_N)), lengths_N - 1])

    expected = []
    for tokens in documents:
        inputs_NT, lengths_N = np.full((29, config.context), 5, np.int32), np.ones(29, np.int32)
        for position in range(len(tokens)):
            seen = seen_by(tokens, position, config.context)
            inputs_NT[position, : len(seen)] = seen
            lengths_N[position] = len(seen)
        log_probabilities = np.asarray(predict(inputs_NT, lengths_N), np.float64)
        expected.append(-log_probabilities[np.arange(len(tokens)), tokens].sum())
    found = evaluate(params, config, make_stream(documents), END)
    assert found.loss == pytest.approx(sum(expected) / 71, rel=1e-6)
    for count in range(1, len(documents) + 1):
        partial_score = evaluate(params, config, make_stream(documents), END, num_documents=count)
        assert partial_score.loss * partial_score.tokens == pytest.approx(sum(expected[:count]), rel=1e-6)


def fingerprints(inputs_BT: npt.ArrayLike, targets_BT: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """In place of nats, whole numbers that tell each target with all that is before it in its window."""
    inputs_BT, targets_BT = np.asarray(inputs_BT, np.int64), np.asarray(targets_BT, np.int64)
    seen_BT = np.zeros_like(inputs_BT)
    seen = np.zeros(len(inputs_BT), np.int64)
    for t in range(inputs_BT.shape[1]):
        seen = (seen * 31 + inputs_BT[:, t] + 1) % 65_521
        seen_BT[:, t] = seen
    return ((seen_BT * 31 + targets_BT + 1) % 65_521).astype(np.float64)


@settings(max_examples=60)
@given(
    context=st.integers(2, 13),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
def test_each_token_is_scored_once_with_the_context_of_the_definition(
    context: int, lengths: list[int], seed: int
) -> None:
    documents = random_documents(lengths, seed)
    found = score_documents(fingerprints, make_stream(documents), END, context)
    for nats, tokens in zip(found, documents, strict=True):
        expected = 0.0
        for position, token in enumerate(tokens):
            seen = seen_by(tokens, position, context)
            expected += fingerprints([seen], [[*seen[1:], token]])[0, -1]
        assert nats == expected


@pytest.mark.parametrize("context", [2, 3, 8, 9, 64])
def test_end_of_text_and_padding_are_never_scored(context: int) -> None:
    lengths = [1, context - 1, context, context + 1, 3 * context, 40 * context]

    def count(inputs_BT: jax.Array, targets_BT: jax.Array) -> npt.NDArray[np.float64]:
        assert inputs_BT.shape == targets_BT.shape
        assert inputs_BT.shape[1] == context
        return np.where(np.asarray(targets_BT) == END, 1e9, 1.0)

    found = score_documents(count, make_stream(random_documents(lengths)), END, context)
    assert found.dtype == np.float64
    assert found.tolist() == lengths


@pytest.mark.parametrize("context", [8, 9])
def test_beyond_the_first_window_a_token_has_more_than_half_a_context(context: int) -> None:
    def context_length(inputs_BT: jax.Array, targets_BT: jax.Array) -> npt.NDArray[np.float64]:
        return np.broadcast_to(1.0 * (np.arange(context) + 1 <= context / 2), np.shape(targets_BT))

    (few,) = score_documents(context_length, make_stream(random_documents([200])), END, context)
    assert few == context // 2, "only the first tokens of a document may have so little context"


# ---- documents


def test_the_first_documents_are_scored_and_each_alone() -> None:
    params, documents = lively(EVEN), random_documents([4, 20, 7, 9])
    for count in (1, 2, 4, 9):
        found = evaluate(params, EVEN, make_stream(documents), END, num_documents=count)
        same = evaluate(params, EVEN, make_stream(documents[:count]), END)
        assert repr(found) == repr(same)
        assert found.documents == min(count, 4)
    alone = [evaluate(params, EVEN, make_stream([document]), END) for document in documents]
    whole = evaluate(params, EVEN, make_stream(documents), END)
    assert whole.loss * whole.tokens == pytest.approx(sum(one.loss * one.tokens for one in alone), rel=1e-6)


@pytest.mark.parametrize("count", [0, -1])
def test_no_document_is_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"At least one document has to be evaluated, not {count}"):
        evaluate(lively(EVEN), EVEN, make_stream(random_documents([3])), END, num_documents=count)


# ---- the standard error


def random_scores(count: int, seed: int = 0) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Nats and bytes of documents of very different lengths, some easier than others."""
    random = np.random.default_rng(seed)
    num_bytes = random.lognormal(6, 0.8, count).astype(np.int64) + 1
    return num_bytes * random.normal(1.4, 0.15, count), num_bytes


def test_the_standard_error_is_that_of_a_ratio() -> None:
    nats, num_bytes = random_scores(7)
    found = summarise(nats, num_bytes, 1234)
    bits = [x / math.log(2) for x in nats]
    ratio = sum(bits) / sum(num_bytes)
    residuals = [x - ratio * b for x, b in zip(bits, num_bytes, strict=True)]
    variance_of_residuals = sum(residual**2 for residual in residuals) / 6
    mean_bytes = sum(num_bytes) / 7
    assert found == Evaluation(
        loss=pytest.approx(sum(nats) / 1234),
        bits_per_byte=pytest.approx(ratio),
        standard_error=pytest.approx(math.sqrt(variance_of_residuals / 7) / mean_bytes),
        documents=7,
        tokens=1234,
        bytes=sum(num_bytes),
        document_nats=nats,
    )


def test_the_standard_error_agrees_with_a_bootstrap() -> None:
    nats, num_bytes = random_scores(400)
    found = summarise(nats, num_bytes, 1)
    drawn = np.random.default_rng(1).integers(400, size=(8000, 400))
    ratios = nats[drawn].sum(axis=1) / math.log(2) / num_bytes[drawn].sum(axis=1)
    assert found.standard_error == pytest.approx(ratios.std(), rel=0.05)


def test_the_standard_error_covers_the_truth_as_often_as_it_says() -> None:
    """Of many corpora drawn from one source, two standard errors hold the source's figure in about 95 %."""
    truth = 1.4 / math.log(2)
    found = [summarise(*random_scores(200, seed), 1) for seed in range(600)]
    covered = np.mean([abs(one.bits_per_byte - truth) < 1.96 * one.standard_error for one in found])
    assert covered == pytest.approx(0.95, abs=0.035)


def test_documents_of_one_rate_have_no_error_and_one_document_has_none_to_state() -> None:
    num_bytes = np.array([10, 200, 3000])
    assert summarise(num_bytes * 1.5, num_bytes, 9).standard_error == pytest.approx(0.0, abs=1e-12)
    single = summarise(np.array([30.0]), np.array([20]), 10)
    assert math.isnan(single.standard_error)
    assert single.bits_per_byte == pytest.approx(1.5 / math.log(2))
