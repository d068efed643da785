"""The same tokens three ways on pages of digits, float32: generate() with the plug-in, a bundle, ``vkvx eval``.

One row a model and number of bits. The first two prefill each page by themselves, ``vkvx eval`` once for all settings
of a batch.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

from vkvx import ExportOptions, Session, export_model, quantize_visual_cache
from vkvx.evaluation.records import Records
from vkvx.evaluation.run import make_plan
from vkvx.evaluation.run import run as run_plan
from vkvx.evaluation.tasks import Task, open_task, prompt_of
from vkvx.models.registry import resolve
from vkvx.runtime.backends.torch.loading import load_model
from vkvx.runtime.sessions.pictures import load_picture

TOKENS = 48
NAMES = ("plug-in", "bundle", "eval")
MODELS = "tiny-llava,tiny-qwen,tiny-intern"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--models", default=MODELS, help=f"models to run, aliases or folders (default {MODELS})")
    parser.add_argument("--pages", type=int, default=100, help="held-out pages, seeds 0, 1, ... (default 100)")
    parser.add_argument("--bits", default="1,2,4,8,16", help="bits to compare (default 1,2,4,8,16)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch and onnxruntime (default 1)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Answer all pages and compare the tokens page by page."""
    torch.set_num_threads(arguments.threads)
    widths = [int(bits) for bits in arguments.bits.split(",")]
    task = open_task("digits", None, arguments.pages, None)
    settings = [ExportOptions(bits=bits) for bits in widths]
    rows = []
    for model in arguments.models.split(","):
        plan = make_plan(model, task, settings, device="cpu", dtype="float32", max_new_tokens=TOKENS)
        with Records(None, {}) as records:
            run_plan(plan, records)
        names = {setting.options.bits: setting.name for setting in plan.settings}
        for bits in widths:
            evaluated = [record.tokens for record in records.of(names[bits], task.count)]
            plugged, bundled = _plug_in_and_bundle(model, bits, task, arguments.threads)
            answers = dict(zip(NAMES, (plugged, bundled, evaluated), strict=True))
            rows.append({"model": model, "bits": bits, "pages": task.count, **_compare(answers)})
            print(*rows[-1].values(), flush=True)
    return rows


def _plug_in_and_bundle(name: str, bits: int, task: Task, threads: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of each page by generate() and by a session, one page at a time."""
    source = resolve(name)
    model = load_model(source, torch.float32)
    plugged, bundled = [], []
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory) / "bundle"
        export_model(name, bundle, ExportOptions(dtype="float32", bits=bits))
        with (
            Session.load(bundle, provider="cpu", threads=threads, reuse=False) as session,
            quantize_visual_cache(model, bits),
        ):
            for sample in task.samples(range(task.count)):
                prompt = prompt_of(sample, session.processor)
                pictures = [load_picture(picture) for picture in sample.pictures]
                prepared = session.processor.prepare(prompt, pictures)
                ids = torch.from_numpy(prepared.token_ids).long()[None]
                inputs = source.family.model_inputs([prepared.vision_calls], [prepared.picture_sizes])
                pixels = {key: torch.from_numpy(array) for key, array in inputs.items()}
                if prepared.positions is not None:  # generate() counts them by this, as a processor gives it
                    pixels["mm_token_type_ids"] = (ids == session.manifest.model.image_token_id).long()
                output = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False, **pixels)
                plugged.append(output[0, ids.shape[1] :].tolist())
                bundled.append(list(session.generate(prompt, pictures, max_new_tokens=TOKENS).token_ids))
    return plugged, bundled


def _compare(answers: dict[str, list[list[int]]]) -> dict[str, Any]:
    """For each pair the pages with equal tokens, and the first page and token that differ."""
    row: dict[str, Any] = {}
    for one, other in itertools.combinations(answers, 2):
        pairs = list(zip(answers[one], answers[other], strict=True))
        different = [page for page, (a, b) in enumerate(pairs) if a != b]
        row[f"{one} = {other}"] = len(pairs) - len(different)
        first = "-"
        if different:
            a, b = pairs[different[0]]
            token = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            first = f"page {different[0]} token {token}"
        row[f"{one}, {other} differ"] = first
    return row
