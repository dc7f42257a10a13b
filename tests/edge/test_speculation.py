"""Drafts change how many tokens a call computes, and no token."""

from __future__ import annotations

from pathlib import Path

import pytest

from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.scheduler import run_all
from ryot.edge.sequence import Request
from ryot.edge.speculation import SIZES, TRIALS, DraftCosts, Drafter
from ryot.errors import BundleError
from tests.edge.test_scheduler import CONTEXT, assert_tokens, build_scheduler
from tests.edge.tiny_bundle import write_bundle

PHRASE = [11, 57, 203, 8, 99, 140, 31, 76, 5, 160]


@pytest.fixture(scope="module", params=["llama", "opt", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = {
        "llama": {},
        "opt": {"position_ids": True, "two_sessions": True, "seed": 3},
        "int8": {"kv_dtype": "int8", "seed": 5},
    }[request.param]
    return load_bundle(write_bundle(tmp_path_factory.mktemp("drafts") / request.param, context=CONTEXT, **options))


#: Two tokens alone, so that what is said repeats itself.
FEW = ((11, 60.0), (57, 60.0))


@pytest.mark.parametrize(
    "sampling", [SamplingParams(logit_bias=FEW), SamplingParams(temperature=0.9, seed=4, logit_bias=FEW)]
)
def test_tokens_are_those_without_drafts(
    bundle: Bundle, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = build_scheduler(bundle, rows=2)
    scheduler.engine.open_checker()
    # Made to pay, so that what is tested does not depend on this machine.
    monkeypatch.setattr(DraftCosts, "pays", lambda costs, size, gained: True)
    for length in (25, 120, 300):
        request = Request(
            prompt_ids=(PHRASE * 40)[:length], max_tokens=80, sampling=sampling, ignore_eos=True, stop=("\x00",)
        )
        events = run_all(scheduler, [request])[0]
        assert_tokens(bundle, request, [event.token for event in events if event.token is not None])
        assert events[-1].finish_reason in ("length", "stop")
    assert scheduler.counters.drafts > 0
    assert 0 <= scheduler.counters.accepted_tokens <= scheduler.counters.draft_tokens
    assert scheduler.idle and scheduler.engine.lengths == [0, 0]


def test_there_are_no_drafts_where_several_run_or_the_context_ends(bundle: Bundle) -> None:
    scheduler = build_scheduler(bundle, rows=2)
    scheduler.engine.open_checker()
    requests = [Request(prompt_ids=PHRASE * 5, max_tokens=30, ignore_eos=True) for _ in range(2)]
    for request in requests:
        scheduler.add(request)
    while scheduler.num_running + scheduler.num_waiting == 2:
        assert scheduler.counters.drafts == 0
        scheduler.step()
    while not scheduler.idle:
        scheduler.step()
    full = Request(prompt_ids=(PHRASE * 60)[: CONTEXT - 9], max_tokens=9, ignore_eos=True)
    events = run_all(scheduler, [full])[0]
    assert_tokens(bundle, full, [event.token for event in events if event.token is not None])
    assert len(events) == 9


def test_where_no_draft_can_pay_the_weights_are_given_back(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = build_scheduler(bundle, rows=1)
    scheduler.engine.open_checker()
    observe = DraftCosts.observe
    # As if a call took as long as four steps; and no pause between two of them, so that it is soon known.
    monkeypatch.setattr(DraftCosts, "observe", lambda costs, size, steps: observe(costs, size, 4.0))
    monkeypatch.setattr("ryot.edge.speculation.PAUSE_TOKENS", 0)
    while scheduler.engine.can_check:
        assert scheduler.counters.drafts < TRIALS
        request = Request(
            prompt_ids=PHRASE * 3, max_tokens=40, sampling=SamplingParams(logit_bias=FEW), ignore_eos=True
        )
        events = run_all(scheduler, [request])[0]
        assert_tokens(bundle, request, [event.token for event in events if event.token is not None])
    assert scheduler.counters.drafts == TRIALS
    costs = DraftCosts()
    for _ in range(TRIALS):
        assert not costs.never_pay
        observe(costs, SIZES[0], 2.9)
    assert not costs.never_pay


def test_a_draft_is_what_followed_before() -> None:
    drafter = Drafter(DraftCosts())
    ids = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert drafter.draft(ids, 100) == [4, 5]
    drafter.learn(2, 2)
    ids += [4, 5, 6]
    assert drafter.draft(ids, 100) == [1, 2, 3, 4]
    assert drafter.draft(ids, 3) == [1, 2]
    assert drafter.draft(ids, 1) == []
    assert Drafter(DraftCosts()).draft([7, 7, 7, 7], 50) == [7, 7]
    assert Drafter(DraftCosts()).draft([1, 2, 3, 4, 5], 50) == []


def test_drafts_pause_where_they_do_not_pay() -> None:
    costs = DraftCosts()
    for size in SIZES:
        costs.observe(size, 1.5)
    drafter, ids = Drafter(costs), [1, 2, 3, 9, 1, 2, 3]
    calls = 0
    while draft := drafter.draft(ids, 50):
        drafter.learn(len(draft), 0)
        ids.append(1000 + calls)
        ids += [1, 2, 3]
        calls += 1
        assert calls < 50
    # One token came of each call that took a step and a half.
    assert 1 <= calls <= 10
    for step in range(40):
        ids += [2000 + step, 1, 2, 3]
    assert drafter.draft(ids, 50)


def test_bundles_whose_tokens_share_a_scale_have_no_drafts(tmp_path: Path) -> None:
    found = load_bundle(write_bundle(tmp_path / "b", context=CONTEXT))
    found = found._replace(shared_scale=True)
    scheduler = build_scheduler(found)
    scheduler.engine.open_checker()
    assert not scheduler.engine.can_check


def test_drafts_are_never_checked_by_another_bundle_s_weights(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle", context=CONTEXT, seed=1)
    scheduler = build_scheduler(load_bundle(path))
    path.rename(tmp_path / "old")
    write_bundle(path, context=CONTEXT, seed=2)
    with pytest.raises(BundleError, match="was replaced by another bundle"):
        scheduler.engine.open_checker()
    assert not scheduler.engine.can_check
