"""Flags and presets; and bad input: one sentence, exit status 2, no traceback, nothing written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import bpe_lm, bpe_tokenizer, char_lm, compare_tokenizers
from experiments.command_line import parse, program
from jaxlm.loop import RunFailed, RunInterrupted
from jaxlm.tokenizers import InputError

MODULES = {
    "char_lm": char_lm,
    "bpe_lm": bpe_lm,
    "bpe_tokenizer": bpe_tokenizer,
    "compare_tokenizers": compare_tokenizers,
}
TINY = "--width 16 --num-heads 2 --num-layers 1 --context 16 --steps 2".split()
TEXT = "\n\n".join(f"Le chat numéro {i} dort sur le toit rouge de la maison {i % 7}, près du puits." for i in range(40))


def call(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *flags: str) -> int:
    """The exit status of `python -m experiments.MODULE FLAGS`."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *flags])
    with pytest.raises(SystemExit) as caught:
        program(module.__name__, module.PRESETS, module.main)
    return int(caught.value.code or 0)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls an experiment with bad input, and gives the sentence with which it is refused."""

    def refuse(name: str, *flags: str) -> str:
        workdir = tmp_path / "workdir"
        status = call(monkeypatch, MODULES[name], "--workdir", str(workdir), *flags)
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        sentence = "\n".join(line for line in lines if not line.startswith("jaxlm: compiling"))  # not the first time
        assert status == 2, sentence
        assert "\n" not in sentence, sentence
        assert "Traceback" not in captured.err + captured.out
        assert sentence.endswith((".", "--help.")), sentence
        assert not workdir.exists(), "something was written"
        return sentence

    return refuse


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "corpus.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "corpus.txt")


# ---- flags and presets


def test_the_preset_is_the_default_that_other_flags_override() -> None:
    quick = parse([], char_lm.PRESETS, "x")
    seed = parse(["--preset", "seed"], char_lm.PRESETS, "x")
    changed = parse(["--steps", "7", "--preset=seed", "--width", "64"], char_lm.PRESETS, "x")
    assert quick == char_lm.PRESETS["quick"]
    assert seed == char_lm.PRESETS["seed"]
    assert (changed.training.steps, changed.model.width) == (7, 64)
    assert changed.training.optimizer == seed.training.optimizer


@pytest.mark.parametrize(("module", "vocab_size"), [(char_lm, 98), (bpe_lm, 500)])
def test_the_seed_preset_is_the_recipe_of_the_notebooks(module: ModuleType, vocab_size: int) -> None:
    seed = module.PRESETS["seed"]
    model, training, optimizer = seed.model, seed.training, seed.training.optimizer
    assert (model.vocab_size, model.width, model.num_layers, model.num_heads) == (vocab_size, 128, 2, 4)
    assert (model.context, model.feed_forward_width, model.dropout) == (256, 512, 0.2)
    assert (training.batch_size, optimizer.learning_rate, optimizer.schedule) == (64, 3e-4, "constant")
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.999, 0.01)
    assert (optimizer.clip_norm, optimizer.warmup_steps, optimizer.decay) == (None, 0, "all")


@pytest.mark.parametrize("name", MODULES)
def test_help_lists_the_shared_flags(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, MODULES[name], "--help") == 0
    text = capsys.readouterr().out
    for flag in ("--workdir", "--corpus", "--seed", "--steps", "--preset"):
        assert flag in text


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (RunFailed("The run diverged."), 1, "The run diverged."),
        (RunInterrupted("Interrupted after step 3, which is saved."), 130, "python -m experiments.char_lm --seed 3"),
        (KeyboardInterrupt(), 130, "python -m experiments.char_lm --seed 3"),
        (PermissionError(13, "Permission denied", "runs/x"), 2, "runs/x can't be used: Permission denied"),
        (OSError(28, "No space left on device", "metrics.jsonl"), 1, "No space left on device (metrics.jsonl)"),
        (InputError("Bad."), 2, "Bad."),
    ],
)
def test_exit_status(
    error: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["char_lm", "--seed", "3"])
    with pytest.raises(SystemExit) as caught:
        program("experiments.char_lm", char_lm.PRESETS, fail)
    assert caught.value.code == status
    assert words in capsys.readouterr().err


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(sys, "argv", ["char_lm"])
    with pytest.raises(ValueError, match="a bug"):
        program("experiments.char_lm", char_lm.PRESETS, fail)


# ---- bad input


@pytest.mark.parametrize("name", MODULES)
def test_unknown_preset_flag_and_value(name: str, refused: Callable[..., str]) -> None:
    assert "no preset 'huge'" in refused(name, "--preset", "huge")
    assert "--colour" in refused(name, "--colour", "red")
    assert "--seed" in refused(name, "--seed", "many")


def test_missing_and_empty_corpus(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nothing.txt" in refused("char_lm", "--corpus", str(tmp_path / "nothing.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "holds no text" in refused("char_lm", "--corpus", str(tmp_path / "empty.txt"))
    assert "--corpus-bytes" in refused("char_lm", "--corpus-bytes", "x")
    assert "at least 1" in refused("char_lm", "--corpus-bytes", "0")


def test_a_single_document_cannot_be_held_out(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("Un seul document.")
    assert "single document" in refused("char_lm", "--corpus", str(tmp_path / "one.txt"))


def test_corpus_shorter_than_one_window(refused: Callable[..., str], corpus: str) -> None:
    sentence = refused("char_lm", "--corpus", corpus, "--vocab-size", "20", "--context", "100000")
    assert "needs 100001" in sentence


def test_file_that_is_not_utf8(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("bon\n\nété".encode("latin-1"))
    sentence = refused("bpe_tokenizer", "--corpus", str(tmp_path / "latin.txt"))
    assert "latin.txt" in sentence
    assert "offset 5" in sentence


def test_parquet_without_text(refused: Callable[..., str], tmp_path: Path) -> None:
    pq.write_table(pa.table({"titre": ["a"], "corps": ["b"]}), tmp_path / "a.parquet")
    assert "titre, corps" in refused("char_lm", "--corpus", str(tmp_path / "a.parquet"))


def test_vocabulary_too_small_or_too_large(refused: Callable[..., str], corpus: str) -> None:
    assert "at least 18 ids" in refused("char_lm", "--corpus", corpus, "--vocab-size", "17")
    assert "at most" in refused("char_lm", "--corpus", corpus, "--vocab-size", "3000")
    assert "at least 257 ids" in refused("bpe_lm", "--corpus", corpus, "--vocab-size", "200")
    assert "at most" in refused("bpe_lm", "--corpus", corpus, "--vocab-size", "30000")
    assert "at most" in refused("bpe_tokenizer", "--corpus", corpus, "--steps", "30000")
    assert "SentencePiece" in refused(
        "compare_tokenizers", "--corpus", corpus, "--tokenizers", "sentencepiece-bpe", "--vocab-sizes", "270"
    )


def test_sizes_that_do_not_divide_or_make_no_sense(refused: Callable[..., str]) -> None:
    assert "5 heads" in refused("char_lm", "--num-heads", "5")
    assert "context" in refused("char_lm", "--context", "1")
    assert "batch_size is from 1 to 2147483647" in refused("char_lm", "--batch-size", "0")
    assert "batch_size is from 1 to 2147483647" in refused("compare_tokenizers", "--batch-size", "0")
    assert "steps" in refused("char_lm", "--steps", "0")
    assert "warm-up" in refused("char_lm", "--steps", "3", "--warmup-steps", "3")
    assert "learning rate" in refused("char_lm", "--learning-rate", "nan")
    assert "dropout" in refused("char_lm", "--dropout", "nan")
    assert "seed" in refused("char_lm", "--seed", "-1").lower()


def test_options_that_exclude_each_other(refused: Callable[..., str], corpus: str) -> None:
    def refuse(flags: str) -> str:
        return refused("char_lm", "--corpus", corpus, *flags.split())

    assert "heads of width 3 are odd" in refuse("--positions rope --width 12 --num-heads 4")
    assert "window is from 1 to its context of 16, not 17" in refuse("--context 16 --window 17")
    assert "4 heads don't divide among 3" in refuse("--num-heads 4 --num-kv-heads 3")
    assert "no shorter than the run" in refuse("--steps 5 --warmup-steps 5")
    assert "learning rate is a positive float32 number, not -1.0" in refuse("--learning-rate -1")
    assert "muon learning rate is a positive float32 number, not 0.0" in refuse("--muon-learning-rate 0")
    assert "decay share" in refuse("--decay-share nan")
    assert "cudnn attention needs a GPU" in refuse("--attention cudnn --vocab-size 30 --context 16")


def test_a_comparison_that_makes_no_sense(refused: Callable[..., str], corpus: str) -> None:
    def refuse(flags: str) -> str:
        return refused("compare_tokenizers", "--corpus", corpus, *flags.split())

    assert "'words' is no tokenizer; there are bytes, char" in refuse("--tokenizers words")
    assert "two arms char-30" in refuse("--tokenizers char char --characters 30")
    assert "There is no arm" in refuse("--tokenizers")
    assert "number of seeds" in refuse("--seeds 0")
    assert "add --budget-size" in refuse("--budget seconds")
    for size in ("0", "-1", "nan", "inf"):
        assert "size of the budget" in refuse(f"--budget-size {size}")
    assert "layers x width, as 2x128, not '2'" in refuse("--sizes 2")
    assert "width 30 doesn't divide into 4 heads" in refuse("--sizes 2x30 --characters 30 --vocab-size 310")
    assert "positive numbers" in refuse("--rate-factors 1 -2")
    assert "stands twice" in refuse("--rate-factors 1 1")
    assert "share of the budget" in refuse("--rate-share 1.5")
    assert "at least one id" in refuse("--vocab-sizes 300 0")
    assert "At least one run" in refuse("--together 0")


def test_unknown_split(refused: Callable[..., str], corpus: str) -> None:
    assert "no split 'gpt5'" in refused("bpe_lm", "--corpus", corpus, "--split", "gpt5")
    assert "no split 'gpt5'" in refused("bpe_tokenizer", "--corpus", corpus, "--split", "gpt5")


def test_a_later_arm_of_the_comparison_is_checked_before_the_first_is_trained(
    refused: Callable[..., str], corpus: str
) -> None:
    # Characters give a window of this size, the fewer tokens of the others do not.
    flags = "--characters 30 --vocab-size 310 --context 2000 --context-unit tokens".split()
    assert "one window of context 2000" in refused("compare_tokenizers", "--corpus", corpus, *flags)


def test_workdir_name_that_is_too_long(refused: Callable[..., str]) -> None:
    assert "too long" in refused("char_lm", "--workdir", "x" * 300)


def test_workdir_that_holds_something_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--corpus", corpus, "--sentences", "0"]
    assert call(monkeypatch, bpe_tokenizer, "--workdir", str(tmp_path / "a"), "--vocab-size", "300", *flags) == 0
    before = (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert call(monkeypatch, bpe_tokenizer, "--workdir", str(tmp_path / "a"), "--vocab-size", "290", *flags) == 2
    assert "holds another tokenizer" in capsys.readouterr().err
    assert call(monkeypatch, bpe_tokenizer, "--workdir", str(tmp_path / "a"), "--corpus", "not/read") == 2
    assert "holds another tokenizer" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text(TEXT.replace("chat", "rat"), encoding="utf-8")
    other = ["--vocab-size", "300", "--corpus", str(tmp_path / "other.txt")]
    assert call(monkeypatch, bpe_tokenizer, "--workdir", str(tmp_path / "a"), *other) == 2
    assert "holds another tokenizer" in capsys.readouterr().err
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert call(monkeypatch, bpe_tokenizer, "--workdir", str(tmp_path / "run"), *flags) == 2
    assert "holds a training run" in capsys.readouterr().err


def test_workdir_that_cannot_be_written(refused: Callable[..., str], tmp_path: Path, corpus: str) -> None:
    (tmp_path / "file").write_text("")
    for name in MODULES:
        assert "can't be written" in refused(name, "--corpus", corpus, "--workdir", str(tmp_path / "file" / "run"))


def test_hub_out_of_reach(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    sentence = refused("char_lm", "--corpus", "hf://datasets/wikimedia/wikipedia/20231101.fr")
    assert "builtin" in sentence


def test_sampling_from_no_run(refused: Callable[..., str]) -> None:
    assert "There is no run" in refused("char_lm", "--sample", "La ville de")


def test_workdir_of_another_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--workdir", str(tmp_path / "run"), "--corpus", corpus, "--vocab-size", "30", *TINY]
    assert call(monkeypatch, char_lm, *flags) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call(monkeypatch, char_lm, *flags, "--learning-rate", "0.5", "--seed", "4") == 2
    sentence = capsys.readouterr().err.strip()
    assert "optimizer.learning_rate (0.003 there, 0.5 asked for)" in sentence
    assert "seed (0 there, 4 asked for)" in sentence
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
