"""The run directory: what identifies the run, its metrics and its samples.

    config.json  tokenizer/  metrics.jsonl  tensorboard/  samples.txt  checkpoints/  final_nats.npy  lock

and, where something went wrong, broken_checkpoints/ and failed.json.
Rerunning the same command continues a run; a command with another identity is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import subprocess
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal, Self

from rich.console import Console

from jaxlm.board import Board
from jaxlm.tokenizers.base import InputError, Tokenizer, load_tokenizer, one_line, replacing, shown

CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, LOCK_FILE = "config.json", "metrics.jsonl", "samples.txt", "lock"
NATS_FILE = "final_nats.npy"  # of each held-out document, float64
FAILED_FILE = "failed.json"
_FORMAT = 1
_FLAGS = {"optimizer.schedule_steps": "steps"}  # fields that have another name there
_NAMED = 6  # fields, at most, that a message names
_CONFIG_TYPES = {"version": int, "identity": dict, "environment": dict, "tokenizer_hash": str}
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")

Acceptable = Literal["corpus", "tokenizer"]

console = Console(highlight=False, emoji=False)
if not console.is_terminal:
    console.width = 120  # tables that fit, in a file as on a screen


class RunFailed(RuntimeError):
    """The run can't go on. The message is one sentence: what happened, and what is left."""


class RunInterrupted(Exception):
    """A signal stopped the run after it was saved."""


