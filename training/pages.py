"""Pages to train on, drawn on the accelerator: a batch of what `vkvx.models.tiny_llava.data` draws one by one.

The distributions are those of `data.page(seed, "train")`. Pixels differ a little, as torch interpolates with another
cubic than pillow. A thousand pages take some milliseconds, so each is seen once.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vkvx.models.tiny_llava import data

STRENGTH = 1.4
"""Distortion, as a multiple of that of held-out pages."""
COLOURS = np.array(list(data.COLOURS.values()), np.float32)


class Painter:
    """Draws pages of the handwriting to train on."""

    def __init__(self, device: torch.device) -> None:
        pictures, labels, _ = data.handwriting("train")
        self.device, self.labels = device, torch.from_numpy(labels).to(device)
        self.pictures = torch.from_numpy(pictures).to(device).float() / 255  # [n, 12, 12], 0 is paper
        self.colours = torch.from_numpy(COLOURS).to(device)
        y, x = (torch.arange(size, device=device).float() for size in (data.CELL_HEIGHT, data.CELL_WIDTH))
        self.y, self.x = y[:, None], x[None, :]

    def draw(self, drawn: Tensor, marks: Tensor, seed: int) -> Tensor:
        """Pages uint8 [P, 3, 84 R, 56 C]; ``drawn`` [P, R, C] are numbers of pictures, ``marks`` see `mark_code`."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=self.device) * (high - low) + low

        count, rows, columns = drawn.shape
        height, width = rows * data.CELL_HEIGHT, columns * data.CELL_WIDTH
        tint = (uniform(205, 252, count, 1) + uniform(-12, 12, count, 3)).clamp(0, 255)
        mask, shade = self._marks(marks, uniform)
        cells = tint[:, None, None, :, None, None].expand(-1, rows, columns, -1, *mask.shape[-2:])
        cells = torch.where(mask[:, :, :, None], shade[..., None, None], cells)
        ink = uniform(0, 90, count, 1, 1, 3) + uniform(-25, 25, count, rows, columns, 3)
        ink = ink.clamp(0, 110)[..., None, None]
        cells = torch.lerp(cells, ink, self._strokes(drawn, uniform)[:, :, :, None])
        page = cells.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, height, width)
        light = uniform(-12, 12, 2, count, 1, 1)
        ramps = [torch.linspace(-1, 1, size, device=self.device) for size in (height, width)]
        grain = torch.randn((count, height, width), generator=generator, device=self.device)
        grain = grain * uniform(0.5, 5, count, 1, 1) + light[0] * ramps[0][:, None] + light[1] * ramps[1]
        return (page + grain[:, None]).clamp(0, 255).byte()

    def labels_on(self, drawn: Tensor) -> Tensor:
        """Which digits these pictures are."""
        return self.labels[drawn]

    def _marks(self, marks: Tensor, uniform) -> tuple[Tensor, Tensor]:
        """Pixels that a mark covers, bool [P, R, C, 84, 56], and its colour [P, R, C, 3]."""
        shape, colour = (marks - 1) % len(data.SHAPES), (marks - 1).clamp(min=0) // len(data.SHAPES)
        whole = (*marks.shape, 1, 1)
        dx, dy = (uniform(-2.5, 2.5, *whole).round() for _ in range(2))
        thick = uniform(2.5, 5.5, *whole).round()
        x, y, right, bottom = self.x - dx, self.y - dy, data.CELL_WIDTH - 4, data.CELL_HEIGHT - 4

        def inside(by: Tensor | float) -> Tensor:
            return (x >= 3 + by) & (x <= right - by) & (y >= 3 + by) & (y <= bottom - by)

        box = inside(0.0) & ~inside(thick)
        under = data.CELL_HEIGHT - 9
        line = (x >= 8) & (self.x <= data.CELL_WIDTH - 8 + dx) & (y >= under) & (y <= under + thick)
        dot = (self.x - (data.CELL_WIDTH - 11) - dx).square() + (self.y - 12 - dy).square() <= (thick + 2).square()
        kinds = shape[..., None, None]
        mask = torch.where(kinds == 0, box, torch.where(kinds == 1, line, dot)) & (marks > 0)[..., None, None]
        shade = self.colours[colour] + uniform(-18, 18, *marks.shape, 3)
        return mask, shade.clamp(0, 255)

    def _strokes(self, drawn: Tensor, uniform) -> Tensor:
        """How much of each pixel ink covers, [P, R, C, 84, 56]."""
        count, height, width = drawn.numel(), data.CELL_HEIGHT, data.CELL_WIDTH
        angle = uniform(-11, 11, count, 1) * (STRENGTH * math.pi / 180)
        scale = uniform(4.9, 6.1, count, 2) * uniform(0.92, 1.04, count, 1)
        shear = uniform(-0.13, 0.13, count, 1) * STRENGTH
        corners = torch.tensor([[0, 0], [0, height], [width, height], [width, 0]], device=self.device)
        offset = corners.float() - torch.tensor([width / 2, height / 2], device=self.device)
        move = uniform(-1, 1, count, 1, 2) * torch.tensor([4.0, 9.0], device=self.device)
        across, down = (offset - move).unbind(-1)
        x = (angle.cos() * across + angle.sin() * down) / scale[:, :1]
        y = (angle.cos() * down - angle.sin() * across) / scale[:, 1:]
        quads = torch.stack((x + shear * y, y), -1) + uniform(-0.5, 0.5, count, 4, 2) * STRENGTH  # from the middle
        # Between its corners a quadrilateral is interpolated linearly along each side, as pillow does.
        v, u = (self.y + 0.5) / height, (self.x + 0.5) / width
        weights = torch.stack([(1 - u) * (1 - v), (1 - u) * v, u * v, u * (1 - v)], -1)  # [84, 56, 4]
        side = self.pictures.shape[-1]
        grid = torch.einsum("hwk,nkc->nhwc", weights, quads) * (2 / side)
        source = self.pictures[drawn.flatten()][:, None]
        found = functional.grid_sample(source, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        found = (found[:, 0].clamp(0, 1) * 255).round() / 255  # as pillow rounds: what is all but paper is paper
        gain, bias, dark = (uniform(low, high, count, 1, 1) for low, high in ((1.0, 2.2), (-0.16, 0.12), (0.7, 1.0)))
        covered = ((found - 0.5 + bias) * gain + 0.5).clamp(0, 1) * (found > 0) * dark
        return covered.view(*drawn.shape, height, width)


def mark_code(mark: data.Mark) -> int:
    """Which mark, from 1; 0 stands for none."""
    return 1 + tuple(data.COLOURS).index(mark.colour) * len(data.SHAPES) + data.SHAPES.index(mark.shape)
