"""Whatever comes in is refused in one sentence or works: tokenizers, configs, documents, and text in the report.

Each property runs with few examples here. `python -m experiments.benchmarks.fuzz` runs the same ones with many.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from experiments import arms, bpe_lm, bpe_tokenizer, char_lm, compare_tokenizers, speedrun
from experiments.command_line import parse
from jaxlm.data.documents import open_corpus
from jaxlm.model import ModelConfig
from jaxlm.optimizers import OptimizerConfig
from jaxlm.progress import LiveTable
from jaxlm.reports.charts import Chart, unit_chart
from jaxlm.reports.comparison import ArmRecord, HeldOut, collect
from jaxlm.reports.page import page_html
from jaxlm.reports.svg import inline_svg
from jaxlm.reports.tables import arms_table, rows_table
from jaxlm.runs import Run, read_config, read_metrics, recorded_devices
from jaxlm.tokenizers import BPETokenizer, CharTokenizer, InputError, SentencePieceTokenizer, Tokenizer, load_tokenizer
from jaxlm.tokenizers.base import content_hash, save_array
from jaxlm.training import TrainConfig, load_trained, run_identity, stored_settings

EXAMPLES = int(os.environ.get("JAXLM_FUZZ_EXAMPLES", "0"))  # of an area; 0: a few
SECONDS, MEGABYTES = 10, 400  # of processor time, and added to the peak of memory, that one example may take

T = TypeVar("T")
Edit = tuple[list[int], str, str]


def fuzzed(share: float, few: int = 60) -> Callable[[Any], Any]:
    """Settings of a property that gets a share of its area's examples."""
    return settings(
        max_examples=max(1, round(share * EXAMPLES)) if EXAMPLES else few,
        database=None,
        deadline=None,
        derandomize=not EXAMPLES,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


# ---- one example: its bounds, and what may come out


class Log:
    """What the examples took; written to $JAXLM_FUZZ_LOG now and then."""

    examples = 0
    slowest = 0.0

    @classmethod
    def write(cls) -> None:
        if path := os.environ.get("JAXLM_FUZZ_LOG"):
            Path(path).write_text(json.dumps({"examples": cls.examples, "slowest": cls.slowest, "peak": peak()}))


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails what takes too long, or too much memory."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"an example took more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    started, memory = time.process_time(), peak()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        Log.examples += 1
        Log.slowest = max(Log.slowest, time.process_time() - started)
        if Log.examples % 200 == 0:
            Log.write()
    added = (peak() - memory) / 1e6
    assert added < MEGABYTES, f"an example took {added:.0f} MB"


def outcome(make: Callable[[], T]) -> T | None:
    """What comes out, or None if it is refused in one sentence."""
    try:
        return make()
    except InputError as error:
        sentence = str(error)
        assert sentence.isprintable(), repr(sentence[:1000])
        assert len(sentence) <= 500, f"{len(sentence)} characters: {sentence[:1000]}"
        assert sentence.endswith((".", "--help")), sentence
        return None


@pytest.fixture(scope="module", autouse=True)
def log() -> Iterator[None]:
    yield
    Log.write()


@pytest.fixture(scope="module")
def engine() -> None:
    """Compiles the BPE engine, which is no example's fault."""
    check_works(BPETokenizer([(97, 98)]))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


# ---- bytes and JSON, changed


INSERTED = [
    *(b"\x00", b'"', b"\\", b"}", b"]", b"{", b"[", b",", b":", b"\n", b"\r", b"\xff", b"\xc3", b"\xed\xa0\x80"),
    *(b"\\ud800", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"9" * 5_000, b"[" * 100_000),
    *(b"\x80" * 16, b"\x00" * 64, b"\xff\xff\xff\xff\x0f", b"\xe2\x80\xa8", b"\x1f\x8b\x08"),
]
byte_edits = st.lists(
    st.tuples(
        st.integers(0, 2**20),
        st.sampled_from(["flip", "cut", "remove", "insert", "repeat"]),
        st.one_of(st.sampled_from(INSERTED), st.binary(min_size=1, max_size=8)),
    ),
    max_size=4,
)


def changed_bytes(data: bytes, edits: Sequence[tuple[int, str, bytes]]) -> bytes:
    for place, action, inserted in edits:
        at = place % (len(data) + 1)
        if action == "flip":
            data = data[:at] + bytes(byte ^ 1 << place % 8 for byte in data[at : at + 1]) + data[at + 1 :]
        elif action == "cut":
            data = data[:at]
        elif action == "remove":
            data = data[:at] + data[at + len(inserted) :]
        elif action == "insert":
            data = data[:at] + inserted + data[at:]
        else:
            data = data[:at] + data[max(0, at - 100) : at] * 2 + data[at:]
    return data


DEEP = "[" * 50_000 + "]" * 50_000
VALUES = [
    *("null", "true", "false", "0", "1", "2", "-1", "255", "256", "300", "2147483648", "16777215", "16777216"),
    *(
        "9223372036854775808",
        "1" + "0" * 30,
        "9" * 4_000,
        "9" * 5_000,
        "0.5",
        "1.0",
        "-0.0",
        "1e999",
        "NaN",
        "-Infinity",
    ),
    *('""', '"a"', '"ab"', r'"\ud800"', r'"\u0000"', r'"\n"', '"é"', '"-1"', '"97 98"', '"97 98 6162"', '"Ġ a"'),
    *('"[/]"', '"gpt2"', '"constant"', '"' + "x" * 5_000 + '"', '"' + "a b " * 3_000 + '"', '"@deep@"'),
    *("[]", "{}", "[[]]", "[null]", "[1, 2]", '["a", "b"]', '{"a": 1}', '{"a": {"b": []}}', "[" * 400 + "]" * 400),
    *(r'"(a+)+b"', r'"(?R)"', r'"a{1000000000}"', r'"((a{9999}){9999}){9999}"', r'"(?:"', r'"|"', r'"\\p{L}+|\\P{L}+"'),
]
json_values = st.one_of(
    st.sampled_from(VALUES),
    st.one_of(st.integers(), st.integers(0, 400), st.floats(), st.text(st.characters(), max_size=12)).map(json.dumps),
)
json_edits = st.lists(
    st.tuples(
        st.lists(st.integers(0, 400), min_size=1, max_size=4),
        st.sampled_from(["replace", "remove", "repeat", "nudge", "twice"]),
        json_values,
    ),
    max_size=3,
)
any_json = st.recursive(
    st.sampled_from(VALUES),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda values: f"[{', '.join(values)}]"),
        st.dictionaries(
            st.sampled_from(["version", "hash", "kind", "identity", "text", "model", "merges", "step"]),
            inner,
            max_size=3,
        ).map(lambda items: "{" + ", ".join(f'"{key}": {value}' for key, value in items.items()) + "}"),
    ),
    max_leaves=5,
)


