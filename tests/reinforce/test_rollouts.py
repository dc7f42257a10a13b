"""Samples of the edge engine, judged by the torch decoder that learns from them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ryot.adaptation import RolloutPrecision
from ryot.models.tensors import FloatArray
from ryot.reinforce.grpo import answer_logprobs, build_batch
from ryot.reinforce.rollouts import Group, LocalFleet, Policy, Sample
from ryot.train.model import Decoder
from tests.reinforce.conftest import MODEL

GROUPS = [Group((0, *range(50 + n, 60 + 2 * n)), 5, 12, seed=n) for n in range(4)]
#: Both compute in float32; log probabilities of a trained model are some nats.
TOLERANCE = 2e-5


def make_model(seed: int) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(MODEL.spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms begin as equal arrays, which must not be taken for one.
            parameter.add_(torch.randn_like(parameter) * (0.02 if "norm" in name else 0.1))
    return model.eval()


def arrays(model: Decoder) -> dict[str, FloatArray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture
def fleet(policy: Policy) -> Iterator[LocalFleet]:
    fleet = LocalFleet(policy, rows=16)
    yield fleet
    fleet.close()


def mismatch(model: Decoder, groups: list[Group], samples: list[list[Sample]]) -> float:
    batch = build_batch(groups, samples, [[1.0] * len(members) for members in samples])
    assert batch is not None
    with torch.no_grad():
        logprobs_N, entropy_N = answer_logprobs(model, batch)
        # The whole model, without what `answer_logprobs` saves itself.
        plain_BTV = model(batch.ids_BT).log_softmax(-1)[:, :-1]
        plain_BT = plain_BTV.gather(-1, batch.ids_BT[:, 1:, None])[..., 0]
        entropies_BT = -(plain_BTV.exp() * plain_BTV).sum(-1)
    mask = batch.answer_BT[:, :-1]
    assert int(batch.answer_BT.sum()) == sum(len(s.tokens) for members in samples for s in members)
    torch.testing.assert_close(logprobs_N, plain_BT[mask])
    torch.testing.assert_close(entropy_N, entropies_BT[mask])
    return float((logprobs_N - batch.sampled_BT[batch.answer_BT]).abs().max())


def test_the_engines_probabilities_are_torchs_before_and_after_an_update(fleet: LocalFleet) -> None:
    first, second = make_model(1), make_model(2)
    fleet.update(arrays(Decoder(MODEL.spec)))  # as a training begins: all norms equal
    for model, other in ((first, second), (second, first)):
        fleet.update(arrays(model))
        samples = fleet.sample(GROUPS)
        assert mismatch(model, GROUPS, samples) < TOLERANCE
        assert mismatch(other, GROUPS, samples) > 100 * TOLERANCE


@pytest.mark.parametrize("precision", ["int8", "int8-dyn"])
def test_rounded_weights_follow_every_update(precision: RolloutPrecision, policy: Policy) -> None:
    fleet = LocalFleet(policy, rows=16, precision=precision)
    models = [make_model(seed) for seed in (1, 2)]
    fleet.update(arrays(Decoder(MODEL.spec)))
    for model, other in (models, models[::-1]):
        fleet.update(arrays(model))
        samples = fleet.sample(GROUPS)
        # 8 bits of weights and activations move a log probability by some hundredths; other weights by some nats.
        assert TOLERANCE < mismatch(model, GROUPS, samples) < 0.2
        assert mismatch(other, GROUPS, samples) > 1
    fleet.close()


def test_a_sample_does_not_depend_on_its_neighbours(fleet: LocalFleet, policy: Policy) -> None:
    weights = arrays(make_model(1))
    fleet.update(weights)
    together = fleet.sample(GROUPS)
    again = fleet.sample(GROUPS)
    for members, others in zip(together, again, strict=True):
        assert [sample.tokens for sample in members] == [sample.tokens for sample in others]
    narrow = LocalFleet(policy, rows=3)
    narrow.update(weights)
    for group, members in zip(GROUPS, together, strict=True):
        (alone,) = narrow.sample([group])
        assert [sample.tokens for sample in alone] == [sample.tokens for sample in members]
    narrow.close()
    assert len({sample.tokens for members in together for sample in members}) > 15


def test_tokens_come_as_often_as_they_are_likely(fleet: LocalFleet) -> None:
    model = make_model(3)
    fleet.update(arrays(model))
    count = 4000
    (samples,) = fleet.sample([Group((0, 60), count, 1, seed=9)])
    found = np.bincount([sample.tokens[0] for sample in samples], minlength=MODEL.vocab_size)
    with torch.no_grad():
        expected = model(torch.tensor([[0, 60]]))[0, -1].softmax(-1).numpy() * count
    common = expected > 5
    chi_square = float(((found - expected)[common] ** 2 / expected[common]).sum())
    degrees = int(common.sum())
    # Mean and variance of chi square are n and 2n: five standard deviations.
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


def test_an_answer_says_whether_it_ended(fleet: LocalFleet, policy: Policy) -> None:
    model = make_model(1)
    with torch.no_grad():
        model.embedding.weight[0] *= 4  # the head is tied: the end becomes likely
    fleet.update(arrays(model))
    samples = [sample for members in fleet.sample(GROUPS) for sample in members]
    ended = [sample for sample in samples if sample.ended]
    assert ended and len(ended) < len(samples)
    assert all(sample.tokens[-1] == 0 and 0 not in sample.tokens[:-1] for sample in ended)
    assert all(len(sample.tokens) == 12 and 0 not in sample.tokens for sample in samples if not sample.ended)
