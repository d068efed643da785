"""Train a bundled model from nothing; some minutes on one H200.

    python -m training.train tiny-qwen --out tiny-qwen
    python -m training.train tiny-qwen --out tiny-qwen --resume      # goes on where a run was stopped

The folder given by --out holds the last checkpoint (averaged weights, float16) and `training.pt` with everything needed
to go on. Plain 16-bit training: nothing here knows of quantised caches.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from training.conversations import Encoder, Steps, first
from training.forms import FORMS
from training.trainer import Batch, Trainer
from vkvx.models.tiny_llava import data


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=FORMS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--state", type=Path, help="file to go on from (default: training.pt in the folder)")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--init", type=Path, help="start from the weights of this checkpoint")
    parser.add_argument("--steps", type=int, default=6000, help="length of the schedule, over all resumed runs")
    parser.add_argument("--seconds", type=float, default=600, help="stop this run then, with its state saved")
    parser.add_argument("--fit", type=float, metavar="SECONDS", help="end the schedule then, if that is sooner")
    parser.add_argument("--seed", type=int, default=0, help="of weights, questions and pages")
    parser.add_argument("--batch", type=int, default=64, help="conversations per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the running average of the weights")
    parser.add_argument("--dropout", type=float, default=0.05, help="of attention weights in the decoder")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2 - 1), help="make questions")
    parser.add_argument("--eager", action="store_true", help="do not record CUDA graphs")
    parser.add_argument("--show-every", type=float, default=5, help="seconds between lines of progress")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    parser.add_argument("--check-pages", type=int, default=64, help="held-out pages to look at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.state = options.state or options.out / "training.pt"
    if options.resume and not options.state.exists():
        parser.error(f"--resume: there is no {options.state}")
    return options


def held_out(trainer: Trainer, count: int) -> Batch:
    """Held-out pages in the first layout, to be transcribed."""
    pages = [data.page(seed, "test") for seed in range(count)]
    layout = trainer.form.layouts[0]
    talks = [[("Transcribe the page.", data.transcription(page.digits), 1)] for page in pages]
    encoder = Encoder(trainer.form, trainer.tokenizer)
    ids, labels, positions = encoder(talks, layout.tokens + 64, layout)
    images = np.stack([np.asarray(page.image).transpose(2, 0, 1) for page in pages])
    digits = np.stack([page.digits.flatten() for page in pages])
    arrays = (ids, labels, positions, np.flatnonzero(ids == encoder.image), images, digits, digits)
    return Batch(*(torch.from_numpy(array).to(trainer.device) for array in arrays))


def main() -> None:
    options, start = arguments(), time.monotonic()
    form, device = FORMS[options.model], torch.device(options.device)
    steps = Steps(form, form.tokenizer(), options.seed, options.batch, options.steps)
    begin = torch.load(options.state, map_location="cpu", weights_only=True)["step"] if options.resume else 0
    # The workers are forked before CUDA starts.
    loader = DataLoader(
        Subset(steps, range(begin, options.steps)), batch_size=1, collate_fn=first, num_workers=options.workers,
        prefetch_factor=8 if options.workers else None,
    )  # fmt: skip
    made = iter(loader)
    trainer = Trainer(form, options, device)
    if options.resume:
        trainer.load()
    check = held_out(trainer, options.check_pages)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{parameters:,} parameters, step {trainer.step} of {options.steps}, {time.monotonic() - start:.0f} s",
        flush=True,
    )

    shown = saved = time.monotonic()
    shown_step, sums, ended = trainer.step, torch.zeros(3, device=device), False
    for step in made:
        sums += trainer.train_step(step)
        now = time.monotonic()
        ended = trainer.step >= options.steps or (options.fit is not None and trainer.spent() >= options.fit)
        last = ended or now - start > options.seconds
        if now - shown > options.show_every or last:
            loss, aside, seen = (sums / (trainer.step - shown_step)).tolist()
            right = trainer.read(check, 0).item()
            now = time.monotonic()
            speed = (trainer.step - shown_step) / (now - shown)
            print(
                f"step {trainer.step:6d}  {now - start:5.0f} s  {speed:5.1f} steps/s  "
                f"lr {trainer.rate():.1e}  loss {loss:.4f}  aside {aside:.4f}  digits seen {seen:.2%}  "
                f"held out {right:.2%}",
                flush=True,
            )
            shown, shown_step = now, trainer.step
            sums.zero_()
        if last:
            break
        if now - saved > options.save_every:
            trainer.save()
            saved = time.monotonic()
    trainer.save()
    rest = "" if ended else "; --resume goes on"
    print(f"saved {options.out} after {trainer.step} steps, {time.monotonic() - start:.0f} s{rest}", flush=True)


if __name__ == "__main__":
    main()
