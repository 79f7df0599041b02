"""The command line: ``serve``, ``generate``, ``pull``, ``models``, ``keys``. A command imports what it needs."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer

import lcm_rt
from lcm_rt.bench.commands import bench

if TYPE_CHECKING:
    from lcm_rt import hub, transfer
    from lcm_rt.auth import Auth
    from lcm_rt.catalog import ModelSpec
    from lcm_rt.store import Store
    from lcm_rt.types import GenerateInput, GenerateOutput

T = TypeVar("T")

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
        "--model", metavar="NAME", help="A model to serve, or NAME=REPO_OR_PATH. May be repeated; first is default."
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [default: auto]")]
VaeChoice = Annotated[
    Literal["tiny", "full"] | None,
    typer.Option("--vae", help="Which VAE, where there are two: tiny is fast, full draws finer.  [default: tiny]"),
]
Safety = Annotated[bool | None, typer.Option("--safety/--no-safety", help="With the safety checkers.")]
Controlnet = Annotated[
    bool | None, typer.Option("--controlnet/--no-controlnet", help="With the inpainting ControlNets.")
]
Backend = Annotated[
    Literal["auto", "eager", "inductor", "openvino"] | None,
    typer.Option(help="How networks run, once that is made ready.  [default: auto]"),
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


app.add_typer(bench, name="bench")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.  [default: 8000]")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where answered pictures are kept.")] = None,
    model: Models = None,
    device: Device = None,
    backend: Backend = None,
    vae: VaeChoice = None,
    safety: Safety = None,
    controlnet: Controlnet = None,
    memory_mb: Annotated[
        int | None, typer.Option(help="What all models may take; the ones longest unused make room.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate (PEM), to speak https; see lcm-rt certificate.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM), where that is another file.")] = None,
    keys: Annotated[
        bool | None, typer.Option("--keys", help="Ask for API keys on this machine's own address too.")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Ask nobody for a key, though other machines reach the address.")
    ] = None,
) -> None:
    """Serve models to browsers and clients. Every setting is also a variable: LCM_RT_PORT, LCM_RT_MAX_ROWS, ..."""
    settings = _settings(
        host=host,
        port=port,
        data_dir=data_dir,
        models=model,
        device=device,
        backend=backend,
        vae=vae,
        safety=safety,
        controlnet=controlnet,
        memory_mb=memory_mb,
        tls_cert=tls_cert,
        tls_key=tls_key,
        keys=keys,
        insecure=insecure,
    )
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
    mask_only: Annotated[
        bool, typer.Option("--mask-only", help="Leave every pixel outside the mask as it is.")
    ] = False,
    controlnet_inpaint: Annotated[
        bool, typer.Option("--controlnet-inpaint", help="Let a ControlNet see what surrounds the mask.")
    ] = False,
    lora: Annotated[str | None, typer.Option(metavar="FILE_OR_URL", help="A LoRA.")] = None,
    lora_scale: Annotated[float, typer.Option(help="How much of the LoRA.")] = 1.0,
    strength: Annotated[float, typer.Option(help="0 keeps the picture, 1 ignores it.")] = 0.8,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.  [default: random]")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.  [default: the model's, mostly 4]")] = None,
    guidance: Annotated[float, typer.Option(help="Above 1, push harder towards the prompt.")] = 1.0,
    negative: Annotated[str, typer.Option(help="What to push away from; needs guidance above 1.")] = "",
    size: Annotated[str | None, typer.Option(metavar="WxH", help="[default: the picture's, or the model's]")] = None,
    model: Models = None,
    device: Device = None,
    backend: Backend = None,
    vae: VaeChoice = None,
    safety: Safety = None,
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
        "inpaint_mask_only": mask_only,
        "controlnet_inpaint": controlnet_inpaint,
        "lora_url": lora and _as_url(lora),
        "lora_scale": lora_scale,
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
        settings = _settings(models=model, device=device, backend=backend, vae=vae, safety=safety)
        done = asyncio.run(_generate(wanted, settings))
    except LcmError as error:
        fail(str(error))
    result = done.results[0]
    output.write_bytes(result.image)
    typer.echo(
        f"{output}: {result.width}x{result.height}, {result.model}, seed {result.seed}, "
        f"{result.num_inference_steps} steps, {result.timings['total'] * 1e3:.0f} ms"
        + (", flagged by the safety checker and black" if result.flagged else "")
    )


def _as_url(lora: str) -> str:
    import base64

    path = Path(lora)
    return f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else lora


async def _generate(wanted: GenerateInput, settings: Any) -> GenerateOutput:
    from lcm_rt.server.app import create_service, create_store

    service = create_service(settings, create_store(settings))
    engine = asyncio.create_task(service.workers.run())
    try:
        await service.workers.wait_ready()
        return await service.run(wanted, app_model=service.default_model, priority="run")
    finally:
        engine.cancel()
        await asyncio.wait([engine])


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of `lcm-rt models`, or NAME=REPO_OR_PATH.")],
    vae: VaeChoice = None,
    safety: Safety = None,
    controlnet: Controlnet = None,
) -> None:
    """Download a model, or the rest of it: an interrupted download goes on where it ended."""
    from lcm_rt import catalog, hub
    from lcm_rt.errors import LcmError

    settings = _settings(vae=vae, safety=safety, controlnet=controlnet)  # those that `serve` will read
    choice = catalog.Choice(vae=settings.vae, safety=settings.safety, controlnet=settings.controlnet)
    try:
        plan = hub.plan(catalog.resolve(name), choice)
        for repo, licence in plan.licences.items():
            files = [file for file in plan.files if file.repo == repo]
            to_fetch = sum(file.size for file in files if not file.present)
            said = f"{_size(to_fetch)} of {_size(sum(file.size for file in files))} to download" if to_fetch else "here"
            typer.echo(f"{repo}: {said}, licence: {licence}")
        parts = _fetch(plan) if plan.missing else plan.parts
    except LcmError as error:
        fail(str(error))
    typer.echo(f"{name} is all there: {parts.base}" if plan.missing else f"{name} was all there: {parts.base}")


def _fetch(plan: hub.Plan) -> hub.Parts:
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    from lcm_rt import hub

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns) as progress:
        tasks: dict[transfer.File, TaskID] = {}

        def show(file: transfer.File, done: int) -> None:
            if file not in tasks:
                tasks[file] = progress.add_task(f"{file.repo}:{file.name}", total=file.size)
            progress.update(tasks[file], completed=done)

        return hub.fetch(plan, show)


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


@app.command()
def models(
    url: Annotated[str, typer.Option(help="A running server, to ask which are loaded.")] = "http://127.0.0.1:8000",
) -> None:
    """List the models that have a name: what they are, what of them is on this machine, which are loaded."""
    from rich.console import Console
    from rich.table import Table

    from lcm_rt.catalog import CATALOG

    states = _ask_states(url)
    table = Table("name", "picture", "steps", "licence", "on disk", "loaded", "where")
    for spec in CATALOG.values():
        here, where = _look(spec)
        state = "no server" if states is None else states.pop(spec.name, "no")
        table.add_row(spec.name, f"{spec.size}x{spec.size}", str(spec.steps), spec.licence, here, state, where)
    for name, state in (states or {}).items():  # served under a name of the operator's own
        table.add_row(name, "", "", "", "", state, "")
    Console().print(table)
    typer.echo(
        "Other models are served by lcm-rt serve --model NAME=REPO_OR_PATH: a repository of the hub, a folder in"
    )
    typer.echo(
        "diffusers format or a .safetensors checkpoint. Licences are of the weights; lcm-rt pull names them all."
    )


def _look(spec: ModelSpec) -> tuple[str, str]:
    """What of ``spec`` is on this machine, and where it lies; asks no network."""
    from lcm_rt import hub
    from lcm_rt.catalog import Choice
    from lcm_rt.errors import LcmError

    try:
        plan = hub.plan(spec, Choice(), online=False)
    except LcmError:
        here = hub.bytes_here(spec)
        return (f"partly, {_size(here)}" if here else "no"), ""
    size = sum(file.size for file in plan.files)
    return (f"yes, {_size(size)}" if size else "yes"), str(plan.parts.base)


def _ask_states(url: str) -> dict[str, str] | None:
    """What the server at ``url`` says of its models, or None if none answers there."""
    import json
    from urllib.request import urlopen

    try:
        with urlopen(f"{url.rstrip('/')}/models", timeout=1) as answer:
            told = json.load(answer)["models"]
        return {str(model["name"]): str(model["state"]) for model in told}
    except (OSError, ValueError, LookupError, TypeError):
        return None


@app.command()
def certificate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write ca.pem, cert.pem and key.pem.")],
    host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another host name or address. May be repeated.")
    ] = None,
) -> None:
    """Make a certificate for this machine and the platform's host names, so that its clients need no change."""
    from lcm_rt import certificates
    from lcm_rt.errors import LcmError

    try:
        made = certificates.write(folder, host or [])
    except (LcmError, OSError) as error:
        fail(str(error))
    typer.echo(f"serve    lcm-rt serve --tls-cert {made.cert} --tls-key {made.key}")
    typer.echo(f"Python   SSL_CERT_FILE={made.ca}")
    typer.echo(f"Node     NODE_EXTRA_CA_CERTS={made.ca}")
    typer.echo(f"curl     --cacert {made.ca}")
    typer.echo("Nothing else can be signed with this authority: its own key was not kept.")


