"""``vkvx doctor``: what is installed, what works, and what to install for what does not."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from vkvx import __version__, packages
from vkvx.cli import terminal
from vkvx.errors import DependencyError
from vkvx.packages import EXPORT, RUN, SERVE, TORCH

_MODEL = '<ir_version: 8, opset_import: ["": 13]> probe (float[1] x) => (float[1] y) { y = Identity(x) }'


@dataclass(frozen=True)
class Ability:
    """One thing that vkvx does: whether it works here, why not, and the command that helps."""

    name: str
    works: bool
    reason: str = ""
    advice: str = ""


@dataclass(frozen=True)
class CudaLibrary:
    """The library of CUDA kernels: its file, compute capabilities (such as 9.0) of its machine code and of its PTX,
    version of its C interface if it can be loaded, why not otherwise, and the command that helps."""

    path: str | None
    capabilities: list[str]
    ptx: list[str]
    abi_version: int | None
    reason: str = ""
    advice: str = ""


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "doctor",
        help="show what is installed, what works, what to install",
        description="Try every part that vkvx needs. Exit code 0 if at least one of export and run works, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Look at everything, print it."""
    found = {module: packages.probe(module) for module in dict.fromkeys((*EXPORT, *RUN, *SERVE))}
    providers, failures = (
        probe_providers() if found["onnxruntime"][1] is None and found["onnx"][1] is None else ([], {})
    )
    devices, compiler, library = nvidia_devices(), nvcc_version(), cuda_library()
    abilities = [
        _needs("export", EXPORT, found),
        _needs("run on a CPU", RUN, found),
        _cuda(found, providers, failures, devices),
        _kernels(library, devices),
        _operator(found, providers),
        _torch_cuda(found, library),
    ]
    runs = any(ability.works for ability in abilities)
    abilities.append(_needs("serve over HTTP", SERVE, found))
    if args.json:
        terminal.print_json(
            {
                "vkvx": __version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "cores": os.cpu_count(),
                "packages": {
                    packages.pip_name(module): {"version": version, "works": reason is None, "reason": reason}
                    for module, (version, reason) in found.items()
                },
                "onnxruntime_providers": providers,
                "nvidia_devices": devices,
                "nvcc": compiler,
                "cuda_library": asdict(library),
                "works": [asdict(ability) for ability in abilities],
            }
        )
    else:
        print("\n".join(_lines(found, providers, devices, compiler, library, abilities)))
    return 0 if runs else 1


def probe_providers() -> tuple[list[str], dict[str, str]]:
    """Providers of onnxruntime that ran a model of one node, and why the others did not."""
    import numpy as np
    import onnx.parser
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    model = onnx.parser.parse_model(_MODEL).SerializeToString()
    value = np.ones(1, dtype=np.float32)
    working: list[str] = []
    failures: dict[str, str] = {}
    for provider in onnxruntime.get_available_providers():
        if provider not in ("CPUExecutionProvider", "CUDAExecutionProvider"):
            continue
        try:
            session = onnxruntime.InferenceSession(model, providers=[provider])
            session.run(None, {"x": value})
        except Exception as error:  # onnxruntime raises many types
            failures[provider] = " ".join(str(error).split())
            continue
        if provider in session.get_providers():
            working.append(provider)
        else:
            failures[provider] = "onnxruntime cannot load its CUDA libraries"
    return working, failures


def nvidia_devices() -> list[str]:
    """Name and compute capability of each GPU that this process may use, in CUDA's order."""
    from vkvx.runtime.engines.gpus import list_gpus

    return [f"{gpu.name}, {gpu.compute_capability}" for gpu in list_gpus()]


def nvcc_version() -> str | None:
    """Release of the CUDA compiler on the path, if any."""
    match = re.search(r"release ([\d.]+)", _output("nvcc", "--version"))
    return match.group(1) if match else None


def cuda_library() -> CudaLibrary:
    """The library that `vkvx plugin build` made, or that an environment variable names; loads it."""
    from vkvx.plugins import build, fatbin
    from vkvx.plugins.library import ABI_VERSION, KernelLibrary

    try:
        path = build.find_library()
    except DependencyError as error:
        return CudaLibrary(None, [], [], None, str(error))
    if path is None:
        return CudaLibrary(None, [], [], None, "not built", "vkvx plugin build")
    held = fatbin.architectures(path)
    capabilities, ptx = ([f"{code // 10}.{code % 10}" for code in codes] for codes in held)
    try:
        KernelLibrary(path)
    except (DependencyError, AttributeError) as error:  # AttributeError: a library without these functions
        override = build.OVERRIDES[build.LIBRARY]
        advice = f"unset {override}" if os.environ.get(override) else "vkvx plugin build --force"
        return CudaLibrary(str(path), capabilities, ptx, None, str(error), advice)
    return CudaLibrary(str(path), capabilities, ptx, ABI_VERSION)


