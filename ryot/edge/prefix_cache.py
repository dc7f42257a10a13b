"""Keys and values of texts that began before: what a new prompt shares with them is copied and not computed.

A tree of blocks. Each holds up to `BLOCK_TOKENS` tokens that follow its parent's and their keys and values, so a
beginning that many prompts share is held once. Prompts match token by token: of the last block they may use a part.
Least recently used blocks go first, leaves before what they follow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

#: Tokens of a full block: at 64 the copy of one is a few MB at most, and looking at a thousand tokens takes 16 of them.
BLOCK_TOKENS = 64


class _Block:
    __slots__ = ("children", "parent", "tokens", "values")

    def __init__(self, tokens: tuple[int, ...], values: np.ndarray | None, parent: _Block | None):
        self.tokens = tokens
        self.values = values
        self.parent = parent
        #: By first token.
        self.children: dict[int, list[_Block]] = {}


class SavedBlock(NamedTuple):
    """A block apart from its tree."""

    owner: str
    parent: int
    """Number of the block that it follows; -1 where it begins a text."""
    tokens: tuple[int, ...]
    values: np.ndarray


class PrefixCache:
    """What one model computed for texts, by their tokens and by whose they are; `max_bytes` of it."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.used_bytes = 0
        #: Root of each owner's tree: nothing is matched across them.
        self._roots: dict[str, _Block] = {}
        #: Oldest first. A block stands behind those that follow it, so the first one is always a leaf.
        self._order: OrderedDict[_Block, str] = OrderedDict()

    def match(self, owner: str, ids: Sequence[int]) -> list[np.ndarray]:
        """Keys and values of the longest beginning of `ids` that is known, in pieces that follow each other."""
        block = self._roots.get(owner)
        pieces: list[np.ndarray] = []
        at = 0
        while block is not None and at < len(ids):
            chunk = tuple(ids[at : at + BLOCK_TOKENS])
            best, shared = _closest(block, chunk)
            if best is None:
                break
            assert best.values is not None
            pieces.append(best.values[:, :, :shared])
            block = best
            at += shared
            if shared < BLOCK_TOKENS:
                break
        self._touch(owner, block)
        return pieces

    def insert(self, owner: str, ids: Sequence[int], read: Callable[[int, int], np.ndarray]) -> None:
        """Remember `ids`; `read(start, stop)` gives a copy of the keys and values of those that are not known yet."""
        if not self.max_bytes or not ids:
            return
        root = block = self._roots.get(owner) or _Block((), None, None)
        for at in range(0, len(ids), BLOCK_TOKENS):
            chunk = tuple(ids[at : at + BLOCK_TOKENS])
            best, shared = _closest(block, chunk)
            if best is not None and shared == len(chunk):
                block = best
                continue
            self._touch(owner, block)
            if best is not None and shared == len(best.tokens) and not best.children:
                # The new block begins with all of this one.
                self._remove(best, owner)
            values = read(at, at + len(chunk))
            if not self._make_room(values.nbytes, block):
                break
            child = _Block(chunk, values, block)
            block.children.setdefault(chunk[0], []).append(child)
            self.used_bytes += values.nbytes
            self._order[child] = owner
            block = child
        self._touch(owner, block)
        if root.children:
            # Making room may have taken the root away with its last block.
            self._roots[owner] = root

    def blocks(self) -> list[SavedBlock]:
        """All blocks, most recently used first, and each behind the one that it follows."""
        ordered = list(reversed(self._order))
        numbers = {block: number for number, block in enumerate(ordered)}
        return [
            SavedBlock(
                self._order[block],
                -1 if block.parent is None else numbers.get(block.parent, -1),
                block.tokens,
                block.values,
            )
            for block in ordered
            if block.values is not None
        ]

    def restore(self, blocks: Iterable[SavedBlock]) -> None:
        """Fill an empty cache with what `blocks` gave, as far as there is room."""
        assert not self._order
        made: list[tuple[_Block, str]] = []
        for saved in blocks:
            if self.used_bytes + saved.values.nbytes > self.max_bytes:
                break
            root = saved.parent < 0
            parent = self._roots.setdefault(saved.owner, _Block((), None, None)) if root else made[saved.parent][0]
            block = _Block(saved.tokens, saved.values, parent)
            parent.children.setdefault(saved.tokens[0], []).append(block)
            self.used_bytes += saved.values.nbytes
            made.append((block, saved.owner))
        self._order.update(reversed(made))

    def _touch(self, owner: str, block: _Block | None) -> None:
        """Make a block and all that it follows the most recently used ones."""
        while block is not None and block.parent is not None:
            self._order[block] = owner
            self._order.move_to_end(block)
            block = block.parent

    def _make_room(self, needed: int, last: _Block) -> bool:
        """Drop old blocks until `needed` bytes are free; False where only those up to `last` are left."""
        if needed > self.max_bytes:
            return False
        while self.used_bytes + needed > self.max_bytes:
            oldest = next(iter(self._order), None)
            # `last` was touched just now: when it is the oldest, all that is left is what it follows.
            if oldest is None or oldest is last:
                return False
            self._remove(oldest, self._order[oldest])
        return True

    def _remove(self, block: _Block, owner: str) -> None:
        assert not block.children and block.parent is not None and block.values is not None
        siblings = block.parent.children[block.tokens[0]]
        siblings.remove(block)
        if not siblings:
            del block.parent.children[block.tokens[0]]
        del self._order[block]
        self.used_bytes -= block.values.nbytes
        if block.parent.parent is None and not block.parent.children and self._roots.get(owner) is block.parent:
            del self._roots[owner]


def _closest(block: _Block, chunk: tuple[int, ...]) -> tuple[_Block | None, int]:
    """The child that shares the longest beginning with `chunk`, and how many tokens that is."""
    best, shared = None, 0
    for child in block.children.get(chunk[0], ()):
        count = _shared(child.tokens, chunk)
        if count > shared:
            best, shared = child, count
    return best, shared


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    return next(i for i in range(size) if one[i] != other[i])
