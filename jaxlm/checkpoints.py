"""Checkpoints through orbax: asynchronous, atomic, the last few and the best kept. What is known of orbax is here."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

State = TypeVar("State")

# orbax tells through absl's logger about every file that it writes, and warns about defaults.
logging.getLogger("absl").setLevel(logging.ERROR)

_METRIC = "bits_per_byte"


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint is a pytree of arrays and a JSON-able record beside it. It appears under its step only when it is
    whole. The latest `keep` are kept, and the one with the lowest bits per byte.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2, read_only: bool = False) -> None:
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[_METRIC], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self._checkpointer = ocp.training.Checkpointer(
            Path(directory).absolute(),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            # What a killed process left half written; but a reader must not take it from one that is still writing.
            cleanup_tmp_directories=not read_only,
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none. Waits for a save in progress."""
        self._checkpointer.wait()
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints. Waits for a save in progress."""
        self._checkpointer.wait()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which are to be trained again."""
        for later in self.steps:
            if later > step:
                self._checkpointer.delete(later)

    def save(self, step: int, state: Any, record: dict[str, Any], *, bits_per_byte: float | None = None) -> None:
        """Copies the state and writes it in the background. An error of the save before is raised here."""
        self._checkpointer.wait()
        metrics = None if bits_per_byte is None else {_METRIC: bits_per_byte}
        self._checkpointer.save_async(step, state, metrics=metrics, custom_metadata=record, force=True)

    def restore(self, abstract_state: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """The checkpoint of a step, or the newest: its state, laid out as `abstract_state` says, and its record."""
        step = self.latest_step if step is None else step
        state = self._checkpointer.load(step, abstract_state)
        record = self._checkpointer.metadata(step).custom_metadata
        assert isinstance(record, dict)
        return state, record

    def close(self) -> None:
        """Waits until all is written."""
        self._checkpointer.wait()
        self._checkpointer.close()


def abstract(state: State, sharding: jax.sharding.Sharding) -> State:
    """Shapes and types of a pytree of arrays, each with `sharding`: where it is to be restored to."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)
