"""The manifest of a bundle, ``vkvx.json``: what the model is, how its cache is quantised, which files belong to it.

Standard library only, so that a deployment needs neither torch nor transformers to read a bundle. Reading is strict
about what a key must hold and ignores keys it does not know: whatever changes the meaning of a bundle raises
``FORMAT_VERSION``.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Mapping, Sized
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, cast

from vkvx import typed_json
from vkvx.cache_layout import CacheLayout
from vkvx.errors import BundleError, VkvxError
from vkvx.format import (
    BASELINE_BITS,
    BITS,
    OPERATOR_VERSION,
    QUANTIZERS,
    SCORE_CORRECTIONS,
    TILE,
    VISUAL_MASKS,
    WORD_BITS,
)
from vkvx.sampling import RANGES, GenerationInfo

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

FILE_NAME = "vkvx.json"
FORMAT = "vkvx-bundle"
FORMAT_VERSION = 3

_VERSION_1: dict[str, object] = {
    "position_rows": 1,
    "rotary_dim": 0,
    "rotary_interleaved": False,
    "attention_scale": 0.0,
}
"""Facts of every model that version 1 could describe."""
FLOAT_DTYPES = ("float16", "bfloat16", "float32")
_SIZES = ("query_heads", "hidden_size", "embed_width", "vocab_size", "max_positions")

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``, in bytes or steps."""


@dataclass(frozen=True)
class PictureInfo:
    """How a picture becomes tokens: the arguments of one of ``vkvx.models.pictures.kinds.KINDS``."""

    kind: str
    numbers: dict[str, int]
    marks: dict[str, str]


@dataclass(frozen=True)
class PromptInfo:
    """How a prompt is written.

    ``picture`` stands for a picture in texts of transformers, such as those of the chat template, where that is not the
    image token. ``begin`` stands behind the last picture of a prompt that begins a sequence, in place of what the
    tokenizer puts first; ``end`` behind every prompt.
    """

    picture: str = ""
    begin: str = ""
    end: str = ""


@dataclass(frozen=True)
class LinearInfo:
    """Sizes of the state of a linear attention layer, which stands in the place of keys and values.

    A causal convolution keeps the last ``conv_width`` inputs of ``conv_channels`` channels; a recurrence keeps a matrix
    of ``key_dim`` x ``value_dim`` for each of ``heads``.
    """

    conv_channels: int
    conv_width: int
    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class LayerInfo:
    """Attention of one decoder layer; ``scale`` is the factor of its scores.

    With a ``sliding_window`` (0: none) a token sees the last so many, itself included. ``visual_mask``, one of
    ``VISUAL_MASKS``, says which later tokens it sees; ``softcap`` bounds the scores (0: not). The rotary embedding
    turns the first ``rotary_dim`` channels of a head (0: all), pairs of halves, or of neighbours with
    ``rotary_interleaved``.
    ``keys_of`` is the earlier layer whose keys, values and cache this one reads; it has none of its own then.
    A layer of linear attention has a state in place of a cache: ``linear`` tells its sizes, all else is 0.
    """

    kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int = 0
    visual_mask: str = "causal"
    softcap: float = 0.0
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    keys_of: int | None = None
    linear: LinearInfo | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What the runtime must know of the model.

    A picture's embeddings are ``embed_width`` wide: ``hidden_size``, or a multiple of it where the first decoder layers
    add features of the picture, too.

    ``tokens_per_picture`` is None where pictures vary in size; ``typical_tokens`` are those of usual pictures,
    ascending: group sizes follow from them, and default capacities from the largest. ``position_rows`` is 4 where the
    rotary embedding tells time, rows and columns of a picture apart (``position_ids`` [B, 4, S], the plain index first)
    and 1 where it does not.
    """

    name: str
    source: str
    revision: str | None
    architecture: str
    dtype: str
    layers: tuple[LayerInfo, ...]
    query_heads: int
    hidden_size: int
    embed_width: int
    vocab_size: int
    max_positions: int
    position_rows: int
    image_token_id: int
    tokens_per_picture: int | None
    typical_tokens: tuple[int, ...]
    pictures: PictureInfo
    prompt: PromptInfo
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def sliding_window(self) -> int:
        """Positions that a token sees in layers with a window, itself included; 0 where no layer has one."""
        return max((layer.sliding_window for layer in self.layers), default=0)

    @property
    def usual_tokens(self) -> int:
        """Visual tokens of a usual picture, a large one where they vary."""
        return self.typical_tokens[-1]

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that attend to what is cached."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.linear is None)

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """The layers of linear attention, which have a state."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.linear is not None)

    @property
    def caches(self) -> tuple[int, ...]:
        """The layers that have an attention cache of their own."""
        return tuple(i for i in self.attention_layers if self.layers[i].keys_of is None)

    @property
    def cached_layers(self) -> int:
        """The number of layers that have an attention cache of their own."""
        return len(self.caches)


