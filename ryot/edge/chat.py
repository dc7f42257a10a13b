"""A conversation: the checkpoint's chat template, and turns that are answered with what was said before in mind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ryot.edge.generate import Generation, generate
from ryot.edge.plain_tokens import PlainTokens
from ryot.edge.tokenizer_config import TOKENIZER_CONFIG_NAME, named_tokens, read_json
from ryot.errors import BundleError, ConfigError, ContextError

if TYPE_CHECKING:
    import jinja2

    from ryot.edge.engine import Engine
    from ryot.edge.sampling_params import SamplingParams
    from ryot.edge.tokenizer import Tokenizer

TEMPLATE_NAME = "chat_template.jinja"
#: Templates with a name of their own, `NAME.jinja`.
TEMPLATES_FOLDER = "additional_chat_templates"
#: Where multimodal checkpoints of 2024 keep it.
TEMPLATE_JSON_NAME = "chat_template.json"
#: Older versions let a template out of its sandbox.
JINJA2_MIN = (3, 1, 6)
#: Room that an answer gets at least, a quarter of a small context; older messages are forgotten for it.
MIN_ANSWER_TOKENS = 64

Message = Mapping[str, object]


class ChatTemplate:
    """A checkpoint's template, which turns messages into the text that the model was trained to answer.

    It is a program of the checkpoint's author, so it runs in jinja2's sandbox and sees nothing but what `render` gets.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], where: str):
        """`tokens` has the special tokens by name. Raises `BundleError` for a template that jinja2 cannot read."""
        environment = _build_environment()
        from jinja2 import TemplateError

        #: The program's text.
        self.source = source
        self._where = where
        self._tokens = dict(tokens)
        self._error = TemplateError
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise BundleError(f"{where}: the chat template cannot be read ({error})") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **values: object) -> str:
        """The text of a conversation, by default up to where the answer begins.

        `values` are what a template may ask for besides, such as `tools` or `documents`. Raises `ConfigError` where
        the template refuses the messages, a system message for instance.
        """
        told = {"tools": None, "documents": None, **self._tokens, **values}
        try:
            return self._template.render(
                messages=[_plain_message(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **told,
            )
        # A template is somebody's program: what it does with messages it was not written for can raise anything.
        except (self._error, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ConfigError(f"{self._where}: the chat template refuses these messages: {error}") from error


def load_chat_template(folder: Path, config: Mapping[str, object], *, tools: bool = False) -> ChatTemplate:
    """The template of a checkpoint or bundle; of several, the one for `tools` if asked for and there, else the default.

    `config` has the values of `tokenizer_config.json`. Files of their own come before it, as in transformers. Raises
    `BundleError` when there is none, or none to choose.
    """
    sources = _template_sources(folder, config)
    if not sources:
        raise BundleError(
            f"{folder}: the model has no chat template, neither in {TOKENIZER_CONFIG_NAME} nor as {TEMPLATE_NAME}",
            hint="use --prompt, which continues a text as it is",
        )
    name = "tool_use" if tools and "tool_use" in sources else "default"
    if name not in sources:
        raise BundleError(f"{folder}: has the chat templates {', '.join(sorted(sources))}, expected one named default")
    return ChatTemplate(sources[name], named_tokens(config), str(folder))


def has_chat_template(folder: Path, config: Mapping[str, object]) -> bool:
    """Whether a checkpoint or bundle says how to write a conversation."""
    return bool(_template_sources(folder, config))


def _template_sources(folder: Path, config: Mapping[str, object]) -> dict[str, str]:
    """Every template by its name."""
    files = {"default": folder / TEMPLATE_NAME} if (folder / TEMPLATE_NAME).is_file() else {}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))}
    if files:
        try:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder}: a chat template cannot be read ({error})") from error
    value = config.get("chat_template") or read_json(folder / TEMPLATE_JSON_NAME).get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, Mapping):
        return {str(name): str(source) for name, source in value.items()}
    if isinstance(value, list):
        try:
            return {str(entry["name"]): str(entry["template"]) for entry in value}
        except (KeyError, TypeError) as error:
            raise BundleError(f"{folder}: chat_template: expected a list of tables with name and template") from error
    return {}


