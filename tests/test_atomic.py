"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import stat

import pytest

from ryot.atomic import _swap, atomic_folder, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_has_its_name_only_when_all_is_in_it(tmp_path):
    target = tmp_path / "new" / "folder"
    with atomic_folder(target) as partial:
        (partial / "part").mkdir()
        (partial / "part" / "file").write_text("text")
        assert not target.exists()
    assert (target / "part" / "file").read_text() == "text"
    assert list(target.parent.iterdir()) == [target]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("text")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_replaced_only_when_asked(tmp_path):
    target = tmp_path / "folder"
    for text, replace in (("first", False), ("second", True)):
        with atomic_folder(target, replace=replace) as partial:
            (partial / text).touch()
        assert [path.name for path in target.iterdir()] == [text]
    with pytest.raises(OSError), atomic_folder(target) as partial:
        (partial / "third").touch()
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_was_there_stays_when_it_cannot_be_replaced(tmp_path):
    target = tmp_path / "folder"
    with atomic_folder(target) as partial:
        (partial / "first").touch()
    with pytest.raises(FileNotFoundError):
        _swap(tmp_path / "no partial", target)
    assert [path.name for path in target.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [target]
