"""The page at ``/``: one file, which loads nothing from elsewhere and may not."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response

_FILE = Path(__file__).with_name("page.html")


@cache
def _contents() -> tuple[bytes, dict[str, str]]:
    """The page, and the headers under which a browser runs its own script and style only."""
    text = _FILE.read_text(encoding="utf-8")
    hashes = {}
    for kind in ("script", "style"):
        (found,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        hashes[kind] = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
    policy = {
        "default-src": "'none'",
        "script-src": f"'sha256-{hashes['script']}'",
        "style-src": f"'sha256-{hashes['style']}'",
        "connect-src": "'self'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return text.encode(), headers


def response() -> Response:
    """The page, as an answer to GET."""
    body, headers = _contents()
    return Response(body, media_type="text/html; charset=utf-8", headers=headers)
