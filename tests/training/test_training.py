"""The script that trains the tiny models: its steps, and that it runs each form as transformers and vkvx do."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from training.conversations import IGNORED, Encoder, Step, Steps
from training.forms import FORMS
from training.forms.base import decode
from training.pages import Painter, mark_code
from training.trainer import Trainer
from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.registry import resolve
from vkvx.models.tiny_llava import CHECKPOINT, data
from vkvx.runtime.sessions.processor import Processor

CPU = torch.device("cpu")


def options(out: Path) -> Namespace:
    """What the command line gives."""
    return Namespace(
        out=out, state=out / "training.pt", init=None, steps=4, fit=None, seed=0, lr=1e-3, warmup=2, average=0.9,
        dropout=0.0, eager=True,
    )  # fmt: skip


@pytest.fixture(scope="module", params=FORMS)
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """An untrained model of each form, with its checkpoint on disk."""
    made = Trainer(FORMS[request.param], options(tmp_path_factory.mktemp(request.param) / "out"), CPU)
    made.save()
    return made


def test_checkpoint_is_of_a_known_family(trainer: Trainer) -> None:
    """12 MB at most in float16, with the processor files of the form."""
    out, form = trainer.options.out, trainer.form
    source = resolve(out)
    assert source.family.architecture == type(trainer.model).__name__
    assert (out / "model.safetensors").stat().st_size < 12_000_000
    files = ProcessorFiles.load(out)
    assert files.chat_template == form.template
    assert files.tokenizer.get_vocab() == trainer.tokenizer.get_vocab()


def test_tiny_llavas_processor_is_that_of_the_package(trainer: Trainer) -> None:
    if trainer.form.name == "tiny-llava":
        for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
            assert (CHECKPOINT / name).read_bytes() == (trainer.options.out / name).read_bytes()


@pytest.mark.parametrize("number", [1, -1])
def test_training_runs_the_model_of_transformers(trainer: Trainer, number: int) -> None:
    """Tokens and positions are the processor's, logits those of the model, for two pages in two turns."""
    from transformers import AutoModelForImageTextToText

    form, source = trainer.form, resolve(trainer.options.out)
    if len(form.layouts) == 1 and number == 1:
        pytest.skip("has one layout")
    layout = form.layouts[number]
    processor = Processor.of_checkpoint(source, source.info("float32"))
    pages = [data.crop(data.page(seed, "test"), layout.rows, layout.columns) for seed in (0, 1)]
    images = [page.image.resize(layout.size[::-1]) for page in pages]
    picture = [{"type": "image"}]
    messages = [
        {"role": "user", "content": [*picture, {"type": "text", "text": "Read row 1."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "123"}]},
        {"role": "user", "content": [*picture, {"type": "text", "text": "Transcribe the second page."}]},
    ]
    prepared = processor.prepare(processor.format(messages), images)
    encoder = Encoder(form, trainer.tokenizer)
    talk = [("Read row 1.", "123", 1), ("Transcribe the second page.", "", 1)]
    ids, labels, positions = encoder([talk], len(prepared.token_ids), layout)
    assert np.array_equal(ids[0], prepared.token_ids)
    answered = trainer.tokenizer.decode(ids[0][labels[0] != IGNORED][:5])
    assert answered.strip().startswith(f"123{form.eos}")
    assert prepared.picture_lengths == (layout.tokens,) * 2
    inputs = source.family.model_inputs([prepared.vision_calls], [prepared.picture_sizes])
    given = {key: torch.from_numpy(array) for key, array in inputs.items()}
    if form.wide_positions:
        assert prepared.positions is not None
        assert np.array_equal(positions[:, 0], prepared.positions[-3:])
        given["mm_token_type_ids"] = torch.from_numpy(ids == encoder.image).long()  # positions are counted by it
    model = AutoModelForImageTextToText.from_pretrained(source.directory, dtype=torch.float32).eval()
    pixels = torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in images]))
    mean, std = (torch.tensor(values)[:, None, None] for values in (form.mean, form.std))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), **given).logits
        features, added = form.features(model, (pixels / 255 - mean) / std, layout)
        places = torch.from_numpy(np.flatnonzero(ids == encoder.image))
        embeds = model.get_input_embeddings()(torch.from_numpy(ids))
        embeds = embeds.flatten(0, 1).index_copy(0, places, features.flatten(0, 1)).view_as(embeds)
        wide = torch.from_numpy(positions)
        core = model.model.language_model
        states, _ = decode(core, embeds, wide if form.wide_positions else wide[0], added, places)
        found = model.lm_head(states)
    # Both run the same layers; some products are summed in another order. Pillow rounds a thumbnail to 8 bits.
    thumbnail = form.name == "tiny-intern" and layout.tokens > 36
    assert float((found - expected).abs().max()) < (0.1 if thumbnail else 1e-4) * float(expected.std())


