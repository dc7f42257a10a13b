"""The engine over onnxruntime's C library, called with ctypes: no Python binding, no numpy unless logits are read.

It saves the memory and the import time of both (about 15 MB and half of the time to the first token for a model of
two million parameters) and some 10 % of a step. The library is the one in the onnxruntime package.

C functions are reached by their place in a table, `OrtApi`. The table only ever grows at its end (onnxruntime asserts
that when it is compiled), so a place holds for every later version; the places used here are those of API version 5
and older. Before anything is loaded the library must name the installed package's version, serve API version 20,
and pass a tensor through three of its functions; otherwise `EngineUnavailable` says what did not fit.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryot.edge.bundle import Bundle, check_onnxruntime
from ryot.edge.engine import Engine, EngineUnavailable
from ryot.errors import BundleError

if TYPE_CHECKING:
    import numpy as np

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
LOG_ERRORS_ONLY = 3
#: Calls kept for prompt lengths already seen.
MAX_PROMPT_CALLS = 8
ALIGNMENT_BYTES = 64

pointer = ctypes.c_void_p
out = ctypes.POINTER(ctypes.c_void_p)
#: Address, shape and element type of a tensor.
Place = tuple[int, tuple[int, ...], int]


class Library:
    """onnxruntime's C library, checked; there is one a process."""

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

    def function(self, name: str, *types: Any, result: Any = pointer) -> Callable[..., Any]:
        """The C function in the table."""
        return ctypes.CFUNCTYPE(result, *types)(self._table[PLACES[name]])

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that answers with a status. Raises `BundleError` with onnxruntime's message."""
        types = [ctypes.c_int if isinstance(a, int) else pointer for a in arguments]
        self.check(self.function(name, *types)(*arguments))

    def create(self, name: str, *arguments: Any) -> ctypes.c_void_p:
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
        """A session with the options of `session.build_session_options`. Raises `BundleError`."""
        options = self.create("CreateSessionOptions")
        try:
            self.call("SetIntraOpNumThreads", options, threads)
            self.call("SetInterOpNumThreads", options, 1)
            self.call("DisableCpuMemArena", options)
            self.call("SetSessionLogSeverityLevel", options, LOG_ERRORS_ONLY)
            self.call("AddSessionConfigEntry", options, b"session.intra_op.allow_spinning", b"0")
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


