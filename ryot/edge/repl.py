"""The chat of a bundle's `run.py`: one message, or a line of stdin at a time, each answered as it is generated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ryot.errors import ContextError, DataError

if TYPE_CHECKING:
    from ryot.edge.chat import Chat
    from ryot.edge.generate import Completion


def converse(
    chat: Chat,
    message: str | None,
    *,
    write: Callable[[Iterable[str]], None],
    seen: Callable[[Completion], None],
    **options: Any,
) -> None:
    """Answer `message`, or each line of stdin until it ends. `options` are those of `Chat.answer`.

    `seen` gets each answer once it has ended. A line that the context does not hold is left out, and said so; the
    conversation goes on.
    """
    if message is not None:
        seen(_answer(chat, message, write, options))
        return
    for line in _read_lines():
        if line.strip():
            try:
                seen(_answer(chat, line, write, options))
            except ContextError as error:
                sys.stderr.write(f"Error: {error}; this message is left out\n")


def _answer(chat: Chat, text: str, write: Callable[[Iterable[str]], None], options: dict[str, Any]) -> Completion:
    """Write the answer to one message; stderr says what else happened."""
    forgotten = chat.num_forgotten
    generation = chat.answer(text, **options)
    write(generation)
    if chat.num_forgotten > forgotten:
        sys.stderr.write(f"note: the context is full; the oldest {chat.num_forgotten} messages are forgotten\n")
    if generation.completion.finish_reason == "length":
        sys.stderr.write(f"note: the answer was cut after {len(generation.completion.tokens)} tokens\n")
    return generation.completion


def _read_lines() -> Iterator[str]:
    """The lines of stdin. On a terminal each is asked for and can be edited."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  makes input() edit its line
        while True:
            try:
                yield input("> ")
            except EOFError:
                sys.stdout.write("\n")
                return
    sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # type: ignore[union-attr]
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin: is not UTF-8 ({error.reason} at byte {error.start})") from error