def _build_environment() -> jinja2.Environment:
    """jinja2's sandbox with the names that templates count on. Raises `ConfigError` without a recent jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError("a chat needs jinja2, which is not installed", hint="pip install jinja2") from error
    installed = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if installed < JINJA2_MIN:
        raise ConfigError(
            f"a chat needs jinja2 {'.'.join(map(str, JINJA2_MIN))} or later, whose sandbox holds; "
            f"{jinja2.__version__} is installed",
            hint="pip install --upgrade jinja2",
        )
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}` marks what the assistant says, for training; it adds nothing to the text."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes what HTML would take for markup.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(pattern)


def _plain_message(message: Message) -> dict[str, object]:
    """A message without the keys that say nothing, which templates would print, and with its reasoning by every name.

    Templates look for it as `reasoning_content` or `thinking`.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    for key in ("reasoning_content", "thinking", "reasoning"):
        if key in plain:
            return {"thinking": plain[key], **plain, "reasoning_content": plain[key]}
    return plain


class Chat:
    """A conversation with a bundle: each answer is given with all messages before it in view."""

    def __init__(
        self,
        decoder: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        system: str | None = None,
        split_special_tokens: bool = False,
    ):
        """`system`, where given, is the first message, from which the model takes its role.

        With `split_special_tokens` the template's tokens are plain text where a message holds them.
        """
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._template = template
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self._plain_tokens = PlainTokens(tokenizer, template.source) if split_special_tokens else None
        self.messages: list[Message] = []
        """What was said, without the system message."""
        self.num_forgotten = 0
        """Messages that had to go for the context to hold the newest one."""

    def answer(
        self,
        text: str,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """Stream the answer to a message, which is part of the conversation once the stream has ended.

        The answer has at most `max_new_tokens`, by default and at most what the context has room for. The oldest
        messages are forgotten where the context cannot hold all. Raises `ContextError` when it does not even hold the
        new one, `ConfigError` when the template refuses it; the conversation is then as before.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: got {max_new_tokens}, expected a whole number above 0")
        max_len = self._decoder.max_len
        said = {"role": "user", "content": text}
        history, ids = self._fit(said, min(max_new_tokens or max_len, MIN_ANSWER_TOKENS, max(1, max_len // 4)))
        generation = generate(
            self._decoder,
            self._tokenizer,
            ids,
            max_new_tokens=min(max_new_tokens or max_len, max_len - len(ids)),
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
        )

        def pieces() -> Iterator[str]:
            yield from generation
            self.num_forgotten += len(self.messages) - len(history)
            self.messages = [*history, said, {"role": "assistant", "content": generation.completion.text}]

        return Generation(pieces(), generation.completion)

    def _fit(self, said: Message, room: int) -> tuple[list[Message], list[int]]:
        """As many of the messages so far as fit before `said`, in whole turns, and the ids of all."""
        history = list(self.messages)
        while True:
            ids = self._encode([*history, said])
            if len(ids) + room <= self._decoder.max_len:
                return history, ids
            if not history:
                raise ContextError(
                    f"a message of {len(ids)} tokens, template included, and {room} for its answer do not fit the "
                    f"context of {self._decoder.max_len} tokens",
                    hint="shorten the message",
                )
            history = history[2:]

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation; the template has written bos itself where the model wants it."""
        messages = [*self._system, *messages]
        if (plain := self._plain_tokens) is not None:
            return plain.encode(self._template.render([_marked(plain, message) for message in messages]))
        return self._tokenizer.encode(self._template.render(messages), add_special_tokens=False)


def _marked(plain: PlainTokens, message: Message) -> Message:
    return {key: plain.mark(value) for key, value in message.items()}
