"""What the manifests of bundles and of engines have in common: a JSON file that names the files beside it.

Standard library only. Reading is strict about what a key must hold and ignores keys it does not know: whatever changes
the meaning of a directory raises its format version.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from vkvx import typed_json
from vkvx.errors import VkvxError
from vkvx.format import OPERATOR_VERSION
from vkvx.typed_json import Bytes, Index, Sha256

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

MOST_BYTES = 64 << 20
"""Of a manifest: far more than one of any model takes."""
Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``, in bytes or steps."""


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    bytes: Bytes
    sha256: Sha256


@dataclass(frozen=True)
class ManifestKind:
    """A kind of manifest: its file and format, the error that it raises, and the words of its messages.

    ``make``, ``again`` and ``copy`` are what helps: without a manifest, with a wrong one, and with damaged files.
    """

    file: str
    format: str
    version: int
    error: type[VkvxError]
    noun: str
    subject: str
    make: str
    again: str
    copy: str
    made: str
    stage: str

    def failure(self, words: str) -> VkvxError:
        """The error for contents that cannot be."""
        return self.error(f"{self.file}: {words}; {self.again}")

    def require(self, condition: bool, what: str, expected: str, given: object) -> None:
        """Raise it unless the condition holds."""
        if not condition:
            raise self.failure(f"{what} must be {expected}, got {reprlib.repr(given)}")

    def other_version(self, found: str, known: str) -> VkvxError:
        """The error for a version that this vkvx does not know."""
        return self.error(f"{self.subject} {found}, this vkvx {known}; install a newer vkvx, or {self.again}")

    def read(self, directory: Path) -> bytes:
        """The bytes of the manifest's own file; OSError if it cannot be read, the kind's error if it cannot be one."""
        path = directory / self.file
        real, size = path.resolve(strict=True), path.stat().st_size
        if not real.is_relative_to(directory.resolve()):
            raise self.leaves(path)
        if not real.is_file() or size > MOST_BYTES:
            raise self.error(f"{path} is no file of at most {MOST_BYTES} bytes; {self.again}")
        return path.read_bytes()

    def leaves(self, path: Path) -> VkvxError:
        """The error for a link to somewhere else."""
        return self.error(f"{path} is a link that leaves the directory; copy that without links (`cp -rL`)")

    def check_file(self, directory: Path, name: str, info: FileInfo) -> None:
        """Raise the error unless a file of this size lies in the directory."""
        path = directory / name
        try:
            real = path.resolve(strict=True)
            inside = real.is_relative_to(directory.resolve())
            size = real.stat().st_size if real.is_file() else -1
        except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
            raise self.error(f"{path} is missing; {self.copy}") from None
        if not inside:
            raise self.leaves(path)
        if size != info.bytes:
            given = f"has {size} bytes" if size >= 0 else "is no file"
            raise self.error(f"{path} {given}, expected {info.bytes}; {self.copy}")


class ManifestFile:
    """What manifests have in common. Subclasses are frozen dataclasses, written in the order of their fields."""

    kind: ClassVar[ManifestKind]
    operator_version: Index
    files: dict[str, FileInfo]

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read and check the manifest of a directory, and that each file is there with its size.

        Contents are compared by :meth:`verify`. Raises the error of the kind.
        """
        directory, kind = Path(directory), cls.kind
        path = directory / kind.file
        try:
            data = json.loads(kind.read(directory).decode())
        except (FileNotFoundError, NotADirectoryError):
            what = f"is no {kind.noun}: it holds no {kind.file}" if directory.is_dir() else "is no directory"
            raise kind.error(
                f"{directory} {what}; make a {kind.noun} with `{kind.make.format(directory=directory)}`"
            ) from None
        except OSError as error:
            raise kind.error(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RuntimeError) as error:  # not UTF-8, not JSON, nested without end, or a loop of links
            raise kind.error(f"{path} is not valid JSON ({error}); {kind.again}") from error
        try:
            manifest = cls.from_json(data)
        except kind.error as error:
            raise kind.error(f"{directory}: {error}") from error
        for name, info in manifest.files.items():
            kind.check_file(directory, name, info)
        return manifest

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Build a manifest from parsed JSON; the kind's error if it is newer, incomplete, contradictory or unsafe."""
        kind = cls.kind
        if not isinstance(data, dict) or data.get("format") != kind.format:
            raise kind.error(
                f'{kind.file} is of no {kind.noun}: expected an object with "format": "{kind.format}"; {kind.again}'
            )
        version = typed_json.read(int, data.get("format_version"), kind.failure, "format_version")
        kind.require(version > 0, "format_version", "positive", version)
        if version > kind.version:
            raise kind.other_version(f"format version {version}", f"reads up to {kind.version}")
        manifest = typed_json.read(cls, cls._upgraded(data) if version < kind.version else data, kind.failure)
        if manifest.operator_version != OPERATOR_VERSION:
            raise kind.other_version(f"operator version {manifest.operator_version}", f"has {OPERATOR_VERSION}")
        manifest._check()
        return manifest

    @classmethod
    def _upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """An object of an older format version as one of the newest."""
        return data

    @property
    def format_version(self) -> int:
        """The version to write: the oldest that can say what the manifest says."""
        return self.kind.version

    def to_json(self) -> dict[str, Any]:
        """The object to write as the file."""
        return {"format": self.kind.format, "format_version": self.format_version, **asdict(cast(Any, self))}

    def save(self, directory: str | Path) -> None:
        """Write the file into the directory."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False)
        (Path(directory) / self.kind.file).write_text(text + "\n", encoding="utf-8")

    def verify(self, directory: str | Path, progress: Progress | None = None) -> None:
        """Compare the SHA-256 of each file with the manifest; the kind's error names the first that differs."""
        directory, kind = Path(directory), self.kind
        total, done = sum(info.bytes for info in self.files.values()), 0
        for name, info in self.files.items():
            kind.check_file(directory, name, info)

            def report(count: int, before: int = done) -> None:
                if progress is not None:
                    progress(kind.stage, before + count, total)

            if sha256(directory / name, report) != info.sha256.lower():
                raise kind.error(
                    f"{directory / name} differs from what was {kind.made} (SHA-256 mismatch); {kind.copy}"
                )
            done += info.bytes

    def _check(self) -> None:
        """Raise the kind's error for values that cannot be."""


def sha256(path: Path, report: Callable[[int], None] | None = None, chunk: int = 4 << 20) -> str:
    """SHA-256 of a file, hexadecimal; ``report`` gets the number of bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(chunk):
            digest.update(block)
            done += len(block)
            if report is not None:
                report(done)
    return digest.hexdigest()
