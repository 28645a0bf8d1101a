"""Checkpoints through orbax: asynchronous, atomic, the last few and the best kept. What is known of orbax is here."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import logging
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxlm.tokenizers.base import InputError

State = TypeVar("State")

# orbax tells through absl's logger about every file that it writes, warns about defaults, and prints what it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)

_METRIC = "bits_per_byte"
_FORMAT = 1


class BrokenCheckpoint(Exception):
    """A checkpoint can't be read, and is no longer among those there are. The message is one sentence."""


class SaveFailed(Exception):
    """A checkpoint couldn't be written; those before it are as they were. The message is one sentence."""


class _Changed(Exception):
    """Something that can be read, and isn't what was saved."""


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint is a pytree of arrays and a JSON-able record beside it, with checksums of each array and of the record.
    It appears under its step only when it is whole. The latest `keep` are kept, and the one with the lowest bits per
    byte. One that turns out to be broken is moved to `broken_checkpoints`, beside the directory, never deleted; with
    `read_only` it is passed over, and nothing is changed.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2, read_only: bool = False) -> None:
        self._directory = Path(directory).absolute()
        self._broken = self._directory.with_name("broken_checkpoints")
        self._notices: list[str] = []
        self._view: tempfile.TemporaryDirectory[str] | None = None
        if read_only:
            # Links to what is there. Another process may be saving and deleting, and what is broken is for it to move.
            self._view = tempfile.TemporaryDirectory()
            for step in saved_steps(self._directory):
                (Path(self._view.name) / str(step)).symlink_to(self._directory / str(step))
            self._directory = Path(self._view.name)
        for step in sorted(saved_steps(self._directory)):
            if not _has_record(self._directory / str(step)):
                self._set_aside(step, "its record is damaged")
        try:
            self._checkpointer = _open(self._directory, keep, read_only)
        except ValueError:  # orbax reads the records of all checkpoints at once, and ends if one makes no sense to it
            for step in sorted(saved_steps(self._directory)):
                if not _opens(self._directory / str(step)):
                    self._set_aside(step, "its record is damaged")
            self._checkpointer = _open(self._directory, keep, read_only)

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints. Waits for a save in progress."""
        self.wait()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none. Waits for a save in progress."""
        return max(self.steps, default=None)

    @property
    def only_broken(self) -> bool:
        """Whether there were checkpoints, and all of them turned out to be broken."""
        return not self.steps and self.any_broken

    @property
    def any_broken(self) -> bool:
        """Whether one has been set aside, now or before."""
        return self._broken.is_dir() and any(self._broken.iterdir())

    def take_notices(self) -> list[str]:
        """What has been set aside since this was called last, a sentence each."""
        notices, self._notices = self._notices, []
        return notices

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which are to be trained again."""
        for later in self.steps:
            if later > step:
                self._checkpointer.delete(later)

    def save(self, step: int, state: Any, record: dict[str, Any], *, bits_per_byte: float | None = None) -> None:
        """Copies the state and writes it in the background.

        Raises:
          SaveFailed: it can't be written, or the one before it couldn't be.
        """
        self.wait()
        metrics = None if bits_per_byte is None else {_METRIC: bits_per_byte}
        sums = {"checksums": _checksums(state), "record_checksum": _record_checksum(record)}
        kept = {"format": _FORMAT, "record": record, **sums}
        with self._saving():
            self._checkpointer.save_async(step, state, metrics=metrics, custom_metadata=kept, force=True)

    def record(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of a step. For errors see `restore`."""
        kept = self._kept(step)
        return kept.get("record", kept)

    def restore(self, abstract_state: State, step: int) -> State:
        """The state of a step, laid out as `abstract_state` says.

        Raises:
          BrokenCheckpoint: it can't be read, or an array differs from what was saved. It has been set aside, so that
            the one before it is the newest now.
          InputError: it was written by a newer version of this code.
        """
        sums = self._kept(step).get("checksums")
        with self._setting_aside(step):
            state = self._checkpointer.load(step, abstract_state)
            changed = [
                name for name, found in _checksums(state).items() if sums is not None and sums.get(name) != found
            ]
            if changed:
                raise _Changed(f"the array {changed[0]} isn't what was saved")
        return state

    def _kept(self, step: int) -> dict[str, Any]:
        self.wait()
        with self._setting_aside(step):
            kept = self._checkpointer.metadata(step).custom_metadata
            assert isinstance(kept, dict)
            if kept.get("format", 0) > _FORMAT:
                raise InputError(f"{self._directory / str(step)} was written by a newer jaxlm; use that one.")
            # The first checkpoints kept the bare record, later ones record and checksums, and now the record's too.
            is_bare = "format" not in kept and "step" in kept
            whole = is_bare or {"record", "checksums"} <= kept.keys()
            found = _record_checksum(kept.get("record"))
            if not whole or kept.get("record_checksum", found) != found:
                raise _Changed("its record isn't what was saved")
            return kept

    @contextlib.contextmanager
    def _setting_aside(self, step: int) -> Iterator[None]:
        try:
            with _no_more_than_the_exception():
                yield
        except (InputError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and tensorstore raise all kinds for damaged files
            number = _error_number(error)
            if number is not None and number not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                raise OSError(number, os.strerror(number), str(self._directory / str(step))) from None
            told = self._set_aside(step, str(error) if isinstance(error, _Changed) else "its files are damaged")
            self._checkpointer.reload()
            raise BrokenCheckpoint(told) from None

    def wait(self) -> None:
        """Waits until all is written. Raises SaveFailed if it couldn't be."""
        with self._saving():
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits until all is written. Raises SaveFailed if it couldn't be."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            if self._view is not None:
                self._view.cleanup()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            number = _error_number(error)
            if number is None:
                raise
            raise SaveFailed(
                f"A checkpoint couldn't be written to {self._directory}: {os.strerror(number)}."
            ) from error

    def _set_aside(self, step: int, reason: str) -> str:
        if self._view is not None:
            link = self._directory / str(step)
            told = f"The checkpoint {os.readlink(link)} is broken ({reason}), and passed over."
            if link.exists():  # else it has been deleted in the meantime, as old ones are
                self._notices.append(told)
            link.unlink()
            return told
        self._broken.mkdir(exist_ok=True)
        names = (f"{step}" if count == 1 else f"{step}-{count}" for count in itertools.count(1))
        place = next(self._broken / name for name in names if not (self._broken / name).exists())
        (self._directory / str(step)).rename(place)
        self._notices.append(f"The checkpoint of step {step} is broken ({reason}); it is kept in {place}.")
        return self._notices[-1]


def saved_steps(directory: str | os.PathLike[str]) -> set[int]:
    """The steps that have a checkpoint in a directory, intact or not, without opening any."""
    folders = Path(directory).iterdir() if Path(directory).is_dir() else ()
    return {int(folder.name) for folder in folders if folder.name.isdecimal()}


def _open(directory: Path, keep: int, read_only: bool) -> ocp.training.Checkpointer:
    policies = ocp.training.preservation_policies
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics[_METRIC], reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    return ocp.training.Checkpointer(
        directory,
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        # What a killed process left half written; but a reader must not take it from one that is still writing.
        cleanup_tmp_directories=not read_only,
    )


def _opens(folder: Path) -> bool:
    """Whether orbax makes sense of the record of a single checkpoint."""
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / folder.name).symlink_to(folder)
        try:
            _open(Path(alone), 1, read_only=True).close()
        except ValueError:
            return False
        return True


def _has_record(folder: Path) -> bool:
    """Whether the record of a checkpoint can be read."""
    try:
        kept = json.loads((folder / "_CHECKPOINT_METADATA").read_bytes())["custom_metadata"]
        return isinstance(kept, dict) and ("record" in kept or "step" in kept)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError):
        return False


def _error_number(error: Exception) -> int | None:
    """What the system said; tensorstore's errors are ValueErrors with the number in their text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def _record_checksum(record: Any) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def _checksums(state: Any) -> dict[str, str]:
    """Type, shape and CRC-32 of each array, by its path in the tree."""
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.ascontiguousarray(leaf)
        sums[jax.tree_util.keystr(path)] = f"{array.dtype}{list(array.shape)}:{zlib.crc32(array.tobytes()):08x}"
    return sums


@contextlib.contextmanager
def _no_more_than_the_exception() -> Iterator[None]:
    """Orbax's readers that are given up for the error of another one print theirs when they are collected; not here."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except BaseException:
        gc.collect()
        raise
    finally:
        sys.unraisablehook = before


def abstract(state: State, sharding: jax.sharding.Sharding) -> State:
    """Shapes and types of a pytree of arrays, each with `sharding`: where it is to be restored to."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)