def steps(name: str, **wanted: int) -> list[Step]:
    """Steps with these values among the first."""
    made = Steps(FORMS[name], FORMS[name].tokenizer(), seed=0, batch=2, steps=60)
    chosen = (made[number] for number in range(60))
    return [step for step in chosen if all(getattr(step, key) == value for key, value in wanted.items())]


def test_steps_are_the_same_for_a_seed() -> None:
    one, again = steps("tiny-intern", pictures=2)[:2], steps("tiny-intern", pictures=2)[:2]
    for a, b in zip(one, again, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not np.array_equal(one[0].drawn, one[1].drawn)


def test_answers_are_what_is_drawn() -> None:
    """Along the labels of a step stand the digits of its pages."""
    form = FORMS["tiny-qwen"]
    tokenizer = form.tokenizer()
    labels = Painter(CPU).labels
    for step in steps("tiny-qwen", layout=0, pictures=1)[:3]:
        for row, drawn in enumerate(step.drawn):
            text = tokenizer.decode(step.ids[row], skip_special_tokens=True)
            if "Transcribe the page.\nassistant\n" in text:
                answer = text.split("Transcribe the page.\nassistant\n")[1]
                truth = data.transcription(labels[torch.from_numpy(drawn)].numpy())
                assert answer.startswith(truth[: len(answer)])


def test_pages_look_like_those_of_pillow() -> None:
    """What the painter draws with the numbers and marks of pages has these pages' brightness and ink.

    The standard deviation of a page's mean is 13 and that of its contrast 6 (of 40 other pages), so that means over 40
    pages differ by less than five standard errors, 5 * sqrt(2 / 40) of that.
    """
    painter, rng = Painter(CPU), np.random.default_rng(0)
    theirs = np.stack([np.asarray(data.page(seed, "train").image) for seed in range(40)]).astype(np.float32)
    drawn = torch.from_numpy(rng.integers(len(painter.labels), size=(40, data.ROWS, data.COLUMNS)))
    codes = np.zeros(drawn.shape, np.int64)
    for page in codes:
        for mark in data.draw_marks(rng):
            page[mark.row, mark.column] = mark_code(mark)
    ours = painter.draw(drawn, torch.from_numpy(codes), 1).permute(0, 2, 3, 1).float().numpy()
    for measure, deviation in ((lambda x: x.mean((1, 2, 3)), 13.0), (lambda x: x.std((1, 2, 3)), 6.0)):
        assert abs(measure(ours).mean() - measure(theirs).mean()) < 5 * (2 / 40) ** 0.5 * deviation


def test_a_mark_lies_in_its_cell() -> None:
    """Painted with and without, from the same random numbers, nothing else changes."""
    painter = Painter(CPU)
    drawn, marks = torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(1, 2, 3, dtype=torch.long)
    plain = painter.draw(drawn, marks, 3).int()
    for code in range(1, 1 + len(data.COLOURS) * len(data.SHAPES)):
        marks[0, 1, 2] = code
        changed = (painter.draw(drawn, marks, 3).int() != plain).any(1)[0]
        assert changed[data.CELL_HEIGHT :, 2 * data.CELL_WIDTH :].sum() > 50
        changed[data.CELL_HEIGHT :, 2 * data.CELL_WIDTH :] = False
        assert not changed.any()


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Two steps at once, and one and one with the state on disk between, end with the same weights."""
    form, chosen = FORMS["tiny-qwen"], steps("tiny-qwen", layout=3, pictures=1)[:2]
    whole, halves = (Trainer(form, options(tmp_path / name), CPU) for name in ("whole", "halves"))
    start = [master.clone() for master in whole.masters]
    for trainer in (whole, halves):
        torch.manual_seed(1)
        losses = trainer.train_step(chosen[0])
        assert losses.isfinite().all()
    halves.save()
    again = Trainer(form, options(tmp_path / "halves"), CPU)
    again.load()
    for trainer in (whole, again):
        torch.manual_seed(2)
        trainer.train_step(chosen[1])
    assert again.step == 2
    for one, other in zip(whole.masters, again.masters, strict=True):
        assert torch.equal(one, other)
    assert not all(torch.equal(one, other) for one, other in zip(whole.masters, start, strict=True))
