"""Ray Serve around the diffusers pipeline, batching as its documentation says: up to 8 requests, a few ms apart.

python -m benchmarks.peers.ray_server PORT WORK DTYPE
"""

from __future__ import annotations

import signal
import sys

import ray
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.peers.painters import Diffusers
from benchmarks.peers.work import Job, Work, jpeg

MAX_BATCH = 8
WAIT_S = 0.005


@serve.deployment(max_ongoing_requests=64)
class Pictures:
    def __init__(self, work: str, dtype: str) -> None:
        chosen = Work.from_json(work)
        torch.set_num_threads(chosen.threads)
        self._painter = Diffusers(chosen, dtype=dtype)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_S)
    async def paint(self, jobs: list[Job]) -> list[bytes]:
        return [jpeg(image) for image in self._painter.paint(jobs)]

    async def __call__(self, request: Request) -> Response:
        said = await request.json()
        return Response(await self.paint(Job(said["prompt"], said["seed"])), media_type="image/jpeg")


def main() -> None:
    port, work, dtype = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    gpus = 0 if Work.from_json(work).device == "cpu" else 1
    ray.init(include_dashboard=False, num_gpus=gpus)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Pictures.options(ray_actor_options={"num_gpus": gpus}).bind(work, dtype))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    signal.pause()


if __name__ == "__main__":
    main()
