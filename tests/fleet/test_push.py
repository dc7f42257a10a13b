"""A bundle pushed over a real ssh connection to a real sshd, updated, rolled back, and refused in every way."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jsonschema
import pytest

from ryot.deploy.signing import load_key, make_key, sign_bundle
from ryot.fleet.device.store import Root
from ryot.fleet.inventory import Host
from ryot.fleet.push import PushOptions, prepare, push_all
from ryot.fleet.status import ask_status
from ryot.report.rows import load_report, load_schema
from tests.fleet.conftest import Push, rewrite_manifest, run_current, ryot
from tests.fleet.sshd import Sshd


def test_a_pushed_bundle_runs_there_and_its_record_comes_back(
    version_1: Path, sshd: Sshd, root: Path, tmp_path: Path
) -> None:
    fleet = tmp_path / "fleet.toml"
    defaults = f'[defaults]\nroot = "{root}"\npython = "{sys.executable}"\ntarget = ["phase1"]\n'
    fleet.write_text(f'{defaults}[hosts.kitchen]\nssh = "host"\n')
    where = ("--fleet", fleet, "--ssh-config", sshd.config)
    done = ryot("push", version_1, *where, "--rounds", "2", "-o", tmp_path / "report.json")
    # The tiny bundle's quality was never measured, so its verdict has to be open.
    assert done.returncode == 3, done.stderr
    assert re.search(r"^kitchen +tiny +0 +fp32", done.stdout, re.M)
    assert "kitchen: switched" in done.stderr
    jsonschema.validate(json.loads((tmp_path / "report.json").read_text()), load_schema())
    report = load_report(tmp_path / "report.json")
    [row] = report.rows
    assert (row.device, row.runs, row.runs_ok) == ("kitchen", 2, 2)
    assert row.samples[0].memory_limit_bytes == 500_000_000
    assert report.devices["kitchen"]["cpu"]["isa"] is not None
    assert {v.device for v in report.verdicts} == {"kitchen"}
    assert run_current(root).stdout.startswith("tiny-0: ")
    status = ryot("fleet", "status", *where, "--check", "--format", "json")
    [host] = json.loads(status.stdout)["hosts"]
    assert host["answer"]["current"]["figures"]["ttft_ms"] == pytest.approx(row.ttft_ms, rel=0.5)
    assert "24 of 24 golden tokens" in host["answer"]["golden"]
    table = ryot("fleet", "status", *where)
    assert re.search(r"^kitchen +tiny-0 fp32 .* good$", table.stdout, re.M)


def test_an_update_sends_what_changed_and_a_rollback_returns(
    version_1: Path, version_2: Path, push: Push, root: Path, sshd: Sshd
) -> None:
    assert push(version_1).outcome == "switched"
    again = push(version_1)
    assert (again.outcome, again.sent_bytes) == ("unchanged", 0)
    update = push(version_2)
    assert update.outcome == "switched"
    changed = [version_2 / name for name in ("ryot_manifest.json", "requirements.txt")]
    assert update.sent_bytes == sum(path.stat().st_size for path in changed)
    assert run_current(root).stdout.startswith("tiny-second: ")
    first = (root / "bundles").glob("*/model.onnx.data")
    assert len({path.stat().st_ino for path in first}) == 1  # kept once for both versions
    back = ryot("fleet", "rollback", "host", "--ssh-config", sshd.config, "--root", root)
    assert back.returncode == 0 and "tiny-0" in back.stdout
    assert run_current(root).stdout.startswith("tiny-0: ")
    none = ryot("fleet", "rollback", "host", "--ssh-config", sshd.config, "--root", root)
    assert none.returncode == 1 and "no earlier good version" in none.stderr
    assert not list((root / "incoming").iterdir())
    # What was left may have been started a moment ago, so its files stay till the next switch.
    bundles = {json.loads((b / "ryot_manifest.json").read_text())["name"] for b in (root / "bundles").iterdir()}
    assert bundles == {"tiny-0", "tiny-second"}


@pytest.mark.slow
def test_a_version_with_other_golden_tokens_never_becomes_current(
    version_1: Path, push: Push, root: Path, tmp_path: Path
) -> None:
    push(version_1)
    wrong = Path(shutil.copytree(version_1, tmp_path / "wrong"))
    golden = json.loads((wrong / "ryot_manifest.json").read_text())["golden"]
    golden[0]["tokens"][3] = (golden[0]["tokens"][3] + 1) % 300
    result = push(rewrite_manifest(wrong, name="wrong", golden=golden))
    assert result.outcome == "failed" and result.reason.startswith("the new version does not verify: ")
    assert run_current(root).stdout.startswith("tiny-0: ")


@pytest.mark.slow
def test_a_version_that_fails_behind_the_switch_is_taken_back(
    version_1: Path, version_2: Path, push: Push, root: Path, tmp_path: Path
) -> None:
    host = {"restart": f"{root}/current/run --verify >> {tmp_path}/restarts"}
    assert push(version_1, host={**host, "health": "true"}).outcome == "switched"
    # A service's own check that fails for the second version, at once.
    health = f"grep -q tiny-second {tmp_path}/restarts && kill $$ || true"
    result = push(version_2, host={**host, "health": health, "health_wait_s": 1.0})
    assert result.outcome == "failed"
    assert result.reason == "the health command ended with code -15: killed by signal 15; the version before runs again"
    assert run_current(root).stdout.startswith("tiny-0: ")
    names = [line.split(":")[0] for line in (tmp_path / "restarts").read_text().splitlines()]
    assert names == ["tiny-0", "tiny-second", "tiny-0"]
    assert Root(root).read_state().pending is None


@pytest.mark.slow
def test_a_missed_target_leaves_the_version_before(
    version_1: Path, version_2: Path, push: Push, root: Path, tmp_path: Path
) -> None:
    target = tmp_path / "impossible.toml"
    target.write_text("[limits]\ndecode_tok_s = 900000\n")
    push(version_1)
    missed = push(version_2, host={"target": (str(target),)}, rounds=1)
    assert (missed.outcome, missed.exit_code) == ("kept", 3)
    assert re.match(r"decode [\d.e+]+ < 900000 tok/s \(impossible\)$", missed.reason), missed.reason
    assert run_current(root).stdout.startswith("tiny-0: ")
    assert push(version_2, host={"target": (str(target),)}, rounds=1, even_if_missed=True).outcome == "switched"


@pytest.mark.slow
def test_a_version_that_is_far_slower_leaves_the_one_before(
    version_1: Path, push: Push, root: Path, tmp_path: Path
) -> None:
    assert push(version_1).outcome == "switched"
    slow = Path(shutil.copytree(version_1, tmp_path / "slow"))
    engine = slow / "runtime" / "ryot" / "edge" / "capi.py"
    head = "    def step(self) -> None:\n"
    assert engine.read_text().count(head) == 1
    engine.write_text(engine.read_text().replace(head, f'{head}        __import__("time").sleep(0.002)\n'))
    rewrite_manifest(slow, name="slow")
    kept = push(slow)
    assert (kept.outcome, kept.exit_code) == ("kept", 3)
    assert re.match(r"more than 2 times slower: decode \S+ tok/s, \S+ of the version that runs$", kept.reason)
    assert run_current(root).stdout.startswith("tiny-0: ")
    # A record of a better day is no reason: the version that runs is measured now, too.
    state = Root(root).read_state()
    [release] = state.releases.values()
    release.figures["decode_tok_s"] *= 1000
    Root(root).write_state(state)
    assert (
        push(rewrite_manifest(Path(shutil.copytree(version_1, tmp_path / "same")), name="same")).outcome == "switched"
    )
    assert push(slow, max_slowdown=1e6).outcome == "switched"


@pytest.mark.slow
def test_a_half_copied_attempt_is_gone_on_with(version_1: Path, push: Push, root: Path) -> None:
    data = (version_1 / "model.onnx.data").read_bytes()
    digest = json.loads((version_1 / "ryot_manifest.json").read_text())["files"]["model.onnx.data"]["sha256"]
    part = root / "incoming" / f"{digest}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(data[:-1000])
    result = push(version_1)
    whole = sum(path.stat().st_size for path in version_1.rglob("*") if path.is_file())
    assert result.outcome == "switched"
    assert result.sent_bytes < whole - len(data) + 2000


@pytest.mark.slow
def test_what_an_earlier_attempt_left_damaged_is_sent_anew(version_1: Path, push: Push, root: Path) -> None:
    data = (version_1 / "model.onnx.data").read_bytes()
    digest = json.loads((version_1 / "ryot_manifest.json").read_text())["files"]["model.onnx.data"]["sha256"]
    part = root / "incoming" / f"{digest}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(data) - 1000))
    assert push(version_1).outcome == "switched"
    assert run_current(root).returncode == 0


@pytest.mark.slow
def test_a_bit_that_flipped_on_the_device_is_put_right_by_pushing_again(
    version_1: Path, push: Push, root: Path
) -> None:
    push(version_1)
    [data] = (root / "bundles").glob("*/model.onnx.data")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    refused = run_current(root)
    assert refused.returncode == 1 and "sha256 of model.onnx.data" in refused.stderr
    assert push(version_1).reason == ""
    assert run_current(root).returncode == 0


def test_a_device_with_keys_takes_only_what_they_signed(
    version_1: Path, signed_1: Path, owner_key: Path, push: Push, root: Path, tmp_path: Path
) -> None:
    trusted = owner_key.parent / "trusted"
    assert push(signed_1, trusted_keys=trusted).outcome == "switched"
    assert Root(root).read_state().releases.popitem()[1].signed_by.startswith("ed25519:")
    unsigned = push(version_1)
    assert unsigned.outcome == "failed" and "is not signed" in unsigned.reason
    make_key(tmp_path / "stranger.pem")
    strange = Path(shutil.copytree(version_1, tmp_path / "strange"))
    sign_bundle(strange, load_key(tmp_path / "stranger.pem"))
    assert "does not trust" in push(strange).reason
    # A version that was signed before this one, for whoever kept it.
    sign_bundle(strange, load_key(owner_key), 4)
    older = push(strange)
    assert older.reason == "it was signed before what ran here last: serial 4, expected 5 or more"
    assert older.hint is not None and "fleet rollback" in older.hint
    (tmp_path / "revoked").write_text(trusted.read_text() + trusted.read_text().replace("trusted", "revoked"))
    assert "revokes" in push(signed_1, trusted_keys=tmp_path / "revoked").reason
    assert run_current(root).returncode == 0


@pytest.mark.slow
def test_two_pushes_at_once_are_one_and_a_refusal(version_1: Path, version_2: Path, push: Push, root: Path) -> None:
    results = []
    threads = [
        threading.Thread(target=lambda bundle=bundle: results.append(push(bundle, rounds=2)))
        for bundle in (version_1, version_2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.outcome for result in results) == ["failed", "switched"]
    [failed] = [result for result in results if result.outcome == "failed"]
    assert re.match(r"another push is under way there \(by \w+ on .+\)", failed.reason)
    assert run_current(root).returncode == 0


@pytest.mark.slow
def test_a_host_that_is_down_stops_no_other(version_1: Path, sshd: Sshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    down = "Host down\n  HostName 127.0.0.1\n  Port 1\n"
    config.write_text(down + sshd.client_settings().replace("Host host", "Host one two"))
    hosts = [Host(name=name, root=str(tmp_path / name), python=sys.executable) for name in ("one", "down", "two")]
    options = PushOptions(rounds=0, ssh_config=config)
    results = push_all(prepare(version_1, None), hosts, options, jobs=3, scratch=tmp_path, tell=lambda host, what: None)
    assert [result.outcome for result in results] == ["switched", "failed", "switched"]
    assert "cannot be reached: " in results[1].reason and "refused" in results[1].reason
    for name in ("one", "two"):
        assert run_current(tmp_path / name).returncode == 0


_FOUND = b'{"proved": null}\n{"python": "/usr/bin/python3"}\n'
#: What a device may answer that is no device of ours, and what is said of it.
ODD = {
    b'{"other": 1}': "its answer makes no sense: proved is missing",
    b'{"proved": 3}': "its answer makes no sense: proved: got '3', expected a text",
    b"[]": "it says something else than ryot's program: got [], expected an object",
    b"\xff\xfe{": "it says something else than ryot's program: got b'\\xff\\xfe{', expected a line of JSON",
    b"[" * 100_000: "it says something else than ryot's program: got b'[[[[",
    b'{"error": {"a": 1}, "hint": 7}': "{'a': 1}",
    _FOUND + b'{"missing": {"00": 5}, "disk_free_bytes": 9}': "its answer makes no sense: it lacks '00' from byte 5",
    _FOUND + b'{"missing": [], "disk_free_bytes": 9}': "its answer makes no sense: missing: got '[]'",
}


def test_odd_devices_stop_no_other(version_1: Path, sshd: Sshd, tmp_path: Path) -> None:
    """Each odd one says that it has a Python, which then answers something else than the program that it was sent."""
    hosts = [Host(name="good", ssh="host", root=str(tmp_path / "device"), python=sys.executable)]
    for number, answer in enumerate(ODD):
        (tmp_path / f"answer{number}").write_bytes(answer + b"\n")
        python = tmp_path / f"python{number}"
        program = f"cat {tmp_path}/answer{number}; exec cat > /dev/null"
        python.write_text(f'#!/bin/sh\ncase "$*" in *calcsize*) echo 3.12.1 64;; *) {program};; esac\n')
        python.chmod(0o755)
        hosts.append(Host(name=f"odd{number}", ssh="host", root=str(tmp_path / f"odd{number}"), python=str(python)))
    options = PushOptions(rounds=0, ssh_config=sshd.config)
    good, *odd = push_all(
        prepare(version_1, None), hosts[1:] + hosts[:1], options, jobs=4, scratch=tmp_path, tell=lambda host, what: None
    )[::-1]
    assert good.outcome == "switched", good.reason
    for result, reason in zip(reversed(odd), ODD.values(), strict=True):
        assert result.outcome == "failed" and result.reason.startswith(reason), result.reason
    # The first two begin with what a status begins with, and wait for more.
    *odd_status, status = ask_status(
        hosts[3:] + hosts[:1], sshd.config, check=False, jobs=4, tell=lambda host, what: None
    )
    assert status.answer["current"]["name"] == "tiny-0"
    assert all(one.error and not one.answer for one in odd_status)


def test_host_keys_are_never_accepted_unseen(version_1: Path, sshd: Sshd, push: Push, root: Path) -> None:
    sshd.known_hosts.write_text("")
    try:
        unknown = push(version_1)
        assert unknown.reason == "its host key is not known, and none is accepted unseen"
        assert unknown.hint is not None and "ssh HOST" in unknown.hint
        # As a user may have it who wants no questions.
        easy = sshd.config.read_text() + "  StrictHostKeyChecking no\n"
        lax = sshd.folder / "lax"
        lax.write_text(easy)
        assert push(version_1, ssh_config=lax).reason == unknown.reason
        sshd.trust_host()
        known = sshd.known_hosts.read_text().split()
        other = (sshd.folder / "user_key.pub").read_text().split()
        sshd.known_hosts.write_text(f"{known[0]} {other[0]} {other[1]}\n")
        assert push(version_1).reason == "its host key is another one than the known one; nothing was sent"
        assert not root.exists()
    finally:
        sshd.trust_host()


def test_a_jump_host_is_named_and_its_key_never_accepted_unseen(
    version_1: Path, sshd: Sshd, push: Push, tmp_path: Path
) -> None:
    jump, behind = sshd.client_settings().replace("Host host", "Host jump"), sshd.client_settings()
    config, known = tmp_path / "config", tmp_path / "known"
    other = (sshd.folder / "user_key.pub").read_text().split()
    for settings, keys, reason in (
        # As a user may have it who wants no questions; ssh hands no options to the jump host's own ssh.
        (jump + "  StrictHostKeyChecking no\n", "", "the host key of its jump host {} is not known, and none is"),
        (jump, f"[127.0.0.1]:{sshd.port} {other[0]} {other[1]}\n", "the host key of its jump host {} is another one"),
        (jump.replace("user_key", "host_key"), sshd.known_hosts.read_text(), "its jump host {} accepts none of your"),
        (jump.replace(f"Port {sshd.port}", "Port 1"), "", "cannot be reached: ssh: connect to host 127.0.0.1 port 1: "),
    ):
        known.write_text(keys)
        own = settings.replace(str(sshd.known_hosts), str(known))
        config.write_text(own + behind + "  ProxyJump jump\n")
        result = push(version_1, ssh_config=config)
        name = "\\S+@127.0.0.1" if "accepts" in reason else re.escape(f"[127.0.0.1]:{sshd.port}")
        assert re.match(reason.format(name), result.reason), result.reason
        assert known.read_text() == keys


def test_a_host_that_takes_no_key_is_not_asked_for_a_password(version_1: Path, sshd: Sshd, push: Push) -> None:
    config = sshd.folder / "stranger"
    config.write_text(sshd.config.read_text().replace("user_key", "host_key"))
    result = push(version_1, ssh_config=config)
    assert result.reason == "it accepts none of your keys; passwords are not asked for"


@pytest.mark.parametrize("name", ["-oProxyCommand=touch /tmp/evil", "a b", "host;ls"])
def test_a_name_that_is_no_host_is_refused(version_1: Path, name: str) -> None:
    done = ryot("push", version_1, "--", name)
    assert done.returncode == 2 and "name: got" in done.stderr


def test_jump_hosts_and_shared_connections_are_the_users_own(
    version_1: Path, sshd: Sshd, push: Push, root: Path, tmp_path: Path
) -> None:
    jump = sshd.client_settings().replace("Host host", "Host jump")
    behind = sshd.client_settings() + f"  ProxyCommand ssh -F {tmp_path}/config -W %h:%p jump\n"
    shared = "  ControlMaster auto\n  ControlPath /tmp/ryot-%C\n  ControlPersist 20\n"
    config = tmp_path / "config"
    config.write_text(jump + behind + shared)
    try:
        assert push(version_1, ssh_config=config).outcome == "switched"
        check = subprocess.run(
            ["ssh", "-F", config, "-O", "check", "host"], capture_output=True, text=True, check=False
        )
        assert "Master running" in check.stderr
        status = ryot("fleet", "status", "host", "--ssh-config", config, "--root", root, "--format", "json")
        assert json.loads(status.stdout)["hosts"][0]["answer"]["current"]["name"] == "tiny-0"
    finally:
        subprocess.run(["ssh", "-F", config, "-O", "exit", "host"], capture_output=True, check=False)


@pytest.mark.slow
def test_an_interrupt_ends_all_pushes_and_leaves_the_device_as_it_was(
    version_1: Path, version_2: Path, sshd: Sshd, push: Push, root: Path
) -> None:
    push(version_1)
    words = ["push", version_2, "host", "--ssh-config", sshd.config, "--root", root, "--python", sys.executable]
    desk = subprocess.Popen(
        [sys.executable, "-c", "from ryot.cli.main import run; run()", *map(str, words)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert desk.stderr is not None
    for line in desk.stderr:
        if "measuring" in line:
            break
    desk.send_signal(signal.SIGINT)
    rest = desk.stderr.read()
    assert desk.wait(timeout=10) == 130, rest
    assert run_current(root).stdout.startswith("tiny-0: ")
    assert push(version_2).outcome == "switched"


@pytest.mark.slow
def test_a_host_that_says_nothing_is_given_up(
    version_1: Path, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ryot.fleet.connection.CONNECT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = tmp_path / "config"
        config.write_text(f"Host host\n  HostName 127.0.0.1\n  Port {silent.getsockname()[1]}\n")
        result = push(version_1, ssh_config=config)
    assert result.outcome == "failed" and result.reason.startswith("cannot be reached: "), result.reason
    assert "timed out" in result.reason and result.wall_s < 30
