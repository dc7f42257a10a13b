"""Weights on huge pages: moved once, only what is in use, by a process that stays. And code that is given back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def can_collapse() -> bool:
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    return release >= (6, 1) and ENABLED.exists() and "[never]" not in ENABLED.read_text()


needs_huge_pages = pytest.mark.skipif(not can_collapse(), reason="this kernel moves nothing to huge pages")

READ = """
import ctypes
def rollup(field):
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
def switch_huge_pages(on):
    # PR_SET_THP_DISABLE: where the system gives huge pages unasked, memory touched meanwhile has small ones.
    assert ctypes.CDLL(None).prctl(41, 0 if on else 1, 0, 0, 0) == 0
"""
MOVE = (
    READ
    + """
import mmap
from ryot.edge.pages import move_to_huge_pages
switch_huge_pages(False)
private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
used, sparse = mmap.mmap(-1, 16 << 20, flags=private), mmap.mmap(-1, 64 << 20, flags=private)
pattern = bytes(range(256))
for start in range(0, len(used), 256):
    used[start : start + 256] = pattern
for start in range(0, len(sparse), 64 << 10):
    sparse[start] = 1
switch_huge_pages(True)
huge, resident = rollup("AnonHugePages"), rollup("Rss")
moved = move_to_huge_pages()
same = all(used[start : start + 256] == pattern for start in range(0, len(used), 256))
print(moved, rollup("AnonHugePages") - huge, rollup("Rss") - resident, same)
"""
)
TWO_PROMPTS = (
    READ
    + """
import sys
import ryot.edge.engine
from ryot.edge.bundle import load_bundle
from ryot.edge.engines import open_engine
if sys.argv[2] == "large":
    ryot.edge.engine.MIN_WEIGHT_BYTES = 0
decoder = open_engine(load_bundle(sys.argv[1]), engine=sys.argv[3])
switch_huge_pages(False)
memory = bytearray(b"x") * (16 << 20)
switch_huge_pages(True)
before = rollup("AnonHugePages")
for _ in range(3):
    decoder.prefill([[5, 6, 7]])
    print(rollup("AnonHugePages") - before)
"""
)


def run(program: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@needs_huge_pages
def test_what_is_in_use_moves_keeps_its_bytes_and_takes_no_more_memory():
    moved, huge, grown, same = run(MOVE)
    # 16 MB hold at least 7 aligned huge pages of 2 MB.
    assert int(moved) >= 14 << 20
    assert int(huge) >= 14 << 20
    # A page of each 64 KB of the sparse 64 MB is in use; to fill them would take 60.
    assert int(grown) < 8 << 20
    assert same == "True"


@needs_huge_pages
def test_memory_that_a_forked_process_shares_is_not_copied():
    program = MOVE.replace(
        "huge, resident =",
        """
import os, sys
if os.fork():
    _, status = os.wait()
    sys.exit(status >> 8)
huge, resident =""",
    )
    moved, huge, _, same = run(program)
    # What the child has for itself, such as Python's objects that it has touched, may move.
    assert int(moved) < 8 << 20
    assert int(huge) < 8 << 20
    assert same == "True"


@needs_huge_pages
def test_what_takes_too_long_is_left_where_it_is():
    assert run(MOVE.replace("moved = ", "import ryot.edge.pages as pages; pages.BUDGET_S = 0.0; moved = "))[0] == "0"


@needs_huge_pages
@pytest.mark.parametrize("prefill", ["prefill([[5, 6, 7]])", "prefill_shared([5, 6, 7])"])
@pytest.mark.parametrize("engine", ["capi", "python"])
def test_memory_moves_before_the_second_prompt_of_large_weights_and_never_for_small_ones(llama_path, engine, prefill):
    program = TWO_PROMPTS.replace("prefill([[5, 6, 7]])", prefill)
    first, second, third = map(int, run(program, llama_path, "large", engine))
    assert first == 0
    # 16 MB, but no more than the system has whole pages for at the moment.
    assert second >= 2 << 20
    assert third == second
    assert run(program, llama_path, "small", engine) == ["0", "0", "0"]


@pytest.mark.parametrize("missing", ["HUGE_PAGE_SIZE", "MAPS", "PAGEMAP"])
def test_where_the_system_does_not_tell_nothing_happens(llama_path, missing):
    program = f"""
import sys
from pathlib import Path
import ryot.edge.pages as pages
from ryot.edge.bundle import load_bundle
from ryot.edge.engines import open_engine
pages.{missing} = Path("/nowhere")
open_engine(load_bundle(sys.argv[1])).prefill([[5, 6, 7]])
print(pages.move_to_huge_pages())
"""
    assert run(program, llama_path) == ["0"]


def test_a_file_whose_name_breaks_lines_stops_nothing(llama_path, tmp_path):
    program = r"""
import mmap, os, sys
from ryot.edge.bundle import load_bundle
from ryot.edge.engines import open_engine
path = os.path.join(sys.argv[2], "a\u2028b\x0bc\nd\re\x85")
with open(path, "wb") as file:
    file.write(bytes(4096))
with open(path, "rb") as file:
    region = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
decoder = open_engine(load_bundle(sys.argv[1]))
decoder.prefill([[5, 6, 7]])
print(decoder.position)
"""
    assert run(program, llama_path, tmp_path) == ["3"]


LOAD = (
    READ
    + """
import importlib
import sys
engine = importlib.import_module("ryot.edge." + {"capi": "capi", "python": "session"}[sys.argv[2]])
from ryot.edge.bundle import load_bundle
from ryot.edge.engines import open_engine
if sys.argv[3] == "keep":
    engine.release_code = lambda: 0
decoder = open_engine(load_bundle(sys.argv[1]), engine=sys.argv[2])
print(rollup("Rss"))
decoder.prefill([[5, 6, 7]])
for _ in range(4):
    decoder.step()
    print(decoder.next_token[0])
"""
)


@pytest.mark.parametrize("engine", ["capi", "python"])
def test_code_that_only_loading_needed_is_given_back_and_the_model_runs_on(llama_path, engine):
    kept, *expected = run(LOAD, llama_path, engine, "keep")
    released, *tokens = run(LOAD, llama_path, engine, "release")
    # The code that loads a session has some 15 MB.
    assert int(kept) - int(released) > 8 << 20
    assert tokens == expected


def test_code_that_was_written_into_stays(tmp_path):
    program = """
import ctypes, mmap, os, sys
from ryot.edge.pages import release_code
size = 16 * mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
regions = []
for name in ("onnxruntime-written", "onnxruntime-as-it-was"):
    path = os.path.join(sys.argv[1], name)
    with open(path, "wb") as file:
        file.write(b"a" * size)
    with open(path, "rb") as file:
        region = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    region[:] if name.endswith("was") else region.write(b"b")
    view = (ctypes.c_char * size).from_buffer(region)
    regions.append(view)
    if libc.mprotect(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), 5):  # read, execute
        sys.exit(os.strerror(ctypes.get_errno()))
released = release_code()
print(regions[0][0].decode(), regions[1][0].decode(), released >= size, released < 2 * size)
"""
    found = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    if "Permission denied" in found.stderr:
        pytest.skip("nothing in this folder may be executed")
    assert found.stdout.split() == ["b", "a", "True", "True"], found.stderr
