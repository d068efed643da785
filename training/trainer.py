"""The model in training: losses, recorded steps, optimiser, running average."""

from __future__ import annotations

import argparse
import copy
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.conversations import IGNORED, Step
from training.forms import Form
from training.forms.base import decode
from training.pages import Painter
from vkvx.models.tiny_llava import data
from vkvx.storage import new_file

NOISE = 0.3  # on visual tokens in training: largest relative size
MARKS = 1 + len(data.COLOURS) * len(data.SHAPES)


class Heads(nn.Module):
    """What each visual token should know: its cell's digit and mark; and the place of that cell, in the decoder.

    A decoder that reads pages through a tower that cannot see yet learns nothing for a long time; this shortens the
    wait. It also makes each token of a cell carry the answer, so that no single one of them matters. Both are thrown
    away after training.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.content = nn.Linear(hidden, 10 + MARKS)
        self.place = nn.Linear(hidden, data.ROWS * data.COLUMNS)

    def forward(
        self, features: Tensor, states: Tensor, digits: Tensor, marks: Tensor, cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features and decoder states [P, T, hidden], digits and marks [P, cells of a page], cells [T].

        Returns the loss, and the share of tokens that tell their digit.
        """
        found = self.content(features).float()
        wanted = digits[:, cells]
        digit = functional.cross_entropy(found[..., :10].flatten(0, 1), wanted.flatten())
        mark = functional.cross_entropy(found[..., 10:].flatten(0, 1), marks[:, cells].flatten())
        place = functional.cross_entropy(
            self.place(states).float().flatten(0, 1), cells.expand(len(features), -1).flatten()
        )
        return digit + 0.3 * mark + 0.3 * place, (found[..., :10].argmax(-1) == wanted).float().mean()


class Batch(NamedTuple):
    """Tensors of a step on the device."""

    ids: Tensor  # int64 [rows, length]
    labels: Tensor  # int64 [rows, length], not shifted
    positions: Tensor  # int64 [1 or 3, rows or 1, length]
    places: Tensor  # int64 [pages * T]
    pages: Tensor  # uint8 [pages, 3, H, W]
    digits: Tensor  # int64 [pages, 24]: of each cell, 0 where the page has none
    marks: Tensor  # int64 [pages, 24]


