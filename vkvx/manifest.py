"""The manifest of a bundle, ``vkvx.json``: what the model is, how its cache is quantised, which files belong to it.

Standard library only, so that a deployment needs neither torch nor transformers to read a bundle. Reading is strict
about what a key must hold and ignores keys it does not know: whatever changes the meaning of a bundle raises
``FORMAT_VERSION``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from vkvx import typed_json
from vkvx.cache_layout import CacheLayout
from vkvx.errors import BundleError
from vkvx.format import BASELINE_BITS, BITS, QUANTIZERS, SCORE_CORRECTIONS, TILE, WORD_BITS

FILE_NAME = "vkvx.json"
FORMAT = "vkvx-bundle"
FORMAT_VERSION = 1

FLOAT_DTYPES = ("float16", "bfloat16", "float32")

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``, in bytes or steps."""


@dataclass(frozen=True)
class ModelInfo:
    """What the runtime must know of the model. ``tokens_per_picture`` is None where pictures vary in size."""

    name: str
    source: str
    revision: str | None
    architecture: str
    dtype: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    image_token_id: int
    tokens_per_picture: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


@dataclass(frozen=True)
class Quantization:
    """How the visual cache is packed. Tuples hold one entry a layer; 16 bits means that nothing is packed."""

    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]
    group_size: int
    quantizer: str
    quantile_alpha_key: tuple[float, ...]
    quantile_alpha_value: tuple[float, ...]
    shrink_key: tuple[float, ...]
    shrink_value: tuple[float, ...]
    score_correction: str
    tau: float
    correction_limit: float


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. ``shape`` holds sizes, and names of dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file of the bundle; ``file`` is relative to the bundle."""

    file: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole of ``vkvx.json``. Make one with :meth:`load`, :meth:`from_json`, or at export."""

    vkvx_version: str
    operator_version: int
    model: ModelInfo
    quantization: Quantization
    graphs: dict[str, Graph]
    processor: str
    files: dict[str, FileInfo]
    tools: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, bundle: str | Path) -> Manifest:
        """Read and check the manifest of a bundle directory, and that each file is there with its size.

        Contents are compared by :meth:`verify`. Raises BundleError.
        """
        directory = Path(bundle)
        path = directory / FILE_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"{directory} is no vkvx bundle: it holds no {FILE_NAME}; "
                f"make one with `vkvx export MODEL -o {directory}`"
            ) from None
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
            raise BundleError(f"{path} is not valid JSON ({error}); export the model again") from error
        manifest = cls.from_json(data)
        for name, info in manifest.files.items():
            _check_file(directory, name, info)
        return manifest

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """Build a manifest from parsed JSON; BundleError if it is newer, incomplete, contradictory or unsafe."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f'{FILE_NAME} is of no vkvx bundle: expected an object with "format": "{FORMAT}"')
        version = data.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise BundleError(f"{FILE_NAME}: format_version must be a positive integer, got {version!r}")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"the bundle has format version {version}, this vkvx reads up to {FORMAT_VERSION}; "
                "upgrade it with `pip install --upgrade vkvx`"
            )
        manifest = typed_json.read(cls, data, _failure)
        manifest._check()
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The object to write as ``vkvx.json``."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    def save(self, bundle: str | Path) -> None:
        """Write ``vkvx.json`` into the directory ``bundle``."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False)
        (Path(bundle) / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    def verify(self, bundle: str | Path, progress: Progress | None = None) -> None:
        """Compare the SHA-256 of each file with the manifest; BundleError names the first that differs."""
        directory = Path(bundle)
        total = sum(info.bytes for info in self.files.values())
        done = 0
        for name, info in self.files.items():
            _check_file(directory, name, info)

            def report(count: int, before: int = done) -> None:
                if progress is not None:
                    progress("verify", before + count, total)

            if sha256(directory / name, report) != info.sha256.lower():
                raise BundleError(
                    f"{directory / name} differs from what was exported (SHA-256 mismatch); "
                    "copy the bundle again or export the model anew"
                )
            done += info.bytes

    @cached_property
    def layout(self) -> CacheLayout:
        """Shapes, dtypes and bytes of the cache."""
        return CacheLayout(self.model, self.quantization)

    def _check(self) -> None:
        model, quantization = self.model, self.quantization
        _require(model.dtype in FLOAT_DTYPES, "model.dtype", f"one of {', '.join(FLOAT_DTYPES)}", model.dtype)
        for name in ("layers", "query_heads", "kv_heads", "head_dim", "hidden_size", "vocab_size", "max_positions"):
            _require(getattr(model, name) > 0, f"model.{name}", "positive", getattr(model, name))
        _require(model.head_dim % WORD_BITS == 0, "model.head_dim", "a multiple of 32", model.head_dim)
        shared = model.query_heads % model.kv_heads == 0
        _require(shared, "model.query_heads", "a multiple of kv_heads", model.query_heads)
        tokens = model.tokens_per_picture
        _require(tokens is None or tokens > 0, "model.tokens_per_picture", "positive or null", tokens)
        for entry in fields(Quantization):
            value = getattr(quantization, entry.name)
            if isinstance(value, tuple):
                _require(
                    len(value) == model.layers, f"quantization.{entry.name}", f"{model.layers} entries long", len(value)
                )
        bits = set(quantization.key_bits + quantization.value_bits)
        allowed = bits == {BASELINE_BITS} or bits <= set(BITS)
        _require(allowed, "quantization.key_bits and value_bits", "among 1, 2, 4, 8, or 16 throughout", sorted(bits))
        size = quantization.group_size
        _require(size > 0 and size % TILE == 0, "quantization.group_size", f"a positive multiple of {TILE}", size)
        names = (
            ("quantizer", quantization.quantizer, QUANTIZERS),
            ("score_correction", quantization.score_correction, SCORE_CORRECTIONS),
        )
        for name, given, known in names:
            _require(given in known, f"quantization.{name}", f"one of {', '.join(known)}", given)
        for name in ("vision", "decoder"):
            _require(name in self.graphs, "graphs", f'an object with the key "{name}"', sorted(self.graphs))
        for path in self.files:
            _check_path(path)
        for name, graph in self.graphs.items():
            _require(graph.file in self.files, f"graphs.{name}.file", "listed in files", graph.file)
        _check_path(self.processor)
        inside = any(PurePosixPath(self.processor) in PurePosixPath(path).parents for path in self.files)
        _require(inside, "processor", "a folder with files of the bundle", self.processor)


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


def _failure(words: str) -> BundleError:
    return BundleError(f"{FILE_NAME}: {words}; export the model again")


def _require(condition: bool, what: str, expected: str, given: object) -> None:
    if not condition:
        raise _failure(f"{what} must be {expected}, got {given!r}")


def _check_path(name: str) -> None:
    """Refuse anything but a plain relative path with forward slashes."""
    if not typed_json.is_plain_path(name):
        raise BundleError(f"{FILE_NAME}: the path {name!r} leaves the bundle or is not plain; do not trust this bundle")


def _check_file(directory: Path, name: str, info: FileInfo) -> None:
    path = directory / name
    try:
        real = path.resolve(strict=True)
        inside = real.is_relative_to(directory.resolve())
        size = real.stat().st_size if real.is_file() else -1
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        raise BundleError(f"{path} is missing; copy the bundle again or export the model anew") from None
    if not inside:
        raise BundleError(f"{path} is a link that leaves the bundle; copy the bundle without links (`cp -rL`)")
    if size != info.bytes:
        given = f"has {size} bytes" if size >= 0 else "is no file"
        raise BundleError(f"{path} {given}, expected {info.bytes}; copy the bundle again or export the model anew")
