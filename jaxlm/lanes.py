"""Several float32 numbers at once: vectors that live in a register of the processor, for kernels.

A vector has LANES numbers, floats or 32-bit unsigned integers, and knows `+ - * / ^ << >>` between two of its kind. `<`
and `<=` give a vector of truths for `where`. Whatever is done is done to each lane, in the order that is written down.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, overload, register_model

from jaxlm.machine_code import expanded

_features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
LANES = 16 if "+avx512f" in _features else 8  # a register of AVX-512 or of AVX2; two of NEON's

HAS_PAIRS = LANES == 16 and "+avx512bf16" in _features  # products of bfloat16, two at a time

_ELEMENTS = {"float": ir.FloatType(), "uint": ir.IntType(32), "truth": ir.IntType(1)}
_INDEX = ir.IntType(32)


class _Vector(types.Type):
    def __init__(self, element: str) -> None:
        self.element, self.llvm = element, ir.VectorType(_ELEMENTS[element], LANES)
        super().__init__(f"{element} x {LANES}")


_FLOATS, _UINTS, _TRUTHS = (_Vector(element) for element in _ELEMENTS)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


def _operator(symbol: Callable[..., Any], **instructions: str) -> None:
    """Gives vectors an operator: the name of the instruction for each kind of element."""

    @intrinsic
    def apply(_, a, b):
        instruction = instructions[a.element]

        def generate(target, builder, signature, arguments):
            if instruction in ("<", "<="):
                compare = builder.fcmp_ordered if a == _FLOATS else builder.icmp_unsigned
                return compare(instruction, *arguments)
            return getattr(builder, instruction)(*arguments)

        return (_TRUTHS if instruction in ("<", "<=") else a)(a, b), generate

    @overload(symbol)
    def implement(a, b):
        if isinstance(a, _Vector) and a == b and a.element in instructions:
            return lambda a, b: apply(a, b)
        return None


_operator(operator.add, float="fadd", uint="add")
_operator(operator.sub, float="fsub", uint="sub")
_operator(operator.mul, float="fmul", uint="mul")
_operator(operator.truediv, float="fdiv")
_operator(operator.xor, uint="xor")
_operator(operator.lshift, uint="shl")
_operator(operator.rshift, uint="lshr")
_operator(operator.lt, float="<", uint="<")
_operator(operator.le, float="<=", uint="<=")


def _pointer(target, builder, kind, array, index):
    return builder.gep(target.make_array(kind)(target, builder, array).data, [index])


def _spread(builder, number, kind):
    """The number in each lane."""
    nothing = ir.Constant(kind.llvm, ir.Undefined)
    first = builder.insert_element(nothing, number, _INDEX(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES))


def _kind_of(array):
    return _FLOATS if array.dtype == types.float32 else _UINTS


@intrinsic
def load(_, array, index):
    """The LANES numbers of an array, float32 or 32-bit integers, from an index on."""
    kind = _kind_of(array)

    def generate(target, builder, signature, arguments):
        pointer = _pointer(target, builder, array, *arguments)
        return builder.load(builder.bitcast(pointer, kind.llvm.as_pointer()), align=4)

    return kind(array, types.intp), generate


@intrinsic
def store(_, array, index, vector):
    """The inverse of `load`."""

    def generate(target, builder, signature, arguments):
        pointer = _pointer(target, builder, array, *arguments[:2])
        builder.store(arguments[2], builder.bitcast(pointer, vector.llvm.as_pointer()), align=4)
        return target.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def load_one(_, array, index):
    """One number of an array, in each lane."""
    kind = _kind_of(array)

    def generate(target, builder, signature, arguments):
        return _spread(builder, builder.load(_pointer(target, builder, array, *arguments)), kind)

    return kind(array, types.intp), generate


@intrinsic
def floats(_, number):
    """A number in each lane."""
    return _FLOATS(types.float32), lambda target, builder, signature, arguments: _spread(builder, *arguments, _FLOATS)


@intrinsic
def uints(_, number):
    """A number in each lane; only its lowest 32 bits count."""

    def generate(target, builder, signature, arguments):
        return _spread(builder, builder.trunc(arguments[0], _INDEX), _UINTS)

    return _UINTS(types.int64), generate


@intrinsic
def lane_numbers(_):
    """0, 1, 2, ..."""
    return _UINTS(), lambda *_: ir.Constant(_UINTS.llvm, list(range(LANES)))


@intrinsic
def fma(_, a, b, c):
    """a b + c, rounded once. Integers are pairs of bfloat16, whose two products are added to c."""

    def generate(target, builder, signature, arguments):
        a, b, c = arguments
        if signature.args[0] == _UINTS:
            kind = ir.FunctionType(_FLOATS.llvm, [_FLOATS.llvm, _PAIRS, _PAIRS])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
            return builder.call(function, [c, builder.bitcast(a, _PAIRS), builder.bitcast(b, _PAIRS)])
        kind = ir.FunctionType(_FLOATS.llvm, [_FLOATS.llvm] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        return builder.call(function, arguments)

    return _FLOATS(a, a, _FLOATS), generate


class _BFloat(ir.Type):
    """bfloat16, which llvmlite has no type for."""

    def _to_string(self):
        return "bfloat"


_BFLOAT = _BFloat()
_PAIRS = ir.VectorType(_BFLOAT, 2 * LANES)


def _pairs(lanes: list[int]) -> Any:
    @intrinsic
    def pairs(_, a, b):
        def generate(target, builder, signature, arguments):
            a, b = (builder.fptrunc(vector, ir.VectorType(_BFLOAT, LANES)) for vector in arguments)
            order = ir.Constant(ir.VectorType(_INDEX, 2 * LANES), lanes)
            return builder.bitcast(builder.shuffle_vector(a, b, order), _UINTS.llvm)

        return _UINTS(_FLOATS, _FLOATS), generate

    return pairs


# Two vectors as pairs of bfloat16: of one lane in both, or of neighbours, all of the first vector and then the second.
pairs_across = _pairs([lane // 2 + lane % 2 * LANES for lane in range(2 * LANES)])
pairs_along = _pairs(list(range(2 * LANES)))


@intrinsic
def where(_, truths, a, b):
    """`a` in the lanes that are true, `b` in the others."""
    return a(_TRUTHS, a, a), lambda target, builder, signature, arguments: builder.select(*arguments)


@intrinsic
def _bits(_, vector):
    return _UINTS(_FLOATS), lambda target, builder, signature, arguments: builder.bitcast(*arguments, _UINTS.llvm)


@intrinsic
def _from_bits(_, vector):
    return _FLOATS(_UINTS), lambda target, builder, signature, arguments: builder.bitcast(*arguments, _FLOATS.llvm)


@expanded
def maximum(a, b):
    return where(a < b, b, a)


@expanded
def exp2(x):
    """2^x, within 2e-7 of it relatively; 0 for x below -127. For x up to 0, say.

    x is a whole number plus a rest of at most a half. Added to 1.5 x 2^23, the whole number stands in the lowest bits,
    from where it goes into the exponent. For the rest there is a polynomial of least greatest error.
    """
    x = maximum(x, floats(np.float32(-127.0)))
    shifted = x + floats(np.float32(12582912.0))
    rest = x - (shifted - floats(np.float32(12582912.0)))
    power = fma(floats(np.float32(1.5353362e-4)), rest, floats(np.float32(1.3398874e-3)))
    power = fma(power, rest, floats(np.float32(9.6184373e-3)))
    power = fma(power, rest, floats(np.float32(5.5503324e-2)))
    power = fma(power, rest, floats(np.float32(2.4022648e-1)))
    power = fma(power, rest, floats(np.float32(6.9314720e-1)))
    power = fma(power, rest, floats(np.float32(1.0)))
    return power * _from_bits(_bits(shifted) + uints(127) << uints(23))


@intrinsic
def transpose(_, rows, index, stride, columns, column_index, column_stride):
    """Writes a square of LANES x LANES floats in the other order: what was row i, `stride` apart, becomes column i.

    In each round, pairs of vectors exchange every second block of lanes, in blocks of 1, 2, 4 and 8.
    """

    def generate(target, builder, signature, arguments):
        def place(array, kind, index, stride, row):
            pointer = _pointer(target, builder, kind, array, builder.add(index, builder.mul(stride, stride.type(row))))
            return builder.bitcast(pointer, _FLOATS.llvm.as_pointer())

        source, index, stride, sink, column_index, column_stride = arguments
        vectors = [builder.load(place(source, rows, index, stride, row), align=4) for row in range(LANES)]
        block = 1
        while block < LANES:
            first = [lane if not lane & block else lane - block + LANES for lane in range(LANES)]
            second = [lane + block if not lane & block else lane + LANES for lane in range(LANES)]
            first, second = (ir.Constant(ir.VectorType(_INDEX, LANES), lanes) for lanes in (first, second))
            for row in range(LANES):
                if not row & block:
                    a, b = vectors[row], vectors[row + block]
                    vectors[row] = builder.shuffle_vector(a, b, first)
                    vectors[row + block] = builder.shuffle_vector(a, b, second)
            block *= 2
        for row, vector in enumerate(vectors):
            builder.store(vector, place(sink, columns, column_index, column_stride, row), align=4)
        return target.get_dummy_value()

    index_type = types.intp
    return types.void(rows, index_type, index_type, columns, index_type, index_type), generate
