"""``vkvx build``: TensorRT engines from a bundle."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.cli import terminal

if TYPE_CHECKING:
    from vkvx.runtime.engines.build import BuildResult
    from vkvx.runtime.engines.options import BuildOptions


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "build",
        help="build TensorRT engines from a bundle",
        description="Build the vision and decoder engines of a bundle into BUNDLE/engines, or --output. What was built"
        " before from the same inputs is not built again.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle")
    parser.add_argument(
        "--backend",
        choices=("auto", "tensorrt", "rtx"),
        default="auto",
        help="TensorRT, which builds on the GPU it builds for, or TensorRT for RTX, which needs none (default: auto)",
    )
    parser.add_argument(
        "--compute-capability",
        action="append",
        default=[],
        metavar="X.Y",
        help="of the GPU to run on, such as 8.9; with rtx also several, such as 8.6,8.9 (default: this machine's GPU)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="the engines' directory (default: one in BUNDLE/engines, where they are found)",
    )
    parser.add_argument("--force", action="store_true", help="build even if it was done")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")

    limits = parser.add_argument_group("limits (default: from the model and --memory)")
    limits.add_argument("--max-batch-size", type=int, metavar="N", help="sequences that a prefill call takes")
    limits.add_argument("--max-slots", type=int, metavar="N", help="sequences in the cache, and in a decode call")
    limits.add_argument("--max-input-len", type=int, metavar="N", help="tokens of a sequence that a call takes")
    limits.add_argument("--max-visual-tokens", type=int, metavar="N", help="visual tokens that a slot holds")
    limits.add_argument("--max-text-tokens", type=int, metavar="N", help="text tokens that a slot holds")
    limits.add_argument("--memory", metavar="SIZE", help="GPU memory for weights and cache, such as 24GiB")

    plugin = parser.add_argument_group("plugin")
    plugin.add_argument(
        "--plugin", metavar="FILE", help="the plugin's library, or embed: inside the engine (default: a copy beside it)"
    )
    plugin.add_argument("--plugin-free", action="store_true", help="standard layers in place of the plugin: slow")

    tuning = parser.add_argument_group("TensorRT")
    tuning.add_argument("--workspace", metavar="SIZE", help="scratch memory of a layer, such as 1GiB")
    tuning.add_argument("--optimization-level", type=int, metavar="N", help="0 builds fast, 5 runs fast")
    tuning.add_argument("--timing-cache", metavar="FILE", help="measured times to reuse; written back")
    tuning.add_argument("--version-compatible", action="store_true", help="let newer versions of TensorRT run it")
    tuning.add_argument("--hardware-compatible", action="store_true", help="let newer GPUs run it")
    tuning.add_argument("--weight-streaming", action="store_true", help="let weights stay in main memory")
    tuning.add_argument("--strip-plan", action="store_true", help="leave the weights out; they are refitted on load")
    return parser


def run(args: argparse.Namespace) -> int:
    """Build, or find that it was done, then say what there is."""
    from vkvx.runtime.engines.build import build_engines

    options = _options(args)
    begun = time.perf_counter()
    with terminal.ProgressBar("build") as progress:
        result = build_engines(
            args.bundle,
            options,
            progress,
            notice=lambda text: terminal.note(f"build: {text}"),
            verbose=getattr(args, "debug", False),
        )
    seconds = time.perf_counter() - begun
    if args.json:
        terminal.print_json(_summary(result, seconds))
    else:
        _print_summary(result, seconds)
    return 0


def _options(args: argparse.Namespace) -> BuildOptions:
    from vkvx.runtime.engines.limits import GivenLimits
    from vkvx.runtime.engines.options import BuildOptions

    limits = GivenLimits(
        batch_size=args.max_batch_size,
        slots=args.max_slots,
        input_len=args.max_input_len,
        visual_tokens=args.max_visual_tokens,
        text_tokens=args.max_text_tokens,
        memory=_size("--memory", args.memory),
    )
    return BuildOptions(
        backend=args.backend,
        compute_capabilities=tuple(name for given in args.compute_capability for name in given.split(",")),
        limits=limits,
        workspace=_size("--workspace", args.workspace),
        timing_cache=None if args.timing_cache is None else Path(args.timing_cache),
        optimization_level=args.optimization_level,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        weight_streaming=args.weight_streaming,
        strip_plan=args.strip_plan,
        plugin_free=args.plugin_free,
        plugin=args.plugin,
        output=None if args.output is None else Path(args.output),
        force=args.force,
    )


def _size(option: str, text: str | None) -> int | None:
    return None if text is None else terminal.parse_bytes(text, option)


def _summary(result: BuildResult, seconds: float) -> dict[str, Any]:
    manifest = result.manifest
    return {
        "engines": str(result.directory),
        "built": result.built,
        "seconds": round(seconds, 3),
        "backend": manifest.backend,
        "library_version": manifest.library_version,
        "compute_capabilities": list(manifest.compute_capabilities),
        "limits": manifest.to_json()["limits"],
        "plugin": manifest.to_json()["plugin"],
        "plugin_layers": manifest.engines["decoder"].plugin_layers,
        "files": {name: info.bytes for name, info in manifest.files.items()},
        "bytes": sum(info.bytes for info in manifest.files.values()),
        "predicted_memory": result.predicted_memory,
        "peak_memory": result.peak_memory,
    }


def _print_summary(result: BuildResult, seconds: float) -> None:
    summary, size = _summary(result, seconds), terminal.human_bytes
    limits, layers = result.manifest.limits, summary["plugin_layers"]
    done = f"built in {seconds:.1f} s" if result.built else "built before from the same inputs"
    print(f"engines       {summary['engines']}, {done}")
    print(f"for           compute capability {', '.join(summary['compute_capabilities'])}")
    print(f"size          {size(summary['bytes'])} in {len(summary['files'])} files")
    print(f"decoder       {f'{layers} plugin layers' if layers else 'no plugin'}, profiles prefill and decode")
    print(
        f"limits        {limits.slots} slots of {limits.visual_tokens} visual and {limits.text_tokens} text tokens; "
        f"prefill of {limits.batch_size} times {limits.input_len}"
    )
    if summary["peak_memory"] is not None:
        print(f"build memory  {size(summary['peak_memory'])}; predicted {size(summary['predicted_memory'])}")
    print(f"next          vkvx inspect {summary['engines']}")
