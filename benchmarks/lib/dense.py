"""transformers' own caches as rivals of a session: the largest batch of a budget, first tokens, decode steps.

Caches are filled with random numbers, in place of many prefills. A batch fits if it can take the last steps of its
answers; what is timed are the first ones. Tokens are chosen on the GPU, as ``generate()`` would choose them, and each
step's are copied to the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.lib.serving import STEPS, WARM_UP, Model

DYNAMIC, STATIC, FP8, INT4 = "transformers dynamic", "transformers static+compile", "transformers fp8", "transformers 4"
RIVALS = (DYNAMIC, STATIC, FP8, INT4)
"""Contenders: ``DynamicCache``, ``StaticCache`` with torch.compile, ``QuantizedCache`` of FP8 and of 4 bits."""
BITS = {DYNAMIC: 16.0, STATIC: 16.0, FP8: 8.0, INT4: 4.5}
"""Bits an element, with scales, of what the batch is guessed by."""


class Rival:
    """One of transformers' caches, over a model that no backend of ours has taken yet."""

    def __init__(self, model: Model, kind: str) -> None:
        self._given, self.kind = model, kind
        self._model, self._text = model.model, model.family.text_model(model.model)
        self._config = model.model.config.text_config

    def cache(self, length: int) -> Any:
        """An empty cache for at most so many positions. Raises ImportError where a package is missing."""
        from transformers import DynamicCache, QuantizedCache, StaticCache

        if self.kind == DYNAMIC:
            return DynamicCache(config=self._config)
        if self.kind == STATIC:
            return StaticCache(config=self._config, max_cache_len=length)
        if self.kind == FP8:
            return QuantizedCache("fp8", self._config)
        try:
            return QuantizedCache("quanto", self._config, nbits=4)
        except ImportError:
            return QuantizedCache("hqq", self._config, nbits=4, axis_key=1, axis_value=1)

    def bytes_per_row(self) -> int:
        """Bytes of the cache for prompt and answer of one row."""
        load, info = self._given.workload, self._given.info
        elements = sum(2 * info.layers[i].kv_heads * info.layers[i].head_dim for i in info.caches)
        return int((load.prompt + load.answer) * elements * BITS[self.kind] / 8)

    def first_token_milliseconds(self, repeats: int = 3) -> float:
        """From a prepared prompt, pictures and all, to its first token: the whole model, the median."""
        times = []
        for _ in range(1 + repeats):
            begun = time.perf_counter()
            self.logits([])
            times.append(time.perf_counter() - begun)
        return 1000 * statistics.median(times[1:])

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits FP32 [1 + tokens, V] behind the workload's prompt 0, and behind each of these tokens."""
        import torch

        prompt = self._given.prompts.prepare("0")
        device = self._model.device
        pictures = self._given.family.model_inputs([prompt.vision_calls], [[(0, 0)] * len(prompt.picture_lengths)])
        arrays = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in pictures.items()}
        arrays["pixel_values"] = arrays["pixel_values"].to(self._model.dtype)
        ids = torch.from_numpy(prompt.token_ids).long()[None].to(device)
        if self._given.info.position_rows > 1:
            arrays["mm_token_type_ids"] = (ids == self._given.info.image_token_id).int()
        cache = self.cache(ids.shape[1] + len(tokens))
        with torch.no_grad(), _attention(self._model):
            found = [self._model(input_ids=ids, past_key_values=cache, logits_to_keep=1, **arrays).logits[0, -1]]
            for token in tokens:
                fed = torch.tensor([[token]], device=device)
                found.append(self._model(input_ids=fed, past_key_values=cache, logits_to_keep=1).logits[0, -1])
            return torch.stack(found).float().cpu().numpy()

    def filled(self, rows: int, held: int) -> Any:
        """A cache of so many rows with ``held`` positions of random numbers."""
        import torch

        load, info = self._given.workload, self._given.info
        cache = self.cache(load.prompt + load.answer)
        for place, i in enumerate(info.caches):
            shape = (rows, info.layers[i].kv_heads, held, info.layers[i].head_dim)
            kept = (torch.randn(shape, dtype=self._model.dtype, device=self._model.device) for _ in range(2))
            cache.update(*kept, place)
        return cache

    def check_end(self, rows: int) -> None:
        """Take the last two steps of the answers of so many rows. Raises torch.OutOfMemoryError."""
        load = self._given.workload
        self._run(rows, load.prompt + load.answer - 2, 2, {})

    def milliseconds(self, rows: int, **options: Any) -> float:
        """Of a step of so many rows behind their prompts: the median."""
        times = self._run(rows, self._given.workload.prompt, WARM_UP + STEPS, options)
        return 1000 * statistics.median(times[WARM_UP:])

    def _run(self, rows: int, held: int, steps: int, options: dict[str, Any]) -> list[float]:
        """Seconds of each step."""
        import torch

        step = self._step(self.filled(rows, held), _chooser(options), is_timed=steps > WARM_UP)
        ids = torch.full((rows, 1), 9, device=self._model.device)
        times = []
        with torch.no_grad(), _attention(self._model):
            for _ in range(steps):
                begun = time.perf_counter()
                ids = step(ids)
                ids.cpu()
                times.append(time.perf_counter() - begun)
        return times

    def _step(self, cache: Any, choose: Callable[[Any], Any], *, is_timed: bool) -> Callable[[Any], Any]:
        import torch

        def step(ids: Any) -> Any:
            hidden = self._text(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
            return choose(self._model.lm_head(hidden[:, -1]))

        if self.kind != STATIC or not is_timed:
            return step
        torch._dynamo.reset()
        compiled = torch.compile(step, mode="reduce-overhead", dynamic=False)

        def copied(ids: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(ids).clone()  # the graph's own output is overwritten by the next step

        return copied


def _chooser(options: dict[str, Any]) -> Callable[[Any], Any]:
    """Tokens [B, 1] from logits [B, V], by transformers' own rules."""
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    if not options:
        return lambda logits: logits.argmax(-1, keepdim=True)
    rules = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"]), TopPLogitsWarper(options["top_p"])])
    return lambda logits: torch.multinomial(rules(None, logits.float()).softmax(-1), 1)


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    """torch's attention, by any kernel but cuDNN's, which makes a new plan at each length: 45 ms."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "sdpa"})
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        model.set_attn_implementation({"text_config": before})
