"""What lies under a root on a device, and how it changes so that whoever looks sees a whole version at any moment.

current -> releases/ID     what runs; the one link is renamed into place, which is the switch
releases/ID/run            starts that release: its Python, its bundle
releases/ID/bundle         its bundle, for a server that has a Python of its own
bundles/ID/                a bundle, byte for byte as it was made; files that two have in common are hard links
environments/ID/           a virtual environment, named after what it was made from
incoming/SHA256[.part]     files that came, or are on their way
state.json                 releases, which of them proved good, a switch that is not proved yet, the highest serial
trusted_keys               where it is there, nothing that these keys did not sign is installed
lock                       held by whoever changes anything
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ryot.edge.bundle import MANIFEST_NAME, Bundle, check_inside, hash_file
from ryot.edge.trust import UNLISTED, Signer, TrustedKeys, check_whole, load_trusted_keys
from ryot.errors import BundleError, FleetError, RyotError

STATE_SCHEMA = 2
_ID_LENGTH = 16


class DamagedFile(FleetError):
    """A file is not what it was said to be; what an earlier attempt left of it may be why, and is gone now."""


class Release(NamedTuple):
    """A bundle and the Python that runs it."""

    id: str
    bundle: str
    """Id of the bundle: of its manifest, record and signatures."""
    name: str
    precision: str
    python: str
    signed_by: str
    installed_at: float
    figures: dict[str, float]
    """What the short measurement before the switch gave: ttft_ms, decode_tok_s, peak_rss_bytes."""


class State(NamedTuple):
    """What `state.json` says."""

    releases: dict[str, Release]
    good: list[str]
    """Releases that proved good, oldest first."""
    pending: dict[str, Any] | None
    """A switch that is not proved yet: `to`, `back`, `forget` (good no longer, then), and commands for it."""
    serial: int = 0
    """The highest serial number of a trusted signature among versions that ever proved good here."""


class Root:
    """The folder on a device that holds everything."""

    def __init__(self, path: Path):
        self.path = path
        self.current = path / "current"
        self.trusted_keys = path / "trusted_keys"
        self.incoming = path / "incoming"

    def bundle(self, bundle_id: str) -> Path:
        return self.path / "bundles" / bundle_id

    def release(self, release_id: str) -> Path:
        return self.path / "releases" / release_id

    def environment(self, environment_id: str) -> Path:
        return self.path / "environments" / environment_id

    def make(self) -> None:
        """Make the folders. Raises `OSError`."""
        for folder in (self.path, *(self.path / n for n in ("bundles", "releases", "environments", "incoming"))):
            folder.mkdir(parents=True, exist_ok=True)
            # Whoever runs the bundle may be another user, whatever the umask of this one.
            with contextlib.suppress(PermissionError):
                folder.chmod(0o755)

    @contextlib.contextmanager
    def lock(self, session: str, who: str) -> Iterator[None]:
        """Hold the root against other pushes; one of the same session whose link was cut is ended and followed."""
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _json_or_empty(os.pread(handle, 1000, 0))
                if holder.get("session") != session:
                    raise FleetError(
                        f"another push is under way there (by {holder.get('who', 'someone')})",
                        hint="wait until it has ended, and push again",
                    ) from error
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.kill(holder["pid"], signal.SIGKILL)
                fcntl.flock(handle, fcntl.LOCK_EX)
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"session": session, "who": who, "pid": os.getpid()}).encode(), 0)
            self._remove_drafts()
            yield
        finally:
            os.close(handle)

    def _remove_drafts(self) -> None:
        """Remove what a killed push left half made; what it sent stays in `incoming`."""
        for folder in ("bundles", "releases", "environments"):
            for stale in (self.path / folder).glob(".*"):
                shutil.rmtree(stale, ignore_errors=True)

    def read_state(self) -> State:
        """Raises `FleetError` for a state that is damaged or of a newer schema."""
        path = self.path / "state.json"
        try:
            values = json.loads(path.read_bytes())
            if values["schema"] > STATE_SCHEMA:
                raise FleetError(f"{path}: schema {values['schema']} is newer than {STATE_SCHEMA}", hint="upgrade ryot")
            releases = {r["id"]: Release(**{n: r[n] for n in Release._fields}) for r in values["releases"]}
            return State(releases, list(values["good"]), values["pending"], values.get("serial", 0))
        except FileNotFoundError:
            return State({}, [], None)
        except (ValueError, KeyError, TypeError) as error:
            raise FleetError(f"{path}: is damaged ({error})", hint=f"remove {self.path} and push again") from error

    def write_state(self, state: State) -> None:
        values = {
            "schema": STATE_SCHEMA,
            "releases": [r._asdict() for r in state.releases.values()],
            "good": state.good,
            "pending": state.pending,
            "serial": state.serial,
        }
        write_whole(self.path / "state.json", json.dumps(values, indent=1).encode() + b"\n")

    def current_id(self) -> str | None:
        """The release that `current` points to."""
        try:
            return self.current.readlink().name
        except FileNotFoundError:
            return None

    def point_current(self, release_id: str | None) -> None:
        """The switch."""
        if release_id is None:
            self.current.unlink(missing_ok=True)
        else:
            fresh = self.path / ".current"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(Path("releases", release_id))
            fresh.replace(self.current)
        sync(self.path)

    def load_keys(self) -> TrustedKeys | None:
        """The keys that this device trusts; None where it has no file of them."""
        return load_trusted_keys(self.trusted_keys) if self.trusted_keys.exists() else None

    def known_files(self) -> Iterator[tuple[str, Path]]:
        """Hash, by their manifests, and path of the files of all bundles."""
        for manifest in sorted((self.path / "bundles").glob(f"*/{MANIFEST_NAME}")):
            for name, entry in _json_or_empty(manifest.read_bytes()).get("files", {}).items():
                path = manifest.parent / name
                if path.is_file():
                    yield entry["sha256"], path
            for path in (manifest.parent / name for name in UNLISTED):
                if path.is_file():
                    yield hash_file(path), path

    def find_missing(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """The hashes of `wanted` (hash: bytes) that are not here yet, and how many bytes of each are.

        A file that is here under its name, but damaged, is not.
        """
        have = {digest for digest in wanted if self._arrived(digest)}
        for digest, path in self.known_files():
            if digest in wanted and digest not in have and hash_file(path) == digest:
                arrived = self.incoming / digest
                try:
                    os.link(path, arrived)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, arrived)
                have.add(digest)
        return {digest: self._part_bytes(digest, size) for digest, size in wanted.items() if digest not in have}

    def _arrived(self, digest: str) -> bool:
        path = self.incoming / digest
        if path.exists() and hash_file(path) != digest:
            path.unlink()
        return path.exists()

    def _part_bytes(self, digest: str, size: int) -> int:
        part = self.incoming / f"{digest}.part"
        have = part.stat().st_size if part.exists() else 0
        if have >= size:
            part.unlink(missing_ok=True)
            have = 0
        return have

    def receive(self, digest: str, offset: int, chunks: Iterable[bytes]) -> None:
        """Go on with a file at `offset`; it counts when its hash is right. Raises `FleetError`."""
        check_digest(digest)
        part = self.incoming / f"{digest}.part"
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(handle, offset)
            os.lseek(handle, offset, os.SEEK_SET)
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(handle, view) :]
            os.fsync(handle)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                part.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        if hash_file(part) != digest:
            part.unlink()
            raise DamagedFile(f"a file came damaged (its sha256 is not {digest[:12]}…)", hint="push again")
        part.chmod(0o644)
        part.replace(self.incoming / digest)

    def adopt(self, path: Path, digest: str) -> None:
        """Take over a file that lies on this device already."""
        with path.open("rb") as file:
            self.receive(digest, 0, iter(lambda: file.read(1 << 20), b""))

    def check_serial(self, bundle_id: str, signer: Signer | None) -> None:
        """Raise `FleetError` for a bundle signed before one that proved good here, unless it did so too and is kept.

        Somebody may have kept an old version, signed as it is, for a fault that it has.
        """
        state = self.read_state()
        good = {state.releases[i].bundle for i in state.good if i in state.releases}
        if signer is not None and signer.serial < state.serial and bundle_id not in good:
            raise FleetError(
                f"it was signed before what ran here last: serial {signer.serial}, expected {state.serial} or more",
                hint="a version that is kept there comes back by 'fleet rollback'; another one has to be signed again",
            )

    def build_bundle(self, files: Mapping[str, str], wanted_id: str) -> tuple[Bundle, Signer | None]:
        """Put a bundle together from files that are here (name: hash), check all of it, and give it its place."""
        target, keys = self.bundle(wanted_id), self.load_keys()
        if target.exists():
            with contextlib.suppress(BundleError):
                bundle, signer = check_whole(target, keys)
                self.check_serial(wanted_id, signer)
                return bundle, signer
            # Damaged, or not trusted: put together again, and looked at again.
        stage = target.with_name(f".{wanted_id}")
        shutil.rmtree(stage, ignore_errors=True)
        for name, digest in files.items():
            check_digest(digest)
            try:
                check_inside(name)
            except ValueError as error:
                raise FleetError(str(error)) from error
            path = stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.incoming / digest, path)
            except OSError:
                shutil.copyfile(self.incoming / digest, path)
            path.chmod(0o644)
        try:
            bundle, signer = check_whole(stage, keys)
            self.check_serial(wanted_id, signer)
        except RyotError as error:
            shutil.rmtree(stage, ignore_errors=True)
            raise type(error)(str(error).replace(str(stage), "pushed"), hint=error.hint) from error
        sync_tree(stage)
        if target.exists():
            damaged = target.with_name(f".{wanted_id}-damaged")
            target.rename(damaged)
            stage.rename(target)
            shutil.rmtree(damaged, ignore_errors=True)
        else:
            stage.rename(target)
        sync(target.parent)
        return bundle._replace(path=target), signer

    def build_release(self, release: Release) -> None:
        """Give a release its folder, whole or not at all."""
        target = self.release(release.id)
        if target.exists():
            return
        stage = target.with_name(f".{release.id}")
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        stage.chmod(0o755)
        program = self.bundle(release.bundle) / "run.py"
        # Without a home Python itself asks libc for one, and libc opens a socket to a name service.
        words = f'{shlex.quote(release.python)} -B -s {shlex.quote(str(program))} "$@"'
        script = f'#!/bin/sh\nexport HOME="${{HOME:-/nonexistent}}"\nexec {words}\n'
        (stage / "run").write_text(script)
        (stage / "run").chmod(0o755)
        (stage / "bundle").symlink_to(Path("..", "..", "bundles", release.bundle))
        sync_tree(stage)
        stage.rename(target)
        sync(target.parent)

    def remove_unused(self, state: State, keep: int, left: str | None) -> State:
        """Forget all but the last `keep` good releases, and remove what only others used.

        The files of the one that was `left` just now stay till the next time: it may have been started a moment ago.
        """
        kept = {*state.good[-keep:], self.current_id(), left}
        releases = {i: r for i, r in state.releases.items() if i in kept}
        state = state._replace(releases=releases, good=[i for i in state.good if i in kept])
        self.write_state(state)
        used = {
            "releases": set(releases),
            "bundles": {r.bundle for r in releases.values()},
            "environments": {_environment_of(self, r) for r in releases.values()},
        }
        for folder, names in used.items():
            for path in (self.path / folder).iterdir():
                if path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)
        self.remove_incoming()
        return state

    def remove_incoming(self) -> None:
        """Remove what came, once it lies in a bundle."""
        for path in self.incoming.iterdir():
            path.unlink()


def _environment_of(root: Root, release: Release) -> str:
    path = Path(release.python)
    inside = path.is_relative_to(root.path / "environments")
    return path.relative_to(root.path / "environments").parts[0] if inside else ""


def identify(*parts: str) -> str:
    """A short name for what these texts say."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_ID_LENGTH]


def check_digest(text: str) -> None:
    """Raise `FleetError` unless `text` is a sha256, for it becomes a file's name."""
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise FleetError(f"got {text!r}, expected a sha256")


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file so that a reader sees the old one or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.chmod(0o644)
    fresh.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems know no fsync of a folder
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Open a tree to all and put all of it on disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink():
            continue
        if path.is_dir():
            path.chmod(0o755)
        sync(path)


def _json_or_empty(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
