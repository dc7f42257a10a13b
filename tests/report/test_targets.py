"""Targets are read strictly: every limit has a unit, a possible value and, in the package, a source."""

from __future__ import annotations

import json

import pytest

from ryot.errors import ConfigError
from ryot.mapping import to_mapping
from ryot.report.target_table import render_target, render_targets
from ryot.report.targets import LIMITS, build_target, list_targets, load_target, load_targets

MACHINE = {"cpu": {"model": "Cortex-A53", "cores": 4}, "board": "Raspberry Pi Zero 2 W Rev 1.0"}


def test_phase1_has_the_historical_limits():
    limits = load_target("phase1").limits
    assert (limits["ttft_ms"], limits["decode_tok_s"], limits["peak_rss_mb"]) == (120, 25, 500)


def test_every_number_of_every_packaged_target_has_a_source():
    targets = list_targets()
    assert {t.name for t in targets} == {
        "phase1", "pi-zero-2w", "pi-5", "ryzen-laptop", "browser-tab", "container-512m",
    }  # fmt: skip
    for target in targets:
        assert target.summary
        for key in target.limits:
            assert len(target.sources.get(key, "")) > 10, (target.name, key)
        if target.device is not None:
            for key in ("cores", "ram_mb", "isa"):
                assert len(target.sources.get(key, "")) > 10, (target.name, key)


def test_a_target_survives_its_way_through_a_report():
    for target in list_targets():
        assert build_target(target.name, to_mapping(target), "report") == target


def test_a_file_of_the_user_is_a_target_too(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('prefer = "fastest"\n[limits]\nttft_ms = 10\n')
    target = load_target(str(path))
    assert (target.name, target.prefer, target.limits["ttft_ms"], target.threads) == ("mine", "fastest", 10.0, 1)
    assert target.memory_limit_bytes is None
    assert load_target("pi-zero-2w").memory_limit_bytes == 200_000_000


def test_several_targets_load_once_each():
    assert [t.name for t in load_targets(["phase1", "pi-5", "phase1"])] == ["phase1", "pi-5"]


def test_two_files_of_one_name_are_refused(tmp_path):
    path = tmp_path / "phase1.toml"
    path.write_text("[limits]\nttft_ms = 10\n")
    with pytest.raises(ConfigError, match="share the name 'phase1'"):
        load_targets(["phase1", str(path)])


def test_an_unknown_target_is_met_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'pi-zero-2w'"):
        load_target("pi-zero")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[limits]\nttft = 100", "key 'ttft' has no unit; did you mean 'ttft_ms'"),
        ("[limits]\nmemory = 100", "key 'memory' has no unit; did you mean 'peak_rss_mb'"),
        ("[limits]\nttft_s = 1", "did you mean 'ttft_ms'"),
        ("[limits]\ntttf_ms = 1", "'tttf_ms' is not known; did you mean 'ttft_ms'"),
        ("[limit]\nttft_ms = 1", "did you mean 'limits'"),
        ("[limits]\n", "expected at least one of ttft_ms"),
        ("[limits]\nttft_ms = -5", "ttft_ms: got -5, an impossible limit; expected 0.001 to"),
        ("[limits]\nttft_ms = 0", "impossible"),
        ("[limits]\nttft_ms = inf", "expected a number in ms"),
        ("[limits]\nttft_ms = '100'", "expected a number in ms"),
        ("[limits]\nbpb_ratio = 0.5", "impossible"),
        ("prefer = 'small'\n[limits]\nttft_ms = 1", "did you mean 'smallest'"),
        ("limits = 3", "expected a table"),
        ("[limits]\nttft_ms = 1\n[sources]\nttft = 'x'", "did you mean 'ttft_ms'"),
    ],
)
def test_a_wrong_target_file_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.toml") as caught:
        load_target(str(path))
    assert message in str(caught.value)


DEVICE = '[limits]\npeak_rss_mb = 400\n[device]\nname = "d"\ncores = 2\nram_mb = 512\nisa = ["neon"]\n'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("peak_rss_mb = 400", "peak_rss_mb = 600"), "at most the device's ram_mb 512"),
        (("ram_mb", "ram"), "key 'ram' has no unit; did you mean 'ram_mb'"),
        (("cores = 2", "cores = 0"), "cores: got 0"),
        (("cores = 2", "cores = 2\nthreads = 3"), "threads: got 3, expected 1 to 2"),
        (("cores = 2\n", ""), "cores is missing"),
        (("cores = 2", "cores = 'two'"), "a whole number"),
    ],
)
def test_a_wrong_device_says_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "bad.toml"
    path.write_text(DEVICE.replace(*change))
    with pytest.raises(ConfigError) as caught:
        load_target(str(path))
    assert message in str(caught.value)


def test_a_machine_is_recognised_as_the_device_by_its_own_name():
    assert load_target("pi-zero-2w").is_device(MACHINE)
    assert not load_target("pi-5").is_device(MACHINE)
    assert load_target("phase1").is_device(MACHINE)
    assert not load_target("browser-tab").is_device(MACHINE)


def test_limits_cover_every_verdict_of_a_report():
    assert [k.metric for k in LIMITS.values()] == ["ttft", "throughput", "memory", "size", "quality", "context"]


def test_the_list_of_targets_fits_the_terminal_and_names_them_all():
    targets = list_targets()
    text = render_targets(targets)
    assert max(map(len, text.splitlines())) <= 100
    assert all(any(line.startswith(t.name) for line in text.splitlines()) for t in targets)
    assert [t["name"] for t in json.loads(render_targets(targets, "json"))["targets"]] == [t.name for t in targets]
    assert render_targets(targets, "csv").splitlines()[0].startswith("target,ttft_ms,decode_tok_s")
    assert render_targets(targets, "md").count("\n") == len(targets) + 1


def test_one_target_is_shown_with_the_source_of_each_number():
    text = render_target(load_target("pi-5"))
    assert "  ttft_ms ≤ 100\n    Nielsen" in text and "  cores 4\n    Broadcom BCM2712" in text
    assert max(map(len, text.splitlines())) <= 100
