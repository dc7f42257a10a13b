"""`config.json`: every key of transformers is read, refused or harmless, and a missing one takes its default."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from ryot.errors import CheckpointError
from ryot.models.registry import family_names, find_family, read_spec
from tests.models.checkpoints import CHECKPOINTS

#: Keys that change no logit of a causal model in evaluation.
HARMLESS = {
    # what the file says of itself
    *("architectures", "auto_map", "dtype", "model_type", "name_or_path", "torch_dtype", "transformers_version"),
    # training
    *("attention_dropout", "attn_pdrop", "classifier_dropout", "dropout", "embd_pdrop", "hidden_dropout", "layerdrop"),
    *("init_std", "initializer_range", "resid_pdrop"),
    # token ids are the generation config's
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    # heads of other tasks
    *("id2label", "label2id", "num_labels", "problem_type", "summary_activation", "summary_first_dropout"),
    *("summary_last_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    # how a result is returned and computed, not which
    *("chunk_size_feed_forward", "is_decoder", "is_encoder_decoder", "output_attentions", "output_hidden_states"),
    *("pretraining_tp", "reorder_and_upcast_attn", "return_dict", "use_cache"),
}
#: GPT-NeoX's default sizes rotate 24 channels of a head, which the fused attention does not take.
SIZES = {"gpt_neox": {"hidden_size": 8192}}
#: Attributes of a config in transformers' source that are no keys of the file.
NOT_KEYS = {"get", "get_text_config", "standardize_rope_params", "to_dict", "vision_config", "text_config"}


class Recorder(dict[str, Any]):
    """The values of a `config.json` that remember which were asked for."""

    def __init__(self, values: dict[str, Any], read: set[str]):
        super().__init__(values)
        self.read = read

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)


@pytest.fixture(params=family_names())
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config_class(family: str) -> type[PreTrainedConfig]:
    return type(AutoConfig.for_model(family))


def known_keys(family: str) -> set[str]:
    """Fields of transformers' config class, the older keys that it takes, and what the model asks a config for."""
    cls = config_class(family)
    keys = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    keys |= set(re.findall(r'kwargs\.(?:pop|get)\("(\w+)"', inspect.getsource(cls)))
    if hasattr(cls(), "rope_parameters") and "convert_rope_params_to_dict" not in vars(cls):
        keys |= {"rope_scaling", "rope_theta", "partial_rotary_factor"}
    folder = cls.__module__.rpartition(".")[0]
    source = inspect.getsource(importlib.import_module(f"{folder}.modeling_{folder.rpartition('.')[2]}"))
    # A wrapper's classes follow the text model's in the file.
    source = source.split("class Gemma3MultiModalProjector")[0]
    source = re.sub(
        r"class \w+For(?:Sequence|Token|Question)\w+\(.*?(?=\nclass |\n@auto|\Z)", "", source, flags=re.DOTALL
    )
    keys |= set(re.findall(r"\bconfig\.([a-z]\w+)", source))
    keys |= set(re.findall(r'(?:getattr|hasattr)\((?:self\.)?config, "([a-z]\w+)"', source))
    return keys - NOT_KEYS


def test_every_key_is_read_or_harmless(family: str, hf_checkpoint: Callable[[str], Path]) -> None:
    read: set[str] = set()
    read_spec(Recorder({"model_type": family, **SIZES.get(family, {})}, read), "empty")
    for name in CHECKPOINTS:
        values = json.loads((hf_checkpoint(name) / "config.json").read_text())
        if values["model_type"] == family:
            read_spec(Recorder(values, read), name)
    known = known_keys(family)
    assert len(known) > 20
    assert known - read - HARMLESS == set()
    # Names that transformers does not have would be mistakes here.
    assert not (read & HARMLESS) - {"model_type"}


def test_missing_keys_take_transformers_defaults(family: str) -> None:
    sizes = SIZES.get(family, {})
    stated = config_class(family)(**sizes).to_dict()
    assert read_spec({"model_type": family, **sizes}, "empty") == read_spec(stated, "stated")


def test_null_means_what_it_means_to_transformers(family: str) -> None:
    cls, agreed = config_class(family), 0
    for key in known_keys(family):
        try:
            values = SIZES.get(family, {}) | {key: None}
            expected = read_spec(cls(**values).to_dict(), "stated")
            found = read_spec({"model_type": family, **values}, "null")
        except (CheckpointError, TypeError, ValueError, StrictDataclassError):  # refused by us or by transformers
            continue
        assert found == expected, key
        agreed += 1
    assert agreed > 10


