"""Every bad input of every experiment: one sentence that names the thing and the mend, exit status 2, no traceback,
nothing half written.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import gzip
import json
import math
import os
import resource
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import bpe_lm, bpe_tokenizer, char_lm, compare_tokenizers, speedrun
from experiments.arms import specs
from experiments.benchmarks import chaos, fuzz, overhead, resuming, seed_curve, seeds, tokenizers, training
from experiments.command_line import parse
from jaxlm.data.cache import cache_directory
from jaxlm.data.documents import open_corpus
from jaxlm.data.hub import _cache_path
from jaxlm.data.shards import open_shards, survey_corpus, tokenize_corpus
from jaxlm.tokenizers import CharTokenizer, InputError, load_tokenizer
from jaxlm.training import load_trained

MODULES = {
    "char_lm": char_lm,
    "bpe_lm": bpe_lm,
    "bpe_tokenizer": bpe_tokenizer,
    "compare_tokenizers": compare_tokenizers,
    "speedrun": speedrun,
    "overhead": overhead,
    "seed_curve": seed_curve,
    "tokenizers": tokenizers,
    "training": training,
    "seeds": seeds,
    "chaos": chaos,
    "fuzz": fuzz,
    "resuming": resuming,
}
WITH_WORKDIR = ("char_lm", "bpe_lm", "bpe_tokenizer", "compare_tokenizers")
WITH_CORPUS = (*WITH_WORKDIR, "speedrun", "overhead", "seed_curve", "resuming", "tokenizers")
WITH_MODEL = ("char_lm", "bpe_lm", "compare_tokenizers", "speedrun", "overhead", "seed_curve", "resuming")
TINY = "--vocab-size 30 --width 16 --num-heads 2 --num-layers 1 --context 16 --steps 2 --eval-documents 2".split()
ROOT = Path(__file__).parents[2]

Refuse = Callable[..., str]


@pytest.fixture
def refused(call: Callable[..., int], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Calls an experiment with bad input, and gives the sentence with which it is refused."""

    def refuse(name: str, *flags: str) -> str:
        where = ["--workdir", str(tmp_path / "workdir")] if name in WITH_WORKDIR and "--workdir" not in flags else []
        before = everything(tmp_path)
        status = call(MODULES[name], *where, *flags)
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        sentence = "\n".join(line for line in lines if not line.startswith("jaxlm: compiling"))  # not the first time
        assert status == 2, sentence
        assert "\n" not in sentence, sentence
        assert "Traceback" not in captured.err + captured.out
        assert sentence.endswith((".", "--help.")), sentence
        assert everything(tmp_path) == before, "something was written"
        assert not [path for path in everything(cache) if ".tmp" in path], "something was half written"
        return sentence

    return refuse


def everything(folder: Path) -> dict[str, Any]:
    """What there is in a folder: the kind and the content of each file, the latter as its time if it is long."""
    found: dict[str, Any] = {}
    for parent, folders, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in (*folders, *names)):
            status = os.lstat(path)
            found[path] = stat.S_IFMT(status.st_mode)
            if stat.S_ISREG(status.st_mode):
                small = status.st_size < 1_000_000
                found[path] = Path(path).read_bytes() if small else (status.st_size, status.st_mtime_ns)
    return found


# ---- flags

FLAGS = [
    ("char_lm", "--num-heads 5", "5 heads"),
    ("char_lm", "--context 1", "context is at least 2"),
    ("char_lm", "--steps 3 --warmup-steps 3", "no shorter than the run of 3"),
    ("char_lm", "--positions rope --width 12 --num-heads 4", "heads of width 3 are odd"),
    ("char_lm", "--context 16 --window 17", "window is from 1 to its context of 16, not 17"),
    ("char_lm", "--num-heads 4 --num-kv-heads 3", "4 heads don't divide among 3"),
    ("char_lm", "--attention cudnn --vocab-size 30 --context 16", "cudnn attention needs a GPU"),
    ("char_lm", "--vocab-size 20 --context 100000", "needs 100001"),
    ("char_lm", "--vocab-size 17", "at least 18 ids"),
    ("char_lm", "--vocab-size 3000", "at most"),
    ("char_lm", "--sample-prompt \udce9", "lone surrogate U+DCE9"),
    ("char_lm", "--sample x", "There is no run"),
    ("char_lm", "--sample x --top-k 0", "top_k is from 1"),
    ("bpe_lm", "--vocab-size 200", "at least 257 ids"),
    ("bpe_lm", "--vocab-size 30000", "at most"),
    ("bpe_lm", "--vocab-size 1000000000", "make some of them smaller"),
    ("bpe_lm", "--split gpt5", "no split 'gpt5'"),
    ("bpe_lm", "--sample x", "There is no run"),
    ("bpe_tokenizer", "--split gpt5", "no split 'gpt5'"),
    ("bpe_tokenizer", "--steps 30000", "at most"),
    ("bpe_tokenizer", "--vocab-size 1000000000", "below 16,777,216, not 999999999"),
    ("bpe_tokenizer", "--vocab-size 100 --corpus not/read", "at least 257 ids (256 bytes and 1 special token)"),
    ("bpe_tokenizer", "--split gpt9 --corpus not/read", "There is no split 'gpt9'"),
    ("bpe_tokenizer", "--explain \udce9", "lone surrogate U+DCE9"),
    ("compare_tokenizers", "--tokenizers sentencepiece-bpe --vocab-sizes 270", "SentencePiece"),
    ("compare_tokenizers", "--tokenizers sentencepiece-unigram --vocab-sizes 1000000000", "SentencePiece"),
    ("compare_tokenizers", "--tokenizers words", "'words' is no tokenizer; there are bytes, char"),
    ("compare_tokenizers", "--tokenizers char char --characters 30", "two arms char-30"),
    ("compare_tokenizers", "--tokenizers", "There is no arm"),
    ("compare_tokenizers", "--budget seconds", "add --budget-size"),
    ("compare_tokenizers", "--sizes 2", "layers x width, as 2x128, not '2'"),
    ("compare_tokenizers", "--sizes 2x30 --characters 30 --vocab-size 310", "width 30 doesn't divide into 4 heads"),
    ("compare_tokenizers", "--sizes 9999x99992 --tokenizers bytes", "make some of them smaller"),
    ("compare_tokenizers", "--rate-factors", "positive numbers"),
    ("compare_tokenizers", "--rate-factors 1 -2", "positive numbers"),
    ("compare_tokenizers", "--rate-factors 1 1", "stands twice"),
    ("compare_tokenizers", "--rate-share 1.5", "share of the budget"),
    ("compare_tokenizers", "--vocab-sizes 300 0", "at least one id"),
    ("compare_tokenizers", "--seed 4294967295 --seeds 2", "seed is from 0 to 4294967295"),
    # Characters give a window of this size, the fewer tokens of the others do not.
    (
        "compare_tokenizers",
        "--characters 30 --vocab-size 310 --context 2000 --context-unit tokens",
        "one window of context 2000",
    ),
    ("tokenizers", "--vocab-sizes", "at least 256 ids"),
    ("tokenizers", "--threads", "one thread"),
]


