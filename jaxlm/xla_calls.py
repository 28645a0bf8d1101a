"""Kernels as operations of XLA on a CPU, by its foreign function interface (jaxlib's `xla/ffi/api/c_api.h`).

XLA calls a handler with a frame of 64-bit words that point to the operands, results and attributes.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from jaxlm.machine_code import expanded, function_pointer

# Words of XLA_FFI_CallFrame, and of what it points to.
_EXTENSION, _OPERANDS, _RESULTS, _ATTRIBUTES = 1, 9, 14, 20
_BUFFER_DATA, _BUFFER_RANK, _BUFFER_DIMENSIONS = 3, 4, 5
_SCALAR_VALUE = 1
_EXTENSION_TYPE, _IS_METADATA = 1, 1
_METADATA, _METADATA_VERSION = 3, 3

_WORDS: Any = types.CPointer(types.int64)  # type: ignore[attr-defined]


def _api_version() -> int:
    """Minor and major version of the interface as one word, as this jaxlib's header has them."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    major, minor = (int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0]) for part in ("MAJOR", "MINOR"))
    return minor << 32 | major


_API_VERSION = _api_version()


@intrinsic
def _words(_, address):
    """What an address points to, as 64-bit words."""

    def generate(target, builder, signature, arguments):
        return builder.inttoptr(arguments[0], target.get_value_type(_WORDS))

    return _WORDS(types.int64), generate


def _array_of(element: types.Type) -> Any:
    @intrinsic
    def array(_, address, size):
        kind = types.Array(element, 1, "C")

        def generate(target, builder, signature, arguments):
            address, size = arguments
            array, bytes_each = target.make_array(kind)(target, builder), target.get_constant(types.intp, 4)
            pointer = builder.inttoptr(address, target.get_value_type(types.CPointer(element)))
            populate_array(array, pointer, [size], [bytes_each], bytes_each, None)
            return array._getvalue()

        return kind(types.int64, types.int64), generate

    return array


_floats, _uints = _array_of(types.float32), _array_of(types.uint32)


@expanded
def _buffer(frame, kind, index):
    return _words(_words(frame[kind])[index])


@expanded
def dimension(frame, operand, axis):
    """The length of an axis of an operand."""
    return _words(_buffer(frame, _OPERANDS, operand)[_BUFFER_DIMENSIONS])[axis]


@expanded
def _size(buffer):
    size = 1
    for axis in range(buffer[_BUFFER_RANK]):
        size *= _words(buffer[_BUFFER_DIMENSIONS])[axis]
    return size


@expanded
def operand(frame, index):
    """The float32 numbers of an operand, whatever its shape."""
    buffer = _buffer(frame, _OPERANDS, index)
    return _floats(buffer[_BUFFER_DATA], _size(buffer))


@expanded
def operand_of_uints(frame, index):
    """The 32-bit integers of an operand."""
    buffer = _buffer(frame, _OPERANDS, index)
    return _uints(buffer[_BUFFER_DATA], _size(buffer))


@expanded
def result(frame, index):
    """The float32 numbers of a result, to be written."""
    buffer = _buffer(frame, _RESULTS, index)
    return _floats(buffer[_BUFFER_DATA], _size(buffer))


@expanded
def result_of_uints(frame, index):
    """The 32-bit integers of a result."""
    buffer = _buffer(frame, _RESULTS, index)
    return _uints(buffer[_BUFFER_DATA], _size(buffer))


@expanded
def integer(frame, index):
    """An int64 attribute. They are in the order of their names."""
    return _words(_words(_words(frame[_ATTRIBUTES])[index])[_SCALAR_VALUE])[0]


@expanded
def number(frame, index):
    """A float32 attribute."""
    return _floats(_words(_words(frame[_ATTRIBUTES])[index])[_SCALAR_VALUE], 1)[0]


@expanded
def is_question(frame):
    """Whether XLA only asks for the version of the interface, which this answers then."""
    if frame[_EXTENSION] == 0 or _words(frame[_EXTENSION])[_EXTENSION_TYPE] & 0xFFFFFFFF != _IS_METADATA:
        return False
    _words(_words(frame[_EXTENSION])[_METADATA])[_METADATA_VERSION] = _API_VERSION
    return True


def register(name: str, handler: Callable[[Any], int]) -> None:
    """Makes a kernel, which takes a frame and returns 0, the target of `jax.ffi.ffi_call` of this name."""
    pointer = ctypes.c_void_p(function_pointer(handler, types.int64(_WORDS)))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(pointer), platform="cpu")
