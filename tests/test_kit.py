"""What points the platform's clients here: the files that we serve for it, and the certificates."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import ssl
import stat
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fal_client.client
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from websockets.sync.client import connect

from lcm_rt import certificates
from lcm_rt.errors import InputError
from lcm_rt.server import addressing, kit
from lcm_rt.server.serve import load_tls

KIT = Path(kit.__file__).parents[1] / "kit"
GLOBALS = ("RUN_URL_FORMAT", "QUEUE_URL_FORMAT", "REALTIME_URL_FORMAT", "REST_URL", "CDN_URL")


def get(path: str, **headers: str) -> Any:
    app = Starlette(routes=[Route(path, kit.file) for path in kit.FILES])
    return TestClient(app, base_url="http://localhost:8000").get(path, headers=headers)


@pytest.mark.parametrize("path", kit.FILES)
@pytest.mark.parametrize("host", ["localhost:8123", "pictures.example.org", "[::1]:8000"])
def test_a_file_holds_the_address_it_came_from(path: str, host: str) -> None:
    answer = get(path, host=host)
    assert answer.status_code == 200
    assert f'"http://{host}"' in answer.text
    assert answer.headers["cache-control"] == "no-store"
    kind = "python" if path.endswith(".py") else "javascript"
    assert re.fullmatch(rf"text/(x-)?{kind}; charset=utf-8", answer.headers["content-type"])


@pytest.mark.parametrize("host", ['x"+alert(1)+"', "x\\n", "x\\u0022;", "a b", "x/*", "x`", "[::1", "x:y"])
def test_no_host_header_becomes_code(host: str) -> None:
    for path in kit.FILES:
        assert get(path, host=host).text == get(path, host="localhost:8000").text


def test_both_names_of_the_script_are_one_file() -> None:
    assert get("/fal-local.js").text == get("/fal-local.cjs").text


PLATFORM = [
    *(f"https://{host}/fal-ai/lcm/a%20b?logs=1" for host in addressing._HOSTS),
    "wss://fal.run/fal-ai/lcm/realtime?fal_jwt_token=t",
    "https://1-lcm.gateway.alpha.fal.ai/",
    "wss://1-lcm.gateway.alpha.fal.ai/ws?fal_jwt_token=t",
    "https://1-lcm.gateway.alpha.fal.ai/fal/queue/submit/sub?fal_webhook=https%3A%2F%2Fme%2F",
    "https://1-lcm.gateway.alpha.fal.ai/fal/queue/requests/R/status?logs=0",
    "https://1-lcm.gateway.alpha.fal.ai/fal/queue/requests/R/response",
    "https://1-lcm.gateway.alpha.fal.ai/fal/queue/requests/R/cancel/",
    "https://1-lcm.gateway.alpha.fal.ai/fal/queue/requests/R/nothing",
]
ELSEWHERE = [
    "https://example.org/fal.run/",
    "https://fal.run.example.org/x",
    "https://notfal.run/x",
    "https://gateway.alpha.fal.ai/x",
    "https://fal.run@example.org/x",
    "http://localhost:1/run/x",
    "/relative",
    "wss://example.org/",
]
PROBE = """
const asked = [];
globalThis.fetch = async (address, options) => asked.push(String(address)) && { options };
globalThis.WebSocket = class { static OPEN = 1; constructor(address) { asked.push(String(address)); } };
require(process.argv[1]);
(async () => {
  const addresses = JSON.parse(process.argv[2]);
  for (const address of addresses) /^ws/.test(address) ? new WebSocket(address) : await fetch(address, {});
  const sent = { method: "POST", body: "words", headers: { "x-fal-a": "b" } };
  const request = new Request("https://fal.run/fal-ai/lcm", sent);
  const { options } = await fetch(request);
  const body = Buffer.from(options.body).toString();
  const { options: given } = await fetch(new URL("https://rest.fal.ai/tokens/"), { method: "PUT" });
  const moved = [options.method, options.headers.get("x-fal-a"), body, given.method, WebSocket.OPEN];
  console.log(JSON.stringify({ asked, moved }));
})();
"""


@pytest.mark.skipif(shutil.which("node") is None and "CI" not in os.environ, reason="THE SCRIPT IS NOT TESTED: no node")
def test_the_script_and_the_server_map_the_same_addresses() -> None:
    words = ["node", "-e", PROBE, str(KIT / "fal-local.js"), json.dumps(PLATFORM + ELSEWHERE)]
    environ = {**os.environ, "FAL_LOCAL": "http://here:1/"}
    told = json.loads(subprocess.check_output(words, text=True, env=environ, timeout=60))

    def here(address: str) -> str:
        scheme, host, path, query = re.fullmatch(r"(\w+)://([^/]+)([^?]*)(.*)", address).groups()  # type: ignore[union-attr]
        return f"{scheme.removesuffix('s')}://here:1{addressing.internal_path(host, path)}{query}"

    assert told["asked"][: len(PLATFORM)] == [here(address) for address in PLATFORM]
    assert told["asked"][len(PLATFORM) : -2] == ELSEWHERE
    assert told["asked"][-2:] == ["http://here:1/run/fal-ai/lcm", "http://here:1/rest/tokens/"]
    assert told["moved"] == ["POST", "b", "words", "PUT", 1]


@pytest.fixture
def redirected(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The client's globals are put back after the test."""
    for name in GLOBALS:
        monkeypatch.setattr(fal_client.client, name, getattr(fal_client.client, name))
    monkeypatch.setenv("FAL_KEY", "a:b")
    return monkeypatch


