"""onnxruntime's C library, called with ctypes: the functions that an engine needs, checked before anything is loaded.

C functions are reached by their place in a table, `OrtApi`. The table only ever grows at its end (onnxruntime asserts
that when it is compiled), so a place holds for every later version; the places used here are those of API version 5
and older. Before anything is loaded the library must name the installed package's version, serve API version 20,
and pass a tensor through three of its functions; otherwise `EngineUnavailable` says what did not fit.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ryot.edge.engine import (
    GRAPH_OPTIMIZATION_LEVEL,
    INTER_OP_THREADS,
    LOG_ERRORS_ONLY,
    SESSION_CONFIG,
    EngineUnavailable,
)
from ryot.errors import BundleError

#: The table is asked for by this version; every onnxruntime from 1.20 on serves it.
API_VERSION = 20
#: Places in OrtApi, from include/onnxruntime/core/session/onnxruntime_c_api.h.
PLACES = {
    "GetErrorMessage": 2,
    "CreateEnv": 3,
    "CreateSession": 7,
    "Run": 9,
    "CreateSessionOptions": 10,
    "DisableCpuMemArena": 19,
    "SetSessionLogSeverityLevel": 22,
    "SetSessionGraphOptimizationLevel": 23,
    "SetIntraOpNumThreads": 24,
    "SetInterOpNumThreads": 25,
    "SessionGetInputCount": 30,
    "SessionGetOutputCount": 31,
    "CreateTensorWithDataAsOrtValue": 49,
    "IsTensor": 50,
    "GetTensorMutableData": 51,
    "CreateCpuMemoryInfo": 69,
    "ReleaseStatus": 93,
    "ReleaseSession": 95,
    "ReleaseValue": 96,
    "ReleaseSessionOptions": 100,
    "AddSessionConfigEntry": 130,
}
#: ONNXTensorElementDataType.
FLOAT, INT8, INT32, INT64 = 1, 3, 6, 7

pointer = ctypes.c_void_p
out = ctypes.POINTER(ctypes.c_void_p)
#: Address, shape and element type of a tensor.
Place = tuple[int, tuple[int, ...], int]

CType: TypeAlias = (
    "type[ctypes.c_int | ctypes.c_void_p | ctypes.c_char_p | ctypes.c_size_t | ctypes._Pointer[ctypes.c_void_p]]"
)


class Library:
    """onnxruntime's C library, checked; there is one per process."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        library.OrtGetApiBase.restype = pointer
        base = ctypes.cast(library.OrtGetApiBase(), out)
        self.version = ctypes.CFUNCTYPE(ctypes.c_char_p)(base[1])().decode()
        installed = _package_version(path.parent.parent)
        if self.version != installed:
            raise EngineUnavailable(f"{path} is onnxruntime {self.version}, the installed package is {installed}")
        table = ctypes.CFUNCTYPE(pointer, ctypes.c_uint32)(base[0])(API_VERSION)
        if not table:
            raise EngineUnavailable(f"{path}: onnxruntime {self.version} does not serve its C API {API_VERSION}")
        self._table = ctypes.cast(table, out)
        self._environment = self.create("CreateEnv", LOG_ERRORS_ONLY, b"ryot")
        self._memory_info = self.create("CreateCpuMemoryInfo", 0, 0)
        self._check_places(path)

    def function(self, name: str, *types: CType, result: CType | None = pointer) -> Callable[..., Any]:
        """The C function in the table."""
        return ctypes.CFUNCTYPE(result, *types)(self._table[PLACES[name]])

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that answers with a status. Raises `BundleError` with onnxruntime's message."""
        types = [ctypes.c_int if isinstance(a, int) else pointer for a in arguments]
        self.check(self.function(name, *types)(*arguments))

    def create(self, name: str, *arguments: object) -> ctypes.c_void_p:
        """The object that a function makes."""
        made = pointer()
        self.call(name, *arguments, ctypes.byref(made))
        return made

    def release(self, name: str, handle: ctypes.c_void_p) -> None:
        """Give an object back."""
        self.function(name, pointer, result=None)(handle)

    def check(self, status: int | None) -> None:
        """Raise `BundleError` when a status is an error."""
        if status:
            message = self.function("GetErrorMessage", pointer, result=ctypes.c_char_p)(status)
            self.release("ReleaseStatus", pointer(status))
            raise BundleError(message.decode(errors="replace").splitlines()[0])

    def make_tensor(self, address: int, shape: Sequence[int], kind: int) -> ctypes.c_void_p:
        """An OrtValue over memory that the caller keeps."""
        count = {FLOAT: 4, INT8: 1, INT32: 4, INT64: 8}[kind]
        for size in shape:
            count *= size
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        types = (pointer, pointer, ctypes.c_size_t, pointer, ctypes.c_size_t, ctypes.c_int, out)
        made = pointer()
        create = self.function("CreateTensorWithDataAsOrtValue", *types)
        self.check(create(self._memory_info, address, count, sizes, len(shape), kind, ctypes.byref(made)))
        return made

    def load_session(self, path: Path, threads: int) -> ctypes.c_void_p:
        """A session with the options of every engine's; `engine` says why these. Raises `BundleError`."""
        options = self.create("CreateSessionOptions")
        try:
            self.call("SetSessionGraphOptimizationLevel", options, GRAPH_OPTIMIZATION_LEVEL)
            self.call("SetIntraOpNumThreads", options, threads)
            self.call("SetInterOpNumThreads", options, INTER_OP_THREADS)
            self.call("DisableCpuMemArena", options)
            self.call("SetSessionLogSeverityLevel", options, LOG_ERRORS_ONLY)
            for name, value in SESSION_CONFIG.items():
                self.call("AddSessionConfigEntry", options, name.encode(), value.encode())
            return self.create("CreateSession", self._environment, str(path).encode(), options)
        except BundleError as error:
            raise BundleError(f"{path}: onnxruntime {self.version} cannot load it: {error}") from error
        finally:
            self.release("ReleaseSessionOptions", options)

    def count(self, name: str, session: ctypes.c_void_p) -> int:
        """The number of a session's inputs or outputs."""
        number = ctypes.c_size_t()
        self.call(name, session, ctypes.byref(number))
        return number.value

    def _check_places(self, path: Path) -> None:
        """Make a tensor and find it again; raises `EngineUnavailable` when the table answers something else."""
        buffer = (ctypes.c_int64 * 1)(7)
        tensor = self.make_tensor(ctypes.addressof(buffer), (1, 1), INT64)
        is_tensor, found = ctypes.c_int(), pointer()
        self.call("IsTensor", tensor, ctypes.byref(is_tensor))
        self.call("GetTensorMutableData", tensor, ctypes.byref(found))
        self.release("ReleaseValue", tensor)
        if is_tensor.value != 1 or found.value != ctypes.addressof(buffer):
            raise EngineUnavailable(f"{path}: its function table is not the one that this engine knows")


@functools.cache
def load_library() -> Library:
    """The installed package's C library. Raises `EngineUnavailable` when there is none that fits."""
    spec = importlib.util.find_spec("onnxruntime")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise EngineUnavailable("onnxruntime is not installed")
    return open_library(Path(spec.submodule_search_locations[0]))


def open_library(package: Path) -> Library:
    """The C library in an onnxruntime package's folder. Raises `EngineUnavailable` when it does not fit."""
    folder = package / "capi"
    found = sorted([*folder.glob("libonnxruntime.so.*"), *folder.glob("libonnxruntime.*.dylib")])
    if not found:
        raise EngineUnavailable(f"{folder}: the onnxruntime package has no C library")
    try:
        return Library(found[-1])
    except (OSError, AttributeError) as error:
        raise EngineUnavailable(f"{found[-1]}: cannot be used ({error})") from error


def _package_version(package: Path) -> str:
    """`__version__` of a package, read from its text: importlib.metadata would cost more memory than it saves here."""
    found = re.search(r"^__version__ = ['\"]([^'\"+]+)", (package / "__init__.py").read_text(encoding="utf-8"), re.M)
    return found[1] if found else "of an unknown version"
