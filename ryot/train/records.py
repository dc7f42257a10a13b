"""Records to learn answers from: prompt and completion, or the messages of a chat.

A record is encoded piece by piece, as it will be when it is used: the prompt alone, then the answer, so that the
tokens at the seam are those that the model sees and makes. Loss is taken on answers, the token that ends them included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ryot.errors import ConfigError, DataError
from ryot.train.source_text import SourceText

#: The columns of a record, in the order in which they are looked for.
RECORD_FIELDS = ("messages", "prompt", "completion", "text")
#: How tokenizers of SentencePiece's kind write a space.
_SPACE = "\u2581"
_ROLES = ("system", "user", "assistant", "tool", "developer")
#: What special tokens look like that a template of another model has left in a text.
_SPECIAL = re.compile(r"<\|[A-Za-z0-9_]{2,32}\|>")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and what is to follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, as (role, text) in order; each answer of the assistant is learned."""

    messages: tuple[tuple[str, str], ...]


Record = Pair | Chat


def read_record(row: Mapping[str, object], place: str) -> str | Record:
    """What a row of a file holds: a text, a pair or a chat. Raises `DataError`, which begins with `place`."""
    if isinstance(messages := row.get("messages"), list):
        return Chat(tuple(_read_message(message, place) for message in messages))
    if "prompt" in row or "completion" in row:
        return Pair(*(_read_text(row, key, place) for key in ("prompt", "completion")))
    return _read_text(row, "text", place)


def record_text(record: Record) -> str:
    """A record as one text: what it is hashed and compared by."""
    values = [record.prompt, record.completion] if isinstance(record, Pair) else record.messages
    return json.dumps(values, ensure_ascii=False)


def parse_record_text(text: str) -> Record:
    """The record that `record_text` made a text of."""
    values = json.loads(text)
    return Pair(*values) if isinstance(values[0], str) else Chat(tuple((role, said) for role, said in values))


def question_text(record: Record) -> str:
    """What a record asks: two records with the same question are in the same split."""
    if isinstance(record, Pair):
        return record.prompt
    asked = []
    for role, text in record.messages:
        if role == "assistant":
            break
        asked.append([role, text])
    return json.dumps(asked, ensure_ascii=False)


def has_answer(record: Record) -> bool:
    """Whether there is anything to learn in it."""
    if isinstance(record, Pair):
        return bool(record.completion.strip())
    return any(role == "assistant" and text.strip() for role, text in record.messages)


def plain_texts(document: str | Record) -> list[str]:
    """The texts in a document, from which a vocabulary is learned."""
    if isinstance(document, str):
        return [document]
    return [document.prompt, document.completion] if isinstance(document, Pair) else [t for _, t in document.messages]


@dataclass(slots=True)
class RecordEncoder:
    """Encodes records and texts for one model; `unusual` says what was met on the way, with counts."""

    text: SourceText
    unusual: dict[str, int] = field(default_factory=dict)
    _begins_with_space: bool = field(init=False)

    def __post_init__(self) -> None:
        first = self.text.tokenizer.encode("a", add_special_tokens=False).tokens[:1]
        self._begins_with_space = any(token.startswith(_SPACE) for token in first)

    def encode(self, document: str | Record, place: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The ids of a text or record, and for each whether it is learned.

        Raises `DataError` for a chat where there is no template, or one that the template refuses, and for tokens of
        another model's template.
        """
        ids: list[int] = []
        learned: list[bool] = []
        before = ""
        for piece, is_answer in self._pieces(document, place):
            new = piece if isinstance(piece, list) else self._encode_behind(before, piece)
            before = "" if isinstance(piece, list) else before + piece
            ids += new
            learned += [is_answer] * len(new)
        return np.asarray(ids, np.int64), np.asarray(learned, np.bool_)

    def _encode_behind(self, before: str, text: str) -> list[int]:
        """The ids of a text that goes on: a tokenizer that begins every text with a space has none there."""
        if before and text and self._begins_with_space:
            for head in (before, "\n"):
                known, both = self._ids(head), self._ids(head + text)
                if both[: len(known)] == known:
                    return both[len(known) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.text.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _pieces(self, document: str | Record, place: str) -> Iterator[tuple[str | list[int], bool]]:
        if isinstance(document, Chat):
            yield from self._chat_pieces(document, place)
            return
        begin, end = self.text.token_ids.separator, self.text.token_ids.eos[:1]
        if begin is not None:
            yield [begin], False
        if isinstance(document, str):
            yield document, True
        else:
            for part in (document.prompt, document.completion):
                self._check_special(part, place)
            yield document.prompt, False
            yield document.completion, True
            yield list(end), True

    def _chat_pieces(self, chat: Chat, place: str) -> Iterator[tuple[str | list[int], bool]]:
        template = self.text.template
        if template is None:
            raise DataError(
                f"{place}: is a chat, but {self.text.where} has no chat template",
                hint="start from an instruct model, or give prompt and completion",
            )
        messages = [{"role": role, "content": text} for role, text in chat.messages]
        for _, text in chat.messages:
            self._check_special(text, place)
        try:
            whole = template.render(messages, add_generation_prompt=False)
            turns = [
                (
                    template.render(messages[:i], add_generation_prompt=True),
                    template.render(messages[: i + 1], add_generation_prompt=False),
                )
                for i, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        except ConfigError as error:
            raise DataError(f"{place}: {error}") from error
        at = 0
        for i, (before, after) in enumerate(turns):
            if not (whole.startswith(before) and whole.startswith(after) and len(before) >= at):
                # Templates that rewrite earlier turns: what is learned is what they show at the end.
                if i + 1 < len(turns):
                    self._count("chats of which the template shows earlier answers otherwise; the last is learned")
                    continue
                raise DataError(
                    f"{place}: the chat template shows an answer otherwise than where it is asked for",
                    hint="give prompt and completion, written as the model is to see them",
                )
            yield whole[at : len(before)], False
            answer, rest = self._cut_after_end(whole[len(before) : len(after)])
            yield answer, True
            yield rest, False
            at = len(after)
        yield whole[at:], False

    def _cut_after_end(self, answer: str) -> tuple[str, str]:
        """An answer up to the token that ends it, and what the template writes behind that."""
        for token in self.text.token_ids.eos:
            end = self.text.tokenizer.id_to_token(token)
            if end and (at := answer.rfind(end)) >= 0:
                return answer[: at + len(end)], answer[at + len(end) :]
        return answer, ""

    def _check_special(self, text: str, place: str) -> None:
        for found in _SPECIAL.findall(text):
            if self.text.tokenizer.token_to_id(found) is None:
                raise DataError(
                    f"{place}: holds {found}, which {self.text.where} has no token for",
                    hint="take the other model's template out of the data, and give messages or prompt and completion",
                )

    def _count(self, what: str) -> None:
        self.unusual[what] = self.unusual.get(what, 0) + 1


def _read_message(message: object, place: str) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(f"{place}: a message is {str(message)[:40]!r}, expected a table with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise DataError(f"{place}: a message's role is {role!r}, expected one of {', '.join(_ROLES)}")
    return role, _read_text({"content": "" if content is None else content}, "content", place)


def _read_text(row: Mapping[str, object], key: str, place: str) -> str:
    text = row.get(key)
    if not isinstance(text, str):
        known = "string field 'text'" if key == "text" else f"string field {key!r}"
        raise DataError(f"{place} has no {known}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} has a lone surrogate (\\u{ord(text[error.start]):04x} at character {error.start} of {key!r}), "
            "which UTF-8 cannot hold",
            hint="put U+FFFD or the whole pair there, or remove the line",
        ) from error
    return text