class Run:
    """A run directory. Opening it writes nothing; `start` does.

    Args:
      path: the directory, which need not exist.
      identity: what makes two runs the same: JSON-able, nested; equal ones give equal bits on the same machine, if
        settings beside it are equal too.
      defaults: what stands for a part of the identity of a run from before there was that part.
      accept: what may be another than it was when the run began; None if there is no choice.

    Raises:
      InputError: a run of another identity is there (the message names the fields that differ), its config can't be
        read, or the directory can't be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: dict[str, Any],
        *,
        defaults: Mapping[str, dict[str, Any]] | None = None,
        accept: Collection[Acceptable] | None = None,
    ) -> None:
        check_writable(path)
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        self._defaults, self._accept, self._choice = defaults or {}, accept or (), accept is not None
        self.exists = os.path.exists(self.path / CONFIG_FILE)
        self.description: dict[str, Any] = {}  # of a started run: its identity, tokenizer and environment
        if self.exists:
            self._check_identity(read_config(self.path)["identity"], f"{self.path} holds another run, which")
        _check_kinds(self.path)
        self._board: Board | None = None
        self._lock: IO[str] | None = None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of an existing run; None for a new one, or if one with other settings was accepted."""
        if not self.exists or read_config(self.path)["identity"].get("tokenizer") != self.identity.get("tokenizer"):
            return None
        return stored_tokenizer(self.path)

    def start(self, tokenizer: Tokenizer, environment: dict[str, Any]) -> None:
        """Takes the directory, and writes the tokenizer and the config of a new run; a changed environment is said.

        Raises:
          InputError: the run was made with another tokenizer, or another process is training it or began it meanwhile.
        """
        self.description = {"identity": self.identity, "tokenizer_hash": tokenizer.hash, "environment": environment}
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if not os.path.exists(self.path / CONFIG_FILE):
            tokenizer.save(self.path / "tokenizer")
            self._write_config()
            self.exists = True
            return
        stored = read_config(self.path)
        if not self.exists:
            self._check_identity(stored["identity"], f"{self.path} was taken meanwhile by another run, which")
            self.exists = True
        self._check_tokenizer(stored["tokenizer_hash"], f"The run in {self.path}")
        for name, there, now in _differences(stored["environment"], environment):
            if name != "git_commit" or there is not None:
                text = f"{_show(name)} was {_show(there)} and is {_show(now)} now: results may differ in the last bits."
                console.print(text, style="yellow", markup=False)

    def accepted(self, tokenizer: Tokenizer) -> list[str]:
        """What is another than it was, and was accepted to be."""
        stored = read_config(self.path)
        changed = {name: stored["identity"].get(name) != self.identity.get(name) for name in ("corpus", "tokenizer")}
        changed["tokenizer"] |= stored["tokenizer_hash"] != tokenizer.hash
        return [name for name, different in changed.items() if different]

    def adopt(self, tokenizer: Tokenizer) -> None:
        """Writes what was accepted."""
        if names := self.accepted(tokenizer):
            tokenizer.save(self.path / "tokenizer")
            self._write_config()
            console.print(f"Going on with another {' and another '.join(names)}.", style="yellow")

    def check_description(self, found: dict[str, Any], step: int) -> None:
        """Raises InputError if a checkpoint has the description of another run, from which it was copied."""
        this = f"The checkpoint of step {step} in {self.path}"
        self._check_identity(found["identity"], f"{this} is of another run, which")
        self._check_tokenizer(found["tokenizer_hash"], this)

    def _check_identity(self, found: dict[str, Any], subject: str) -> None:
        parts = {part: there for part, there in found.items() if isinstance(there, dict)}
        found = {**found, **{part: {**self._defaults.get(part, {}), **there} for part, there in parts.items()}}
        differing = [
            (name, f"{_show(_FLAGS.get(name, name))} ({_show(there)} there, {_show(asked)} asked for)")
            for name, there, asked in _differences(found, self.identity)
            if name.split(".")[0] not in self._accept
        ]
        if not differing:
            return
        texts = [text for _, text in differing[:_NAMED]]
        if len(differing) > _NAMED:
            texts.append(f"and {len(differing) - _NAMED} more fields")
        names = {name.split(".")[0] for name, _ in differing}
        mend = "choose another --workdir or repeat its settings"
        if names <= {"corpus", "tokenizer"}:
            mend += self._override(names)
        raise InputError(f"{subject} differs in {', '.join(texts)}; {mend}.")

    def _check_tokenizer(self, found: str, subject: str) -> None:
        now = self.description["tokenizer_hash"]
        if found != now and "tokenizer" not in self._accept:
            raise InputError(
                f"{subject} was made with the tokenizer {_show(found[:12])}, and this one is {now[:12]}; put the right "
                f"one back or choose another --workdir{self._override({'tokenizer'})}."
            )

    def _override(self, names: set[str]) -> str:
        flags = " ".join(sorted({*names, *self._accept}))
        return f", or go on with the other one by --accept {flags}" if self._choice else ""

    def _write_config(self) -> None:
        write_json(self.path / CONFIG_FILE, {"version": _FORMAT, **self.description})

    def rewind(self, log_sizes: dict[str, int], step: int) -> None:
        """Cuts the logs back to the sizes (bytes) that they had at `step`, and opens them for what follows."""
        for name in (METRICS_FILE, SAMPLES_FILE):
            path = self.path / name
            if path.exists():
                os.truncate(path, min(path.stat().st_size, log_sizes.get(name, 0)))
        (self.path / FAILED_FILE).unlink(missing_ok=True)
        if self._board is not None:
            self._board.close()
        self._board = Board(self.path / "tensorboard", step + 1)

    def fail(self, reason: str, policy: str) -> None:
        """Notes that the run can't be trained to its end under a policy for faults, and why."""
        write_json(self.path / FAILED_FILE, {"reason": reason, "policy": policy})

    def failure(self, policy: str) -> str | None:
        """Why the run can't be trained to its end under that policy, as noted before; None if it wasn't."""
        if not (self.path / FAILED_FILE).exists():
            return None
        noted = read_json(self.path / FAILED_FILE, reason=str)
        return noted["reason"] if noted.get("policy", policy) == policy else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out. Raises InputError if another one is in."""
        self._take_lock()
        try:
            yield
        finally:
            self.close()

    def check_logs(self, log_sizes: dict[str, int]) -> None:
        """Raises InputError if the part of the metrics that a checkpoint needs is gone or damaged."""
        file, size = self.path / METRICS_FILE, log_sizes.get(METRICS_FILE, 0)
        if not size:
            return
        data = file.read_bytes()[:size] if file.exists() else b""
        if len(data) < size or len(_metrics(file, size)) < data.count(b"\n") or not data.endswith(b"\n"):
            raise InputError(f"{file} is damaged; restore it, or choose another --workdir.")

    def log_sizes(self) -> dict[str, int]:
        """Bytes of each log, to be kept with a checkpoint; so many are on the disk, whatever happens to the power.

        What TensorBoard holds back is written.
        """
        if self._board is not None:
            self._board.flush()
        sizes = dict.fromkeys((METRICS_FILE, SAMPLES_FILE), 0)
        for name in sizes:
            path = self.path / name
            try:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                sizes[name] = path.stat().st_size
            except FileNotFoundError:
                continue
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
        return sizes

    def log(self, step: int, **values: float) -> None:
        """Appends one line to metrics.jsonl (null for a number that isn't finite); in training, to TensorBoard too."""
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        _append(self.path / METRICS_FILE, json.dumps({"step": step, **line}) + "\n")
        if self._board is not None:
            plots = {name: value for name, value in values.items() if name not in ("tokens", "bytes", "seconds")}
            self._board.log(step, {name: value for name, value in plots.items() if math.isfinite(value)})

    def log_sample(self, step: int, text: str) -> None:
        """Appends a sample to samples.txt."""
        _append(self.path / SAMPLES_FILE, f"--- step {step}\n{text}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Of what failed, the first is told; the disk that was full then may be so still.
        with contextlib.suppress(*[] if kind is None else [OSError]):
            self.close()

    def close(self) -> None:
        """Writes what TensorBoard still holds back, and lets other processes have the directory."""
        board, lock = self._board, self._lock
        self._board = self._lock = None
        try:
            if board is not None:
                board.close()
        finally:
            if lock is not None:
                lock.close()

    def _take_lock(self) -> None:
        # The lock goes with the process, however it ends; a file that merely exists would outlive a killed one.
        file = (self.path / LOCK_FILE).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise InputError(
                f"Another process ({holder}) is training {self.path}; wait for it, or choose another --workdir."
            ) from None
        self._lock = file
        file.truncate(0)
        _append(self.path / LOCK_FILE, f"process {os.getpid()} on {platform.node()}\n")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config of the run in a directory. Raises InputError if there is none, or it can't be read."""
    file = Path(path) / CONFIG_FILE
    try:
        config = json.loads(file.read_bytes())
        if any(type(config[name]) is not kind for name, kind in _CONFIG_TYPES.items()):
            raise TypeError
        if config["version"] > _FORMAT:
            raise InputError(f"{file} was written by a newer jaxlm; use that one.")
        return config
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"There is no run in {path}; train one first, or give the directory of one.") from None
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, RecursionError, IsADirectoryError):
        raise InputError(f"{file} is damaged; restore it, or choose another --workdir.") from None


