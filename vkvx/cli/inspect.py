"""``vkvx inspect``: what a bundle holds and what its cache costs, or what engines take."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.cli import inspect_engines, terminal
from vkvx.format import BASELINE_BITS, METRIC_QUANTIZERS

if TYPE_CHECKING:
    from vkvx.manifest import Manifest

ENGINE_FILE_NAME = "engine.json"
_SHOWN_OPERATORS = 8
_SHOWN_ENTRIES = 8


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "inspect",
        help="show what a bundle or an engine directory holds",
        description="Show the parts of a bundle, its quantisation, the bytes that its cache takes, its graphs and "
        "engines; or of an engine directory (BUNDLE/engines/NAME) its profiles, inputs and outputs, plugin layers "
        "and sizes.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle or of engines")
    parser.add_argument("--verify", action="store_true", help="compare each file with its SHA-256")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read the manifest and the graphs; weights are not read without ``--verify``."""
    from vkvx.graph_files import read_graph
    from vkvx.runtime.bundles import load_manifest

    bundle = Path(args.bundle)
    if (bundle / ENGINE_FILE_NAME).exists():
        return _run_on_engines(bundle, args)
    manifest = load_manifest(bundle)
    if args.verify:
        with terminal.ProgressBar("inspect") as progress:
            manifest.verify(bundle, progress)
    report = {
        "bundle": str(bundle),
        "verified": args.verify,
        "vkvx_version": manifest.vkvx_version,
        "operator_version": manifest.operator_version,
        "model": manifest.to_json()["model"],
        "parts": parts(manifest),
        "bytes": sum(info.bytes for info in manifest.files.values()),
        "quantization": manifest.to_json()["quantization"],
        "metrics": metrics_source(manifest),
        "generation": {**manifest.generation.rules(), "ignored": manifest.generation.ignored},
        "cache": cache_costs(manifest),
        "graphs": {name: graph_summary(read_graph(bundle, manifest, name)) for name in manifest.graphs},
        "engines": inspect_engines.listed(bundle),
        "tools": dict(manifest.tools),
    }
    if args.json:
        terminal.print_json(report)
    else:
        print("\n".join(_lines(report)))
    return 0


def _run_on_engines(directory: Path, args: argparse.Namespace) -> int:
    from vkvx.runtime.engines.manifest import EngineManifest

    manifest = EngineManifest.load(directory)
    if args.verify:
        with terminal.ProgressBar("inspect") as progress:
            manifest.verify(directory, progress)
    report = inspect_engines.report(directory, manifest, args.verify)
    if args.json:
        terminal.print_json(report)
    else:
        print("\n".join(inspect_engines.lines(report)))
    return 0


def parts(manifest: Manifest) -> dict[str, int]:
    """Bytes by part of the bundle: each graph, weights, processor, anything else."""
    graphs = {graph.file: f"{name} graph" for name, graph in manifest.graphs.items()}
    sizes: Counter[str] = Counter()
    for path, info in manifest.files.items():
        if path in graphs:
            part = graphs[path]
        elif path.startswith(f"{manifest.processor}/"):
            part = "processor and tokenizer"
        elif path.endswith((".safetensors", ".safetensors.index.json")):
            part = "weights"
        else:
            part = path.partition("/")[0]
        sizes[part] += info.bytes
    return dict(sizes.most_common())


def cache_costs(manifest: Manifest) -> dict[str, Any]:
    """What pictures and text take in the cache; padding to whole groups, scales, offsets and key RMS are counted."""
    tokens, size = manifest.model.usual_tokens, manifest.quantization.group_size
    layout = manifest.layout
    typical = [
        {"tokens": count, "bytes": layout.visual_bytes_per_picture(count), "padding": -count % size / count}
        for count in manifest.model.typical_tokens
    ]
    picture, plain = layout.visual_bytes_per_picture(tokens), layout.sixteen_bit_bytes_per_picture(tokens)
    return {
        "tokens_per_picture": tokens,
        "typical_pictures": typical,
        "bytes_per_picture": picture,
        "sixteen_bit_bytes_per_picture": plain,
        "compression": plain / picture,
        "bits_per_element": layout.bits_per_element(tokens),
        "bytes_per_visual_token": picture / tokens,
        "bytes_per_text_token": layout.text_bytes_per_token,
        "state_bytes": layout.state_bytes,
    }


def metrics_source(manifest: Manifest) -> dict[str, Any] | None:
    """Where the metrics of keys and values come from; None if the quantiser has none."""
    quantization = manifest.quantization
    if BASELINE_BITS in quantization.key_bits or quantization.quantizer not in METRIC_QUANTIZERS:
        return None
    calibration = manifest.calibration
    return {"source": "weights"} if calibration is None else {"source": "calibration", **asdict(calibration)}


def graph_summary(model: Any) -> dict[str, Any]:
    """Nodes by operator, local functions, opsets and initialisers of an ONNX ModelProto, without its weights."""
    names = [f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node]
    return {
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": len(names),
        "operators": dict(Counter(names).most_common()),
        "functions": [
            {"name": f"{function.domain}::{function.name}", "overload": function.overload, "nodes": len(function.node)}
            for function in model.functions
        ],
        "initializers": len(model.graph.initializer),
    }


def _picture_row(picture: dict[str, Any]) -> str:
    said = f"{picture['tokens']} tokens, all layers; padding to whole groups {100 * picture['padding']:.0f} %"
    return _row("a picture", terminal.human_bytes(picture["bytes"]), said)