@pytest.mark.parametrize(("name", "flags", "words"), FLAGS, ids=[f"{name} {flags!a}" for name, flags, _ in FLAGS])
def test_flags(name: str, flags: str, words: str, refused: Refuse, corpus: str) -> None:
    assert words in refused(name, "--corpus", corpus, *flags.split())


@pytest.mark.parametrize("name", MODULES)
def test_unknown_preset_flag_and_argument(name: str, refused: Refuse) -> None:
    assert "no preset 'huge'" in refused(name, "--preset", "huge")
    assert "--colour" in refused(name, "--colour", "red")
    assert "stray" in refused(name, "stray")


def test_a_terminal_without_utf8_gets_one_sentence_too(tmp_path: Path) -> None:
    flags = ["--workdir", str(tmp_path / "chat botté"), "--seed", "many"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.char_lm", *flags],
        cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("Error parsing --seed: invalid literal for int() with base 10: 'many'; see python")
    assert done.stderr.count("\n") == 1


# ---- numbers: every flag that takes one

NUMBERS = {int: (-1, 0, 10**9, 10**18), float: (-1.0, 0.0, 1e9, 1e18, 1e308, math.inf, math.nan)}

# What is no mistake, or harmless: the largest run takes its time, and divergence is said when it happens.
ALLOWED: dict[str, tuple[float, ...]] = {
    "corpus_bytes": (10**9, 10**18),  # more than there is: all of it
    "seed": (0, 10**9),
    "steps": (10**9,),
    "log_every": (10**9,), "eval_every": (10**9,), "sample_every": (10**9,), "checkpoint_every": (10**9,),  # never
    "eval_documents": (10**9,), "keep_checkpoints": (10**9,),  # all
    "dropout": (0,), "warmup_steps": (0,), "beta1": (0,), "beta2": (0,), "momentum": (0,),
    "learning_rate": (1e9, 1e18), "muon_learning_rate": (1e9, 1e18), "weight_decay": (0, 1e9, 1e18),
    "clip_norm": (1e9, 1e18), "spike_factor": (1e9, 1e18), "rope_base": (1e9, 1e18), "logit_cap": (1e9, 1e18),
    "num_tokens": (10**9, 10**18),  # a sample ends at end-of-text, or when it is interrupted
    "top_k": (10**9, 10**18),  # refused when the vocabulary is known, see below
    "temperature": (0, 1e9, 1e18),
    "together": (10**9, 10**18), "budget_size": (1e9,), "rate_factors": (1e9, 1e18),
    "first_share": (0,),
    "score_every": (10**9, 10**18), "rounds": (10**9, 10**18), "repeats": (10**9, 10**18), "kills": (10**9, 10**18),
    "blocks": (10**9, 10**18), "block_steps": (10**9, 10**18), "starts": (10**9, 10**18),
}  # fmt: skip
ALLOWED_BY: dict[str, dict[str, tuple[float, ...]]] = {
    "bpe_tokenizer": {"seed": (0, 10**9, 10**18), "sentences": (0, 10**9, 10**18), "steps": (0,)},
    "overhead": {"blocks": (), "block_steps": ()},  # together they are the steps of a run
    "fuzz": {"seed": (0, 10**9, 10**18), "examples": (10**9, 10**18), "batch": (10**9, 10**18)},
    "chaos": {"seed": (-1, 0, 10**9, 10**18)},  # Python's generator takes any
}

# What the settings alone don't tell: refused when the text or the memory of the machine is known.
LATER: dict[str, dict[str, tuple[float, ...]]] = {
    **{
        name: dict.fromkeys(
            ("vocab_size", "context", "width", "feed_forward_width", "batch_size"),
            (10**9,),
        )
        for name in WITH_MODEL
    },
}
for _name in (*WITH_WORKDIR, "overhead", "seed_curve"):
    LATER.setdefault(_name, {})["corpus_bytes"] = (-1, 0)
LATER["compare_tokenizers"] |= {
    "vocab_sizes": (10**9, 10**18), "characters": (10**9, 10**18), "budget_size": (1e18, 1e308),
}  # fmt: skip


def default(name: str) -> Any:
    return next(iter(MODULES[name].PRESETS.values()))


def numbers(config: Any) -> Iterator[tuple[tuple[str, ...], type]]:
    """The fields of a config, and of those in it, that hold numbers, and of which type."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from (((field.name, *path), kind) for path, kind in numbers(value))
        else:
            kinds = {hints[field.name], *typing.get_args(hints[field.name])} & {int, float}
            yield from (((field.name,), kind) for kind in kinds)


def changed(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """The config with another number in a field."""
    name, *rest = path
    before = getattr(config, name)
    if rest:
        value = changed(before, tuple(rest), value)
    elif isinstance(before, tuple):
        value = (value,)
    return dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize("name", MODULES)
def test_every_number_is_refused_or_allowed_for_a_reason(name: str) -> None:
    config = default(name)
    fields = list(numbers(config))
    assert fields
    for path, kind in fields:
        # `steps` of chaos and the like mean the same; what means something else is in ALLOWED_BY.
        allowed = ALLOWED_BY.get(name, {}).get(path[-1], ALLOWED.get(path[-1], ()))
        later = LATER.get(name, {}).get(path[-1], ())
        for value in NUMBERS[kind]:
            try:
                changed(config, path, value)
                sentence = None
            except InputError as error:
                sentence = str(error)
            assert (sentence is None) == (value in (*allowed, *later)), f"{'.'.join(path)} {value}: {sentence}"
            assert sentence is None or (sentence.endswith(".") and "\n" not in sentence), sentence


def test_a_word_for_a_number() -> None:
    seen = set()
    for name, module in MODULES.items():
        for path, kind in numbers(default(name)):
            flag = f"--{path[-1].replace('_', '-')}"
            if flag not in seen:  # what several experiments have, they have from one class
                with pytest.raises(InputError, match=flag):
                    parse([flag, "nan" if kind is int else "abc"], module.PRESETS, "x")
            seen.add(flag)


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [(name, flag, value) for name, flags in LATER.items() for flag, values in flags.items() for value in values],
)
def test_what_does_not_fit_text_or_memory_is_refused_at_once(
    name: str, flag: str, value: float, refused: Refuse, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxlm.training.memory_bytes", lambda: 16 * 10**9)
    flags = ["--corpus", corpus, f"--{flag.replace('_', '-')}", str(value)]
    if name == "compare_tokenizers":
        family = {"characters": "char", "vocab_size": "bpe", "vocab_sizes": "bpe"}.get(flag, "bytes")
        flags += ["--tokenizers", family, "--characters", "30"] if flag != "characters" else ["--tokenizers", family]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sentence = refused(name, *flags)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "half a gigabyte was taken"
    figures = {str(value), f"{value:,}", f"{value - 1}", f"{value:g}", str(257 + value), str(256 + value)}
    assert any(figure in sentence for figure in figures) or "parameters" in sentence, sentence


def test_numbers_that_are_allowed_do_no_harm(call: Callable[..., int], corpus: str, tmp_path: Path) -> None:
    def status(name: str, **numbers: float) -> int:
        flags = [text for flag, value in numbers.items() for text in (f"--{flag.replace('_', '-')}", f"{value}")]
        where = [] if name == "speedrun" else ["--workdir", str(tmp_path / f"{name}-{len(os.listdir(tmp_path))}")]
        return call(MODULES[name], "--corpus", corpus, *where, *flags)

    tiny = {"vocab_size": 30, "width": 16, "num_heads": 2, "num_layers": 1, "context": 16, "steps": 2}
    tiny |= dict.fromkeys(("log_every", "eval_every", "sample_every", "checkpoint_every"), 10**9)
    tiny |= {"eval_documents": 10**9, "keep_checkpoints": 10**9, "corpus_bytes": 10**18, "seed": 10**9}
    zero = dict.fromkeys(("dropout", "warmup_steps", "beta1", "beta2", "momentum", "weight_decay"), 0)
    high = dict.fromkeys(("clip_norm", "spike_factor", "logit_cap", "rope_base"), 1e18)
    assert status("char_lm", **tiny, **zero, **high) == 0
    assert status("char_lm", **tiny, learning_rate=1e18) == 1
    assert status("bpe_tokenizer", vocab_size=300, sentences=10**18, seed=10**18) == 0


# ---- files

TEXTS = ["Le chat dort.", "Il pleut sur la ville."]


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(folder: Path, name: str, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-20])
    return path


def made(make: Callable[[Path], Any], path: Path) -> Path:
    """A path, after something was made there."""
    make(path)
    return path


def beside(path: Path, folder: Path) -> Path:
    """A folder that holds a good file and this one."""
    (folder / "folder").mkdir()
    written(folder / "folder", "good.txt", "\n\n".join(TEXTS).encode())
    path.rename(folder / "folder" / path.name)
    return folder / "folder"


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the name of a socket is short
        server.bind(path.name)


BROKEN_10001 = lines(*[{"text": f"Phrase {i}."} for i in range(10_000)]) + b'{"text": "cut\n' + lines({"text": "x"})

# What is made in a folder, and what the sentence says of it, beside its name.
FILES: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "missing": (lambda f: f / "nothing.txt", "There is no file or folder"),
    "missing folder": (lambda f: f / "nowhere" / "nothing.txt", "There is no file or folder"),
    "below a file": (lambda f: written(f, "a.txt", b"x") / "b.txt", "There is no file or folder"),
    "name too long": (lambda f: f / ("x" * 300 + ".txt"), "File name too long"),
    "no name": (lambda f: "", "give a local .parquet, .jsonl or .txt file"),
    "blank name": (lambda f: " ", "give a local .parquet, .jsonl or .txt file"),
    "glob of nothing": (lambda f: f / "*.txt", "names no file of documents"),
    "other kind": (lambda f: written(f, "a.csv", b"x"), "unsupported kind; the supported kinds are .txt"),
    "empty folder": (lambda f: made(Path.mkdir, f / "folder"), "names no file of documents"),
    "folder for a file": (lambda f: made(Path.mkdir, f / "a.txt"), "names no file of documents"),
    "folder of other kinds": (lambda f: written(f, "a.csv", b"x").parent, "names no file of documents"),
    "empty": (lambda f: written(f, "a.txt", b""), "holds no text"),
    "blank": (lambda f: written(f, "a.txt", b"\n \n\t\n"), "holds no text"),
    "empty lines of JSON": (lambda f: written(f, "a.jsonl", b""), "holds no text"),
    "empty gzip": (lambda f: written(f, "a.jsonl.gz", b""), "holds no text"),
    "empty parquet": (lambda f: written(f, "a.parquet", b""), "is not a whole parquet file"),
    "one document": (lambda f: written(f, "a.txt", b"Un seul."), "is a single document"),
    "Latin-1": (lambda f: written(f, "a.txt", "bon\n\nété".encode("latin-1")), "at offset 5 is 0xe9; convert the file"),
    "Latin-1 in JSON": (lambda f: written(f, "a.jsonl", b'{"text": "\xe9"}\n'), "at offset 10 is 0xe9; convert"),
    "UTF-16": (lambda f: written(f, "a.txt", "été".encode("utf-16")), "at offset 0 is 0xff; convert the file"),
    "parquet cut short": (lambda f: cut_short(parquet(f, "a.parquet", text=TEXTS)), "is not a whole parquet file"),
    "parquet that is text": (lambda f: written(f, "a.parquet", b"Bonjour."), "is not a whole parquet file"),
    "parquet without text": (lambda f: parquet(f, "a.parquet", titre=["a"], corps=["b"]), "only titre, corps"),
    "parquet of numbers": (lambda f: parquet(f, "a.parquet", text=[1, 2]), "must hold strings"),
    "parquet of nulls": (lambda f: parquet(f, "a.parquet", text=pa.array([None, None], pa.string())), "holds no text"),
    "gzip cut short": (
        lambda f: cut_short(written(f, "a.jsonl.gz", gzip.compress(BROKEN_10001))), "is not a whole gzip file",
    ),
    "gzip that is none": (lambda f: written(f, "a.jsonl.gz", lines({"text": "x"})), "is not a whole gzip file"),
    "broken line 10,001": (lambda f: written(f, "a.jsonl", BROKEN_10001), "line 10001 is not JSON; write each"),
    "JSON without text": (lambda f: written(f, "a.jsonl", lines({"titre": "a"})), "line 1 has no field `text`"),
    "JSON of a list": (lambda f: written(f, "a.jsonl", lines(["a"])), "line 1 has no field `text`"),
    "JSON of a number": (lambda f: written(f, "a.jsonl", lines({"text": 1})), "line 1 has a field `text` that is no"),
    "JSON too deep": (lambda f: written(f, "a.jsonl", b"[" * 10**6), "line 1 is not JSON"),
    "half a surrogate pair": (lambda f: written(f, "a.jsonl", b'{"text": "\\ud800"}'), "lone surrogate U+D800"),
    "symlink to itself": (lambda f: made(loop, f / "a.txt"), "Too many levels of symbolic links"),
    "symlink to itself in a folder": (lambda f: beside(made(loop, f / "a.txt"), f), "Too many levels of symbolic"),
    "symlink to nothing": (lambda f: made(lambda p: p.symlink_to("b.txt"), f / "a.txt"), "There is no file"),
    "symlink to nothing in a folder": (
        lambda f: beside(made(lambda p: p.symlink_to("b.txt"), f / "a.txt"), f), "There is no file",
    ),
    "pipe": (lambda f: made(os.mkfifo, f / "a.txt"), "is no regular file; copy its text into one"),
    "pipe in a folder": (lambda f: beside(made(os.mkfifo, f / "a.jsonl"), f), "is no regular file"),
    "endless device": (lambda f: made(lambda p: p.symlink_to("/dev/zero"), f / "a.txt"), "is no regular file"),
    "device": (lambda f: "/dev/zero", "unsupported kind"),
    "socket": (lambda f: made(bind, f / "a.txt"), "is no regular file"),
    "dataset without owner": (lambda f: "hf://datasets/wikipedia", "write hf://datasets/OWNER/NAME"),
    "hub out of reach": (lambda f: "hf://datasets/wikimedia/wikipedia/20231101.fr", "check the network, or give a"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "name"),
    # A benchmark of tokenizers holds no document out.
    [(case, name) for case in FILES for name in WITH_CORPUS if (case, name) != ("one document", "tokenizers")],
)
def test_files(case: str, name: str, refused: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    make, words = FILES[case]
    (tmp_path / "texts").mkdir()
    spec = str(make(tmp_path / "texts"))
    sentence = refused(name, "--corpus", spec, *(["--task", "threads"] if name == "tokenizers" else []))
    assert words in sentence
    file = "wikipedia" if spec.startswith("hf:") else spec.rsplit("/", 1)[-1]
    assert file.strip() in sentence or "name too long" in case, "it is not named"


STRANGE = ("avec espaces", "élève 学校 🐈", "étoile *? %20#", "-x")


@pytest.mark.parametrize("name", [*STRANGE, "[crochets]", "octets-\udcff"])
def test_names_that_are_strange_and_good(name: str, call: Callable[..., int], tmp_path: Path) -> None:
    texts = "\n\n".join(f"Le chat numéro {i} dort sur le toit rouge." for i in range(30))
    (tmp_path / name).mkdir()
    corpus, workdir = tmp_path / name / f"{name}.txt", tmp_path / (name if name in STRANGE else "x") / "run"
    corpus.write_text(texts, encoding="utf-8")
    assert call(bpe_tokenizer, "--corpus", str(corpus), "--workdir", str(workdir), "--vocab-size", "280") == 0
    assert (workdir / "tokenizer.json").exists()
    assert len(list(open_corpus(str(corpus.parent)).documents())) == 30


def test_a_run_and_a_comparison_in_a_strange_place(call: Callable[..., int], tmp_path: Path, corpus: str) -> None:
    place = tmp_path / "".join(STRANGE)
    place.mkdir()
    shutil.move(corpus, place / "a b.txt")
    flags = ["--corpus", str(place / "a b.txt"), *TINY]
    assert call(char_lm, "--workdir", str(place / "run"), *flags) == 0
    assert call(char_lm, "--workdir", str(place / "run"), "--sample", "Le", "--num-tokens", "3") == 0
    one = ["--tokenizers", "char", "--characters", "30", "--seeds", "1", "--rate-factors", "1", "--warmup-steps", "0"]
    assert call(compare_tokenizers, "--workdir", str(place / "comparison"), *flags, *one) == 0
    assert (place / "comparison" / "report.html").exists()


@pytest.mark.parametrize("name", WITH_WORKDIR)
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_200_megabytes_on_one_line(suffix: str, name: str, refused: Refuse, tmp_path: Path) -> None:
    line = b"Le chat dort sur le toit. " * 8_000_000
    file = written(tmp_path, f"a.{suffix}", line if suffix == "txt" else b'{"text": "' + line + b'"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sentence = refused(name, "--corpus", str(file))
    assert f"{file.name} has a document or a line of more than" in sentence and "cut it into several" in sentence
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 3 * len(line)


# ---- workdirs

WORKDIRS: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "a file": (lambda f: written(f, "run", b"x"), "can't be written; choose another --workdir"),
    "inside a file": (lambda f: written(f, "a", b"x") / "run", "can't be written; choose another --workdir"),
    "deep inside a file": (lambda f: written(f, "a", b"x") / "b" / "c" / "run", "can't be written; choose"),
    "a symlink to nothing": (lambda f: made(lambda p: p.symlink_to("x"), f / "run"), "can't be written; choose"),
    "a symlink to itself": (lambda f: made(loop, f / "run"), "can't be written; choose another --workdir"),
    "below a symlink to itself": (lambda f: made(loop, f / "a") / "run", "can't be written (Too many levels"),
    "a pipe": (lambda f: made(os.mkfifo, f / "run"), "can't be written; choose another --workdir"),
    "a device": (lambda f: "/dev/null", "can't be written; choose another --workdir"),
    "no name": (lambda f: "", "is an empty name; give the --workdir"),
    "a blank name": (lambda f: "  ", "is an empty name; give the --workdir"),
    "a name too long": (lambda f: "x" * 300, "can't be written (File name too long); choose"),
    "a name with brackets": (lambda f: "[1]", "can't be written (a name with [ or a backslash is no place"),
    "a name that is not UTF-8": (lambda f: "\udcff", "can't be written (its name is not UTF-8); choose"),
}


@pytest.mark.parametrize("name", WITH_WORKDIR)
@pytest.mark.parametrize("case", WORKDIRS)
def test_workdirs(
    case: str, name: str, refused: Refuse, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make, words = WORKDIRS[case]
    assert words in refused(name, "--corpus", corpus, "--workdir", str(make(tmp_path / "here")))


def test_a_workdir_that_holds_another_tokenizer(
    call: Callable[..., int], refused: Refuse, tmp_path: Path, corpus: str
) -> None:
    workdir = str(tmp_path / "a")
    assert call(bpe_tokenizer, "--workdir", workdir, "--vocab-size", "300", "--corpus", corpus, "--sentences", "0") == 0
    (tmp_path / "other.txt").write_text(Path(corpus).read_text().replace("chat", "rat"), encoding="utf-8")
    for flags in (
        ("--vocab-size", "290", "--corpus", corpus),
        ("--vocab-size", "290", "--corpus", "not/read"),
        ("--vocab-size", "300", "--corpus", str(tmp_path / "other.txt")),
    ):
        assert "holds another tokenizer" in refused("bpe_tokenizer", "--workdir", workdir, *flags)
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    assert "is no tokenizer file, or it is damaged" in refused("bpe_tokenizer", "--workdir", workdir)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "holds a training run" in refused("bpe_tokenizer", "--workdir", str(tmp_path / "run"), "--corpus", corpus)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run that is finished, and its text."""
    folder = tmp_path_factory.mktemp("finished")
    text = "\n\n".join(f"Le chat numéro {i} dort sur le toit rouge." for i in range(40))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    flags = ["--corpus", str(folder / "corpus.txt"), "--workdir", str(folder / "run"), *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(folder / "cache"))
        char_lm.main(parse(flags, char_lm.PRESETS, "x"))
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> list[str]:
    """The flags that go on with a copy of that run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return ["--corpus", str(finished / "corpus.txt"), "--workdir", str(tmp_path / "run"), *TINY]


def edited(**changes: Any) -> Callable[[Path], Any]:
    """Changes fields of a config; `...` leaves one out."""

    def edit(file: Path) -> None:
        config = {**json.loads(file.read_bytes()), **changes}
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))

    return edit


def replaced_by_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def replaced_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def holding(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "an empty config": ("config.json", holding(b""), "is damaged; restore it"),
    "a config of nonsense": ("config.json", holding(b"\xff\x00nonsense"), "is damaged; restore it"),
    "half a config": ("config.json", lambda p: p.write_bytes(p.read_bytes()[:50]), "is damaged; restore it"),
    "a config of lists": ("config.json", holding(b"[[]]"), "is damaged; restore it"),
    "a config of nothing": ("config.json", holding(b"null"), "is damaged; restore it"),
    "a config too deep": ("config.json", holding(b"[" * 10**6), "is damaged; restore it"),
    "a folder for the config": ("config.json", replaced_by_folder, "is damaged; restore it"),
    "a newer config": ("config.json", edited(version=99), "was written by a newer jaxlm; use that one"),
    **{
        f"{field} {value!r}": ("config.json", edited(**{field: value}), "is damaged; restore it")
        for field in ("version", "identity", "environment", "tokenizer_hash")
        for value in (..., None, [], "x" if field != "tokenizer_hash" else 5, 1.5)
    },
    "no tokenizer": ("tokenizer", shutil.rmtree, "There is no tokenizer"),
    "a file for the tokenizer": ("tokenizer", replaced_by_file, "is no folder; move it away"),
    "a tokenizer of nonsense": ("tokenizer/tokenizer.json", holding(b"nonsense"), "is no tokenizer file, or it is da"),
    "a folder for the tokenizer's file": ("tokenizer/tokenizer.json", replaced_by_folder, "There is no tokenizer at"),
    "a file for the checkpoints": ("checkpoints", replaced_by_file, "is no folder; move it away"),
    "a file for the curves": ("tensorboard", replaced_by_file, "is no folder; move it away"),
    "a folder for the metrics": ("metrics.jsonl", replaced_by_folder, "is no file; move it away"),
    "a folder for the samples": ("samples.txt", replaced_by_folder, "is no file; move it away"),
    "a folder for the lock": ("lock", replaced_by_folder, "is no file; move it away"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_run_is_not_gone_on_with(case: str, refused: Refuse, again: list[str], tmp_path: Path) -> None:
    name, damage, words = DAMAGES[case]
    damage(tmp_path / "run" / name)
    sentence = refused("char_lm", *again)
    assert words in sentence
    assert str(tmp_path / "run" / name.split("/")[0]) in sentence
    if name == "config.json" or (name.startswith("tokenizer") and "is no folder" not in words):
        assert words in refused("char_lm", "--workdir", str(tmp_path / "run"), "--sample", "Le")


@pytest.mark.parametrize(
    "damage",
    [holding(b"nonsense\n"), lambda p: p.write_bytes(b"[]\n" + p.read_bytes()), lambda p: p.write_bytes(b"{}\n")],
)
def test_damaged_metrics_are_not_gone_on_with(
    damage: Callable[[Path], Any], call: Callable[..., int], again: list[str], tmp_path: Path, capsys: Any
) -> None:
    damage(tmp_path / "run" / "metrics.jsonl")
    assert call(char_lm, *again) == 2
    captured = capsys.readouterr()
    assert "metrics.jsonl" in captured.err and "is damaged; restore it" in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_a_model_of_nonsense_in_the_config_is_not_sampled_from(
    refused: Refuse, again: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "run" / "config.json"
    whole = json.loads(file.read_bytes())
    for part, names in (("model", whole["identity"]["model"]), ("optimizer", whole["identity"]["optimizer"])):
        for name in (*names, "unknown"):
            for value in ([], {}, -1 if isinstance(names.get(name), int | float) else "x"):
                identity = {**whole["identity"], part: {**names, name: value}}
                file.write_text(json.dumps({**whole, "identity": identity}))
                if isinstance(names.get(name), bool) or (name in ("window", "logit_cap") and not value):
                    continue  # anything is true or false
                with pytest.raises(InputError, match=r"config\.json is damaged.*; restore it"):
                    load_trained(tmp_path / "run")
    for identity in ({}, {"model": 5, "optimizer": {}, "seed": 0}, {**whole["identity"], "seed": "x"}):
        file.write_text(json.dumps({**whole, "identity": identity}))
        assert "is damaged" in refused("char_lm", "--workdir", str(tmp_path / "run"), "--sample", "Le")


def test_another_run_in_the_workdir(refused: Refuse, again: list[str]) -> None:
    sentence = refused("char_lm", *again, "--learning-rate", "0.5", "--seed", "4")
    assert "optimizer.learning_rate (0.003 there, 0.5 asked for)" in sentence
    assert "seed (0 there, 4 asked for)" in sentence


# ---- prompts


def test_prompts(call: Callable[..., int], refused: Refuse, again: list[str], tmp_path: Path, capsys: Any) -> None:
    run = ["--workdir", str(tmp_path / "run"), "--num-tokens", "3", "--sample"]
    for prompt in ("", "日本語 🐈 \x00\x1b[31m", "[bold]", "<|endoftext|>", "Le chat. " * 20_000):
        assert call(char_lm, *run, prompt) == 0
        assert capsys.readouterr().out.startswith(prompt)
    assert "lone surrogate U+DCE9 at character 3" in refused("char_lm", *run, "Le \udce9t\udce9")
    for flags, words in (
        ("--top-k 0", "top_k is from 1"),
        ("--top-k 1000000000", "top_k is from 1 to the vocabulary's 30 ids, not 1000000000"),
        ("--temperature nan", "temperature is a float32 number of at least 0, not nan"),
        ("--num-tokens 0", "num_tokens is at least 1, not 0"),
    ):
        assert words in refused("char_lm", *run, "Le", *flags.split())


# ---- the cache

CACHES: dict[str, Callable[[Path], Path | str]] = {
    "a file": lambda f: written(f, "cache", b"x"),
    "inside a file": lambda f: written(f, "a", b"x") / "cache",
    "a symlink to nothing": lambda f: made(lambda p: p.symlink_to("x"), f / "cache"),
    "a symlink to itself": lambda f: made(loop, f / "cache"),
    "a pipe": lambda f: made(os.mkfifo, f / "cache"),
    "no place to write": lambda f: "/proc/cache",
    "a name too long": lambda f: f / ("x" * 300),
}


@pytest.mark.parametrize("name", [*WITH_WORKDIR, "speedrun"])
@pytest.mark.parametrize("case", CACHES)
def test_caches(
    case: str, name: str, refused: Refuse, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(CACHES[case](tmp_path))
    monkeypatch.setenv("JAXLM_CACHE", place)
    sentence = refused(name, "--corpus", corpus)
    assert sentence.startswith(f"The cache {place} can't be written (")
    assert "set the environment variable JAXLM_CACHE to a folder that can" in sentence


# ---- permission, and space


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder for anybody, which those of pytest are not."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """As a user without rights, if this one has them all."""
    if os.getuid() != 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(65534, 65534, 0)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


FORBIDDEN = {
    "file": ("--corpus", "corpus.txt", 0o000, "cannot be read (Permission denied); check its permissions"),
    "folder": ("--corpus", "folder", 0o000, "cannot be read (Permission denied); check its permissions"),
    "file in a folder": ("--corpus", "folder", 0o644, "ermission"),
    "workdir": ("--workdir", "folder", 0o555, "can't be written; choose another --workdir"),
    "below the workdir": ("--workdir", "folder/run/again", 0o555, "can't be written; choose another --workdir"),
    "unseen workdir": ("--workdir", "folder/run/again", 0o000, "can't be written (Permission denied); choose"),
}


@pytest.mark.parametrize("name", WITH_WORKDIR)
@pytest.mark.parametrize("case", FORBIDDEN)
def test_no_permission(
    case: str, name: str, refused: Refuse, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, place, mode, words = FORBIDDEN[case]
    monkeypatch.setenv("JAXLM_CACHE", str(open_folder / "cache"))
    written(open_folder, "corpus.txt", "\n\n".join(TEXTS).encode())
    (open_folder / "folder").mkdir()
    written(open_folder / "folder", "a.txt", "\n\n".join(TEXTS).encode())
    locked = open_folder / place.split("/")[0]
    locked.chmod(mode)
    flags = {"--corpus": str(open_folder / "corpus.txt"), "--workdir": str(open_folder / "new")}
    flags[flag] = str(open_folder / place)
    with as_nobody():
        sentence = refused(name, *(text for pair in flags.items() for text in pair))
    assert words in sentence
    assert str(locked) in sentence
    assert not (open_folder / "new").exists()


def test_no_permission_for_the_cache(refused: Refuse, open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLM_CACHE", str(open_folder / "cache"))
    (open_folder / "cache").mkdir(mode=0o555)
    written(open_folder, "corpus.txt", "\n\n".join(TEXTS).encode())
    with as_nobody():
        sentence = refused("char_lm", "--corpus", str(open_folder / "corpus.txt"))
    assert f"The cache {open_folder / 'cache'} can't be written (Permission denied); set" in sentence


FULL_DISK = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
from experiments import char_lm, compare_tokenizers
from experiments.command_line import program

disk, elsewhere, corpus, flags = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4].split()
compared = [*flags, "--tokenizers", "char", "--characters", "30", "--rate-factors", "1", "--warmup-steps", "0"]
for name, module, own, full, left in (
    ("its tokenizer", char_lm, flags, "workdir", 0),
    ("its config", char_lm, flags, "workdir", 8192),
    ("its survey", char_lm, flags, "cache", 0),
    ("its shards", char_lm, flags, "cache", 4096),
    ("its first arm", compare_tokenizers, compared, "workdir", 0),
):
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    status = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - left))
    places = {place: (disk if place == full else elsewhere) / f"{place}-{name}" for place in ("workdir", "cache")}
    os.environ["JAXLM_CACHE"] = str(places["cache"])
    sys.argv = [module.__name__, "--corpus", corpus, "--workdir", str(places["workdir"]), *own]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            program(module.__name__, module.PRESETS, module.main)
    except SystemExit as ending:
        left = [str(path) for path in places["cache"].rglob("*") if ".tmp" in path.name]
        print("RESULT", json.dumps([name, ending.code, errors.getvalue().strip(), left]))
"""


def test_no_space(tmp_path: Path, corpus: str) -> None:
    """A full disk isn't bad input but a run that failed: status 1, and what to do."""
    (tmp_path / "disk").mkdir()
    arguments = [str(tmp_path / "disk"), str(tmp_path / "elsewhere"), corpus, " ".join(TINY)]
    mounted = f"mount -t tmpfs -o size=1m tmpfs {shlex.quote(arguments[0])}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True, check=False).returncode:
        pytest.skip("a small disk to fill can be mounted by root alone")
    python = shlex.join([sys.executable, "-c", FULL_DISK, *arguments])
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mounted} && exec {python}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == 5, done.stderr
    assert "Traceback" not in done.stderr
    for name, status, sentence, left in results:
        assert status == 1, (name, sentence)
        assert "No space left on device" in sentence and "run the same command again." in sentence
        assert str(tmp_path / "disk") in sentence, "the place is named"
        assert len([line for line in sentence.splitlines() if not line.startswith("jaxlm: compiling")]) == 1
        assert not left


