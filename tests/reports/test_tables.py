"""Tables say what is in the data."""

from __future__ import annotations

import io

import jax.numpy as jnp
from rich.console import Console, RenderableType

from jaxlm.reports.tables import arms_table, deviation, parameter_table, rows_table, token_text
from jaxlm.tokenizers.base import visible


def rendered(table: RenderableType) -> str:
    output = io.StringIO()
    Console(file=output, width=160).print(table)
    return output.getvalue()


def test_parameters_add_up() -> None:
    text = rendered(parameter_table({"a": {"kernel": jnp.zeros((3, 5))}, "b": jnp.zeros(7)}))
    assert "a/kernel" in text
    assert "3 × 5" in text
    assert "22" in text.splitlines()[-2]


def test_a_comparison_has_a_row_an_arm() -> None:
    done = {
        "name": "char[98]", "status": "done", "vocab_size": 98, "parameters": 453_986, "bytes_per_token": 1.0273,
        "updates": 600, "learning_rate": 3e-4,
        "muon_learning_rate": None, "loss": 1.5, "bits_per_byte": 2.1234, "low": 2.1, "high": 2.15,
        "tokens": 1_000_000, "seconds": 50.0,
    }  # fmt: skip
    alone = {
        **done,
        "name": "bpe",
        "muon_learning_rate": 0.014,
        "seconds": 0.0,
        "low": None,
        "high": None,
        "bits_per_byte": 2.5,
    }
    failed = {"name": "bytes", "status": "failed", "vocab_size": 257}
    text = rendered(arms_table({"budget": {"unit": "bytes"}, "arms": [done, alone, failed]}))
    assert "equal bytes" in text
    for shown in ("char[98]", "453,986", "0.0003", "2.1234 ± 0.0250", "20,000", "2.5000  ", "failed"):
        assert shown in text
    assert "failed" in rendered(arms_table({"budget": {"unit": "bytes"}, "arms": [failed]}))


def test_the_error_of_a_single_document_is_a_dash() -> None:
    assert deviation({"final/bits_per_byte_se": 0.01234}) == "0.0123"
    assert deviation({"final/bits_per_byte_se": None}) == "-"


def test_tokens_show_what_cannot_be_seen() -> None:
    tokens = [b" le", b"\n", b"\xc3", "é".encode(), b""]
    assert [visible(token) for token in tokens] == ["·le", "⏎", "\\xc3", "é", "◇"]
    coloured = token_text(tokens)
    assert coloured.plain == "·le⏎\\xc3é◇"
    assert len({span.style for span in coloured.spans}) == 5
    assert token_text(tokens, colour=False).plain == "·le|⏎|\\xc3|é|◇"


def test_rows_line_up() -> None:
    lines = rendered(rows_table(("name", "value"), [("a", "1"), ("bcd", "1,000")], "title")).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1


def test_rows_are_shown_as_they_are() -> None:
    assert "[/]" in rendered(rows_table(("name", "longest"), [("a", "[/] [bold]:smile:")]))
    assert "[bold]:smile:" in rendered(rows_table(("name", "longest"), [("a", "[/] [bold]:smile:")]))


def test_nothing_in_a_table_of_rows_is_markup() -> None:
    text = rendered(rows_table(("[/]", "[bold]b"), [("[red]c", "[/red]")], "[link=x]title"))
    for shown in ("[/]", "[bold]b", "[red]c", "[/red]", "[link=x]title"):
        assert shown in text
