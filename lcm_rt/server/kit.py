"""Files that point the platform's own clients at this server; each holds the address that it was fetched from."""

from __future__ import annotations

import asyncio
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

_FOLDER = Path(__file__).parents[1] / "kit"
_DEFAULT = "http://localhost:8000"  # the address that the files have in the repository

FILES = {
    "/fal-local.js": (_FOLDER / "fal-local.js", "text/javascript"),
    # The same file: in some packages, Node takes only the name .cjs for a script.
    "/fal-local.cjs": (_FOLDER / "fal-local.js", "text/javascript"),
    "/fal_local.py": (_FOLDER / "fal_local.py", "text/x-python"),
}
"""By path, where each lies and its content type."""


async def file(request: Request) -> Response:
    """``GET`` of each path in ``FILES``."""
    path, media_type = FILES[request.scope["path"]]
    text = await asyncio.to_thread(path.read_text)
    # Who comes by another name gets other content, which is not for a cache.
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return Response(text.replace(_DEFAULT, str(request.base_url).rstrip("/")), 200, headers, media_type)
