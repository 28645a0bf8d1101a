"""Batch i is a function of the tokens, the seed and i, whoever computes it; an epoch visits each window once."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.batches import Windows, make_batches
from jaxlm.data.shards import TokenStream
from jaxlm.tokenizers.base import InputError

ROOT = Path(__file__).parents[2]


def make_stream(length: int, shard_tokens: int = 1000) -> TokenStream:
    """Tokens 0, 1, 2, ..., so that a window says itself where it is from."""
    tokens = np.arange(length, dtype=np.uint16)
    shards = tuple(np.split(tokens, range(shard_tokens, length, shard_tokens)))
    return TokenStream(shards, np.array([length]), np.array([length - 1]))


def epoch_of(stream: TokenStream, context: int, seed: int, epoch: int) -> list[npt.NDArray[np.int32]]:
    """The windows of one epoch in the order in which batches visit them."""
    count = len(Windows(stream, context, seed))
    single = make_batches(stream, context=context, batch_size=1, seed=seed)
    return [single[epoch * count + index][0] for index in range(count)]


def starts_of(stream: TokenStream, context: int, seed: int, epoch: int) -> list[int]:
    return [int(window[0]) for window in epoch_of(stream, context, seed, epoch)]


# ---- the same whoever computes it


@pytest.mark.parametrize("start", [0, 1, 17])
@pytest.mark.parametrize(
    "options",
    [None, (0, 0), (1, 1), (1, 4), (8, 16)],
    ids=["default", "no thread", "one thread", "one thread ahead", "many threads"],
)
def test_the_iterator_gives_what_the_index_gives(start: int, options: tuple[int, int] | None) -> None:
    batches = make_batches(make_stream(500), context=8, batch_size=5, seed=3)
    read = grain.ReadOptions(*options) if options else None
    found = list(batches[start:40].to_iter_dataset(read))
    assert len(found) == 40 - start
    for index, batch in enumerate(found, start=start):
        np.testing.assert_array_equal(batch, batches[index])


def test_it_goes_on_without_end_and_in_any_order() -> None:
    batches = make_batches(make_stream(100), context=8, batch_size=3, seed=0)
    forwards = [batches[index] for index in range(30)]
    for index in reversed(range(30)):
        np.testing.assert_array_equal(batches[index], forwards[index])
    again = make_batches(make_stream(100), context=8, batch_size=3, seed=0)
    np.testing.assert_array_equal(again[123_456_789], batches[123_456_789])
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
    for batch, expected in zip(itertools.islice(iterator, 30), forwards, strict=True):
        np.testing.assert_array_equal(batch, expected)


def test_the_cut_into_shards_makes_no_difference() -> None:
    for index in (0, 5, 60):
        one, several = (
            make_batches(make_stream(500, size), context=8, batch_size=4, seed=1)[index] for size in (1000, 37)
        )
        np.testing.assert_array_equal(one, several)


def test_another_process_computes_the_same_batches() -> None:
    program = """
