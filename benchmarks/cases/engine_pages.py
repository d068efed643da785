"""Do engines choose the tokens that onnxruntime chooses? On pages of digits, a conversation of two turns each.

    python -m benchmarks.cases.engine_pages prepare DIRECTORY BUNDLE...   the pages, and what onnxruntime answers
    python -m benchmarks.cases.engine_pages run DIRECTORY BUNDLE          the engines of a bundle against that

    ... run --backend onnxruntime --nudge                           onnxruntime against itself, pixels off by rounding

A conversation is a prompt with a page, 64 decode steps, a second prompt with the next page, and 16 more steps; answers
go on after the end of a sequence. ``prepare`` needs what exports need; ``run`` needs numpy, cuda-python and TensorRT
only, and may be on another machine. Where a token differs, the two likeliest logits of onnxruntime tell how near to a
tie the choice was; what follows in that conversation is not compared. ``--nudge`` moves each pixel by up to half an
FP16 step, to tell what rounding alone does.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vkvx.errors import VkvxError
from vkvx.manifest import Manifest
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.backends.registry import open_backend
from vkvx.runtime.sessions.generation import Request
from vkvx.runtime.sessions.processor import Prepared, Processor
from vkvx.runtime.sessions.sampling import GenerationOptions
from vkvx.runtime.sessions.scheduler import run as run_requests

PAGES = "pages.npz"
STEPS = (64, 16)
"""Decode steps of each turn."""
BATCH = 16
LEVELS = 3
"""Bits that a colour of a page keeps: the noise of the pages would take 40 MB."""
SECOND = "Read row 1 of the second page."


class Observed:
    """A backend that notes how near to a tie each choice of a slot was, and the range of the logits.

    For that logits come to the host, which chooses the tokens.
    """

    samples = False

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.margins: dict[int, list[float]] = {}
        self.ranges: dict[int, list[float]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def step(self, call: Any, visual_embeds: Any) -> np.ndarray:
        logits = self._backend.step(call, visual_embeds)
        image = self._backend.manifest.model.image_token_id
        for slot, row in zip(call.slot.tolist(), logits, strict=True):
            likely = np.sort(np.delete(row, image))
            self.margins.setdefault(slot, []).append(float(likely[-1] - likely[-2]))
            self.ranges.setdefault(slot, []).append(float(likely[-1] - likely[0]))
        return logits


class Silent:
    """In place of a processor where nobody reads the answers."""

    def __init__(self, manifest: Manifest) -> None:
        self.placeholder_ids = (manifest.model.image_token_id,)

    @staticmethod
    def decode(token_ids: Sequence[int]) -> str:
        return ""


def converse(backend: Backend, turns: Sequence[Sequence[Prepared]]) -> dict[str, np.ndarray]:
    """Run conversations, ``BATCH`` at a time: ``tokens`` [conversations, steps], and ``margins``, ``ranges`` alike."""
    found: dict[str, list[list[Any]]] = {"tokens": [], "margins": [], "ranges": []}
    for first in range(0, len(turns), BATCH):
        observed, batch = Observed(backend), turns[first : first + BATCH]
        slots = [backend.cache.acquire() for _ in batch]
        histories: list[list[int]] = [[] for _ in batch]
        answers: list[list[int]] = [[] for _ in batch]
        for number, steps in enumerate(STEPS):
            options = GenerationOptions(max_new_tokens=steps + 1, ignore_eos=True)
            requests = [
                Request(row, turn[number], options, Silent(backend.manifest), observed, slot=slot, history=history)
                for row, (turn, slot, history) in enumerate(zip(batch, slots, histories, strict=True))
            ]
            for request in requests:
                request.check()
            for chunk in run_requests(observed, requests):
                answers[chunk.row] += chunk.token_ids
        found["tokens"] += answers
        for name in ("margins", "ranges"):
            found[name] += [getattr(observed, name)[slot] for slot in slots]
        for slot in slots:
            backend.cache.release(slot)
    return {name: np.array(rows) for name, rows in found.items()}


def open_for(bundle: Path, backend: str, **options: Any) -> Backend:
    """A backend with room for ``BATCH`` conversations."""
    manifest = Manifest.load(bundle)
    size, tokens = manifest.quantization.group_size, manifest.model.usual_tokens
    visual = 2 * (-(-tokens // size) * size if manifest.layout.is_packed else tokens)
    return open_backend(backend, bundle, manifest, slots=BATCH, visual_tokens=visual, text_tokens=192, **options)


def prepare(directory: Path, bundles: Sequence[Path], pages: int) -> None:
    """Write the pages as prompts and pixels, and onnxruntime's answers for each bundle."""
    from PIL import ImageOps

    from vkvx.evaluation.tasks import open_task, prompt_of
    from vkvx.runtime.sessions.pictures import load_picture

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PAGES
    if not path.exists():
        processor = Processor.of_bundle(bundles[0], Manifest.load(bundles[0]))
        task = open_task("digits", None, pages, None)
        arrays: dict[str, np.ndarray] = {}
        for sample in task.samples(range(task.count)):
            pictures = [ImageOps.posterize(load_picture(one), LEVELS) for one in sample.pictures]
            prepared = processor.prepare(prompt_of(sample, processor), pictures)
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SECOND}]}
            asked = processor.prepare(processor.format([message]), pictures, first=False)
            arrays |= {f"first.{sample.index}": prepared.token_ids, f"second.{sample.index}": asked.token_ids}
            for name, values in prepared.vision_calls[0].items():
                # There are few different values: they and their numbers compress well.
                known, numbers = np.unique(values, return_inverse=True)
                kind = np.min_scalar_type(len(known))
                arrays |= {
                    f"known.{name}.{sample.index}": known,
                    f"numbers.{name}.{sample.index}": numbers.reshape(values.shape).astype(kind),
                }
        np.savez_compressed(path, **arrays)
    turns = list(read_pages(path, Manifest.load(bundles[0])))
    for bundle in bundles:
        begun = time.perf_counter()
        found = converse(open_for(bundle, "onnxruntime", provider="cpu"), turns)
        np.savez_compressed(directory / f"{bundle.name}.npz", **found)
        print(f"{bundle.name}: {len(turns)} conversations in {time.perf_counter() - begun:.0f} s", flush=True)