def changed_json(text: str, edits: Sequence[Edit]) -> str:
    """The JSON with some values replaced, taken away, repeated, moved a little, or given twice under one name."""
    data = json.loads(text)
    twice = []
    for path, action, value in edits:
        holder: Any = None
        key: Any = None
        node = data
        for step in path:
            if not isinstance(node, dict | list) or not node:
                break
            holder = node
            key = list(node)[step % len(node)] if isinstance(node, dict) else step % len(node)
            node = node[key]
        loaded = json.loads(value) if len(value) != 5_000 else value
        if holder is None:
            data = loaded
        elif action == "replace":
            holder[key] = loaded
        elif action == "remove":
            del holder[key]
        elif action == "repeat" and isinstance(holder, list):
            holder.insert(path[0] % (len(holder) + 1), node)
        elif action == "repeat":
            holder[f"{value[:20]}"] = node
        elif action == "nudge" and isinstance(node, int):
            holder[key] = node + (path[-1] % 3 or -1)
        elif action == "nudge" and isinstance(node, str) and node:
            at = path[-1] % len(node)
            holder[key] = node[:at] + (loaded if isinstance(loaded, str) else "9") + node[at + 1 :]
        elif action == "twice" and isinstance(data, dict):
            twice.append((list(data)[path[0] % len(data)] if data else "a", value))
    text = json.dumps(data)
    for name, value in twice:
        if len(text) > 2 and text[0] == "{":
            text = f"{text[:-1]}, {json.dumps(name)}: {value}}}"
    return text.replace('"@deep@"', DEEP)