def test_other_values_mean_what_they_mean_to_transformers(family: str) -> None:
    cls, sizes = config_class(family), SIZES.get(family, {})
    stated, plain = cls(**sizes).to_dict(), read_spec({"model_type": family, **sizes}, "plain")
    changed = set()
    for key in known_keys(family) - HARMLESS:
        before = stated.get(key, getattr(cls(), key, None))
        match before:
            case bool():
                other: Any = not before
            case int() | float():
                other = before * 2
            case _:
                continue
        values = sizes | {key: other}
        try:
            expected = read_spec(cls(**values).to_dict(), "stated")
            found = read_spec({"model_type": family, **values}, "other")
        except (CheckpointError, ValueError, StrictDataclassError):  # refused by us or by transformers
            continue
        assert found == expected, key
        changed |= {key} if found != plain else set()
    assert len(changed) >= 7, changed


def test_unknown_keys_are_ignored(family: str) -> None:
    plain = {"model_type": family, **SIZES.get(family, {})}
    values = plain | {"mlx_quant": 4, "unsloth_fixed": True, "_name_or_path": "x"}
    assert read_spec(values, "extra") == read_spec(plain, "plain")


REFUSED: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "use_bidirectional_attention": True,
        "hidden_activation": "quick_gelu",
        "layer_types": ["chunked_attention"] * 26,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True, "activation_function": "tanh"},
    "gpt_neox": {"head_dim": 32, "hidden_act": "quick_gelu"},
    "granite": {"logits_scaling": 0, "attention_multiplier": 0.0, "residual_multiplier": None},
    "llama": {
        "partial_rotary_factor": 0.5,
        "hidden_act": "relu2",
        "num_attention_heads": 0,
        "hidden_size": "4096",
        "rms_norm_eps": None,
        "rope_theta": None,
        "attention_bias": 1,
        "num_key_value_heads": 5,
        "head_dim": 12,
        "rope_scaling": {"rope_type": "mrope", "mrope_section": [2, 3, 3]},
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
        "per_layer_config": {"0": {"head_dim": 64}},
    },
    "mistral": {"layer_types": ["full_attention"], "sliding_window": 0},
    "olmo2": {"clip_qkv": 8.0},
    "opt": {"layer_norm_elementwise_affine": False, "activation_function": "mish"},
    "phi3": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    },
    "qwen2": {"layer_types": ["sliding_attention"] * 32, "max_window_layers": -1.5},
    "qwen3": {"layer_types": ["full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 0},
}


@pytest.mark.parametrize("family, key", [(family, key) for family, keys in REFUSED.items() for key in keys])
def test_what_is_not_computed_is_refused_by_name(family: str, key: str) -> None:
    values = {"model_type": family, key: REFUSED[family][key]}
    if key == "max_window_layers":
        values["use_sliding_window"] = True
    with pytest.raises(CheckpointError) as error:
        read_spec(values, "a/config.json")
    ours = {"num_key_value_heads": "num_kv_heads", "rope_parameters": "", "rope_scaling": "rope_type"}
    missing = {"llama": "high_freq_factor is missing", "phi3": "short_factor has 8 numbers, expected 48"}
    gemma = {"gemma3_text": "rope_parameters has 'factor'"}
    if key == "sliding_window" and family == "gemma3_text":
        assert "sliding_window is null" in str(error.value)
    expected = (missing | gemma)[family] if key == "rope_parameters" else ours.get(key, key)
    assert "a/config.json: " in str(error.value) and expected in str(error.value)


def test_a_scaling_that_is_not_known_is_named_with_those_that_are() -> None:
    values = {"model_type": "llama", "rope_scaling": {"type": "ntk", "factor": 2.0}}
    with pytest.raises(
        CheckpointError, match=r"rope_type is 'ntk', expected one of default, linear, llama3, yarn, dyn"
    ):
        read_spec(values, "config.json")


def test_a_key_of_a_scaling_that_is_not_known_is_named() -> None:
    values = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0, "offset": 3}}
    with pytest.raises(CheckpointError, match="rope_parameters: offset is 3, which is not understood"):
        read_spec(values, "config.json")


@pytest.mark.parametrize("scaling", ["su", "yarn", "longrope"])
def test_old_names_of_longrope_are_read(scaling: str) -> None:
    short = [1.0 + i / 8 for i in range(48)]
    table = {"type": scaling, "short_factor": short, "long_factor": short}
    values = {"model_type": "phi3", "rope_scaling": table, "max_position_embeddings": 131_072}
    spec = read_spec(values, "config.json")
    assert (spec.max_seq_len, spec.rotaries[0].short_factors) == (4096, tuple(short))
    # sqrt(1 + ln 32 / ln 4096): what the paper's code and transformers use for 32 times the context.
    assert spec.rotaries[0].magnitude == pytest.approx(1.190238, rel=1e-6)


@pytest.mark.parametrize("name", ["", "bert", "Llama", "gemma2", "gemma3"])
def test_an_unknown_family_is_answered_with_those_that_are_known(name: str) -> None:
    with pytest.raises(CheckpointError) as error:
        find_family(name, "a/config.json")
    if name == "gemma3":
        assert "images" in str(error.value) and "gemma3_text" in (error.value.hint or "")
    else:
        assert f"model_type is {name!r}, expected one of {', '.join(family_names())}" in str(error.value)