class Recording(NamedTuple):
    """A CUDA graph of forward and backward, with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    losses: Tensor


class Trainer:
    """Weights are kept in float32; on a GPU the model runs on a copy of them in bfloat16."""

    def __init__(self, form: Form, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(options.seed)
        self.form, self.options, self.device, self.step = form, options, device, 0
        self._began, self._spent = time.monotonic(), 0.0
        self.tokenizer = form.tokenizer()
        self.painter = Painter(device)
        self.model = form.build(self.tokenizer)
        if options.init:
            self.model = type(self.model).from_pretrained(options.init, dtype=torch.float32)
        self.average = copy.deepcopy(self.model).to(device).eval().requires_grad_(False)
        core = self.model.model.language_model
        self.heads = Heads(core.config.hidden_size)
        for layer in core.layers:
            layer.self_attn.attention_dropout = options.dropout  # only here: the saved configuration says 0
        for module in self.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = partial(_norm, module)
        self.model.to(device).train()
        self.heads.to(device)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.masters = [parameter.detach().clone().float() for parameter in self.parameters]
        for parameter in self.parameters:
            if device.type == "cuda":  # parameters alone: frequencies of positions stay in float32
                parameter.data = parameter.data.bfloat16()
            parameter.grad = torch.zeros_like(parameter)
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        groups = [
            {"params": [p for p in self.masters if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in self.masters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=device.type == "cuda")
        self.mean = torch.tensor(form.mean, device=device)[:, None, None]
        self.std = torch.tensor(form.std, device=device)[:, None, None]
        self.cells = [torch.tensor(layout.cells, device=device) for layout in form.layouts]
        self.recordings: dict[tuple[int, int], Recording] = {}

    def spent(self) -> float:
        """Seconds of training, over all resumed runs."""
        return self._spent + time.monotonic() - self._began

    def rate(self) -> float:
        """Learning rate: linear warm-up, then a cosine down to 2 % at the last step, or when the time is over."""
        done = self.step / self.options.steps
        if self.options.fit:
            done = max(done, self.spent() / self.options.fit)
        done = min(1.0, done)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        return self.options.lr * min(1.0, (self.step + 1) / self.options.warmup) * cosine

    def batch(self, step: Step, seed: int) -> Batch:
        """A step on the device, with its pages drawn."""
        arrays = (step.ids, step.labels, step.positions, step.places, step.drawn, step.marks)
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.device.type == "cuda":  # pinned, so that the copy does not wait for the step before
            tensors = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        ids, labels, positions, places, drawn, marks = tensors
        layout = self.form.layouts[step.layout]
        pages = self.form.resize(self.painter.draw(drawn, marks, seed), layout)
        labelled = self.painter.labels_on(drawn)
        return Batch(ids, labels, positions, places, pages, *(whole(part) for part in (labelled, marks)))

    def normalised(self, pages: Tensor) -> Tensor:
        """Pixels as the tower takes them."""
        return ((pages.float() / 255 - self.mean) / self.std).to(self.parameters[0].dtype)

    def losses(self, batch: Batch, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of the answers, loss of the heads, share of visual tokens that tell their digit."""
        layout = self.form.layouts[number]
        features, added = self.form.features(self.model, self.normalised(batch.pages), layout)
        # Half of the pictures reach the decoder with noise: it learns to rely on several tokens at once. (Setting
        # tokens to zero instead taught it to use the zeros: without them it read worse.)
        noisy = self._noisy(features)
        states, middle = self._decode(self.model, batch, noisy, added)
        logits = self.model.lm_head(states[:, :-1]).float().flatten(0, 1)
        loss = functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
        visual = middle.flatten(0, 1)[batch.places].view_as(features)
        aside, seen = self.heads(features, visual, batch.digits, batch.marks, self.cells[number])
        return loss, aside, seen

    def _noisy(self, features: Tensor) -> Tensor:
        size = features.detach().float().square().mean(-1, keepdim=True).sqrt()
        amount = NOISE * (2 * torch.rand_like(size[:, :1]) - 1).clamp(min=0)
        return features + (amount * size * torch.randn_like(features, dtype=torch.float32)).to(features.dtype)

    def _decode(self, model: Any, batch: Batch, features: Tensor, added: list[Tensor]) -> tuple[Tensor, Tensor]:
        embeds = model.get_input_embeddings()(batch.ids)
        flat = embeds.flatten(0, 1).index_copy(0, batch.places, features.flatten(0, 1).to(embeds.dtype))
        positions = batch.positions if self.form.wide_positions else batch.positions[0]
        return decode(model.model.language_model, flat.view_as(embeds), positions, added, batch.places)

    @torch.no_grad()
    def read(self, batch: Batch, number: int) -> Tensor:
        """Share of labels that the averaged model gives rightly, each behind the right ones before it."""
        layout = self.form.layouts[number]
        pictures = (batch.pages.float() / 255 - self.mean) / self.std
        features, added = self.form.features(self.average, pictures, layout)
        states, _ = self._decode(self.average, batch, features, added)
        wanted = batch.labels[:, 1:]
        right = (self.average.lm_head(states[:, :-1]).argmax(-1) == wanted) & (wanted != IGNORED)
        return right.sum() / (wanted != IGNORED).sum()

    def _backward(self, batch: Batch, number: int) -> Tensor:
        """Fresh gradients in all parameters; returns what `losses` does, stacked."""
        torch._foreach_zero_([parameter.grad for parameter in self.parameters])
        loss, aside, seen = self.losses(batch, number)
        (loss + 0.3 * aside).backward()
        return torch.stack((loss, aside, seen)).detach()

    def _record(self, batch: Batch, number: int) -> Recording:
        """Record `_backward` for batches of this shape as a CUDA graph.

        The model is so small that launching its kernels one by one takes longer than running them.
        """
        static = Batch(*(tensor.clone() for tensor in batch))
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(2):
                self._backward(static, number)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.recordings.values())).graph.pool() if self.recordings else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            losses = self._backward(static, number)
        return Recording(graph, static, losses)

    def _gradients(self, batch: Batch, step: Step) -> Tensor:
        """`_backward`, replayed from a recording where possible."""
        if self.device.type != "cuda" or self.options.eager:
            return self._backward(batch, step.layout)
        key = (step.layout, step.pictures)
        if key not in self.recordings:
            self.recordings[key] = self._record(batch, step.layout)
        recording = self.recordings[key]
        for target, source in zip(recording.batch, batch, strict=True):
            target.copy_(source)
        recording.graph.replay()
        return recording.losses

    def train_step(self, step: Step) -> Tensor:
        """One step; returns what `losses` does, stacked, still on the device and valid until the next step."""
        batch = self.batch(step, hash((self.options.seed, self.step)) & 0x7FFFFFFF)
        losses = self._gradients(batch, step)
        torch._foreach_copy_([master.grad for master in self.masters], [p.grad for p in self.parameters])
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        decay = min(self.options.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
            averages = list(self.average.parameters())
            torch._foreach_lerp_(averages, self.masters[: len(averages)], 1 - decay)
        self.step += 1
        return losses

    def save(self) -> None:
        """Write the averaged model and the state to go on from; a crash half-way leaves the previous state."""
        out: Path = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        saved = self.form.build(self.tokenizer)
        saved.load_state_dict(self.average.state_dict())
        saved.half().save_pretrained(out)
        (out / "model.safetensors").chmod(0o644)
        self.form.save_processor(self.tokenizer, out)
        state = {
            "masters": self.masters,
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": self.spent(),
            "vocabulary": self.tokenizer.get_vocab(),
        }
        with new_file(self.options.state) as file:
            torch.save(state, file)

    def load(self) -> None:
        """Go on from the saved state."""
        state = torch.load(self.options.state, map_location=self.device, weights_only=True)
        if state["vocabulary"] != self.tokenizer.get_vocab():
            raise SystemExit("the tokenizer has changed since the state was saved: start anew, without --resume")
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
            torch._foreach_copy_(self.parameters, self.masters)
        self.step, self._spent = state["step"], state["spent"]


def _norm(module: Any, states: Tensor) -> Tensor:
    """As the forward of transformers' RMSNorm, in one kernel instead of six."""
    return functional.rms_norm(states, module.weight.shape, module.weight, module.variance_epsilon)


def whole(part: Tensor) -> Tensor:
    """Numbers of cells [P, R, C] at their places on a whole page, [P, 24]."""
    rows, columns = data.ROWS - part.shape[1], data.COLUMNS - part.shape[2]
    return functional.pad(part, (0, columns, 0, rows)).flatten(1)
