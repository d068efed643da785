"""The stress set: every quantiser with every score correction on cases with known answers.

One row a method. A cell says whether the method keeps to the limit of the case, and its figure; ``docs/stress.md`` has
what these are.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from vkvx.errors import DependencyError, OptionError
from vkvx.evaluation.stress import methods, run_stress, table
from vkvx.evaluation.stress_cases import CASES
from vkvx.format import BITS, QUANTIZERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    bits, cases = ",".join(map(str, BITS)), ",".join(CASES)
    parser.add_argument("--bits", default=bits, help=f"bits of a code (default {bits})")
    parser.add_argument("--quantizers", nargs="+", default=QUANTIZERS, choices=QUANTIZERS, help="default: all")
    parser.add_argument("--cases", default=cases, help=f"cases to run (default {cases})")
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda (default cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU (default 1)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run each method on each case."""
    names = arguments.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise OptionError(f"there is no case '{unknown[0]}'; give --cases some of {', '.join(CASES)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise DependencyError("torch finds no CUDA device; give --device cpu")
    torch.set_num_threads(arguments.threads)
    results = []
    chosen = [m for m in methods(map(int, arguments.bits.split(","))) if m.quantizer in arguments.quantizers]
    for method, outcomes in run_stress(chosen, {name: CASES[name] for name in names}, device=arguments.device):
        results.append((method, outcomes))
        print(method.quantizer, method.score_correction, method.bits, f"{len(results)} of {len(chosen)}", flush=True)
    return table(results)
