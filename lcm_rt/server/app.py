"""The composition root: settings in, an ASGI application out; the route table is one list."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

from lcm_rt import catalog
from lcm_rt.egress import Egress
from lcm_rt.errors import LcmError
from lcm_rt.files import Files
from lcm_rt.loras import Loras
from lcm_rt.metrics import Metrics
from lcm_rt.server import http
from lcm_rt.server.realtime import Realtime
from lcm_rt.service import Service
from lcm_rt.settings import Settings
from lcm_rt.workers import Workers

_PACKAGE = Path(__file__).parents[1]
# A checkout has the page beside the package, an installation inside it.
WEB_DIR = next((path for path in (_PACKAGE / "web", _PACKAGE.parent / "web") if (path / "index.html").is_file()), None)


def create_service(settings: Settings) -> Service:
    """Everything below HTTP that ``settings`` ask for, not yet started. Raises: NotFound: an unknown model."""
    metrics = Metrics()
    workers = Workers(
        [catalog.resolve(name) for name in settings.models],
        device=settings.device,
        compile=settings.compile,
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
        settings.data_dir / "files",
        ttl_s=settings.file_ttl_s,
        limit_bytes=settings.file_limit_mb * 2**20,
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
    return Service(workers, files, loras, metrics, max_side=settings.max_side)


def create_app(settings: Settings, service: Service | None = None) -> Starlette:
    """A whole server; ``service`` may be given, to watch its workers from outside."""
    service = service or create_service(settings)
    realtime = Realtime(
        service,
        max_sessions=settings.max_sessions,
        idle_timeout_s=settings.idle_timeout_s,
        send_timeout_s=settings.send_timeout_s,
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(service.workers.run()), tasks.create_task(service.files.run())]
            yield
            for task in running:
                task.cancel()

    routes: list[Route | WebSocketRoute | Mount] = [
        Route("/health", http.health, methods=["GET"]),
        Route("/health/ready", http.ready, methods=["GET"]),
        Route("/health/live", http.live, methods=["GET"]),
        Route("/metrics", http.metrics, methods=["GET"]),
        Route("/models", http.models, methods=["GET"]),
        Route("/models/events", http.model_events, methods=["GET"]),
        Route("/models/{name}/load", http.load_model, methods=["POST"]),
        Route("/models/{name}/unload", http.unload_model, methods=["POST"]),
        Route("/files/{name}", http.file, methods=["GET"], name="file"),
        Route("/run/{app:path}", http.run, methods=["POST"]),
        Route("/{app:path}", http.run, methods=["POST"]),
        WebSocketRoute("/{path:path}", realtime.serve),
    ]
    if WEB_DIR:
        routes.append(Mount("/", StaticFiles(directory=WEB_DIR, html=True)))
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=["*"],
                allow_methods=["GET", "POST", "PUT"],
                allow_headers=["*"],
                expose_headers=["x-fal-request-id", "x-fal-error-type"],
            )
        ],
        exception_handlers={LcmError: http.on_error, HTTPException: http.on_refusal, Exception: http.on_crash},
        lifespan=lifespan,
    )
    app.state.service = service
    return app
