"""Intervals: what they are on known numbers, and how often they hold what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from jaxlm.evaluation import summarise
from jaxlm.reports.statistics import difference, estimate
from jaxlm.tokenizers.base import InputError

BYTES = np.array([1_000, 3_000, 500, 2_500, 8_000, 700, 1_500, 2_000])


def scores(rng: np.random.Generator, seeds: int, num_bytes: np.ndarray, mean: float = 2.0, seed_sd: float = 0.02):
    """Nats of documents: bits per byte of a mean, plus what each document and what each seed adds."""
    documents = rng.normal(0.0, 0.1, len(num_bytes))
    runs = rng.normal(0.0, seed_sd, (seeds, 1))
    return (mean + documents + runs) * num_bytes * math.log(2)


def test_the_value_is_the_mean_over_seeds_of_the_ratio() -> None:
    nats = scores(np.random.default_rng(0), 3, BYTES)
    by_hand = np.mean([run.sum() / math.log(2) / BYTES.sum() for run in nats])
    assert estimate(nats, BYTES).value == pytest.approx(by_hand)
    assert difference(nats, nats[:2], BYTES).value == pytest.approx(by_hand - estimate(nats[:2], BYTES).value)


def test_the_error_over_documents_is_near_that_of_the_ratio_formula() -> None:
    num_bytes = np.random.default_rng(1).integers(500, 5_000, 200)
    nats = scores(np.random.default_rng(2), 1, num_bytes)
    formula = summarise(nats[0], num_bytes, 1).standard_error
    found = estimate(nats, num_bytes)
    assert found.se_documents == pytest.approx(formula, rel=0.05)
    assert found.se_seeds is None
    assert not found.excludes_zero, "one seed says nothing about the chance of training"


def test_what_both_models_share_falls_out_of_a_paired_difference() -> None:
    rng = np.random.default_rng(3)
    nats = scores(rng, 4, BYTES)
    shifted = nats + 0.05 * BYTES * math.log(2)
    assert difference(shifted, nats, BYTES).se_documents == pytest.approx(0.0, abs=1e-12)
    assert estimate(nats, BYTES).se_documents > 0.01


def test_seeds_alone_give_the_interval_of_welch() -> None:
    a = np.array([[2.0], [2.1], [2.3]]) * math.log(2) * BYTES
    b = np.array([[1.9], [2.0]]) * math.log(2) * BYTES
    found = difference(a, b, BYTES)
    variances = np.var([2.0, 2.1, 2.3], ddof=1) / 3, np.var([1.9, 2.0], ddof=1) / 2
    degrees = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 1)
    assert found.se_seeds == pytest.approx(math.sqrt(sum(variances)))
    assert found.high - found.value == pytest.approx(student.ppf(0.975, degrees) * found.se_seeds)


def test_both_sources_make_the_interval_wider_than_either() -> None:
    rng = np.random.default_rng(4)
    found = estimate(scores(rng, 5, BYTES), BYTES)
    assert found.high - found.low > 2 * 1.96 * max(found.se_documents, found.se_seeds)


def test_intervals_hold_the_true_difference_about_as_often_as_they_say() -> None:
    """Two models that differ by 0.03, seeds and documents drawn anew 600 times."""
    rng = np.random.default_rng(5)
    num_bytes = rng.integers(500, 5_000, 60)
    held = 0
    for _ in range(600):
        shared = rng.normal(0.0, 0.2, 60)  # a document is hard for both
        a, b = (
            (2.0 + mean + shared + rng.normal(0.0, 0.05, 60) + rng.normal(0.0, 0.02, (4, 1))) * num_bytes * math.log(2)
            for mean in (0.03, 0.0)
        )
        found = difference(a, b, num_bytes)
        held += found.low <= 0.03 <= found.high
    assert 0.93 <= held / 600 <= 0.985


def test_few_documents_or_seeds_leave_out_what_cannot_be_known() -> None:
    alone = estimate(np.array([[100.0]]), np.array([50]))
    assert (alone.low, alone.high, alone.se_documents, alone.se_seeds) == (None, None, None, None)
    seeds = estimate(np.array([[100.0], [110.0]]), np.array([50]))
    assert seeds.se_documents is None and seeds.low is not None and not seeds.excludes_zero
    with pytest.raises(InputError, match="different documents"):
        difference(np.ones((2, 3)), np.ones((2, 4)), np.array([1, 1, 1]))
