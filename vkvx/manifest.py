"""The manifest of a bundle, ``vkvx.json``: what the model is, how its cache is quantised, which files belong to it.

Standard library only, so that a deployment needs neither torch nor transformers to read a bundle. Reading is strict
about what a key must hold and ignores keys it does not know: whatever changes the meaning of a bundle raises
``FORMAT_VERSION``.
"""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar

from vkvx import typed_json
from vkvx.cache_layout import CacheLayout
from vkvx.errors import BundleError
from vkvx.format import (
    BASELINE_BITS,
    BITS,
    QUANTIZERS,
    SCORE_CORRECTIONS,
    TEXT_BITS,
    TILE,
    VISUAL_MASKS,
    WORD_BITS,
)
from vkvx.graph_specs import Graph, TensorSpec, decoder_inputs, decoder_outputs, difference, parse_dim
from vkvx.manifest_file import FileInfo, ManifestFile, ManifestKind, Progress, sha256
from vkvx.sampling import RANGES, GenerationInfo
from vkvx.typed_json import Between, Entries, Index, OneOf, Real, Size

__all__ = [
    "CalibrationInfo",
    "FileInfo",
    "Graph",
    "LayerInfo",
    "LinearInfo",
    "Manifest",
    "ManifestFile",
    "ManifestKind",
    "ModelInfo",
    "PictureInfo",
    "Progress",
    "PromptInfo",
    "Quantization",
    "TensorSpec",
    "parse_dim",
    "sha256",
]

FILE_NAME = "vkvx.json"
FORMAT = "vkvx-bundle"
FORMAT_VERSION = 4
"""The newest; a bundle is written in the oldest version that can say what it is."""

_VERSION_1: dict[str, object] = {
    "position_rows": 1,
    "rotary_dim": 0,
    "rotary_interleaved": False,
    "attention_scale": 0.0,
}
"""Facts of every model that version 1 could describe."""
FLOAT_DTYPES = ("float16", "bfloat16", "float32")
MOST_ENTRIES = 1024
"""Of a list of layers, or of sizes of pictures."""
Bits = Annotated[int, OneOf((*BITS, BASELINE_BITS))]
Share = Annotated[float, Between(0.0, 1.0)]


@dataclass(frozen=True)
class PictureInfo:
    """How a picture becomes tokens: the arguments of one of ``vkvx.models.pictures.kinds.KINDS``."""

    kind: str
    numbers: dict[str, Index]
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

    conv_channels: Size
    conv_width: Size
    heads: Size
    key_dim: Size
    value_dim: Size


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

    kv_heads: Index
    head_dim: Index
    scale: Real
    sliding_window: Index = 0
    visual_mask: Annotated[str, OneOf(VISUAL_MASKS)] = "causal"
    softcap: Real = 0.0
    rotary_dim: Index = 0
    rotary_interleaved: bool = False
    keys_of: Index | None = None
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
    dtype: Annotated[str, OneOf(FLOAT_DTYPES)]
    layers: Annotated[tuple[LayerInfo, ...], Entries(1, MOST_ENTRIES)]
    query_heads: Size
    hidden_size: Size
    embed_width: Size
    vocab_size: Size
    max_positions: Size
    position_rows: Annotated[int, OneOf((1, 4))]
    image_token_id: Index
    tokens_per_picture: Size | None
    typical_tokens: Annotated[tuple[Size, ...], Entries(1, MOST_ENTRIES)]
    pictures: PictureInfo
    prompt: PromptInfo
    eos_token_ids: tuple[Index, ...]
    pad_token_id: Index

    @cached_property
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

    @cached_property
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
    """How the cache is packed. Tuples hold one entry a cache; 16 bits means that nothing is packed.

    ``text_bits`` are those of the text rows.
    """

    key_bits: tuple[Bits, ...]
    value_bits: tuple[Bits, ...]
    group_size: Size
    quantizer: Annotated[str, OneOf(QUANTIZERS)]
    quantile_alpha_key: tuple[Share, ...]
    quantile_alpha_value: tuple[Share, ...]
    shrink_key: tuple[Share, ...]
    shrink_value: tuple[Share, ...]
    score_correction: Annotated[str, OneOf(SCORE_CORRECTIONS)]
    tau: Real
    correction_limit: Real
    text_bits: Annotated[int, OneOf(TEXT_BITS)]


