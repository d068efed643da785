"""The pages that tiny LLaVA reads: the same ones every time, no handwriting in both splits, true answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from vkvx.models.tiny_llava import CHECKPOINT, data


@pytest.mark.parametrize("split", data.SPLITS)
def test_a_seed_gives_one_page(split: str) -> None:
    first, again, other = data.page(3, split), data.page(3, split), data.page(4, split)
    assert first.image.mode == "RGB"
    assert first.image.size == (data.SIZE, data.SIZE)
    assert first.image.tobytes() == again.image.tobytes()
    assert np.array_equal(first.digits, again.digits)
    assert first.marks == again.marks
    assert first.image.tobytes() != other.image.tobytes()


def test_splits_share_no_handwriting() -> None:
    splits = [data.handwriting(split) for split in data.SPLITS]
    indices = [set(chosen.tolist()) for _, _, chosen in splits]
    assert not indices[0] & indices[1]
    assert len(indices[0] | indices[1]) == 1797
    pictures = [{picture.tobytes() for picture in pictures} for pictures, _, _ in splits]
    assert not pictures[0] & pictures[1]
    assert {len(set(labels.tolist())) for _, labels, _ in splits} == {10}
    assert 0.19 < len(indices[1]) / 1797 < 0.21


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="valid"):
        data.page(0, "valid")


def test_marks_stand_in_different_cells_in_reading_order() -> None:
    for seed in range(20):
        places = [(mark.row, mark.column) for mark in data.page(seed, "train").marks]
        assert places == sorted(set(places))
        assert 2 <= len(places) <= 8
        assert all(0 <= row < data.ROWS and 0 <= column < data.COLUMNS for row, column in places)


def test_answers_are_what_stands_on_the_page() -> None:
    digits = np.arange(24).reshape(4, 6) % 10
    marks = (data.Mark(0, 1, "red", "dot"), data.Mark(2, 5, "red", "box"))
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        for kind in data.KINDS:
            prompt, answer = data.question(digits, marks, kind, rng)
            numbers = [int(word.strip(".?")) for word in prompt.split() if word.strip(".?").isdigit()]
            if kind == "transcribe":
                assert answer == "012345\n678901\n234567\n890123"
            elif kind == "row":
                assert answer == data.transcription(digits).split("\n")[numbers[0] - 1]
            elif kind == "cell":
                assert answer == str(digits[numbers[0] - 1, numbers[1] - 1])
            elif kind == "count":
                assert answer == str(int((digits == numbers[0]).sum()))
            elif kind == "marks":
                assert answer == ("2" if "red" in prompt else "0")
            elif kind == "where":
                assert answer == ("1,2 3,6" if "red" in prompt else "none")
            else:
                found = {(1, 2): "red dot", (3, 6): "red box"}
                assert answer == found.get((numbers[0], numbers[1]), "none")
            seen.add((kind, prompt))
    assert len({kind for kind, _ in seen}) == len(data.KINDS)
    with pytest.raises(ValueError, match="sing"):
        data.question(digits, marks, "sing", rng)


def test_questions_are_deterministic_and_name_the_page() -> None:
    page = data.page(0, "test")
    asked = [data.questions(page, np.random.default_rng(5)) for _ in range(2)]
    assert asked[0] == asked[1]
    assert len(asked[0]) == len(data.KINDS)
    for kind in data.KINDS:
        prompt, _ = data.question(page.digits, page.marks, kind, np.random.default_rng(1), "second page")
        assert "second page" in prompt


def test_the_sample_pages_are_the_first_held_out_ones(tmp_path: Path) -> None:
    data.write_samples(tmp_path)
    shipped = json.loads((CHECKPOINT / "pages" / "pages.json").read_text(encoding="utf-8"))
    assert shipped == json.loads((tmp_path / "pages.json").read_text(encoding="utf-8"))
    for entry in shipped:
        assert (CHECKPOINT / "pages" / entry["file"]).exists()
        assert np.array_equal(entry["digits"], data.page(entry["seed"], "test").digits)


def test_a_part_of_a_page_is_its_top_left() -> None:
    page = data.page(3, "test")
    part = data.crop(page, 2, 3)
    assert part.image.size == (3 * data.CELL_WIDTH, 2 * data.CELL_HEIGHT)
    assert np.array_equal(np.asarray(part.image), np.asarray(page.image)[: 2 * data.CELL_HEIGHT, : 3 * data.CELL_WIDTH])
    assert np.array_equal(part.digits, page.digits[:2, :3])
    assert part.marks == tuple(mark for mark in page.marks if mark.row < 2 and mark.column < 3)
    rng = np.random.default_rng(0)
    answers = {data.question(part.digits, part.marks, "row", rng)[1] for _ in range(30)}
    assert answers == {data.transcription(part.digits[row : row + 1]) for row in range(2)}
