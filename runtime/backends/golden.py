"""The golden sample: a small call of a bundle with what onnxruntime makes of it, to check an engine when it is loaded.

A picture of a fixed pattern between fixed tokens, then decode steps over the packed picture. Inputs follow from the
manifest; the file holds the logits that onnxruntime gave on a CPU.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vkvx.errors import BundleError, EngineError
from vkvx.manifest import Manifest
from vkvx.models.pictures.base import Encoded, prompt_positions
from vkvx.models.pictures.kinds import open_pictures
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.calls import build_call
from vkvx.storage import new_file

FILE_NAME = "golden.npz"
STEPS = 3
"""Decode steps."""
BEFORE, AFTER = 3, 5
"""Text tokens before and after the picture."""

TEXT_TOKENS = BEFORE + AFTER + STEPS

TOLERANCES = {"float32": (0.01, 0.02), "float16": (0.01, 0.02), "bfloat16": (0.05, 0.08)}
"""What logits may be off, as a share of their range: in the prefill, and in later steps, which read quantised pictures
(a code on the border of two levels may differ). Engines that are wrong are off by a multiple of this."""


def picture(manifest: Manifest, tokens: int = 0) -> Encoded:
    """A made-up picture of about so many tokens; 0 asks for a small one."""
    return open_pictures(manifest.model.pictures).example(manifest.graphs["vision"].inputs, tokens)


def text(manifest: Manifest, count: int, start: int = 0) -> list[int]:
    """Tokens without meaning: no picture's and no end of a sequence."""
    model = manifest.model
    special = {model.image_token_id, model.pad_token_id, *model.eos_token_ids}
    usual = [token for token in range(min(model.vocab_size, 4096)) if token not in special]
    return [usual[(start + i) * 31 % len(usual)] for i in range(count)]


def run(backend: Backend, slot: int) -> np.ndarray:
    """Logits FP32 [1 + STEPS, V] of the sample's calls, in an empty slot."""
    manifest, cache = backend.manifest, backend.cache
    example = picture(manifest)
    image = [manifest.model.image_token_id] * example.tokens
    prompt = [*text(manifest, BEFORE), *image, *text(manifest, AFTER, BEFORE)]
    embeds = backend.encode(example.arrays)
    logits = []
    feeds: list[tuple[Sequence[int], tuple[int, ...]]] = [(prompt, (example.tokens,))]
    feeds += [([token], ()) for token in text(manifest, STEPS, BEFORE + AFTER)]
    for ids, pictures in feeds:
        fed = np.array(ids, np.int32)
        positions = prompt_positions(fed == manifest.model.image_token_id, [example]) if pictures else None
        row = cache.row(slot, fed, pictures, positions)
        call = build_call([row], group_size=cache.group_size, image_token_id=manifest.model.image_token_id)
        logits.append(backend.step(call, backend.place(call, [embeds]) if pictures else None)[0])
    return np.stack(logits)


def record(backend: Backend, directory: Path) -> Path:
    """Run the sample in an empty slot 0 and write it into ``directory``; returns the file. Raises StorageError.

    The backend is onnxruntime on a CPU, with a cache for one picture and ``TEXT_TOKENS``.
    """
    logits = run(backend, 0)
    target = directory / FILE_NAME
    with new_file(target) as file:
        np.savez_compressed(file, logits=logits)
    return target


def check(backend: Backend, directories: Sequence[Path]) -> str:
    """Run the sample of the first directory that has one; returns what was found out, or why nothing was.

    The first of ``directories`` is that of the engines.

    Raises EngineError if the logits differ from those recorded by more than ``TOLERANCES``.
    """
    path = next((place / FILE_NAME for place in directories if (place / FILE_NAME).is_file()), None)
    if path is None:
        return "not checked: the bundle has no golden sample"
    manifest, cache = backend.manifest, backend.cache
    demand = cache.demand([picture(manifest).tokens], TEXT_TOKENS)
    if demand[0] > cache.groups or demand[1] > cache.text_capacity:
        return "not checked: the cache is too small for the golden sample"
    try:
        with np.load(path, allow_pickle=False) as file:
            expected = file["logits"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} cannot be read ({error}); export the model again") from error
    slot = cache.acquire()
    try:
        actual = run(backend, slot)
    finally:
        cache.release(slot)
    if expected.shape != actual.shape:
        raise BundleError(f"{path} holds logits of shape {expected.shape}, this model gives {actual.shape}")
    worst = difference(actual, expected)
    prefill, later = TOLERANCES[manifest.model.dtype]
    for phase, found, tolerance in (("prefill", worst[0], prefill), ("decode", worst[1:].max(), later)):
        if not found <= tolerance:  # so that NaN counts as different
            raise EngineError(
                f"the engines in {directories[0]} give wrong logits: the {phase} of the golden sample {path} is off by "
                f"{found:.2g} of the logits' range, {tolerance:g} is allowed; run `vkvx build BUNDLE --force`"
            )
    return f"golden sample: logits within {worst.max():.2g} of their range"


def difference(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """For each call the largest difference of the logits, as a share of their range."""
    spread = expected.max(axis=1) - expected.min(axis=1)
    return np.abs(actual - expected).max(axis=1) / np.maximum(spread, 1e-6)