import hashlib, sys
import numpy as np
from jaxlm.data.batches import make_batches
from jaxlm.data.shards import TokenStream
tokens = np.arange(500, dtype=np.uint16)
batches = make_batches(TokenStream((tokens,), np.array([500]), np.array([499])), context=8, batch_size=5, seed=11)
print(hashlib.sha256(b"".join(batches[index].tobytes() for index in range(40))).hexdigest())
"""
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    batches = make_batches(make_stream(500), context=8, batch_size=5, seed=11)
    here = hashlib.sha256(b"".join(batches[index].tobytes() for index in range(40))).hexdigest()
    assert process.stdout.split() == [here]


def test_the_first_batches_of_a_seed_stay_what_they_are() -> None:
    """A run can be resumed by a later version only if the order stays. A change here breaks every run that is saved."""
    batches = make_batches(make_stream(500), context=8, batch_size=6, seed=0)
    found = [batches[index][:, 0].tolist() for index in (0, 1, 100)]
    assert found == [
        [175, 303, 255, 119, 79, 375],
        [231, 55, 415, 335, 295, 127],
        [237, 477, 157, 181, 341, 213],
    ], f"the order of the windows has changed: it is now {found}"


# ---- windows


def test_shape_and_type() -> None:
    for context, batch_size in ((2, 1), (8, 5), (31, 64)):
        batch = make_batches(make_stream(500), context=context, batch_size=batch_size, seed=0)[2]
        assert isinstance(batch, np.ndarray)
        assert batch.shape == (batch_size, context + 1)
        assert batch.dtype == np.int32


@settings(max_examples=60)
@given(context=st.integers(1, 20), extra=st.integers(1, 200), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_visits_each_window_once(context: int, extra: int, seed: int, epoch: int) -> None:
    length = context + extra
    windows = epoch_of(make_stream(length), context, seed, epoch)
    for window in windows:
        assert window.tolist() == list(range(window[0], window[0] + context + 1)), "a window is no slice of the tokens"
    starts = sorted(int(window[0]) for window in windows)
    offset = starts[0]
    assert 0 <= offset < context
    assert starts == [offset + index * context for index in range(len(windows))]
    assert starts[-1] + context < length
    # Nothing more would have fitted for every offset, so nothing is left out but the ends.
    assert len(windows) == max(1, (length - context) // context)


def test_every_offset_below_the_context_comes_up() -> None:
    windows = Windows(make_stream(200), context=8, seed=0)
    offsets = [windows.offset(epoch) for epoch in range(300)]
    counts = np.bincount(offsets, minlength=8)
    assert len(counts) == 8
    assert counts.min() > 15, "some offset is far rarer than 300 / 8"
    assert [windows[epoch * len(windows)][0] for epoch in range(300)] == offsets


def test_epochs_differ_in_their_offsets_and_in_their_order() -> None:
    stream = make_stream(2000, shard_tokens=5000)
    orders, offsets = set(), set()
    for epoch in range(6):
        starts = starts_of(stream, 20, 0, epoch)
        offset = min(starts)
        order = tuple((start - offset) // 20 for start in starts)
        assert order != tuple(sorted(order)), "an epoch isn't shuffled"
        orders.add(order)
        offsets.add(offset)
    assert len(orders) == 6
    assert len(offsets) > 3


def test_batches_run_on_from_one_epoch_into_the_next() -> None:
    stream = make_stream(100)
    count = len(Windows(stream, 8, 0))
    assert count % 5
    batches = make_batches(stream, context=8, batch_size=5, seed=0)
    rows = np.concatenate([batches[index] for index in range(3 * count)])  # fifteen epochs
    single = [window for epoch in range(15) for window in epoch_of(stream, 8, 0, epoch)]
    np.testing.assert_array_equal(rows, single)


def test_seeds_and_epochs_have_nothing_in_common() -> None:
    """Neither the order nor the offset of an epoch comes back in a neighbouring seed."""
    stream = make_stream(3000, shard_tokens=5000)
    orders: dict[tuple[int, ...], tuple[int, int]] = {}
    offsets = np.array([[Windows(stream, 50, seed).offset(epoch) for epoch in range(40)] for seed in range(12)])
    for seed in range(6):
        for epoch in range(4):
            starts = starts_of(stream, 50, seed, epoch)
            order = tuple((start - min(starts)) // 50 for start in starts)
            assert order not in orders, f"seed {seed} epoch {epoch} is in the order of seed and epoch {orders[order]}"
            orders[order] = seed, epoch
    for shift in (0, 1, 2):
        same = [(offsets[seed, shift:] == offsets[seed + 1, : 40 - shift]).mean() for seed in range(len(offsets) - 1)]
        assert np.mean(same) < 0.08, "offsets agree far more often than once in 50"


def test_seeds_beyond_32_bits_are_seeds_of_their_own() -> None:
    stream = make_stream(500)
    first = [make_batches(stream, context=8, batch_size=8, seed=seed)[0].tolist() for seed in (0, 2**32 - 1, 2**32)]
    assert len({str(batch) for batch in first}) == 3


@settings(max_examples=25, deadline=None)
@given(
    st.integers(30, 400), st.integers(2, 29), st.integers(1, 70), st.integers(0, 2**40), st.integers(1, 60),
    st.integers(0, 1000),
)  # fmt: skip
def test_batches_are_those_of_a_chain_of_datasets(
    length: int, context: int, batch_size: int, seed: int, shard_tokens: int, index: int
) -> None:
    """Within a shard and across several, within an epoch and across several."""
    stream = make_stream(length, shard_tokens)
    windows = Windows(stream, context, seed)
    order = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
    chain = windows.shuffle(seed=order).repeat(100_000).batch(batch_size)
    batches = make_batches(stream, context=context, batch_size=batch_size, seed=seed)
    np.testing.assert_array_equal(batches[index], chain[index])
    assert batches[index].dtype == np.int32
    start = windows.offset(0)
    np.testing.assert_array_equal(windows[0], np.arange(start, start + context + 1))


# ---- what is refused


@pytest.mark.parametrize("context", [2, 3, 8])
def test_the_smallest_text_is_one_window(context: int) -> None:
    batches = make_batches(make_stream(context + 1), context=context, batch_size=2, seed=0)
    for index in (0, 1, 99):
        assert batches[index].tolist() == [list(range(context + 1))] * 2
    with pytest.raises(InputError) as caught:
        make_batches(make_stream(context), context=context, batch_size=2, seed=0)
    message = str(caught.value)
    assert f"has {context} tokens" in message
    assert f"context {context} needs {context + 1};" in message


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(batch_size: int) -> None:
    with pytest.raises(InputError, match=f"batch size is at least 1, not {batch_size}"):
        make_batches(make_stream(100), context=8, batch_size=batch_size, seed=0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seed is at least 0, not -1"):
        make_batches(make_stream(100), context=8, batch_size=2, seed=-1)


def test_a_batch_of_one_can_be_sliced() -> None:
    batches = make_batches(make_stream(100), context=8, batch_size=1, seed=0)
    for index, batch in enumerate(batches[0:3]):
        np.testing.assert_array_equal(batch, batches[index])
