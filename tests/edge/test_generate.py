"""Text out of a bundle: what is streamed, where it ends, and what the golden prompts notice."""

from __future__ import annotations

import random
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from ryot.edge.bundle import Bundle, GoldenPrompt, load_bundle
from ryot.edge.engine import Engine
from ryot.edge.generate import StopFilter, check_golden, generate, generate_batch, golden_rows
from ryot.edge.sampling import Sampler
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.session import OnnxruntimeEngine
from ryot.edge.text_stream import byte_alphabet
from ryot.edge.tokenizer import Tokenizer, load_tokenizer
from ryot.errors import BundleError, ConfigError, ContextError

from .tiny_bundle import TEXT, write_manifest
from .tokenizer_kinds import unigram, write_tokenizer_folder

SAMPLED = SamplingParams(temperature=1.5, top_k=50, seed=4)


@pytest.fixture
def tokenizer(llama_path: Path) -> Tokenizer:
    return load_tokenizer(load_bundle(llama_path))


@pytest.fixture
def decoder(bundle: Bundle) -> Engine:
    return OnnxruntimeEngine(bundle)


def test_the_alphabet_is_the_one_that_tokenizers_uses() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_text_goes_to_ids_and_back(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_decoding_equals_the_tokenizers_package_for_any_ids(llama_path: Path, tokenizer: Tokenizer) -> None:
    other = RustTokenizer.from_file(str(llama_path / "tokenizer.json"))
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(300) for _ in range(20)]
        assert tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=True)


def test_a_stream_gives_whole_characters_and_the_whole_text(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(c)[i] for c in "\U0001f642ü日" for i in range(len(tokenizer.encode(c)))] + tokenizer.encode(
        TEXT
    )
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == "\U0001f642ü日" + TEXT
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces  # the characters above take several tokens


def test_an_unfinished_last_character_is_not_streamed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab\U0001f643")
    assert len(tokenizer.token_bytes(ids[-1])) < 4
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids[:-1]) == "ab"


def test_bytes_that_are_no_text_become_the_replacement_character(tokenizer: Tokenizer) -> None:
    lead, letter = tokenizer.encode("🙃")[0], tokenizer.encode("a")[0]
    stream = tokenizer.stream()
    assert stream.push(lead) == ""
    assert stream.push(letter) == "\ufffda"


@pytest.mark.parametrize("stop", [["END"], ["aab"], ["ab", "abc"], ["x", "END", "aa"]], ids=str)
def test_a_stop_string_never_leaks_however_the_text_is_cut(stop: list[str]) -> None:
    text = "aaEaabEN.ENEND and more aab"
    end = min(at for at in (text.find(s) for s in stop) if at >= 0)
    rng = random.Random(1)
    for _ in range(200):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        filtered = StopFilter(stop)
        passed = ""
        for piece in pieces:
            passed += filtered.push(piece)
            assert text[:end].startswith(passed)
        assert (passed, filtered.stopped) == (text[:end], True)


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    filtered = StopFilter(["END"])
    assert filtered.push("the EN") == "the "
    assert filtered.flush() == "EN"
    with pytest.raises(ConfigError, match="stop: got an empty string"):
        StopFilter([""])


def test_greedy_text_is_the_decoders_own_tokens(bundle: Bundle, decoder: Engine, tokenizer: Tokenizer) -> None:
    generation = generate(decoder, tokenizer, "def ", max_new_tokens=20, ignore_eos=True)
    text = "".join(generation)
    reference = OnnxruntimeEngine(bundle)
    reference.prefill([tokenizer.encode("def ")])
    expected = []
    for _ in range(20):
        expected.append(int(reference.next_token[0]))
        reference.step()
    completion = generation.completion
    assert completion.tokens == expected
    assert completion.text == text
    assert tokenizer.decode(expected) in (text, text + "\ufffd")  # an unfinished last character is not streamed
    assert completion.finish_reason == "length"


def test_sampled_text_is_what_a_sampler_draws_from_the_logits(
    bundle: Bundle, decoder: Engine, tokenizer: Tokenizer
) -> None:
    generation = generate(decoder, tokenizer, "class ", max_new_tokens=15, sampling=SAMPLED, ignore_eos=True)
    list(generation)
    ids = tokenizer.encode("class ")
    sampler, reference = Sampler(SAMPLED, ids), OnnxruntimeEngine(bundle)
    expected = []
    for _ in range(15):
        reference.prefill([ids + expected])
        expected.append(sampler.choose(reference.logits[0]))
    assert generation.completion.tokens == expected


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_gives_each_prompt_what_it_gets_alone(
    bundle: Bundle, decoder: Engine, tokenizer: Tokenizer, sampling: SamplingParams | None
) -> None:
    prompts = ["def add", "x", "class Naïve:\n"]
    batch = generate_batch(
        OnnxruntimeEngine(bundle, batch_size=3),
        tokenizer,
        prompts,
        max_new_tokens=12,
        sampling=sampling,
        ignore_eos=True,
    )
    assert [len(c.tokens) for c in batch] == [12, 12, 12]
    for row, (prompt, completion) in enumerate(zip(prompts, batch, strict=True)):
        if sampling is None or row == 0:  # other rows have a random stream of their own
            alone = generate(decoder, tokenizer, prompt, max_new_tokens=12, sampling=sampling, ignore_eos=True)
            assert completion.text == "".join(alone)
            assert completion.tokens == alone.completion.tokens


