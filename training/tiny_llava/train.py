"""Train tiny LLaVA from nothing; about nine minutes on one H200.

    python -m training.tiny_llava.train --out tiny-llava
    python -m training.tiny_llava.train --out tiny-llava --resume      # goes on where a run was stopped

The folder given by --out holds the last checkpoint (averaged weights, float16) and `training.pt` with everything needed
to go on. Plain 16-bit training: nothing here knows of quantised caches.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from training.tiny_llava import conversations
from training.tiny_llava.evaluate import evaluate
from training.tiny_llava.model import MEAN, STD, build_model, build_processor
from training.tiny_llava.pool import PagePool
from vkvx.models.tiny_llava import data
from vkvx.storage import new_file

LENGTH_ONE, LENGTH_TWO = 672, 1280  # tokens of a conversation about one page and about two
NOISE = 0.3  # on visual tokens in training: largest relative size


class CellHead(nn.Module):
    """What each visual token should know about its cell: digit, mark and place. Thrown away after training.

    A decoder that reads pages through a tower that cannot see yet learns nothing for a long time; this shortens the
    wait. It also makes each of the 24 tokens of a cell carry the answer, so that no single one of them matters.
    """

    SIZES = (10, 1 + len(data.COLOURS) * len(data.SHAPES), data.ROWS * data.COLUMNS)

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, sum(self.SIZES))

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [n, 576, hidden], targets int64 [n, 3, 24]: loss, and share of tokens that tell their digit."""
        columns = torch.arange(24, device=features.device) // (24 // data.COLUMNS)
        rows = torch.arange(24, device=features.device) // (24 // data.ROWS)
        cells = (rows[:, None] * data.COLUMNS + columns).flatten()
        parts = self.linear(features).float().split(self.SIZES, dim=-1)
        wanted = [targets[:, i, cells] for i in range(3)]
        pairs = zip(parts, wanted, strict=True)
        digit, mark, place = (functional.cross_entropy(a.flatten(0, 1), b.flatten()) for a, b in pairs)
        return digit + 0.3 * mark + 0.3 * place, (parts[0].argmax(-1) == wanted[0]).float().mean()


def cell_targets(record: conversations.Record) -> np.ndarray:
    """Digit, mark (0 is none) and place of each cell, int64 [3, 24]."""
    digits, marks = record
    kinds = np.zeros(data.ROWS * data.COLUMNS, dtype=np.int64)
    for mark in marks:
        colour = tuple(data.COLOURS).index(mark.colour)
        kinds[mark.row * data.COLUMNS + mark.column] = 1 + colour * len(data.SHAPES) + data.SHAPES.index(mark.shape)
    return np.stack((digits.flatten(), kinds, np.arange(len(kinds))))


class TrainingBatch(NamedTuple):
    """Tensors of a step."""

    ids: torch.Tensor  # int64 [rows, length]
    labels: torch.Tensor  # int64 [rows, length], not shifted
    places: torch.Tensor  # int64 [pictures * 576]: where in the flattened ids the visual tokens stand
    targets: torch.Tensor  # int64 [pictures, 3, 24], see `cell_targets`
    pixels: torch.Tensor  # uint8 [pictures, 336, 336, 3]


