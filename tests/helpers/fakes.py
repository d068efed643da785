"""A manifest, a tokenizer and a backend that need no model, for tests of the runtime around them."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sampling_double import choose

from vkvx.manifest import (
    FileInfo,
    Graph,
    LayerInfo,
    Manifest,
    ModelInfo,
    PictureInfo,
    PromptInfo,
    Quantization,
    TensorSpec,
)
from vkvx.runtime.backends.base import CallInParts, SampledRow
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.calls import Call, place_embeds
from vkvx.runtime.engines.manifest import Limits
from vkvx.runtime.sessions.processor import PLACEHOLDER, Prepared

IMAGE, EOS, BOS = 3, 2, 1
PICTURE_TOKENS, GROUP = 160, 128  # a picture pads to two groups
VISION = Graph(
    "vision.onnx",
    18,
    (TensorSpec("pixel_values", "float32", ("P", 1)),),
    (TensorSpec("image_embeds", "float32", (f"{PICTURE_TOKENS}*P", 8)),),
)


def manifest(
    bits: int = 1, layers: int = 2, dtype: str = "float16", max_positions: int = 4096, group_size: int = GROUP
) -> Manifest:
    """Two KV heads of 64 channels; a picture has 160 visual tokens."""
    return Manifest(
        vkvx_version="0.1.0",
        operator_version=1,
        model=ModelInfo(
            name="fake",
            source="nowhere",
            revision=None,
            architecture="LlavaForConditionalGeneration",
            dtype=dtype,
            layers=(LayerInfo(kv_heads=2, head_dim=64, scale=0.125),) * layers,
            query_heads=4,
            hidden_size=8,
            embed_width=8,
            vocab_size=256,
            max_positions=max_positions,
            position_rows=1,
            image_token_id=IMAGE,
            tokens_per_picture=PICTURE_TOKENS,
            typical_tokens=(PICTURE_TOKENS,),
            pictures=PictureInfo("tiles", {"tile_tokens": PICTURE_TOKENS}, {}),
            prompt=PromptInfo(),
            eos_token_ids=(EOS,),
            pad_token_id=0,
        ),
        quantization=Quantization(
            key_bits=(bits,) * layers,
            value_bits=(bits,) * layers,
            group_size=group_size,
            quantizer="lloyd",
            quantile_alpha_key=(0.2,) * layers,
            quantile_alpha_value=(0.2,) * layers,
            shrink_key=(0.5,) * layers,
            shrink_value=(0.3,) * layers,
            score_correction="expected",
            tau=3.0,
            correction_limit=3.0,
            text_bits=16,
        ),
        graphs={
            "vision": VISION,
            "decoder": Graph("decoder.onnx", 18, (), ()),
        },
        processor="processor",
        files={"vision.onnx": FileInfo(0, ""), "decoder.onnx": FileInfo(0, "")},
    )


class FakeProcessor:
    """One token a byte; the tokens 0 to 3 are special. A picture is a number, and so is its pixel."""

    has_chat_template = True
    placeholder_ids = (IMAGE,)

    def prepare(
        self, prompt: str, images: Sequence[float] = (), videos: object = (), *, first: bool = True, **options: object
    ) -> Prepared:
        ids = [BOS] if first else []
        for number, part in enumerate(prompt.split(PLACEHOLDER)):
            ids += [IMAGE] * PICTURE_TOKENS if number else []
            for number_, piece in enumerate(part.split("</s>")):
                ids += ([EOS] if number_ else []) + list(piece.encode())
        calls = ({"pixel_values": np.array(images, np.float32)[:, None]},) if images else ()
        return Prepared(np.array(ids, np.int32), calls, (PICTURE_TOKENS,) * len(images))

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token for token in token_ids if token > 3).decode(errors="replace")

    def format(self, messages: Sequence[Mapping]) -> str:
        text = ""
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = "".join(part.get("text", PLACEHOLDER) for part in content)
            text += f"[{content}]" if message["role"] == "user" else f"{content}</s>"
        return text


class FakePending:
    """Tokens that the host has not read yet."""

    def __init__(self, tokens: np.ndarray, probabilities: np.ndarray) -> None:
        self.tokens, self.probabilities = tokens, probabilities

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens, self.probabilities


class FakeParts(CallInParts):
    """A call in parts, all of which runs with the last."""

    def __init__(self, backend: FakeBackend, parts: int, *given: Any) -> None:
        self.backend, self.left, self.given = backend, parts, given

    def advance(self) -> bool:
        self.left -= 1
        self.backend.parts_seen.append(self.left)
        if self.backend.fail_at == len(self.backend.calls):
            raise KeyboardInterrupt
        if not self.left:
            self.pending = self.backend.launch_whole(*self.given)
        return self.left > 0

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        return self.pending.result()


class FakeCache(PackedCache):
    """What its slots hold is kept beside it, and goes along with a fork."""

    held: dict[int, list[float]]

    def fork(self, source: int, target: int) -> None:
        super().fork(source, target)
        self.held[target] = self.held[source][: self.length(source)]


class FakeBackend:
    """Chooses the next token by a hash of all that a slot holds, or by ``script`` (tokens after the prompt of a slot).

    What a slot holds is kept beside the cache and checked against the counts and positions of each call. Where it ends
    with the text ``nan_after``, the logits are NaN. ``encode`` refuses pictures whose number is negative. With
    ``samples`` it chooses tokens itself, and launches prompts that run alone in so many ``parts``. Its tower has so
    many ``layers``, between which others may run; ``towers`` counts those that stand between two.
    """

    name = "fake"
    provider = "cpu"
    device = "CPU"
    limits: Limits | None = None
    closed = False
    samples = False
    parts = 1
    layers = 1

    def __init__(self, manifest: Manifest, slots: int, visual_tokens: int = 4096, text_tokens: int = 1024) -> None:
        self.manifest = manifest
        self.cache = FakeCache(manifest.layout, slots, visual_tokens, text_tokens)
        self.held = self.cache.held = {slot: [] for slot in range(slots)}
        self.script: list[int] | None = None
        self.calls: list[Call] = []
        self.fail_at: int | None = None
        self.nan_after: str | None = None
        self.sequences: dict[int, tuple[list[int], Sequence[int]]] = {}
        self.last = dict.fromkeys(range(slots), -9)
        self.parts_seen: list[int] = []
        self.towers = 0

    def begin(self, slot: int, seen: Sequence[int], excluded: Sequence[int]) -> None:
        self.sequences[slot] = list(seen), excluded

    def exclude(self, slot: int, excluded: Sequence[int]) -> None:
        self.sequences[slot] = self.sequences[slot][0], excluded

    def launch(
        self, call: Call, visual_embeds: np.ndarray | None, rows: Sequence[SampledRow]
    ) -> FakePending | FakeParts:
        if self.parts > 1 and len(rows) == 1 and call.input_ids.shape[1] > 1:
            return FakeParts(self, self.parts, call, visual_embeds, rows)
        return self.launch_whole(call, visual_embeds, rows)

    def launch_whole(self, call: Call, visual_embeds: np.ndarray | None, rows: Sequence[SampledRow]) -> FakePending:
        np.zeros(len(rows), np.int32)[:] = [row.top_k for row in rows]  # as it goes to the device
        slots = call.slot.tolist()
        ids = call.input_ids.copy()
        for b, slot in enumerate(slots):
            if ids[b, 0] == -1:
                assert call.input_ids.shape[1] == 1
                ids[b, 0] = self.last[slot]
        logits = self.step(replace(call, input_ids=ids), visual_embeds)
        tokens, probabilities = np.zeros(len(slots), np.int32), np.zeros(len(slots), np.float32)
        for b, (slot, row) in enumerate(zip(slots, rows, strict=True)):
            seen, excluded = self.sequences.get(slot, ([], ()))  # none yet in the midst of a prompt
            tokens[b], probabilities[b] = choose(logits[b], row, seen, excluded)
            self.last[slot] = max(0, int(tokens[b]))
            seen.append(self.last[slot])
        return FakePending(tokens, probabilities)

    def close(self) -> None:
        self.closed = True

    def encode(self, pixel_inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        pixels = pixel_inputs["pixel_values"][:, 0]
        if (pixels < 0).any():
            raise RuntimeError("no such picture")
        embeds = np.zeros((len(pixels), PICTURE_TOKENS, 8), np.float16)
        embeds[:, :, 0] = pixels[:, None]
        embeds[:, :, 1] = np.arange(PICTURE_TOKENS) + 1
        return embeds.reshape(-1, 8)

    def encode_in_parts(self, pixel_inputs: Mapping[str, np.ndarray]) -> Generator[None, None, np.ndarray]:
        self.towers += 1
        try:
            for _ in range(self.layers - 1):
                yield
            return self.encode(pixel_inputs)
        finally:
            self.towers -= 1

    def place(self, call: Call, embeds: Sequence[np.ndarray]) -> np.ndarray:
        return place_embeds(call, np.concatenate(embeds))

    def step(self, call: Call, visual_embeds: np.ndarray | None) -> np.ndarray:
        if self.fail_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append(call)
        cache, size = self.cache, self.manifest.quantization.group_size
        visual_count, text_count = cache.visual_count.copy(), cache.text_count.copy()
        logits = np.zeros((len(call.slot), self.manifest.model.vocab_size), np.float32)
        for b, slot in enumerate(call.slot.tolist()):
            held = self.held[slot]
            del held[cache.length(slot) :]  # what a slot held before, or was fed before the end of an answer was read
            assert len(held) == cache.length(slot)
            new: dict[int, float] = {}
            for entry, at in enumerate(call.visual_index[b].tolist()):
                if at >= 0:
                    assert visual_embeds is not None
                    assert call.input_ids[b, at] == IMAGE
                    new[at] = float(visual_embeds[b, entry, 0]) * 1000 + float(visual_embeds[b, entry, 1])
            valid = (call.visual_index[b].reshape(-1, size) >= 0).sum(1)
            valid = valid[valid > 0]
            texts = [at for at in call.text_index[b].tolist() if at >= 0]
            new.update({at: float(call.input_ids[b, at]) for at in texts})
            assert sorted(new) == list(range(len(new)))
            assert call.last_index[b] == len(new) - 1
            positions = call.position_ids[b].reshape(-1, call.input_ids.shape[1])
            assert positions[0, : len(new)].tolist() == list(range(len(held), len(held) + len(new)))
            seen, stored = self.views(call, b, held, [new[at] for at in range(len(new))])
            held += stored
            if self.manifest.layout.is_packed:
                first = cache.group_count(slot)
                visual_count[slot, first : first + len(valid)] = valid
                text_count[slot] += len(texts)
            else:
                text_count[slot] += len(new)
            logits[b] = self._logits(seen)
        cache.commit(call, visual_count, text_count)
        return logits

    def views(self, call: Call, b: int, held: list[float], new: list[float]) -> tuple[list[float], list[float]]:
        """What the last position of row ``b`` sees of its sequence, and what is stored of the ``new`` tokens."""
        return held + new, new

    def _logits(self, held: list[float]) -> np.ndarray:
        size = self.manifest.model.vocab_size
        fed = "".join(chr(int(token)) for token in held if 0 <= token < 256 and token == int(token))
        if self.nan_after is not None and fed.endswith(self.nan_after):
            return np.full(size, np.nan, np.float32)
        if self.script is not None:
            said = fed[fed.rindex("]") + 1 :]
            logits = np.zeros(size, np.float32)
            logits[self.script[min(len(said), len(self.script) - 1)]] = 10
            return logits
        seed = int.from_bytes(hashlib.sha256(np.array(held).tobytes()).digest()[:8], "little")
        logits = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 2
        logits[EOS] += 3  # answers end after some tokens
        return logits


def widened(base: Manifest, dtype: str) -> Manifest:
    """The same manifest with another dtype."""
    return replace(base, model=replace(base.model, dtype=dtype))