@dataclass(frozen=True)
class Quantization:
    """How the visual cache is packed. Tuples hold one entry a cache; 16 bits means that nothing is packed."""

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

    def output_rows(self, inputs: Mapping[str, Sized]) -> int:
        """Size of axis 0 of the first output, which may be a multiple of an input's (``"256*P"``), for these arrays."""
        sizes = {}
        for spec in self.inputs:
            factor, symbol = parse_dim(spec.shape[0])
            sizes[symbol] = len(inputs[spec.name]) // factor
        factor, symbol = parse_dim(self.outputs[0].shape[0])
        return factor * sizes[symbol]


def parse_dim(dim: int | str) -> tuple[int, str]:
    """Factor and symbol of a dynamic dimension such as ``P`` or ``256*P``; of a size the size itself and no symbol."""
    if isinstance(dim, int):
        return dim, ""
    factor, _, symbol = dim.rpartition("*")
    return int(factor or 1), symbol


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    bytes: int
    sha256: str


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
            raise self.error(f"{path} is a link that leaves the directory; copy that without links (`cp -rL`)")
        if size != info.bytes:
            given = f"has {size} bytes" if size >= 0 else "is no file"
            raise self.error(f"{path} {given}, expected {info.bytes}; {self.copy}")


class ManifestFile:
    """What manifests have in common. Subclasses are frozen dataclasses, written in the order of their fields."""

    kind: ClassVar[ManifestKind]
    operator_version: int
    files: dict[str, FileInfo]

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read and check the manifest of a directory, and that each file is there with its size.

        Contents are compared by :meth:`verify`. Raises the error of the kind.
        """
        directory, kind = Path(directory), cls.kind
        path = directory / kind.file
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise kind.error(
                f"{directory} is no {kind.noun}: it holds no {kind.file}; "
                f"make one with `{kind.make.format(directory=directory)}`"
            ) from None
        except OSError as error:
            raise kind.error(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
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

    def to_json(self) -> dict[str, Any]:
        """The object to write as the file."""
        return {"format": self.kind.format, "format_version": self.kind.version, **asdict(cast(Any, self))}

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


@dataclass(frozen=True)
class Manifest(ManifestFile):
    """The whole of ``vkvx.json``. Make one with :meth:`load`, :meth:`from_json`, or at export. Raises BundleError."""

    kind = ManifestKind(
        FILE_NAME,
        FORMAT,
        FORMAT_VERSION,
        BundleError,
        noun="vkvx bundle",
        subject="the bundle has",
        make="vkvx export MODEL -o {directory}",
        again="export the model again",
        copy="copy the bundle again or export the model anew",
        made="exported",
        stage="verify",
    )

    OPTIONAL: ClassVar[tuple[str, ...]] = ("generation",)
    """Keys that bundles of older exporters lack."""

    vkvx_version: str
    operator_version: int
    model: ModelInfo
    quantization: Quantization
    graphs: dict[str, Graph]
    processor: str
    files: dict[str, FileInfo]
    tools: dict[str, str] = field(default_factory=dict)
    generation: GenerationInfo = field(default_factory=GenerationInfo)

    @cached_property
    def layout(self) -> CacheLayout:
        """Shapes, dtypes and bytes of the cache."""
        return CacheLayout(self.model, self.quantization)

    @classmethod
    def _upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Version 1 knew pictures of one size only, versions 1 and 2 layers that are all alike."""
        try:
            if data["format_version"] == 1:
                data = _version_2(data)
            return _version_3(data)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return data  # reading it says what is wrong

    def _check(self) -> None:
        model, quantization, require = self.model, self.quantization, self.kind.require
        require(model.dtype in FLOAT_DTYPES, "model.dtype", f"one of {', '.join(FLOAT_DTYPES)}", model.dtype)
        for name in (*_SIZES, "tokens_per_picture"):
            size = getattr(model, name)
            require(size is None or 0 < size < 2**31, f"model.{name}", "positive and less than 2**31", size)
        require(model.position_rows in (1, 4), "model.position_rows", "1 or 4", model.position_rows)
        whole = model.embed_width % model.hidden_size == 0
        require(whole, "model.embed_width", "a multiple of hidden_size", model.embed_width)
        typical = model.typical_tokens
        require(bool(typical) and min(typical) > 0, "model.typical_tokens", "a list of positive numbers", typical)
        self._check_layers()
        caches = model.cached_layers
        for entry in fields(Quantization):
            value = getattr(quantization, entry.name)
            if isinstance(value, tuple):
                require(len(value) == caches, f"quantization.{entry.name}", f"{caches} entries long", len(value))
        bits = set(quantization.key_bits + quantization.value_bits)
        allowed = bits == {BASELINE_BITS} or bits <= set(BITS)
        require(allowed, "quantization.key_bits and value_bits", "among 1, 2, 4, 8, or 16 throughout", sorted(bits))
        size = quantization.group_size
        allowed = 0 < size < 2**31 and size % TILE == 0
        require(allowed, "quantization.group_size", f"a positive multiple of {TILE}, less than 2**31", size)
        names = (
            ("quantizer", quantization.quantizer, QUANTIZERS),
            ("score_correction", quantization.score_correction, SCORE_CORRECTIONS),
        )
        for name, given, known in names:
            require(given in known, f"quantization.{name}", f"one of {', '.join(known)}", given)
        for name, (valid, expected) in RANGES.items():
            value = getattr(self.generation, name)
            require(valid(value), f"generation.{name}", expected, value)
        for name in ("vision", "decoder"):
            require(name in self.graphs, "graphs", f'an object with the key "{name}"', sorted(self.graphs))
        for path in self.files:
            _check_path(path)
        for name, graph in self.graphs.items():
            require(graph.file in self.files, f"graphs.{name}.file", "listed in files", graph.file)
        _check_path(self.processor)
        inside = any(PurePosixPath(self.processor) in PurePosixPath(path).parents for path in self.files)
        require(inside, "processor", "a folder with files of the bundle", self.processor)

    def _check_layers(self) -> None:
        model, require, caches = self.model, self.kind.require, self.model.caches
        require(bool(caches), "model.layers", "a list of one entry a layer, one of them with a cache", [])
        for i, layer in enumerate(model.layers):
            where = f"model.layers[{i}]"
            if layer.linear is not None:
                for name, size in vars(layer.linear).items():
                    require(0 < size < 2**31, f"{where}.linear.{name}", "positive and less than 2**31", size)
                alone = replace(layer, linear=None) == LayerInfo(0, 0, 0.0)
                require(alone, where, "0 but for linear, in a layer of linear attention", layer)
                continue
            for name in ("kv_heads", "head_dim"):
                size = getattr(layer, name)
                require(0 < size < 2**31, f"{where}.{name}", "positive and less than 2**31", size)
            require(layer.head_dim % WORD_BITS == 0, f"{where}.head_dim", "a multiple of 32", layer.head_dim)
            shared = model.query_heads % layer.kv_heads == 0
            require(shared, f"{where}.kv_heads", f"a divisor of query_heads ({model.query_heads})", layer.kv_heads)
            require(layer.scale > 0, f"{where}.scale", "positive", layer.scale)
            require(0 <= layer.sliding_window < 2**31, f"{where}.sliding_window", "0 or positive", layer.sliding_window)
            other = layer.sliding_window in (0, model.sliding_window)
            require(other, f"{where}.sliding_window", f"0 or {model.sliding_window}, as others", layer.sliding_window)
            known = layer.visual_mask in VISUAL_MASKS
            require(known, f"{where}.visual_mask", f"one of {', '.join(VISUAL_MASKS)}", layer.visual_mask)
            require(layer.softcap >= 0, f"{where}.softcap", "0 or positive", layer.softcap)
            turned = 0 <= layer.rotary_dim <= layer.head_dim and layer.rotary_dim % 2 == 0
            require(turned, f"{where}.rotary_dim", "an even number up to head_dim", layer.rotary_dim)
            fits = layer.keys_of is None or (layer.keys_of < i and layer.keys_of in caches)
            require(fits, f"{where}.keys_of", f"null or an earlier one of {list(caches)}", layer.keys_of)
            same = layer.keys_of is None or replace(layer, keys_of=None) == model.layers[layer.keys_of]
            require(same, where, "like the layer whose keys it reads", layer)


