"""A bundle is there whole or not at all: what exists is kept, what fails leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from vkvx.errors import ModelError, StorageError
from vkvx.storage import check_output, check_room, new_directory, write_file

BUNDLE = '{"format": "vkvx-bundle"}'


def bundle_at(path: Path) -> Path:
    path.mkdir()
    (path / "vkvx.json").write_text(BUNDLE)
    (path / "engines").mkdir()
    (path / "engines" / "old").write_text("old")
    return path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_new(tmp_path: Path) -> None:
    target = tmp_path / "out"
    check_output(target, force=False)
    with new_directory(target) as partial:
        assert partial.parent == tmp_path
        (partial / "folder").mkdir()
        (partial / "folder" / "file").write_text("new")
        assert not target.exists()
    assert (target / "folder" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_older_bundle_is_replaced_at_the_end(tmp_path: Path) -> None:
    target = bundle_at(tmp_path / "out")
    with pytest.raises(StorageError, match="--force"):
        check_output(target, force=False)
    check_output(target, force=True)
    with new_directory(target, force=True) as partial:
        (partial / "new").write_text("new")
        assert (target / "engines" / "old").read_text() == "old"
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_an_empty_directory_is_replaced_with_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="--force"):
        check_output(tmp_path / "out", force=False)
    with new_directory(tmp_path / "out", force=True) as partial:
        (partial / "new").write_text("new")
    assert names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("content", ["other", "vkvx.json"])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, content: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / content).write_text("{}")
    with pytest.raises(StorageError, match="is no bundle; it is never replaced"):
        check_output(target, force=True)
    # Nor if it gets there while the export runs.
    with pytest.raises(StorageError, match="is no bundle"), new_directory(target, force=True) as partial:
        (partial / "new").write_text("new")
    assert names(tmp_path) == ["out"]
    assert names(target) == [content]


def test_files_links_and_missing_parents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(bundle_at(tmp_path / "bundle"))
    for path, message in (("file", "is no bundle"), ("link", "is a link"), ("absent/out", "absent is no directory")):
        with pytest.raises(StorageError, match=message):
            check_output(tmp_path / path, force=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelError("no"), SystemExit(1), ValueError("x")])
def test_any_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    target = bundle_at(tmp_path / "out")

    def export() -> None:
        with new_directory(target, force=True) as partial:
            (partial / "new").write_text("new")
            raise error

    with pytest.raises(type(error)):
        export()
    assert names(tmp_path) == ["out"]
    assert (target / "engines" / "old").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no room left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no room left"),
        (OSError(errno.EFBIG, "File too large"), "no room left"),
        (Exception("No space left on device (os error 28)"), "no room left"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write"),
    ],
)
def test_failures_to_write(tmp_path: Path, error: Exception, message: str) -> None:
    with pytest.raises(StorageError, match=message), new_directory(tmp_path / "out"):
        raise error
    assert names(tmp_path) == []


def test_the_old_bundle_returns_if_the_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = bundle_at(tmp_path / "out")
    rename = Path.rename

    def fail(self: Path, other: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StorageError, match="cannot write"), new_directory(target, force=True) as partial:
        (partial / "new").write_text("new")
    monkeypatch.undo()
    assert names(tmp_path) == ["out"]
    assert (target / "engines" / "old").exists()


@pytest.mark.parametrize("contents", ["two\nlines, ä", b"\x00\xff", memoryview(b"view")])
def test_a_file_is_replaced(tmp_path: Path, contents: str | bytes | memoryview) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    write_file(target, contents)
    assert target.read_bytes() == (contents.encode() if isinstance(contents, str) else bytes(contents))
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("step", "number", "words"),
    [("fsync", errno.ENOSPC, "no room left"), ("replace", errno.EIO, "cannot write")],
)
def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, words: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    target = tmp_path / "file"
    target.write_bytes(b"old")
    monkeypatch.setattr(Path if step == "replace" else os, step, fail)
    with pytest.raises(StorageError, match=words):
        write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    check_room(tmp_path, 10**9)
    with pytest.raises(StorageError, match=r"takes 1\.1 GB, .* has 1\.0 GB left"):
        check_room(tmp_path, 1_100_000_000)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"), new_directory(tmp_path / "file" / "out"):
        pass


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """SIGKILL leaves the older bundle as it was; what the next export leaves is complete."""
    target = bundle_at(tmp_path / "out")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom vkvx.storage import new_directory\n"
        "with new_directory(Path(sys.argv[1]), True) as partial:\n"
        "    (partial / 'vkvx.json').write_text('half')\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (target / "vkvx.json").read_text() == BUNDLE
    assert len(names(tmp_path)) == 2  # and the hidden one of the dead process
    with new_directory(target, force=True) as partial:
        (partial / "new").write_text("new")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_another_export_to_the_same_place_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def export() -> None:
        with new_directory(target) as one:
            (one / "file").write_text("one")
            with new_directory(target) as two:
                (two / "vkvx.json").write_text(BUNDLE)
            assert (one / "file").read_text() == "one"

    with pytest.raises(StorageError, match="--force"):
        export()
    assert names(tmp_path) == ["out"]
    assert names(target) == ["vkvx.json"]
