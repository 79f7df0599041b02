"""A hub of models on this machine, as huggingface_hub speaks to it: it counts what it serves, and stalls or cuts it."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections import defaultdict
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class Gate:
    """Holds one file back after so many bytes: ``reached`` is set then, and the rest comes after ``open``.

    With ``cut`` the connection ends there instead, the first time.
    """

    def __init__(self, after: int, cut: bool) -> None:
        self.after, self.cut = after, cut
        self.reached, self.opened = threading.Event(), threading.Event()

    def open(self) -> None:
        self.opened.set()


class FakeHub:
    """A running hub; ``url`` is its ``HF_ENDPOINT``. Weights come from another host name, as from the real one's CDN.

    ``served`` are the ranges sent of each (repository, file), ``asked`` every method and path, and ``tokens`` the
    Authorization headers by host. A repository in ``gated`` shows its list and no file. ``ranges`` is whether the
    server knows them.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.licences: dict[str, str] = {}
        self.gated: set[str] = set()
        self.ranges = True
        self.gates: dict[str, Gate] = {}
        self.served: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        self.asked: list[str] = []
        self.connections: set[socket.socket] = set()
        self.tokens: dict[str, set[str | None]] = defaultdict(set)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go away: whoever asks after this is refused."""
        for gate in self.gates.values():
            gate.open()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add(self, repo: str, folder: Path, licence: str = "mit") -> None:
        """Offer the files of ``folder`` as a repository."""
        self.repos[repo], self.licences[repo] = folder, licence

    def hold(self, name: str, after: int, *, cut: bool = False) -> Gate:
        """Put a gate into the file that is called ``name`` in its repository."""
        self.gates[name] = Gate(after, cut)
        return self.gates[name]

    def bytes_served(self, repo: str, name: str) -> int:
        return sum(end - start for start, end in self.served[repo, name])


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            hub.connections.add(self.connection)

        def finish(self) -> None:
            hub.connections.discard(self.connection)
            super().finish()

        def log_message(self, *words: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.asked.append(f"{self.command} {path}")
            hub.tokens[self.headers["Host"].partition(":")[0]].add(self.headers["Authorization"])
            first, *rest = path.split("/")
            if first == "api":
                self._list("/".join(rest[1:3]), rest[4] if len(rest) > 4 else "main")
            elif first == "cdn":
                self._send_file("/".join(rest[:2]), "/".join(rest[2:]))
            else:
                self._resolve(f"{first}/{rest[0]}", rest[2], "/".join(rest[3:]))

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _list(self, repo: str, revision: str) -> None:
            if repo not in hub.repos:
                return self._refuse(404, "RepoNotFound")
            if revision not in ("main", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            root = hub.repos[repo]
            files = []
            for file in sorted(path for path in root.rglob("*") if path.is_file()):
                entry = {
                    "rfilename": file.relative_to(root).as_posix(),
                    "size": file.stat().st_size,
                    "blobId": "0" * 40,
                }
                if file.suffix == ".safetensors":
                    entry["lfs"] = {"size": file.stat().st_size, "sha256": _sha256(file), "pointerSize": 130}
                files.append(entry)
            about = {"id": repo, "sha": COMMIT, "siblings": files, "cardData": {"license": hub.licences[repo]}}
            self._send(json.dumps(about).encode(), {"Content-Type": "application/json"})

        def _resolve(self, repo: str, revision: str, name: str) -> None:
            if repo not in hub.repos:
                return self._refuse(404, "RepoNotFound")
            if repo in hub.gated:
                return self._refuse(403, "GatedRepo")
            file = hub.repos[repo] / name
            if not file.is_file():
                return self._refuse(404, "EntryNotFound")
            if file.suffix != ".safetensors":
                return self._send_file(repo, name)
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{hub.port}/cdn/{repo}/{name}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{_sha256(file)}"')
            self.send_header("X-Linked-Size", str(file.stat().st_size))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send_file(self, repo: str, name: str) -> None:
            data = (hub.repos[repo] / name).read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            start, end, status = 0, len(data), 200
            if (asked := self.headers["Range"]) and hub.ranges:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, status = int(first), 206
                end = min(end, int(last) + 1) if last else end
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            self._send(data[start:end], headers, status, (repo, name), start)

        def _send(
            self,
            data: bytes,
            headers: dict[str, str],
            status: int = 200,
            key: tuple[str, str] | None = None,
            start: int = 0,
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            gate = hub.gates.get(key[1]) if key else None
            try:
                if gate and start < gate.after < start + len(data) and not gate.reached.is_set():
                    head, data = data[: gate.after - start], data[gate.after - start :]
                    self._write(head, key, start)
                    gate.reached.set()
                    if gate.cut:
                        self.close_connection = True
                        return
                    gate.opened.wait()
                    start = gate.after
                self._write(data, key, start)
            except OSError:  # the client is gone
                self.close_connection = True

        def _write(self, data: bytes, key: tuple[str, str] | None, start: int) -> None:
            if key:
                hub.served[key].append((start, start + len(data)))
            self.wfile.write(data)

    return Handler


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
