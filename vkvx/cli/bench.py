"""``vkvx bench``: how fast a bundle runs on this machine, and what memory it takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.cli import terminal
from vkvx.cli.generation import BACKENDS, PROVIDERS
from vkvx.errors import DependencyError, EngineError, OptionError

if TYPE_CHECKING:
    from vkvx.runtime.checks.bench import BenchResult, Latency

ALL = "all"


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to the command line."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "bench",
        help="time a bundle on this machine",
        description="Time pictures, prefill and decode steps of a bundle, and show the memory that they take. The"
        " inputs are made up: neither tokenizer nor image processor is needed.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle")
    parser.add_argument(
        "--backend",
        action="append",
        choices=(*BACKENDS, ALL),
        help="may be repeated; all: every one that this machine has (default: auto)",
    )
    parser.add_argument("--provider", choices=PROVIDERS, default="auto", help="where to run (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all physical cores)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences side by side (default: 1)")
    parser.add_argument("--pictures", type=int, default=1, metavar="N", help="pictures of a sequence (default: 1)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="text of a prompt (default: 32)")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps of a round (default: 64)")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="rounds that count, after one that does not (default: 3)"
    )
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="feed longer prompts in pieces of N tokens")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files with their SHA-256 first")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Time each backend in turn; those of ``all`` that this machine lacks are named, not timed."""
    from vkvx.runtime.checks.bench import Load, bench_bundle

    load = Load(args.batch_size, args.pictures, args.prompt_tokens, args.steps, args.repeats, args.prefill_chunk)
    wanted = list(dict.fromkeys(args.backend or ["auto"]))
    if ALL in wanted and len(wanted) > 1:
        raise OptionError(f"--backend {ALL} is every backend; leave out the others")
    names = [name for name in BACKENDS if name != "auto"] if ALL in wanted else wanted
    results: list[BenchResult] = []
    skipped: dict[str, str] = {}
    for name in names:
        try:
            with terminal.ProgressBar("bench", announce=False) as progress:
                results.append(
                    bench_bundle(
                        Path(args.bundle),
                        name,
                        load,
                        provider=args.provider,
                        threads=args.threads,
                        verify=not args.no_verify and not results,
                        progress=progress,
                    )
                )
        except (DependencyError, EngineError, OptionError) as error:
            if ALL not in wanted:
                raise
            skipped[name] = str(error)
    if args.json:
        from dataclasses import asdict

        found = {"bundle": args.bundle, "load": asdict(load), "results": [result.to_json() for result in results]}
        terminal.print_json({**found, "skipped": skipped})
        return 0
    print("\n".join(_table(results)))
    for name, reason in skipped.items():
        terminal.note(f"{name} was not timed: {reason}")
    return 0


def _table(results: list[BenchResult]) -> list[str]:
    lines = [
        f"{'':<14}{'':<10}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    for result in results:
        name = f"{result.backend} on {result.device}: {result.reason}"
        lines.append(name)
        for kind, latency in (("vision", result.vision), ("prefill", result.prefill), ("decode step", result.decode)):
            if latency is not None:
                lines.append(_latency(kind, latency))
        lines.append(f"  {result.tokens_per_second:.1f} tokens/s in decode, loaded in {result.load_seconds:.2f} s")
        memory = (
            ("cache in use", result.cache_bytes_used),
            ("cache", result.cache_bytes_allocated),
            ("process", result.process_bytes),
            ("GPU", result.device_bytes),
        )
        known = [f"{kind} {terminal.human_bytes(count)}" for kind, count in memory if count is not None]
        lines.append("  " + ", ".join(known))
    return lines


def _latency(kind: str, latency: Latency) -> str:
    figures = "".join(f"{value:>10.3f}" for value in (latency.mean, latency.p50, latency.p90, latency.p99))
    return f"  {kind:<12}{'ms':<10}{figures}"