def test_generation_stops_at_a_stop_string_without_showing_it(decoder: Engine, tokenizer: Tokenizer) -> None:
    whole = "".join(generate(decoder, tokenizer, "def ", max_new_tokens=30, ignore_eos=True))
    stop = whole[7:10]
    generation = generate(decoder, tokenizer, "def ", max_new_tokens=30, stop=[stop], ignore_eos=True)
    assert "".join(generation) == whole[: whole.find(stop)]
    assert generation.completion.finish_reason == "stop"
    assert len(generation.completion.tokens) < 30


def test_the_end_of_text_ends_a_row_and_leaves_the_others(bundle: Bundle, tokenizer: Tokenizer) -> None:
    free = generate_batch(
        OnnxruntimeEngine(bundle, batch_size=2), tokenizer, ["def ", "class"], max_new_tokens=20, ignore_eos=True
    )
    eos = next(t for t in free[0].tokens[2:] if t not in free[1].tokens)
    ending = bundle._replace(eos_token_ids=(eos,))
    ended = generate_batch(OnnxruntimeEngine(ending, batch_size=2), tokenizer, ["def ", "class"], max_new_tokens=20)
    assert ended[0].tokens == free[0].tokens[: free[0].tokens.index(eos) + 1]
    assert [c.finish_reason for c in ended] == ["eos", "length"]
    assert ended[1].tokens == free[1].tokens


def test_any_of_several_end_of_text_ids_ends_a_text(bundle: Bundle, tokenizer: Tokenizer) -> None:
    engine = OnnxruntimeEngine(bundle)
    free = generate(engine, tokenizer, "def ", max_new_tokens=20, ignore_eos=True)
    list(free)
    tokens = free.completion.tokens
    ends = sorted({tokens.index(token) for token in tokens})[1:4]
    ids = [tokens[at] for at in ends]
    for listed in (ids, ids[::-1], ids[1:], [383, ids[2]]):
        engine.bundle = bundle._replace(eos_token_ids=tuple(listed))
        generation = generate(engine, tokenizer, "def ", max_new_tokens=20)
        list(generation)
        first = min(tokens.index(token) for token in listed if token in tokens)
        assert generation.completion.tokens == tokens[: first + 1]
        assert generation.completion.finish_reason == "eos"


def test_by_default_the_context_is_filled_and_no_more(decoder: Engine, tokenizer: Tokenizer) -> None:
    generation = generate(decoder, tokenizer, "def ", ignore_eos=True)
    list(generation)
    completion = generation.completion
    assert len(completion.prompt_ids) + len(completion.tokens) == 64
    assert completion.finish_reason == "length"


def test_an_empty_prompt_begins_a_text(decoder: Engine, tokenizer: Tokenizer) -> None:
    assert generate(decoder, tokenizer, "").completion.prompt_ids == [0]


