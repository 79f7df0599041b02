"""The composition root: settings in, an ASGI application out; the route table is one list."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

from lcm_rt import catalog
from lcm_rt.auth import Auth
from lcm_rt.egress import Egress
from lcm_rt.errors import LcmError
from lcm_rt.files import Files
from lcm_rt.jobs import Jobs
from lcm_rt.loras import Loras
from lcm_rt.metrics import Metrics
from lcm_rt.queue import Queue
from lcm_rt.server import docs, health, jwks, kit, models, openai, queue, replies, run, storage, tokens
from lcm_rt.server.addressing import Addressing
from lcm_rt.server.description import Description
from lcm_rt.server.guard import Handler, Need, guarded
from lcm_rt.server.oneshot import Oneshot
from lcm_rt.server.realtime import Limits, Realtime
from lcm_rt.service import Service
from lcm_rt.settings import Settings
from lcm_rt.store import Store
from lcm_rt.webhooks import Webhooks
from lcm_rt.workers import Workers

_PACKAGE = Path(__file__).parents[1]
# A checkout has the page beside the package, an installation inside it.
WEB_DIR = next((path for path in (_PACKAGE / "web", _PACKAGE.parent / "web") if (path / "index.html").is_file()), None)


RESTART_S = 1.0

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A row of the route table. ``by_token``: a page's token in the query does instead of a key. ``private``: see
    ``guarded``.
    """

    methods: str
    path: str
    handler: Handler
    need: Need
    by_token: bool = False
    private: bool = False


ROUTES = [
    Entry("GET", "/health", health.health, "open"),
    Entry("GET", "/health/ready", health.ready, "open"),
    Entry("GET", "/health/live", health.live, "open"),
    Entry("GET", "/metrics", health.metrics, "admin"),
    Entry("GET", "/models", models.models, "open"),
    Entry("GET", "/models/events", models.model_events, "open"),
    Entry("POST", "/models/{name}/load", models.load_model, "admin"),
    Entry("POST", "/models/{name}/unload", models.unload_model, "admin"),
    *(Entry("GET", path, kit.file, "open") for path in kit.FILES),
    *(
        Entry("POST", path, tokens.create_token, "generate")
        for path in ("/rest/tokens/", "/rest/tokens", "/tokens/", "/tokens")
    ),
    Entry("GET", "/.well-known/jwks.json", jwks.jwks, "open"),
    Entry("GET", "/rest/.well-known/jwks.json", jwks.jwks, "open"),
    Entry("GET", "/webhooks/secret", jwks.secret, "generate", private=True),
    Entry("POST", "/rest/storage/upload/initiate", storage.initiate, "generate"),
    Entry("POST", "/rest/storage/upload/initiate-multipart", storage.initiate, "generate"),
    Entry("POST", "/rest/storage/auth/token", storage.create_token, "generate"),
    # On the platform's host of files they are without a prefix; with prefixes, an upload's address has none either.
    *(
        Entry(methods, prefix + path, handler, "signed")
        for prefix in ("/cdn", "")
        for methods, path, handler in (
            ("POST", "/upload/{name}/complete", storage.complete),
            ("PUT", "/upload/{name}/{number}", storage.put_part),
            ("PUT", "/upload/{name}", storage.put),
            ("POST", "/files/upload", storage.upload),
            ("POST", "/files/upload/multipart", storage.upload_parts),
            ("POST", "/files/{name}/multipart/{upload}/complete", storage.upload_complete),
            ("PUT", "/files/{name}/multipart/{upload}/{number}", storage.upload_part),
        )
    ),
    Entry("GET", "/cdn/files/{name}", storage.read, "open"),
    Entry("GET", "/files/{name}", storage.read, "open"),
    *(
        Entry(methods, f"/queue/{{app:path}}/requests/{{id}}{path}{slash}", handler, "generate", by_token)
        for slash in ("", "/")
        for methods, path, handler, by_token in (
            ("GET", "/status/stream", queue.status_stream, True),
            ("GET", "/status", queue.status, False),
            ("PUT POST", "/cancel", queue.cancel, False),
            ("GET", "", queue.result, False),
        )
    ),
    Entry("POST", "/queue/{app:path}", queue.submit, "generate"),
    Entry("POST", "/v1/images/generations", openai.generations, "generate"),
    Entry("POST", "/v1/images/edits", openai.edits, "generate"),
    Entry("GET", "/v1/models", openai.models, "generate"),
    Entry("GET", "/v1/models/{name}", openai.model, "generate"),
    Entry("GET", "/openapi.json", docs.openapi_json, "open"),
    Entry("GET", "/asyncapi.json", docs.asyncapi_json, "open"),
    Entry("GET", "/docs", docs.docs, "open"),
    # A path that ends in /stream is a stream, whatever the client accepts; POST on any other path is a run.
    Entry("POST", "/run/{app:path}/stream", run.stream, "generate", by_token=True),
    Entry("GET POST", "/run/{app:path}", run.run, "generate"),
    Entry("GET", "/fal-ai/{app:path}", run.run, "generate"),
    Entry("POST", "/{app:path}/stream", run.stream, "generate", by_token=True),
    Entry("POST", "/{app:path}", run.run, "generate"),
]
"""Every HTTP route, in the order in which they are tried; what is in none of them is a file of the page, or nothing."""


