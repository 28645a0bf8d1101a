"""Generation against a loop that recomputes everything, and text that is given out in whole characters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import pytest

from jaxlm.model import ModelConfig, Params, abstract_params, forward
from jaxlm.sampling import generate, sample_text
from jaxlm.tokenizers import BPETokenizer, CharTokenizer, SentencePieceTokenizer
from jaxlm.tokenizers.base import END_OF_TEXT, InputError, Tokenizer

CONFIG = ModelConfig(vocab_size=11, context=6, width=8, num_layers=1, num_heads=2, feed_forward_width=8)
PROMPT = np.array([3, 1, 4], np.int32)
KEY = jax.random.key(0)
SCRIPT_LENGTH = 32


def lively(config: ModelConfig, seed: int = 0) -> Params:
    """Parameters with which every token of the context makes a difference."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(0.0, 0.7, leaf.shape).astype(np.float32), abstract_params(config))


def take(count: int, params: Params, prompt: npt.NDArray[np.int32] = PROMPT, **options: Any) -> list[int]:
    """The first tokens that are generated."""
    return list(itertools.islice(generate(params, CONFIG, prompt, **{"key": KEY, **options}), count))


@jax.jit
def _logits(params: Params, tokens_BT: jax.Array) -> jax.Array:
    return forward(params, tokens_BT, CONFIG)


