"""The figures of a checkpoint, each compared with what transformers and the plug-in give by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import CHECKPOINT
from torch import Tensor

from vkvx import ExportOptions, Session, quantize_visual_cache
from vkvx.errors import CapacityError, DependencyError
from vkvx.evaluation.records import Record, Records
from vkvx.evaluation.run import make_plan, run
from vkvx.evaluation.tasks import open_task, prompt_of
from vkvx.evaluation.torch_runner import choose_device, compare
from vkvx.runtime.sessions.pictures import load_picture

TOKENS = 40


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype="float32").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def found(questions: Path) -> dict[str, list[Record]]:
    """Records of both questions in one batch, by setting: 16 bits, 8, 1, and 1 with another quantiser."""
    task = open_task(None, questions, None, None)
    options = [ExportOptions(bits=8, group_size=128), ExportOptions(), ExportOptions(quantizer="minmax")]
    plan = make_plan("tiny-llava", task, options, device="cpu", dtype="float32", max_new_tokens=TOKENS)
    with Records(None, {}) as records:
        run(plan, records)
        return {setting.name: records.of(setting.name, 2) for setting in plan.settings}


def inputs_of(session: Session, questions: Path, index: int) -> tuple[dict[str, Tensor], str, list[Any]]:
    """What generate() takes for a question, its prompt, and its pictures."""
    (sample,) = open_task(None, questions, None, None).samples([index])
    prompt, pictures = prompt_of(sample, session.processor), [load_picture(path) for path in sample.pictures]
    prepared = session.processor.prepare(prompt, pictures)
    pixels = {name: torch.from_numpy(array) for name, array in prepared.vision_calls[0].items()}
    return {"input_ids": torch.from_numpy(prepared.token_ids).long()[None], **pixels}, prompt, pictures


@pytest.fixture(scope="module")
def session(bundle_factory: Callable[..., Path]) -> Session:
    return Session.load(bundle_factory(bits=1, dtype="float32"), provider="cpu", threads=1)


@pytest.mark.parametrize("index", [0, 1])
def test_tokens_are_those_of_generate_and_of_the_bundle(
    model: Any, session: Session, found: dict[str, list[Record]], questions: Path, index: int
) -> None:
    """A prompt of one picture and one of two share a batch: each gets what it gets alone, prefilled by itself."""
    inputs, prompt, pictures = inputs_of(session, questions, index)
    plain = model.generate(**inputs, max_new_tokens=TOKENS)
    start = inputs["input_ids"].shape[1]
    record = found["16 bits"][index]
    assert record.tokens == plain[0, start:].tolist()
    assert record.text == session.processor.decode(record.tokens).lstrip()
    with quantize_visual_cache(model):
        packed = model.generate(**inputs, max_new_tokens=TOKENS)
    record = found["1 bit, shaped, expected"][index]
    assert record.tokens == packed[0, start:].tolist()
    assert record.tokens == list(session.generate(prompt, pictures, max_new_tokens=TOKENS).token_ids)
    assert record.equal == (record.tokens == found["16 bits"][index].tokens)


def test_divergence_and_hits_are_those_of_single_steps(
    model: Any, session: Session, found: dict[str, list[Record]], questions: Path
) -> None:
    inputs, *_ = inputs_of(session, questions, 0)
    answer = found["16 bits"][0].tokens

    def steps() -> Tensor:
        output = model(**inputs)
        rows = [output.logits[0, -1]]
        for token in answer[:-1]:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values)
            rows.append(output.logits[0, -1])
        return torch.stack(rows).double().log_softmax(-1)

    expected = steps()
    with quantize_visual_cache(model, quantizer="minmax"):
        packed = steps()
    record = found["1 bit, minmax, expected"][0]
    divergence = torch.nn.functional.kl_div(packed, expected, reduction="sum", log_target=True)
    assert record.kl == pytest.approx(float(divergence), rel=1e-3)
    assert record.kl > 1e-3
    assert record.hits == sum(int(row.argmax()) == token for row, token in zip(packed, answer, strict=True))
    assert record.count == len(answer)


def test_attention_error_of_the_first_layer(
    model: Any, session: Session, found: dict[str, list[Record]], questions: Path
) -> None:
    """What enters the first layer does not depend on the cache, so transformers' own attention is the exact one."""
    inputs, *_ = inputs_of(session, questions, 0)
    answer = torch.tensor([found["16 bits"][0].tokens[:-1]])
    seen: list[Tensor] = []
    projection = model.model.language_model.layers[0].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    try:
        model(**{**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], 1)})
        exact = seen[-1][-answer.shape[1] :].unflatten(-1, (4, 64))  # tokens, query heads, channels
        with quantize_visual_cache(model):
            cache = model(**inputs).past_key_values
            model(input_ids=answer, past_key_values=cache)
        packed = seen[-1].unflatten(-1, (4, 64))
    finally:
        hook.remove()
    attention = found["1 bit, shaped, expected"][0].attention
    assert attention is not None
    measured = torch.tensor(attention)[0]
    torch.testing.assert_close(measured[:, 1], exact.square().sum((0, 2)), rtol=1e-3, atol=0)
    error = (packed - exact).square().sum((0, 2))
    torch.testing.assert_close(measured[:, 0], error, rtol=1e-3, atol=1e-9 * float(measured[:, 1].max()))
    assert (measured[:, 0] > 1e-4 * measured[:, 1]).sum() == 3  # one head hardly looks at the picture


