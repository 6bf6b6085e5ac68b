"""Many arrays that kernels take by one pointer.

numba hands a tuple of arrays on by value, seven words or more an array: a machine is a kilobyte that every call which
is not inlined writes to the stack, several times what the call is for. What is declared here is written there once, by
whoever comes from Python, as a row of words: for each array where its data are, then its lengths. Compiled code takes
the address of that row.

numba looks the types of arguments up by their contents, too; of such an object it knows the type by its class. That
every array is what the declaration says is checked when the object is made, once for all calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    NativeValue,
    infer_getattr,
    lower_getattr_generic,
    models,
    register_model,
    typeof_impl,
    unbox,
)
from numba.np import arrayobj, numpy_support

A = TypeVar("A", bound="Arrays")

# numba's type hints do not cover what extends it, and its classes are made at run time.
_Type: Any = types.Type
_Template: Any = AttributeTemplate
_Model: Any = models.PrimitiveModel

WORD = ir.IntType(64)

# Where numpy's C interface has these of an array object, in words: it is the same for all that call themselves numpy 1
# or 2 (PyArrayObject_fields).
_DATA = 2
_LENGTHS = 4


class Kind(NamedTuple):
    """What an array is: its numbers, and how many indices it has. It lies in one piece, and may be written."""

    dtype: np.dtype[Any]
    dimensions: int


class Arrays:
    """Base of an object that kernels take by pointer; ``kinds`` of each array by its name, in order."""

    kinds: ClassVar[dict[str, Kind]]

    arrays: tuple[np.ndarray[Any, Any], ...]

    def __init__(self, **arrays: np.ndarray[Any, Any]) -> None:
        """Raises TypeError for an array that is not as declared, or is not there."""
        _check(self.kinds, arrays)
        if len(arrays) != len(self.kinds):
            raise TypeError(f"a {type(self).__name__} has other arrays, too: {sorted(self.kinds.keys() - arrays)}")
        self._hold(arrays)

    def replaced(self: A, **arrays: np.ndarray[Any, Any]) -> A:
        """The same with other arrays under some names. Raises TypeError as above."""
        _check(self.kinds, arrays)
        made = object.__new__(type(self))
        made._hold(dict(zip(self.kinds, self.arrays, strict=True)) | arrays)
        return made

    def _hold(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self.__dict__.update(arrays, arrays=tuple([arrays[name] for name in self.kinds]))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} of a {type(self).__name__} stays what it is: make another with `replaced`")


def _check(kinds: Mapping[str, Kind], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    for name, array in arrays.items():
        if name not in kinds:
            raise TypeError(f"there is no array {name}")
        dtype, dimensions = kinds[name]
        if array.dtype != dtype or array.ndim != dimensions or not array.flags.carray:
            raise TypeError(f"{name} is no array of {dtype} with {dimensions} indices, in one piece and writable")


class ByPointer(_Type):  # type: ignore[misc]
    """numba's type of such an object."""

    def __init__(self, name: str, fields: tuple[tuple[str, Any], ...]) -> None:
        super().__init__(name=name)
        self.types = dict(fields)
        self.starts: dict[str, int] = {}
        self.words = 0
        for field, array in fields:
            self.starts[field] = self.words
            self.words += 1 + array.ndim


def by_pointer(cls: type[A]) -> type[A]:
    """Have numba know a class of ``Arrays``."""
    fields = tuple(
        (name, types.Array(numpy_support.from_dtype(kind.dtype), kind.dimensions, "C"))
        for name, kind in cls.kinds.items()
    )
    found = ByPointer(f"{cls.__module__}.{cls.__qualname__}", fields)
    typeof_impl.register(cls, lambda _value, _context: found)
    return cls


@register_model(ByPointer)
class _Pointer(_Model):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, WORD.as_pointer())


@infer_getattr
class _Attributes(_Template):  # type: ignore[misc]
    key = ByPointer

    def generic_resolve(self, owner: ByPointer, name: str) -> Any:
        return owner.types.get(name)


def _word(builder: Any, row: Any, at: int) -> Any:
    """One of the words, which nobody writes while compiled code can see them."""
    loaded = builder.load(builder.gep(row, [ir.Constant(WORD, at)]))
    loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
    return loaded


@lower_getattr_generic(ByPointer)
def _array(context: Any, builder: Any, owner: ByPointer, row: Any, name: str) -> Any:
    """An array as numba has it, put together from the words; what of it is not used is not loaded."""
    found, start = owner.types[name], owner.starts[name]
    array = arrayobj.make_array(found)(context, builder)
    lengths = [_word(builder, row, start + 1 + axis) for axis in range(found.ndim)]
    size = context.get_constant(types.intp, np.dtype(str(found.dtype)).itemsize)
    strides = [size]
    for length in reversed(lengths[1:]):
        strides.insert(0, builder.mul(strides[0], length))
    data = builder.inttoptr(_word(builder, row, start), array.data.type)
    arrayobj.populate_array(array, data=data, shape=lengths, strides=strides, itemsize=size, meminfo=None, parent=None)
    return array._getvalue()


@unbox(ByPointer)
def _row(owner: ByPointer, value: Any, c: Any) -> Any:
    """Write the words of an object's arrays to the stack of who calls from Python.

    The arrays stay where they are meanwhile: the caller holds the object. That the address goes through an
    instruction the optimiser knows nothing of keeps loads from being moved to before the words are there.
    """
    builder, address = c.builder, WORD.as_pointer()
    row = cgutils.alloca_once(builder, WORD, size=owner.words)
    arrays = c.pyapi.object_getattr_string(value, "arrays")
    for position, (name, array) in enumerate(owner.types.items()):
        fields = builder.bitcast(c.pyapi.tuple_getitem(arrays, position), address)
        data = builder.load(builder.gep(fields, [ir.Constant(WORD, _DATA)]))
        builder.store(data, builder.gep(row, [ir.Constant(WORD, owner.starts[name])]))
        lengths = builder.inttoptr(builder.load(builder.gep(fields, [ir.Constant(WORD, _LENGTHS)])), address)
        for axis in range(array.ndim):
            length = builder.load(builder.gep(lengths, [ir.Constant(WORD, axis)]))
            builder.store(length, builder.gep(row, [ir.Constant(WORD, owner.starts[name] + 1 + axis)]))
    c.pyapi.decref(arrays)
    opaque = builder.asm(ir.FunctionType(address, [address]), "", "=r,0,~{memory}", [row], True)
    return NativeValue(opaque)