def stored_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of the run in a directory; None if there is no run."""
    return load_tokenizer(Path(path) / "tokenizer") if os.path.exists(Path(path) / CONFIG_FILE) else None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; last ones that were cut off, or became nonsense when the power went, are left out.

    Raises:
      InputError: a line before a whole one is damaged, or holds something else than numbers.
    """
    file = Path(path) / METRICS_FILE
    return _metrics(file) if file.exists() else []


def _metrics(file: Path, size: int = -1) -> list[dict[str, Any]]:
    """The lines of a file, or of its first bytes; for the rest see `read_metrics`."""
    with file.open("rb") as opened:
        records = [_record(line) for line in opened.read(size).split(b"\n")[:-1]]
    while records and not records[-1]:
        records.pop()
    if not all(records):
        raise InputError(f"{file}, line {records.index({}) + 1} is damaged; restore it, or choose another --workdir.")
    return records


def _record(line: bytes) -> dict[str, Any]:
    """A line of the metrics; empty if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return {}
    return record if all(value is None or isinstance(value, int | float) for value in record.values()) else {}


def recorded_devices(path: str | os.PathLike[str]) -> int | None:
    """How many CPU devices the run in a directory was begun on; None if there is no run, or on another backend."""
    if not os.path.exists(Path(path) / CONFIG_FILE):
        return None
    devices = read_config(path)["environment"].get("devices")
    if not isinstance(devices, list) or not devices:
        return None
    return len(devices) if all("cpu" in str(device).lower() for device in devices) else None


def environment(devices: list[str]) -> dict[str, Any]:
    """What equal bits depend on besides the identity: devices, cores, library versions, and this code."""
    return {
        "devices": devices,
        "cores": os.cpu_count(),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def git_commit() -> str | None:
    """The commit of the code, with "+" if it was changed since; None outside a clone."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


# ---- files


def _append(path: Path, text: str) -> None:
    """Appends lines, all or none of them."""
    data = text.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, whole or not at all. Half a surrogate pair, as from a path that isn't UTF-8, is escaped."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))


def read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """What `write_json` wrote. Raises InputError for a file that is damaged, or lacks a field of one of these kinds."""
    try:
        data = json.loads(path.read_bytes())
        if not all(isinstance(data[name], kind) for name, kind in kinds.items()):
            raise ValueError
        return data
    except (ValueError, LookupError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged; restore it, or choose another --workdir.") from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises InputError unless the directory, or the first of its parents that exists, can be written."""
    if not os.fspath(path).strip():
        raise InputError("The workdir is an empty name; give the --workdir that the results are to be in.")
    existing = Path(path).absolute()
    reason = ""
    try:
        # Checkpoints couldn't be written to other names, or not be found again: they are looked for by a pattern.
        os.fspath(existing).encode()
        if set("[\\") & set(os.fspath(existing)):
            raise OSError(errno.EINVAL, "a name with [ or a backslash is no place for checkpoints")
        while not _is_there(existing):
            existing = existing.parent
        if os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK):
            return
    except UnicodeEncodeError:
        reason = " (its name is not UTF-8)"
    except OSError as error:
        reason = f" ({error.strerror})"
    raise InputError(f"The directory {path} can't be written{reason}; choose another --workdir.")


def _is_there(path: Path) -> bool:
    """Whether there is anything, a link to nothing too. Raises OSError if that can't be known."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _check_kinds(path: Path) -> None:
    """Raises InputError if there is a file in the place of one of a run's folders, or the other way round."""
    for names, kind, is_other in (
        (("tokenizer", "tensorboard", "checkpoints"), "folder", os.path.isfile),
        ((METRICS_FILE, SAMPLES_FILE, LOCK_FILE, NATS_FILE, FAILED_FILE), "file", os.path.isdir),
    ):
        for name in names:
            if is_other(path / name):
                raise InputError(f"{path / name} is no {kind}; move it away, or choose another --workdir.")


def _differences(there: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*there, *asked}):
        left, right = there.get(name), asked.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{prefix}{name}.")
        elif left != right:
            yield f"{prefix}{name}", left, right


def _show(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and value.isalnum():
        return f"{value[:12]}..."
    return value if isinstance(value, str) and len(value) < 40 and value.isprintable() else one_line(shown(value), 40)