@pytest.fixture(scope="module")
def foreign(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a tokenizer that puts bos and a space before each text."""
    path = Path(shutil.copytree(llama_path, tmp_path_factory.mktemp("bundle") / "foreign"))
    tokenizer = unigram()
    bos = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", special_tokens=bos)
    write_tokenizer_folder(path, tokenizer)
    write_manifest(path, bos_token_id=1, eos_token_ids=[2, 3])
    return load_bundle(path)


def test_a_text_prompt_gets_bos_and_its_continuation_keeps_every_space(foreign: Bundle) -> None:
    tokenizer, decoder = load_tokenizer(foreign), OnnxruntimeEngine(foreign)
    begins_with_space = 0
    for prompt in ("", *string.ascii_letters, "The quick", *(a + b for a in "bcdfghklmnprst" for b in "aeiou")):
        completion = (generation := generate(decoder, tokenizer, prompt, max_new_tokens=5, ignore_eos=True)).completion
        text = "".join(generation)
        assert completion.prompt_ids == [1, *tokenizer.encode(prompt, add_special_tokens=False)]
        before = tokenizer.decode(completion.prompt_ids)
        assert before + text == tokenizer.decode(completion.prompt_ids + completion.tokens)
        # The same tokens as a text of their own, which has no space before it.
        begins_with_space += text == " " + tokenizer.decode(completion.tokens)
    assert begins_with_space


def test_token_ids_begin_a_text_of_their_own(foreign: Bundle) -> None:
    tokenizer, decoder = load_tokenizer(foreign), OnnxruntimeEngine(foreign)
    for prompt in ("The quick", "one", "def", "lazy dog"):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        completion = (generation := generate(decoder, tokenizer, ids, max_new_tokens=25, ignore_eos=True)).completion
        assert "".join(generation) == tokenizer.decode(completion.tokens)
        assert completion.prompt_ids == ids


def test_an_empty_prompt_needs_a_token_that_begins_a_text(bundle: Bundle, tokenizer: Tokenizer) -> None:
    decoder = OnnxruntimeEngine(bundle._replace(bos_token_id=None))
    with pytest.raises(ConfigError, match="prompt: is empty, and this model has no token that begins a text"):
        generate(decoder, tokenizer, "")
    assert generate(decoder, tokenizer, "x").completion.prompt_ids == tokenizer.encode("x")


def test_a_manifest_may_name_no_token_that_begins_a_text(llama_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(llama_path, tmp_path / "copy"))
    write_manifest(path, bos_token_id=None)
    assert load_bundle(path).bos_token_id is None
    write_manifest(path, bos_token_id="1")
    with pytest.raises(BundleError, match="bos_token_id: got '1', expected int"):
        load_bundle(path)


def test_more_than_the_context_holds_is_refused_before_any_work(decoder: Engine, tokenizer: Tokenizer) -> None:
    decoder.prefill([[1, 2, 3]])
    length = len(tokenizer.encode("def "))
    with pytest.raises(ContextError, match=f"a prompt of {length} tokens and 64 new ones does not fit .* 64") as caught:
        generate(decoder, tokenizer, "def ", max_new_tokens=64)
    assert caught.value.hint == f"ask for at most {64 - length} new tokens"
    with pytest.raises(ContextError, match="does not fit the context of 64 tokens"):
        generate(decoder, tokenizer, "def " * 200)
    with pytest.raises(ConfigError, match="max_new_tokens: got 0"):
        generate(decoder, tokenizer, "def ", max_new_tokens=0)
    assert decoder.position == 3


def test_golden_prompts_pass_on_the_machine_that_made_them(bundle: Bundle, decoder: Engine) -> None:
    assert check_golden(decoder) == sum(len(g.tokens) for g in bundle.golden)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_golden_prompts_are_compared_together_and_named_by_their_own_number(bundle: Bundle, rows: int) -> None:
    first = bundle.golden[0]
    short = first._replace(ids=first.ids[:3], tokens=bundle.golden[0].tokens[:1], margins=(0.0,))
    golden = (first, short, first._replace(tokens=first.tokens[:2], margins=first.margins[:2]))
    many = bundle._replace(golden=golden)
    assert golden_rows(many) == 3
    assert golden_rows(many._replace(precision="int8-dyn+int4")) == 1
    assert check_golden(OnnxruntimeEngine(many, batch_size=rows)) == len(first.tokens) + 2
    wrong = golden[2]._replace(tokens=(first.tokens[0], first.tokens[1] ^ 1))
    with pytest.raises(BundleError, match="golden prompt 3: token 2 is"):
        check_golden(OnnxruntimeEngine(bundle._replace(golden=(*golden[:2], wrong)), batch_size=rows))


def with_golden(bundle: Bundle, **changes: object) -> Bundle:
    golden = bundle.golden[0]._replace(**changes)
    return bundle._replace(golden=(golden,))


def test_a_wrong_golden_token_is_found_where_the_margin_is_clear(bundle: Bundle) -> None:
    tokens = bundle.golden[0].tokens
    wrong = (*tokens[:4], tokens[4] ^ 1, *tokens[5:])
    with pytest.raises(BundleError, match=f"golden prompt 1: token 5 is {tokens[4]}, expected {tokens[4] ^ 1}"):
        check_golden(OnnxruntimeEngine(with_golden(bundle, tokens=wrong)))


def test_nothing_is_compared_from_the_first_unclear_margin_on(bundle: Bundle) -> None:
    tokens = bundle.golden[0].tokens
    wrong = (*tokens[:4], *(t ^ 1 for t in tokens[4:]))
    margins = (*[1.0] * 4, 0.0, *[1.0] * (len(tokens) - 5))
    assert check_golden(OnnxruntimeEngine(with_golden(bundle, tokens=wrong, margins=margins))) == 4
    with pytest.raises(BundleError, match="no golden token has a margin above"):
        check_golden(OnnxruntimeEngine(with_golden(bundle, margins=[0.0] * len(tokens))))


def test_a_bundle_without_golden_prompts_compares_nothing(bundle: Bundle) -> None:
    assert check_golden(OnnxruntimeEngine(bundle._replace(golden=()))) == 0


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(bundle: Bundle) -> None:
    small = bundle._replace(model=bundle.model._replace(vocab_size=200))
    with pytest.raises(BundleError, match="has 300 tokens, the model has 200"):
        load_tokenizer(small)


def test_a_broken_tokenizer_is_refused(llama_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(llama_path / "tokenizer.json", tmp_path))
    path.write_text("{")
    with pytest.raises(BundleError, match="the tokenizer cannot be read"):
        Tokenizer(path)


def test_golden_margins_are_those_of_the_logits(bundle: Bundle, decoder: Engine) -> None:
    golden: GoldenPrompt = bundle.golden[1]
    decoder.prefill([golden.ids])
    second, best = np.sort(decoder.logits[0])[-2:]
    assert golden.margins[0] == pytest.approx(best - second, abs=1e-4)
