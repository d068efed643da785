"""`python -m vkvx` is the command `vkvx`."""

from __future__ import annotations

from vkvx.cli import entry

if __name__ == "__main__":
    entry()
