"""The textbook algorithm on examples that were worked out by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jaxlm.tokenizers import bpe_reference
from jaxlm.tokenizers.bpe_reference import count_pairs, encode, merge, train

A, B, C = 97, 98, 99


def test_overlapping_pairs_are_counted() -> None:
    assert count_pairs([([A, A, A], 1)]) == {(A, A): 2}
    assert count_pairs([([A, B, A], 5), ([A, B], 1), ([C], 9), ([], 9)]) == {(A, B): 6, (B, A): 5}


def test_merging_goes_from_left_to_right() -> None:
    assert merge([A, A, A], (A, A), 256) == [256, A]
    assert merge([A, A, A, A, A], (A, A), 256) == [256, 256, A]
    assert merge([B, A, B, A, B], (A, B), 256) == [B, 256, 256]
    assert merge([A], (A, A), 256) == [A]
    assert merge([], (A, A), 256) == []


def test_a_merge_takes_no_result_of_its_own() -> None:
    """What a merge makes is looked at by the next merge only."""
    assert merge([A, A, A, A], (A, A), A) == [A, A]


def test_the_text_of_the_encyclopedia() -> None:
    # aaabdaaabac: "aa" occurs four times, then "ab" and "Za" twice each, and "ab" is lower.
    assert train(["aaabdaaabac"], 3) == [(A, A), (A, B), (256, 257)]
    assert encode("aaabdaaabac", [(A, A), (A, B), (256, 257)]) == [258, ord("d"), 258, A, C]


def test_overlapping_occurrences_decide() -> None:
    assert train(["ccc", "ab"], 1) == [(C, C)]  # twice in "ccc", though only one merge fits


def test_among_equals_the_lowest_pair_is_taken() -> None:
    assert train(["ba", "ab"], 2) == [(A, B), (B, A)]  # the left id first
    assert train(["ac", "ab"], 2) == [(A, B), (A, C)]  # then the right id
    assert train(["\xff", "ab"], 1) == [(A, B)]  # 97 98 before 195 191
    assert train(["abab", "cc", "cc"], 2) == [(A, B), (C, C)]  # an id of a byte before that of a merge


def test_the_number_of_a_chunk_counts() -> None:
    assert train(["ab", "bc", "bc"], 1) == [(B, C)]


def test_training_ends_where_no_pair_is_left() -> None:
    assert train(["aaa"], 9) == [(A, A), (256, A)]
    assert train(["a", "b", ""], 9) == []
    assert train([], 9) == []
    assert train(["ab"], 0) == []


def test_a_merge_stays_inside_its_chunk() -> None:
    assert train(["a", "b", "a", "b", "bc"], 9) == [(B, C)]


def test_what_was_learned_first_is_merged_first() -> None:
    assert encode("abc", [(B, C), (A, B)]) == [A, 256]
    assert encode("abc", [(A, B), (B, C)]) == [256, C]
    assert encode("aaa", [(A, A)]) == [256, A]
    assert encode("aaaa", [(A, A), (256, 256)]) == [257]
    assert encode("é", []) == [0xC3, 0xA9]
    assert encode("", [(A, A)]) == []


@given(chunks=st.lists(st.text(alphabet="abé"), max_size=4), num_merges=st.integers(0, 20))
def test_encoding_the_training_text_repeats_its_merges(chunks: list[str], num_merges: int) -> None:
    merges = train(chunks, num_merges)
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    for chunk in chunks:
        ids = list(chunk.encode())
        for index, pair in enumerate(merges):
            ids = merge(ids, pair, 256 + index)
        assert encode(chunk, merges) == ids
        assert b"".join(tokens[token_id] for token_id in ids) == chunk.encode()


@given(chunks=st.lists(st.text(alphabet="abé"), max_size=4), num_merges=st.integers(0, 20))
def test_fewer_merges_are_the_beginning_of_more(chunks: list[str], num_merges: int) -> None:
    assert train(chunks, num_merges) == bpe_reference.train(chunks, 1000)[:num_merges]