# ---- nothing is run that was read, and nothing written elsewhere

MODULE_FILES = sorted(path for folder in ("jaxlm", "experiments") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", MODULE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_eval_no_pickle_no_shell(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}, ast.unparse(node)
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"eval", "exec", "compile", "os.system", "os.popen", "__import__"}
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle"):
                    assert ast.unparse(keyword.value) == "False", ast.unparse(node)


ELSEWHERE = ("../../elsewhere", "/etc/passwd", "..", "a/../../../elsewhere", "")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_shards_named_elsewhere_are_not_opened(name: str, corpus: str) -> None:
    opened = open_corpus(corpus)
    survey = survey_corpus(opened)
    tokenizer = CharTokenizer.train(opened.documents())
    tokenize_corpus(opened, survey, tokenizer)
    (file,) = (cache_directory() / "shards").glob("*/manifest.json")
    manifest = json.loads(file.read_bytes())
    for train in (manifest["splits"]["train"] | {"shards": [name]}, manifest["splits"]["train"] | {"documents": name}):
        file.write_text(json.dumps({**manifest, "splits": {**manifest["splits"], "train": train}}))
        assert open_shards(file.parent) is None
    assert tokenize_corpus(opened, survey, tokenizer).train.num_documents == survey.train_documents, "made again"


