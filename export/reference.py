"""The torch model as a backend: what a bundle is compared with. Its weights come from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vkvx.errors import ModelError
from vkvx.export.decoder import DecoderGraph, decoder_inputs
from vkvx.export.graph import DTYPES
from vkvx.export.metric import model_metrics
from vkvx.export.options import layer_attributes
from vkvx.export.vision import VisionGraph
from vkvx.manifest import Manifest
from vkvx.models.adapter import Source
from vkvx.models.checkpoint import read_checkpoint
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.layout import Call, place_embeds


class TorchReference:
    """Runs the modules that the graphs were traced from, eagerly on the CPU, over a cache in main memory.

    It has the interface of :class:`vkvx.runtime.backend.Backend`.
    """

    limits = None

    def __init__(self, source: Source, manifest: Manifest, *, slots: int, visual_tokens: int, text_tokens: int) -> None:
        self.manifest = manifest
        self.cache = PackedCache(manifest, slots, visual_tokens, text_tokens)
        adapter, info, dtype = source.adapter, manifest.model, DTYPES[manifest.model.dtype]
        model = load_model(source, dtype)
        attributes = layer_attributes(manifest.quantization, info.head_dim**-0.5)
        metrics: tuple[tuple[Tensor, Tensor], ...] = ()
        if attributes[0].needs_metrics:
            found = model_metrics(adapter, model, info)
            metrics = tuple(zip(found.key, found.value, strict=True))
        self._decoder = DecoderGraph(model, adapter, attributes, metrics)
        self._vision = VisionGraph(model, adapter, dtype)
        self._inputs = decoder_inputs(info, manifest.quantization)

    def encode(self, pixel_inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Embeddings [tokens of all pictures, hidden] of pictures, from what the image processor returns."""
        names = [spec.name for spec in self.manifest.graphs["vision"].inputs]
        with torch.no_grad():
            return _to_numpy(self._vision(*(_to_torch(np.asarray(pixel_inputs[name])) for name in names)))

    def place(self, call: Call, embeds: Sequence[np.ndarray]) -> np.ndarray:
        """See :meth:`vkvx.runtime.backend.Backend.place`."""
        return place_embeds(call, np.concatenate(embeds))

    def step(self, call: Call, visual_embeds: np.ndarray | None) -> np.ndarray:
        """Run the decoder once: logits FP32 [B, V]; the cache is updated in place."""
        info, cache = self.manifest.model, self.cache
        feed = {spec.name: getattr(call, spec.name) for spec in self._inputs if hasattr(call, spec.name)}
        feed |= {"visual_count": cache.visual_count, "text_count": cache.text_count}
        feed |= {f"past.{name}": buffer for name, buffer in cache.buffers.items()}
        arguments = {name: _to_torch(array) for name, array in feed.items()}
        shape, dtype = (*call.visual_index.shape, info.hidden_size), DTYPES[info.dtype]
        arguments["visual_embeds"] = (
            torch.zeros(shape, dtype=dtype) if visual_embeds is None else _to_torch(visual_embeds).to(dtype)
        )
        with torch.no_grad():
            logits, visual_count, text_count, *presents = self._decoder(
                *(arguments[spec.name] for spec in self._inputs)
            )
        for buffer, present in zip(cache.buffers.values(), presents, strict=True):
            _to_torch(buffer).copy_(present)
        inline = np.count_nonzero(call.visual_index >= 0, axis=1)
        cache.commit(call.slot, visual_count.numpy(), text_count.numpy(), inline)
        return logits.numpy()


def load_reference(
    source: Source, manifest: Manifest, *, slots: int = 1, visual_tokens: int = 0, text_tokens: int = 1
) -> TorchReference:
    """Load the checkpoint ``source`` to run as the bundle of ``manifest`` does; capacities are those of a cache slot.

    Raises ModelError if the checkpoint is another model than the bundle's.
    """
    check_same_model(source, manifest)
    return TorchReference(source, manifest, slots=slots, visual_tokens=visual_tokens, text_tokens=text_tokens)


def check_same_model(source: Source, manifest: Manifest) -> None:
    """Raise ModelError unless the checkpoint can be what the bundle was exported from."""
    info = source.adapter.info(source, manifest.model.dtype)
    for name in ("architecture", "layers", "query_heads", "kv_heads", "head_dim", "hidden_size", "vocab_size"):
        given, expected = getattr(info, name), getattr(manifest.model, name)
        if given != expected:
            raise ModelError(
                f"{source.directory} has {name} {given}, the bundle's model has {expected}; "
                "give the checkpoint that the bundle was exported from"
            )


def load_model(source: Source, dtype: torch.dtype) -> Any:
    """The transformers model of a checkpoint, on the CPU, for inference. Raises ModelError if its files are damaged."""
    from transformers.utils import logging

    read_checkpoint(source.directory)  # names what is wrong with damaged files
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = source.adapter.model_class().from_pretrained(source.directory, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"transformers cannot load {source.directory}: {reason}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval().requires_grad_(False)


def _to_torch(array: np.ndarray) -> Tensor:
    """A tensor on the array's memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
