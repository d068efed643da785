"""Decode steps of bundles in onnxruntime's CUDA provider, with the custom operator, beside the torch backend.

All rows hold a picture of random embeddings and some text. A step is what a session asks of a backend: a token of each
row goes in, logits come back to main memory. Both backends are given the same tokens; before anything is timed their
logits are compared, and their likeliest tokens, which may differ where two are nearly alike. Bundles whose positions
have rows of their own are refused.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from vkvx.errors import OptionError, VkvxError

TEXT = 24
CHECKED = 8
"""Steps that are compared, which warm up, too."""
BACKENDS = ("onnxruntime", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--bundles", nargs="+", required=True, help="bundles, with a config.json for torch")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="rows")
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table. Raises OptionError, and what opening a bundle raises."""
    return [
        row for path in arguments.bundles for batch in arguments.batch for row in _rows(Path(path), batch, arguments)
    ]


def _rows(bundle: Path, batch: int, steps: int) -> list[dict[str, Any]]:
    tokens = np.random.default_rng(1).integers(4, 400, (CHECKED + steps, batch)).astype(np.int32)
    logits, rows = dict[str, np.ndarray](), list[dict[str, Any]]()
    for name in BACKENDS:
        backend = _filled(name, bundle, batch, len(tokens))
        logits[name] = np.stack([backend.step(_call(backend, step), None).copy() for step in tokens[:CHECKED]])
        times = []
        for step in tokens[CHECKED:]:
            call = _call(backend, step)
            begun = time.perf_counter()
            backend.step(call, None)
            times.append(1e3 * (time.perf_counter() - begun))
        found = {"bundle": bundle.name, "rows": batch, "backend": name, "on": backend.device}
        quick, slow = np.percentile(times, (10, 90))
        rows.append(found | {"step ms": statistics.median(times), "10 %": float(quick), "90 %": float(slow)})
        backend.close()
    one, other = (logits[name] for name in BACKENDS)
    scale = np.abs(other).max()
    rows[0] |= {
        "logits off by": float(np.abs(one - other).max() / scale),
        "same tokens": float((one.argmax(-1) == other.argmax(-1)).mean()),
    }
    rows[1] |= {"logits off by": None, "same tokens": None}
    if not np.isfinite(one).all():
        raise VkvxError(f"{bundle}: logits of onnxruntime are not finite")
    return rows


def _filled(name: str, bundle: Path, batch: int, steps: int) -> Any:
    """A backend whose rows all hold the same picture and text."""
    from vkvx.manifest import Manifest
    from vkvx.runtime.backends.registry import open_backend
    from vkvx.runtime.calls import build_call

    manifest = Manifest.load(bundle)
    info, size = manifest.model, manifest.quantization.group_size
    if info.position_rows != 1:
        raise OptionError(f"{bundle} has positions of several rows; give another bundle in --bundles")
    visual, text = info.usual_tokens, TEXT + steps + 8
    capacity = {"visual_tokens": -(-visual // size) * size, "text_tokens": text}
    backend: Any = open_backend(name, bundle, manifest, provider="cuda", slots=batch, **capacity)
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.full(visual, info.image_token_id), rng.integers(4, 400, TEXT)]).astype(np.int32)
    call = build_call([backend.cache.row(0, ids, (visual,))], group_size=size, image_token_id=info.image_token_id)
    embeds = rng.standard_normal((1, call.visual_index.shape[1], info.embed_width), np.float32)
    backend.step(call, embeds.astype(info.dtype))
    for row in range(1, batch):
        backend.cache.fork(0, row)
    return backend


def _call(backend: Any, tokens: np.ndarray) -> Any:
    from vkvx.runtime.calls import build_call

    rows = [backend.cache.row(row, tokens[row : row + 1]) for row in range(len(tokens))]
    return build_call(rows, group_size=backend.cache.group_size, image_token_id=-1)
