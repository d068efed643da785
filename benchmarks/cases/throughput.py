"""Tokens a second at the largest batch of a memory budget, and a server's waiting times: sessions and transformers.

Random weights in the shapes of known models; requests with pictures, 64 tokens of text and an answer of 266. A budget
holds all memory of the process, and torch's allocator enforces it. The largest batch follows from the bytes of a row
and what one row was seen to take besides; it is confirmed by running it. Ours runs through ``Session``: a prompt goes
through the vision tower and the decoder, the other rows are copies of its slot (with ``--fill prompts`` prompts of
their own). Results are kept after each cell; what is there is not measured again unless the code has changed.

Checked beside: logits of transformers and of ours against FP32, in a model of few layers; and that tokens of steps
through a session are the largest of the backend's eager logits, up to what captured logits differ from them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import arrivals, batches, gpu, memory
from benchmarks.lib.dense import DYNAMIC, RIVALS
from benchmarks.lib.serving import WAYS, Model, Setting, Workload
from vkvx.errors import CapacityError, InputError, OptionError
from vkvx.plugins import build
from vkvx.runtime.sessions.pieces import check_prefill_chunk

WORKLOADS = {
    "llava-1.5-7b": Workload("llava-1.5-7b", 4, 576),
    "internvl2.5-8b": Workload("internvl2.5-8b", 1, 3328),
    "qwen2.5-vl-7b": Workload("qwen2.5-vl-7b", 8, 1024),
    "qwen3-vl-2b": Workload("qwen3-vl-2b", 1, 1024),
}
OURS = ("16", "4", "2", "1", "4/8", "2/8", "1/8")
PARTS = ("batch", "arrivals")
LIVE, SLOTS, LONG_ANSWER = 32, 40, 2048
"""Rows that decode while prompts arrive, slots of that server, and room for the answers of those rows."""
ANSWER, DISTURBING, EVERY = 64, 10, 0.5
"""Tokens of an answer to a request that arrives; prompts that arrive beside the live rows, seconds apart."""
CHECK_LAYERS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["batch"], help="what is measured")
    parser.add_argument("--shape", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="models")
    parser.add_argument("--budget", nargs="+", type=float, default=[24.0], help="GB, such as 8 16 24 80")
    names = f"any of {', '.join(RIVALS)}, and bits of ours: 1, 1/8 (text rows of 8 bits), 1/8+compile, ..."
    parser.add_argument("--contender", nargs="+", default=[DYNAMIC, *OURS], help=names)
    parser.add_argument("--fill", choices=("copies", "prompts"), default="copies", help="how rows of ours are filled")
    parser.add_argument("--rate", nargs="*", type=float, default=[0.5, 1.0, 2.0, 4.0], help="arrivals a second")
    parser.add_argument("--seconds", type=float, default=8.0, help="of arrivals at each rate")
    parser.add_argument("--prefill-chunk", nargs="+", type=int, default=[0], help="tokens; 0: whole prompts")
    parser.add_argument("--layers", type=int, help="decoder layers in place of a preset's, to try the driver")


def run(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, each time that there is another. Raises DependencyError without a GPU, OptionError."""
    contenders = [name if name in RIVALS else str(Setting.parse(name)) for name in arguments.contender]
    gpu.library()
    rows, code = _earlier(arguments.output), _code()
    for shape in arguments.shape:
        model: Model | None = None
        for key in _cells(arguments, shape, contenders):
            if any(_is(row, **key, code=code) for row in rows):
                continue
            model = model or _model(shape, arguments.layers)
            begun = time.perf_counter()
            measured = _measure(key, model, arguments, rows)
            rows = [row for row in rows if not _is(row, **key)]
            rows.append({**key, "code": code, **measured, "took s": round(time.perf_counter() - begun, 1)})
            print(json.dumps(rows[-1]), flush=True)
            yield rows
        model = None
        memory.free()
    yield rows


