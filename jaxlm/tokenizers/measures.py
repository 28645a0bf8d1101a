"""What a tokenizer does to texts, in numbers that need no model: how long tokens are, and where they cut words.

None of them says how well a model will do: that is bits per byte. They say what a tokenizer is like, and each stands in
`MEASURES` with its definition and its source. Texts of one's own choice are measured, best those that the tokenizer was
not trained on. What looks like a special token in them is plain text, and end-of-text is not added.

In this file a *word* is a maximal run of letters and combining marks, `[\\p{L}\\p{M}]+` of Unicode 16.0.0, so that
"aujourd'hui" is two. A token *touches* a word when it stands for at least one byte of it. An escape sequence (for a
character that a vocabulary lacks) is several tokens, and all of them touch what the character touches.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import numpy.typing as npt

from jaxlm.tokenizers.base import IdArray, InputError, Tokenizer, blocks_of, check_texts

ALPHA = 2.5  # the order of the Rényi entropy that went best with translation quality in Zouhar et al. (2023)
STEM = 3  # characters that a word has before its suffix, at least
SUFFIXES = (
    *("ation", "tion", "ment", "aient", "ique", "eur", "euse"),
    *("able", "isme", "iste", "ité", "age", "ance", "ence"),
)
_BLOCK = 1 << 20  # characters that are measured together
_ENDINGS = tuple(sorted({*SUFFIXES, *(f"{suffix}s" for suffix in SUFFIXES if suffix != "aient")}, key=len))

Places = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Measure:
    """One measure, as a report explains it.

    Attributes:
      key: its name in what `measure` returns.
      label: a few words for the head of a column.
      unit: what the figure counts; empty for a share.
      definition: one paragraph.
      source: the paper that it is from, or that it is nearest to.
      format: how Python formats a value.
    """

    key: str
    label: str
    unit: str
    definition: str
    source: str
    format: str


_RUST = 'Rust et al. 2021, "How Good is Your Tokenizer?"'
_SHANNON = 'Shannon 1948, "A Mathematical Theory of Communication"'
_PROJECT = "a count of this project's"

MEASURES: tuple[Measure, ...] = (
    Measure(
        "bytes_per_token",
        "bytes per token",
        "bytes",
        "UTF-8 bytes of the texts per token: how much text a context of so many tokens holds.",
        'Gallé 2019, "Investigating the Effectiveness of BPE: The Power of Shorter Sequences"',
        ".3f",
    ),
    Measure(
        "fertility",
        "tokens per word",
        "tokens",
        "The mean number of tokens that touch a word, a word being a run of letters and combining marks. A token that "
        "touches two words counts for both; one that touches none (spaces, digits, punctuation) counts for none.",
        f'Ács 2019, "Exploring BERT\'s Vocabulary"; {_RUST}',
        ".3f",
    ),
    Measure(
        "words_kept_whole",
        "words kept whole",
        "",
        "The share of words that one token covers, alone or with what is beside them (a space before, punctuation), "
        "but with no letter of another word.",
        f"{_RUST}, whose proportion of continued words is nearly the rest",
        ".1%",
    ),
    Measure(
        "suffix_boundaries",
        "cut before the suffix",
        "",
        "Among the words with a French suffix that are not kept whole, the share with a boundary of tokens right "
        f"before the suffix. The suffixes are {', '.join(f'-{suffix}' for suffix in SUFFIXES)} and their plurals in "
        f"-s; the longest that fits counts, and at least {STEM} characters come before it. This is a rule about "
        'spelling, not a morphological analysis: it takes the -ment of "comment" for a suffix too. Read it beside its '
        "chance level.",
        f'{_PROJECT}; nearest: Bostrom and Durrett 2020, "Byte Pair Encoding is Suboptimal for Language Model '
        'Pretraining", with a gold segmentation',
        ".1%",
    ),
    Measure(
        "suffix_boundaries_by_chance",
        "the same by chance",
        "",
        "What the share of words cut before the suffix would be if the suffix began anywhere: among the same words, "
        "the mean share of the places between two characters of a word that are boundaries of tokens.",
        _PROJECT,
        ".1%",
    ),
    Measure(
        "suffix_words_kept_whole",
        "words with a suffix kept whole",
        "",
        "The share of words kept whole among those with a French suffix. They have no boundary inside, so that the two "
        "shares of boundaries are about the rest, which differs between tokenizers.",
        _PROJECT,
        ".1%",
    ),
    Measure(
        "vocabulary_used",
        "vocabulary used",
        "",
        "The share of ids, special tokens aside, that occur in the texts. It grows with the size of the texts.",
        _PROJECT,
        ".1%",
    ),
    Measure(
        "single_byte_tokens",
        "tokens of one byte",
        "",
        "The share of tokens in the texts that stand for exactly one byte.",
        _PROJECT,
        ".1%",
    ),
    Measure(
        "entropy",
        "entropy of tokens",
        "bits per token",
        "The entropy of the frequencies of tokens in these texts: what a token costs when each is predicted from its "
        "frequency alone. It is too low for texts that are short beside the vocabulary.",
        _SHANNON,
        ".3f",
    ),
    Measure(
        "renyi_efficiency",
        "Rényi efficiency",
        "",
        f"The Rényi entropy of order {ALPHA} of the frequencies of tokens, over the logarithm of the number of ids, "
        "special tokens aside, whether they occur or not. It is 1 if all are equally frequent, and low if a few make "
        "up much of the text.",
        'Zouhar et al. 2023, "Tokenization and the Noiseless Channel"; their program divides by the number of tokens '
        "that occur unless it is given another",
        ".3f",
    ),
    Measure(
        "unigram_bits_per_byte",
        "unigram bits per byte",
        "bits per byte",
        "What the frequencies of tokens alone explain: the bits per byte of a model that predicts each token from its "
        "frequency in these very texts, which is the entropy divided by the bytes per token.",
        _SHANNON,
        ".3f",
    ),
)


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, float]:
    """The value of each of `MEASURES` on texts, in their order.

    A value is NaN where the texts have nothing to take it from: no words, none with a suffix, or none of those cut.

    Raises:
      InputError: no texts, or empty ones only; what no tokenizer encodes.
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    sums: Counter[str] = Counter()
    chance = 0.0
    for block in blocks_of(check_texts(texts), _BLOCK):
        ids, _ = cast("tuple[IdArray, Places]", tokenizer.encode_batch(block, allowed_special="none", flat=True))
        lengths = tokenizer.byte_lengths(ids)
        counts += np.bincount(ids, minlength=len(counts))
        sums.update(bytes=int(lengths.sum()), single=int((lengths == 1).sum()))
        words, block_chance = _measure_words(tokenizer, block, ids, lengths)
        sums.update(words)
        chance += block_chance
    if not counts.any():
        raise InputError("There is no text to measure a tokenizer on; give at least one text that isn't empty.")
    vocabulary_ids = list(_ordinary(tokenizer))
    tokens = int(counts.sum())
    frequencies = counts[counts > 0] / tokens
    entropy = float(frequencies @ np.log2(1 / frequencies))
    renyi_entropy = math.log2(1 / np.sum(frequencies**ALPHA)) / (ALPHA - 1)
    values = {
        "bytes_per_token": sums["bytes"] / tokens,
        "fertility": _ratio(sums["touching"], sums["words"]),
        "words_kept_whole": _ratio(sums["whole"], sums["words"]),
        "suffix_boundaries": _ratio(sums["before_suffix"], sums["cut"]),
        "suffix_boundaries_by_chance": _ratio(chance, sums["cut"]),
        "suffix_words_kept_whole": _ratio(sums["suffix"] - sums["cut"], sums["suffix"]),
        "vocabulary_used": np.count_nonzero(counts[vocabulary_ids]) / len(vocabulary_ids),
        "single_byte_tokens": sums["single"] / tokens,
        "entropy": entropy,
        "renyi_efficiency": renyi_entropy / math.log2(len(vocabulary_ids)),
        "unigram_bits_per_byte": entropy / (sums["bytes"] / tokens),
    }
    return {each.key: float(values[each.key]) for each in MEASURES}


