"""Make docs/modes.png: every mode of the engine, on the embedded model.

    python docs/modes_sheet.py [--seed 1]

Seeds are not picked: all are ``--seed``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
from typing import Any

from contact_sheet import SKETCHES, Cell, draw_sketch, save
from PIL import Image, ImageDraw

from lcm_rt.embedded import LORA_DIR
from lcm_rt.server.app import create_service
from lcm_rt.settings import Settings
from lcm_rt.types import GenerateInput, Preview


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def picture_of(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


async def rows(seed: int) -> list[list[Cell]]:
    service = create_service(Settings(models=["embedded"]))
    engine = asyncio.create_task(service.workers.run())

    async def paint(**fields: Any) -> list[Image.Image]:
        wanted = GenerateInput(**{"seed": seed, "format": "png", **fields})
        output = await service.run(wanted, app_model="embedded", priority="run")
        print(output.results[0].timings["total"], fields.get("prompt"))
        return [picture_of(result.image) for result in output.results]

    async def one(caption: str, **fields: Any) -> Cell:
        return caption, (await paint(**fields))[0]

    try:
        await service.workers.wait_ready()
        lake = "sunset over a lake with mountains"
        text = [await one(f"text: {lake}", prompt=lake)]
        text += [await one(f"{n} steps", prompt=lake, num_inference_steps=n) for n in (1, 2, 8)]
        text += [
            await one(f"guidance {g}, away from: {away}", prompt=lake, guidance_scale=g, negative_prompt=away)
            for g, away in ((2, "night"), (4, "mountains"))
        ]

        mountains, sky, shapes = SKETCHES[0]
        drawn = draw_sketch(sky, shapes)
        image = [(f"sketch: {mountains}", drawn)]
        image += [
            await one(f"strength {s}", prompt=mountains, image_bytes=png(drawn), strength=s)
            for s in (0.3, 0.5, 0.6, 0.8, 1.0)
        ]

        scene = (await paint(prompt="hills and a lake at day"))[0]
        mask = Image.new("L", scene.size, 0)
        box = (0, 40, 150, 256)
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        marked = scene.copy()
        ImageDraw.Draw(marked).rectangle(box, outline=(255, 60, 60), width=3)
        masked = {"image_bytes": png(scene), "mask_bytes": png(mask), "strength": 1.0, "seed": seed + 1}
        inpaint = [("inpaint: picture and mask", marked)]
        inpaint.append(await one("plain, no prompt", prompt="", **masked))
        inpaint.append(await one("ControlNet, no prompt", prompt="", controlnet_inpaint=True, **masked))
        prompt = "snowy mountains at day"
        inpaint.append(await one(f"plain: {prompt}", prompt=prompt, **masked))
        inpaint.append(await one("ControlNet: the same", prompt=prompt, controlnet_inpaint=True, **masked))
        inpaint.append(await one("mask only: the same", prompt=prompt, inpaint_mask_only=True, **masked))

        lora = "data:;base64," + base64.b64encode((LORA_DIR / "ink.safetensors").read_bytes()).decode()
        style = [
            await one(f"LoRA at {scale:g}", prompt=mountains, lora_url=lora, lora_scale=scale) for scale in (0, 0.5, 1)
        ]
        style.append(await one("LoRA 1: a lake at night", prompt="a lake at night", lora_url=lora))
        style.append(
            await one("LoRA 1, sketch 0.6", prompt=mountains, image_bytes=png(drawn), strength=0.6, lora_url=lora)
        )
        style.append(await one("LoRA 1, inpaint", prompt="a house at day", lora_url=lora, **masked))

        seen: list[Preview] = []
        night = "a snowy forest at night with a moon"
        wanted = GenerateInput(prompt=night, seed=seed, previews=True, num_inference_steps=5, format="png")
        ongoing = await service.start(wanted, app_model="embedded", priority="run", on_preview=seen.append)
        done = (await ongoing.output()).results[0]
        previews = [(f"preview {p.step} of 5", picture_of(p.image)) for p in seen]
        previews += [(f"= {night}", picture_of(done.image))]
        previews += [await one("384x192", prompt=lake, image_size={"width": 384, "height": 192})]

        many = [
            (f"seed {seed + n}", picture)
            for n, picture in enumerate(await paint(prompt="a desert at sunset with a sun", num_images=6))
        ]
        return [text, image, inpaint, style, previews, many]
    finally:
        engine.cancel()
        await asyncio.wait([engine])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    lines = asyncio.run(rows(parser.parse_args().seed))
    save([cell for line in lines for cell in line], "modes.png")


if __name__ == "__main__":
    main()
