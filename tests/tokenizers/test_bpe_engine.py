"""The engine gives what the textbook gives: on all threads, for long chunks, with a full cache, however compiled."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm import machine_code
from jaxlm.tokenizers import (
    END_OF_TEXT,
    BPETokenizer,
    InputError,
    bpe,
    bpe_merge,
    bpe_reference,
    bpe_team,
    bpe_work,
    load_tokenizer,
)
from jaxlm.tokenizers.bpe_count import ChunkCounts
from jaxlm.tokenizers.bpe_encode import _CACHED_CHUNKS, Workspace
from jaxlm.tokenizers.bpe_kernels import (
    AMOUNT_BITS,
    LENGTH_SHIFT,
    LONG,
    MANY,
    TEXT_END,
    VALUE,
    amount_at,
    chunk_place,
    replace_pair,
)
from jaxlm.tokenizers.bpe_layout import laid_out
from jaxlm.tokenizers.bpe_merge import learn
from jaxlm.tokenizers.bpe_queue import put_in_order
from jaxlm.tokenizers.bpe_reference import SPLIT_PATTERNS, Pair
from jaxlm.tokenizers.bpe_split import Splitter, make_buffer

ROOT = Path(jaxlm.__file__).parent.parent
CORPUS = [p.read_text("utf-8") for p in sorted((ROOT / "jaxlm" / "data" / "builtin").glob("*.txt"))[:6]]
TEXTS = st.lists(st.text(alphabet="ab é\n", max_size=30), max_size=12)


# ---- training


@settings(max_examples=100)
@given(texts=TEXTS, threads=st.integers(1, 3), block=st.integers(1, 40))
def test_threads_and_blocks_change_nothing(texts: list[str], threads: int, block: int) -> None:
    chunks = [chunk for text in texts for chunk in bpe_reference.split(text, SPLIT_PATTERNS["gpt4"])]
    merges = bpe_reference.train(chunks, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "_COUNTED", block)
        tokenizer = BPETokenizer.train(texts, 256 + len(merges), special_tokens=(), num_threads=threads)
    assert tokenizer.merges == merges


@settings(max_examples=150)
@given(
    words=st.lists(
        st.tuples(
            st.text(alphabet="abc", min_size=1, max_size=70), st.integers(1, 4) | st.sampled_from([126, 127, 128, 300])
        ),
        max_size=8,
    ),
    known=st.integers(256, 300),
)
def test_merges_of_runs_and_ties(words: list[tuple[str, int]], known: int) -> None:
    texts = [word for word, number in words for _ in range(number)]
    merges = bpe_reference.train(texts, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_work, "_KNOWN", known)
        tokenizer = BPETokenizer.train(texts, 256 + len(merges), split="none", special_tokens=())
    assert tokenizer.merges == merges


def test_the_highest_ids_have_room_beside_an_amount() -> None:
    left, right, new = range((1 << 24) - 3, 1 << 24)
    lengths = np.ones(1 << 24, np.int32)
    lengths[new] = 2
    for amount in (1, 126, MANY):
        symbols = np.array([left, right, right, left, right, -1], np.int32)
        symbols[:-1] = symbols[:-1] << AMOUNT_BITS | amount
        places, neighbours = np.array([0, 3], np.int32), np.zeros(4, np.int32)
        assert replace_pair(symbols, lengths, places, 0, 2, left, right, new, neighbours) == 2
        assert neighbours.tolist() == [-1, right, right, -1]
        assert (symbols >> AMOUNT_BITS).tolist() == [new, new, right, new, new, -1]
        assert [amount_at(symbols, np.array([2_000, 0, 0, 3_000, 0]), place) for place in (0, 3)] == (
            [2_000, 3_000] if amount == MANY else [amount, amount]
        )


def random_words(seed: int, number: int, letters: str) -> list[str]:
    """Words with many ties among their pairs, and with repeats."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(list(letters), size)) for size in random.integers(1, 12, number)]
    return words + words[: number // 2]


@pytest.mark.parametrize("helper", ["comes", "never comes"])
@pytest.mark.parametrize("least_shared", [1, 2, 7, 100])
@pytest.mark.parametrize("letters", ["ab", "abcdefgh", "éà€😀 ab"])
def test_two_threads_that_share_steps_merge_as_one_does(
    letters: str, least_shared: int, helper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = random_words(least_shared, 3_000, letters)
    alone = BPETokenizer.train(texts, 900, split="none", special_tokens=(), num_threads=1)
    monkeypatch.setattr(bpe_merge, "_LEAST_SHARED", least_shared)
    monkeypatch.setattr(bpe_merge, "_LEAST_HELPED", 1)
    monkeypatch.setattr(bpe_work, "_LEAST_PAIRS", 300)
    grown: list[int] = []
    with_room = bpe_work.Work.with_room
    monkeypatch.setattr(bpe_work.Work, "with_room", lambda work: grown.append(1) or with_room(work))
    if helper == "never comes":
        monkeypatch.setattr(bpe_merge, "help_merging", lambda work: None)
    shared = BPETokenizer.train(texts, 900, split="none", special_tokens=(), num_threads=2)
    assert shared.merges == alone.merges
    assert grown or letters != "abcdefgh"
    some = texts[:200]
    merges = bpe_reference.train(some, 60)
    tokenizer = BPETokenizer.train(some, 256 + len(merges), split="none", special_tokens=(), num_threads=2)
    assert tokenizer.merges == merges


@pytest.mark.parametrize("rounds", [1, 50])
def test_a_helper_comes_for_every_round_of_merges(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    help_merging = bpe_merge.help_merging
    monkeypatch.setattr(bpe_merge, "_LEAST_SHARED", 1)
    monkeypatch.setattr(bpe_merge, "_LEAST_HELPED", 1)
    monkeypatch.setattr(bpe_merge, "num_cores", lambda: 2)
    monkeypatch.setattr(bpe_merge, "help_merging", lambda work: calls.append(1) or help_merging(work))
    counts = ChunkCounts()
    texts = random_words(0, 1_000, "abcd")
    counts.add(Splitter("none", None).begin(make_buffer([text.encode() for text in texts]), texts))
    *_, (merges, merge_counts) = learn(counts, 200, rounds=rounds, num_threads=2)
    assert len(calls) == rounds * machine_code.COMPILED
    assert merges.tolist() == [list(pair) for pair in bpe_reference.train(texts, 200)]
    assert (np.diff(merge_counts) <= 0).all()


@pytest.mark.skipif(not machine_code.COMPILED, reason="a helper comes only where kernels are compiled")
def test_a_helper_does_the_share_that_is_offered() -> None:
    texts = random_words(1, 2_000, "abcdefghijklmnopqrstuvwxyz")
    counts = ChunkCounts()
    counts.add(Splitter("none", None).begin(make_buffer([text.encode() for text in texts]), texts))
    with ThreadPoolExecutor(1) as pool:
        work = laid_out(counts, 10, 1, pool)
    work = work._replace(known_counts=work.known_counts[:0])  # so that the places are looked through
    pairs = ["ab", "zz", "my"]
    ids = work.pairs[: work.state[bpe_work.PAIRS], bpe_work.PAIR].tolist()
    work.run[:3, 0] = -1
    work.run[:3, 1] = [ids.index(ord(pair[0]) << 32 | ord(pair[1])) for pair in pairs]
    work.shares[1] = 1, 3, 0
    bpe_team.open_board(work.board)
    with ThreadPoolExecutor(1) as pool:
        try:
            helper = pool.submit(bpe_merge.help_merging, work)
            work.board[bpe_team.KIND, 0] = bpe_merge._RECOUNT
            work.board[bpe_team.OFFERED, 0] = 7
            until = time.monotonic() + 60  # it may have to be compiled first
            while work.board[bpe_team.DONE, 0] != 7 and time.monotonic() < until and not helper.done():
                time.sleep(0.001)
        finally:
            bpe_team.close_board(work.board)
    assert work.board[bpe_team.DONE, 0] == 7
    occurrences = [sum(text[i : i + 2] == pair for text in texts for i in range(len(text))) for pair in pairs]
    assert work.run[:3, 0].tolist() == [-1, *occurrences[1:]]


def test_a_bucket_of_many_pairs_is_sorted_by_their_ids() -> None:
    random = np.random.default_rng(5)
    for num_ids, bits in ((256, 8), (60_000, 16), (1 << 24, 24)):
        work = bpe_work.new_work(np.full(301, -1, np.int32), np.ones(1, np.int32), 300)
        ids = random.integers(0, num_ids, (300, 2))
        work.state[[bpe_work.BUCKET, bpe_work.MERGES]] = 7, (1 << bits) - 257
        work.run[:300, 0] = 7
        work.run[:300, 1] = np.arange(300)
        work.pairs[:300, bpe_work.PAIR] = ids[:, 0] << 32 | ids[:, 1]
        put_in_order(work, 300)
        assert work.state[bpe_work.RUN_END] == 300
        assert work.run[:300, 1].tolist() == sorted(range(300), key=lambda pair: tuple(ids[pair]))


def test_counts_have_64_bits() -> None:
    counts, more = ChunkCounts(), ChunkCounts()
    splitter = Splitter("gpt4", None)
    for target, text in ((counts, "ab ab cd"), (more, "cd cd cd")):
        buffer = make_buffer([text.encode()])
        target.add(splitter.begin(buffer, [text]))
    counts.table[:, VALUE] *= np.uint64(1 << 40)
    more.table[:, VALUE] *= np.uint64(1 << 41)
    counts.update(more)
    *_, (merges, merge_counts) = learn(counts, 2)
    assert merges.tolist() == [[99, 100], [32, 256]]
    assert merge_counts.tolist() == [7 << 40, 5 << 40]


def counted(texts: list[str]) -> ChunkCounts:
    counts = ChunkCounts()
    counts.add(Splitter("none", None).begin(make_buffer([text.encode() for text in texts]), texts))
    return counts


def as_counter(counts: ChunkCounts) -> Counter[bytes]:
    found: Counter[bytes] = Counter()
    arena = counts.arena.tobytes()
    for slot, (first, second, value, place) in enumerate(counts.table.tolist()):
        length = place >> int(LENGTH_SHIFT)
        if length == LONG:
            begin = int(chunk_place(counts.table, slot))
            found[arena[begin : arena.index(TEXT_END, begin)]] += value
        elif length:
            found[(first | second << 64).to_bytes(16, "little")[:length]] += value
    return found


@pytest.mark.parametrize("longest", [16, 17, 40, 500])
def test_counts_of_parts_add_up(longest: int) -> None:
    """Also where the table or the arena of one has no room for the other's."""
    random = np.random.default_rng(longest)
    texts = ["".join(random.choice(list("abé"), size)) for size in random.integers(1, longest // 2 + 1, 9_000)]
    for cut in (0, 20, 4_500, 8_980, 9_000):
        total, other = counted(texts[:cut]), counted(texts[cut:])
        total.update(other)
        assert as_counter(total) == Counter(text.encode() for text in texts)
        assert total.size[0] == len(set(texts))
        assert total.size[2] == sum(1 + len(text.encode()) for text in set(texts))


@pytest.mark.parametrize("room", range(40))
def test_a_short_chunk_needs_no_room_among_the_long_ones(room: int) -> None:
    total = counted(["a" * ((1 << 16) - 1 - room)])
    total.update(counted(["b" * 10]))
    assert as_counter(total)[b"b" * 10] == 1


def test_the_caller_takes_the_blocks_that_no_thread_has_begun() -> None:
    done = threading.Event()

    def function(block: list[str]) -> bool:
        if block == ["first"]:
            return done.wait(20)  # the only other thread is busy until the caller has done what waits behind this
        done.set()
        return threading.current_thread() is threading.main_thread()

    assert bpe._map(function, [["first"], ["second"]], 2) == [True, True]


def test_blocks_that_are_done_are_let_go() -> None:
    class Block(list[str]):
        pass

    known: list[weakref.ref[Block]] = []
    most, done, enough = 0, 0, threading.Event()

    def blocks() -> Iterator[list[str]]:
        nonlocal most
        for index in range(100):
            block = Block([str(index)])
            known.append(weakref.ref(block))
            most = max(most, sum(reference() is not None for reference in known))
            yield block

    def function(block: list[str]) -> str:
        nonlocal done
        if block == ["0"]:
            assert enough.wait(60)  # all that comes meanwhile is done before it
        done += 1
        if done == 90:
            enough.set()
        return block[0]

    assert bpe._map(function, blocks(), 2) == list(map(str, range(100)))
    assert most <= 5


def test_a_stream_takes_memory_for_its_different_chunks_alone() -> None:
    counts = ChunkCounts()
    splitter = Splitter("gpt4", None)
    sizes = []
    for _ in range(4):
        buffer = make_buffer([text.encode() for text in CORPUS])
        counts.add(splitter.begin(buffer, CORPUS))
        sizes.append((len(counts.table), len(counts.arena), int(counts.size[0])))
    assert len(set(sizes)) == 1
    unique = Counter(chunk for text in CORPUS for chunk in bpe_reference.split(text, SPLIT_PATTERNS["gpt4"]))
    assert sizes[0][2] == len(unique)
    assert counts.table[:, VALUE].sum() == 4 * sum(unique.values())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from Linux")
@pytest.mark.parametrize("threads", [1, 2])
def test_training_on_a_stream_takes_no_memory_for_the_texts_that_are_done(threads: int) -> None:
    pages: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(120):
            if number >= 30:  # threads, blocks and tables have what they need by then
                pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
            yield "".join([CORPUS[0][number:] * (1_000_000 // len(CORPUS[0])), " fin"])

    BPETokenizer.train(texts(), 300, num_threads=threads)
    megabytes = (max(pages) - pages[0]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    assert megabytes < 40  # of the 90 or more that the texts have


def test_a_vocabulary_beyond_the_text_takes_no_memory() -> None:
    tracemalloc.start()
    with pytest.raises(InputError, match="at most 258 ids"):
        BPETokenizer.train(["ab"], 1 << 24)
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert megabytes < 100  # merges and ids would have 1,000


def test_a_vocabulary_of_too_many_ids_is_refused_before_a_text_is_read() -> None:
    def texts() -> Iterator[str]:
        pytest.fail("a text was read")
        yield ""

    with pytest.raises(InputError, match=r"highest id .* is below 16,777,216, not 16777216; use fewer"):
        BPETokenizer.train(texts(), (1 << 24) + 1)
    with pytest.raises(InputError, match=r"highest id .* not 1099511627776"):
        BPETokenizer.train(texts(), 300, special_tokens={"<a>": 1 << 40})
    for size in ("300", 300.0, None):
        with pytest.raises(InputError, match=f"size of a vocabulary is a whole number, not {size!r}"):
            BPETokenizer.train(texts(), size)  # type: ignore[arg-type]


def test_special_tokens_may_come_from_an_iterator() -> None:
    names = ["<b>", "<a>"]
    assert BPETokenizer([], special_tokens=iter(names)).special_tokens == {"<b>": 256, "<a>": 257}  # type: ignore[arg-type]
    tokenizer = BPETokenizer.train(["abab"], 259, special_tokens=iter(names))  # type: ignore[arg-type]
    assert tokenizer.special_tokens == {"<b>": 257, "<a>": 258}


def test_many_different_chunks_are_all_counted() -> None:
    words = [f"x{number:x}y{'z' * (number % 40)}" for number in range(8_000)]
    tokenizer = BPETokenizer.train(words * 2, 300, split="none", special_tokens=(), num_threads=2)
    assert tokenizer.merges == bpe_reference.train(words * 2, 44)


# ---- encoding


@st.composite
def merge_tables(draw: st.DrawFn) -> list[Pair]:
    """Merges that no text need have taught: in any order that a table can have."""
    ids = [*b"ab\xc3\xa9"]
    merges: list[Pair] = []
    for _ in range(draw(st.integers(0, 14))):
        pair = (draw(st.sampled_from(ids)), draw(st.sampled_from(ids)))
        if pair not in merges:
            merges.append(pair)
            ids.append(255 + len(merges))
    return merges


@settings(max_examples=300)
@given(merges=merge_tables(), text=st.text(alphabet="abé", min_size=40, max_size=300))
def test_long_chunks_have_the_ids_of_the_textbook(merges: list[Pair], text: str) -> None:
    tokenizer = BPETokenizer(merges, split="none")
    assert tokenizer.encode(text).tolist() == bpe_reference.encode(text, merges)


@pytest.mark.parametrize("length", [47, 48, 49, 50, 500, 3_000])
@pytest.mark.parametrize("alphabet", ["a", "ab", "abcdefgh", "é🙂a"])
def test_chunks_of_any_length_have_the_ids_of_the_textbook(length: int, alphabet: str) -> None:
    text = "".join(random.Random(length).choices(alphabet, k=length))
    merges = bpe_reference.train([text[:400]], 60)
    tokenizer = BPETokenizer(merges, split="none")
    for part in (text, text[1:], text[: length // 2]):
        assert tokenizer.encode(part).tolist() == bpe_reference.encode(part, merges)


def test_a_full_cache_changes_nothing() -> None:
    tokenizer = BPETokenizer.train(CORPUS, 600)
    letters = "abcdefghijklmnop"
    words = ["".join(word) for word in itertools.product(letters, letters, letters, letters, letters[:4])]
    chunks = [" " + word for word in words]  # more than the cache holds
    assert len(chunks) > _CACHED_CHUNKS
    ids = tokenizer.encode("".join(chunks))
    assert tokenizer.decode(ids) == "".join(chunks)
    for part in (chunks[:500], chunks[-500:], chunks[100_000:100_500]):  # some forgotten, some not
        expected = [i for chunk in part for i in bpe_reference.encode(chunk, tokenizer.merges)]
        assert tokenizer.encode("".join(part)).tolist() == expected
    assert np.array_equal(tokenizer.encode("".join(chunks)), ids)


def test_chunks_that_begin_alike_are_told_apart() -> None:
    """In tables so small that a chunk is met on the way to another one which it begins."""
    for longest in range(18, 60):
        known = range(18, longest + 1, 2)
        tokenizer = BPETokenizer([], split="none", whole={b"a" * length: 300 + length for length in known})
        for length in range(1, longest + 3):
            expected = [300 + length] if length in known else [97] * length
            assert tokenizer.encode("a" * length).tolist() == expected
    texts = ["a" * 16 + "".join(end) for length in range(9, -1, -1) for end in itertools.product("ab", repeat=length)]
    counts = ChunkCounts()
    counts.add(Splitter("none", None).begin(make_buffer([text.encode() for text in texts * 3]), texts * 3))
    assert int(counts.size[0]) == len(texts) == 1023
    assert set(counts.table[:, VALUE].tolist()) == {0, 3}


def test_many_threads_share_a_tokenizer() -> None:
    tokenizer = BPETokenizer.train(CORPUS, 700)
    expected = [ids.tolist() for ids in map(tokenizer.encode, CORPUS)]
    fresh = BPETokenizer(tokenizer.merges)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fresh.encode, CORPUS * 20))
    assert [ids.tolist() for ids in found] == expected * 20


def test_threads_with_long_chunks_share_no_room() -> None:
    texts = ["".join(random.Random(seed).choices("abcdefgh", k=100_000)) for seed in range(4)]
    tokenizer = BPETokenizer.train([texts[0][:3000]], 330, split="none")
    expected = [ids.tolist() for ids in map(tokenizer.encode, texts)]
    with ThreadPoolExecutor(4) as pool:
        assert [ids.tolist() for ids in pool.map(tokenizer.encode, texts * 10)] == expected * 10


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "texts", [[], [""], ["", "a", "", "été " * 40_000, "", "fin"], CORPUS, ["aa\xff\x00", "\n", " "]]
)
def test_a_batch_has_the_ids_of_its_texts(texts: list[str], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_BLOCK", 3_000)
    tokenizer = BPETokenizer.train(CORPUS, 500)
    batch = tokenizer.encode_batch(texts, num_threads=threads)
    ids, offsets = tokenizer.encode_batch(texts, num_threads=threads, flat=True)
    assert [part.tolist() for part in batch] == [tokenizer.encode(text).tolist() for text in texts]
    assert offsets.tolist() == [0, *np.cumsum([len(part) for part in batch]).tolist()]
    assert ids.tolist() == [i for part in batch for i in part.tolist()]
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert tokenizer.decode_batch(batch) == texts


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_less_than_one_thread_is_refused(threads: Any) -> None:
    tokenizer = BPETokenizer([])
    for use in (
        lambda: BPETokenizer.train(["ab"], 257, num_threads=threads),
        lambda: tokenizer.encode_batch(["ab"], num_threads=threads),
        lambda: list(tokenizer.encode_iter(["ab"], num_threads=threads)),
    ):
        with pytest.raises(InputError, match=f"at least 1, or None for all cores, not {threads!r}"):
            use()


def test_of_several_texts_that_are_refused_the_first_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_BLOCK", 1_000)
    monkeypatch.setattr(bpe, "_COUNTED", 1_000)
    tokenizer = BPETokenizer([(97, 98)], special_tokens=())
    for number in range(20):
        texts = ["ab " * 1_000] * number + [f"ab{chr(0xD800 + bad)}" * 400 for bad in range(6)]
        for use in (tokenizer.encode_batch, partial(BPETokenizer.train, vocab_size=257, special_tokens=())):
            with pytest.raises(InputError, match=r"U\+D800 at character 2,"):
                use(texts, num_threads=3)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("place", [0, 99, 100, 5_000, 39_999])
def test_training_names_the_place_of_a_surrogate_in_its_text(
    place: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a long text is counted in pieces."""
    monkeypatch.setattr(bpe, "_COUNTED", 100)
    long = "ab " * 13_333 + "a"
    texts = [long, "a", long[:place] + "\ud800" + long[place + 1 :], long]
    with pytest.raises(InputError, match=rf"U\+D800 at character {place},"):
        BPETokenizer.train(texts, 257, special_tokens=(), num_threads=threads)


@pytest.mark.parametrize("threads", [1, 4])
def test_of_a_text_in_pieces_the_first_that_is_refused_is_named(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_BLOCK", 5)
    tokenizer = BPETokenizer([(97, 98)], special_tokens=("<|x|>",))
    for text, message in (
        ("ab <|x|> ab ab ab \ud800", "contains the special token"),
        ("ab \ud800 ab ab ab <|x|> ab", "at character 3,"),
    ):
        with pytest.raises(InputError, match=message):
            list(tokenizer.encode_iter([text], num_threads=threads))


def test_what_is_no_stream_of_text_is_refused_before_the_first_ids_are_asked_for() -> None:
    tokenizer = BPETokenizer([])
    for nothing in (None, 5, b"ab", "ab"):
        with pytest.raises(InputError, match="iterable of texts is needed, not"):
            tokenizer.encode_iter(nothing)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_threads"):
        tokenizer.encode_iter(["ab"], num_threads=0)
    with pytest.raises(InputError, match="allowed_special is"):
        tokenizer.encode_iter(["ab"], allowed_special="any")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("place", [0, 49, 1_000, 2_099])
def test_a_text_in_pieces_has_one_count_of_characters(
    place: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe, "_BLOCK", 50)
    text = "ab cé d" * 300
    text = text[:place] + "\ud800" + text[place + 1 :]
    pieces = [text[begin : begin + 30] for begin in range(0, len(text), 30)]
    with pytest.raises(InputError, match=rf"U\+D800 at character {place},"):
        list(BPETokenizer([]).encode_iter(pieces, num_threads=threads))


def test_a_batch_is_a_list_of_texts() -> None:
    tokenizer = BPETokenizer([(97, 98)])
    for nothing in ("ab", None, 5):
        with pytest.raises(InputError, match="iterable of texts is needed, not"):
            tokenizer.encode_batch(nothing)  # type: ignore[arg-type]
    for bad, message in ((["a", "\ud800"], "lone surrogate"), (["a", b"b"], "not bytes"), ([None], "not NoneType")):
        with pytest.raises(InputError, match=message):
            tokenizer.encode_batch(bad, allowed_special="none")  # type: ignore[arg-type]


# ---- special tokens, as tiktoken treats them

SPECIAL = {"<|end|>": 300, "<|end|>\n": 301, "<|": 302, "a b": 303}


@settings(max_examples=300)
@given(
    text=st.lists(st.sampled_from([*SPECIAL, "<", "|>", "end", "a", " b", "\n", "é"]), max_size=9).map("".join),
    allowed=st.one_of(st.sampled_from(["all", "none"]), st.sets(st.sampled_from(list(SPECIAL)))),
)
def test_special_tokens_are_treated_as_tiktoken_treats_them(text: str, allowed: str | set[str]) -> None:
    tokenizer = BPETokenizer([(97, 32), (195, 169)], special_tokens=SPECIAL)
    encoding = tokenizer.to_tiktoken_encoding()
    disallowed = () if allowed == "none" else "all"
    try:
        expected = encoding.encode(
            text, allowed_special=set() if allowed == "none" else allowed, disallowed_special=disallowed
        )
    except ValueError:
        # We take the longest name where several match; tiktoken also refuses a name that is a part of an allowed one.
        if not any(name not in allowed and name in longer for longer in allowed for name in SPECIAL):
            with pytest.raises(InputError, match="contains the special token"):
                tokenizer.encode(text, allowed_special=allowed)  # type: ignore[arg-type]
        return
    ids = tokenizer.encode(text, allowed_special=allowed)  # type: ignore[arg-type]
    assert tokenizer.decode(ids) == text
    if not ("<|end|>\n" in text and allowed != "none"):  # tiktoken takes any of two that begin alike, we the longest
        assert ids.tolist() == expected
    batch = tokenizer.encode_batch([text, ""], allowed_special=allowed)  # type: ignore[arg-type]
    assert batch[0].tolist() == ids.tolist()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "texts",
    [
        ["<|end|>"],
        ["", "a<|end|>", "<|end|><|end|>\n", "été " * 2000 + "<|", "< |", "", "a b" * 99],
        [f"{text[:2000]}<|end|>{text}" for text in CORPUS],
        [*CORPUS, "<|", *CORPUS],
    ],
)
def test_a_batch_with_special_tokens_has_the_ids_of_its_texts(
    texts: list[str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = BPETokenizer([(97, 32), (195, 169)], special_tokens=SPECIAL)
    expected = [tokenizer.encode(text, allowed_special="all").tolist() for text in texts]
    monkeypatch.setattr(bpe, "_BLOCK", 1_000)
    monkeypatch.setattr(BPETokenizer, "encode", None)  # which would take one text after another
    batch = tokenizer.encode_batch(texts, allowed_special="all", num_threads=threads)
    ids, offsets = tokenizer.encode_batch(texts, allowed_special=SPECIAL, flat=True, num_threads=threads)
    assert [part.tolist() for part in batch] == expected
    assert offsets.tolist() == [0, *np.cumsum([len(part) for part in expected]).tolist()]
    assert ids.tolist() == [i for part in expected for i in part]
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert tokenizer.decode_batch(batch) == texts
    with pytest.raises(InputError, match="contains the special token"):
        tokenizer.encode_batch(texts)


def test_a_batch_with_special_tokens_names_the_place_of_a_surrogate_in_its_text() -> None:
    tokenizer = BPETokenizer([], special_tokens=SPECIAL)
    with pytest.raises(InputError, match="at character 8"):
        tokenizer.encode_batch(["<|end|>a\ud800"], allowed_special="all")


@pytest.mark.parametrize(
    ("names", "beginnings"),
    [
        ([], []),
        ([END_OF_TEXT], [END_OF_TEXT]),
        ([f"<|reserved_{number}|>" for number in range(300)], ["<|reserved_"]),
        (["<|a|>", "[B]", "<|b|>", "<s>"], ["<", "[B]"]),
        ([f"{letter}@" for letter in "abcdefghijkl"], [""]),
    ],
)
def test_many_special_tokens_are_looked_for_at_once(names: list[str], beginnings: list[str]) -> None:
    tokenizer = BPETokenizer([(32, 32)], split="none", special_tokens=names)
    assert tokenizer._special_beginnings == beginnings
    text = "x  ".join(["", *names, "y<|reserved_", "<|"])
    ids = tokenizer.encode(text, allowed_special="all")
    assert np.count_nonzero(ids > 256) == len(names)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("x  y", allowed_special="all").tolist() == [120, 256, 121]


def test_of_special_tokens_that_begin_alike_the_longest_is_taken() -> None:
    tokenizer = BPETokenizer([], special_tokens=SPECIAL)
    assert tokenizer.encode("<|end|>\n<|end|><|", allowed_special="all").tolist() == [301, 300, 302]


# ---- decoding


@given(numbers=st.lists(st.integers(0, 2**16), max_size=60))
def test_ids_decode_piece_by_piece_as_at_once(numbers: list[int]) -> None:
    tokenizer = BPETokenizer([(0xC3, 0xA9), (0xF0, 0x9F), (257, 0x98)], special_tokens=("<é>",))
    ids = [number % tokenizer.vocab_size for number in numbers]
    pieces = list(tokenizer.decode_iter(iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces)
    assert tokenizer.decode_bytes(np.array(ids, np.int32)) == tokenizer.decode_bytes(ids)
    assert tokenizer.decode_bytes(ids) == b"".join(tokenizer.token_bytes(i) for i in ids)


def test_no_half_character_is_given_out() -> None:
    tokenizer = BPETokenizer([])
    assert list(tokenizer.decode_iter("é🙂a".encode())) == ["é", "🙂", "a"]


VALID = st.text(alphabet="aé中🙂\u0301\ufffd", min_size=1, max_size=30)


@given(text=VALID, start=st.integers(0, 120), stop=st.integers(0, 120))
def test_a_slice_of_ids_shows_a_replacement_only_where_a_character_is_cut(text: str, start: int, stop: int) -> None:
    """Merges of parts of characters: the pieces hold whole ones, and U+FFFD only at the ends or where the text does."""
    merges = [(0xF0, 0x9F), (0x99, 0x82), (0xAD, 97), (0xA9, 0xE4), (0x82, 256), (0xC3, 0xA9)]
    tokenizer = BPETokenizer(merges, split="none")
    ids = tokenizer.encode(text)[start:stop].tolist()
    pieces = list(tokenizer.decode_iter(ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    inside = tokenizer.decode_bytes(ids).decode("utf-8", errors="ignore")
    assert inside in text
    for count in range(len(ids)):  # nothing that was given out changes by what comes
        assert tokenizer.decode(ids).startswith("".join(itertools.islice(tokenizer.decode_iter(ids), count)))
    if start == 0 and stop >= len(text.encode()):
        assert all("\ufffd" not in piece or piece in text for piece in pieces)
        assert "".join(pieces) == text


@given(batch=st.lists(st.lists(st.integers(0, 260), max_size=6), max_size=5), as_arrays=st.booleans())
def test_a_batch_decodes_as_each_of_it_even_where_it_ends_inside_a_character(
    batch: list[list[int]], as_arrays: bool
) -> None:
    tokenizer = BPETokenizer([(0xC3, 0xA9), (0xF0, 0x9F), (257, 0x98)], special_tokens=("<é>", "\n"))
    given_batch = [np.array(ids, np.int32) for ids in batch] if as_arrays else batch
    assert tokenizer.decode_batch(given_batch) == [tokenizer.decode(ids) for ids in batch]
    assert tokenizer.decode_batch(iter([[0xC3], *batch, [0xA9]])) == tokenizer.decode_batch([[0xC3], *batch, [0xA9]])


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint16])
def test_ids_may_be_of_any_integer_type_and_read_only(dtype: type) -> None:
    tokenizer = BPETokenizer([(97, 98)], special_tokens={"<a>": 300})
    ids = np.array([97, 98, 200], dtype)
    ids.flags.writeable = False
    assert tokenizer.decode_bytes(ids[::-1]) == b"\xc8ba"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([301], "301 is outside"),
        (np.array([5, -1], np.int32), "-1 is outside"),
        (np.array([5, 301], np.int32), "301 is outside"),
        (np.array([5, 280], np.int32), "280 stands for nothing"),
        ([280], "280 stands for nothing"),
        (np.array([[5]], np.int32), "1-D"),
        (np.array([5.0]), "integers"),
    ],
)
def test_ids_that_are_none_are_refused(ids: object, message: str) -> None:
    tokenizer = BPETokenizer([(97, 98)], special_tokens={"<a>": 300})
    for use in (tokenizer.decode, tokenizer.decode_bytes, lambda bad: tokenizer.decode_batch([[97], bad])):
        with pytest.raises(InputError, match=message):
            use(ids)  # type: ignore[arg-type, operator]


@pytest.mark.parametrize(("bad", "message"), [(-1, "-1 is outside"), (301, "301 is outside"), (280, "280 stands for")])
def test_an_id_that_is_none_is_refused_when_it_comes(bad: int, message: str) -> None:
    tokenizer = BPETokenizer([(97, 98)], special_tokens={"<a>": 300})
    pieces = tokenizer.decode_iter([97, 300, bad])
    assert [next(pieces), next(pieces)] == ["a", "<a>"]
    with pytest.raises(InputError, match=message):
        next(pieces)
    with pytest.raises(InputError, match=message):
        tokenizer.token_bytes(bad)


# ---- what else is in an imported vocabulary


def test_ids_of_their_own_and_whole_chunks(tmp_path: Path) -> None:
    order = [*range(255, -1, -1), 900, 901]
    tokenizer = BPETokenizer(
        [(97, 98), (256, 99)], ids=order, whole={b"chat": 700, b" quatre-vingt-dix-neuf": 701, b" " * 70: 702}
    )
    assert tokenizer.encode("abcab").tolist() == [901, 900]
    assert tokenizer.encode("a chat").tolist() == [255 - byte for byte in b"a chat"]  # a part of a chunk is no chunk
    assert tokenizer.encode("chat").tolist() == [700]
    assert tokenizer.encode(" " * 70).tolist() == [702]
    assert tokenizer.decode([901, 702, 700]) == "abc" + " " * 70 + "chat"
    assert tokenizer.special_tokens == {"<|endoftext|>": 902}
    assert tokenizer.byte_lengths([901, 902, 702]).tolist() == [3, 0, 70]
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.hash == tokenizer.hash
    assert loaded.encode("abc chat").tolist() == tokenizer.encode("abc chat").tolist()


def test_one_id_for_two_tokens_is_refused() -> None:
    for arguments in ({"ids": [0] * 256}, {"ids": range(10)}, {"whole": {b"ab": 5}}, {"ids": [-1, *range(255)]}):
        with pytest.raises(InputError, match="one id of its own"):
            BPETokenizer([], **arguments)  # type: ignore[arg-type]


def test_ids_and_chunks_that_cannot_be_are_refused() -> None:
    for arguments in ({"ids": [*range(255), 2**31]}, {"special_tokens": {"<a>": 2**40}}, {"whole": {b"a b": 2**24}}):
        with pytest.raises(InputError, match="highest id"):
            BPETokenizer([], **arguments)  # type: ignore[arg-type]
    for whole in ({b"": 300}, {"ab": 300}, {b"ab": 300.0}, {b"ab": "300"}):
        with pytest.raises(InputError, match="A whole chunk is at least one byte and has an id, not"):
            BPETokenizer([], whole=whole)  # type: ignore[arg-type]
    for ids in (["a"] * 256, [0.5, *range(1, 256)], 5):
        with pytest.raises(InputError, match="sequence of whole numbers"):
            BPETokenizer([], ids=ids)  # type: ignore[arg-type]


def test_an_explanation_shows_each_merge() -> None:
    from rich.console import Console

    tokenizer = BPETokenizer([(0xC3, 0xA9), (256, 116), (257, 256)])
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(tokenizer.explain("été x"))
    text = console.export_text()
    for row in ("5 bytes", "\\xc3 + \\xa9", "é + t", "ét + é", "été", "258", "·x"):
        assert row in text


def test_an_explanation_shows_what_rich_would_take_for_markup() -> None:
    from rich.console import Console

    merges = [(91, 47), (256, 93), (58, 115), (258, 109)]  # "[/", "[/]", ":s", ":sm"
    tokenizer = BPETokenizer(merges, split="none", whole={b"[red]": 300})
    console = Console(record=True, width=150, file=io.StringIO())
    for text in ("[/]", "[sic]", ":smile:", "[red]"):
        console.print(tokenizer.explain(text))
    text = console.export_text()
    for row in ("[/ + ]", "[│s│i│c│]", ":s + m", ":sm│i│l│e│:", ":smile:", "a token as a whole"):
        assert row in text
    assert text.count("[red]") == 2


# ---- compilation

USE = """
import sys
import jaxlm, jaxlm.tokenizers
assert "numba" not in sys.modules
from jaxlm.tokenizers import BPETokenizer
tokenizer = BPETokenizer.train(["l'été, les hirondelles reviennent " * 3] * 2, 270, num_threads=2)
text = "l'été\\n\\n12345 hirondelles ☃中文 \U0001d49c🙂\u3000" + "é" * 60
ids = tokenizer.encode(text)
assert tokenizer.decode(ids) == text
print(tokenizer.merges, ids.tolist(), tokenizer.chunks(text))
"""


USE_LITTLE = """
from jaxlm.tokenizers import BPETokenizer
print(BPETokenizer([]).decode(list("été".encode())))
"""


def start(root: Path = ROOT, use: str = USE, **environment: str) -> subprocess.Popen[str]:
    settings_of_its_own = {**os.environ, "PYTHONIOENCODING": "utf-8", **environment, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", use],
        cwd=root,
        env=settings_of_its_own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def test_compiled_and_not_compiled_are_the_same() -> None:
    compiled, plain = start(), start(NUMBA_DISABLE_JIT="1")
    answer, errors = plain.communicate(timeout=300)
    assert answer.startswith("[(") and errors == ""
    assert compiled.communicate(timeout=300)[0] == answer


def test_compiled_twice_at_once_and_once_again(tmp_path: Path) -> None:
    """Two processes that compile into one folder, and a third that finds what they left."""
    notice = "compiling kernels"

    def start_here() -> subprocess.Popen[str]:
        return start(use=USE_LITTLE, NUMBA_CACHE_DIR=str(tmp_path))

    at_once = [start_here() for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in at_once]
    assert all(errors.count(notice) == 1 and len(errors.splitlines()) == 1 for _, errors in answers)
    whole = start_here().communicate(timeout=300)
    assert {output for output, _ in answers} == {"été\n"} == {whole[0]}
    assert whole[1] == ""
    # Files that were cut short are compiled anew, once: an index, and the code that one names.
    for kind in ("nbi", "nbc"):
        path = next(tmp_path.rglob(f"bpe_decode.*.{kind}"))
        path.write_bytes(path.read_bytes()[:100])
        mended, whole = (start_here().communicate(timeout=300) for _ in range(2))
        assert mended[0] == whole[0] == "été\n"
        assert mended[1].count(notice) == 1 and len(mended[1].splitlines()) == 1
        assert whole[1] == ""


def test_kernels_of_other_versions_are_removed_once_unused_for_a_month(tmp_path: Path) -> None:
    folders = [tmp_path / "kernels" / name for name in ("0123456789abcdef", "fedcba9876543210", "of_somebody_else")]
    for folder, days in zip(folders, (31, 29, 31), strict=True):
        folder.mkdir(parents=True)
        (folder / "file").touch()
        os.utime(folder, (time.time() - days * 86400,) * 2)
    command = "import jaxlm.tokenizers.bpe_kernels"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)})
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_a_function_of_no_module_may_be_compiled_beside_the_engine() -> None:
    import numba

    namespace: dict[str, Any] = {}
    exec("def double(x): return 2 * x", {"__builtins__": {}}, namespace)
    assert namespace["double"].__module__ is None
    assert numba.njit(namespace["double"])(21) == 42


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    """Neither where it belongs, nor at home, nor beside the sources, where numba would look next."""
    shutil.copytree(ROOT / "jaxlm", tmp_path / "jaxlm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "jaxlm" / "tokenizers" / "__pycache__").touch()
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "below")
    environment = {"NUMBA_CACHE_DIR": nowhere, "HOME": nowhere, "XDG_CACHE_HOME": nowhere}
    process = start(tmp_path, USE_LITTLE, **environment, PYTHONDONTWRITEBYTECODE="1")
    output, errors = process.communicate(timeout=300)
    assert output == "été\n", errors
    assert errors.count("compiling kernels") == 1 and len(errors.splitlines()) == 1


# ---- whole chunks that are long, or that no text can hold


def test_a_long_whole_chunk_leaves_nothing_behind_for_the_next_long_chunk() -> None:
    merges = [(97, 97), (0, 256), (98, 98)]
    tokenizer = BPETokenizer(merges, split="none", whole={b" " * 40_000: 700})
    assert tokenizer.encode(" " * 40_000).tolist() == [700]
    assert tokenizer.encode("a" * 52).tolist() == bpe_reference.encode("a" * 52, merges)
    assert tokenizer.encode("\x00" + "a" * 52).tolist() == bpe_reference.encode("\x00" + "a" * 52, merges)


def test_the_room_for_long_chunks_ends_where_no_symbol_is() -> None:
    room = Workspace(300)
    for length in (0, 50, 100_000):
        room.make_room(length)
        assert room.symbols[-1] == -1


def test_a_whole_chunk_that_is_no_text_is_never_met() -> None:
    whole = {b"x" * 20 + b"\xff" + bytes([byte]): 700 + byte for byte in range(200)}
    tokenizer = BPETokenizer([], split="none", whole=whole)
    assert tokenizer.encode("x" * 20).tolist() == [120] * 20
    assert tokenizer.decode_bytes([700]) == b"x" * 20 + b"\xff\x00"


# ---- arguments of another kind


def test_a_batch_may_be_any_iterable() -> None:
    tokenizer = BPETokenizer([(97, 98)])
    assert [ids.tolist() for ids in tokenizer.encode_batch(text for text in ("ab", "b"))] == [[256], [98]]


def test_an_unknown_word_for_special_tokens_is_refused_without_any_in_the_text() -> None:
    with pytest.raises(InputError, match="not 'bogus'"):
        BPETokenizer([]).encode_batch(["a"], allowed_special="bogus")  # type: ignore[arg-type]


def test_pieces_that_are_no_text_are_refused() -> None:
    with pytest.raises(InputError, match="not bytes"):
        list(BPETokenizer([]).encode_iter([b"a"]))  # type: ignore[list-item]


def test_ragged_ids_and_ids_that_are_no_whole_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="1-D sequence of integers"):
        BPETokenizer([]).decode([[1], [2, 3]])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"id 300\.5; an id is a whole number"):
        BPETokenizer([], special_tokens={"a": 300.5})  # type: ignore[dict-item]
    assert BPETokenizer([], special_tokens={"a": np.int64(300)}).special_tokens == {"a": 300}  # type: ignore[dict-item]
    assert type(BPETokenizer([], whole={b"ab": np.int64(300)}).whole[b"ab"]) is int  # type: ignore[dict-item]