def boundaries(tokenizer: Tokenizer, text: str) -> Places:
    """Where in the UTF-8 of a text its tokens end: int64 offsets in bytes, one a token, the last the size of the text.

    A token that stands for no bytes, such as the opening of an escape sequence, ends where the one before it does.
    """
    return np.cumsum(tokenizer.byte_lengths(tokenizer.encode(text, allowed_special="none")), dtype=np.int64)


def vocabulary(tokenizer: Tokenizer) -> set[bytes]:
    """The bytes of all tokens, without special tokens and an escape that stands for none."""
    return set(_ordinary(tokenizer).values()) - {b""}


def longest_tokens(tokenizer: Tokenizer, count: int = 12) -> list[bytes]:
    """The `count` different tokens of the most bytes, special tokens aside, the lowest id first among equals."""
    tokens = sorted(_ordinary(tokenizer).values(), key=len, reverse=True)  # stable, and ids come in order
    return list(itertools.islice(dict.fromkeys(filter(None, tokens)), count))


def overlap(tokenizers: Mapping[str, Tokenizer]) -> list[list[float]]:
    """A row and a column for each tokenizer: the share of the row's `vocabulary` that the column's has too."""
    vocabularies = [vocabulary(tokenizer) for tokenizer in tokenizers.values()]
    return [[len(row & column) / len(row) for column in vocabularies] for row in vocabularies]


