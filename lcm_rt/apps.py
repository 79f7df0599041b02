"""Application ids, as the platform spells them: ``fal-ai/lcm``, ``110602490-lcm-sd15-i2i``, ``workflows/me/flow``."""

from __future__ import annotations

from typing import NamedTuple

PLATFORM_APPS = {
    "fast-lcm-diffusion": "sdxl",
    "fast-turbo-diffusion": "sdxl-turbo",
    "lcm": "sdv1-5",
    "lcm-plexed-sd15-i2i": "sdv1-5",
    "lcm-sd15-i2i": "sdv1-5",
    "sd-turbo-real-time-high-fps-msgpack": "sd-turbo",
    "sd-turbo-real-time-high-fps-msgpack-a10g": "sd-turbo",
    "sdxl-turbo-realtime": "sdxl-turbo",
    "shared-lcm-test": "sdv1-5",
}
"""Aliases of the hosted apps whose messages this server understands, whoever owns them, and the model that each uses
when it is served here; otherwise the server's default model answers."""

_NAMESPACES = ("workflows", "comfy")


class App(NamedTuple):
    """An id in its parts; ``path`` is what follows it, such as ``image-to-image``. Any of them may be empty."""

    namespace: str
    owner: str
    alias: str
    path: str

    @property
    def id(self) -> str:
        """The id without the path: where the clients look for its jobs."""
        return "/".join(filter(None, self[:3]))


def parse_app(text: str) -> App:
    """An application id, with or without a path behind it; a model's name alone is an alias without an owner."""
    first, *rest = text.strip("/").split("/")
    namespace = ""
    if first in _NAMESPACES and rest:
        namespace, (first, *rest) = first, rest
    number, dash, name = first.partition("-")
    if dash and name and number.isdecimal() and number.isascii():  # the legacy spelling
        owner, alias = number, name
    elif rest:
        owner, alias, *rest = first, *rest
    else:
        owner, alias = "", first
    return App(namespace, owner, alias, "/".join(rest))
