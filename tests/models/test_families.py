"""Every family against transformers: logits of prompts and of cached decoding, and checkpoints written back."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ryot.models.registry import family_names, read_spec, write_config
from ryot.models.spec import DecoderSpec
from ryot.train.checkpoint import load_model, save_checkpoint
from ryot.train.model import Decoder
from tests.models.checkpoints import CHECKPOINTS, CONTEXT, END
from tests.models.doubles import TOLERANCE, difference, float64, load_decoder, load_reference, widen_decoder

#: Float32 against float64: sums of at most 128 products, 4 layers, angles rounded to 2^-24 of at most 95.
FLOAT32_TOLERANCE = 1e-4
#: What a part that counts must change, at least, of the largest logit.
VISIBLE = 1e-3


@dataclass
class Pair:
    """One checkpoint in both implementations, and transformers' logits of two texts as long as the context."""

    name: str
    folder: Path
    decoder: Decoder
    reference: PreTrainedModel
    ids: Tensor
    logits: Tensor


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(request: pytest.FixtureRequest, hf_checkpoint: Callable[[str], Path]) -> Iterator[Pair]:
    folder = hf_checkpoint(request.param)
    decoder, reference = load_decoder(folder), load_reference(folder)
    ids = torch.randint(0, 256, (2, decoder.spec.max_seq_len), generator=torch.Generator().manual_seed(1))
    with float64():
        logits = reference(ids).logits
    yield Pair(request.param, folder, decoder, reference, ids, logits)


def test_every_family_has_checkpoints() -> None:
    plain = {name for name in CHECKPOINTS if name in family_names()}
    assert plain == set(family_names())


def test_prompts_give_transformers_logits(pair: Pair) -> None:
    assert pair.decoder.spec.max_seq_len == (48 if "longrope" in pair.name else CONTEXT)
    for length in (1, 7, 33, pair.ids.shape[1]):
        with float64():
            expected = pair.reference(pair.ids[:, :length]).logits
        assert difference(pair.decoder(pair.ids[:, :length]), expected) < TOLERANCE
        assert difference(pair.decoder(pair.ids[1:, :length]), expected[1:]) < TOLERANCE


def test_cached_decoding_gives_transformers_logits(pair: Pair) -> None:
    pieces = pair.ids.split([17, 1, 1, 12, 1, pair.ids.shape[1] - 32], dim=1)
    # transformers 5.24 has a new name for its cache.
    key = "cache" if "cache" in inspect.signature(pair.reference.forward).parameters else "past_key_values"
    past, cache, found, expected = None, None, [], []
    for piece in pieces:
        logits, past = pair.decoder.forward_cached(piece, past)
        found.append(logits)
        with float64():
            output = pair.reference(piece, use_cache=True, **{key: cache})
        cache = output[key]
        expected.append(output.logits)
    assert difference(torch.cat(expected, dim=1), pair.logits) < TOLERANCE
    assert difference(torch.cat(found, dim=1), pair.logits) < TOLERANCE


def test_written_out_attention_gives_transformers_logits(pair: Pair) -> None:
    decoder = Decoder(pair.decoder.spec, "explicit").eval()
    decoder.load_state_dict(pair.decoder.state_dict())
    with torch.no_grad():
        assert difference(widen_decoder(decoder)(pair.ids), pair.logits) < TOLERANCE


@torch.no_grad()
def test_float32_gives_transformers_logits(pair: Pair) -> None:
    assert difference(load_model(pair.folder)(pair.ids), pair.logits) < FLOAT32_TOLERANCE


def test_parameters_are_those_of_transformers(pair: Pair) -> None:
    assert pair.decoder.spec.num_parameters == pair.reference.num_parameters()


def test_written_config_says_the_same(pair: Pair) -> None:
    values = json.loads(json.dumps(write_config(pair.decoder.spec)))
    assert read_spec(values, "written") == pair.decoder.spec


def test_written_checkpoint_gives_transformers_logits(pair: Pair, tmp_path: Path) -> None:
    model = load_model(pair.folder)
    tokenizer = (pair.folder / "tokenizer.json").read_bytes()
    save_checkpoint(tmp_path / "saved", spec=model.spec, state=model.state_dict(), tokenizer_json=tokenizer)
    written = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    stored = safetensors.torch.load_file(pair.folder / "model.safetensors")
    assert set(written) == set(stored)
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    reference = load_reference(tmp_path / "saved")
    with float64():
        assert difference(reference(pair.ids).logits, pair.logits) < TOLERANCE


def test_folder_has_a_tokenizer(pair: Pair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.folder)
    assert tokenizer.decode(tokenizer("naïve\n\t 日本").input_ids) == "naïve\n\t 日本"
    assert tokenizer.eos_token == END and tokenizer.eos_token_id == pair.reference.config.eos_token_id


def changed_specs(spec: DecoderSpec) -> Iterator[tuple[str, DecoderSpec]]:
    """The decoder without one of its parts, once for each that it has."""
    plain = {
        "activation": "silu" if spec.activation == "relu" else "relu",
        "final_norm": False,
        "qkv_bias": False,
        "out_bias": False,
        "ff_bias": False,
        "qk_norm": "none",
        "layer_windows": (),
        "layer_rotaries": (),
        "position_offset": 0,
        "parallel_residual": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_scale": 0.0,
        "logit_multiplier": 1.0,
    }
    for field, value in plain.items():
        if getattr(spec, field) != value:
            yield field, dataclasses.replace(spec, **{field: value})
    if spec.norm_eps > 1e-3:
        yield "norm_eps", dataclasses.replace(spec, norm_eps=1e-6)
    for i, rotary in enumerate(spec.rotaries):
        others: dict[str, float | str] = {"theta": rotary.theta * 3}
        if rotary.dim > 16:
            others["dim"] = 16
        if rotary.scaling not in ("default", "dynamic"):
            others["scaling"] = "default"
        for field, value in others.items():
            changed = dataclasses.replace(rotary, **{field: value})
            rotaries = (*spec.rotaries[:i], changed, *spec.rotaries[i + 1 :])
            yield f"rotary {field}", dataclasses.replace(spec, rotaries=rotaries)


@torch.no_grad()
def test_no_part_hides_behind_small_weights(pair: Pair) -> None:
    arrays, ids, logits = pair.decoder.state_dict(), pair.ids[:1, :48], pair.logits[:1, :48]
    for part, spec in changed_specs(pair.decoder.spec):
        decoder = Decoder(spec).eval()
        if part == "position_offset":
            arrays = arrays | {"positions.weight": arrays["positions.weight"][:-2]}
        decoder.load_state_dict(arrays, strict=False)
        assert difference(widen_decoder(decoder)(ids), logits) > VISIBLE, part


@torch.no_grad()
def test_no_tensor_hides_behind_small_weights(pair: Pair) -> None:
    ids, logits = pair.ids[:1, :24], pair.logits[:1, :24]
    for name, values in pair.decoder.named_parameters():
        kept = values.clone()
        values.copy_(values.roll(1, 0))
        found = difference(pair.decoder(ids), logits)
        values.copy_(kept)
        assert found > VISIBLE, name
