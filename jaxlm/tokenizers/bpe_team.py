"""How two threads share single steps of a merge, which take microseconds, in step 3 of the BPE engine.

To hand such a step to another thread by way of Python would take longer than the step. So the helper looks at a board
all the time, which takes a core, and the leader offers it one share of a step there while doing the other one. The
leader takes the share back if the helper hasn't come by then. So it waits for work that was begun, never for a thread
to begin. Nothing in a step can raise, so what was begun is finished.
"""

from __future__ import annotations

import platform

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from jaxlm.machine_code import inlined

# The board's rows, each a cache line of its own: the number of the step that has a share on offer (0: none, -1: there
# will be no more); that of the step whose share the helper did last; what kind of step is on offer, and the number of
# the last that was. No number comes twice, so nobody can take one step's share for another's.
OFFERED, DONE, KIND = range(3)
_NO_MORE = -1


def _place(target, builder, signature, arguments):
    board = target.make_array(signature.args[0])(target, builder, arguments[0])
    row = [arguments[1], ir.Constant(ir.IntType(64), 0)]
    return cgutils.get_item_pointer(target, builder, signature.args[0], board, row)


@intrinsic
def _read(context, board, row):
    """`board[row, 0]`, and then all that was written before it was."""

    def generate(target, builder, signature, arguments):
        return builder.load_atomic(_place(target, builder, signature, arguments), "acquire", 8)

    return types.int64(board, types.intp), generate


@intrinsic
def _write(context, board, row, value):
    """`board[row, 0] = value`, after all that is written before."""

    def generate(target, builder, signature, arguments):
        builder.store_atomic(arguments[2], _place(target, builder, signature, arguments), "release", 8)
        return target.get_dummy_value()

    return types.void(board, types.intp, types.int64), generate


@intrinsic
def _take(context, board, row, value):
    """Makes 0 of `board[row, 0]` if it is `value`; whether it was. Of two threads that try, one can."""

    def generate(target, builder, signature, arguments):
        zero = ir.Constant(ir.IntType(64), 0)
        place = _place(target, builder, signature, arguments)
        return builder.extract_value(builder.cmpxchg(place, arguments[2], zero, "acq_rel", "acquire"), 1)

    return types.boolean(board, types.intp, types.int64), generate


@intrinsic
def _pause(context):
    """Tells the processor that this thread only waits."""
    name = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}.get(platform.machine())

    def generate(target, builder, signature, arguments):
        if name:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return target.get_dummy_value()

    return types.void(), generate


def open_board(board: npt.NDArray[np.int64]) -> None:
    """Before a helper comes."""
    board[OFFERED, 0] = 0


def close_board(board: npt.NDArray[np.int64]) -> None:
    """Sends the helper home, and any that comes later."""
    board[OFFERED, 0] = _NO_MORE


@inlined
def offer(board, kind, is_shared):
    """The leader offers the second share of a step, if it has two."""
    if is_shared:
        board[KIND, 1] += 1
        board[KIND, 0] = kind
        _write(board, OFFERED, board[KIND, 1])


@inlined
def take_back(board):
    """Whether the leader has to do the share that it offered; if not, the helper has done it."""
    if _take(board, OFFERED, board[KIND, 1]):
        return True
    while _read(board, DONE) != board[KIND, 1]:
        _pause()
    return False


@inlined
def wait_for_offer(board):
    """The helper waits for a share; its step's number, or 0 if there will be none."""
    while True:
        step = _read(board, OFFERED)
        if step == _NO_MORE:
            return 0
        if step and _take(board, OFFERED, step):
            return step
        _pause()


@inlined
def report(board, step):
    """The helper has done its share of this step."""
    _write(board, DONE, step)
