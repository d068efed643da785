"""Decode steps of whole models in the torch backend: eager and as CUDA graphs, and in transformers on a 16-bit cache.

Models: tiny-llava, and some with random weights and the shapes of known ones. Each row of a batch has a picture and
some text in the cache. First the logits of an eager and of a captured step are compared: they must be equal to the bit.
Times are medians of single steps, logits on the host included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TEXT = 64
"""Text tokens in each row."""
STEPS, WARM_UP = 30, 5
SHAPES = ("llava-1.5-7b", "internvl3-8b", "qwen2.5-vl-7b", "qwen3-vl-8b")
"""Presets of ``vkvx.models.presets``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 16], help="bits of the visual cache")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="rows")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="presets to give random weights")
    parser.add_argument("--layers", type=int, help="decoder layers in place of a preset's")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    import torch

    rows = []
    for name, model in _models(arguments.shapes, arguments.layers):
        for batch in arguments.batch:
            plain = _transformers(model, batch)
            for bits in arguments.bits:
                eager, captured, held = _backend(model, bits, batch)
                rows.append(
                    {
                        "model": name,
                        "bits": bits,
                        "rows": batch,
                        "eager ms": round(eager, 3),
                        "captured ms": round(captured, 3),
                        "tokens/s": round(1000 * batch / captured),
                        "transformers ms": round(plain, 3),
                        "cache MB": round(held / 1e6, 1),
                        "device": torch.cuda.get_device_name(),
                    }
                )
                torch.cuda.empty_cache()
    return rows


def _models(shapes: Sequence[str], layers: int | None) -> Any:
    """Names and models on the GPU, FP16."""
    import torch

    from vkvx.models.registry import resolve
    from vkvx.runtime.backends.torch.loading import load_model

    yield "tiny-llava", load_model(resolve("tiny-llava"), torch.float16).to("cuda")
    for preset in shapes:
        yield f"shape of {preset}", random_model(preset, layers)


def random_model(preset: str, layers: int | None = None) -> Any:
    """A model of a preset's shape on the GPU, FP16."""
    import torch
    import transformers

    from vkvx.models.presets import preset_config

    config = preset_config(preset, layers)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = getattr(transformers, config.architectures[0])(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def _backend(model: Any, bits: int, batch: int) -> tuple[float, float, int]:
    """Milliseconds of an eager and of a captured step, and bytes of the cache in use."""
    from vkvx import ExportOptions
    from vkvx.manifest import Graph, Manifest
    from vkvx.models.pictures.base import prompt_positions
    from vkvx.models.pictures.kinds import open_pictures
    from vkvx.models.registry import family_of
    from vkvx.runtime.backends.torch.backend import TorchBackend
    from vkvx.runtime.calls import build_call

    family = family_of(model)
    info = family.info(model.config, "float16")
    # What a picture is quantised by makes no difference to later steps.
    options = ExportOptions(bits=bits, quantizer=None if bits == 16 else "lloyd")
    quantization = options.resolve(info.cached_layers, info.typical_tokens)
    graphs = {"vision": Graph("", 18, family.pixel_inputs(model.config), ())}
    manifest = Manifest("", 1, info, quantization, graphs, ".", {})
    before = model.config.text_config._attn_implementation
    size, example = (
        quantization.group_size,
        open_pictures(info.pictures).example(graphs["vision"].inputs, info.usual_tokens),
    )
    picture, room = example.tokens, TEXT + 4 * (STEPS + WARM_UP)
    backend = TorchBackend(
        model, family, manifest, slots=batch, visual_tokens=-(-picture // size) * size, text_tokens=room
    )
    rng = np.random.default_rng(0)
    positions = prompt_positions(np.arange(picture + TEXT) < picture, [example])
    ids = np.concatenate([np.full(picture, info.image_token_id), rng.integers(4, info.vocab_size, TEXT)]).astype(
        np.int32
    )
    for row in range(batch):
        fed = backend.cache.row(row, ids, (picture,), positions)
        call = build_call([fed], group_size=size, image_token_id=info.image_token_id)
        embeds = rng.standard_normal((1, call.visual_index.shape[1], info.embed_width), np.float32)
        backend.step(call, embeds.astype(np.float16))

    def step(token: int = 9) -> np.ndarray:
        feed = [backend.cache.row(row, np.array([token], np.int32)) for row in range(batch)]
        return backend.step(build_call(feed, group_size=size, image_token_id=info.image_token_id), None)

    held = sum(backend.cache.bytes_used(row) for row in range(batch))
    captured_logits = step()
    captured = _milliseconds(step)
    backend.cache.text_count -= 1 + STEPS + WARM_UP
    backend.cache.next_position -= 1 + STEPS + WARM_UP
    backend._steps = None
    if not np.array_equal(step(), captured_logits):
        raise SystemExit("an eager and a captured step have different logits")
    eager = _milliseconds(step)
    model.set_attn_implementation({"text_config": before})
    return eager, captured, held


def _transformers(model: Any, batch: int) -> float:
    """Milliseconds of a step of the model itself, SDPA over a DynamicCache as long as the packed one.

    Without cuDNN's attention: with all to choose from, a step of tiny-llava took 45 ms.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import DynamicCache

    from vkvx.models.registry import family_of

    family = family_of(model)
    text, positions = family.text_model(model), family.info(model.config, "float16").usual_tokens + TEXT
    cache = DynamicCache(config=model.config.text_config)
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.no_grad(), sdpa_kernel(backends):
        shape = (batch, positions, model.config.text_config.hidden_size)
        embeds = torch.randn(shape, dtype=torch.float16, device="cuda")
        text(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        token = torch.full((batch, 1), 9, device="cuda")

        def step() -> Any:
            return model.lm_head(text(input_ids=token, past_key_values=cache).last_hidden_state).float().cpu()

        return _milliseconds(step)


def _milliseconds(step: Callable[[], Any]) -> float:
    times = []
    for _ in range(WARM_UP + STEPS):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times[WARM_UP:])
