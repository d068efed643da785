"""``vkvx inspect`` on a directory of engines: what they take, what is in them, what they were built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.cli import terminal
from vkvx.errors import EngineError

if TYPE_CHECKING:
    from vkvx.runtime.engines.manifest import EngineManifest

NAMES = {"tensorrt": "TensorRT", "rtx": "TensorRT for RTX"}


def report(directory: Path, manifest: EngineManifest, verified: bool) -> dict[str, Any]:
    """What ``--json`` prints. ``layers`` holds the layers of each engine, or why they cannot be shown."""
    from vkvx.runtime.engines.layers import engine_layers

    data = manifest.to_json()
    layers: dict[str, Any] = {}
    for name, engine in manifest.engines.items():
        found, reason = engine_layers(manifest, directory, engine.file)
        layers[name] = {"layers": found, "reason": reason}
    kept = ("vkvx_version", "operator_version", "backend", "library_version", "compute_capabilities", "bundle_hash")
    return {
        "engines": str(directory),
        "verified": verified,
        **{name: data[name] for name in kept},
        "bytes": sum(info.bytes for info in manifest.files.values()),
        "files": {name: info.bytes for name, info in manifest.files.items()},
        **{name: data[name] for name in ("plugin", "limits", "empty_visual_index", "options", "profiles", "tensors")},
        "aliases": data["aliases"],
        "network": data["engines"],
        "layers": layers,
    }


def listed(bundle: Path) -> list[dict[str, Any]]:
    """The engine directories of a bundle; ``error`` says why one cannot be used."""
    from vkvx.runtime.engines.manifest import EngineManifest, engine_directories

    found = []
    for directory in engine_directories(bundle):
        entry: dict[str, Any] = {"name": directory.name, "error": None}
        try:
            manifest = EngineManifest.load(directory)
            data = manifest.to_json()
            entry |= {name: data[name] for name in ("backend", "library_version", "compute_capabilities", "limits")}
            entry["bytes"] = sum(info.bytes for info in manifest.files.values())
            manifest.check_bundle(bundle)
        except EngineError as error:
            entry["error"] = str(error)
        found.append(entry)
    return found


def listed_lines(engines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same for people: a line each."""
    result = []
    for one in engines:
        if one["error"] is not None:
            result.append(f"  {one['name']:<25}{'':>12}   {one['error']}")
            continue
        limits = one["limits"]
        result.append(
            f"  {one['name']:<25}{terminal.human_bytes(one['bytes']):>12}   {NAMES[one['backend']]} "
            f"{one['library_version']}, {limits['slots']} slots of {limits['visual_tokens']} visual and "
            f"{limits['text_tokens']} text tokens"
        )
    return result


def lines(report: dict[str, Any]) -> list[str]:
    """The same for people; tensors of all layers but the first are counted only."""
    size, plugin, limits = terminal.human_bytes, report["plugin"], report["limits"]
    state = ", every file matches its SHA-256" if report["verified"] else ""
    name = NAMES[report["backend"]]
    where = "none" if plugin is None else plugin["file"] + (", in decoder.engine" if plugin["embedded"] else "")
    options = ", ".join(f"{k} {v}" for k, v in report["options"].items() if v not in (None, False)) or "defaults"
    result = [
        f"engines      {report['engines']}, {size(report['bytes'])}{state}",
        f"made with    vkvx {report['vkvx_version']}, {name} {report['library_version']}, {options}",
        f"for          compute capability {', '.join(report['compute_capabilities'])}",
        f"plugin       {where}",
        f"limits       {limits['slots']} slots of {limits['visual_tokens']} visual and {limits['text_tokens']} text "
        f"tokens; prefill of {limits['batch_size']} times {limits['input_len']}",
        "",
        "files",
        *(f"  {file:<25}{size(count):>12}" for file, count in report["files"].items()),
    ]
    for engine, network in report["network"].items():
        result += [
            "",
            f"{engine} engine",
            f"  {network['network_layers']} layers, {network['plugin_layers']} of the plugin",
        ]
        built = report["layers"][engine]
        result.append(f"  built: {len(built['layers'])} layers" if built["layers"] else f"  built: {built['reason']}")
        result += _tensor_lines(engine, report)
    return result


def _tensor_lines(engine: str, report: dict[str, Any]) -> list[str]:
    profiles = [profile for profile in report["profiles"] if profile["engine"] == engine]
    tensors = [tensor for tensor in report["tensors"] if tensor["engine"] == engine]
    shown = [tensor for tensor in tensors if not _is_later_layer(tensor["name"])]
    result = []
    for tensor in shown:
        alias = report["aliases"].get(tensor["name"])
        result.append(
            f"  {tensor['kind']:<7}{tensor['name']:<30}{tensor['dtype']:<9}{_shape(tensor['shape'])}"
            + (f"  in place of {alias}" if alias else "")
        )
        for profile in profiles if tensor["kind"] == "input" else []:
            shapes = [_shape(shape) for shape in profile["shapes"][tensor["name"]]]
            text = shapes[0] if len(set(shapes)) == 1 else " to ".join(dict.fromkeys((shapes[0], shapes[2])))
            result.append(f"  {'':<7}  {profile['name']:<28}{'':<9}{text}")
    if len(tensors) > len(shown):
        result.append(f"  and {len(tensors) - len(shown)} cache tensors of the other layers, alike")
    return result


def _is_later_layer(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in ("past", "present") and parts[1] != "0"


def _shape(shape: list[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
