"""tokenizer.json and what belongs to it, from GGUF's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from gguf import TokenType

from ryot.errors import CheckpointError
from ryot.models.sources.checkpoint import Json
from ryot.models.sources.gguf_file import GgufFile
from ryot.models.sources.pretokenizers import PRE_TOKENIZERS, PreTokenizer

_PREFIX = "tokenizer.ggml"
_SPACE = "▁"
#: Architectures whose old files name no pre-tokenizer, and which can only have had this one.
_PRE_BY_ARCHITECTURE = {"gpt2": "gpt-2", "gptneox": "mpt", "mpt": "mpt"}
#: What ends a turn in the chat templates of the families read here. GGUF has one eos, a chat model often two.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTokenizer:
    """The tokenizer's files by name, and the ids that config.json and generation_config.json repeat."""

    files: dict[str, bytes]
    config_ids: dict[str, Json]
    generation_config: dict[str, Json]


def tokenizer_from_metadata(file: GgufFile) -> GgufTokenizer:
    """The tokenizer of a GGUF file. Raises `CheckpointError` naming the kind, or the part that is missing."""
    vocabulary = _Vocabulary(file)
    model = file.metadata.get(f"{_PREFIX}.model")
    if model == "gpt2":
        spec, add_bos = _byte_level(vocabulary)
    elif model in ("llama", "gemma4"):
        spec, add_bos = _sentencepiece_like(vocabulary, str(model)), True
    else:
        raise CheckpointError(
            f"checkpoint {file.path}: tokenizer.ggml.model is {model}, expected gpt2, llama or gemma4"
        )
    add_bos = bool(file.metadata.get(f"{_PREFIX}.add_bos_token", add_bos))
    bos, eos, pad = (vocabulary.special_id(name) for name in ("bos", "eos", "padding"))
    template = file.metadata.get("tokenizer.chat_template")
    spec["added_tokens"] = list(_added_tokens(vocabulary))
    spec["post_processor"] = _post_processor(vocabulary, bos if add_bos else None, model == "gpt2")
    text = json.dumps(spec, ensure_ascii=False)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": vocabulary.special_id("unknown")}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length"),
        **{name: vocabulary.tokens[index] for name, index in names.items() if index is not None},
    }
    files = {"tokenizer.json": text.encode(), "tokenizer_config.json": json.dumps(tokenizer_config, indent=1).encode()}
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    ids: dict[str, Json] = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    ends: list[Json] = [*_end_ids(vocabulary, eos, template if isinstance(template, str) else "")]
    generation = {**ids, "eos_token_id": ends if len(ends) > 1 else eos}
    return GgufTokenizer(files=files, config_ids=ids, generation_config=generation)