def test_the_module_redirects_when_it_is_imported(redirected: pytest.MonkeyPatch) -> None:
    redirected.setenv("FAL_LOCAL", "https://here:1/")
    runpy.run_path(str(KIT / "fal_local.py"), run_name="fal_local")
    assert [getattr(fal_client.client, name) for name in GLOBALS] == [
        "https://here:1/run/",
        "https://here:1/queue/",
        "wss://here:1/run/",
        "https://here:1/rest",
        "https://here:1/cdn",
    ]
    assert os.environ["FAL_KEY"] == "a:b"
    redirected.delenv("FAL_KEY")
    redirected.delenv("FAL_LOCAL")
    runpy.run_path(str(KIT / "fal_local.py"), run_name="sitecustomize")
    assert fal_client.client.REALTIME_URL_FORMAT == "ws://localhost:8000/run/"
    assert os.environ["FAL_KEY"] == "local"


def test_without_the_client_only_programs_that_ask_for_it_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fal_client", None)
    runpy.run_path(str(KIT / "fal_local.py"), run_name="sitecustomize")
    with pytest.raises(ModuleNotFoundError):
        runpy.run_path(str(KIT / "fal_local.py"), run_name="fal_local")


def test_the_module_runs_a_program_unchanged(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("import fal_client.client\nurl = fal_client.client.REST_URL\n")
    program = tmp_path / "app.py"
    program.write_text("import sys, beside\nprint(__name__, beside.url, *sys.argv[1:])\n")
    (tmp_path / "kit").mkdir()
    shutil.copy(KIT / "fal_local.py", tmp_path / "kit")
    words = [sys.executable, "-m", "fal_local", str(program), "--flag", "word"]
    environ = {**os.environ, "FAL_LOCAL": "http://here:1"}
    said = subprocess.check_output(words, text=True, env=environ, cwd=tmp_path / "kit", timeout=60)
    assert said == "__main__ http://here:1/rest --flag word\n"
    told = subprocess.run(words[:3], capture_output=True, text=True, env=environ, cwd=tmp_path / "kit", check=False)
    assert told.returncode == 1
    assert "usage" in told.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> certificates.Certificate:
    hosts = ["Pictures.example.org", "192.0.2.7", "*.studio.lan"]
    return certificates.write(tmp_path_factory.mktemp("tls") / "new" / "folder", hosts)


def handshake(made: certificates.Certificate, host: str, ca: Path | None = None) -> None:
    """A TLS handshake with ``host``, in memory. Raises: ssl.SSLCertVerificationError."""
    server = load_tls(made.cert, made.key)
    assert server
    client = ssl.create_default_context(cafile=str(ca or made.ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[0].version() == "TLSv1.3"


@pytest.mark.parametrize(
    "host",
    [*addressing._HOSTS, "localhost", "127.0.0.1", "::1"]
    + ["110602490-lcm-sd15-i2i.gateway.alpha.fal.ai", "pictures.example.org", "192.0.2.7", "a.studio.lan"],
)
def test_a_certificate_is_for_every_host(made: certificates.Certificate, host: str) -> None:
    handshake(made, host)


@pytest.mark.parametrize("host", ["example.org", "a.b.gateway.alpha.fal.ai", "127.0.0.2", "fal.ai"])
def test_a_certificate_is_for_no_other_host(made: certificates.Certificate, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch|not valid for"):
        handshake(made, host)


def test_only_its_own_authority_vouches_for_it(made: certificates.Certificate, tmp_path: Path) -> None:
    other = certificates.write(tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, "fal.run", other.ca)
    with pytest.raises(OSError, match="not a certificate and its key"):
        load_tls(made.cert, other.key)


def test_only_the_owner_reads_the_key_and_nobody_has_the_authoritys(made: certificates.Certificate) -> None:
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    assert {path.name for path in made.key.parent.iterdir()} == {"ca.pem", "cert.pem", "key.pem"}
    assert sum("PRIVATE KEY" in path.read_text() for path in made.key.parent.iterdir()) == 1


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("mine")
    with pytest.raises(FileExistsError, match=r"cert\.pem"):
        certificates.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cert.pem"]
    assert (tmp_path / "cert.pem").read_text() == "mine"


@pytest.mark.parametrize(
    "host", ["", "a b", "-a", "a..b", "*", "*.a", "*.*.a", "a.*.b", "http://a", "a:1", "é", "a" * 64, "a." * 127]
)
def test_what_is_no_host_is_told(tmp_path: Path, host: str) -> None:
    with pytest.raises(InputError, match="host"):
        certificates.write(tmp_path, [host])
    assert not list(tmp_path.iterdir())


def test_a_certificate_is_good_from_yesterday_on(tmp_path: Path) -> None:
    from cryptography import x509

    files = certificates.write(tmp_path, now=datetime(2031, 5, 2, tzinfo=UTC))
    cert = x509.load_pem_x509_certificate(files.cert.read_bytes())
    assert cert.not_valid_before_utc == datetime(2031, 5, 1, tzinfo=UTC)
    assert (cert.not_valid_after_utc - cert.not_valid_before_utc).days == 825


def lcm_rt(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lcm_rt", *words], capture_output=True, text=True, timeout=60)


def test_the_command_line_makes_a_certificate_once(tmp_path: Path) -> None:
    folder = str(tmp_path / "tls")
    done = lcm_rt("certificate", folder, "--host", "studio.lan")
    assert done.returncode == 0, done.stderr
    assert f"lcm-rt serve --tls-cert {folder}/cert.pem --tls-key {folder}/key.pem" in done.stdout
    made = certificates.Certificate(*(Path(folder, f"{name}.pem") for name in ("ca", "cert", "key")))
    handshake(made, "studio.lan")
    again = lcm_rt("certificate", folder)
    assert (again.returncode, "there already" in again.stderr) == (1, True)
    assert lcm_rt("certificate", str(tmp_path / "no"), "--host", "a b").returncode == 1


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--tls-key", "/nowhere/key.pem"], "a key without its certificate"),
        (["--tls-cert", "/nowhere/cert.pem"], "/nowhere/cert.pem: No such file"),
        (["--tls-cert", __file__], "not a certificate and its key"),
    ],
)
def test_wrong_files_are_told_before_anything_starts(tmp_path: Path, words: list[str], complaint: str) -> None:
    done = lcm_rt("serve", "--port", "0", "--data-dir", str(tmp_path / "data"), *words)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_server_speaks_https_and_wss(made: certificates.Certificate, tmp_path: Path) -> None:
    words = [
        "serve",
        "--port",
        "0",
        "--data-dir",
        str(tmp_path),
        "--tls-cert",
        str(made.cert),
        "--tls-key",
        str(made.key),
    ]
    command = [sys.executable, "-m", "lcm_rt", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as process:
        assert process.stderr
        try:
            match = re.search(r"https://localhost:(\d+)/", process.stderr.readline())
            assert match
            tls = ssl.create_default_context(cafile=str(made.ca))
            with urllib.request.urlopen(f"https://localhost:{match[1]}/fal-local.js", context=tls) as answer:
                assert f'"https://localhost:{match[1]}"' in answer.read().decode()
            with connect(f"wss://127.0.0.1:{match[1]}/fal-ai/no-such-app/realtime", ssl=tls) as client:
                assert "no-such-app" in client.recv(timeout=20)
            with pytest.raises(OSError):  # plain HTTP is not answered there
                urllib.request.urlopen(f"http://127.0.0.1:{match[1]}/health/live", timeout=20)
        finally:
            process.terminate()
            process.wait(20)
            process.kill()
