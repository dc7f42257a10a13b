"""Small random models of every family that GGUF and our sources share, as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 320
BOS, EOS, END_OF_TURN = 317, 318, 319
TEXTS = ["def f(x): return x + 1", "The quick brown fox jumps over the lazy dog", "ünïcødé 語 😀 words 12345"] * 4

_BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "initializer_range": 0.1,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: Name -> transformers' class, and its config.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {**_GQA, "rms_norm_eps": 1e-5, "head_dim": 32}),
    "llama_biases": ("Llama", {**_GQA, "attention_bias": True, "tie_word_embeddings": True}),
    "llama_rope_llama3": ("Llama", {**_GQA, "hidden_size": 256, "rope_parameters": _LLAMA3}),
    "llama_rope_linear": (
        "Llama",
        {**_GQA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ),
    "qwen2_rope_yarn": (
        "Qwen2",
        {
            **_GQA,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e6,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("Mistral", {**_GQA, "sliding_window": None, "head_dim": 32}),
    "smollm3": ("SmolLM3", {**_GQA, "num_hidden_layers": 4}),
    "granite": (
        "Granite",
        {
            **_GQA,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
        },
    ),
    "qwen2": ("Qwen2", {**_GQA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_GQA, "head_dim": 32}),
    "gemma3": (
        "Gemma3",
        {**_GQA, "num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    ),
    "olmo2": ("Olmo2", _GQA),
    "phi3": ("Phi3", _GQA),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "initializer_range": 0.1,
        },
    ),
    "gpt_neox": ("GPTNeoX", _BASE),
}


def build_model(name: str) -> transformers.PreTrainedModel:
    """A model of the family whose every tensor is random, norms and biases too, and is a float16 number."""
    cls, shape = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{cls}TextConfig" if cls == "Gemma3" else f"{cls}Config")(**shape)
    head = "LMHeadModel" if cls == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{cls}{head}")(config).eval()
    model.generation_config.eos_token_id = [EOS, END_OF_TURN]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter.half().float())
    return model


def byte_level(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """GPT-2's kind, three special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_end|>"]
    # Fewer merges than asked for are found in so little text.
    tokenizer.add_tokens([f"<pad{i}>" for i in range(vocab_size - 3 - tokenizer.get_vocab_size())])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1])
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    return fast


def save_model(name: str, folder: Path, **options: object) -> Path:
    build_model(name).save_pretrained(folder, **options)
    byte_level().save_pretrained(folder)
    return folder


def logits_of(folder: Path) -> torch.Tensor:
    """What transformers computes for a checkpoint in float32, at 40 positions of two sequences."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits
