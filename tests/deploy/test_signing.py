"""Signed bundles and archives of them: made the same each time, and refused with one bit changed anywhere."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from ryot.deploy.archive import TRAILER_BYTES, pack_bundle, unpack_archive
from ryot.deploy.sbom import SBOM_NAME
from ryot.deploy.signing import load_key, make_key, sign_bundle
from ryot.edge.bundle import MANIFEST_NAME, RECORD_NAME
from ryot.edge.trust import (
    SIGNATURE_NAME,
    Signature,
    Signer,
    TrustedKeys,
    check_whole,
    parse_trusted_keys,
    signed_message,
    write_signatures,
)
from ryot.errors import BundleError, ConfigError
from tests.device_bundle import write_device_bundle


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a record, not signed; read-only."""
    folder = write_device_bundle(tmp_path_factory.mktemp("plain") / "bundle")
    (folder / RECORD_NAME).write_text('{"schema": 2}\n')
    return folder


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "owner.pem"
    make_key(path)
    return path


@pytest.fixture(scope="session")
def signed(plain: Path, key_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, signed; read-only."""
    folder = Path(shutil.copytree(plain, tmp_path_factory.mktemp("signed") / "bundle"))
    sign_bundle(folder, load_key(key_file))
    return folder


@pytest.fixture(scope="session")
def keys(signed: Path) -> TrustedKeys:
    key = json.loads((signed / SIGNATURE_NAME).read_text())["signatures"][0]["key"]
    return parse_trusted_keys(f"# ours\ntrusted {key} the owner\n", "trusted keys")


def test_a_signed_bundle_is_taken_and_its_signer_named(signed: Path, keys: TrustedKeys) -> None:
    bundle, signer = check_whole(signed, keys)
    assert signer is not None and signer.key.comment == "the owner" and signer.serial > 1_700_000_000
    assert "runtime/ryot/edge/trust.py" in bundle.files
    # The device's own check: the bundle's run.py, with what the device has.
    trusted = signed.parent / "trusted"
    trusted.write_text(f"trusted {signer.key}\n")
    command = [sys.executable, "-I", signed / "run.py", "--verify", "--trusted-keys", trusted]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"golden tokens compared and equal, signed by {signer}\n")


def test_a_flipped_bit_in_any_file_of_a_signed_bundle_is_refused(
    signed: Path, keys: TrustedKeys, tmp_path: Path
) -> None:
    rng = random.Random(17)
    folder = Path(shutil.copytree(signed, tmp_path / "copy"))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    assert {MANIFEST_NAME, RECORD_NAME, SIGNATURE_NAME, "model.onnx.data"} <= {path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        for _ in range(8 if path.name == SIGNATURE_NAME else 1):
            path.write_bytes(flip(whole, rng))
            with pytest.raises((BundleError, ConfigError)):
                check_whole(folder, keys)
        path.write_bytes(whole)
    check_whole(folder, keys)


def test_every_bit_of_a_signature_counts(signed: Path, keys: TrustedKeys, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(signed, tmp_path / "copy"))
    whole = (folder / SIGNATURE_NAME).read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / SIGNATURE_NAME).write_bytes(changed)
        with pytest.raises(BundleError):
            check_whole(folder, keys)


def test_a_file_that_the_manifest_does_not_list_is_refused(signed: Path, keys: TrustedKeys, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(signed, tmp_path / "copy"))
    (folder / "runtime" / "numpy.py").write_text("print('mine')\n")
    with pytest.raises(BundleError, match=r"runtime/numpy.py is not in its manifest"):
        check_whole(folder, keys)
    (folder / "runtime" / "numpy.py").unlink()
    (folder / "runtime" / "numpy").symlink_to("/tmp")
    with pytest.raises(BundleError, match="is a link"):
        check_whole(folder, keys)


def test_who_may_sign(plain: Path, signed: Path, keys: TrustedKeys, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not signed, and trusted keys asks for a signature"):
        check_whole(plain, keys)
    other = Path(shutil.copytree(plain, tmp_path / "other"))
    stranger = make_key(tmp_path / "stranger.pem")
    sign_bundle(other, load_key(tmp_path / "stranger.pem"))
    with pytest.raises(BundleError, match=r"signed by ed25519:\w.*, which trusted keys does not trust"):
        check_whole(other, keys)
    revoked = parse_trusted_keys(f"trusted {keys.trusted[0]}\nrevoked {keys.trusted[0]} laptop lost\n", "K")
    with pytest.raises(BundleError, match=r"which K revokes \(laptop lost\)"):
        check_whole(signed, revoked)
    both = Path(shutil.copytree(signed, tmp_path / "both"))
    sign_bundle(both, load_key(tmp_path / "stranger.pem"))
    assert signer_of(both, keys).key == keys.trusted[0]
    assert check_whole(both, parse_trusted_keys(f"trusted {stranger} s", "K"))[1] is not None


def test_the_number_of_a_signing_is_signed_and_the_last_one_counts(
    plain: Path, key_file: Path, keys: TrustedKeys, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "bundle"))
    # As it was signed before there were numbers.
    old = Signature(keys.trusted[0], load_key(key_file).sign(signed_message(folder, 0)))
    (folder / SIGNATURE_NAME).write_bytes(write_signatures([old]))
    assert json.loads((folder / SIGNATURE_NAME).read_text())["schema"] == 1
    assert signer_of(folder, keys).serial == 0
    other = make_key(tmp_path / "other.pem")
    sign_bundle(folder, load_key(tmp_path / "other.pem"), 7)
    both = parse_trusted_keys(f"trusted {keys.trusted[0]} a\ntrusted {other} b\n", "K")
    assert (signer_of(folder, both).serial, signer_of(folder, both).key.comment) == (7, "b")
    written = (folder / SIGNATURE_NAME).read_text()
    (folder / SIGNATURE_NAME).write_text(written.replace('"serial": 7', '"serial": 8'))
    with pytest.raises(BundleError, match="does not fit"):
        check_whole(folder, both)


def signer_of(folder: Path, keys: TrustedKeys) -> Signer:
    signer = check_whole(folder, keys)[1]
    assert signer is not None
    return signer


def test_a_bundle_that_changed_since_is_signed_anew(
    signed: Path, keys: TrustedKeys, key_file: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(signed, tmp_path / "copy"))
    (folder / RECORD_NAME).unlink()
    with pytest.raises(BundleError, match=r"does not fit ryot_manifest\.json and record\.json"):
        check_whole(folder, keys)
    sign_bundle(folder, load_key(key_file))
    check_whole(folder, keys)


def test_keys_are_files_of_their_owner_and_may_have_a_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    make_key(path, "secret")
    assert path.stat().st_mode & 0o777 == 0o600
    load_key(path, "secret")
    with pytest.raises(ConfigError, match=r"key\.pem: Password was not given"):
        load_key(path)
    with pytest.raises(ConfigError, match="its passphrase is wrong"):
        load_key(path, "guess")
    with pytest.raises(ConfigError, match="exists"):
        make_key(path)


def test_openssl_makes_keys_for_it(plain: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    path = tmp_path / "openssl.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", path], check=True, capture_output=True)
    folder = Path(shutil.copytree(plain, tmp_path / "bundle"))
    key = sign_bundle(folder, load_key(path))
    assert signer_of(folder, parse_trusted_keys(f"trusted {key}", "K")).key == key


@pytest.mark.parametrize("line", ["trust ed25519:AAAA", "trusted", "trusted ed25519:AAAA", "trusted rsa:AAAA"])
def test_a_line_that_is_no_key_is_named(line: str) -> None:
    with pytest.raises(ConfigError, match="keys: line 2"):
        parse_trusted_keys(f"\n{line}\n", "keys")


def test_an_archive_is_the_same_each_time_and_unpacks_to_the_same(
    signed: Path, keys: TrustedKeys, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(signed, tmp_path / "elsewhere"))
    for path in moved.rglob("*"):
        path.chmod(0o700)
    first, second = pack_bundle(signed, tmp_path / "a.tar.zst"), pack_bundle(moved, tmp_path / "b.tar.zst")
    assert first.read_bytes() == second.read_bytes()
    _, signer = unpack_archive(first, tmp_path / "out", keys)
    assert signer is not None and signer.key == keys.trusted[0]
    assert contents(tmp_path / "out") == contents(signed)


def test_other_programs_read_an_archive(signed: Path, tmp_path: Path) -> None:
    if shutil.which("zstd") is None or shutil.which("tar") is None:
        pytest.skip("zstd or tar is not installed")
    archive = pack_bundle(signed, tmp_path / "a.tar.zst")
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "--zstd", "-xf", archive, "-C", tmp_path / "out"], check=True)
    assert contents(tmp_path / "out") == contents(signed)


def test_a_flipped_bit_anywhere_in_an_archive_is_refused(signed: Path, tmp_path: Path) -> None:
    whole = pack_bundle(signed, tmp_path / "a.tar.zst").read_bytes()
    rng = random.Random(23)
    places = [*range(12), *range(len(whole) - TRAILER_BYTES - 6, len(whole)), *rng.sample(range(len(whole)), 40)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        (tmp_path / "b").write_bytes(changed)
        with pytest.raises(BundleError):
            unpack_archive(tmp_path / "b", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "b").write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="changed or cut short"):
        unpack_archive(tmp_path / "b", tmp_path / "out")


def entry(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write_archive(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], tail: bytes = b"") -> Path:
    """An archive as an attacker makes it: any entries, and the right trailer."""
    import hashlib

    tar = b"".join(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512) for info, content in entries)
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(tar + bytes(1024) + tail)
    head = bytes.fromhex("502a4d18") + (32).to_bytes(4, "little")
    path.write_bytes(packed + head + hashlib.sha256(packed).digest())
    return path


def own_entries(folder: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    first = [name for name in (MANIFEST_NAME, SIGNATURE_NAME, RECORD_NAME) if (folder / name).exists()]
    names = [*first, *sorted(contents(folder).keys() - set(first))]
    return [entry(name, (folder / name).read_bytes()) for name in names]


def test_what_an_attacker_may_put_into_an_archive_is_refused(plain: Path, tmp_path: Path) -> None:
    own = own_entries(plain)
    last = own[-1]
    bad = {
        "an absolute path": [*own, entry("/tmp/evil", b"x")],
        "a way up": [*own, entry("../evil", b"x")],
        "a file that is not listed": [*own, entry("runtime/numpy.py", b"x")],
        "a duplicate": [*own, last],
        "a link": [*own[:-1], entry(last[0].name, type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        "a hard link": [*own[:-1], entry(last[0].name, type=tarfile.LNKTYPE, linkname="run.py")],
        "a device": [*own[:-1], entry(last[0].name, type=tarfile.CHRTYPE)],
        "a folder": [*own, entry("folder", type=tarfile.DIRTYPE)],
        "a file too few": own[:-1],
        "another file first": own[1:] + own[:1],
        "an owner": [*own[:-1], entry(last[0].name, last[1], uname="root")],
        "a longer file": [*own[:-1], entry(last[0].name, last[1] + b"x")],
        "other content": [*own[:-1], entry(last[0].name, b"x" * len(last[1]))],
    }
    for what, entries in bad.items():
        archive = write_archive(tmp_path / "bad.tar.zst", entries)
        with pytest.raises(BundleError):
            unpack_archive(archive, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar.zst"], what
    with pytest.raises(BundleError, match="goes on behind its end"):
        unpack_archive(write_archive(tmp_path / "bad.tar.zst", own, b"more"), tmp_path / "out")


def test_who_signed_and_whether_there_is_room_is_known_before_files_are_written(
    plain: Path, signed: Path, keys: TrustedKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an archive that holds one listed file, whoever looks at that first says that it lacks others."""
    own = own_entries(plain)
    first = next(n for n, (info, _) in enumerate(own) if info.name not in (MANIFEST_NAME, RECORD_NAME))
    begin = write_archive(tmp_path / "begin.tar.zst", own[: first + 1])
    with pytest.raises(BundleError, match="lacks"):
        unpack_archive(begin, tmp_path / "out")
    with pytest.raises(BundleError, match="is not signed"):
        unpack_archive(begin, tmp_path / "out", keys)
    late = own_entries(signed)
    late.append(late.pop(1))
    assert late[-1][0].name == SIGNATURE_NAME
    with pytest.raises(BundleError, match="comes behind other files"):
        unpack_archive(write_archive(tmp_path / "late.tar.zst", late), tmp_path / "out")
    # No disk here can be filled for a test, so what is free is not asked of the system.
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("ryot.deploy.archive.shutil.disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(ConfigError, match=r"unpacks to \d+ MB, and 0 MB are free there"):
        unpack_archive(begin, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_that_unpacks_to_more_than_weights_would_is_refused_at_its_manifest(
    plain: Path, tmp_path: Path
) -> None:
    values = json.loads((plain / MANIFEST_NAME).read_text())
    values["files"]["model.onnx.data"]["bytes"] = 1 << 30
    head = entry(MANIFEST_NAME, json.dumps(values).encode())
    with pytest.raises(BundleError, match=r"has \d+ bytes and would unpack to \d{10}, expected at most 100 for each"):
        unpack_archive(write_archive(tmp_path / "a.tar.zst", [head]), tmp_path / "out")
    # A negative size, which others would hide behind, and a name that the archive may hold anyway.
    for name, size in (("run.py", -(1 << 40)), (RECORD_NAME, 1)):
        values["files"][name] = {"sha256": "0" * 64, "bytes": size}
        head = entry(MANIFEST_NAME, json.dumps(values).encode())
        with pytest.raises(BundleError, match=f"says nothing sensible of '{name}'"):
            unpack_archive(write_archive(tmp_path / "a.tar.zst", [head]), tmp_path / "out")
        del values["files"][name]
    deep = write_archive(tmp_path / "a.tar.zst", [entry(MANIFEST_NAME, b"[" * 100_000)])
    with pytest.raises(BundleError, match="not valid JSON"):
        unpack_archive(deep, tmp_path / "out")


def test_bombs_end_before_they_grow(plain: Path, tmp_path: Path) -> None:
    huge, _ = entry("run.py")
    huge.size = (8 << 30) - 1
    head = own_entries(plain)[:1]
    archive = write_archive(tmp_path / "size.tar.zst", [*head, (huge, b"")])
    with pytest.raises(BundleError, match=r"'run.py' has 8589934591 bytes there, the manifest says \d+"):
        unpack_archive(archive, tmp_path / "out")
    manifest, _ = entry(MANIFEST_NAME)
    manifest.size = 1 << 30
    archive = write_archive(tmp_path / "manifest.tar.zst", [(manifest, b"")])
    with pytest.raises(BundleError, match="at most 16000000 are unpacked"):
        unpack_archive(archive, tmp_path / "out")
    zeros = write_archive(tmp_path / "zeros.tar.zst", own_entries(plain), bytes(1 << 28))
    assert zeros.stat().st_size < 2_000_000
    with pytest.raises(BundleError, match="goes on behind its end"):
        unpack_archive(zeros, tmp_path / "out")


def test_an_archive_of_a_million_files_is_refused_at_its_manifest(plain: Path, tmp_path: Path) -> None:
    for count, reason in ((1_000_000, "at most 16000000 are unpacked"), (20_000, "lists 20000 files, at most 10000")):
        listed = ",".join(f'"f{number}":{{"bytes":0}}' for number in range(count))
        content = f'{{"schema":1,"files":{{{listed}}}}}'.encode()
        archive = write_archive(tmp_path / "a.tar.zst", [entry(MANIFEST_NAME, content), entry("f0"), entry("f1")])
        with pytest.raises(BundleError, match=reason):
            unpack_archive(archive, tmp_path / "out")


def test_a_bundle_of_a_newer_schema_says_what_to_upgrade(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    values = json.loads((folder / MANIFEST_NAME).read_text())
    values |= {"schema": 9, "provenance": {"ryot_version": "7.1.0"}}
    (folder / MANIFEST_NAME).write_text(json.dumps(values))
    with pytest.raises(BundleError, match="schema 9 is newer than 1") as caught:
        check_whole(folder)
    assert caught.value.hint is not None and "upgrade ryot here to 7.1.0 or later" in caught.value.hint


def test_the_bill_of_materials_is_valid_cyclonedx(plain: Path) -> None:
    text = (plain / SBOM_NAME).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    values = json.loads(text)
    assert {"ryot", "onnxruntime", "numpy", "tokenizers"} == {c["name"] for c in values["components"]}
    listed = json.loads((plain / MANIFEST_NAME).read_text())["files"]
    for part in values["metadata"]["component"]["components"]:
        assert part["hashes"][0]["content"] == listed[part["name"]]["sha256"]


def test_the_commands_sign_verify_pack_and_unpack(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "bundle"))
    trusted, key = tmp_path / "trusted_keys", tmp_path / "owner.pem"
    trusted.write_text(ryot("sign", folder, "--new-key", key))
    assert trusted.read_text().startswith("trusted ed25519:") and trusted.read_text().endswith(" owner\n")
    assert "(owner), 24 of 24 golden tokens" in ryot("verify", folder, "--trusted-keys", trusted)
    archive = tmp_path / "a.tar.zst"
    assert ryot("pack", folder, "-o", archive) == f"{archive}\n"
    assert "signed by ed25519:" in ryot("verify", archive, "--files-only", "--trusted-keys", trusted)
    ryot("unpack", archive, "-o", tmp_path / "out", "--trusted-keys", trusted)
    assert contents(tmp_path / "out") == contents(folder)


def ryot(*arguments: object) -> str:
    command = [sys.executable, "-c", "from ryot.cli.main import run; run()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(whole: bytes, rng: random.Random) -> bytes:
    changed = bytearray(whole)
    bit = rng.randrange(8 * len(whole))
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
