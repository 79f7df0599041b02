"""The queue by HTTP: submit, status, status stream, result, cancel; in the platform's shapes.

Jobs are addressed by their app's owner and alias, whatever path below the app they were submitted to. Whose job it is
not, to them it does not exist.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from typing import Any

import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from lcm_rt import wire
from lcm_rt.apps import parse_app
from lcm_rt.auth import Principal
from lcm_rt.errors import BadRequest, NotFound
from lcm_rt.jobs import TIMED_OUT, Job, Jobs, Log
from lcm_rt.queue import Queue
from lcm_rt.server.addressing import address_of
from lcm_rt.server.replies import json_response, parse_body, read_body, refuse_while_stopping
from lcm_rt.server.run import LIFECYCLE, STREAM_LINGER_S, start_timeout_of
from lcm_rt.service import Service
from lcm_rt.webhooks import Webhooks

PING_S = 5  # how often a quiet stream says that it is there
MAX_KEY = 255  # characters of an idempotency key
MAX_LIFECYCLE = 8192  # characters of a lifecycle header; what is cut says nothing any more

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


async def submit(request: Request) -> Response:
    """``POST /queue/fal-ai/lcm``: have a job run later. What is wrong with its input is told at once.

    ``fal_webhook`` in the query is told what it comes to. Headers: ``x-fal-queue-priority`` (low, or else normal),
    ``x-fal-request-timeout`` (seconds in which it has to begin), ``x-fal-no-retry`` (1: not after an engine died under
    it), ``x-fal-object-lifecycle-preference`` (how long its files are kept), ``idempotency-key`` (the same within a day
    is the same job).
    """
    request.state.headers = {"x-fal-request-id": secrets.token_hex(16)}
    service: Service = request.app.state.service
    jobs: Jobs = request.app.state.jobs
    queue: Queue = request.app.state.queue
    webhooks: Webhooks = request.app.state.webhooks
    principal: Principal = request.state.principal
    app = _app_of(request)
    app_model = service.model_of_app(app)
    webhook = request.query_params.get("fal_webhook") or None
    if webhook is not None:
        webhooks.check(webhook)
    headers = request.headers
    key = headers.get("idempotency-key") or headers.get("x-fal-idempotency-key") or None
    if key is not None and len(key) > MAX_KEY:
        raise BadRequest(f"an idempotency key has at most {MAX_KEY} characters")
    refuse_while_stopping(request)
    body = await read_body(request)
    wanted = await parse_body(body)
    service.model_of(wanted, app_model)
    service.check(wanted)
    address = address_of(request)
    job = await jobs.accept(
        owner=principal.owner,
        app=app,
        base=address.cdn,
        input=body,
        low=headers.get("x-fal-queue-priority", "").strip().lower() == "low",
        start_within_s=start_timeout_of(request),
        retries=headers.get("x-fal-no-retry", "").strip().lower() not in ("1", "true"),
        webhook=webhook,
        lifecycle=headers.get(LIFECYCLE, "")[:MAX_LIFECYCLE] or None,
        idempotency_key=key,
    )
    queue.wake()
    return json_response(_status(job, address.job(job.app, job.id), None), headers={"x-fal-request-id": job.id})


async def status(request: Request) -> Response:
    """``GET .../requests/{id}/status``: 202 until it is done, then 200; ``logs=1`` tells all of them."""
    job = await request.app.state.jobs.look(**_whose(request))
    logs = job.logs if _wants_logs(request) else None
    return json_response(_status(job, _url(request, job), logs), 200 if job.state == "done" else 202, _headers(request))


async def status_stream(request: Request) -> Response:
    """``GET .../requests/{id}/status/stream``: server-sent events until it is done, each with the logs that are new."""
    queue: Queue = request.app.state.queue
    first: Job = await request.app.state.jobs.look(**_whose(request))
    url, wants_logs = _url(request, first), _wants_logs(request)

    async def events() -> AsyncIterator[ServerSentEvent]:
        job, told = first, 0
        while True:
            logs = job.logs[told:] if wants_logs else None
            yield ServerSentEvent(orjson.dumps(_status(job, url, logs)).decode())
            if job.state == "done":
                break
            told = len(job.logs)
            job = await queue.wait(job)
        await asyncio.sleep(STREAM_LINGER_S)

    return EventSourceResponse(events(), headers=_headers(request), ping=PING_S)


async def result(request: Request) -> Response:
    """``GET .../requests/{id}``: what it came to, with the status that the same request to ``/run`` would have had."""
    outcome = await request.app.state.jobs.result(**_whose(request))
    headers = _headers(request)
    if outcome.error_type is not None:
        headers["x-fal-error-type"] = outcome.error_type
    if outcome.error_type == TIMED_OUT.error_type:
        headers["x-fal-request-timeout-type"] = "user"
    return Response(outcome.body, outcome.status, headers, "application/json")


async def cancel(request: Request) -> Response:
    """``PUT .../requests/{id}/cancel``: what has not begun never will, what has is stopped."""
    try:
        asked = await request.app.state.queue.cancel(**_whose(request))
    except NotFound as error:
        return _refused("NOT_FOUND", error, _headers(request))
    if not asked:
        return _refused("ALREADY_COMPLETED", BadRequest("the request is completed already"), _headers(request))
    return json_response({"status": "CANCELLATION_REQUESTED"}, 202, _headers(request))


def _refused(status: str, error: BadRequest | NotFound, headers: dict[str, str]) -> Response:
    body = {"status": status, **orjson.loads(wire.error_body(error))}
    return json_response(body, error.status, headers)


def _app_of(request: Request) -> str:
    """The app's id, without a path below it. Raises: NotFound."""
    text: str = request.path_params["app"]
    if not text.isprintable() or "requests" in text.split("/"):
        raise NotFound("there is no such app here")
    return parse_app(text).id


def _whose(request: Request) -> dict[str, str]:
    """Which job is asked for, of which app, and by whom. Raises: NotFound."""
    id: str = request.path_params["id"]
    request.state.headers = {"x-fal-request-id": id if _ID.fullmatch(id) else secrets.token_hex(16)}
    if not _ID.fullmatch(id):
        raise NotFound("there is no such request here")
    principal: Principal = request.state.principal
    return {"id": id, "owner": principal.owner, "app": _app_of(request)}


def _headers(request: Request) -> dict[str, str]:
    return dict(request.state.headers)


def _url(request: Request, job: Job) -> str:
    return address_of(request).job(job.app, job.id)


def _wants_logs(request: Request) -> bool:
    return request.query_params.get("logs", "").lower() in ("1", "true")


def _status(job: Job, url: str, logs: list[Log] | None) -> dict[str, Any]:
    """What every client finds its part of: there are three states, and a failed job is a completed one."""
    body: dict[str, Any] = {
        "status": "COMPLETED" if job.state == "done" else "IN_QUEUE" if job.begun_at is None else "IN_PROGRESS",
        "request_id": job.id,
        "gateway_request_id": job.id,
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
        "logs": logs,
    }
    if job.position is not None:
        body["queue_position"] = job.position
    if job.state == "done":
        body["metrics"] = job.metrics or {}
    if job.error is not None:
        body |= {"error": job.error, "error_type": job.error_type}
    return body
