"""``vkvx plugin``: builds the CUDA kernels, and says where they are."""

from __future__ import annotations

import argparse
from typing import Any

from vkvx.errors import DependencyError


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plugin",
        help="build the CUDA kernels, or show where they are",
        description="Build libvkvx, the CUDA kernels of the packed cache, with CMake and nvcc, or print its path.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="build the library, unless it was built before", description=run.__doc__)
    build.add_argument(
        "--arch",
        default="native",
        metavar="LIST",
        help="compute capabilities such as 80,90; native: those of this machine's GPUs, all without one (default); all",
    )
    build.add_argument("--force", action="store_true", help="build again")
    build.add_argument("--jobs", type=int, metavar="N", help="compilers side by side (default: one a core)")
    actions.add_parser("path", help="print the path of the library", description="Print the path of the library.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Build the library and print its path; builds are kept by the hash of their sources."""
    from vkvx.plugins import build

    if args.action == "build":
        print(build.build(args.arch, force=args.force, jobs=args.jobs))
        return 0
    path = build.find_library()
    if path is None:
        raise DependencyError("the CUDA kernels are not built; run `vkvx plugin build`")
    print(path)
    return 0
