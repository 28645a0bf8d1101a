"""The report's sentences say what its numbers say, whichever way these fall."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from jaxlm.reports.sentences import answer, between, budget_in_words, claims

BUDGET = {"unit": "bytes", "size": 16_800_000.0}


def arm(name: str, score: float, loss: float, bytes_per_token: float, vocab_size: int = 98) -> dict[str, Any]:
    return {
        "name": name, "bits_per_byte": score, "loss": loss, "bytes_per_token": bytes_per_token,
        "vocab_size": vocab_size, "parameters": 400_000 + 257 * vocab_size, "embedding_parameters": 257 * vocab_size,
        "size": "2x128", "context": 256, "context_bytes": 256 * bytes_per_token, "updates": 1_000,
    }  # fmt: skip


def difference(a: dict[str, Any], b: dict[str, Any], half: float | None, seeds: int = 3) -> dict[str, Any]:
    value = a["bits_per_byte"] - b["bits_per_byte"]
    verdict = "one seed: not judged"
    if half is not None and seeds > 1:
        verdict = "no difference shown" if abs(value) <= half else "a lower" if value < 0 else "b lower"
    return {
        "a": a["name"], "b": b["name"], "difference": value, "low": None if half is None else value - half,
        "high": None if half is None else value + half, "se_documents": 0.01, "se_seeds": 0.01, "seeds": [seeds, seeds],
        "verdict": verdict,
    }  # fmt: skip


def differences(arms: list[dict[str, Any]], half: float | None, seeds: int = 3) -> list[dict[str, Any]]:
    return [difference(a, b, half, seeds) for a, b in itertools.combinations(arms, 2)]


CHAR, BPE = arm("char", 2.6, 1.9, 1.03), arm("bpe", 2.3, 3.2, 2.05, 500)


def test_a_difference_that_is_shown_is_called_one_with_its_interval() -> None:
    text = answer([CHAR, BPE], differences([CHAR, BPE], 0.05), BUDGET)
    assert text.startswith(
        "For the same 16.8 MB of source text, bpe predicts the held-out text better than char: 2.300 bits per byte and "
        "char 2.600, a difference of −0.300 (95 % interval −0.350 to −0.250, 3 seeds each). "
    )
    assert text.endswith(
        "Loss per token would have put char first (1.900 nats against 3.200), since its tokens hold less text: 1.03 "
        "bytes against 2.05."
    )


def test_a_difference_that_is_not_shown_is_not_called_one() -> None:
    text = answer([CHAR, BPE], differences([CHAR, BPE], 0.31), BUDGET)
    assert "no difference between bpe and char is shown: 2.300 bits per byte and char 2.600" in text
    assert "better" not in text
    one = answer([CHAR, BPE], differences([CHAR, BPE], 0.01, seeds=1), BUDGET)
    assert "no difference between bpe and char is shown" in one
    assert "documents alone), and one seed says nothing about the chance of training." in one


def test_the_first_arm_can_be_the_best_and_losses_can_agree() -> None:
    best = arm("char", 2.1, 1.5, 1.03)
    text = answer([best, BPE], differences([best, BPE], 0.01), BUDGET)
    assert "char predicts the held-out text better than bpe" in text
    assert "Loss per token" not in text and text.count(". ") == 1


def test_losses_of_ten_and_more_are_compared_as_numbers() -> None:
    arms = [arm("char", 2.6, 9.8, 1.03), arm("bpe", 2.3, 10.2, 2.05, 500)]
    text = answer(arms, differences(arms, 0.05), BUDGET)
    assert "Loss per token would have put char first (9.800 nats against 10.200)" in text


def test_a_larger_token_with_a_lower_loss_is_not_said_to_hold_less_text() -> None:
    other = arm("odd", 2.5, 1.0, 3.0, 500)
    text = answer([BPE, other], differences([BPE, other], 0.01), BUDGET)
    assert "hold less text" not in text


def test_nothing_and_one_arm() -> None:
    assert "nothing to compare" in answer([], [], BUDGET)
    assert "No other arm was trained to its end" in answer([CHAR], [], BUDGET)
    assert claims([CHAR], []) == []


def test_between_turns_a_difference_round() -> None:
    (found,) = differences([CHAR, BPE], 0.05)
    turned = between("bpe", "char", [found])
    assert (turned["difference"], turned["low"], turned["high"]) == pytest.approx((-0.3, -0.35, -0.25))
    assert (found["verdict"], turned["verdict"]) == ("b lower", "a lower")
    assert between("char", "bpe", [found]) == found


@pytest.mark.parametrize(
    ("unit", "size", "words"),
    [
        ("bytes", 16_800_000, "16.8 MB of source text"),
        ("bytes", 950, "950 B of source text"),
        ("bytes", 999_700, "1,000 kB of source text"),
        ("tokens", 2_000_000, "2 M tokens"),
        ("tokens", 500, "500 tokens"),
        ("flops", 3.2e15, "3.20 × 10¹⁵ FLOPs of training"),
        ("seconds", 90, "90 seconds of training"),
        ("seconds", 1, "1 second of training"),
        ("seconds", 0.2, "0.2 seconds of training"),
    ],
)
def test_budgets_in_words(unit: str, size: float, words: str) -> None:
    assert budget_in_words({"unit": unit, "size": size}) == words


def test_the_claims_hold_the_numbers() -> None:
    grown, covers, quality = claims([CHAR, BPE], differences([CHAR, BPE], 0.05))
    assert "From 98 to 500 ids it goes from 425,186 to 528,500 parameters (+24.3%)" in grown["finding"]
    assert "5.9% of the first model and 24.3% of the second" in grown["finding"]
    assert "so 1.99 times as many" in covers["finding"]
    assert "That is an improvement: bpe needs fewer bits for the same text." in quality["finding"]
    assert quality["rows"][1][-1] == "better"
    for claim in (grown, covers, quality):
        assert all(len(row) == len(claim["columns"]) for row in claim["rows"])
    worse = arm("bpe", 2.9, 3.2, 2.05, 500)
    assert "That is worse" in claims([CHAR, worse], differences([CHAR, worse], 0.05))[2]["finding"]
    assert "no difference is shown" in claims([CHAR, worse], differences([CHAR, worse], 0.5))[2]["finding"]


def test_claims_compare_models_of_one_size_and_say_what_cannot_be_said() -> None:
    wide = {**arm("bpe-4x256", 2.0, 3.0, 2.05, 500), "size": "4x256"}
    arms = [CHAR, wide, BPE]
    assert "bpe 2.300" in claims(arms, differences(arms, 0.05))[2]["finding"]
    same = {**wide, "vocab_size": 98, "bytes_per_token": 1.03}
    grown, _, quality = claims([CHAR, same], differences([CHAR, same], 0.05))
    assert grown["finding"] == "All arms have 98 ids here, so the vocabulary makes none larger."
    assert "are in one unit here" in quality["finding"]
    one = claims([CHAR, BPE], differences([CHAR, BPE], 0.05, seeds=1))[2]["finding"]
    assert one.endswith("That is no verdict: one seed says nothing about the chance of training.")