def _lines(report: dict[str, Any]) -> list[str]:
    model, cache, size = report["model"], report["cache"], terminal.human_bytes
    state = ", every file matches its SHA-256" if report["verified"] else ""
    lines = [
        f"bundle       {report['bundle']}, {size(report['bytes'])}{state}",
        f"model        {model['name']}: {model['architecture']}, {model['dtype']}",
        f"             {len(model['layers'])} layers, {terminal.heads(model['layers'], model['query_heads'])},"
        f" hidden {model['hidden_size']}, vocabulary {model['vocab_size']}",
        *_generation_lines(report["generation"]),
        f"made with    vkvx {report['vkvx_version']}, "
        + ", ".join(f"{name} {version}" for name, version in report["tools"].items()),
        "",
        "parts",
        *(_row(name, size(count)) for name, count in report["parts"].items()),
        "",
        "visual cache",
        *_quantization_lines(report["quantization"]),
        *_metrics_lines(report["metrics"]),
        *(_picture_row(picture) for picture in cache["typical_pictures"]),
        _row(
            "the same in 16 bits",
            size(cache["sixteen_bit_bytes_per_picture"]),
            f"{cache['compression']:.2f} times as much",
        ),
        _row("bits per element", f"{cache['bits_per_element']:.3f}", "with scales, offsets, key RMS, padding"),
        _row("a visual token", size(cache["bytes_per_visual_token"])),
        _row("a text token", size(cache["bytes_per_text_token"]), _text_remark(report["quantization"])),
    ]
    if cache["state_bytes"]:
        lines.append(_row("states of a sequence", size(cache["state_bytes"]), "linear attention, any length"))
    for name, graph in report["graphs"].items():
        lines += ["", f"{name} graph", *_graph_lines(graph)]
    if report["engines"]:
        lines += ["", "engines", *inspect_engines.listed_lines(report["engines"])]
    return lines


def _row(name: str, value: str, remark: str = "") -> str:
    return f"  {name:<25}{value:>12}   {remark}".rstrip()


def _text_remark(quantization: dict[str, Any]) -> str:
    bits = quantization["text_bits"]
    return "not quantised" if bits == 16 else f"{bits} bits, with scales"


def _quantization_lines(quantization: dict[str, Any]) -> list[str]:
    fields = (
        "key_bits",
        "value_bits",
        "quantile_alpha_key",
        "quantile_alpha_value",
        "shrink_key",
        "shrink_value",
    )
    layers = [
        dict(zip(fields, row, strict=True)) for row in zip(*(quantization[field] for field in fields), strict=True)
    ]
    lines = []
    for span, layer in terminal.ranges(layers):
        if layer["key_bits"] == 16:
            text = "16 bits, not quantised"
        else:
            text = f"keys {layer['key_bits']} bit, values {layer['value_bits']} bit, {quantization['quantizer']}"
            if quantization["quantizer"] == "quantile":
                text += f" at {layer['quantile_alpha_key']:g} and {layer['quantile_alpha_value']:g}"
            if quantization["quantizer"] == "shrink":
                text += f" by {layer['shrink_key']:g} and {layer['shrink_value']:g}"
        lines.append(f"  layers {span:<18}{text}")
    if quantization["key_bits"][0] != 16:
        correction = quantization["score_correction"]
        bound = {
            "expected": f", limit {quantization['correction_limit']:g}",
            "affine": f", tau {quantization['tau']:g}",
        }
        lines.append(f"  groups of {quantization['group_size']} visual tokens")
        lines.append(f"  score correction {correction}{bound.get(correction, '')}")
    return lines


def _metrics_lines(metrics: dict[str, Any] | None) -> list[str]:
    if metrics is None:
        return []
    said = "the weights"
    if metrics["source"] == "calibration":
        said += f", and {metrics['samples']} answers of {metrics['tokens']} tokens to {metrics['data']}"
    return [f"  metrics from {said}"]


def _generation_lines(generation: dict[str, Any]) -> list[str]:
    """What the checkpoint asks for in answers, if anything."""
    rules = {name: value for name, value in generation.items() if name != "ignored"}

    def shown(value: Any) -> str:
        if isinstance(value, tuple) and len(value) > _SHOWN_ENTRIES:
            return f"of {len(value)} entries"
        return json.dumps(value, ensure_ascii=False)

    said = ", ".join(f"{name} {shown(value)}" for name, value in rules.items())
    lines = [f"answers      by the checkpoint's defaults: {said or 'the likeliest token'}"]
    if generation["ignored"]:
        lines.append(f"             left out of what it asks for: {', '.join(generation['ignored'])}")
    return lines


def _graph_lines(graph: dict[str, Any]) -> list[str]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in graph["opsets"].items())
    shown = list(graph["operators"].items())
    text = ", ".join(f"{name} {count}" for name, count in shown[:_SHOWN_OPERATORS])
    others = sum(count for _, count in shown[_SHOWN_OPERATORS:])
    size = f"{graph['nodes']} nodes, {graph['initializers']} initializers"
    lines = [
        f"  {size}, opset {opsets}, IR version {graph['ir_version']}",
        f"  {text}" + (f", others {others}" if others else ""),
    ]
    for function in graph["functions"]:
        overload = f" ({function['overload']})" if function["overload"] else ""
        lines.append(f"  function {function['name']}{overload}: {function['nodes']} nodes")
    return lines
