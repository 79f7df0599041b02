"""Sends what ``fal-client`` sends to a server of your own. Change nothing in your program, and start it with

    FAL_LOCAL=http://localhost:8000 python -m fal_local app.py

or write ``import fal_local`` above ``import fal_client``. Where neither can be done, put this file under the name
``sitecustomize.py`` into a folder of its own and set ``PYTHONPATH`` to that folder.

The client has no setting for another address; it reads the globals below whenever it calls.
"""

import os
import runpy
import sys


def redirect(server: str) -> None:
    """Point ``fal_client`` at ``server``, such as ``http://localhost:8000``."""
    import fal_client.client as client

    server = server.rstrip("/")
    client.RUN_URL_FORMAT = f"{server}/run/"
    client.QUEUE_URL_FORMAT = f"{server}/queue/"
    client.REALTIME_URL_FORMAT = f"{server.replace('http', 'ws', 1)}/run/"
    client.REST_URL = f"{server}/rest"
    client.CDN_URL = f"{server}/cdn"
    os.environ.setdefault("FAL_KEY", "local")  # the client insists on one; an open server takes any


try:
    redirect(os.environ.get("FAL_LOCAL") or "http://localhost:8000")
except ModuleNotFoundError as missing:
    if __name__ != "sitecustomize" or missing.name != "fal_client":  # there, most programs have nothing to redirect
        raise

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m fal_local app.py ...")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