# ---- the tokenizer loader


@cache
def saved(kind: str) -> str:
    tokenizer: Tokenizer = {
        "char": lambda: CharTokenizer("0123456789abcdef é\n☃"),
        "bpe": lambda: BPETokenizer([(97, 98), (256, 99), (0xC3, 0xA9)], special_tokens=("<|endoftext|>", "<a b>")),
        "imported": lambda: BPETokenizer(
            [(97, 98)], ids=[*range(1, 257), 300], whole={b" abba": 299}, special_tokens={"<a>": 0}, pattern=r"\w+|\W"
        ),
        "sentencepiece": lambda: sentencepiece("bpe"),
        "unigram": lambda: sentencepiece("unigram"),
    }[kind]()
    with tempfile.TemporaryDirectory() as path:
        tokenizer.save(path)
        return (Path(path) / "tokenizer.json").read_text("utf-8")


@cache
def sentencepiece(model_type: Any) -> SentencePieceTokenizer:
    texts = ["le chat noir, le chien gris\n", "\u2581\u2582é du chat. 12"] * 20
    return SentencePieceTokenizer.train(texts, 280, model_type=model_type)


KINDS = ["char", "bpe", "imported", "sentencepiece", "unigram"]


def with_hash(text: str) -> bytes:
    """The file with the hash that its content has, so that the content is what is looked at."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        data = json.loads(text)
        content = {key: value for key, value in data.items() if key not in ("version", "hash")}
        text = text.replace(str(data.get("hash")), content_hash(content))
    return text.encode("utf-8", "surrogatepass")


TEXTS = ["", "Ab 12  é\n\n☃ abba ", "\u2581\u2582.\u2582\u2582 <|endoftext|><a>", "abcabc" * 20 + "  ﬁ\t\r\n\x00 "]


def check_works(tokenizer: Tokenizer) -> None:
    """Texts come back, unless a pattern of one's own loses them, which is said."""
    assert 0 < tokenizer.vocab_size <= 2**24
    for text in TEXTS:
        ids = outcome(lambda text=text: tokenizer.encode(text, allowed_special="none"))
        if ids is None:
            assert isinstance(tokenizer, BPETokenizer) and tokenizer.pattern is not None
            continue
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths(ids).sum() == len(text.encode())
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


