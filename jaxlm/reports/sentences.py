"""The sentences of a comparison's report, made from its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.reports.quantities import count, digits, power
from jaxlm.reports.quantities import size as bytes_in_words


def answer(
    arms: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]], budget: Mapping[str, Any]
) -> str:
    """What the comparison shows, in two sentences."""
    if not arms:
        return "No arm was trained to its end. There is nothing to compare yet."
    if len(arms) == 1:
        only = arms[0]
        return f"{only['name']} scores {only['bits_per_byte']:.3f} bits per byte. No other arm was trained to its end."
    first = arms[0]
    best = min(arms, key=lambda arm: arm["bits_per_byte"])
    other = min(arms[1:], key=lambda arm: arm["bits_per_byte"]) if best is first else first
    found = between(best["name"], other["name"], differences)
    after = f"For the same {budget_in_words(budget)},"
    scores = f"{best['bits_per_byte']:.3f} bits per byte and {other['name']} {other['bits_per_byte']:.3f}"
    if found["verdict"] == "a lower":
        opening = f"{after} {best['name']} predicts the held-out text better than {other['name']}: "
        opening += f"{scores}, {_less(found)}."
    else:
        opening = f"{after} no difference between {best['name']} and {other['name']} is shown: {scores}, {_less(found)}"
        opening += "." if found["verdict"] == "no difference shown" else f", and {_WHY[found['verdict']]}."
    by_loss = min(arms, key=lambda arm: arm["loss"])
    if round(by_loss["loss"], 3) < round(best["loss"], 3) and by_loss["bytes_per_token"] < best["bytes_per_token"]:
        second = (
            f"Loss per token would have put {by_loss['name']} first ({by_loss['loss']:.3f} nats against "
            f"{best['loss']:.3f}), since its tokens hold less text: {by_loss['bytes_per_token']:.2f} bytes against "
            f"{best['bytes_per_token']:.2f}."
        )
    else:
        second = "It holds for these models, this text and this budget, and says nothing of longer training."
    return f"{opening} {second}"


def between(a: str, b: str, differences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The difference of a minus b, whichever way round it was computed."""
    found = next(entry for entry in differences if {entry["a"], entry["b"]} == {a, b})
    if found["a"] == a:
        return dict(found)
    turned = {"a lower": "b lower", "b lower": "a lower"}
    low, high = found["low"], found["high"]
    return {
        **found,
        "a": a,
        "b": b,
        "difference": -found["difference"],
        "low": None if high is None else -high,
        "high": None if low is None else -low,
        "seeds": found["seeds"][::-1],
        "verdict": turned.get(found["verdict"], found["verdict"]),
    }


def _less(found: Mapping[str, Any]) -> str:
    """A difference with its interval, in words."""
    text = f"a difference of {_signed(found['difference'])}"
    if found["low"] is None:
        return text
    seeds = min(found["seeds"])
    over = f"{seeds} seeds each" if seeds > 1 else "documents alone"
    return f"{text} (95 % interval {_signed(found['low'])} to {_signed(found['high'])}, {over})"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


_WHY = {
    "one seed: not judged": "one seed says nothing about the chance of training",
    "one document: not judged": "one held-out document says little about others",
}


def budget_in_words(budget: Mapping[str, Any]) -> str:
    """As "16.8 MB of source text"."""
    size = float(budget["size"])
    if budget["unit"] == "seconds":
        return f"{digits(size)} {'second' if size == 1 else 'seconds'} of training"
    if budget["unit"] == "bytes":
        return f"{bytes_in_words(size)} of source text"
    return f"{count(size)} tokens" if budget["unit"] == "tokens" else f"{power(size)} FLOPs of training"


