"""Parity at the sizes of presets, with random weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ryot.config import resolve_variant
from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import export_unscored
from ryot.deploy.verify import check_parity
from ryot.models.sources.folder import open_folder
from ryot.train.checkpoint import save_checkpoint

from .conftest import random_decoder

#: Large models take long: of medium one recipe is enough, of 30m, 124m and 350m, which are no other structure, none.
CASES = [(p, v) for p in ("reference", "small") for v in ("baseline", "optimized")] + [("medium", "optimized")]


@pytest.mark.parametrize(("preset", "variant"), CASES)
def test_fp32_graphs_have_torchs_logits_and_tokens(preset, variant, tokenizer, tmp_path):
    cfg = resolve_variant(variant, preset).model.spec
    # Layers are alike: the largest model's width counts here, the others have their whole depth.
    cfg = dataclasses.replace(cfg, num_layers=2 if preset == "medium" else cfg.num_layers)
    model = random_decoder(cfg)
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint, spec=cfg, state=model.state_dict(), tokenizer_json=tokenizer.to_str().encode())
    # A part of the largest model's context: float64 on 100 M parameters is slow.
    length = min(cfg.max_seq_len, 16_000_000 // cfg.num_parameters * 16 + 32)
    windows = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, length))
    options = ExportOptions()
    artifact = export_unscored(
        open_folder(checkpoint), "fp32", tmp_path / "artifact", options=options, prompts=windows[:1, : cfg.max_seq_len]
    )
    parity = check_parity(model, artifact, windows)
    assert parity.tokens_total == 2 * (length - length // 2)
    assert parity.tokens_compared > 0
