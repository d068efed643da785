"""Compare a bundle in onnxruntime with its checkpoint in torch, or its engines with onnxruntime, tensor by tensor.

Both sides get the same tokens and the same picture embeddings. After each prefill, when the caches have been compared,
the bundle takes over the reference's cache; with text rows of 8 bits after each step, too. So every call is compared on
equal inputs, and a difference shows where it arises: a code that differs because its value lies on the border of two
levels would otherwise change all later logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from vkvx.errors import OptionError
from vkvx.manifest import FILE_NAME, Manifest, Progress
from vkvx.models.family import Source
from vkvx.models.registry import read_bundle, resolve_origin, sample_pages
from vkvx.packages import TORCH, require
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.backends.registry import ENGINE_BACKENDS, choose_backend, open_backend
from vkvx.runtime.bundles import load_manifest
from vkvx.runtime.checks.call_files import CallFiles, check_call_files
from vkvx.runtime.checks.comparison import Comparison
from vkvx.runtime.checks.report import Report
from vkvx.runtime.sessions.pictures import Picture
from vkvx.runtime.sessions.processor import Prepared, Processor, user_message

COMPARED = ("onnxruntime", *ENGINE_BACKENDS)
"""Backends that can be validated."""

PROMPT = "Describe the picture."
"""What is asked about each picture; the tokens that follow come from the torch model, greedily."""


def validate_bundle(
    bundle: str | Path,
    model: str | None = None,
    images: Sequence[Picture] | None = None,
    steps: int = 8,
    atol: float | None = None,
    rtol: float | None = None,
    provider: str = "auto",
    progress: Progress | None = None,
    backend: str = "onnxruntime",
    save_inputs: str | Path | None = None,
    save_outputs: str | Path | None = None,
) -> Report:
    """Run a bundle side by side with what it is made from: vision, a prefill, ``steps`` decode steps, a second turn.

    Backend "onnxruntime" is compared with the checkpoint in torch; "tensorrt" and "rtx", the engines of a bundle, with
    onnxruntime on the CPU.

    Args:
        bundle: directory of the bundle; the hashes of its files are verified.
        model: checkpoint directory, alias or hub id; None takes what the manifest names. The bundle itself holds all
            weights, too: it can stand in where its checkpoint is gone.
        images: one picture a turn; None takes two of the bundled sample pages.
        steps: decode steps after each prefill.
        atol, rtol: tolerance atol + rtol * range in place of ``TOLERANCES``, but for shares.
        provider: of onnxruntime; engines need none.
        backend: what is compared.
        save_inputs, save_outputs: files for what ``backend`` got and gave in each decoder call, as Polygraphy reads it.

    Raises:
        BundleError, EngineError, ModelError, InputError: if something cannot be read; DependencyError: without what the
        backend or the reference needs; OptionError: for an unusable number, or an option that would have no effect;
        StorageError: if a file cannot be written.
    """
    if backend not in COMPARED:
        raise OptionError(f"backend '{backend}' (--backend) cannot be validated: give one of {', '.join(COMPARED)}")
    engines = backend in ENGINE_BACKENDS
    if engines and model is not None:
        raise OptionError(f"--model has no effect with --backend {backend}: engines are compared with onnxruntime")
    if engines and provider != "auto":
        raise OptionError(f"--provider has no effect with --backend {backend}; leave it out")

    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is not None and not 0 <= value < inf:
            raise OptionError(f"{name} {value} is not supported: give a number of at least 0")
    report_progress = progress or (lambda stage, done, total: None)
    directory = Path(bundle)
    manifest = load_manifest(directory)
    inputs, outputs = (None if path is None else Path(path) for path in (save_inputs, save_outputs))
    check_call_files(manifest, save_inputs=inputs, save_outputs=outputs)
    choose_backend(backend, directory, manifest, "auto" if engines else provider)
    source = None if engines else _reference(directory, manifest, model)
    manifest.verify(directory, report_progress)
    pictures = list(images) if images else sample_pages()[:2]
    processor = Processor.of_bundle(directory, manifest)
    turns = [_turn(processor, picture, first=i == 0) for i, picture in enumerate(pictures)]
    capacity: dict[str, Any] = {
        "slots": 2,  # the second row shows that the slot is honoured
        "visual_tokens": sum(
            manifest.quantization.group_size * -(-n // manifest.quantization.group_size)
            for t in turns
            for n in t.picture_lengths
        ),
        "text_tokens": sum(len(t.token_ids) - sum(t.picture_lengths) + steps + 1 for t in turns),
    }
    total = 1 + len(turns) * (steps + 2)
    report_progress("compare", 0, total)
    reference: Backend
    if source is None:
        opened = open_backend(backend, directory, manifest, **capacity)
        reference = open_backend("onnxruntime", directory, manifest, provider="cpu", **capacity)
        name = "onnxruntime"
    else:
        from vkvx.runtime.backends.torch.loading import load_reference

        reference = load_reference(source, manifest, bundle=directory, **capacity)
        opened = open_backend(backend, directory, manifest, provider=provider, **capacity)
        name = str(source.name)
    report = Report(str(directory), name, manifest.model.dtype, opened.provider, backend)
    files = CallFiles(opened) if inputs or outputs else None
    comparison = Comparison(report, reference, opened, atol, rtol, files)
    done, token = 1, None
    for number, turn in enumerate(turns, start=1):
        phase = "" if number == 1 else f"turn {number} "
        embeds = comparison.vision(f"{phase}vision", turn)
        ids = turn.token_ids if token is None else np.concatenate([[np.int32(token)], turn.token_ids])
        token = comparison.step(f"{phase}prefill", ids, turn, embeds)
        comparison.caches(f"{phase}prefill")
        opened.cache.load(reference.cache)
        done += 2
        report_progress("compare", done, total)
        for step in range(1, steps + 1):
            token = comparison.step(f"{phase}decode {step}", np.array([token], np.int32))
            if step < steps:
                comparison.share_codes(f"{phase}decode {step}")
            done += 1
            report_progress("compare", done, total)
        comparison.caches(f"{phase}decode {steps}")
    if files is not None:
        files.save(inputs, outputs)
    return report


def _reference(bundle: Path, manifest: Manifest, model: str | None) -> Source:
    """What a bundle is compared with: its checkpoint, or another bundle's or its own copy of one."""
    require("export", *TORCH)
    if model is not None and (Path(model) / FILE_NAME).is_file():
        return read_bundle(Path(model))
    return resolve_origin(bundle, manifest.model, model, f"--model {bundle}, which compares with its own weights")


def _turn(processor: Processor, picture: Picture, *, first: bool) -> Prepared:
    message = user_message(PROMPT, pictures=1)
    prompt = processor.format([message]) if processor.has_chat_template else processor.plain(message)
    return processor.prepare(prompt, [picture], first=first)
