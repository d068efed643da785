"""Export the bundled tiny-llava with a 1-bit visual cache, and let it read a page of handwritten digits.

Run by `make demo`; needs vkvx[export,onnxruntime]. Exit code 1: the transcription differs from the page.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from vkvx.models import tiny_llava

PAGES = Path(tiny_llava.__file__).parent / "pages"
BUNDLE = Path("build/tiny-llava-1bit")


def vkvx(*arguments: str) -> str:
    """Run the command line, show it and what it prints, and return its standard output."""
    print(f"\n$ vkvx {shlex.join(arguments)}", flush=True)
    with subprocess.Popen([sys.executable, "-m", "vkvx", *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shown = []
        while piece := process.stdout.read(1):
            shown.append(piece)
            print(piece, end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(shown)


def main() -> int:
    """Export, ask, compare."""
    begun = time.perf_counter()
    print("demo: export and one answer, about half a minute on 2 cores", flush=True)
    page = json.loads((PAGES / "pages.json").read_text(encoding="utf-8"))[0]
    truth = "\n".join("".join(map(str, row)) for row in page["digits"])
    vkvx("export", "tiny-llava", "--bits", "1", "--output", str(BUNDLE), "--force")
    answer = vkvx("run", str(BUNDLE), "Transcribe the page.", "--image", os.path.relpath(PAGES / page["file"])).strip()
    correct = answer == truth
    print(f"\nthe page says     {truth.split()}\nthe answer says   {answer.split()}")
    print(f"{'correct' if correct else 'NOT correct'}, after {time.perf_counter() - begun:.0f} s", flush=True)
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