def _is(row: dict[str, Any], **key: Any) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def _cells(arguments: argparse.Namespace, shape: str, contenders: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What tells the cells of a shape apart; transformers first, for a backend merges projections of the model."""
    rivals, ours = ([name for name in contenders if (name in RIVALS) == wanted] for wanted in (True, False))
    if "batch" in arguments.part:
        yield {"part": "check", "shape": shape}
        for contender in rivals:
            yield from (_batch(shape, budget, contender) for budget in arguments.budget)
        for contender in ours:
            for budget, chunk in itertools.product(arguments.budget, arguments.prefill_chunk):
                yield _batch(shape, budget, contender, arguments.fill, chunk)
    if "arrivals" in arguments.part:
        for contender in ours:
            for chunk in arguments.prefill_chunk:
                yield {"part": "arrivals", "shape": shape, "contender": contender, "chunk": chunk}


def _batch(shape: str, budget: float, contender: str, fill: str = "", chunk: int = 0) -> dict[str, Any]:
    key = {"part": "batch", "shape": shape, "budget": budget, "contender": contender}
    return {**key, "fill": fill, "chunk": chunk}


def _measure(
    key: dict[str, Any], model: Model, arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    shape, contender = key["shape"], key.get("contender", "")
    if key["part"] == "check":
        return batches.check_logits(_model(shape, CHECK_LAYERS))
    if contender in RIVALS:
        return batches.rival(model, contender, key["budget"])
    setting = Setting.parse(contender)
    try:
        check_prefill_chunk(model.manifest(setting), key["chunk"] or None)
    except OptionError as error:
        return {"note": str(error)}
    if key["part"] == "arrivals":
        return _served(model, setting, key["chunk"], arguments)
    check = next(row for row in rows if _is(row, part="check", shape=shape))
    dense = (row for row in rows if _is(row, **_batch(shape, key["budget"], DYNAMIC)))
    equal, off = next(dense, {}).get("rows"), check["transformers"]
    given = {"fill": key["fill"], "chunk": key["chunk"]}
    return batches.ours(model, setting, key["budget"], **given, equal=equal, off=off, layers=CHECK_LAYERS)


def _served(model: Model, setting: Setting, chunk: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A server with room for long answers, outside of any budget."""
    try:
        session = model.open(setting, SLOTS, LONG_ANSWER, chunk)
    except CapacityError as error:
        return {"note": str(error)}
    try:
        warm_up = arrivals.warm_up(session, SLOTS)
        live = arrivals.interference(session, LIVE, DISTURBING, EVERY)
        rates = [arrivals.poisson(session, rate, arguments.seconds, ANSWER) for rate in arguments.rate]
        return {"warm-up s": round(warm_up, 1), "live": live, "rates": rates}
    finally:
        session.close()


def _model(shape: str, layers: int | None) -> Model:
    import torch

    from benchmarks.cases.decode import random_model

    torch.manual_seed(0)
    return Model(WORKLOADS[shape], random_model(WORKLOADS[shape].preset, layers))


def _earlier(output: Path) -> list[dict[str, Any]]:
    """Results that are there already."""
    if not output.exists():
        return []
    try:
        return [dict(row) for row in json.loads(output.read_text(encoding="utf-8"))["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{output} is no result of this benchmark ({error}); give another file: -o FILE") from error


def _code() -> str:
    """A hash of what is measured: the package's modules, and the built library."""
    root, library = Path(build.__file__).parents[1], build.find_library()
    digest = hashlib.sha256(library.read_bytes() if library else b"")
    for folder in ("models", "plugins", "runtime", "vkvx"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Tables by title: a batch, a trace and a check a row, and what did not run."""
    found = [row for row in rows if row["part"] == "batch" and "rows" in row]
    served = [row for row in rows if row["part"] == "arrivals" and "live" in row]
    made = {
        "Largest batch": [_speed(row, found) for row in found],
        "First tokens, one row, equal batch": [_latency(row) for row in found],
        "Peak memory": [{**_name(row), **{name: row[name] for name in row if name.endswith(" GB")}} for row in found],
        "Prompts that arrive beside live rows": [{**_server(row), **row["live"]} for row in served],
        "Poisson arrivals": [{**_server(row), **rate} for row in served for rate in row["rates"]],
        "Logits against FP32, of their range": [
            {name: row[name] for name in ("shape", "transformers", "eager", "captured")}
            for row in rows
            if row["part"] == "check"
        ],
        "What did not run": [{**_name(row), "why": row["note"]} for row in rows if "note" in row],
    }
    return {title: table for title, table in made.items() if table}


def _name(row: dict[str, Any]) -> dict[str, Any]:
    own = row["contender"] not in RIVALS
    contender = f"vkvx {row['contender']}" if own else row["contender"]
    filled = ", prompts" if row.get("fill") == "prompts" else ""
    chunk = f", chunks of {row['chunk']}" if row.get("chunk") else ""
    return {"shape": row["shape"], "budget GB": row.get("budget"), "contender": contender + filled + chunk}


def _server(row: dict[str, Any]) -> dict[str, Any]:
    return {"shape": row["shape"], "contender": f"vkvx {row['contender']}", "prefill chunk": row["chunk"] or "whole"}


def _speed(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Steps of the largest batch, and how many times as many tokens as others give."""
    line = {**_name(row), "rows": row["rows"]}
    for way in WAYS:
        line |= {f"{way} ms": row.get(f"{way} ms"), f"{way} tokens/s": row.get(f"{way} tokens/s")}
    for title, other in (("x dynamic", DYNAMIC), ("x 16 bits", "16")):
        same = [one for one in rows if _is(one, shape=row["shape"], budget=row["budget"], contender=other)]
        sampled = "sampled tokens/s"
        known = bool(same) and sampled in row
        line[title] = round(row[sampled] / same[0][sampled], 2) if known else None
    return line


def _latency(row: dict[str, Any]) -> dict[str, Any]:
    """What one request waits for, and a batch as large as that of transformers' dynamic cache."""
    names = ("first token ms", "first tokens of all s", "one row ms", "equal rows", "equal step ms", "equal tokens/s")
    return {**_name(row), **{name: row.get(name) for name in names}}
