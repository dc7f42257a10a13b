from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ryot.train.model import Decoder
from tests.conftest import tiny_variant

ROOT = Path(__file__).parents[2]
#: fp32 sums of at most 64 products of order 1 in another order: 64 * 2^-24 of a logit of order 10 is below 1e-4.
TOLERANCE = 1e-4


def build(name: str, attention: str = "sdpa") -> Decoder:
    torch.manual_seed(1)
    model = Decoder(tiny_variant(name).model.spec, attention).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)  # zero-initialized outputs would hide the layers
    return model


@pytest.fixture(params=["baseline", "optimized"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_changing_a_later_token_changes_no_earlier_logit(name: str) -> None:
    model = build(name)
    ids = torch.randint(0, model.spec.vocab_size, (2, 20))
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % model.spec.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_cached_decoding_equals_full_recompute(name: str, attention: str) -> None:
    model = build(name, attention)
    ids = torch.randint(0, model.spec.vocab_size, (3, 24))
    full = model(ids)
    past, parts = None, []
    for piece in ids.split([9, 1, 1, 13], dim=1):
        logits, past = model.forward_cached(piece, past)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_written_out_attention_equals_the_fused_kernel(name: str) -> None:
    ids = torch.randint(0, 384, (2, 32))
    torch.testing.assert_close(build(name, "explicit")(ids), build(name, "sdpa")(ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("preset", ["reference", "small", "medium"])
def test_stated_parameters_are_those_of_the_model(name: str, preset: str) -> None:
    from ryot.config import resolve_variant

    cfg = resolve_variant(name, preset).model.spec
    with torch.device("meta"):
        model = Decoder(cfg)
    assert sum(p.numel() for p in model.parameters()) == cfg.num_parameters


def test_reference_baseline_is_the_historical_size_and_optimized_a_third_smaller() -> None:
    from ryot.config import resolve_variant

    baseline = resolve_variant("baseline", "reference").model.num_parameters
    optimized = resolve_variant("optimized", "reference").model.num_parameters
    assert baseline == 2_136_064
    assert optimized <= 0.7 * baseline


def test_a_decoder_without_memory_has_shapes_alone_and_imports_no_compiler() -> None:
    """Every export makes one; in a process of its own, since others here may have imported what it must not."""
    program = """
import sys
from ryot.train.model import Decoder, without_memory
from tests.deploy.conftest import CONFIGS
for spec in CONFIGS.values():
    with without_memory():
        model = Decoder(spec)
    assert all(p.is_meta for p in model.parameters())
    shapes = [{name: p.shape for name, p in made.named_parameters()} for made in (model, Decoder(spec))]
    assert shapes[0] == shapes[1]
print(*sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr
