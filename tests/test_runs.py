"""The run directory: identity, logs that are cut back, and what is said when something is wrong with it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jaxlm.runs import Run, environment, read_config, read_metrics
from jaxlm.tokenizers import CharTokenizer, InputError

IDENTITY = {"corpus": "c" * 64, "model": {"width": 128, "vocab_size": 18}, "seed": 0}
TOKENIZER = CharTokenizer("0123456789abcdef")
CONFIG = {"version": 1, "identity": IDENTITY, "tokenizer_hash": "0" * 64, "environment": {"devices": ["cpu"]}}


def started(path: Path) -> Run:
    run = Run(path, IDENTITY)
    run.start(TOKENIZER, {"jax": "1"})
    run.rewind({}, 0)
    return run


def test_opening_writes_nothing(tmp_path: Path) -> None:
    assert not Run(tmp_path / "run", IDENTITY).exists
    assert not (tmp_path / "run").exists()


def test_the_same_identity_is_taken_up_again(tmp_path: Path) -> None:
    started(tmp_path / "run")
    again = Run(tmp_path / "run", dict(reversed(IDENTITY.items())))
    assert again.exists
    tokenizer = again.tokenizer()
    assert tokenizer is not None
    assert tokenizer.hash == TOKENIZER.hash


def test_another_identity_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    started(tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    other = {"corpus": "d" * 64, "model": {"width": 64, "vocab_size": 18}, "seed": 0, "batch_size": 3}
    with pytest.raises(InputError) as caught:
        Run(tmp_path / "run", other)
    message = str(caught.value)
    assert "model.width (128 there, 64 asked for)" in message
    assert "batch_size (None there, 3 asked for)" in message
    assert "corpus (cccccccccccc... there, dddddddddddd... asked for)" in message
    assert "vocab_size" not in message
    assert "seed" not in message
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_another_tokenizer_in_the_directory_is_refused(tmp_path: Path) -> None:
    started(tmp_path / "run")
    other = CharTokenizer("0123456789abcdefg")
    with pytest.raises(InputError, match=other.hash[:12]):
        Run(tmp_path / "run", IDENTITY).start(other, {"jax": "1"})


def test_a_changed_environment_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path / "run")
    Run(tmp_path / "run", IDENTITY).start(TOKENIZER, {"jax": "2"})
    assert "jax was 1 and is 2 now" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"version": 99, "identity": {}}', '{"identity": {}}', "[" * 100_000, "9" * 5_000, '"\\ud800'),
        *(json.dumps(CONFIG | change) for change in ({"identity": []}, {"environment": None}, {"tokenizer_hash": 5})),
    ],
)
def test_a_damaged_or_newer_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"damaged|newer"):
        Run(tmp_path, IDENTITY)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        Run(tmp_path / "file" / "run", IDENTITY)


def test_metrics_are_one_json_object_a_line_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.log(3, tokens=10, loss=1.25, grad_norm=math.nan, other=math.inf)
    run.close()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.count("\n") == 1
    assert json.loads(text) == {"step": 3, "tokens": 10, "loss": 1.25, "grad_norm": None, "other": None}
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_logs_are_cut_back_to_their_size_at_the_checkpoint(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.log(1, loss=1.0)
    run.log_sample(1, "été")
    sizes = run.log_sizes()
    run.log(2, loss=2.0)
    run.log_sample(2, "hiver")
    run.rewind(sizes, 1)
    assert [line["step"] for line in read_metrics(run.path)] == [1]
    assert (run.path / "samples.txt").read_text(encoding="utf-8") == "--- step 1\nété\n"
    run.log(2, loss=2.5)
    assert [line["loss"] for line in read_metrics(run.path)] == [1.0, 2.5]


def test_a_log_that_was_shortened_by_hand_is_not_filled_up(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.log(1, loss=1.0)
    run.rewind({"metrics.jsonl": 10_000}, 1)
    assert [line["step"] for line in read_metrics(run.path)] == [1]


@pytest.mark.parametrize("left", [0, 10, 25, 26, 49])
def test_a_log_that_lost_what_a_checkpoint_needs_is_refused(tmp_path: Path, left: int) -> None:
    run = started(tmp_path / "run")
    for step in (1, 2):
        run.log(step, loss=1.0)
    sizes, file = run.log_sizes(), run.path / "metrics.jsonl"
    assert sizes["metrics.jsonl"] == 50
    run.check_logs(sizes)
    run.log(3, loss=1.0)
    run.check_logs(sizes)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged; restore it"):
        run.check_logs(sizes)
    file.write_bytes(file.read_bytes().ljust(50, b"\0"))  # as a file system may leave it
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged; restore it"):
        run.check_logs(sizes)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert read_metrics(tmp_path / "nothing") == []


@pytest.mark.parametrize("line", ["", "[]", "5", "{", '{"loss": 1}', '{"step": "1"}', '{"step": 1, "loss": "low"}'])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_of_many_fields_that_differ_the_first_are_named(tmp_path: Path) -> None:
    started(tmp_path / "run")
    with pytest.raises(InputError, match=r"batch_0 \(None there, 0 asked for\), .*, and 14 more fields; choose"):
        Run(tmp_path / "run", IDENTITY | {f"batch_{number}": number for number in range(20)})


def test_a_changed_environment_is_said_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path / "run")
    Run(tmp_path / "run", IDENTITY).start(TOKENIZER, {"jax": "[/red]"})
    assert "jax was 1 and is [/red] now" in capsys.readouterr().out


def test_reading_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no run"):
        read_config(tmp_path)


def test_environment_names_devices_and_versions() -> None:
    found = environment(["cpu:0"])
    assert found["devices"] == ["cpu:0"]
    assert {"jax", "flax", "grain", "python", "cores"} <= found.keys()
