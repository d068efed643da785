"""Calls in turns, and the towers of families in parts: the same bits as undivided, threads that end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from samples import Page
from test_captured_steps import PROMPT, opened

from vkvx.errors import InputError
from vkvx.models.graph.vision import VisionGraph
from vkvx.models.pictures.kinds import open_pictures
from vkvx.models.presets import preset_config
from vkvx.models.registry import family_of
from vkvx.runtime.backends.torch import turns

PRESETS = ("tiny", "tiny-llava-onevision", "tiny-internvl", "tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-pixtral")
"""CLIP, SigLIP and InternViT; windows; features of layers in between; pictures of any size."""


def finished(parts: Any) -> tuple[int, Any]:
    """How often it yields, and what it returns."""
    count = 0
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return count, end.value
        count += 1


def waiting() -> list[str]:
    """Threads of calls that have not ended."""
    return [thread.name for thread in threading.enumerate() if thread.name == "vkvx-turns"]


def test_a_call_and_its_caller_take_turns() -> None:
    order = list[str]()

    def call(pause: Callable[[], None]) -> str:
        for number in range(3):
            order.append(f"call {number}")
            pause()
        return "done"

    parts = turns.in_turns(call)
    assert order == []
    for number in range(3):
        next(parts)
        order.append(f"caller {number}")
    assert finished(parts) == (0, "done")
    assert order == [f"{who} {number}" for number in range(3) for who in ("call", "caller")]
    assert not waiting()


@pytest.mark.parametrize("at", [0, 1])
def test_an_error_reaches_the_caller(at: int) -> None:
    def call(pause: Callable[[], None]) -> None:
        for _ in range(at):
            pause()
        raise InputError("no picture")

    with pytest.raises(InputError, match="no picture"):
        finished(turns.in_turns(call))
    assert not waiting()


def test_a_call_that_is_given_up_ends() -> None:
    """What it holds is freed where it stands; one that stops nowhere is waited for."""
    freed = list[str]()

    def call(pause: Callable[[], None]) -> None:
        try:
            pause()
            freed.append("never")
        finally:
            freed.append("freed")

    parts = turns.in_turns(call)
    next(parts)
    assert waiting()
    parts.close()
    assert freed == ["freed"]
    turns.in_turns(call).close()  # it never began
    assert freed == ["freed"]
    assert not waiting()


@pytest.mark.parametrize("preset", PRESETS)
def test_towers_in_parts(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause behind each layer, of which there are fewer where parts are larger; the bits are the same."""
    torch.manual_seed(0)
    config = preset_config(preset)
    model = getattr(transformers, config.architectures[0])(config).eval().requires_grad_(False)
    family = family_of(model)
    inputs = family.pixel_inputs(config)
    picture = open_pictures(family.info(config, "float32").pictures).example(inputs, 16)
    pixels = [torch.from_numpy(picture.arrays[spec.name]) for spec in inputs]
    vision = VisionGraph(model, family, torch.float32)
    pauses = turns.LayerPauses(model, family.text_model(model))
    whole = vision(*pixels)

    def call(pause: Callable[[], None]) -> torch.Tensor:
        pauses.pause = pause
        try:
            with torch.no_grad():  # which belongs to a thread
                return vision(*pixels)
        finally:
            pauses.pause = None

    counts = list[int]()
    for part in (1, 1 << 26, 1 << 60):
        monkeypatch.setattr(turns, "PART", part)
        given_up = turns.in_turns(call)
        next(given_up, None)
        given_up.close()
        count, embeds = finished(turns.in_turns(call))
        assert torch.equal(embeds, whole)
        counts.append(count)
    layers = getattr(config.vision_config, "depth", None) or config.vision_config.num_hidden_layers
    assert counts[0] >= layers
    assert counts[0] > counts[1] >= counts[2] == 0


def test_a_session_goes_on_between_the_parts_of_a_tower(pages: list[Page], monkeypatch: pytest.MonkeyPatch) -> None:
    """And finds convolutions of the process as it set them."""
    monkeypatch.setattr(turns, "PART", 1)
    with opened(16, "float32", "", device="cpu") as (session, backend):
        (call,) = session.processor.prepare(PROMPT, [pages[0].path]).vision_calls
        whole, texts, flags = backend.encode(call), set[str](), list[bool]()
        expected = session.generate("USER: Hi.", max_new_tokens=2, ignore_eos=True).text
        parts = backend.encode_in_parts(call)
        while True:
            try:
                next(parts)
            except StopIteration as end:
                np.testing.assert_array_equal(end.value, whole)
                break
            flags.append(bool(torch.backends.cudnn.allow_tf32))
            texts.add(session.generate("USER: Hi.", max_new_tokens=2, ignore_eos=True).text)
        assert texts == {expected}
        layers = backend._vision.model.config.vision_config.num_hidden_layers
        assert flags == [bool(torch.backends.cudnn.allow_tf32)] * layers
    assert not waiting()
