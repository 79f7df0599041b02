"""Uploads in each of the platform's ways, and files by URL.

One PUT to a URL that ``initiate`` gave, whose signature is the right to write; the same in parts; or straight to the
file server with a short-lived token, whole or in parts. Bodies go to the storage as they arrive.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lcm_rt import wire
from lcm_rt.auth import Auth, Principal
from lcm_rt.errors import BodyTimeout, Forbidden, InputError, NotFound, Unauthorized
from lcm_rt.files import File, Files, Lifecycle, Upload, lifecycle_of
from lcm_rt.objects import BLOCK
from lcm_rt.server.addressing import address_of
from lcm_rt.server.replies import BODY_TIMEOUT_S, json_response, read_body

TOKEN_S = 3600.0
"""How long a token for the file server is good."""

_MAX_TOLD = 2**16  # bytes of a body that names a file
_MAX_LISTED = 2**21  # bytes of a body that lists parts
_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{1,18})?|-([0-9]{1,18}))", re.ASCII)
_ETAG = re.compile(r'(?:W/)?"?([0-9A-Za-z]+)"?', re.ASCII)
_PICTURES = frozenset(f"image/{kind}" for kind in ("jpeg", "png", "webp", "gif", "avif", "bmp"))
_HARMLESS = {
    "x-content-type-options": "nosniff",
    # What an upload says is not said by this server: no script of it runs in our origin, whatever its type.
    "content-security-policy": "default-src 'none'; sandbox",
    "accept-ranges": "bytes",
}


# ---- a URL to write to -----------------------------------------------------------------------------------------------


async def initiate(request: Request) -> Response:
    """``POST /rest/storage/upload/initiate`` and ``initiate-multipart``: where to put a file, and where it will be."""
    told = wire.decode_json(await read_body(request, _MAX_TOLD))
    if not isinstance(told, dict):
        raise InputError("body", "must be a map", "dict_type")
    principal: Principal = request.state.principal
    upload = await _files(request).begin(
        told.get("content_type"), told.get("file_name"), owner=principal.owner, lifecycle=_lifecycle(request)
    )
    address = address_of(request)
    url = f"{address.cdn}/upload/{upload.name}?signature={upload.secret}"
    return json_response({"upload_url": url, "file_url": address.file(upload.name)})


async def put(request: Request) -> Response:
    """``PUT /upload/{name}?signature=``: the whole file."""
    upload = Upload(request.path_params["name"], request.query_params.get("signature", ""))
    await _write(request, upload)
    return Response()


async def put_part(request: Request) -> Response:
    """``PUT /upload/{name}/{number}?signature=``: a part, from 1 on; its etag as JSON and as a header."""
    return await _write_part(request, Upload(request.path_params["name"], request.query_params.get("signature", "")))


async def complete(request: Request) -> Response:
    """``POST /upload/{name}/complete?signature=`` ``{"parts": [{"partNumber", "etag"}]}``: join them, by number."""
    return await _complete(request, Upload(request.path_params["name"], request.query_params.get("signature", "")))


# ---- the file server -------------------------------------------------------------------------------------------------


async def create_token(request: Request) -> Response:
    """``POST /rest/storage/auth/token``: a token for the file server, and where that is."""
    auth: Auth = request.app.state.auth
    return json_response(
        {
            "token": auth.mint(request.state.principal, "cdn", lifetime_s=TOKEN_S),
            "token_type": "Bearer",
            "base_url": address_of(request).cdn,
            "expires_at": datetime.fromtimestamp(time.time() + TOKEN_S, UTC).isoformat(timespec="seconds"),
        }
    )


async def upload(request: Request) -> Response:
    """``POST /files/upload``: the whole file, with a token or a key."""
    begun = await _begin(request)
    await _write(request, begun)
    return json_response({"access_url": address_of(request).file(begun.name)})


async def upload_parts(request: Request) -> Response:
    """``POST /files/upload/multipart``: where to put the parts of a file, with a token or a key."""
    begun = await _begin(request)
    return json_response({"access_url": address_of(request).file(begun.name), "uploadId": begun.secret})


async def upload_part(request: Request) -> Response:
    """``PUT /files/{name}/multipart/{upload}/{number}``: as ``put_part``, with a token or a key."""
    return await _write_part(request, await _begun(request))


async def upload_complete(request: Request) -> Response:
    """``POST /files/{name}/multipart/{upload}/complete``: as ``complete``, with a token or a key."""
    return await _complete(request, await _begun(request))


async def read(request: Request) -> Response:
    """``GET /files/{name}``: a file, or with ``Range`` one run of its bytes, until it expires."""
    files = _files(request)
    file = await files.open(request.path_params["name"], await _reader(request))
    etag = f'"{file.name}"'  # a file never changes
    headers = {**_HARMLESS, "etag": etag, "content-disposition": _disposition(file)}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    status, start, end = 200, 0, file.size
    if request.headers.get("if-range", etag) == etag and (wanted := _range(request.headers.get("range"), file.size)):
        start, end = wanted
        if start >= end:
            told = f"the file has {file.size} bytes"
            headers["content-range"] = f"bytes */{file.size}"
            return json_response({"detail": told, "message": told}, 416, headers)
        status, headers["content-range"] = 206, f"bytes {start}-{end - 1}/{file.size}"
    headers |= {"content-length": str(end - start), "content-type": file.content_type}
    if request.method == "HEAD":
        return Response(None, status, headers)
    blocks = files.stream(file, start, end)
    first = await anext(blocks, b"")  # before anything is answered, as it may be that there is none
    if end - start <= BLOCK:
        await blocks.aclose()
        return Response(first, status, headers)
    return StreamingResponse(_chained(first, blocks), status, headers)


async def _chained(first: bytes, blocks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(blocks):
        yield first
        async for block in blocks:
            yield block


# ---- what they share -------------------------------------------------------------------------------------------------


def _files(request: Request) -> Files:
    files: Files = request.app.state.files
    return files


async def _principal(request: Request) -> Principal:
    """Who asks, by a token of the file server or by a key. Raises: Unauthorized, Forbidden, Overloaded, Unavailable."""
    auth: Auth = request.app.state.auth
    header = request.headers.get("authorization")
    scheme, _, token = (header or "").strip().partition(" ")
    if scheme.lower() == "bearer" and ":" not in token:  # a key has one
        principal = await auth.principal_of_token(token.strip(), "cdn")
    else:
        principal = await auth.principal_of(header, address=request.client.host if request.client else "")
    if "generate" not in principal.scopes:
        raise Forbidden("this key lacks the scope 'generate'")
    return principal


async def _reader(request: Request) -> str | None:
    try:
        return (await _principal(request)).owner
    except (Unauthorized, Forbidden):  # most files are for whoever knows their names
        return None


async def _begin(request: Request) -> Upload:
    principal = await _principal(request)
    name = request.headers.get("x-fal-file-name", "").encode("latin-1").decode("utf-8", "replace")
    return await _files(request).begin(
        request.headers.get("content-type"), name, owner=principal.owner, lifecycle=_lifecycle(request)
    )


async def _begun(request: Request) -> Upload:
    principal = await _principal(request)
    return Upload(request.path_params["name"], request.path_params["upload"], principal.owner)


def _lifecycle(request: Request) -> Lifecycle:
    headers = request.headers
    return lifecycle_of(headers.get("x-fal-object-lifecycle") or headers.get("x-fal-object-lifecycle-preference"))


async def _write(request: Request, upload: Upload) -> None:
    """Take the whole file."""
    await _files(request).write(upload, _body(request), length=_length(request))


async def _write_part(request: Request, upload: Upload) -> Response:
    number = request.path_params["number"]
    if not re.fullmatch("[0-9]{1,9}", number, re.ASCII):
        raise NotFound("there is no such path")
    md5 = await _files(request).write_part(upload, int(number), _body(request), length=_length(request))
    etag = f'"{md5}"'
    return json_response({"partNumber": int(number), "etag": etag}, headers={"etag": etag})


async def _complete(request: Request, upload: Upload) -> Response:
    try:
        body = orjson.loads(await read_body(request, _MAX_LISTED))
    except orjson.JSONDecodeError:
        raise InputError("body", "is not valid JSON", "json_invalid") from None
    await _files(request).complete(upload, _listed(body))
    return json_response({"access_url": address_of(request).file(upload.name)})


def _listed(body: Any) -> list[tuple[int, str]]:
    """The numbers and MD5s that a client lists. Raises: InputError: names ``parts``."""
    match body:
        case {"parts": [*listed]}:
            return [_part(entry) for entry in listed]
    raise InputError("parts", "must be a list", "missing")


def _part(entry: Any) -> tuple[int, str]:
    match entry:
        case {"partNumber": int(number), "etag": str(etag)} if match := _ETAG.fullmatch(etag.strip()):
            return number, match[1]
    raise InputError("parts", "must have a partNumber and an etag each", "value_error")


def _length(request: Request) -> int | None:
    said = request.headers.get("content-length", "")
    return int(said) if re.fullmatch("[0-9]{1,18}", said, re.ASCII) else None


async def _body(request: Request) -> AsyncGenerator[bytes, None]:
    """What arrives. Raises: BodyTimeout: nothing did, for long; starlette's ClientDisconnect."""
    chunks = request.stream()
    while True:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise BodyTimeout(f"nothing of the body arrived for {BODY_TIMEOUT_S:.0f} s") from None
        yield chunk


def _disposition(file: File) -> str:
    kind = "inline" if file.content_type.partition(";")[0].strip().lower() in _PICTURES else "attachment"
    return f"{kind}; filename*=UTF-8''{quote(file.title or file.name, safe='')}"


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes, from and to before, that a ``Range`` header asks for; an empty run is one that there is not.

    None is the whole file: without the header, and for what is malformed or asks for several runs.
    """
    if not (match := _RANGE.fullmatch(header or "")):
        return None
    first, last, tail = match.groups()
    if tail is not None:
        return max(0, size - int(tail)), size
    if last is not None and int(last) < int(first):
        return None
    return int(first), size if last is None else min(size, int(last) + 1)
