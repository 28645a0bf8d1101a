"""What TensorBoard shows of a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Board:
    """A file for TensorBoard, in which what an earlier one says of the step `first` and later ones counts no more.

    tensorboardX would write it in a thread. If that can't write it ends, and whoever has more to log waits for ever.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._flushed = folder, time.monotonic()
        with self._named():
            self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
            self._writer.write_event(
                Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START))
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars, and writes them every ten seconds."""
        with self._named():
            for name, value in values.items():
                self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > 10:
            self.flush()

    def flush(self) -> None:
        """Writes what it holds back."""
        with self._named():
            self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        with self._named():
            self._writer.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from None