@dataclass(frozen=True)
class CalibrationInfo:
    """What the metrics of ``shaped`` were calibrated on: answers to ``samples`` of ``data``, of ``tokens`` in all."""

    data: str
    samples: Size
    tokens: Size


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

    OPTIONAL: ClassVar[tuple[str, ...]] = ("generation", "calibration")
    """Keys that bundles of older exporters lack."""

    vkvx_version: str
    operator_version: Index
    model: ModelInfo
    quantization: Quantization
    graphs: dict[str, Graph]
    processor: str
    files: dict[str, FileInfo]
    tools: dict[str, str] = field(default_factory=dict)
    generation: GenerationInfo = field(default_factory=GenerationInfo)
    calibration: CalibrationInfo | None = None

    @cached_property
    def layout(self) -> CacheLayout:
        """Shapes, dtypes and bytes of the cache."""
        return CacheLayout(self.model, self.quantization)

    @classmethod
    def _upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Version 1 knew pictures of one size only, 1 and 2 layers that are all alike, 1 to 3 text of 16 bits."""
        try:
            version = data["format_version"]
            if version == 1:
                data = _version_2(data)
            if version < 3:
                data = _version_3(data)
            return {**data, "quantization": {**data["quantization"], "text_bits": BASELINE_BITS}}
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return data  # reading it says what is wrong

    @property
    def format_version(self) -> int:
        """Version 4 says more than 3 of text rows of 8 bits only."""
        return 3 if self.quantization.text_bits == BASELINE_BITS else FORMAT_VERSION

    def _check(self) -> None:
        """What fields say together; ``typed_json`` has read what each may be alone."""
        model, quantization, require = self.model, self.quantization, self.kind.require
        whole = model.embed_width % model.hidden_size == 0
        require(whole, "model.embed_width", "a multiple of hidden_size", model.embed_width)
        typical = model.typical_tokens
        require(typical == tuple(sorted(typical)), "model.typical_tokens", "ascending", typical)
        tokens = {"image_token_id": (model.image_token_id,), "pad_token_id": (model.pad_token_id,)}
        for name, ids in {**tokens, "eos_token_ids": model.eos_token_ids}.items():
            known = max(ids, default=0) < model.vocab_size
            require(known, f"model.{name}", f"less than vocab_size ({model.vocab_size})", max(ids, default=0))
        self._check_layers()
        caches = model.cached_layers
        for entry in fields(Quantization):
            value = getattr(quantization, entry.name)
            if isinstance(value, tuple):
                require(len(value) == caches, f"quantization.{entry.name}", f"{caches} entries long", len(value))
        bits = set(quantization.key_bits + quantization.value_bits)
        allowed = bits == {BASELINE_BITS} or bits <= set(BITS)
        require(allowed, "quantization.key_bits and value_bits", "among 1, 2, 4, 8, or 16 throughout", sorted(bits))
        text = quantization.text_bits == BASELINE_BITS or bits != {BASELINE_BITS}
        require(text, "quantization.text_bits", f"{BASELINE_BITS} where nothing is packed", quantization.text_bits)
        size = quantization.group_size
        require(size % TILE == 0, "quantization.group_size", f"a multiple of {TILE}", size)
        for name, (valid, wanted) in RANGES.items():
            value = getattr(self.generation, name)
            require(valid(value), f"generation.{name}", wanted, value)
        for name in ("vision", "decoder"):
            require(name in self.graphs, "graphs", f'an object with the key "{name}"', sorted(self.graphs))
        for path in self.files:
            _check_path(path)
        for name, graph in self.graphs.items():
            require(graph.file in self.files, f"graphs.{name}.file", "listed in files", graph.file)
        _check_path(self.processor)
        inside = any(PurePosixPath(self.processor) in PurePosixPath(path).parents for path in self.files)
        require(inside, "processor", "a folder with files of the bundle", self.processor)
        decoder = self.graphs["decoder"]
        for side, given, expected in (
            ("inputs", decoder.inputs, decoder_inputs(self.layout)),
            ("outputs", decoder.outputs, decoder_outputs(self.layout)),
        ):
            if words := difference(given, expected):
                raise self.kind.failure(f"graphs.decoder.{side} and model differ: {words}")

    def _check_layers(self) -> None:
        model, require, caches, window = self.model, self.kind.require, self.model.caches, self.model.sliding_window
        require(bool(caches), "model.layers", "a list of one entry a layer, one of them with a cache", [])
        for i, layer in enumerate(model.layers):
            where = f"model.layers[{i}]"
            if layer.linear is not None:
                alone = replace(layer, linear=None) == LayerInfo(0, 0, 0.0)
                require(alone, where, "0 but for linear, in a layer of linear attention", layer)
                continue
            for name in ("kv_heads", "head_dim", "scale"):
                require(getattr(layer, name) > 0, f"{where}.{name}", "positive", getattr(layer, name))
            require(layer.head_dim % WORD_BITS == 0, f"{where}.head_dim", "a multiple of 32", layer.head_dim)
            shared = model.query_heads % layer.kv_heads == 0
            require(shared, f"{where}.kv_heads", f"a divisor of query_heads ({model.query_heads})", layer.kv_heads)
            other = layer.sliding_window in (0, window)
            require(other, f"{where}.sliding_window", f"0 or {window}, as others", layer.sliding_window)
            turned = layer.rotary_dim <= layer.head_dim and layer.rotary_dim % 2 == 0
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


def _check_path(name: str) -> None:
    """Refuse anything but a plain relative path with forward slashes."""
    if not typed_json.is_plain_path(name):
        raise BundleError(
            f"{FILE_NAME}: the path {reprlib.repr(name)} leaves the bundle or is not plain; do not trust this bundle"
        )
