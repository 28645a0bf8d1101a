"""Steps that go wrong: a loss, gradients or weights that aren't finite, or a loss that jumps.

Such a step leaves parameters and optimizer as they were; only the count of steps goes on. What happens then is a
policy: `stop` ends the run; `skip` goes on with the next step; `rewind` goes back to the last checkpoint, takes the
steps since then again, and passes over the batch that was at fault. Where the fault lay in the batch, the two end with
the same bits; where a device had damaged the state, only the second mends it.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Literal

Policy = Literal["stop", "skip", "rewind"]

_MOST_IN_A_ROW = 10  # steps at fault, one after the other, that no longer are accidents
_MEMORY = 100  # losses that a jump is measured against
_ENOUGH = 20  # of them, to tell a jump


class Rewind(Exception):
    """The run is to go back to its last checkpoint."""


class Faults:
    """The steps at fault of one run, and the loss from which on the next one is at fault.

    Args:
      policy: what to do about them.
      spike_factor: a loss over so many times the mean of the last 100 is a fault; None looks for no jumps.
    """

    def __init__(self, policy: Policy, spike_factor: float | None) -> None:
        self._policy, self._factor = policy, spike_factor
        self._losses: deque[tuple[int, float]] = deque(maxlen=_MEMORY + 1)
        self._passed_over: set[int] = set()  # since the run went back for them
        self.skipped: list[int] = []  # steps that left the model as it was

    def limit(self, step: int) -> float:
        """The highest loss with which a step may change the model: so many times the mean of the last 100.

        These end two steps before; the loss of the one before isn't known yet when a step begins.
        """
        if step in self._passed_over:
            return -math.inf
        known = [loss for earlier, loss in self._losses if earlier <= step - 2][-_MEMORY:]
        if self._factor is None or len(known) < _ENOUGH:
            return math.inf
        return self._factor * sum(known) / len(known)

    def good(self, step: int, loss: float) -> None:
        """Takes note of a step that changed the model."""
        if self._factor is not None:
            self._losses.append((step, loss))

    def skip(self, step: int) -> bool:
        """Takes note of a step that left the model as it was. False if the run can't go on.

        Raises:
          Rewind: the run has to go back first.
        """
        expected = step in self._passed_over
        self.skipped.append(step)
        if self._policy == "stop" and not expected:
            return False
        row = range(step - _MOST_IN_A_ROW + 1, step + 1)
        if set(row) <= {*self.skipped, *self._passed_over}:
            return False
        if self._policy == "rewind" and not expected:
            self._passed_over.add(step)
            raise Rewind
        return True

    def record(self) -> dict[str, Any]:
        """What is to be kept with a checkpoint, which is written while the run goes on; JSON-able."""
        return {"skipped": list(self.skipped), "passed_over": sorted(self._passed_over), "losses": list(self._losses)}

    def restore(self, record: dict[str, Any]) -> None:
        """As things were at a checkpoint, but for steps that the run has gone back for since then."""
        self.skipped = list(record.get("skipped", []))
        self._passed_over |= set(record.get("passed_over", []))
        self._losses.clear()
        self._losses.extend((step, loss) for step, loss in record.get("losses", []))
