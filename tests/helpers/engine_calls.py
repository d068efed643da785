"""Bundles to build engines from, and builds of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from vkvx.cache_layout import CacheLayout
from vkvx.format import QUANTILE_ALPHA, SHRINK_KEY, SHRINK_VALUE
from vkvx.manifest import FileInfo, Graph, Manifest, TensorSpec, sha256
from vkvx.plugins.operator import DOMAIN
from vkvx.runtime.engines.build import BuildResult, build_engines
from vkvx.runtime.engines.limits import GivenLimits
from vkvx.runtime.engines.options import BuildOptions

SMALL = GivenLimits(batch_size=2, slots=3, text_tokens=300, visual_tokens=640)
CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


def build(bundle: Path, plugin: Path | str | None, **options: Any) -> BuildResult:
    """Engines for compute capability 8.9 with small limits, unless said otherwise; none of the plugin if None."""
    chosen = {
        "backend": "rtx",
        "compute_capabilities": ("8.9",),
        "limits": SMALL,
        "plugin": None if plugin is None else str(plugin),
        "plugin_free": plugin is None,
        **options,
    }
    return build_engines(bundle, BuildOptions(**chosen))


def copy_bundle(bundle: Path, target: Path) -> Path:
    """A bundle of its own, with the files of another one but no engines. Graphs and manifest may be changed."""
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("engines"))
    return target


def stripped(bundle: Path) -> onnx.ModelProto:
    """The decoder of a bundle without functions and overloads."""
    model = onnx.load(str(bundle / "decoder.onnx"), load_external_data=False)
    del model.functions[:]
    for node in model.graph.node:
        node.overload = ""
    return model


def with_bits(bundle: Path, target: Path, bits: int) -> Path:
    """A bundle of 1 bit as one of 2, 4 or 8 bits, without exporting: shapes of the caches, attributes of the nodes
    and their defaults for so many bits.

    Its functions are dropped, so only a plugin can run it.
    """
    copy_bundle(bundle, target)
    manifest = Manifest.load(bundle)
    layers = (bits,) * manifest.model.cached_layers
    tuned = {
        "quantile_alpha_key": QUANTILE_ALPHA[bits],
        "quantile_alpha_value": QUANTILE_ALPHA[bits],
        "shrink_key": SHRINK_KEY[bits],
        "shrink_value": SHRINK_VALUE[bits],
    }
    in_layers = {name: (value,) * manifest.model.cached_layers for name, value in tuned.items()}
    quantization = replace(manifest.quantization, key_bits=layers, value_bits=layers, **in_layers)
    layout = CacheLayout(manifest.model, quantization)
    specs = {
        f"{prefix}.{layer}.{name}": TensorSpec(f"{prefix}.{layer}.{name}", *tensor)
        for prefix in ("past", "present")
        for layer in range(manifest.model.cached_layers)
        for name, tensor in layout.layer_tensors(layer, "Bc", "T", "G", "N").items()
    }
    decoder = manifest.graphs["decoder"]

    def change(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(specs.get(tensor.name, tensor) for tensor in tensors)

    model = stripped(bundle)
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if info.name in specs:
            for dim, size in zip(info.type.tensor_type.shape.dim, specs[info.name].shape, strict=True):
                if isinstance(size, int):
                    dim.dim_value = size
    for node in (node for node in model.graph.node if node.domain == DOMAIN):
        for attribute in node.attribute:
            if attribute.name in ("key_bits", "value_bits"):
                attribute.i = bits
            elif attribute.name in tuned:
                attribute.f = tuned[attribute.name]
    path = target / "decoder.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    graph = Graph(decoder.file, decoder.opset, change(decoder.inputs), change(decoder.outputs))
    files = {**manifest.files, decoder.file: FileInfo(path.stat().st_size, sha256(path))}
    graphs = {**manifest.graphs, "decoder": graph}
    replace(manifest, quantization=quantization, graphs=graphs, files=files).save(target)
    return target