def _output(program: str, *arguments: str) -> str:
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _needs(name: str, modules: tuple[str, ...], found: dict[str, tuple[str | None, str | None]]) -> Ability:
    broken = [module for module in modules if found[module][1] is not None]
    if not broken:
        return Ability(name, True)
    reason = "; ".join(f"{packages.pip_name(module)}: {found[module][1]}" for module in broken)
    wanted = " ".join(f"'{packages.requirement(packages.pip_name(module))}'" for module in broken)
    return Ability(name, False, reason, f"pip install {wanted}")


def _cuda(
    found: dict[str, tuple[str | None, str | None]],
    providers: list[str],
    failures: dict[str, str],
    devices: list[str],
) -> Ability:
    name, provider = "run on an NVIDIA GPU", "CUDAExecutionProvider"
    if provider in providers:
        return Ability(name, True)
    if not devices:
        return Ability(name, False, "no NVIDIA GPU found", "install the GPU's driver, if there is a GPU")
    base = _needs(name, tuple(module for module in RUN if module != "onnxruntime"), found)
    if base.reason:
        return base
    advice = f"pip uninstall onnxruntime; pip install '{packages.requirement('onnxruntime-gpu')}'"
    return Ability(name, False, failures.get(provider, "this onnxruntime has no CUDA provider"), advice)


def _kernels(library: CudaLibrary, devices: list[str]) -> Ability:
    from vkvx.plugins.fatbin import Architectures

    name = "CUDA kernels"
    if library.reason:
        return Ability(name, False, library.reason, library.advice)
    if not devices:
        return Ability(name, False, "no NVIDIA GPU found", "install the GPU's driver, if there is a GPU")
    held = Architectures(*([int(x.replace(".", "")) for x in codes] for codes in (library.capabilities, library.ptx)))
    here = list(dict.fromkeys(re.findall(r", (\d+\.\d)$", "\n".join(devices), re.MULTILINE)))
    if any(held.serve(int(capability.replace(".", ""))) for capability in here):
        return Ability(name, True)
    reason = f"the library has no code for compute capability {' or '.join(here) or 'unknown'}"
    return Ability(name, False, reason, f"vkvx plugin build --arch {','.join(here) or 'all'}")


def _operator(found: dict[str, tuple[str | None, str | None]], providers: list[str]) -> Ability:
    from vkvx.plugins import build
    from vkvx.runtime.backends.onnxruntime import kernels

    name = "kernels in onnxruntime"
    try:
        path = build.find_library(build.ONNXRUNTIME)
        if path is None:
            return Ability(name, False, "not built", kernels.COMMAND)
        if (base := _needs(name, ("onnxruntime",), found)).reason:
            return base
        import onnxruntime

        kernels.register(onnxruntime, onnxruntime.SessionOptions(), path)
    except DependencyError as error:
        return Ability(name, False, str(error))
    if "CUDAExecutionProvider" in providers:
        return Ability(name, True)
    return Ability(name, False, f"{path.name} loads, but no CUDA provider of onnxruntime works here")


def _library_line(library: CudaLibrary) -> str:
    if library.path is None:
        return library.reason
    newest = f", PTX for {library.ptx[-1]} and newer" if library.ptx else ""
    version = "cannot be loaded" if library.abi_version is None else f"C interface {library.abi_version}"
    return f"{library.path}, {version}, for {', '.join(library.capabilities) or 'no GPU'}{newest}"


def _torch_cuda(found: dict[str, tuple[str | None, str | None]], library: CudaLibrary) -> Ability:
    name = "run in torch on an NVIDIA GPU"
    base = _needs(name, TORCH, found)
    if base.reason:
        return base
    import torch

    if not torch.cuda.is_available():
        reason = "no GPU that it can use" if torch.version.cuda else "this is a build without CUDA"
        return Ability(name, False, f"torch {torch.__version__}: {reason}")
    return Ability(name, not library.reason, library.reason, library.advice)


def _lines(
    found: dict[str, tuple[str | None, str | None]],
    providers: list[str],
    devices: list[str],
    compiler: str | None,
    library: CudaLibrary,
    abilities: list[Ability],
) -> list[str]:
    lines = [
        f"vkvx {__version__}, Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores",
        "",
    ]
    lines.append("packages")
    for module, (version, reason) in found.items():
        shown = version or ""
        lines.append(f"  {'✗' if reason else '✓'} {packages.pip_name(module):<18}{shown:<14}{reason or ''}".rstrip())
    lines += ["", "devices"]
    lines.append(f"  onnxruntime providers that work: {', '.join(providers) or 'none'}")
    lines.append(f"  NVIDIA GPUs: {'; '.join(devices) or 'none'}")
    lines.append(f"  CUDA compiler: {compiler or 'none'} (to build the CUDA kernels)")
    lines.append(f"  CUDA library: {_library_line(library)}")
    lines += ["", "what works"]
    for ability in abilities:
        lines.append(
            f"  {'✓' if ability.works else '✗'} {ability.name}" + (f": {ability.reason}" if ability.reason else "")
        )
        if ability.advice:
            lines.append(f"      {ability.advice}")
    return lines
