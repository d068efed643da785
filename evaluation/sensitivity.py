"""Which layers gain most from more bits: ``vkvx eval --sensitivity``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from vkvx import __version__
from vkvx.cache_layout import CacheLayout
from vkvx.errors import OptionError
from vkvx.evaluation.records import Records
from vkvx.evaluation.result import mean_divergence
from vkvx.evaluation.run import BATCH, MAX_NEW_TOKENS, is_bundle, make_plan, needed_modules, run
from vkvx.evaluation.tasks import open_task
from vkvx.export.options import ExportOptions
from vkvx.format import BITS
from vkvx.manifest import Progress
from vkvx.models.registry import resolve
from vkvx.packages import require

FORMAT, VERSION = "vkvx-sensitivity", 1
STEPS = 2
"""How many higher numbers of bits are tried in each layer."""


@dataclass(frozen=True)
class Step:
    """One layer with more bits, all others at the base: KL in nats a token, and how much less that is than the base's.

    ``added`` is what the step adds to the bits of an element, all overheads counted.
    """

    layer: int
    bits: int
    kl: float
    gain: float
    added: float


@dataclass(frozen=True)
class Sensitivity:
    """What raising single layers gains, and a choice of layers within ``budget`` bits per element.

    ``bits_per_layer`` is for the option of that name, beside ``bits``; it is None if no step gains anything within the
    budget. ``chosen_bits_per_element`` is what the choice takes.
    """

    target: str
    device: str
    dtype: str
    task: str
    samples: int
    base: str
    bits: int
    kl: float
    bits_per_element: float
    steps: list[Step]
    budget: float
    bits_per_layer: str | None
    chosen_bits_per_element: float

    def to_json(self) -> dict[str, Any]:
        """The document of ``vkvx eval --sensitivity --json``."""
        return {"format": FORMAT, "version": VERSION, "vkvx_version": __version__, **asdict(self)}


def measure_sensitivity(
    target: str | Path,
    task: str | None = None,
    base: ExportOptions | None = None,
    *,
    budget: float | None = None,
    data: str | Path | None = None,
    samples: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    batch: int = BATCH,
    max_new_tokens: int = MAX_NEW_TOKENS,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Sensitivity:
    """Raise each layer alone from the bits of ``base`` (1 by default) to the next two numbers of bits.

    ``budget`` is in bits a key or value element, overheads counted; by default it lies half way between all layers at
    the base and all at the next number of bits. The other arguments are those of :func:`vkvx.evaluate`. Raises
    OptionError for a bundle, and for a base or budget that leaves nothing to raise.
    """
    base = base or ExportOptions()
    if is_bundle(target):
        raise OptionError("--sensitivity needs a checkpoint; give the one that the bundle was exported from")
    if base.key_bits is not None or base.value_bits is not None or base.bits_per_layer is not None:
        raise OptionError("--sensitivity starts from one number of bits for all layers, keys and values; give --bits")
    higher = [bits for bits in BITS if bits > base.bits][:STEPS]
    if base.bits not in BITS or not higher:
        raise OptionError(
            f"--sensitivity cannot raise {base.bits} bits; give bits= (--bits) {' or '.join(map(str, BITS[:-1]))}"
        )
    if force and output is None:
        raise OptionError("force= (--force) has no effect without output= (--output); leave it out, or give both")
    asked = open_task(task, data, samples, None)
    require("eval", *needed_modules(asked))
    source = resolve(target)
    info = source.info("float16")  # bits an element are those of the packed cache in any dtype
    raised = {
        (layer, bits): replace(base, bits_per_layer=f"{layer}:{bits}")
        for layer in range(info.cached_layers)
        for bits in higher
    }
    sizes = [
        CacheLayout(info, entry.resolve(info.cached_layers, info.typical_tokens)).bits_per_element()
        for entry in (base, *raised.values())
    ]
    if budget is None:
        budget = sizes[0] + (higher[0] - base.bits) / 2
    if not sizes[0] <= budget < math.inf:
        raise OptionError(f"budget= (--budget) {budget} is not above the {sizes[0]:.2f} bits per element of the base")
    plan = make_plan(
        target, asked, [base, *raised.values()], device=device, dtype=dtype, batch=batch,
        max_new_tokens=max_new_tokens, generate=False,
    )  # fmt: skip
    with Records(output, plan.fingerprint, force=force) as records:
        run(plan, records, progress)
        found = [records.of(setting.name, asked.count) for setting in plan.settings[1:]]
    divergences = [mean_divergence(entry) or 0.0 for entry in found]
    steps = [
        Step(layer, bits, kl, divergences[0] - kl, size - sizes[0])
        for (layer, bits), kl, size in zip(raised, divergences[1:], sizes[1:], strict=True)
    ]
    chosen = choose(steps, base.bits, budget - sizes[0])
    added = {(step.layer, step.bits): step.added for step in steps}
    return Sensitivity(
        target=plan.target,
        device=plan.device,
        dtype=plan.dtype,
        task=asked.name,
        samples=asked.count,
        base=plan.settings[1].name,
        bits=base.bits,
        kl=divergences[0],
        bits_per_element=sizes[0],
        steps=steps,
        budget=budget,
        bits_per_layer=write_bits_per_layer(chosen),
        chosen_bits_per_element=sizes[0] + sum(added[entry] for entry in chosen.items()),
    )


def choose(steps: Sequence[Step], bits: int, budget: float) -> dict[int, int]:
    """Layers to raise, and to what bits, for at most ``budget`` more bits per element.

    Greedy: again and again the step with the largest gain per added bit that still fits, where a layer may be raised
    twice; gains are taken to add up.
    """
    known = {(step.layer, step.bits): (step.gain, step.added) for step in steps}
    chosen: dict[int, int] = {}
    while True:
        best: tuple[float, int, int, float] | None = None
        for (layer, target), (gain, added) in known.items():
            if target <= chosen.get(layer, bits):
                continue
            before = known.get((layer, chosen.get(layer, bits)), (0.0, 0.0))
            more, cost = gain - before[0], added - before[1]
            if more > 0 and cost <= budget + 1e-9 and (best is None or more / cost > best[0]):
                best = more / cost, layer, target, cost
        if best is None:
            return chosen
        _, layer, target, cost = best
        chosen[layer] = target
        budget -= cost


def write_bits_per_layer(chosen: Mapping[int, int]) -> str | None:
    """``{0: 2, 1: 2, 3: 4}`` as ``"0-1:2,3:4"``; None if it is empty."""
    parts = []
    layers = sorted(chosen)
    for (_, bits), group in groupby(enumerate(layers), key=lambda entry: (entry[1] - entry[0], chosen[entry[1]])):
        first, *others = [layer for _, layer in group]
        parts.append(f"{first}-{others[-1]}:{bits}" if others else f"{first}:{bits}")
    return ",".join(parts) or None
