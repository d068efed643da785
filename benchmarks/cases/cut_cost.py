"""What ``--cut-after-pictures`` costs in accuracy: tiny-llava on held-out pages, prompts whole and cut.

Both are run along the answers of the 16-bit checkpoint and by themselves. "KL" is that to the checkpoint's, in
thousandths of a nat a token; "KL first" is that of an answer's first token, which sees the picture exactly in a whole
prompt; "digits" is the share of digits that are right, "equal" that of answers that are the checkpoint's. Differences
are cut less whole, page by page, with their 95 % intervals.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vkvx.evaluation.records import Record
    from vkvx.evaluation.tasks import Task

BATCH, TOKENS = 8, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--pages", type=int, default=400)
    parser.add_argument("--bits", type=int, nargs="+", choices=(1, 2, 4, 8), default=[1, 2, 4])


def run(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of the table."""
    from vkvx import ExportOptions, export_model
    from vkvx.evaluation.tasks import open_task

    task, rows = open_task("digits", None, arguments.pages, None), list[dict[str, Any]]()
    right = task.scorers["per_digit"]
    for bits in arguments.bits:
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            export_model("tiny-llava", bundle, ExportOptions(bits=bits))
            firsts, answers = _records(bundle, task)
        row: dict[str, Any] = {"bits": bits, "pages": arguments.pages}
        row |= _compare("KL first", firsts, lambda one: 1000 * (one.kl or 0.0))
        row |= _compare("KL", answers, lambda one: 1000 * (one.kl or 0.0) / (one.count or 1))
        row |= _compare("digits %", answers, lambda one: 100 * right([one.text], [one.answers])[0])
        row |= _compare("equal %", answers, lambda one: 100 * bool(one.equal))
        rows.append(row)
        yield rows


def _records(bundle: Path, task: Task) -> list[list[list[Record]]]:
    """Of each page, beside the checkpoint: first tokens of whole prompts and of cut ones, and answers to both."""
    from vkvx import ExportOptions
    from vkvx.evaluation.bundle_runner import BundleRunner
    from vkvx.evaluation.settings import Setting
    from vkvx.evaluation.torch_runner import TorchRunner
    from vkvx.manifest import Manifest
    from vkvx.models.registry import resolve

    manifest = Manifest.load(bundle)
    setting = Setting("bundle", ExportOptions(), manifest.quantization, reference=False)
    checkpoint = TorchRunner(resolve("tiny-llava"), "cpu", manifest.model.dtype, TOKENS)
    runners = [
        [BundleRunner(bundle, manifest, "cpu", BATCH, length, cut_after_pictures=cut) for cut in (False, True)]
        for length in (1, TOKENS)
    ]
    found: list[list[list[Record]]] = [[[], []], [[], []]]
    for start in range(0, task.count, BATCH):
        samples = list(task.samples(range(start, min(start + BATCH, task.count))))
        whole = checkpoint.start(samples, [None] * len(samples))
        first = replace(
            whole,
            answers=[answer[:1] for answer in whole.answers],
            expected=[logits[:1] for logits in whole.expected],
        )
        for records, both, reference in zip(found, runners, (first, whole), strict=True):
            for some, runner in zip(records, both, strict=True):
                some += runner.measure(samples, setting, reference)
    for runner in (one for both in runners for one in both):
        runner.close()
    return found


def _compare(name: str, both: list[list[Record]], value: Callable[[Record], float]) -> dict[str, Any]:
    """Means of whole and cut prompts, and of the difference."""
    import numpy as np

    from vkvx.evaluation.statistics import estimate

    whole, cut = (np.array([value(record) for record in records]) for records in both)
    found = estimate(cut - whole)
    around = "" if found.low is None else f" ({found.low:+.3g} to {found.high:+.3g})"
    return {
        f"{name}, whole": f"{whole.mean():.4g}",
        "cut " + name: f"{cut.mean():.4g}",
        f"difference of {name}": f"{found.mean:+.3g}{around}",
    }