def read_pages(path: Path, manifest: Manifest, nudge: bool = False) -> Iterator[list[Prepared]]:
    """The two turns of each conversation; the second has the next page's picture.

    With `nudge` pixels are off by up to 2^-11 of themselves, half the distance of FP16 numbers, the same each time.
    """
    tokens = manifest.model.usual_tokens
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    count = sum(name.startswith("first.") for name in arrays)
    names = [tensor.name for tensor in manifest.graphs["vision"].inputs]
    pixels = [
        {name: arrays[f"known.{name}.{page}"][arrays[f"numbers.{name}.{page}"]] for name in names}
        for page in range(count)
    ]
    if nudge:
        rng = np.random.default_rng(0)
        for page_pixels in pixels:
            for name, x in page_pixels.items():
                if np.issubdtype(x.dtype, np.floating):
                    page_pixels[name] = (x * (1 + rng.uniform(-1, 1, x.shape) * 2.0**-11)).astype(x.dtype)
    for page in range(count):
        yield [
            Prepared(arrays[f"first.{page}"], (pixels[page],), (tokens,)),
            Prepared(arrays[f"second.{page}"], (pixels[(page + 1) % count],), (tokens,)),
        ]


def run(directory: Path, bundle: Path, backend: str, nudge: bool = False) -> Iterator[dict[str, Any]]:
    """The engines of a bundle against what onnxruntime answered; then what is known of their memory and graphs."""
    begun = time.perf_counter()
    opened = open_for(bundle, backend)
    loaded = time.perf_counter()
    turns = list(read_pages(directory / PAGES, opened.manifest, nudge))
    started = time.perf_counter()
    actual = converse(opened, turns)
    seconds = time.perf_counter() - started
    with np.load(directory / f"{bundle.name}.npz") as file:
        expected = {name: file[name] for name in file.files}
    yield {
        "bundle": bundle.name,
        "backend": opened.name,
        "golden": getattr(opened, "golden", None),
        "load_seconds": round(loaded - begun, 3),
        "conversations": len(turns),
        "seconds": round(seconds, 2),
        **compare(actual, expected),
    }
    yield engine_facts(opened)


