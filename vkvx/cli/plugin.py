"""``vkvx plugin``: builds the CUDA kernels and the TensorRT plugin, and says where they are."""

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
        description="Build the CUDA kernels of the packed cache, libvkvx, and with TensorRT's headers its plugin, "
        "with CMake and nvcc, or print where they are.",
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
    build.add_argument("--force", action="store_true", help="build again")
    build.add_argument("--jobs", type=int, metavar="N", help="compilers side by side (default: one a core)")
    path = actions.add_parser("path", help="print the path of a library", description="Print the path of a library.")
    kind = path.add_mutually_exclusive_group()
    kind.add_argument("--tensorrt", action="store_true", help="the plugin of TensorRT 10, 11 and TensorRT for RTX")
    kind.add_argument("--tensorrt8", action="store_true", help="the plugin of TensorRT 8.6")
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
        return 0
    name = build.TENSORRT if args.tensorrt else build.TENSORRT8 if args.tensorrt8 else build.LIBRARY
    path = build.find_library(name)
    if path is None:
        command = "vkvx plugin build" + (" --tensorrt-headers DIR" if args.tensorrt8 else "")
        raise DependencyError(f"{name} is not built; run `{command}`")
    print(path)
    return 0
