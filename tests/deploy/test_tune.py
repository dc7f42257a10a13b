"""Choosing formats by measuring: what is decided follows from the times, and is found again."""

from __future__ import annotations

import json

from ryot.deploy.settings import ExportSettings
from ryot.deploy.tune import Candidate, choose_inference, decide, format_decision

from .conftest import CONFIGS

CPU = {"model": "test", "isa": ["avx2"], "caches": {}}


def candidates(**times):
    """Candidates from `precision_block=(prefill ms, decode ms)`."""
    found = []
    for label, (prefill, decode) in times.items():
        precision, _, rest = label.partition("_")
        precision = {"int8dyn": "int8-dyn"}.get(precision, precision)
        found.append(
            Candidate(
                precision=precision,
                block_size=int(rest) if rest.isdigit() else 0,
                attention="full" if rest == "full" else "flash",
                prefill_ms=prefill,
                decode_ms=decode,
            )
        )
    return found


def choose(**times):
    """The decision from these times; all scores at once are slower unless a test says otherwise."""
    return decide(CONFIGS["llama"], candidates(**{"int8dyn_full": (99.0, 99.0), **times}), CPU, num_layers=2)


def test_the_usual_block_size_stays_unless_another_is_clearly_faster():
    rest = {"fp32": (9.0, 9.0), "int8dyn": (1.0, 5.0), "int4_64": (5.0, 5.0)}
    # 64 is what the usual 128 comes to at a width of 64.
    assert choose(**rest, int8_32=(5.0, 0.99), int8_64=(5.0, 1.0)).settings.int8_block_size == 64
    assert choose(**rest, int8_32=(5.0, 0.90), int8_64=(5.0, 1.0)).settings.int8_block_size == 32
    # Of a request the prompt counts too.
    assert choose(**rest, int8_32=(1.0, 1.00), int8_64=(9.0, 1.0)).settings.int8_block_size == 32


def test_a_pair_is_chosen_only_where_a_second_copy_of_the_weights_pays():
    # The context is 48: a request is one prompt and 36 tokens.
    slow_prompt = choose(fp32=(99.0, 9.0), int8dyn=(1.0, 2.0), int8_64=(30.0, 1.0), int4_64=(30.0, 1.1))
    assert (slow_prompt.one_session, slow_prompt.latency) == ("int8", "int8-dyn+int8")
    no_gain = choose(fp32=(99.0, 9.0), int8dyn=(1.0, 1.0), int8_64=(3.0, 1.0), int4_64=(3.0, 1.1))
    assert (no_gain.one_session, no_gain.latency) == ("int8-dyn", "int8-dyn")
    verdicts = {c.label: c.verdict for c in slow_prompt.candidates}
    assert verdicts["int8/64"] == "block size of int8, fastest with one copy of the weights, decode of the fastest pair"
    assert verdicts["fp32"] == ""


def test_a_pairs_prompt_takes_the_faster_attention_and_what_decodes_too_keeps_flash():
    times = {"fp32": (99.0, 9.0), "int8dyn": (10.0, 2.0), "int8_64": (30.0, 1.0), "int4_64": (30.0, 1.1)}
    faster = choose(**times, int8dyn_full=(9.0, 3.0))
    assert (faster.settings.prefill_attention, faster.latency) == ("full", "int8-dyn+int8")
    assert {c.label: c.verdict for c in faster.candidates}["int8-dyn/full"] == "prefill of the fastest pair"
    assert choose(**times, int8dyn_full=(9.9, 1.0)).settings.prefill_attention == "flash"
    # A second copy of the weights pays only with the faster prompt, and one graph for both would decode slower.
    one = {**times, "int8dyn": (30.0, 1.0)}
    assert choose(**one).latency == choose(**one).one_session
    assert choose(**one, int8dyn_full=(1.0, 1.0)).latency == "int8-dyn+int8"


def test_scores_that_would_take_much_memory_are_not_tried_at_once(tmp_path, monkeypatch):
    # 4 heads of 48 by 48 floats.
    for limit, tried in ((4 * 4 * 48 * 48, True), (4 * 4 * 48 * 48 - 1, False)):
        monkeypatch.setattr("ryot.deploy.tune.MAX_SCORE_BYTES", limit)
        decision = choose_inference(CONFIGS["llama"], tmp_path / str(tried))
        assert any(c.attention == "full" for c in decision.candidates) == tried
    assert decision.settings.prefill_attention == "flash"


def test_a_decision_is_measured_once_for_a_cpu_and_shape(tmp_path):
    first = choose_inference(CONFIGS["opt"], tmp_path)
    assert not first.cached
    assert {c.precision for c in first.candidates} == {"fp32", "int8-dyn", "int8", "int4"}
    assert all(c.prefill_ms > 0 and c.decode_ms > 0 for c in first.candidates)
    assert [c.label for c in first.candidates if c.attention == "full"] == ["int8-dyn/full"]
    # Blocks above the width would be padding: 64 and 32 are the ones that differ.
    assert sorted({c.block_size for c in first.candidates}) == [0, 32, 64]
    again = choose_inference(CONFIGS["opt"], tmp_path)
    assert again.cached
    assert (again.settings, again.candidates) == (first.settings, first.candidates)
    assert isinstance(again.settings, ExportSettings)
    choose_inference(CONFIGS["llama"], tmp_path)
    assert len(list((tmp_path / "inference").glob("*.json"))) == 2
    for path in (tmp_path / "inference").glob("*.json"):
        assert json.loads(path.read_text())["cpu"] == first.cpu


def test_every_candidate_is_shown_with_its_times():
    decision = choose(fp32=(99.0, 9.0), int8dyn=(1.0, 2.0), int8_64=(30.0, 1.0), int4_64=(30.0, 1.1))
    text = format_decision(decision)
    assert "fastest int8-dyn+int8, with one copy of the weights int8" in text
    assert len(text.splitlines()) == 1 + len(decision.candidates)
    assert "int8-dyn      prompt     1.000 ms  token   2.0000 ms  prefill of the fastest pair" in text
