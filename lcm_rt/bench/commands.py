"""``lcm-rt bench``: ``serve`` measures a server from outside, ``engine`` the engine from within."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a server that runs, or the engine by itself.",
)

Output = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report to this file, as JSON.")]


def fail(message: object) -> NoReturn:
    typer.echo(f"lcm-rt: {message}", err=True)
    raise typer.Exit(1)


@bench.command()
def serve(
    url: Annotated[
        str, typer.Argument(help="A running server; with --dialect, the whole address that it answers at.")
    ] = "http://127.0.0.1:8000",
    trace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="typing, recorded, camera, flood, single (a closed loop), idle, or a .jsonl file. Given more than"
            " once, the sessions take them in turns.  [default: typing]",
        ),
    ] = None,
    sessions: Annotated[int, typer.Option(help="Clients at a time.")] = 1,
    seconds: Annotated[float, typer.Option(help="How long.")] = 30.0,
    image: Annotated[bool, typer.Option("--image", help="Send a sketch with each message, not text only.")] = False,
    strength: Annotated[float, typer.Option(help="Of the change to the sketch.")] = 0.8,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: the server's]")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels.  [default: the model's]")] = None,
    app: Annotated[str, typer.Option(help="The application's id, or a model's name.")] = "fal-ai/lcm",
    max_buffering: Annotated[
        int | None, typer.Option(help="Messages that may wait, 1 to 60.  [default: the server's]")
    ] = None,
    warm_up: Annotated[int, typer.Option(help="Pictures of each session before the clock starts.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the traces.")] = 1,
    dialect: Annotated[
        Literal["lcm-rt", "websocket", "http"],
        typer.Option(help="How to talk to another server: maps over a WebSocket, or POST of JSON."),
    ] = "lcm-rt",
    throttled: Annotated[
        bool, typer.Option("--throttled", help="Send nothing while an answer is outstanding, then the newest.")
    ] = False,
    pid: Annotated[int | None, typer.Option(help="The server's process id, to measure its CPU and memory.")] = None,
    output: Output = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw delays and fairness to this folder.")] = None,
) -> None:
    """Measure what people at a server feel: delays, freshness, fairness. A key for it is read from LCM_RT_KEY."""
    from lcm_rt.bench.serve import Load, Target, run
    from lcm_rt.errors import LcmError

    fields: dict[str, Any] = {}
    if steps is not None:
        fields["num_inference_steps"] = steps
    if size is not None:
        fields["image_size"] = {"width": size, "height": size}
    if image:
        fields["strength"] = strength
    try:
        load = Load(
            traces=trace or ["typing"],
            sessions=sessions,
            seconds=seconds,
            warm_up=0 if trace == ["idle"] else warm_up,
            seed=seed,
            fields=fields,
        )
        target = Target(url=url, dialect=dialect, app=app, max_buffering=max_buffering, throttled=throttled)
        run(target, load, image=image, pid=pid, output=output, plots=plots)
    except (LcmError, OSError) as error:
        fail(error)


@bench.command()
def engine(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="A model of `lcm-rt models`, or NAME=REPO_OR_PATH.")
    ] = "embedded",
    random_weights: Annotated[
        Literal["sd", "sdxl"] | None,
        typer.Option(help="In place of --model: a model of the real size with random weights, without a download."),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels.  [default: the model's]")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: the model's]")] = None,
    rows: Annotated[str, typer.Option(metavar="N,N", help="Pictures that share a forward.")] = "1,2,4,8",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[
        Literal["auto", "eager", "inductor", "openvino"], typer.Option(help="What makes the networks fast.")
    ] = "auto",
    cold_start: Annotated[
        bool, typer.Option("--cold-start", help="Time the way to the first picture too, with a cold and a warm cache.")
    ] = False,
    output: Output = None,
) -> None:
    """Measure the engine without a server: time per step and picture, by the rows of a batch."""
    counts = rows.split(",")
    if not all(count.isascii() and count.isdigit() and 0 < int(count) <= 64 for count in counts):
        fail(f"--rows: {rows!r} is not a list of numbers from 1 to 64, such as 1,2,4,8")
    from lcm_rt.bench.engine import run
    from lcm_rt.errors import LcmError

    try:
        run(
            model=model,
            random_weights=random_weights,
            size=size,
            steps=steps,
            rows=[int(count) for count in counts],
            device=device,
            backend=backend,
            cold_start=cold_start,
            output=output,
        )
    except (LcmError, OSError) as error:
        fail(error)
