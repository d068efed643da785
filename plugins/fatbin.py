"""Which compute capabilities a compiled library holds code for, read from its file. No CUDA tool is needed.

nvcc puts code into "fat binaries": a header of 16 bytes (magic number, version, its own size, size of what follows)
and entries, each with its kind, the sizes of its header and code, and at byte 28 its compute capability less the dot.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import NamedTuple

_MAGIC = struct.pack("<I", 0xBA55ED50)
_PTX, _CUBIN = 1, 2


class Architectures(NamedTuple):
    """Compute capabilities without the dot, ascending: of machine code, and of PTX, which the driver compiles."""

    cubin: list[int]
    ptx: list[int]

    def serve(self, capability: int) -> bool:
        """Whether a GPU of this compute capability can run the library: code of its family, or PTX no newer."""
        same = (code for code in self.cubin if code // 10 == capability // 10)
        return any(code <= capability for code in (*same, *self.ptx))


def architectures(library: Path) -> Architectures:
    """What the file holds; both lists are empty for a file without CUDA code."""
    data, found = library.read_bytes(), {_PTX: set[int](), _CUBIN: set[int]()}
    for start in (match.start() for match in re.finditer(re.escape(_MAGIC), data)):
        if start + 16 > len(data):
            continue
        header, size = struct.unpack_from("<6xHQ", data, start)
        at, end = start + header, min(start + header + size, len(data))
        while at + 32 <= end:
            kind, entry, code = struct.unpack_from("<H2xIQ", data, at)
            if kind in found:
                found[kind].add(struct.unpack_from("<I", data, at + 28)[0])
            if entry + code == 0:
                break
            at += entry + code
    return Architectures(sorted(found[_CUBIN]), sorted(found[_PTX]))
