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

RUN = ("numpy", "PIL", "jinja2", "onnx", "onnxruntime", "transformers")
TORCH = ("numpy", "PIL", "jinja2", "safetensors", "torch", "transformers")
EXPORT = ("numpy", "PIL", "onnx", "onnx_ir", "onnxscript", "safetensors", "torch", "transformers")
_MODEL = '<ir_version: 8, opset_import: ["": 13]> probe (float[1] x) => (float[1] y) { y = Identity(x) }'


@dataclass(frozen=True)
class Ability:
    """One thing that vkvx does: whether it works here, why not, and the command that helps."""

    name: str
    works: bool
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
    found = {module: packages.probe(module) for module in dict.fromkeys((*EXPORT, *RUN))}
    providers, failures = (
        probe_providers() if found["onnxruntime"][1] is None and found["onnx"][1] is None else ([], {})
    )
    devices, compiler = nvidia_devices(), nvcc_version()
    abilities = [
        _needs("export", EXPORT, found),
        _needs("run on a CPU", RUN, found),
        _cuda(found, providers, failures, devices),
        _torch_cuda(found),
    ]
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
                "works": [asdict(ability) for ability in abilities],
            }
        )
    else:
        print("\n".join(_lines(found, providers, devices, compiler, abilities)))
    return 0 if any(ability.works for ability in abilities) else 1


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
    """Name and compute capability of each GPU that the driver shows."""
    return _output("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader").splitlines()


def nvcc_version() -> str | None:
    """Release of the CUDA compiler on the path, if any."""
    match = re.search(r"release ([\d.]+)", _output("nvcc", "--version"))
    return match.group(1) if match else None


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


def _torch_cuda(found: dict[str, tuple[str | None, str | None]]) -> Ability:
    name = "run in torch on an NVIDIA GPU"
    base = _needs(name, TORCH, found)
    if base.reason:
        return base
    import torch

    from vkvx.plugins.build import find_library

    if not torch.cuda.is_available():
        reason = "no GPU that it can use" if torch.version.cuda else "this is a build without CUDA"
        return Ability(name, False, f"torch {torch.__version__}: {reason}")
    try:
        built = find_library() is not None
    except DependencyError as error:
        return Ability(name, False, str(error))
    return Ability(name, True) if built else Ability(name, False, "libvkvx is not built", "vkvx plugin build")


def _lines(
    found: dict[str, tuple[str | None, str | None]],
    providers: list[str],
    devices: list[str],
    compiler: str | None,
    abilities: list[Ability],
) -> list[str]:
    lines = [
        f"vkvx {__version__}, Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores",
        "",
    ]
    lines.append("packages")
    for module, (version, reason) in found.items():
        shown = version or ""
        lines.append(f"  {'✗' if reason else '✓'} {packages.pip_name(module):<14}{shown:<14}{reason or ''}".rstrip())
    lines += ["", "devices"]
    lines.append(f"  onnxruntime providers that work: {', '.join(providers) or 'none'}")
    lines.append(f"  NVIDIA GPUs: {'; '.join(devices) or 'none'}")
    lines.append(f"  CUDA compiler: {compiler or 'none'} (for `vkvx plugin build`)")
    lines += ["", "what works"]
    for ability in abilities:
        lines.append(
            f"  {'✓' if ability.works else '✗'} {ability.name}" + (f": {ability.reason}" if ability.reason else "")
        )
        if ability.advice:
            lines.append(f"      {ability.advice}")
    return lines