def test_more_bits_err_less_in_every_layer_and_head(found: dict[str, list[Record]]) -> None:
    one, eight = (
        torch.tensor([record.attention for record in found[name]]).sum(0)
        for name in ("1 bit, shaped, expected", "8 bits, shaped, expected, group size 128")
    )
    assert one.shape == (4, 4, 2)
    assert (eight[..., 0] < 0.05 * one[..., 0]).all()
    assert (eight[..., 0] > 0).all()


def test_the_reference_is_compared_with_nothing(found: dict[str, list[Record]]) -> None:
    for record in found["16 bits"]:
        assert (record.kl, record.hits, record.count, record.equal, record.attention) == (None,) * 5


def test_bytes_of_a_sample(found: dict[str, list[Record]]) -> None:
    assert [record.visual_bytes for record in found["1 bit, shaped, expected"]] == [85 * 1024, 2 * 85 * 1024]
    assert [record.elements for record in found["16 bits"]] == [576 * 2 * 4 * 2 * 64 * count for count in (1, 2)]


def test_histograms_are_of_the_first_sample(found: dict[str, list[Record]]) -> None:
    assert all(record.histograms is None for records in found.values() for record in records[1:])
    assert found["16 bits"][0].histograms is None
    drawn = found["1 bit, shaped, expected"][0].histograms
    assert drawn is not None
    assert [(entry["layer"], entry["kind"]) for entry in drawn] == [(0, "key"), (0, "value"), (3, "key"), (3, "value")]
    for entry in drawn:
        assert entry["setting"] == "1 bit, shaped, expected"
        assert sum(entry["counts"]) == 576
        assert len(entry["edges"]) == len(entry["counts"]) + 1
        low, high = entry["levels"]
        # Where errors are to have a mean of 0, a level may lie a little beyond the numbers.
        assert low < high
        assert low < entry["edges"][-1]
        assert entry["edges"][0] < high
    eight = found["8 bits, shaped, expected, group size 128"][0].histograms
    assert eight is not None
    assert {len(entry["levels"]) for entry in eight} == {256}
    assert {sum(entry["counts"]) for entry in eight} <= {64, 128}  # 576 tokens in groups of 128


def test_compare_by_hand() -> None:
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]).log()
    logits = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.5, 0.25]]).log()
    hits, divergence = compare(expected, logits, [0, 1])
    assert hits == 1
    assert divergence == pytest.approx(0.5 * torch.tensor(4 / 3).log().item(), abs=1e-6)


def test_an_answer_of_one_token(questions: Path) -> None:
    """Nothing is fed then, so nothing attends to the packed cache."""
    task = open_task(None, questions, 1, None)
    plan = make_plan("tiny-llava", task, [ExportOptions()], device="cpu", dtype="float32", max_new_tokens=1)
    with Records(None, {}) as records:
        run(plan, records)
        (record,) = records.of(plan.settings[1].name, 1)
    assert (len(record.tokens), record.equal, record.hits, record.kl) == (1, True, 1, 0.0)


def test_a_prompt_that_is_too_long(questions: Path) -> None:
    task = open_task(None, questions, 1, None)
    plan = make_plan("tiny-llava", task, [ExportOptions()], device="cpu", dtype="float32", max_new_tokens=4000)
    with Records(None, {}) as records, pytest.raises(CapacityError, match=r"jsonl:1: prompt and answer take 4"):
        run(plan, records)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(DependencyError, match="device= "):
        choose_device("cuda")
