"""Runs Python texts with tests behind them, one process each, and says which passed. The inside of `TestsVerifier`.

Orders come as JSON on stdin. A line for each text goes to stdout: the secret, the text's number, and `passed` or why
not.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from typing import Any, NoReturn


def main() -> None:
    """Fork a process for each text and report on it."""
    orders = json.loads(sys.stdin.read())
    for number, text in enumerate(orders["texts"]):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.setsid()
            os.close(reading)
            run(text, orders, writing)
        os.close(writing)
        sys.stdout.write(f"{orders['secret']} {number} {wait(child, reading, orders)}\n")
        sys.stdout.flush()
        os.close(reading)


def run(text: str, orders: dict[str, Any], writing: int) -> NoReturn:
    """Run a text and its tests, and write the secret where nothing was raised. Never returns."""
    secret, tests = orders["secret"], orders["tests"]
    resource.setrlimit(resource.RLIMIT_CPU, (orders["cpu_s"], orders["cpu_s"]))
    orders.clear()
    nothing = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    try:
        names: dict[str, object] = {"__name__": "answer"}
        exec(compile(text, "answer", "exec"), names)
        exec(compile(tests, "tests", "exec"), names)
        said = f"{secret} passed"
    except BaseException as error:  # whatever a text may raise, SystemExit included
        said = " ".join(traceback.format_exception_only(error)).strip().replace("\n", " ")[:300]
    os.write(writing, said.encode("utf-8", "replace"))
    os._exit(0)


def wait(child: int, reading: int, orders: dict[str, Any]) -> str:
    """What became of a text: `passed`, what it raised, or that it took too long."""
    deadline, pause = time.monotonic() + orders["wall_s"], 0.0005
    ended = status = 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
    # What a text has started goes with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
        return "took too long"
    os.set_blocking(reading, False)
    try:
        said = os.read(reading, 4096).decode("utf-8", "replace")
    except BlockingIOError:
        said = ""
    if said == f"{orders['secret']} passed":
        return "passed"
    if os.WIFSIGNALED(status):
        return f"was ended by signal {os.WTERMSIG(status)}"
    return said.replace(orders["secret"], "") or "ended before its tests did"


if __name__ == "__main__":
    main()
