"""A stand-in for TensorRT on a GPU: engines whose logits follow from a row's last token and how much text it has.

Contexts run on the memory and the stream that the backend gives them, by torch, so that they can be captured.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from doubles import Logger, make_engines

from vkvx import ExportOptions
from vkvx.graph_specs import Graph, decoder_inputs, decoder_outputs, vision_outputs
from vkvx.manifest import FileInfo, Manifest
from vkvx.models.registry import resolve
from vkvx.runtime.backends.tensorrt.backend import TensorRTBackend
from vkvx.runtime.backends.tensorrt.device import Device
from vkvx.runtime.backends.tensorrt.engine import Engines
from vkvx.runtime.engines.gpus import find_gpus
from vkvx.runtime.engines.log import Log
from vkvx.runtime.engines.manifest import EngineManifest, Limits

PHASES, END = 64, 2
"""Logits come again after so many text tokens; the end-of-sequence token of tiny-llava."""
LIMITS = Limits(batch_size=64, slots=64, input_len=1280, visual_tokens=640, text_tokens=512, pictures=1)


class Bigram:
    """``logits`` of each phase and token, FP32 on a GPU, by a seed; the random numbers are NumPy's."""

    def __init__(self, vocab: int, seed: int = 0, spread: float = 3.0) -> None:
        rng = np.random.default_rng(seed)
        self.by_token = (rng.standard_normal((256, vocab)) * spread).astype(np.float32)
        self.by_phase = rng.standard_normal((PHASES, vocab)).astype(np.float32)
        self.by_phase[22, END] += 100  # answers of that length end
        self.tables = [torch.from_numpy(table).cuda() for table in (self.by_token, self.by_phase)]

    def logits(self, token: int, text_count: int) -> np.ndarray:
        """FP32 [V] after a token that is the last of so many text tokens."""
        return self.by_token[token % 256] + self.by_phase[text_count % PHASES]  # type: ignore[no-any-return]


class Context:
    """``IExecutionContext``, as far as the backend uses it."""

    def __init__(self, bigram: Bigram, profile: int) -> None:
        self.bigram, self.active_optimization_profile = bigram, profile
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        def on_device(name: str, shape: tuple[int, ...], kind: str = "<i4") -> torch.Tensor:
            held = {"shape": shape, "typestr": kind, "data": (self.addresses[name], False), "version": 2}
            return torch.as_tensor(type("Held", (), {"__cuda_array_interface__": held})(), device="cuda")

        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            ids, last, slot, count = (
                on_device(name, self.shapes[name]) for name in ("input_ids", "last_index", "slot", "text_count")
            )
            texts = on_device("text_index", self.shapes["text_index"])
            logits = on_device("logits", (len(ids), self.bigram.by_token.shape[1]), "<f4")
            token = ids.gather(1, last.long().unsqueeze(1))[:, 0] % 256
            phase = (count[slot.clamp(min=0)] + (texts >= 0).sum(1)) % PHASES
            torch.add(self.bigram.tables[0][token], self.bigram.tables[1][phase], out=logits)
        return True


def open_backend(folder: Path, vocab: int, *, slots: int) -> tuple[TensorRTBackend, Bigram]:
    """A backend over engines of a bigram in the shape of tiny-llava with another vocabulary."""
    source = resolve("tiny-llava")
    info = replace(source.info("float16"), vocab_size=vocab)
    quantization = ExportOptions(bits=1, quantizer="lloyd").resolve(info.cached_layers, info.typical_tokens)
    pixels = source.family.pixel_inputs(source.config)
    graphs = {
        "vision": Graph("vision.onnx", 18, pixels, vision_outputs(info, "576*P")),
        "decoder": Graph("decoder.onnx", 18, (), ()),
    }
    files = dict.fromkeys(("vision.onnx", "decoder.onnx", "processor/tokenizer.json"), FileInfo(0, "0" * 64))
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    manifest = Manifest("0.1.0", 1, info, quantization, graphs, "processor", files)
    layout = manifest.layout
    graphs["decoder"] = Graph("decoder.onnx", 18, decoder_inputs(layout), decoder_outputs(layout))
    manifest.save(folder)
    (gpu, *_) = find_gpus()
    directory = make_engines(folder, LIMITS, capability=gpu.compute_capability)
    bigram = Bigram(vocab)
    module = SimpleNamespace(ILogger=Logger)
    engine = SimpleNamespace(create_execution_context=lambda: Context(bigram, 0))
    library: Any = SimpleNamespace(module=module)
    engines = Engines(directory, EngineManifest.load(directory), engine, engine, None, library, Log(module))
    capacity = {"slots": slots, "visual_tokens": 640, "text_tokens": 500}
    return TensorRTBackend(manifest, engines, Device(gpu), **capacity), bigram
