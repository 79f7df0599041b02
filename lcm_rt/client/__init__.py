"""A client of an lcm-rt server, for programs that wait and for those with an event loop.

It needs no torch, no NumPy and no Pillow, and its errors are those of ``lcm_rt.errors``. ``docs/python.md`` shows how
it is used.
"""

from lcm_rt.client.aio import AsyncClient, AsyncJob
from lcm_rt.client.realtime import AsyncRealtime, Realtime
from lcm_rt.client.sync import Client, Job
from lcm_rt.client.values import Fields, Health, Image, Log, Model, Output, Picture, Preview, Status

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "AsyncRealtime",
    "Client",
    "Fields",
    "Health",
    "Image",
    "Job",
    "Log",
    "Model",
    "Output",
    "Picture",
    "Preview",
    "Realtime",
    "Status",
]