def compare(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """Equal conversations, and for each other one where it parts and by what margin onnxruntime chose there."""
    ours, theirs = actual["tokens"], expected["tokens"]
    parted = []
    for page in np.flatnonzero((ours != theirs).any(axis=1)).tolist():
        step = int(np.flatnonzero(ours[page] != theirs[page])[0])
        turn = 0 if step <= STEPS[0] else 1
        parted.append(
            {
                "page": page,
                "turn": turn + 1,
                "step": step - turn * (STEPS[0] + 1),
                "after_end": bool((theirs[page, turn * (STEPS[0] + 1) : step] == 2).any()),
                "margin": round(float(expected["margins"][page, step]), 5),
                "margin_here": round(float(actual["margins"][page, step]), 5),
                "range": round(float(expected["ranges"][page, step]), 3),
            }
        )
    same = ours == theirs
    return {
        "equal": len(ours) - len(parted),
        "equal_first_turn": int(same[:, : STEPS[0] + 1].all(axis=1).sum()),
        "equal_tokens": int(same.sum()),
        "tokens": int(same.size),
        "parted": parted,
    }


def engine_facts(opened: Any) -> dict[str, Any]:
    """Addresses of caches, and what the captured decode steps hold, of a backend that runs engines."""
    if not hasattr(opened, "graphs"):
        return {}
    addresses, aliases = opened.addresses, opened.engines.manifest.aliases
    return {
        "aliases_at_one_address": sum(addresses[present] == addresses[past] for present, past in aliases.items()),
        "aliases": len(aliases),
        "captured_rows": sorted(opened.graphs),
        "graph_copies": {rows: copies(opened, graph) for rows, graph in sorted(opened.graphs.items())},
        "cache_bytes": opened.cache.allocated_bytes,
        "smallest_cache_tensor": min(array.nbytes for array in opened.cache.buffers.values() if array.nbytes),
        "reformats": reformats(opened),
    }


def copies(opened: Any, graph: Any) -> dict[str, int]:
    """How many nodes of a captured graph there are, how many copy, and how many of these read or write a cache."""
    cuda, check = opened.gpu.cuda, opened.gpu.check
    caches = [(array.address, array.address + array.nbytes) for array in opened.cache.buffers.values()]
    total = cuda.cudaGraphGetNodes(graph.handle, 0)[2]
    nodes = cuda.cudaGraphGetNodes(graph.handle, total)[1]
    found: dict[str, int] = {"nodes": int(total), "copies": 0, "copies_of_caches": 0, "largest_copy": 0}
    for node in nodes[: int(total)]:
        if check(cuda.cudaGraphNodeGetType(node), "a node") == cuda.cudaGraphNodeType.cudaGraphNodeTypeMemcpy:
            copy = check(cuda.cudaGraphMemcpyNodeGetParams(node), "a copy")
            ends = (int(copy.srcPtr.ptr), int(copy.dstPtr.ptr))
            found["copies"] += 1
            found["copies_of_caches"] += any(first <= end < last for first, last in caches for end in ends)
            found["largest_copy"] = max(
                found["largest_copy"], copy.extent.width * copy.extent.height * copy.extent.depth
            )
    return found


def reformats(opened: Any) -> list[str]:
    """Layers of the decoder engine that copy or reformat a cache, by TensorRT's own list of layers."""
    inspector = opened.engines.decoder.create_engine_inspector()
    kind = opened.engines.library.module.LayerInformationFormat.ONELINE
    lines = inspector.get_engine_information(kind).splitlines()
    return sorted(
        {line.strip()[:160] for line in lines if "reformat" in line.lower() and ("past." in line or "present." in line)}
    )


def main(argv: list[str]) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.engine_pages", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("prepare", "run"):
        verb = verbs.add_parser(name)
        verb.add_argument("directory", type=Path)
        verb.add_argument("bundle", type=Path, nargs="+" if name == "prepare" else 1)
    verbs.choices["prepare"].add_argument("--pages", type=int, default=200)
    verbs.choices["run"].add_argument("--backend", default="tensorrt")
    verbs.choices["run"].add_argument("--nudge", action="store_true", help="move pixels by up to half an FP16 step")
    arguments = parser.parse_args(argv)
    try:
        if arguments.verb == "prepare":
            prepare(arguments.directory, arguments.bundle, arguments.pages)
            return
        for found in run(arguments.directory, arguments.bundle[0], arguments.backend, arguments.nudge):
            print(json.dumps(found), flush=True)
    except (VkvxError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    faulthandler.enable()  # libraries of the GPU may end the process
    main(sys.argv[1:])