def logits_after(params: Params, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """What the model says after the last `context` of `ids`. What stands behind them is of no importance."""
    window = list(ids)[-CONFIG.context :]
    padded = window + [7] * (CONFIG.context - len(window))
    return np.asarray(_logits(params, np.array([padded], np.int32)))[0, len(window) - 1]


# ---- ids


@pytest.mark.parametrize("length", [1, 3, 6, 9])
def test_greedy_is_the_argmax_of_each_step_beyond_the_context_too(length: int) -> None:
    """From many prompts, because a model left to its most likely tokens soon repeats one of them."""
    params = lively(CONFIG, seed=9)
    found = []
    for prompt in np.random.default_rng(length).integers(11, size=(20, length), dtype=np.int32):
        ids = prompt.tolist()
        for _ in range(5):
            ids.append(int(logits_after(params, ids).argmax()))
        assert take(5, params, prompt, temperature=0.0) == ids[length:]
        assert take(5, params, prompt, temperature=2.0, top_k=1) == ids[length:]
        assert take(5, params, prompt, temperature=0.0, top_k=3) == ids[length:]
        found.append(tuple(ids[length:]))
    assert len(set(found)) > 5, "the prompts make too little difference to show anything"


def test_the_key_decides_and_each_token_has_its_own() -> None:
    params = lively(CONFIG)
    first, again, other = (take(30, params, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    # A model that forgets its context would repeat itself if each token were drawn with the same key.
    assert len(set(take(30, unigram(np.zeros(11))))) > 5


def unigram(logits_V: npt.ArrayLike) -> Params:
    """A model that gives these logits whatever it sees."""
    params = lively(CONFIG)
    kernel = np.zeros_like(params["head"]["kernel"])
    return {**params, "head": {"kernel": kernel, "bias": np.asarray(logits_V, np.float32)}}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_probabilities(temperature: float) -> None:
    logits = np.random.default_rng(1).normal(size=11)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    drawn = np.bincount(take(1000, unigram(logits), temperature=temperature), minlength=11)
    chi_squared = ((drawn - 1000 * expected) ** 2 / (1000 * expected)).sum()
    assert chi_squared < 30, "ten degrees of freedom go beyond 30 once in a thousand times"


def test_top_k_draws_from_the_most_likely_alone() -> None:
    params = lively(CONFIG)
    ids = PROMPT.tolist()
    ranks = []
    for token_id in take(200, params, temperature=3.0, top_k=3):
        ranks.append(int((logits_after(params, ids) > logits_after(params, ids)[token_id]).sum()))
        ids.append(token_id)
    assert set(ranks) == {0, 1, 2}
    assert take(50, params, top_k=11) == take(50, params, top_k=None)


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_is_a_number_of_tokens_even_among_equals(top_k: int) -> None:
    drawn = take(100, unigram(np.zeros(11)), top_k=top_k)
    assert len(set(drawn)) == top_k
    assert take(1, unigram(np.zeros(11)), temperature=0.0)[0] in drawn


def test_a_tiny_temperature_is_greedy() -> None:
    params = lively(CONFIG)
    assert take(20, params, temperature=1e-5) == take(20, params, temperature=0.0)


@pytest.mark.parametrize("temperature", [-0.1, -math.inf, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match=f"temperature is a float32 number of at least 0, not {temperature}"):
        take(1, lively(CONFIG), temperature=temperature)


@pytest.mark.parametrize("top_k", [0, -1, 12])
def test_a_top_k_outside_the_vocabulary_is_refused(top_k: int) -> None:
    with pytest.raises(InputError, match=f"top_k is from 1 to the vocabulary's 11 ids, not {top_k}"):
        take(1, lively(CONFIG), top_k=top_k)


# ---- text


def bytes_alone() -> Tokenizer:
    """256 bytes and end-of-text: every character beyond ASCII is several tokens."""
    return BPETokenizer.train(["abc"], 257)


def some_characters() -> Tokenizer:
    """Characters, of which é isn't one: it is written as escape, e, 9, escape."""
    return CharTokenizer.train(["Le chat dort."])


def sentence_pieces() -> Tokenizer:
    return SentencePieceTokenizer.train(["Le chat dort. Le chien court. Un chat mange, un chien boit. "] * 20, 300)


TOKENIZERS = {"bytes": bytes_alone, "characters": some_characters, "sentencepiece": sentence_pieces}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def scripted(tokenizer: Tokenizer, ids: Sequence[int], prompt: str = "") -> tuple[Params, ModelConfig]:
    """A model whose most likely token after `prompt` is ids[0], then ids[1], and so on; then end-of-text.

    A position is a unit vector, blocks add nothing to it, and the head turns each into the token of its place.
    """
    config = ModelConfig(tokenizer.vocab_size, SCRIPT_LENGTH, SCRIPT_LENGTH, 1, 1, 1)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(config))
    params["positions"] = np.eye(SCRIPT_LENGTH, dtype=np.float32)
    params["final_norm"]["scale"][:] = 1.0
    head = params["head"]["kernel"]
    start = len(tokenizer.encode(prompt, allowed_special="none"))
    assert start + len(ids) < SCRIPT_LENGTH, "the script is longer than the context"
    head[range(start, start + len(ids)), ids] = 100.0
    head[start + len(ids) :, tokenizer.end_of_text_id] = 100.0
    return params, config


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int], prompt: str = "", num_tokens: int = 100) -> list[str]:
    """The pieces in which a script is given out."""
    params, config = scripted(tokenizer, ids, prompt)
    return list(sample_text(params, config, tokenizer, prompt, key=KEY, num_tokens=num_tokens, temperature=0.0))


@pytest.mark.parametrize("text", ["", "chat", "né", "é", "€ 😀!", "ça, là-bas", "▁▂", "\ufffdx\ufffd"])
def test_text_comes_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text
    assert all(pieces), "a piece is empty"
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_a_character_is_given_out_with_its_last_byte() -> None:
    tokenizer = bytes_alone()
    assert len(tokenizer.encode("é")) == 2
    assert pieces_of(tokenizer, tokenizer.encode("aé€b").tolist()) == ["a", "é", "€", "b"]
    tokenizer = some_characters()
    assert len(tokenizer.encode("é")) == 4
    assert pieces_of(tokenizer, tokenizer.encode("aéb").tolist()) == ["a", "é", "b"]


@pytest.mark.parametrize("seed", range(25))
def test_pieces_add_up_to_the_decoded_ids_whatever_the_ids(tokenizer: Tokenizer, seed: int) -> None:
    """Also where bytes make no character, or an escape is left open."""
    random = np.random.default_rng(seed)
    difficult = "é€😀▁▂.▂09ef\ufffd"
    likely = np.unique(np.concatenate([tokenizer.encode(character) for character in difficult]))
    ids = np.where(random.random(24) < 0.8, random.choice(likely, 24), random.integers(tokenizer.vocab_size, size=24))
    ids = ids[ids != tokenizer.end_of_text_id].tolist()
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_escape_is_given_out_when_it_is_clear_what_it_stands_for() -> None:
    """U+2582 begins an escape in SentencePiece's text: followed by a dot it becomes U+2581."""
    tokenizer = sentence_pieces()
    byte_of = {tokenizer.token_bytes(token_id): token_id for token_id in range(2, tokenizer.vocab_size)}
    escape, dot = [byte_of[bytes([byte])] for byte in "▂".encode()], byte_of[b"."]
    ids = [*escape, dot, *escape, *escape, dot, *escape]
    assert tokenizer.decode(ids) == "▁▂.▂"
    assert "".join(pieces_of(tokenizer, ids)) == "▁▂.▂"


def test_text_ends_with_end_of_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_text_id
    assert end is not None
    ids = tokenizer.encode("Le").tolist()
    assert "".join(pieces_of(tokenizer, [*ids, end, *ids])) == "Le"
    assert pieces_of(tokenizer, [end, *ids]) == []


def test_text_ends_after_its_number_of_tokens() -> None:
    tokenizer = bytes_alone()
    ids = tokenizer.encode("aéb").tolist()
    assert [pieces_of(tokenizer, ids, num_tokens=count) for count in range(6)] == [
        [],
        ["a"],
        ["a", "\ufffd"],  # cut in the middle of é, and nothing more is to come
        ["a", "é"],
        ["a", "é", "b"],
        ["a", "é", "b"],
    ]


def test_a_document_begins_with_end_of_text_and_goes_on_with_the_prompt() -> None:
    """The prompt is plain text even where it spells a special token."""
    tokenizer = bytes_alone()
    config = ModelConfig(257, SCRIPT_LENGTH, SCRIPT_LENGTH, 1, 1, 1)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0.0, 0.7, leaf.shape).astype(np.float32), abstract_params(config))
    for prompt in ("", "né", f"a{END_OF_TEXT}b"):
        start = np.array([256, *prompt.encode()], np.int32)
        ids = list(itertools.islice(generate(params, config, start, key=KEY, temperature=0.8, top_k=50), 20))
        ids = list(itertools.takewhile(lambda token_id: token_id != 256, ids))
        pieces = sample_text(params, config, tokenizer, prompt, key=KEY, num_tokens=20, temperature=0.8, top_k=50)
        assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces_of(tokenizer, [*b"lo!"], prompt="Hal")) == "lo!"


def test_a_vocabulary_without_end_of_text_has_no_beginning_of_a_document() -> None:
    tokenizer = BPETokenizer([], special_tokens=())
    with pytest.raises(InputError, match="no end-of-text token"):
        next(sample_text({}, CONFIG, tokenizer, "a", key=KEY, num_tokens=3))