class CapiDecoder(Engine):
    """An `Engine` through onnxruntime's C library."""

    def __init__(self, bundle: Bundle, *, threads: int = 1, batch_size: int = 1, max_len: int | None = None):
        """Load the graphs and make the buffers; raises like `session.Decoder`, and `EngineUnavailable`."""
        self._library = library = load_library()
        self.onnxruntime_version = library.version
        check_onnxruntime(library.version, bundle.onnxruntime_min)
        super().__init__(bundle, threads=threads, batch_size=batch_size, max_len=max_len)
        shape = bundle.model
        self._handles: list[tuple[str, ctypes.c_void_p]] = []
        # At exit the process takes everything with it, faster than by giving it back.
        weakref.finalize(self, _release_all, library, self._handles).atexit = False
        self._decode = self._load("decode")
        self._prefill = self._decode if bundle.one_session else self._load("prefill")

        self._lengths = (ctypes.c_int32 * (batch_size + 1))()
        self._positions = (ctypes.c_int64 * batch_size)()
        self._token = (ctypes.c_int64 * batch_size)()
        self._logits = (ctypes.c_float * (batch_size * shape.vocab_size))()
        self._row_bytes = shape.num_kv_heads * self.max_len * shape.head_dim * (1 if bundle.kv_dtype == "int8" else 4)
        # Anonymous pages: zero, aligned, and no memory before they are touched.
        self._kv_stride = -(-self._row_bytes * batch_size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._kv = mmap.mmap(-1, 2 * shape.num_layers * self._kv_stride)
        self._kv_address = ctypes.addressof(ctypes.c_char.from_buffer(self._kv))

        count = ctypes.c_size_t
        self._run = library.function("Run", pointer, pointer, pointer, pointer, count, pointer, count, pointer)
        self._prompts: dict[tuple[int | None, int], _Call] = {}
        self._step = self._bind(self._decode, self._token, self._positions, 1, None)
        self._step_arguments = self._step.arguments
        self.next_token = self._token

    @functools.cached_property
    def logits(self) -> np.ndarray:
        import numpy as np  # only who reads logits pays for it

        return np.frombuffer(memoryview(self._logits), np.float32).reshape(self.batch_size, -1)

    def step(self) -> None:
        lengths, positions, rows = self._lengths, self._positions, self.batch_size
        if lengths[rows] >= self.max_len:
            self._raise_full()
        lengths[rows] += 1
        for row in range(rows):
            lengths[row] += 1
            positions[row] += 1
        status = self._run(*self._step_arguments)
        if status:
            self._library.check(status)

    def _run_prompt(self, rows: list[list[int]], row: int | None) -> None:
        length = len(rows[0])
        call = self._prompts.get((row, length))
        if call is None:
            if len(self._prompts) >= MAX_PROMPT_CALLS:
                self._prompts.clear()
            ids = (ctypes.c_int64 * (len(rows) * length))()
            positions = (ctypes.c_int64 * len(ids))(*list(range(length)) * len(rows))
            call = self._prompts[row, length] = self._bind(self._prefill, ids, positions, length, row)
        call.ids[:] = [token for prompt in rows for token in prompt]
        try:
            self._library.check(self._run(*call.arguments))
        except BundleError as error:
            path = self.bundle.path / self.bundle.graphs["prefill"]
            raise BundleError(f"{path}: onnxruntime cannot run it: {error}") from error

    def _copy_rows(self, source_rows: Sequence[int], length: int) -> None:
        heads = self.bundle.model.num_kv_heads
        head_bytes = self._row_bytes // heads
        used_bytes = head_bytes // self.max_len * length
        cache = memoryview(self._kv)
        for first in range(0, len(cache), self._kv_stride):
            for head in range(heads):
                _copy_parts(cache, first + head * head_bytes, self._row_bytes, used_bytes, source_rows)
        for array in (self._token, self._logits):
            view = memoryview(array).cast("B")
            size = len(view) // self.batch_size
            _copy_parts(view, 0, size, size, source_rows)

    def _load(self, role: str) -> ctypes.c_void_p:
        """The session of a graph; it must have the inputs and outputs that will be bound."""
        library, bundle = self._library, self.bundle
        path = bundle.path / bundle.graphs[role]
        session = library.load_session(path, self.threads)
        self._handles.append(("ReleaseSession", session))
        caches = 2 * bundle.model.num_layers
        for name, expected in (
            ("SessionGetInputCount", 3 + bundle.position_ids + caches),
            ("SessionGetOutputCount", 2 + caches),
        ):
            found = library.count(name, session)
            if found != expected:
                raise BundleError(f"{path}: {name} gives {found}, the manifest makes it {expected}")
        return session

    def _bind(self, session: ctypes.c_void_p, ids: Any, positions: Any, length: int, row: int | None) -> _Call:
        """A call of `session` for all rows, or for one, over this decoder's buffers."""
        shape, address = self.bundle.model, ctypes.addressof
        first, rows = (0, self.batch_size) if row is None else (row, 1)
        inputs: dict[str, Place] = {
            "input_ids": (address(ids), (rows, length), INT64),
            "seqlens_k": (address(self._lengths) + 4 * first, (rows,), INT32),
            "total_sequence_length": (address(self._lengths) + 4 * self.batch_size, (), INT32),
        }
        if self.bundle.position_ids:
            inputs["position_ids"] = (address(positions), (rows, length), INT64)
        outputs: dict[str, Place] = {
            "next_token": (address(self._token) + 8 * first, (rows, 1), INT64),
            "logits": (address(self._logits) + 4 * first * shape.vocab_size, (rows, 1, shape.vocab_size), FLOAT),
        }
        kind = INT8 if self.bundle.kv_dtype == "int8" else FLOAT
        place = self._kv_address + first * self._row_bytes
        for layer in range(shape.num_layers):
            for part in ("key", "value"):
                cache = place, (rows, shape.num_kv_heads, self.max_len, shape.head_dim), kind
                inputs[f"past_key_values.{layer}.{part}"] = outputs[f"present.{layer}.{part}"] = cache
                place += self._kv_stride
        return _Call(self._library, session, inputs, outputs, ids, positions)


class _Call:
    """Run's arguments, and all that they point to for as long as they may be used."""

    def __init__(
        self,
        library: Library,
        session: ctypes.c_void_p,
        inputs: Mapping[str, Place],
        outputs: Mapping[str, Place],
        ids: Any,
        positions: Any,
    ):
        self.ids = ids
        self._positions = positions
        # What is input and output at once, a cache or the fed-back token, is one tensor.
        tensors = {place: library.make_tensor(*place) for place in {*inputs.values(), *outputs.values()}}
        handles = [("ReleaseValue", tensor) for tensor in tensors.values()]
        weakref.finalize(self, _release_all, library, handles).atexit = False
        self._arrays = [
            array
            for places in (inputs, outputs)
            for array in (
                (ctypes.c_char_p * len(places))(*(name.encode() for name in places)),
                (ctypes.c_void_p * len(places))(*(tensors[place].value for place in places.values())),
            )
        ]
        names_in, values_in, names_out, values_out = (pointer(ctypes.addressof(array)) for array in self._arrays)
        count = ctypes.c_size_t
        inputs_in = (names_in, values_in, count(len(inputs)))
        self.arguments = (session, None, *inputs_in, names_out, count(len(outputs)), values_out)


def _copy_parts(view: memoryview, first: int, stride: int, size: int, source_rows: Sequence[int]) -> None:
    """In a buffer of rows `stride` bytes apart, copy `size` bytes from `first` on, each row from its source."""
    parts = {row: bytes(view[first + row * stride :][:size]) for row in set(source_rows)}
    for row, source in enumerate(source_rows):
        if row != source:
            view[first + row * stride :][:size] = parts[source]


def _release_all(library: Library, handles: Sequence[tuple[str, ctypes.c_void_p]]) -> None:
    for name, handle in handles:
        library.release(name, handle)