def _version_2(data: dict[str, Any]) -> dict[str, Any]:
    """An object of format version 1 as one of version 2."""
    tokens, vision = data["model"]["tokens_per_picture"], data["graphs"]["vision"]
    model = {
        **data["model"],
        "embed_width": data["model"]["hidden_size"],
        **_VERSION_1,
        "typical_tokens": [tokens],
        "pictures": {"kind": "tiles", "numbers": {"tile_tokens": tokens}, "marks": {}},
    }
    outputs = [{**output, "shape": [f"{tokens}*P", *output["shape"][1:]]} for output in vision["outputs"]]
    return {**data, "model": model, "graphs": {**data["graphs"], "vision": {**vision, "outputs": outputs}}}


def _version_3(data: dict[str, Any]) -> dict[str, Any]:
    """An object of format version 2 as one of version 3."""
    model = data["model"]
    names = ("kv_heads", "head_dim", "rotary_dim", "rotary_interleaved")
    layer = {**asdict(LayerInfo(1, 1, 1.0)), **{name: model[name] for name in names}}
    layer["scale"] = model["attention_scale"] or model["head_dim"] ** -0.5
    layers = model["layers"]
    if isinstance(layers, int):  # more than there are bits is wrong, however many there are
        layers = [layer] * min(layers, len(data["quantization"]["key_bits"]) + 1)
    return {**data, "model": {**model, "layers": layers, "prompt": asdict(PromptInfo())}}


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


def _check_path(name: str) -> None:
    """Refuse anything but a plain relative path with forward slashes."""
    if not typed_json.is_plain_path(name):
        raise BundleError(f"{FILE_NAME}: the path {name!r} leaves the bundle or is not plain; do not trust this bundle")
