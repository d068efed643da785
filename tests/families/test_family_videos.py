"""Videos against transformers' own video processors and models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CASES, ROOM, TALL, Case, Recorded
from PIL import Image
from reference import IMAGE_TOKEN, Reference, joined, picture

from vkvx.evaluation import evaluate
from vkvx.runtime.sessions.processor import PLACEHOLDER, VIDEO_PLACEHOLDER
from vkvx.runtime.sessions.session import Session

PRESETS = ("tiny-qwen2-vl", "tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-qwen3.5", "tiny-llava-onevision")
ATOL = 1e-4
RATE = 2.0
FRAMES = [picture(150, 90, seed) for seed in range(10, 15)]
PROMPT = f"Look: {VIDEO_PLACEHOLDER} What happens in all of this?"
MIXED = f"First {PLACEHOLDER} then {VIDEO_PLACEHOLDER}\nWhat differs?"
pytestmark = pytest.mark.parametrize(
    "case", [case for case in CASES if case.preset in PRESETS], indirect=True, ids=lambda case: case.preset
)


@pytest.fixture(scope="module")
def session(exact: Path) -> Iterator[Session]:
    """Of the bundle of 16 bits."""
    with Session.load(exact, **ROOM, backend="onnxruntime") as opened:
        yield opened


def theirs(
    reference: Reference, prompt: str, pictures: list[Image.Image], videos: list[Any], *, first: bool = True
) -> dict[str, torch.Tensor]:
    tokens = [str(reference.tokenizer.convert_ids_to_tokens(token)) for token in (IMAGE_TOKEN, IMAGE_TOKEN + 1)]
    prompt = prompt.replace(PLACEHOLDER, tokens[0]).replace(VIDEO_PLACEHOLDER, tokens[1])
    frames = [np.stack([np.asarray(frame) for frame in one]) for one in videos]
    return reference.inputs([prompt], [pictures], first=first, videos=frames, rate=RATE)


@pytest.mark.parametrize(("prompt", "pictures"), [(PROMPT, []), (MIXED, [TALL])])
def test_prompts_and_pixels(reference: Reference, session: Session, prompt: str, pictures: list[Image.Image]) -> None:
    expected = theirs(reference, prompt, pictures, [FRAMES])
    prepared = session.processor.prepare(prompt, pictures, [FRAMES], fps=RATE)
    assert prepared.frames == len(FRAMES)
    ids = expected["input_ids"][0].numpy()
    assert prepared.token_ids.tolist() == np.where(ids == IMAGE_TOKEN + 1, IMAGE_TOKEN, ids).tolist()
    frames = prepared.picture_lengths[len(pictures) :]
    if "video_grid_thw" in expected:
        (grid,) = expected["video_grid_thw"].tolist()
        assert frames == (grid[1] * grid[2] // 4,) * grid[0] == (frames[0],) * 3
    else:
        assert frames == (4, 4, 4, 4, 5)
    pixels = np.concatenate([call["pixel_values"] for call in prepared.vision_calls[len(pictures) :]])
    wanted = expected["pixel_values_videos"].numpy().reshape(pixels.shape)
    np.testing.assert_allclose(pixels, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("prompt", "pictures"), [(PROMPT, []), (MIXED, [TALL])])
def test_greedy_answers(reference: Reference, session: Session, prompt: str, pictures: list[Image.Image]) -> None:
    expected, logits = reference.generate(theirs(reference, prompt, pictures, [FRAMES]), 16)
    recorded = Recorded(session)
    answer = session.generate(prompt, pictures, [FRAMES], fps=RATE, max_new_tokens=16, ignore_eos=True)
    assert answer.token_ids == tuple(expected[0])
    np.testing.assert_allclose(np.stack(recorded.logits[0]), logits[0], rtol=0, atol=ATOL)


def test_second_turn(reference: Reference, session: Session) -> None:
    first = theirs(reference, PROMPT, [], [FRAMES])
    second = theirs(reference, f"And {PLACEHOLDER}?", [TALL], [], first=False)
    answer, _ = reference.generate(first, 8)
    expected, logits = reference.generate(joined(first, answer[0], second), 16)
    options: dict[str, Any] = {"fps": RATE, "ignore_eos": True}
    with session.conversation() as conversation:
        begun = conversation.generate(PROMPT, videos=[FRAMES], max_new_tokens=8, **options)
        assert begun.token_ids == tuple(answer[0])
        recorded = Recorded(session)
        later = conversation.generate(f"And {PLACEHOLDER}?", TALL, max_new_tokens=16, **options)
        assert later.token_ids == tuple(expected[0])
        np.testing.assert_allclose(np.stack(recorded.logits[conversation.slot]), logits[0], rtol=0, atol=ATOL)


def test_an_evaluation_asks_about_videos(case: Case, exact: Path, session: Session, tmp_path: Path) -> None:
    """The answers to a line with a video, a folder of frames, are those of a session."""
    if case.preset != "tiny-qwen2.5-vl":
        pytest.skip("one of the families is enough")
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(FRAMES):
        frame.save(tmp_path / "frames" / f"{number}.png")
    line = {"video": "frames", "fps": RATE, "prompt": "What happens?", "answers": ["x"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line), encoding="utf-8")
    data, records = tmp_path / "questions.jsonl", tmp_path / "records.jsonl"
    result = evaluate(exact, data=data, reference=False, device="cpu", max_new_tokens=8, output=records, examples=1)
    assert (len(result.examples[0].pictures), result.examples[0].picture_count) == (4, len(FRAMES))
    content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    prompt = session.processor.format([{"role": "user", "content": content}])
    expected = session.generate(prompt, videos=[FRAMES], fps=RATE, max_new_tokens=8)
    found = json.loads(records.read_text(encoding="utf-8").splitlines()[1])
    assert tuple(found["tokens"]) == expected.token_ids
