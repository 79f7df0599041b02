"""The command line: ``serve``, ``generate``, ``models``. Imports what a command needs only when it runs."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import lcm_rt

if TYPE_CHECKING:
    from lcm_rt.types import GenerateInput, GenerateOutput

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Real-time pictures from Latent Consistency Models, on your own machine.",
)

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="NAME", help="A model to serve, or NAME=FOLDER. May be repeated; first is default."
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [default: auto]")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Compile the networks: slower start, faster pictures.")
]


def fail(message: str) -> NoReturn:
    typer.echo(f"lcm-rt: {message}", err=True)
    raise typer.Exit(1)


def _settings(**given: Any) -> Any:
    """Settings from what was given on the command line, then variables, then the file."""
    from pydantic import ValidationError

    from lcm_rt.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        fail(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except ValueError as error:  # the file is missing, or is not TOML
        fail(str(error))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.  [default: 8000]")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where answered pictures are kept.")] = None,
    model: Models = None,
    device: Device = None,
    compile: Compile = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond this machine, though there are no keys yet.")
    ] = None,
) -> None:
    """Serve models to browsers and clients. Every setting is also a variable: LCM_RT_PORT, LCM_RT_MAX_ROWS, ..."""
    settings = _settings(
        host=host,
        port=port,
        data_dir=data_dir,
        models=model,
        device=device,
        compile=compile,
        insecure=insecure,
    )
    if not settings.is_loopback and not settings.insecure:
        fail(f"{settings.host} is reachable by others and there are no API keys yet; add --insecure if you mean it")
    from lcm_rt.errors import LcmError
    from lcm_rt.server.serve import serve as run

    try:
        sys.exit(asyncio.run(run(settings)))
    except (LcmError, OSError) as error:
        fail(str(error))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .png, .jpg or .webp file.")] = Path("out.png"),
    image: Annotated[Path | None, typer.Option("-i", "--image", exists=True, help="A picture to start from.")] = None,
    mask: Annotated[Path | None, typer.Option("-m", "--mask", exists=True, help="White is painted anew.")] = None,
    strength: Annotated[float, typer.Option(help="0 keeps the picture, 1 ignores it.")] = 0.8,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.  [default: random]")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 4,
    guidance: Annotated[float, typer.Option(help="Above 1, push harder towards the prompt.")] = 1.0,
    negative: Annotated[str, typer.Option(help="What to push away from; needs guidance above 1.")] = "",
    size: Annotated[str | None, typer.Option(metavar="WxH", help="[default: the picture's, or the model's]")] = None,
    model: Models = None,
    device: Device = None,
    compile: Compile = None,
) -> None:
    """Make one picture and write it to a file."""
    from lcm_rt import wire
    from lcm_rt.errors import LcmError

    format = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}.get(output.suffix.lower())
    if format is None:
        fail(f"{output}: write to a .png, .jpg or .webp file")
    fields: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative,
        "image_bytes": image and image.read_bytes(),
        "mask_bytes": mask and mask.read_bytes(),
        "strength": strength,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "format": format,
        "quality": 92,
    }
    if size is not None:
        width, _, height = size.partition("x")
        fields["image_size"] = {"width": width, "height": height}
    try:
        wanted = wire.parse_input(fields)
        done = asyncio.run(_generate(wanted, _settings(models=model, device=device, compile=compile)))
    except LcmError as error:
        fail(str(error))
    result = done.results[0]
    output.write_bytes(result.image)
    typer.echo(
        f"{output}: {result.width}x{result.height}, {result.model}, seed {result.seed}, "
        f"{result.num_inference_steps} steps, {result.timings['total'] * 1e3:.0f} ms"
    )


async def _generate(wanted: GenerateInput, settings: Any) -> GenerateOutput:
    from lcm_rt.server.app import create_service

    service = create_service(settings)
    engine = asyncio.create_task(service.workers.run())
    try:
        await service.workers.wait_ready()
        return await service.run(wanted, app_model=service.default_model, priority="run")
    finally:
        engine.cancel()
        await asyncio.wait([engine])


@app.command()
def models() -> None:
    """List the models that can be served by name."""
    from rich.console import Console
    from rich.table import Table

    from lcm_rt.catalog import CATALOG

    table = Table("name", "picture", "licence", "where")
    for spec in CATALOG.values():
        where = str(spec.path) if (spec.path / "model_index.json").is_file() else "not there"
        table.add_row(spec.name, f"{spec.size}x{spec.size}", spec.licence, where)
    Console().print(table)
    typer.echo("Any folder in diffusers format can be served too: lcm-rt serve --model NAME=FOLDER")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(lcm_rt.__version__)


def main() -> None:
    """Entry point of ``lcm-rt``."""
    app()
