"""Directories and files that appear whole or not at all: written beside their place, flushed, and renamed. No torch."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vkvx.errors import StorageError
from vkvx.manifest import FILE_NAME, FORMAT

_PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FICLONE = 0x40049409
_RUST_FULL = tuple(f"os error {number}" for number in _FULL)


@dataclass(frozen=True)
class Kind:
    """A kind of directory: what it is called, the manifest by which one that may be replaced is known, and what to do
    where it cannot be written. ``owned``: its place tells what it is, also where the manifest is damaged."""

    noun: str
    manifest: str
    format: str
    remedy: str
    owned: bool = False


BUNDLE = Kind("bundle", FILE_NAME, FORMAT, "give another output= (--output)")
_unfinished: set[Path] = set()
"""Hidden directories that this process writes into now."""


def check_output(target: Path, force: bool, kind: Kind = BUNDLE) -> None:
    """Raise StorageError unless ``target`` is free or, with ``force``, of its kind or an empty directory."""
    if not target.parent.is_dir():
        raise StorageError(f"{target.parent} is no directory; create it, or {kind.remedy}")
    if target.is_symlink():
        raise StorageError(f"{target} is a link; remove it, or {kind.remedy}")
    if not target.exists():
        return
    if not target.is_dir() or not (kind.owned or _is_of(kind, target) or not any(target.iterdir())):
        raise StorageError(f"{target} exists and is no {kind.noun}; it is never replaced, {kind.remedy}")
    if not force:
        raise StorageError(f"{target} exists; give force= (--force) to replace it, or {kind.remedy}")


def check_file(target: Path, option: str) -> None:
    """Raise StorageError unless a file can be written at ``target``, a new one or in place of an older one."""
    remedy = f"choose another {option}"
    if not target.absolute().parent.is_dir():
        raise StorageError(f"there is no directory for {target}; create it, or {remedy}")
    if target.is_dir():
        raise StorageError(f"{target} is a directory; {remedy}")
    if target.exists() and not target.is_file():
        raise StorageError(f"{target} is no plain file; {remedy}")
    try:
        with tempfile.TemporaryFile(dir=target.absolute().parent):
            pass
        if target.exists():
            target.open("ab").close()
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}; change its rights, or {remedy}") from error


@contextmanager
def new_directory(target: Path, force: bool = False, kind: Kind = BUNDLE) -> Iterator[Path]:
    """A hidden directory beside ``target`` to write into; at the end it takes the place of ``target``.

    On any exception it is removed and ``target`` is as it was. What a killed process left of an earlier attempt is
    removed first. Failures to write become StorageError; ``force`` and ``kind`` are those of :func:`check_output`.
    """
    try:
        _remove_leftovers(target)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent))
        lock = _lock(partial)
    except OSError as error:
        raise _storage_error(target, error) from error
    try:
        _unfinished.add(partial)
        try:
            yield partial
        finally:
            _unfinished.discard(partial)
        partial.chmod(0o777 & ~_umask())
        _flush(partial)
        _replace(partial, target, force, kind)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # tokenizers, written in Rust, raises bare exceptions.
        if isinstance(error, OSError) or (type(error) is Exception and any(s in str(error) for s in _RUST_FULL)):
            raise _storage_error(target, error) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def discard_unfinished() -> bool:
    """Remove what :func:`new_directory` has begun in this process, for one that ends at once; whether there was any."""
    found = list(_unfinished)
    for partial in found:
        shutil.rmtree(partial, ignore_errors=True)
    return bool(found)


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """A hidden file beside ``target`` to write into; at the end it takes the place of ``target``.

    On any exception it is removed and ``target`` is as it was. Failures to write become StorageError.
    """
    partial = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent)
        partial = Path(name)
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())
        partial.replace(target)
        _flush_directory(target.parent)
    except BaseException as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _storage_error(target, error) from error
        raise


def write_file(target: Path, contents: str | bytes | memoryview) -> None:
    """Write a file by :func:`new_file`, text as UTF-8; an older one is replaced."""
    with new_file(target) as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)


def check_room(directory: Path, needed: int) -> None:
    """Raise StorageError unless the file system of ``directory`` has ``needed`` bytes left."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise StorageError(
            f"the output takes {_size(needed)}, {directory} has {_size(free)} left; make room, or choose another disk"
        )


def share_blocks(reader: BinaryIO, writer: BinaryIO) -> bool:
    """Let a new file share the disk blocks of another until one of them changes; False where that cannot be done.

    Not hard links: ONNX readers refuse weights that have several, also those of the bundle that was linked.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return False
    try:
        fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM):
            return False
        raise
    return True


def can_share_blocks(source: Path, directory: Path) -> bool:
    """Whether a copy of ``source`` in ``directory`` takes no room."""
    probe = directory / ".probe"
    with source.open("rb") as reader, probe.open("xb") as writer:
        shared = share_blocks(reader, writer)
    probe.unlink()
    return shared


def _remove_leftovers(target: Path) -> None:
    """Remove hidden directories of processes that are gone: nobody holds their locks."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{_PARTIAL}"):
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the lock of a directory; None if another process holds it, or there are no such locks."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _replace(partial: Path, target: Path, force: bool, kind: Kind) -> None:
    """Rename; an older directory moves aside first and is removed once the new one is in place."""
    check_output(target, force, kind)
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
        raise
    _flush_directory(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _is_of(kind: Kind, directory: Path) -> bool:
    try:
        return json.loads((directory / kind.manifest).read_text(encoding="utf-8"))["format"] == kind.format
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _storage_error(target: Path, error: BaseException) -> StorageError:
    if not isinstance(error, OSError) or error.errno in _FULL:
        return StorageError(f"no room left for {target} ({error}); make room, or choose another disk")
    return StorageError(f"cannot write {target}: {error}")


def _flush(directory: Path) -> None:
    for path, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(path, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(path))


def _flush_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere directories cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