keys = typer.Typer(
    no_args_is_help=True, help="Make, list and end the API keys that clients show: Authorization: Key ID:SECRET."
)
app.add_typer(keys, name="keys")

DataDir = Annotated[Path | None, typer.Option(help="That of the server: where its database is.")]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@keys.command("create")
def create_key(
    owner: Annotated[str, typer.Argument(help="To whom its jobs and files belong; may have several keys.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="generate, or admin: load models, see metrics. May be repeated.  [default: generate]"),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="After how long, such as 12h, 30d or 8w.  [default: never]")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    lifetime_s = None if expires is None else _duration(expires)
    made = _with_auth(data_dir, lambda auth: auth.create_key(owner, scope or ["generate"], lifetime_s=lifetime_s))
    typer.echo(made)
    typer.echo("Keep it now, it is not shown again. Clients read it from FAL_KEY.", err=True)


@keys.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """List the keys, without their secrets."""
    import time

    from rich.console import Console
    from rich.table import Column, Table

    now = time.time()
    table = Table(Column("id", min_width=16), "owner", "scopes", "created", "expires", "state", pad_edge=False)
    for key in _with_auth(data_dir, lambda auth: auth.list_keys()):
        expired = key.expires_at is not None and key.expires_at <= now
        state = "revoked" if key.revoked_at is not None else "expired" if expired else "valid"
        expires = "never" if key.expires_at is None else _date(key.expires_at)
        table.add_row(key.id, key.owner, " ".join(sorted(key.scopes)), _date(key.created_at), expires, state)
    Console().print(table)


@keys.command("revoke")
def revoke_key(
    id: Annotated[str, typer.Argument(metavar="ID", help="The part of a key before its colon.")],
    data_dir: DataDir = None,
) -> None:
    """End a key at once, and the tokens that were made with it."""
    id = id.partition(":")[0]  # whoever gives all of a key means that one; its secret is no business of a terminal
    if not _with_auth(data_dir, lambda auth: auth.revoke_key(id)):
        fail(f"there is no key {id}")
    typer.echo(f"{id} is revoked")


def _with_auth(data_dir: Path | None, work: Callable[[Auth], Awaitable[T]]) -> T:
    from lcm_rt.auth import Auth

    return _with_store(data_dir, lambda store: work(Auth(store, is_open=False)))


def _with_store(data_dir: Path | None, work: Callable[[Store], Awaitable[T]]) -> T:
    """What ``work`` gives, with the store of the server that has the same settings; it may be running."""
    from lcm_rt.errors import LcmError
    from lcm_rt.server.app import create_store

    settings = _settings(data_dir=data_dir)

    async def working() -> T:
        async with create_store(settings) as store:
            return await work(store)

    try:
        return asyncio.run(working())
    except LcmError as error:
        fail(str(error))


def _duration(text: str) -> float:
    match = re.fullmatch(r"([1-9][0-9]{0,5})([smhdw])", text, re.ASCII)
    if not match:
        fail(f"--expires: {text!r} is no time such as 12h, 30d or 8w")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > 100 * 365 * _SECONDS["d"]:
        fail(f"--expires: {text} is more than a hundred years")
    return seconds


def _date(at: float) -> str:
    from datetime import datetime

    return f"{datetime.fromtimestamp(at):%Y-%m-%d}"


webhooks = typer.Typer(no_args_is_help=True, help="By what receivers of webhooks know that an event is from here.")
app.add_typer(webhooks, name="webhooks")


@webhooks.command("secret")
def webhook_secret(
    owner: Annotated[str, typer.Argument(help="Whose jobs have the webhooks; local, where no keys are asked for.")],
    data_dir: DataDir = None,
) -> None:
    """Print an owner's secret, for the verifiers of Standard Webhooks."""
    from lcm_rt.webhooks import Signer

    async def read(store: Store) -> str:
        signer = Signer(store)
        await signer.load()
        return signer.secret_of(owner)

    typer.echo(_with_store(data_dir, read))


@webhooks.command("rotate")
def rotate_webhooks(
    secrets: Annotated[bool, typer.Option("--secrets", help="The owners' secrets, not the signing key.")] = False,
    leaked: Annotated[bool, typer.Option("--leaked", help="Someone has them: end all earlier ones at once.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Make a new signing key, or new secrets. Servers that run heed it within a minute or two."""
    from lcm_rt.webhooks import LEAD_S, RETIRED_S, Signer

    _with_store(data_dir, lambda store: Signer(store).rotate("webhook" if secrets else "signing", at_once=leaked))
    if leaked:
        typer.echo("The earlier ones are forgotten; receivers refuse events until they have the new ones.")
    elif secrets:
        typer.echo(f"Every owner has a new secret; the earlier ones are good for another {RETIRED_S / 3600:.0f} h.")
    else:
        typer.echo(f"The new key is published, and signs in {LEAD_S / 3600:.0f} h: receivers may keep the list a day.")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(lcm_rt.__version__)


def main() -> None:
    """Entry point of ``lcm-rt``."""
    app()
