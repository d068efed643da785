"""Loads torch models: a bundle's own, to serve it, and the checkpoint's, to compare a bundle with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vkvx.errors import BundleError, CapacityError, DependencyError, ModelError, OptionError
from vkvx.manifest import Manifest, ModelInfo
from vkvx.models.checkpoint import read_checkpoint
from vkvx.models.family import Source
from vkvx.models.graph.metric import METRICS_FILE, model_metrics
from vkvx.models.registry import read_bundle
from vkvx.plugins.operator import layer_attributes
from vkvx.runtime.backends.base import check_machine
from vkvx.runtime.backends.torch.backend import TorchBackend


def open_bundle(
    bundle: Path,
    manifest: Manifest,
    *,
    slots: int,
    visual_tokens: int,
    text_tokens: int,
    provider: str = "auto",
    threads: int | None = None,
) -> TorchBackend:
    """Load the model of a bundle from its weights and ``config.json``.

    ``provider`` is "cpu", "cuda", or "auto": the GPU if there is one. ``threads`` are torch's own on a CPU, for the
    whole process. Raises OptionError, DependencyError, BundleError, and CapacityError if the GPU is too small.
    """
    check_machine(provider, threads)
    device = choose_device(provider)
    if threads is not None:
        if device == "cuda":
            raise OptionError("threads (--threads) have no effect on a GPU; leave them out, or give --provider cpu")
        torch.set_num_threads(threads)
    try:
        source = read_bundle(bundle)
        check_same_model(source, manifest)
        model = load_model(source, getattr(torch, manifest.model.dtype))
    except ModelError as error:
        raise BundleError(f"torch cannot load the model of {bundle}: {error}") from error
    try:
        model = model.to(device)
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"the GPU is too small for the weights of {bundle}; give --provider cpu") from error
    metrics = _read_metrics(bundle, manifest, device) if _needs_metrics(manifest) else ()
    capacity = {"slots": slots, "visual_tokens": visual_tokens, "text_tokens": text_tokens}
    return TorchBackend(model, source.family, manifest, metrics, **capacity)


def load_reference(
    source: Source,
    manifest: Manifest,
    *,
    bundle: Path | None = None,
    slots: int = 1,
    visual_tokens: int = 0,
    text_tokens: int = 1,
    device: str = "cpu",
) -> TorchBackend:
    """Load the checkpoint ``source`` to run as the bundle of ``manifest`` does; capacities are those of a cache slot.

    Metrics are computed again from the weights; calibrated ones are those of ``bundle``, which alone has them.

    Raises ModelError if the checkpoint is another model than the bundle's.
    """
    check_same_model(source, manifest)
    model = load_model(source, getattr(torch, manifest.model.dtype)).to(device)
    metrics: tuple[tuple[Tensor, Tensor], ...] = ()
    if manifest.calibration is not None and bundle is not None:
        metrics = _read_metrics(bundle, manifest, device)
    elif _needs_metrics(manifest):
        found = model_metrics(source.family, model, manifest.model)
        metrics = tuple(zip(found.key, found.value, strict=True))
    capacity = {"slots": slots, "visual_tokens": visual_tokens, "text_tokens": text_tokens}
    return TorchBackend(model, source.family, manifest, metrics, **capacity)


def check_same_model(source: Source, manifest: Manifest) -> None:
    """Raise ModelError unless the checkpoint can be what the bundle was exported from."""
    theirs, ours = _facts(source.info(manifest.model.dtype)), _facts(manifest.model)
    for name, given in theirs.items():
        if given != (expected := ours[name]):
            raise ModelError(
                f"{source.directory} has {name} {given}, the bundle's model has {expected}; "
                "give the checkpoint that the bundle was exported from"
            )


def _facts(info: ModelInfo) -> dict[str, Any]:
    """What tells models apart, by the words of messages."""
    facts = {name: getattr(info, name) for name in ("architecture", "query_heads", "hidden_size", "vocab_size")}
    return {"layers": len(info.layers), **facts, **{f"layer {i}": vars(layer) for i, layer in enumerate(info.layers)}}


def load_model(source: Source, dtype: torch.dtype) -> Any:
    """The transformers model of a checkpoint, on the CPU, for inference. Raises ModelError if its files are damaged."""
    from transformers.utils import logging

    read_checkpoint(source.directory)  # names what is wrong with damaged files
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = source.family.model_class().from_pretrained(source.directory, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"transformers cannot load {source.directory}: {reason}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval().requires_grad_(False)


def choose_device(provider: str) -> str:
    """cpu or cuda, as :func:`open_bundle` takes ``provider``. Raises DependencyError."""
    available = torch.cuda.is_available()
    if provider == "cuda" and not available:
        raise DependencyError(
            "torch finds no CUDA device; give provider='cpu' (--provider cpu), or install a build of torch with CUDA"
        )
    return "cuda" if available and provider != "cpu" else "cpu"


def _needs_metrics(manifest: Manifest) -> bool:
    return layer_attributes(manifest.quantization, 1.0)[0].needs_metrics


def _read_metrics(bundle: Path, manifest: Manifest, device: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Key and value metric of each cached layer, FP16 [Hkv, D, D], as exported."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = bundle / METRICS_FILE
    try:
        stored = load_file(path, device)
        return tuple((stored[f"key.{layer}"], stored[f"value.{layer}"]) for layer in manifest.model.caches)
    except (OSError, KeyError, SafetensorError) as error:
        raise BundleError(f"cannot read {path} ({error}); export the model again") from error
