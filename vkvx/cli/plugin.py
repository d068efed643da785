"""``vkvx plugin``: builds the CUDA kernels and what takes them to TensorRT and onnxruntime, and says where they are."""

from __future__ import annotations

import argparse
from typing import Any

from vkvx.cli import terminal
from vkvx.errors import DependencyError


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plugin",
        help="build the CUDA kernels and the TensorRT plugin, or show where they are",
        description="Build the CUDA kernels of the packed cache, libvkvx, with TensorRT's headers its plugin, and with "
        "--onnxruntime the custom operator of onnxruntime, with CMake and nvcc, or print where they are.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build", help="build the libraries, unless they were built before", description=run.__doc__
    )
    build.add_argument(
        "--arch",
        default="native",
        metavar="LIST",
        help="compute capabilities such as 80,90; native: those of this machine's GPUs, all without one (default); all",
    )
    build.add_argument(
        "--tensorrt-headers",
        metavar="DIR",
        help="headers of the TensorRT to build the plugin for, 8.6 or from 10.3 on (default: $TENSORRT_ROOT, the "
        "system's, those in the pip package kernel-lens)",
    )
    build.add_argument(
        "--onnxruntime", action="store_true", help="build the custom operator of onnxruntime's CUDA provider, too"
    )
    build.add_argument("--force", action="store_true", help="build again")
    build.add_argument("--jobs", type=int, metavar="N", help="compilers side by side (default: one a core)")
    path = actions.add_parser("path", help="print the path of a library", description="Print the path of a library.")
    kind = path.add_mutually_exclusive_group()
    kind.add_argument("--tensorrt", action="store_true", help="the plugin of TensorRT 10, 11 and TensorRT for RTX")
    kind.add_argument("--tensorrt8", action="store_true", help="the plugin of TensorRT 8.6")
    kind.add_argument("--onnxruntime", action="store_true", help="the custom operator of onnxruntime")
    return parser


def run(args: argparse.Namespace) -> int:
    """Build the libraries and print their paths; builds are kept by the hash of their sources."""
    from vkvx.plugins import build

    if args.action == "build":
        headers = build.find_headers(args.tensorrt_headers)
        print(build.build(args.arch, force=args.force, jobs=args.jobs))
        if headers is None:
            terminal.note(f"no TensorRT plugin: {build.NO_HEADERS}")
        else:
            print(build.build_plugin(args.arch, headers, force=args.force, jobs=args.jobs))
        if args.onnxruntime:
            print(build.build_onnxruntime(args.arch, force=args.force, jobs=args.jobs))
        return 0
    chosen = {build.TENSORRT: args.tensorrt, build.TENSORRT8: args.tensorrt8, build.ONNXRUNTIME: args.onnxruntime}
    name = next((name for name, is_asked in chosen.items() if is_asked), build.LIBRARY)
    path = build.find_library(name)
    if path is None:
        options = {build.TENSORRT8: " --tensorrt-headers DIR", build.ONNXRUNTIME: " --onnxruntime"}
        command = f"vkvx plugin build{options.get(name, '')}"
        raise DependencyError(f"{name} is not built; run `{command}`")
    print(path)
    return 0