def create_service(settings: Settings, store: Store) -> Service:
    """Everything below HTTP that ``settings`` ask for, not yet started. Raises: NotFound: an unknown model."""
    metrics = Metrics()
    workers = Workers(
        [catalog.resolve(name) for name in settings.models],
        device=settings.device,
        backend=settings.backend,
        cache_dir=settings.cache_dir,
        threads=settings.threads,
        choice=catalog.Choice(vae=settings.vae, safety=settings.safety, controlnet=settings.controlnet),
        memory_mb=settings.memory_mb,
        max_rows=settings.max_rows,
        max_pending=settings.max_pending,
        hang_timeout_s=settings.hang_timeout_s,
        metrics=metrics,
    )
    egress = Egress(fetch_private=settings.fetch_private)
    files = Files(
        store,
        settings.storage_url or settings.data_dir / "files",
        ttl_s=settings.file_ttl_s,
        limit_bytes=settings.file_limit_mb * 2**20,
        upload_ttl_s=settings.upload_ttl_s,
        upload_limit_bytes=settings.upload_limit_mb * 2**20,
        upload_quota_bytes=settings.upload_quota_mb * 2**20,
        metrics=metrics,
        egress=egress,
    )
    loras = Loras(
        settings.data_dir / "loras",
        files=files,
        egress=egress,
        limit_bytes=settings.lora_limit_mb * 2**20,
        hub=settings.hub_url if settings.lora_hub else None,
    )
    return Service(
        workers,
        files,
        loras,
        metrics,
        max_side=settings.max_side,
        repeat_bytes=settings.repeat_mb * 2**20,
    )


def known_hosts(settings: Settings) -> frozenset[str] | None:
    """The names by which an open server on its machine's own address may be called; None is any.

    A page elsewhere can have its name point at this machine, and would then be of our own origin.
    """
    return frozenset(settings.hosts) if settings.is_open and settings.is_loopback else None


class Part(Protocol):
    """What works in the background until it is cancelled."""

    async def run(self) -> None: ...


async def _keep(part: Part) -> None:
    """Run a part of the server; a fault that nobody foresaw ends neither it nor the others."""
    while True:
        try:
            return await part.run()
        except Exception:
            logger.exception("%s has ended; it is started again", type(part).__name__)
            await asyncio.sleep(RESTART_S)


def create_store(settings: Settings) -> Store:
    """The store that ``settings`` name, not yet opened."""
    return Store(settings.database_url or f"sqlite:///{settings.data_dir / 'lcm-rt.db'}")


def create_app(settings: Settings) -> Starlette:
    """A whole server, which begins to work in its lifespan; its parts are in ``app.state``."""
    store = create_store(settings)
    service = create_service(settings, store)
    auth = Auth(store, is_open=settings.is_open)
    webhooks = Webhooks(store, Egress(fetch_private=settings.webhook_private), metrics=service.metrics)
    jobs = Jobs(
        store,
        deliver=webhooks.enqueue,
        max_jobs=settings.max_jobs,
        max_jobs_per_owner=settings.max_jobs_per_owner,
        result_ttl_s=settings.result_ttl_s,
    )
    name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    runner = Queue(jobs, service, webhooks, server=name, running_jobs=settings.running_jobs)
    limits = Limits(settings.max_sessions, settings.idle_timeout_s, settings.send_timeout_s)
    realtime = Realtime(service, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with store:
            await auth.start()
            await webhooks.start()
            async with asyncio.TaskGroup() as tasks:
                parts = (service.workers, service.files, webhooks, runner)
                running = [tasks.create_task(_keep(part)) for part in parts]
                yield
                for task in running:
                    task.cancel()

    routes: list[Route | WebSocketRoute | Mount] = [
        Route(
            entry.path,
            guarded(entry.handler, entry.need, by_token=entry.by_token, private=entry.private),
            methods=entry.methods.split(),
        )
        for entry in ROUTES
    ]
    routes += [
        WebSocketRoute("/ws/{app:path}", Oneshot(service, realtime, limits).serve),
        WebSocketRoute("/{path:path}", realtime.serve),
    ]
    if WEB_DIR:
        mimetypes.init()  # reads files, which the loop would wait for at the first request
        routes.append(Mount("/", StaticFiles(directory=WEB_DIR, html=True)))
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=["*"],
                allow_methods=["GET", "POST", "PUT"],
                allow_headers=["*"],
                expose_headers=[
                    "accept-ranges",
                    "content-disposition",
                    "content-range",
                    "etag",
                    "retry-after",
                    "x-fal-error-type",
                    "x-fal-request-id",
                    "x-fal-request-timeout-type",
                ],
            ),
            Middleware(Addressing, known=known_hosts(settings)),
        ],
        exception_handlers={
            LcmError: openai.in_dialect(replies.on_error),
            HTTPException: openai.in_dialect(replies.on_refusal),
            ClientDisconnect: replies.on_leave,
            Exception: openai.in_dialect(replies.on_crash),
        },
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.store = store
    app.state.ending = asyncio.Event()  # what is under way is given up
    app.state.bodies = replies.Bodies()
    app.state.service = service
    app.state.files = service.files
    app.state.auth = auth
    app.state.jobs = jobs
    app.state.queue = runner
    app.state.webhooks = webhooks
    app.state.realtime = realtime
    app.state.web = WEB_DIR
    app.state.description = Description(ROUTES)
    return app
