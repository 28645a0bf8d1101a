"""The run directory: what identifies the run, its metrics and its samples.

    config.json  tokenizer/  metrics.jsonl  tensorboard/  samples.txt  checkpoints/  final_nats.npy  lock

Rerunning the same command continues a run; a command with another identity is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import tensorboardX
from rich.console import Console

from jaxlm.tokenizers.base import InputError, Tokenizer, load_tokenizer, one_line, replacing, shown

CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, LOCK_FILE = "config.json", "metrics.jsonl", "samples.txt", "lock"
NATS_FILE = "final_nats.npy"  # of each held-out document, float64
FAILED_FILE = "failed.json"
_FORMAT = 1
_NAMED = 6  # fields, at most, that a message names
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")

console = Console(highlight=False, emoji=False)
if not console.is_terminal:
    console.width = 120  # tables that fit, in a file as on a screen


class Run:
    """A run directory. Opening it writes nothing; `start` does.

    Args:
      path: the directory, which need not exist.
      identity: what makes two runs the same: JSON-able, nested; equal identities on the same machine give equal bits.

    Raises:
      InputError: a run of another identity is there (the message names the fields that differ), its config can't be
        read, or the directory can't be written.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        self.exists = os.path.exists(self.path / CONFIG_FILE)
        if self.exists:
            found = read_config(self.path)["identity"]
            differing = [
                f"{_show(name)} ({_show(there)} there, {_show(asked)} asked for)"
                for name, there, asked in _differences(found, self.identity)
            ]
            if len(differing) > _NAMED:
                differing[_NAMED:] = [f"and {len(differing) - _NAMED} more fields"]
            if differing:
                raise InputError(
                    f"{self.path} holds another run, which differs in {', '.join(differing)}; choose another --workdir "
                    "or repeat its settings."
                )
        check_writable(self.path)
        self._board: tensorboardX.SummaryWriter | None = None
        self._lock: IO[str] | None = None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of an existing run; None for a new one."""
        return stored_tokenizer(self.path)

    def start(self, tokenizer: Tokenizer, environment: dict[str, Any]) -> None:
        """Writes the tokenizer and the config of a new run; a changed environment of an existing one is said.

        Raises:
          InputError: the run was made with another tokenizer, or another process is training it.
        """
        config = {"version": _FORMAT, "identity": self.identity, "environment": environment}
        if not self.exists:
            self.path.mkdir(parents=True, exist_ok=True)
            tokenizer.save(self.path / "tokenizer")
            config["tokenizer_hash"] = tokenizer.hash
            self._take_lock()
            write_json(self.path / CONFIG_FILE, config)
            self.exists = True
            return
        self._take_lock()
        stored = read_config(self.path)
        if stored["tokenizer_hash"] != tokenizer.hash:
            there = _show(stored["tokenizer_hash"][:12])
            raise InputError(
                f"The run in {self.path} was made with the tokenizer {there}, and this one is "
                f"{tokenizer.hash[:12]}; put the right one back or choose another --workdir."
            )
        for name, there, now in _differences(stored["environment"], environment):
            text = f"{_show(name)} was {_show(there)} and is {_show(now)} now: results may differ in the last bits."
            console.print(text, style="yellow", markup=False)

    def rewind(self, log_sizes: dict[str, int], step: int) -> None:
        """Cuts the logs back to the sizes (bytes) that they had at `step`, and opens them for what follows."""
        for name in (METRICS_FILE, SAMPLES_FILE):
            path = self.path / name
            if path.exists():
                os.truncate(path, min(path.stat().st_size, log_sizes.get(name, 0)))
        (self.path / FAILED_FILE).unlink(missing_ok=True)
        if self._board is not None:
            self._board.close()
        self._board = tensorboardX.SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def fail(self, reason: str) -> None:
        """Notes that the run can't be trained to its end, and why."""
        write_json(self.path / FAILED_FILE, {"reason": reason})

    @property
    def failure(self) -> str | None:
        """Why the run can't be trained to its end, as noted before; None if it wasn't."""
        return read_json(self.path / FAILED_FILE, reason=str)["reason"] if (self.path / FAILED_FILE).exists() else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out. Raises InputError if another one is in."""
        self._take_lock()
        try:
            yield
        finally:
            self.close()

    def log_sizes(self) -> dict[str, int]:
        """Bytes of each log, to be kept with a checkpoint."""
        paths = {name: self.path / name for name in (METRICS_FILE, SAMPLES_FILE)}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}

    def log(self, step: int, **values: float) -> None:
        """Appends one line to metrics.jsonl (null for a number that isn't finite) and the same to TensorBoard."""
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        _append(self.path / METRICS_FILE, json.dumps({"step": step, **line}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if name not in ("tokens", "bytes", "seconds") and math.isfinite(value):
                    self._board.add_scalar(name, value, step)

    def log_sample(self, step: int, text: str) -> None:
        """Appends a sample to samples.txt."""
        _append(self.path / SAMPLES_FILE, f"--- step {step}\n{text}\n")

    def close(self) -> None:
        """Writes what TensorBoard still holds back, and lets other processes have the directory."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

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
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        self._lock = file


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config of the run in a directory. Raises InputError if there is none, or it can't be read."""
    file = Path(path) / CONFIG_FILE
    try:
        config = json.loads(file.read_bytes())
        if config["version"] > _FORMAT:
            raise InputError(f"{file} was written by a newer jaxlm; use that one.")
        environment = config["environment"]
        if not (isinstance(config["identity"], dict) and isinstance(config["tokenizer_hash"], str)):
            raise TypeError
        if not all(isinstance(device, str) for device in environment.get("devices", [])):
            raise TypeError
        return config
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"There is no run in {path}; train one first, or give the directory of one.") from None
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file} can't be read ({error.strerror}); check its permissions.") from None
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        raise InputError(f"{file} is damaged; restore it, or choose another --workdir.") from None


def stored_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of the run in a directory; None if there is no run."""
    return load_tokenizer(Path(path) / "tokenizer") if os.path.exists(Path(path) / CONFIG_FILE) else None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut off is left out. Raises InputError for a damaged one."""
    file = Path(path) / METRICS_FILE
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [_metrics(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]


def _metrics(line: bytes, name: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise InputError(f"{name} is damaged; restore it, or choose another --workdir.")
    if not all(value is None or isinstance(value, int | float) for value in values.values()):
        raise InputError(f"{name} holds something else than numbers; restore it, or choose another --workdir.")
    return values


def recorded_devices(path: str | os.PathLike[str]) -> int | None:
    """How many CPU devices the run in a directory was begun on; None if there is no run, or on another backend."""
    if not os.path.exists(Path(path) / CONFIG_FILE):
        return None
    devices = read_config(path)["environment"].get("devices", [])
    return len(devices) if devices and all("cpu" in device.lower() for device in devices) else None


def environment(devices: list[str]) -> dict[str, Any]:
    """What equal bits depend on besides the identity: devices, cores and library versions."""
    return {
        "devices": devices,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


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


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Writes an array as a .npy file, whole or not at all."""
    with replacing(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def check_writable(path: Path) -> None:
    """Raises InputError unless the directory, or the first of its parents that exists, can be written."""
    existing = path.absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"The directory {path} can't be written; choose another --workdir.")


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