def claims(arms: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The three conclusions of the notebooks that this began with, looked at with these numbers."""
    if len(arms) < 2:
        return []
    first = arms[0]
    # Models of one size, if there are: what another size does is no matter of the tokenizer.
    others = [arm for arm in arms[1:] if arm["size"] == first["size"]] or arms[1:]
    largest = max(others, key=lambda arm: arm["vocab_size"])
    found = between(largest["name"], first["name"], differences)
    growth = largest["parameters"] / first["parameters"] - 1
    times = largest["bytes_per_token"] / first["bytes_per_token"]
    shares = [arm["embedding_parameters"] / arm["parameters"] for arm in (first, largest)]
    judged = {
        "a lower": f"That is an improvement: {largest['name']} needs fewer bits for the same text",
        "b lower": f"That is worse, not better: {largest['name']} needs more bits for the same text",
        "no difference shown": "So no difference is shown",
    }.get(found["verdict"]) or f"That is no verdict: {_WHY[found['verdict']]}"
    units = "are in different units" if abs(times - 1) > 1e-3 else "are in one unit here"
    grown = (
        f"From {first['vocab_size']:,} to {largest['vocab_size']:,} ids it goes from {first['parameters']:,} to "
        f"{largest['parameters']:,} parameters ({growth:+.1%}); embedding and head hold {shares[0]:.1%} of the first "
        f"model and {shares[1]:.1%} of the second."
    )
    if first["vocab_size"] == largest["vocab_size"]:
        grown = f"All arms have {first['vocab_size']:,} ids here, so the vocabulary makes none larger."
    return [
        {
            "claim": "The model grows with the vocabulary.",
            "finding": grown,
            "columns": ["arm", "ids", "parameters", "in embedding and head", "share"],
            "rows": [
                [
                    arm["name"],
                    f"{arm['vocab_size']:,}",
                    f"{arm['parameters']:,}",
                    f"{arm['embedding_parameters']:,}",
                    f"{arm['embedding_parameters'] / arm['parameters']:.1%}",
                ]
                for arm in arms
            ],
        },
        {
            "claim": "The same number of tokens covers more text.",
            "finding": (
                f"A token of {largest['name']} holds {largest['bytes_per_token']:.2f} bytes of the held-out text and "
                f"one of {first['name']} {first['bytes_per_token']:.2f}, so {times:.2f} times as many. A window of "
                f"{largest['context']:,} tokens of {largest['name']} covers {largest['context_bytes']:,.0f} bytes, one "
                f"of {first['context']:,} tokens of {first['name']} {first['context_bytes']:,.0f}."
            ),
            "columns": ["arm", "bytes per token", "context (tokens)", "context (bytes)", "updates"],
            "rows": [
                [
                    arm["name"],
                    f"{arm['bytes_per_token']:.3f}",
                    f"{arm['context']:,}",
                    f"{arm['context_bytes']:,.0f}",
                    f"{arm['updates']:,}",
                ]
                for arm in arms
            ],
        },
        {
            "claim": "There is no significant improvement in quality.",
            "finding": (
                f"The losses, {first['loss']:.3f} and {largest['loss']:.3f} nats per token, {units}. "
                f"In bits per byte {first['name']} scores {first['bits_per_byte']:.3f} and {largest['name']} "
                f"{largest['bits_per_byte']:.3f}, {_less(found)}. {judged}."
            ),
            "columns": ["arm", "nats per token", "bits per byte", f"minus {first['name']}", "95 % interval", "verdict"],
            "rows": [
                [
                    arm["name"],
                    f"{arm['loss']:.3f}",
                    f"{arm['bits_per_byte']:.4f}",
                    *_against(arm["name"], first["name"], differences),
                ]
                for arm in arms
            ],
        },
    ]


def _against(name: str, first: str, differences: Sequence[Mapping[str, Any]]) -> list[str]:
    if name == first:
        return ["", "", ""]
    found = between(name, first, differences)
    interval = "" if found["low"] is None else f"{_signed(found['low'])} to {_signed(found['high'])}"
    verdict = {"a lower": "better", "b lower": "worse"}.get(found["verdict"], found["verdict"])
    return [_signed(found["difference"]), interval, verdict]