class Recording(NamedTuple):
    """A CUDA graph of forward and backward, with the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: TrainingBatch
    gradients: list[torch.Tensor | None]
    losses: torch.Tensor


class Trainer:
    """The model, its auxiliary head, the optimiser, the running average of the weights, and the step."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device, self.step = options, device, 0
        self.processor = build_processor()
        self.encoder = conversations.Encoder(self.processor.tokenizer)
        self.model = build_model(self.processor.tokenizer).to(device)
        self.head = CellHead(self.model.config.text_config.hidden_size).to(device)
        if options.init:
            given = LlavaForConditionalGeneration.from_pretrained(options.init, dtype=torch.float32)
            self.model.load_state_dict(given.state_dict())
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        for layer in self.model.model.language_model.layers:
            layer.self_attn.attention_dropout = options.dropout  # only here: the saved configuration says 0
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.recordings: dict[tuple[int, ...], Recording] = {}
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=device.type == "cuda")
        self.mean = torch.tensor(MEAN, device=device)[:, None, None]
        self.std = torch.tensor(STD, device=device)[:, None, None]

    def rate(self) -> float:
        """Learning rate: linear warm-up, then a cosine down to 2 %."""
        done = min(1.0, self.step / self.options.steps)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        return self.options.lr * min(1.0, (self.step + 1) / self.options.warmup) * cosine

    def batch(self, pool: PagePool) -> TrainingBatch:
        """Examples for the next step, in the processor's memory except for the pictures.

        Mostly conversations about one page; one step in six is about two pages and one row in 32 about none.
        """
        rng = np.random.default_rng((self.options.seed, self.step))
        rows, two = self.options.batch, rng.random() < 1 / 6
        if two:
            rows = max(1, rows * 2 // 5)
            chosen = rng.integers(pool.size, size=(rows, 2))
            talks = [conversations.about_two(pool.records[a], pool.records[b], rng) for a, b in chosen]
        else:
            chosen = rng.integers(pool.size, size=rows - rows // 32)
            talks = [conversations.about_one(pool.records[i], rng) for i in chosen]
            talks += [conversations.about_none(rng) for _ in range(rows // 32)]
        ids, labels = self.encoder(talks, LENGTH_TWO if two else LENGTH_ONE)
        places = np.flatnonzero(ids == self.encoder.image)
        targets = np.stack([cell_targets(pool.records[i]) for i in chosen.flat])
        tensors = [torch.from_numpy(array) for array in (ids, labels, places, targets, chosen.ravel())]
        if self.device.type == "cuda":  # pinned, so that the copy does not wait for the step before
            tensors = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        on_ids, on_labels, on_places, on_targets, indices = tensors
        return TrainingBatch(on_ids, on_labels, on_places, on_targets, pool.pixels[indices])

    def losses(self, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss of the answers, loss of the cells, share of visual tokens that tell their digit."""
        core = self.model.model
        with torch.set_grad_enabled(not self.options.freeze_vision):
            pixels = (batch.pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
            layer = self.model.config.vision_feature_layer
            hidden = core.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
            features = core.multi_modal_projector(hidden[:, 1:])
        cell_loss, seen = self.head(features, batch.targets)
        # Half of the pictures reach the decoder with noise: it learns to rely on several tokens at once. (Setting
        # tokens to zero instead taught it to use the zeros: without them it read worse.)
        size = features.detach().float().square().mean(-1, keepdim=True).sqrt()
        amount = NOISE * (2 * torch.rand_like(size[:, :1]) - 1).clamp(min=0)
        noisy = features + (amount * size * torch.randn_like(size.expand_as(features))).to(features.dtype)
        embeds = core.get_input_embeddings()(batch.ids)
        flat = embeds.flatten(0, 1).index_copy(0, batch.places, noisy.flatten(0, 1).to(embeds.dtype))
        states = core.language_model(inputs_embeds=flat.view_as(embeds), use_cache=False).last_hidden_state
        logits = self.model.lm_head(states[:, :-1]).float().flatten(0, 1)
        loss = functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=conversations.IGNORED)
        return loss, cell_loss, seen

    def _backward(self, batch: TrainingBatch) -> torch.Tensor:
        """Fresh gradients in all parameters; returns what `losses` does, stacked."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, cell_loss, seen = self.losses(batch)
        (loss + 0.3 * cell_loss).backward()
        return torch.stack((loss, cell_loss, seen)).detach()

    def _record(self, batch: TrainingBatch, pool: PagePool) -> Recording:
        """Record `_backward` for batches of this shape as a CUDA graph.

        The model is so small that launching its kernels one by one takes longer than running them.
        """
        static = TrainingBatch(*(tensor.clone() for tensor in batch))
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        with pool.paused():  # its thread must not allocate while the graph is recorded
            side.wait_stream(main)
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._backward(static)
            main.wait_stream(side)
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                losses = self._backward(static)
        return Recording(graph, static, [p.grad for p in self.parameters], losses)

    def _gradients(self, batch: TrainingBatch, pool: PagePool) -> torch.Tensor:
        """`_backward`, replayed from a recording where possible."""
        if self.device.type != "cuda" or self.options.eager:
            return self._backward(batch)
        shape = tuple(batch.ids.shape)
        if shape not in self.recordings:
            self.recordings[shape] = self._record(batch, pool)
        recording = self.recordings[shape]
        for target, source in zip(recording.batch, batch, strict=True):
            target.copy_(source)
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        recording.graph.replay()
        return recording.losses

    def train_step(self, pool: PagePool) -> torch.Tensor:
        """One step; returns what `losses` does, stacked, still on the device and valid until the next step."""
        self.model.train()
        losses = self._gradients(self.batch(pool), pool)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        decay = min(self.options.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        return losses

    def save(self, pool: PagePool) -> None:
        """Write the averaged model and the state to go on from; a crash half-way leaves the previous state."""
        out: Path = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        export(self.average, out)
        self.processor.save_pretrained(out)
        state = {name: getattr(self, name).state_dict() for name in ("model", "head", "average", "optimizer")}
        state |= {"step": self.step, "next_seed": pool.next_seed, "vocabulary": self.processor.tokenizer.get_vocab()}
        with new_file(self.options.state) as file:
            torch.save(state, file)

    def load(self) -> int:
        """Go on from the saved state; returns the next seed of training pages."""
        state = torch.load(self.options.state, map_location=self.device, weights_only=True)
        if state["vocabulary"] != self.processor.tokenizer.get_vocab():
            raise SystemExit("the tokenizer has changed since the state was saved: start anew, without --resume")
        for name in ("model", "head", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        return state["next_seed"]


def export(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Save a model as float16."""
    copy.deepcopy(model).half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tiny-llava"), help="folder of the checkpoint")
    parser.add_argument("--state", type=Path, help="file to go on from (default: training.pt in the folder)")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--init", type=Path, help="start from the weights of this checkpoint")
    parser.add_argument("--freeze-vision", action="store_true", help="train the decoder only; with --init")
    parser.add_argument("--steps", type=int, default=6000, help="length of the schedule, over all resumed runs")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop this run then, with its state saved")
    parser.add_argument("--seed", type=int, default=0, help="of weights and questions; results are not bit-identical")
    parser.add_argument("--batch", type=int, default=128, help="conversations per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the running average of the weights")
    parser.add_argument("--dropout", type=float, default=0.05, help="of attention weights in the decoder")
    parser.add_argument("--pool", type=int, default=8192, help="pages kept on the device (0.34 MB each)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--eager", action="store_true", help="do not record CUDA graphs (half as fast)")
    parser.add_argument("--show-every", type=int, default=100, help="steps between lines of progress")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    parser.add_argument("--check-every", type=int, default=1000, help="steps between looks at held-out pages")
    parser.add_argument("--check-pages", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.state = options.state or options.out / "training.pt"
    if options.resume and not options.state.exists():
        parser.error(f"--resume: there is no {options.state}")
    return options


def main() -> None:
    options, start = arguments(), time.monotonic()
    first_seed = 0
    if options.resume:  # the pool must start before CUDA does, hence this early look
        first_seed = torch.load(options.state, map_location="cpu", weights_only=True)["next_seed"]
    pool = PagePool(options.pool, options.workers, first_seed)
    device = torch.device(options.device)
    trainer = Trainer(options, device)
    if options.resume:
        trainer.load()
    pool.start(device, pages=2048)
    held_out = [data.page(seed, "test") for seed in range(options.check_pages)]
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters:,} parameters, step {trainer.step} of {options.steps}", flush=True)

    began = shown = saved = time.monotonic()
    shown_step, first_page, sums = trainer.step, pool.next_seed, torch.zeros(3, device=device)
    while trainer.step < options.steps and (time.monotonic() - start) / 60 < options.minutes:
        pool.refill(pages=2 * options.batch)
        sums += trainer.train_step(pool)
        now = time.monotonic()
        if trainer.step % options.show_every == 0 or trainer.step == options.steps or now - shown > 30:
            loss, cell_loss, seen = (sums / (trainer.step - shown_step)).tolist()
            now = time.monotonic()
            speed = (trainer.step - shown_step) / (now - shown)
            print(
                f"step {trainer.step:6d}  {now - start:5.0f} s, {(options.steps - trainer.step) / speed:5.0f} s to go  "
                f"{speed:5.1f} steps/s  {(pool.next_seed - first_page) / (now - began):5.0f} new pages/s  "
                f"lr {trainer.rate():.1e}  loss {loss:.4f}  cells {cell_loss:.4f}  digits seen {seen:.2%}",
                flush=True,
            )
            shown, shown_step = now, trainer.step
            sums.zero_()
        if trainer.step % options.check_every == 0:
            result = evaluate(trainer.average, trainer.processor, held_out, batch=len(held_out))
            print("  held out: " + "  ".join(f"{name} {share:.1%}" for name, share in result.items()), flush=True)
        if now - saved > options.save_every:
            trainer.save(pool)
            saved = time.monotonic()
    trainer.save(pool)
    pool.close()
    rest = "" if trainer.step >= options.steps else "; --resume goes on"
    print(f"saved {options.out} after {trainer.step} steps, {time.monotonic() - start:.0f} s{rest}")


if __name__ == "__main__":
    main()