def _ordinary(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Ids that stand for something, with their bytes, special tokens aside.

    SentencePiece's unknown piece, which never occurs, is among them as U+FFFD.
    """
    tokens = {}
    for token_id in range(tokenizer.vocab_size):
        with contextlib.suppress(InputError):  # an id in a gap of an imported vocabulary
            tokens[token_id] = tokenizer.token_bytes(token_id)
    specials = set(tokenizer.special_tokens.values())
    return {token_id: token for token_id, token in tokens.items() if token_id not in specials}


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


# ---- words


def _measure_words(
    tokenizer: Tokenizer, texts: list[str], ids: IdArray, lengths: IdArray
) -> tuple[dict[str, int], float]:
    """What `measure` adds up about words, and the sum over cut words with a suffix of their share of boundaries.

    Texts lie one after another, characters, bytes and tokens alike, and no word goes from one into the next.
    """
    joined = "".join(texts)
    code_points = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    begin, end = _words(code_points, np.cumsum([len(text) for text in texts]))
    utf8 = np.frombuffer(joined.encode(), np.uint8)
    byte_of = np.append(np.flatnonzero(utf8 & 0xC0 != 0x80), len(utf8))  # where each character begins, and the end

    spelling = lengths[lengths > 0]
    token_of = np.repeat(np.arange(len(spelling)), spelling)  # of each byte
    first, last = token_of[byte_of[begin]], token_of[byte_of[end] - 1]
    tokens_before = _sums_before(_tokens_for_each(tokenizer, ids, lengths))
    touching = tokens_before[last + 1] - tokens_before[first]
    whole = touching == 1
    with_next = last[:-1] == first[1:]  # one token touches both
    whole[1:] &= ~with_next
    whole[:-1] &= ~with_next

    suffix = _suffix_lengths(code_points, begin, end)
    cut = (suffix > 0) & ~whole
    ends_here = np.zeros(len(utf8) + 1, bool)
    ends_here[np.cumsum(lengths, dtype=np.int64)] = True
    is_boundary = ends_here[byte_of]
    boundaries_before = _sums_before(is_boundary)
    begin, end, place = begin[cut], end[cut], (end - suffix)[cut]
    inside = boundaries_before[end] - boundaries_before[begin + 1]
    sums = {
        "words": len(whole),
        "touching": int(touching.sum()),
        "whole": int(whole.sum()),
        "suffix": int((suffix > 0).sum()),
        "cut": int(cut.sum()),
        "before_suffix": int(is_boundary[place].sum()),
    }
    return sums, float((inside / (end - begin - 1)).sum())


def _words(code_points: npt.NDArray[np.uint32], text_ends: Places) -> tuple[Places, Places]:
    """Where the words of texts begin and end, in characters."""
    letter = _letters()[code_points]
    begins, ends = letter.copy(), letter.copy()
    begins[1:] &= ~letter[:-1]
    ends[:-1] &= ~letter[1:]
    between = text_ends[(text_ends > 0) & (text_ends < len(letter))]
    begins[between] = letter[between]
    ends[between - 1] = letter[between - 1]
    return np.flatnonzero(begins), np.flatnonzero(ends) + 1


@cache
def _letters() -> Marks:
    """Whether each code point is a letter or a mark."""
    from jaxlm.tokenizers.bpe_scan import LETTER, LOWER, MARK, UPPER, character_classes  # they bring numba

    return (character_classes() & (UPPER | LOWER | LETTER | MARK)) > 0


def _suffix_lengths(code_points: npt.NDArray[np.uint32], begin: Places, end: Places) -> Places:
    """The length in characters of each word's longest suffix, in upper or lower case; 0 for a word without one."""
    found = np.zeros(len(begin), np.int64)
    for suffix in _ENDINGS:  # a longer one comes later
        words = np.flatnonzero(end - begin >= len(suffix) + STEM)
        for distance, letter in enumerate(reversed(suffix), start=1):
            last = code_points[end[words] - distance]
            words = words[(last == ord(letter)) | (last == ord(letter.upper()))]
        found[words] = len(suffix)
    return found


def _tokens_for_each(tokenizer: Tokenizer, ids: IdArray, lengths: IdArray) -> Places:
    """For each token that stands for bytes, how many there are for these bytes: itself and others of its escape.

    The bytes of an escape sequence may count on its last token or on its first. Which of the two is seen from what
    those without bytes begin with: an escape that shows as nothing opens a sequence.
    """
    without = lengths == 0
    owner = np.cumsum(~without) - 1  # the last token with bytes up to here
    if without.any():
        begins = without.copy()
        begins[1:] &= ~without[:-1]
        opening = [token_id for token_id in set(ids[begins].tolist()) if not tokenizer.token_bytes(token_id)]
        run = np.cumsum(begins) - 1
        owner[without] += np.isin(ids[begins], opening)[run[without]]
    return np.bincount(owner)


def _sums_before(values: npt.NDArray[np.generic]) -> Places:
    """Sums of all values before each place, and of all: one more than values."""
    return np.append(0, np.cumsum(values, dtype=np.int64))
