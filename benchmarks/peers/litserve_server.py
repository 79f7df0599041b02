"""LitServe around the diffusers pipeline, batching as its documentation says: up to 8 requests, a few ms apart.

python -m benchmarks.peers.litserve_server PORT WORK DTYPE
"""

import sys
from typing import Any

import litserve
import torch
from starlette.responses import Response

from benchmarks.peers.painters import Diffusers
from benchmarks.peers.work import Job, Work, jpeg

MAX_BATCH = 8
WAIT_S = 0.005


class Api(litserve.LitAPI):
    def __init__(self, work: Work, dtype: str) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=WAIT_S)
        self._work = work
        self._dtype = dtype

    def setup(self, device: Any) -> None:
        torch.set_num_threads(self._work.threads)
        self._painter = Diffusers(self._work, dtype=self._dtype)

    def decode_request(self, request: dict[str, Any]) -> Job:
        return Job(request["prompt"], request["seed"])

    def batch(self, inputs: list[Job]) -> list[Job]:
        return inputs

    def predict(self, inputs: list[Job]) -> list[bytes]:
        return [jpeg(image) for image in self._painter.paint(inputs)]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/jpeg")


def main() -> None:
    port, work, dtype = int(sys.argv[1]), Work.from_json(sys.argv[2]), sys.argv[3]
    server = litserve.LitServer(Api(work, dtype), accelerator=work.device)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