def test_a_file_that_a_manifest_names_outside_its_folder_is_not_read(corpus: str, tmp_path: Path) -> None:
    opened = open_corpus(corpus)
    tokenize_corpus(opened, survey_corpus(opened), CharTokenizer.train(opened.documents()))
    (file,) = (cache_directory() / "shards").glob("*/manifest.json")
    manifest = json.loads(file.read_bytes())
    shutil.move(file.parent / "train-00000.npy", tmp_path / "train-00000.npy")
    for name in (str(tmp_path / "train-00000.npy"), os.path.relpath(tmp_path / "train-00000.npy", file.parent)):
        manifest["splits"]["train"]["shards"] = [name]
        file.write_text(json.dumps(manifest))
        assert open_shards(file.parent) is None


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_the_hub_calls_its_files_stays_in_the_cache(name: str, cache: Path) -> None:
    for path in (_cache_path("row_groups", name, name), _cache_path("listings", name, name, name)):
        assert path.resolve().is_relative_to(cache.resolve() / "hub")


@pytest.mark.parametrize("name", ["hf://datasets/../x", "hf://datasets/../../x", "hf://datasets//etc/passwd"])
def test_datasets_named_elsewhere(name: str, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "hub" in refused("char_lm", "--corpus", name)


def test_arms_are_named_by_the_last_part_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a" / "tokenizer").mkdir(parents=True)
    for family in (str(tmp_path / "a"), f"{tmp_path}/a/../a/tokenizer", "/", "/.."):
        (spec,) = specs([family], [300], 98, [(2, 128)])
        assert spec.name in ("a", "")
        assert (tmp_path / "arms" / spec.name).resolve().is_relative_to(tmp_path / "arms")


def test_a_tokenizer_names_no_file(tmp_path: Path) -> None:
    for kind in ELSEWHERE:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"version": 1, "hash": "x", "kind": kind}))
        with pytest.raises(InputError, match="unknown kind"):
            load_tokenizer(tmp_path)