class _Vocabulary:
    """The lists of a GGUF vocabulary, checked against each other."""

    def __init__(self, file: GgufFile):
        self.file = file
        tokens = file.metadata.get(f"{_PREFIX}.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise CheckpointError(f"checkpoint {file.path}: tokenizer.ggml.tokens is missing")
        self.tokens = [str(token) for token in tokens]
        self.types = [int(kind) for kind in self.column("token_type", int(TokenType.NORMAL))]
        self.scores = [float(score) for score in self.column("scores", 0.0)]

    def column(self, name: str, default: float) -> list[float]:
        values = self.file.metadata.get(f"{_PREFIX}.{name}")
        if values is None:
            return [default] * len(self.tokens)
        if not isinstance(values, list) or len(values) != len(self.tokens):
            raise CheckpointError(
                f"checkpoint {self.file.path}: tokenizer.ggml.{name} does not have one entry for each of the "
                f"{len(self.tokens)} tokens"
            )
        return [float(value) for value in values]

    def special_id(self, name: str) -> int | None:
        value = self.file.metadata.get(f"{_PREFIX}.{name}_token_id")
        if value is not None and not (isinstance(value, int) and value < len(self.tokens)):
            raise CheckpointError(
                f"checkpoint {self.file.path}: tokenizer.ggml.{name}_token_id is {value}, "
                f"expected an id below {len(self.tokens)}"
            )
        return value

    def join_spaces(self) -> None:
        """Give the user's tokens the sign for a space that the others have; llama.cpp looks for them in plain text."""
        for index, kind in enumerate(self.types):
            if kind == TokenType.USER_DEFINED:
                self.tokens[index] = self.tokens[index].replace(" ", _SPACE)

    def merges(self) -> list[list[str]]:
        values = self.file.metadata.get(f"{_PREFIX}.merges")
        if not isinstance(values, list):
            raise CheckpointError(f"checkpoint {self.file.path}: tokenizer.ggml.merges is missing")
        merges = []
        for merge in map(str, values):
            # The first half may itself begin with a space.
            cut = merge.find(" ", 1)
            merges.append([merge[:cut], merge[cut + 1 :]])
        return merges

    def ids(self, without: frozenset[int] = frozenset()) -> dict[str, Json]:
        ids: dict[str, Json] = {}
        for index, (token, kind) in enumerate(zip(self.tokens, self.types)):
            if kind not in without:
                ids.setdefault(token, index)
        return ids


def _byte_level(vocabulary: _Vocabulary) -> tuple[dict[str, Json], bool]:
    pre = _pre_tokenizer(vocabulary.file)
    # Rows that only pad the embedding are no tokens.
    ids = vocabulary.ids(without=frozenset({int(TokenType.UNUSED)}))
    spec = _spec(
        normalizer=pre.normalizer,
        pre_tokenizer=pre.json(),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model=_bpe(ids, [m for m in vocabulary.merges() if m[0] + m[1] in ids], ignore_merges=pre.ignore_merges),
    )
    return spec, pre.add_bos


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    name = file.metadata.get(f"{_PREFIX}.pre")
    if name is None or name == "default":
        name = _PRE_BY_ARCHITECTURE.get(str(file.metadata.get("general.architecture")))
    if name is None:
        raise CheckpointError(
            f"checkpoint {file.path}: tokenizer.ggml.pre is missing, so how it cuts text into words is unknown",
            hint="convert the model with a current llama.cpp",
        )
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"checkpoint {file.path}: tokenizer.ggml.pre is {name}, expected one of {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[str(name)]


def _sentencepiece_like(vocabulary: _Vocabulary, model: str) -> dict[str, Json]:
    """BPE over characters with spaces as ▁, and bytes for what the vocabulary lacks."""
    prefix = model == "llama" and bool(vocabulary.file.metadata.get(f"{_PREFIX}.add_space_prefix", True))
    spaces: Json = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizers: list[Json] = [spaces]
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.special_id("unknown")
    vocabulary.join_spaces()
    merges = list(_merges_by_score(vocabulary)) if model == "llama" else vocabulary.merges()
    return _spec(
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model=_bpe(
            vocabulary.ids(),
            merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
        ),
    )


def _merges_by_score(vocabulary: _Vocabulary) -> Iterator[list[str]]:
    """Every way to make a token of two others, best token first: what SentencePiece's search comes to.

    The user's own tokens go before all others there, so runs of spaces are joined first, the longest before shorter.
    """
    normal = (int(TokenType.NORMAL), int(TokenType.USER_DEFINED))
    ids = {t: i for i, (t, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types)) if kind in normal}

    def order(token: str) -> tuple[bool, float]:
        own = vocabulary.types[ids[token]] == TokenType.USER_DEFINED
        return (not own, -len(token) if own else -vocabulary.scores[ids[token]])

    for token in sorted(ids, key=order):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(ids[left], ids[right]) for left, right in halves if left in ids and right in ids]
        for left, right in sorted(known):
            yield [vocabulary.tokens[left], vocabulary.tokens[right]]


def _bpe(
    ids: dict[str, Json],
    merges: list[list[str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    fuse_unk: bool = False,
    unk_token: str | None = None,
) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": ids,
        "merges": [[left, right] for left, right in merges],
    }


def _spec(*, normalizer: Json, pre_tokenizer: Json, decoder: Json, model: Json) -> dict[str, Json]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _added_tokens(vocabulary: _Vocabulary) -> Iterator[Json]:
    """Tokens that are found in text before it is cut: control tokens are special, those of the user are not."""
    control = (int(TokenType.CONTROL), int(TokenType.UNKNOWN))
    named = {vocabulary.special_id(name) for name in ("bos", "eos", "padding", "unknown")}
    # Phi-3's own tokenizer.json has its turns eat the white space behind them; GGUF has no word for it.
    phi3 = vocabulary.file.metadata.get("general.architecture") == "phi3"
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types)):
        if kind not in (*control, int(TokenType.USER_DEFINED)) and not (index in named and "|" in token):
            continue
        yield {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": phi3 and (token == "</s>" or (token.startswith("<|") and token != "<|endoftext|>")),
            "normalized": False,
            "special": kind in control or index in named,
        }


def _post_processor(vocabulary: _Vocabulary, bos: int | None, byte_level: bool) -> Json:
    processors: list[Json] = []
    if byte_level:
        processors.append({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True})
    if bos is not None:
        token = vocabulary.tokens[bos]
        first: Json = {"SpecialToken": {"id": token, "type_id": 0}}
        sequence: list[Json] = [{"Sequence": {"id": "A", "type_id": 0}}]
        processors.append(
            {
                "type": "TemplateProcessing",
                "single": [first, *sequence],
                "pair": [first, *sequence, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
            }
        )
    if len(processors) < 2:
        return processors[0] if processors else None
    return {"type": "Sequence", "processors": processors}


def _end_ids(vocabulary: _Vocabulary, eos: int | None, template: str) -> list[int]:
    """Every token that ends an answer: eos, those that GGUF names, and what the chat template ends a turn with."""
    ends = [index for index in (eos, vocabulary.special_id("eot"), vocabulary.special_id("eom")) if index is not None]
    for token in _TURN_ENDS:
        if token in template and token in vocabulary.tokens:
            ends.append(vocabulary.tokens.index(token))
    return list(dict.fromkeys(ends))
