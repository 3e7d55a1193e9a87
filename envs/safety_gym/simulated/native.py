"""MuJoCo's C functions and memory for numba's compiled loops.

A compiled loop that calls MuJoCo itself steps many environments without Python in between and without
Python's lock. Models and data are given by their addresses; arrays inside them, which MuJoCo never moves, by
the address of their first element. Warnings go to MuJoCo's log as ever; its fatal errors (out of memory) end
the process, because only the Python bindings turn them into exceptions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]  # numba's
import mujoco
import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saferl.errors import MissingPackageError

__all__ = [
    "address_of",
    "compile_loop",
    "doubles",
    "mj_forward",
    "mj_getState",
    "mj_jacBody",
    "mj_normalizeQuat",
    "mj_resetData",
    "mj_rnePostConstraint",
    "mj_setConst",
    "mj_setState",
    "mj_step",
    "mju_quat2Mat",
]

#: Loops release Python's lock and are cached on disk; division by zero gives infinity as in NumPy.
compile_loop = numba.njit(nogil=True, cache=True, error_model="numpy")


def _load_library() -> None:
    """Make the symbols of the package's own libmujoco known to compiled code."""
    folder = Path(mujoco.__file__).parent
    for pattern in ("libmujoco.so*", "libmujoco*.dylib", "mujoco.dll"):
        for path in sorted(folder.glob(pattern)):
            llvmlite.binding.load_library_permanently(str(path))
            return
    raise MissingPackageError(
        f"no MuJoCo library lies in {folder}; reinstall it: pip install --force-reinstall mujoco"
    )


_load_library()

_address = types.intp
_int = types.int32


def _function(name: str, *arguments: Any) -> Any:
    return types.ExternalFunction(name, types.void(*arguments))


# Arguments: the model, the data, then as in MuJoCo's documentation; 0 is C's null pointer.
mj_step = _function("mj_step", _address, _address)
mj_forward = _function("mj_forward", _address, _address)
mj_resetData = _function("mj_resetData", _address, _address)
mj_setConst = _function("mj_setConst", _address, _address)
mj_rnePostConstraint = _function("mj_rnePostConstraint", _address, _address)
mj_getState = _function("mj_getState", _address, _address, _address, _int)
mj_setState = _function("mj_setState", _address, _address, _address, _int)
mj_normalizeQuat = _function("mj_normalizeQuat", _address, _address)
mj_jacBody = _function("mj_jacBody", _address, _address, _address, _address, _int)
mju_quat2Mat = _function("mju_quat2Mat", _address, _address)


def address_of(array: np.ndarray) -> int:
    """Return where the array's first element lies, 0 for an empty array."""
    return int(array.ctypes.data) if array.size else 0


@intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@compile_loop
def doubles(address, size):  # type: ignore[no-untyped-def]
    """View `size` doubles at an address as an array."""
    return numba.carray(_pointer(address), size, np.float64)  # type: ignore[call-arg]
