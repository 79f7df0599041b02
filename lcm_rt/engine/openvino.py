"""The networks of one model through OpenVINO, on CPUs: converted once, kept on disk, bfloat16 where the CPU has it.

On the embedded model it takes a third to a quarter of the eager networks' time, and is ahead of inductor's code even
where that has the machine to itself (benchmarks/README.md); it needs no C++ compiler and makes one program for every
size and batch. Accuracy: float32 arithmetic is the eager networks' to 1e-5; bfloat16's pictures differ by less than the
JPEG does.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from lcm_rt.engine.models import Model
from lcm_rt.engine.networks import Distribution, Eager

logger = logging.getLogger(__name__)

FORMAT = 3  # of the files in the cache: counted up when what is converted changes


SMALL_BYTES = 64 * 2**20
"""Of a network that is compiled once for each number of rows, and each time holds its weights anew."""

FIXED_ROWS = 8


def is_installed() -> bool:
    """Whether the extra ``openvino`` is there."""
    from importlib.util import find_spec

    return find_spec("openvino") is not None


class OpenVino:
    """``Networks`` of ``model``.

    Args:
        folder: where converted networks are kept, each under a name of its own; None converts them anew.
        fingerprint: of the weights that the model was loaded from.
        threads: None leaves their number to OpenVINO.
        precise: compute in float32 whatever the CPU can.
        report: told how much is done, 0 to 1.
    """

    def __init__(
        self,
        model: Model,
        folder: Path | None,
        fingerprint: str,
        *,
        threads: int | None = None,
        precise: bool = False,
        report: Callable[[float], None] = lambda _: None,
    ) -> None:
        import openvino

        self._model = model
        # Networks halve and double what they are given; where it cannot be halved so often, they pad, and what was
        # converted is the way without.
        self._multiple = 2 ** (len(model.unet.config.block_out_channels) - 1)
        self._core = openvino.Core()
        has_bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if has_bf16 and not precise else "f32",
        }
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        converting = _Converting(model, folder, fingerprint)
        parts = ["unet", "decoder", "encoder", *(f"reader{i}" for i in range(len(model.readers)))]
        self._requests: dict[tuple[str, tuple[int, ...] | None], Any] = {}  # by part, and the first input's shape
        self._small: dict[str, Any] = {}  # networks of which several programs may be held
        for done, part in enumerate(parts, 1):
            network = converting.get(self._core, part)
            self._requests[part, None] = self._compile(network)
            weights = {"unet": model.unet, "decoder": model.vae}.get(part)
            if weights is not None and sum(p.nbytes for p in weights.parameters()) <= SMALL_BYTES:
                self._small[part] = network
            report(done / len(parts))

    def _compile(self, network: Any) -> Any:
        return self._core.compile_model(network, "CPU", self._options).create_infer_request()

    def fix(self, height: int, width: int) -> None:
        """Compile small networks anew for latents of one size and one to ``FIXED_ROWS`` rows: a fifth faster, or more.

        Large ones would hold their weights too often. Whoever runs them meanwhile takes what there is.
        """
        for rows in range(1, FIXED_ROWS + 1):
            for part, network in self._small.items():
                if part == "unet" or rows == 1:  # pictures are decoded one by one
                    fixed = network.clone()
                    shapes = [(rows, *list(port.partial_shape)[1:]) for port in fixed.inputs]
                    shapes[0] = (rows, int(shapes[0][1].get_length()), height, width)
                    fixed.reshape(
                        {port.get_any_name(): shape for port, shape in zip(fixed.inputs, shapes, strict=True)}
                    )
                    self._requests[part, tuple(shapes[0])] = self._compile(fixed)

    def takes(self, height: int, width: int) -> bool:
        return bool(height % self._multiple == 0 and width % self._multiple == 0)

    def predict(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        embedding: Tensor | None,
        pooled: Tensor | None,
        size_ids: Tensor | None,
    ) -> Tensor:
        time = self._model.unet.time_proj(timesteps)
        sizes = None if size_ids is None else self._model.unet.add_time_proj(size_ids.flatten()).reshape(len(x), -1)
        (output,) = self._run("unet", [x, time, context, embedding, pooled, sizes])
        return output

    def decode(self, latents: Tensor) -> Tensor:
        (pictures,) = self._run("decoder", [latents])
        return pictures

    def encode(self, pictures: Tensor) -> Distribution:
        mean, *deviation = self._run("encoder", [pictures])
        return Distribution(mean, deviation[0] if deviation else None)

    def read(self, number: int, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        context, *pooled = self._run(f"reader{number}", [ids])
        return context.clone(), pooled[0].clone() if pooled else None  # they are kept

    def _run(self, part: str, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """Its outputs are good until the same part is run again."""
        assert inputs[0] is not None
        request = self._requests.get((part, tuple(inputs[0].shape))) or self._requests[part, None]
        arrays: list[npt.NDArray[Any]] = [tensor.contiguous().numpy() for tensor in inputs if tensor is not None]
        request.infer(arrays, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(request.get_output_tensor(i).data) for i in range(len(request.output_tensors))]


class _Converting:
    """Networks in OpenVINO's own form, from the cache or from torch's."""

    def __init__(self, model: Model, folder: Path | None, fingerprint: str) -> None:
        self._model = model
        self._folder = None
        if folder is not None:
            words = (FORMAT, version("openvino"), version("torch"), version("diffusers"), version("transformers"))
            key = hashlib.sha256(repr((*words, fingerprint)).encode()).hexdigest()[:16]
            self._folder = folder / f"{model.name}-{key}"

    def get(self, core: Any, part: str) -> Any:
        import openvino

        file = None if self._folder is None else self._folder / f"{part}.xml"
        if file is not None and file.is_file():
            try:
                return core.read_model(file)
            except RuntimeError as error:
                logger.warning("%s cannot be read and is made anew: %s", file, error)
        converted = self._convert(part)
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                own = Path(tempfile.mkdtemp(dir=file.parent))
                openvino.save_model(converted, own / file.name, compress_to_fp16=False)
                # The weights first: whoever sees the description finds them.
                os.replace(own / f"{part}.bin", file.with_suffix(".bin"))
                os.replace(own / file.name, file)
                shutil.rmtree(own)
            except OSError as error:
                logger.warning("the converted %s is not kept: %s", part, error)
        return converted

    def _convert(self, part: str) -> Any:
        import openvino

        model = self._model
        c = model.latent_channels
        side = 8 * 2 ** len(model.unet.config.block_out_channels)
        pixels = model.pixels_per_latent
        network: nn.Module
        if part == "unet":
            network = _Unet(model)
            inputs = [
                torch.zeros(2, model.unet.config.in_channels, side, side * 2),
                model.unet.time_proj(torch.zeros(2)),
                torch.zeros(2, model.max_tokens, model.context_width),
            ]
            if model.guidance_dim is not None:
                inputs.append(torch.zeros(2, model.guidance_dim))
            if model.pooled_width is not None:
                inputs += [torch.zeros(2, model.pooled_width), model.unet.add_time_proj(torch.zeros(12)).reshape(2, -1)]
        elif part == "decoder":
            network, inputs = _Decoder(model), [torch.zeros(1, c, side, side * 2)]
        elif part == "encoder":
            network, inputs = _Encoder(model), [torch.zeros(1, 3, side * pixels, side * pixels * 2)]
        else:
            network = _Reader(model, int(part.removeprefix("reader")))
            inputs = [torch.zeros(1, model.max_tokens, dtype=torch.int64)]
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of what tracing takes for constant: the sizes that ``takes`` lets through
            return openvino.convert_model(
                network.eval(),
                example_input=tuple(inputs),
                input=[(openvino.PartialShape(_open(tensor)), _type(tensor)) for tensor in inputs],
            )


def _open(tensor: Tensor) -> list[int]:
    """Its shape, with any number of rows, and for pictures of any size."""
    return [-1, tensor.shape[1], -1, -1] if tensor.ndim == 4 else [-1, *tensor.shape[1:]]


def _type(tensor: Tensor) -> Any:
    import openvino

    return openvino.Type.i64 if tensor.dtype == torch.int64 else openvino.Type.f32


class _Given(nn.Module):
    """Gives what it was told, whatever it is asked."""

    value: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.value


class _Unet(nn.Module):
    """The UNet with only those inputs that it has, and the sinusoids of times and sizes among them.

    The angles go up to a thousand, where bfloat16 knows no fractions.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        # A twin with the same weights: others run the UNet itself meanwhile.
        unet = copy.copy(model.unet)
        unet._modules = dict(model.unet._modules)
        self._time = unet.time_proj = _Given()
        self._sizes = unet.add_time_proj = _Given()
        self._network = unet  # so that its weights are found
        self._eager = Eager(replace(model, unet=unet))
        self._has_embedding = model.guidance_dim is not None

    def forward(self, x: Tensor, time: Tensor, context: Tensor, *others: Tensor) -> Tensor:
        embedding, rest = (others[0], others[1:]) if self._has_embedding else (None, others)
        pooled, sizes = rest or (None, None)
        self._time.value = time
        if sizes is not None:
            self._sizes.value = sizes
        rows = time[:, 0]  # any tensors of these lengths
        return self._eager.predict(x, rows, context, embedding, pooled, None if pooled is None else pooled[:, :6])


class _Decoder(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self._network = model.vae
        self._eager = Eager(model)

    def forward(self, latents: Tensor) -> Tensor:
        return self._eager.decode(latents)


class _Encoder(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self._network = model.vae
        self._eager = Eager(model)

    def forward(self, pictures: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mean, deviation = self._eager.encode(pictures)
        return mean if deviation is None else (mean, deviation)


class _Reader(nn.Module):
    def __init__(self, model: Model, number: int) -> None:
        super().__init__()
        self._network = model.readers[number][1]
        self._eager = Eager(model)
        self._number = number

    def forward(self, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        context, pooled = self._eager.read(self._number, ids)
        return context if pooled is None else (context, pooled)