def check_loaded(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with bounded():
        tokenizer = outcome(lambda: load_tokenizer(folder))
        if tokenizer is not None:
            check_works(tokenizer)


@fuzzed(0.1)
@given(content=st.one_of(st.binary(max_size=200), any_json.map(str.encode)))
def test_tokenizer_of_anything(engine: None, folder: Path, content: bytes) -> None:
    check_loaded(folder, content.replace(b'"@deep@"', DEEP.encode()))


@fuzzed(0.4, 200)
@given(kind=st.sampled_from(KINDS), edits=json_edits, hashed=st.sampled_from([True, True, True, False]))
def test_tokenizer_file_with_other_values(
    engine: None, folder: Path, kind: str, edits: list[Edit], hashed: bool
) -> None:
    text = changed_json(saved(kind), edits)
    check_loaded(folder, with_hash(text) if hashed else text.encode("utf-8", "surrogatepass"))


@fuzzed(0.1)
@given(kind=st.sampled_from(KINDS), edits=byte_edits)
def test_tokenizer_file_with_other_bytes(engine: None, folder: Path, kind: str, edits: Any) -> None:
    check_loaded(folder, changed_bytes(saved(kind).encode(), edits))


@fuzzed(0.15)
@given(kind=st.sampled_from(["sentencepiece", "unigram"]), edits=byte_edits)
def test_tokenizer_model_of_sentencepiece_with_other_bytes(engine: None, folder: Path, kind: str, edits: Any) -> None:
    data = json.loads(saved(kind))
    data["model"] = base64.b64encode(changed_bytes(base64.b64decode(data["model"]), edits)).decode()
    check_loaded(folder, with_hash(json.dumps(data)))


@cache
def exported(name: str) -> str:
    tokenizer = BPETokenizer([(97, 98), (256, 99), (0xC3, 0xA9)], special_tokens=("<|endoftext|>", "<a>"))
    with tempfile.TemporaryDirectory() as path:
        file = Path(path) / "file"
        tokenizer.to_huggingface(file) if name == "huggingface" else tokenizer.to_tiktoken(file)
        return file.read_text("utf-8")


def check_imported(read: Callable[[Path], BPETokenizer], path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with bounded():
        tokenizer = outcome(lambda: read(path))
        if tokenizer is not None:
            check_works(tokenizer)


@fuzzed(0.15)
@given(edits=json_edits, bytes_=st.one_of(st.just([]), st.just([]), byte_edits))
def test_tokenizer_of_hugging_face(engine: None, folder: Path, edits: list[Edit], bytes_: Any) -> None:
    text = changed_json(exported("huggingface"), edits).encode("utf-8", "surrogatepass")
    check_imported(BPETokenizer.from_huggingface, folder / "hf.json", changed_bytes(text, bytes_))


ranks = st.lists(
    st.tuples(
        st.integers(0, 260),
        st.one_of(st.binary(max_size=4), st.sampled_from([b"ab", b"a" * 300, b"abab", b" 1"])),
        st.sampled_from([0, 97, 257, 258, 300, 2**24, 10**30, -1]),
    ),
    max_size=4,
)


@fuzzed(0.1)
@given(lines=ranks, edits=byte_edits)
def test_tokenizer_of_tiktoken(engine: None, folder: Path, lines: Any, edits: Any) -> None:
    content = exported("tiktoken").encode().splitlines()
    for place, token, rank in lines:
        content.insert(place % (len(content) + 1), base64.b64encode(token) + b" " + str(rank).encode())
    data = changed_bytes(b"\n".join(content), edits)
    check_imported(BPETokenizer.from_tiktoken, folder / "ranks.tiktoken", data)


# ---- configs, metrics, flags


@cache
def config_text() -> str:
    model = ModelConfig(vocab_size=20, width=16, num_heads=2, feed_forward_width=32)
    training = TrainConfig(steps=50, optimizer=OptimizerConfig(schedule="cosine", warmup_steps=None))
    identity = run_identity("ab12" * 16, {"kind": "char", "vocab_size": 20}, model, training)
    return json.dumps({
        "version": 1, "identity": json.loads(json.dumps(identity)), "tokenizer_hash": "0" * 64,
        "environment": {"devices": ["TFRT_CPU_0"], "cores": 2, "python": "3.11.7", "jax": "0.10.0"},
    })  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(folder: Path) -> Path:
    CharTokenizer("0123456789abcdef é").save(folder / "run" / "tokenizer")
    return folder / "run"


def check_config(path: Path, content: bytes) -> None:
    (path / "config.json").write_bytes(content)
    asked = json.loads(config_text())
    tokenizer = CharTokenizer("0123456789abcdef é")
    with bounded(), mock.patch("jaxlm.runs.console", Console(file=io.StringIO(), width=100)):
        config = outcome(lambda: read_config(path))
        outcome(lambda: recorded_devices(path))
        for identity in [asked["identity"], *([config["identity"]] if config else [])]:
            if (run := outcome(lambda identity=identity: Run(path, identity))) is not None:
                outcome(lambda run=run: run.start(tokenizer, asked["environment"]))
                run.close()
        assert outcome(lambda: load_trained(path)) is None  # there is no checkpoint
        if config and (found := outcome(lambda: stored_settings(config["identity"]))) is not None:
            model, training = found
            assert isinstance(model, ModelConfig) and isinstance(training, TrainConfig)
            json.dumps(run_identity("", {}, model, training))


@fuzzed(0.1)
@given(content=st.one_of(st.binary(max_size=200), any_json.map(str.encode)))
def test_config_of_anything(run_folder: Path, content: bytes) -> None:
    check_config(run_folder, content.replace(b'"@deep@"', DEEP.encode()))


@fuzzed(0.4, 150)
@given(edits=json_edits)
def test_config_with_other_values(run_folder: Path, edits: list[Edit]) -> None:
    check_config(run_folder, changed_json(config_text(), edits).encode())


@fuzzed(0.1)
@given(edits=byte_edits)
def test_config_with_other_bytes(run_folder: Path, edits: Any) -> None:
    check_config(run_folder, changed_bytes(config_text().encode(), edits))


METRICS = json.dumps({"step": 10, "tokens": 640, "bytes": 1280.5, "seconds": 0.5, "train/loss": 3.5, "grad_norm": None})


@fuzzed(0.15)
@given(edits=json_edits, bytes_=st.one_of(st.just([]), byte_edits))
def test_config_metrics(folder: Path, edits: list[Edit], bytes_: Any) -> None:
    lines = [METRICS.encode(), changed_json(METRICS, edits).encode(), METRICS.encode()]
    (folder / "metrics.jsonl").write_bytes(changed_bytes(b"\n".join(lines) + b"\n", bytes_))
    with bounded():
        for line in outcome(lambda: read_metrics(folder)) or []:
            assert isinstance(line["step"], int)
            assert all(value is None or isinstance(value, int | float) for value in line.values())


@fuzzed(0.1)
@given(edits=json_edits, bytes_=st.one_of(st.just([]), byte_edits))
def test_config_of_an_arm(run_folder: Path, edits: list[Edit], bytes_: Any) -> None:
    """The small files that a comparison leaves: why a run failed, its updates, which tokenizer an arm has."""
    records = {
        "failed.json": {"reason": "The loss is NaN."},
        "updates-in-5-seconds.json": {"updates": 12},
        "tokenizer.json": {"settings": {"family": "bpe", "vocab_size": 300}, "corpus": "ab", "seconds": 0.5},
    }
    (run_folder / "config.json").write_text(config_text())
    for name, record in records.items():
        content = changed_bytes(changed_json(json.dumps(record), edits).encode(), bytes_)
        (run_folder / name).write_bytes(content)
    survey: Any = mock.Mock(fingerprint="ab")
    corpus: Any = None
    spec = arms.Spec("bpe-300", "bpe", 300, (1, 16))
    with bounded():
        run = Run(run_folder, json.loads(config_text())["identity"])
        reason = outcome(lambda: run.failure("stop"))
        assert reason is None or isinstance(reason, str)
        updates = outcome(lambda: arms.kept_updates(run_folder, 5))
        assert updates is None or isinstance(updates, int)
        outcome(lambda: arms.make_tokenizer(spec, corpus, survey, run_folder))


PROGRAMS = {
    "char_lm": char_lm, "bpe_lm": bpe_lm, "bpe_tokenizer": bpe_tokenizer, "compare_tokenizers": compare_tokenizers,
    "speedrun": speedrun,
}  # fmt: skip
FLAGS = (
    "--preset --workdir --corpus --corpus-bytes --seed --steps --vocab-size --width --context --num-layers --num-heads "
    "--dropout --norm --learning-rate --warmup-steps --batch-size --split --tokenizers --vocab-sizes --sizes --budget "
    "--rate-factors --budget-size --seeds --together --schedule --decay-share --window --rope-base --explain --sample "
    "--top-k --dry-run -- -h --spike-factor --attention --qk-norm --logit-cap --compute-type --preset= --seed= - --x"
).split()
words = st.one_of(
    st.sampled_from(
        ["0", "1", "-1", "2", "64", "nan", "inf", "1e400", "0.5", "9" * 30, "9" * 5_000, "None", "True", ""]
    ),
    st.sampled_from(
        ["seed", "quick", "rope", "cosine", "muon", "bpe", "char", "2x128", "[bold]", "[/]", "\ud800", "\n"]
    ),
    st.text(st.characters(), max_size=10),
)


@fuzzed(0.05, 25)
@given(
    name=st.sampled_from([*PROGRAMS, *["bpe_tokenizer"] * 8]),
    words=st.lists(st.one_of(st.sampled_from(FLAGS), words), max_size=6),
)
def test_config_of_flags(name: str, words: list[str]) -> None:
    presets: Any = PROGRAMS[name].PRESETS
    with bounded(), contextlib.redirect_stdout(io.StringIO()):
        config = status = None
        try:
            config = outcome(lambda: parse(words, presets, f"python -m experiments.{name}"))
        except SystemExit as ended:  # help was asked for
            status = ended.code
        assert not status
        if config is not None:
            assert type(config) is type(next(iter(presets.values())))
            if isinstance(config, compare_tokenizers.Config):
                outcome(config.specs)


numbers = st.one_of(st.integers(-2, 3), st.integers(), st.sampled_from([10**30, 98, 300]))
reals = st.one_of(st.floats(), st.sampled_from([0.25, 1.0, 2.0]))


@fuzzed(0.1)
@given(
    tokenizers=st.lists(st.one_of(st.sampled_from([*arms.FAMILIES, ".", "..", "/", "~"]), words), max_size=3),
    vocab_sizes=st.lists(numbers, max_size=3),
    characters=numbers,
    sizes=st.lists(
        st.one_of(st.sampled_from(["2x128", "1x8", "9999x99999", "0x1", "²x1", "1x1\n"]), words), max_size=2
    ),
    seeds=numbers,
    budget=st.sampled_from(["bytes", "tokens", "flops", "seconds", "years"]),
    budget_size=st.none() | reals,
    rate_factors=st.lists(reals, max_size=3),
    rate_share=reals,
    together=st.none() | numbers,
)
def test_config_of_a_comparison(**fields: Any) -> None:
    with bounded():
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        config = outcome(lambda: compare_tokenizers.Config(**fields))
        for spec in (outcome(config.specs) or []) if config else []:
            assert spec.name and (spec.family in arms.FAMILIES or os.path.isdir(spec.family))


# ---- documents


JSONL = (
    b'{"text": "L\'\xc3\xa9t\xc3\xa9.", "id": 1}\n\n{"text": "\\u00e9 \\ud83d\\ude00 a"}\r\n'
    b'{"id": [1], "text": "fin\\n\\nfin"}'
)
TXT = "Un été.\r\nDeux.\n\n\n \t\nTrois \u2028 quatre.\r\rcinq\n\nsix".encode()


@cache
def parquet(version: int) -> bytes:
    texts = pa.array(["un été", None, "deux\n\nlignes", "☃" * 50] * 30)
    table = pa.table({"id": list(range(120)), "text": texts.dictionary_encode() if version % 2 else texts})
    file = io.BytesIO()
    pq.write_table(
        table,
        file,
        row_group_size=50,
        compression=("none", "snappy", "zstd")[version % 3],
        use_dictionary=version % 2 == 0,
    )
    return file.getvalue()


def check_documents(path: Path, content: bytes, spec: str | None = None) -> None:
    path.write_bytes(content)
    with bounded():
        outcome(lambda: all(document.encode() for document in open_corpus(spec or str(path)).documents()))


@fuzzed(0.2)
@given(suffix=st.sampled_from([".txt", ".jsonl", ".jsonl.gz", ".parquet"]), content=st.binary(max_size=300))
@example(suffix=".jsonl", content=b'{"text": "\\ud800"}')
@example(suffix=".jsonl", content=b'{"text": ' + b"[" * 100_000)
@example(suffix=".jsonl", content=b'{"text": "a", "n": ' + b"9" * 5_000 + b"}")
@example(suffix=".txt", content=b"a" * 5_000_000 + b"\n\n\x00\n\n" + b"\n" * 100_000)
@example(suffix=".jsonl.gz", content=b"\x1f\x8b")
def test_documents_of_anything(folder: Path, suffix: str, content: bytes) -> None:
    check_documents(folder / f"corpus{suffix}", content)


@fuzzed(0.2)
@given(suffix=st.sampled_from([".txt", ".jsonl"]), edits=byte_edits)
def test_documents_with_other_bytes(folder: Path, suffix: str, edits: Any) -> None:
    check_documents(folder / f"corpus{suffix}", changed_bytes(TXT if suffix == ".txt" else JSONL, edits))


@fuzzed(0.15)
@given(records=st.lists(any_json, max_size=3), end=st.sampled_from(["\n", "\r\n", "\r", "\u2028", "\x00", ""]))
def test_documents_of_any_json(folder: Path, records: list[str], end: str) -> None:
    content = end.join(['{"text": "a"}', *records, ""]).replace('"@deep@"', DEEP)
    check_documents(folder / "corpus.jsonl", content.encode())


@fuzzed(0.15)
@given(edits=byte_edits, inner=byte_edits, members=st.integers(1, 3))
def test_documents_in_gzip(folder: Path, edits: Any, inner: Any, members: int) -> None:
    content = gzip.compress(changed_bytes(JSONL + b"\n", inner), 1) * members
    check_documents(folder / "corpus.jsonl.gz", changed_bytes(content, edits))


@fuzzed(0.2)
@given(version=st.integers(0, 5), edits=byte_edits)
def test_documents_in_parquet(folder: Path, version: int, edits: Any) -> None:
    check_documents(folder / "corpus.parquet", changed_bytes(parquet(version), edits))


@fuzzed(0.1)
@given(spec=st.text(st.one_of(st.sampled_from("*?[]!./-~ a\x00\n\ud800{}"), st.characters()), max_size=12))
def test_documents_by_name(folder: Path, spec: str) -> None:
    inside = folder / "corpus"
    inside.mkdir(exist_ok=True)
    (inside / "a.txt").write_text("un")
    spec = spec.replace("..", ".")
    check_documents(inside / "a.txt", b"un", f"{inside}/{spec}")


@pytest.mark.parametrize("lines", [True, False])
def test_documents_of_a_gzip_bomb_are_streamed(folder: Path, lines: bool) -> None:
    """A gigabyte of lines goes through; one line of a gigabyte is refused, and not taken into memory."""
    with gzip.open(folder / "bomb.jsonl.gz", "wb", 1) as file:
        block = (b'{"text": "' + b"a" * 1000 + b'"}\n') * 1000 if lines else b" " * 1_000_000
        for _ in range(300):
            file.write(block)
    with bounded():
        found = outcome(lambda: sum(1 for _ in open_corpus(str(folder / "bomb.jsonl.gz")).documents()))
    assert found == (300_000 if lines else None)


# ---- the report


WORD = "placeholder"
NASTY = [
    *(
        "</script><script>alert(1)</script>",
        "<!--",
        "-->",
        "]]>",
        "<![CDATA[",
        '" onload="x',
        "' onerror='x",
        "</title>",
    ),
    *(
        "&amp;",
        "&#60;",
        "<svg/onload=x>",
        "</style>",
        "{{ 7*7 }}",
        "{% raw %}",
        "{#",
        "javascript:",
        "\u202e",
        "\u2066",
    ),
    *("\x00", "\x1b[31m", "\r", "\n", "\x0b", "\x85", "\ud800", "\udcff", "\ufffe", "\u2028", "a" * 3_000, "[bold]"),
    *("[/]", "[/bold]", "[link=x]", "\\", "\\[", "$x^2$", "$", ":smile:", "%s", "🇫🇷", "e\u0301" * 20, *"<>&\"'`= \t"),
]
report_text = st.one_of(
    st.lists(st.sampled_from(NASTY), min_size=1, max_size=4).map("".join),
    st.text(st.one_of(st.sampled_from("<>\"'&/$#\\{}%-![]=` "), st.characters()), min_size=1, max_size=20),
)


@cache
def report_json() -> str:
    """The results of a comparison in which everything that a user chooses has the word in it."""
    texts = [f"un {WORD} deux", "trois quatre"]
    tokenizer = CharTokenizer("0123456789abcdef untrsqiox")
    record = ArmRecord(
        WORD, WORD, "2x128", tokenizer, 0.1, 1000, 100, 16, 4, 10, 6000, 1.5, 1e-3, 1e-2,
        [(1.0, 1e-3, 2.0), (2.0, 2e-3, 2.5)], {}, None,
    )  # fmt: skip
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate((WORD, "other")):
            path = Path(folder) / name
            final = {"loss": 2.0, "bits_per_byte": 2.0 + place, "bits_per_byte_se": 0.1, "documents": 2}
            save_array(path / "final_nats.npy", pa.array([30.0 + place, 20.0]).to_numpy())
            line = {
                "step": 10,
                "tokens": 640,
                "bytes": 960,
                "seconds": 1.0,
                **{f"final/{k}": v for k, v in final.items()},
            }
            (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            (path / "samples.txt").write_text(f"--- step 10\n{WORD} et {WORD}\n")
            records.append(ArmRecord(**vars(record) | {"name": name, "runs": {0: path}}))
        records.append(ArmRecord(**vars(record) | {"name": f"failed {WORD}", "reason": f"Because of {WORD}"}))
        about = {
            "title": WORD, "command": f"python -m {WORD}", "git_commit": WORD, "versions": {WORD: WORD},
            "machine": {"devices": [WORD], "cores": 2}, "imported": [WORD], "budget": {"unit": "bytes", "size": 960.0},
            "context_unit": "bytes", "seeds": [0], "corpus": {
                "spec": WORD, "fingerprint": WORD, "documents": 9, "bytes": 99, "held_out_documents": 2,
                "held_out_bytes": 30,
            },
        }  # fmt: skip
        results = collect(records, HeldOut(texts), about, [(f"left {WORD}", f"Too small: {WORD}")])
    for arm in results["arms"][:2]:
        arm["longest_tokens"] = [WORD]
    results["paragraphs"][0]["tokens"][WORD][0]["text"] = WORD
    results |= {"measures": results["measures"][:2], "paragraphs": results["paragraphs"][:1]}  # more of the same
    return json.dumps(results)


def report(text: str) -> Any:
    """The results with a text in the place of the word."""
    return json.loads(report_json().replace(WORD, json.dumps(text, ensure_ascii=False)[1:-1]))


class Events(HTMLParser):
    """What a page is made of, in order: tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [(name, value) for name, value in attrs if name != "class"]))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(("end", tag))

    def handle_data(self, data: str) -> None:
        if self.found and isinstance(self.found[-1], str):
            self.found[-1] += data
        else:
            self.found.append(data)

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", data))

    def handle_pi(self, data: str) -> None:
        self.found.append(("pi", data))

    def unknown_decl(self, data: str) -> None:
        self.found.append(("unknown", data))


@cache
def expected_events() -> list[Any]:
    with mock.patch("jaxlm.reports.page.charts", return_value=[]):
        return Events(page_html(report(WORD))).found


def written(text: str) -> str:
    """As it can be written in UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


@fuzzed(0.4, 80)
@given(text=report_text)
def test_report_page(text: str) -> None:
    """The page with a text is the page with a word, but for the text in the word's place."""
    expected = expected_events()
    with bounded(), mock.patch("jaxlm.reports.page.charts", return_value=[]):
        found = Events(page_html(report(text))).found

    def put(event: Any) -> Any:
        if isinstance(event, str):
            return event.replace(WORD, written(text))
        return (
            (event[0], [(n, v and v.replace(WORD, written(text))) for n, v in event[1]]) if event[0] != "end" else event
        )

    assert found == [put(event) for event in expected]


@fuzzed(0.005, 5)
@given(text=report_text)
def test_report_chart(text: str) -> None:
    """Titles and words of a chart, and the names of arms in it, are text."""
    with bounded():
        chart = unit_chart(report(text))
        found = Events(inline_svg(Chart(chart.key, text, text, f"{text}.", chart.draw))).found
    kinds = ["text" if isinstance(event, str) else event[0] for event in found]
    tags = [event[0] for event in found if not isinstance(event, str)]
    assert set(tags) <= {"svg", "title", "desc", "g", "path", "defs", "use", "text", "clippath", "rect", "end"}
    assert not [
        name
        for event in found
        if isinstance(event[-1:], tuple) and event[0] != "end"
        for name, _ in event[1]
        if name.startswith("on")
    ]
    assert found[kinds.index("title") + 1] == text
    assert found[kinds.index("desc") + 1] == f"{text}."


@fuzzed(0.595, 60)
@given(text=report_text)
def test_report_at_the_terminal(text: str) -> None:
    """Names in tables are shown as they are, whatever rich would read in them."""
    with bounded():
        results = report(text)
        tables = [arms_table(results), rows_table((text, "b"), [(text, text)], text), LiveTable([text])._table()]
        for table in tables:
            console = Console(file=io.StringIO(), width=400, highlight=False, emoji=False, force_terminal=True)
            console.print(table)
            shown = console.file.getvalue()  # type: ignore[attr-defined]
            if text.isprintable() and len(text) < 60:
                assert text.strip() in shown
            assert "\x1b]8" not in shown, "a link"
