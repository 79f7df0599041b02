"""``fal-client``, sync and async, as a program uses it: python smoke.py [full|hosts]; prints what worked.

``hosts`` is what ``FAL_RUN_HOST`` alone redirects: everything but tokens and uploads.
"""

import asyncio
import json
import sys
import urllib.request

import fal_client

APP = "fal-ai/lcm"
SMALL = {
    "prompt": "sunset over a lake",
    "image_size": {"width": 64, "height": 64},
    "num_inference_steps": 1,
    "seed": 42,
}
JPEG = b"\xff\xd8\xff"


def download(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def sync(full):
    answer = fal_client.run(APP, arguments=SMALL)
    yield "run"
    statuses = []
    assert fal_client.subscribe(APP, arguments=SMALL, on_queue_update=statuses.append)["seed"] == 42
    assert isinstance(statuses[-1], fal_client.Completed)
    yield "subscribe"
    *_, last = fal_client.stream(APP, arguments=SMALL)
    assert last["seed"] == 42
    yield "stream"
    if full:
        picture = download(answer["images"][0]["url"])
        assert picture.startswith(JPEG)
        url = fal_client.upload(picture, "image/jpeg")
        assert download(url) == picture
        assert fal_client.run(APP, arguments={**SMALL, "image_url": url})["images"]
        yield "upload"
    with fal_client.realtime(APP, use_jwt=full) as connection:
        connection.send(SMALL)
        assert connection.recv()["images"][0]["content"].startswith(JPEG)
    yield "realtime"


async def asynchronous(full):
    answer = await fal_client.run_async(APP, arguments=SMALL)
    yield "run"
    statuses = []
    answered = await fal_client.subscribe_async(APP, arguments=SMALL, on_queue_update=statuses.append)
    assert answered["seed"] == 42
    assert isinstance(statuses[-1], fal_client.Completed)
    yield "subscribe"
    async for event in fal_client.stream_async(APP, arguments=SMALL):
        last = event
    assert last["seed"] == 42
    yield "stream"
    if full:
        picture = await asyncio.to_thread(download, answer["images"][0]["url"])
        assert picture.startswith(JPEG)
        url = await fal_client.upload_async(picture, "image/jpeg")
        assert await asyncio.to_thread(download, url) == picture
        assert (await fal_client.run_async(APP, arguments={**SMALL, "image_url": url}))["images"]
        yield "upload"
    async with fal_client.realtime_async(APP, use_jwt=full) as connection:
        await connection.send(SMALL)
        assert (await connection.recv())["images"][0]["content"].startswith(JPEG)
    yield "realtime"


async def main(full):
    first = await asyncio.to_thread(lambda: list(sync(full)))
    return {"sync": first, "async": [name async for name in asynchronous(full)]}


sys.stdout.write(json.dumps(asyncio.run(main(sys.argv[1:] != ["hosts"]))))
