"""What the server says of itself is valid, complete and true: schemathesis asks for everything that is described."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jsonschema_rs
import msgpack
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.definitions import OPENAPI_31
from serving import Server, model_folder, run, serving, serving_aside
from starlette.routing import Route

from lcm_rt import webhooks
from lcm_rt.server import about
from lcm_rt.server.about import ABOUT, CHANNELS, EVENTS, PARAMETERS
from lcm_rt.server.app import ROUTES, WEB_DIR, create_app
from lcm_rt.server.description import Description
from lcm_rt.settings import Settings
from lcm_rt.types import SIZES, GenerateInput

OPENAPI = Description(ROUTES).openapi
ASYNCAPI = Description(ROUTES).asyncapi
OPERATIONS = [
    (method, path, operation) for path, item in OPENAPI["paths"].items() for method, operation in item.items()
]


def references(node: Any) -> Iterator[str]:
    """Every ``$ref`` in a document."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def resolved(document: Any, reference: str) -> Any:
    for key in reference.removeprefix("#/").split("/"):
        document = document[key.replace("~1", "/").replace("~0", "~")]
    return document


def conforms(document: Any, name: str, said: Any) -> None:
    """Fail unless ``said`` is as the schema ``name`` of ``document`` has it."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema_rs.validator_for(schema).validate(said)


# ---- the documents ---------------------------------------------------------------------------------------------------


def test_openapi_is_valid() -> None:
    jsonschema_rs.validator_for(OPENAPI_31).validate(OPENAPI)
    for schema in OPENAPI["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    for reference in references(OPENAPI):
        resolved(OPENAPI, reference)
    named = [operation["operationId"] for _, _, operation in OPERATIONS if "operationId" in operation]
    assert len(set(named)) == len(named)


def test_every_route_is_described_and_every_description_has_a_route(tmp_path: Path) -> None:
    app = create_app(Settings(models=[model_folder(tmp_path / "model")], data_dir=tmp_path))
    routes = {
        (method, route.path.replace(":path}", "}"))
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == {(method.upper(), path) for method, path, _ in OPERATIONS}
    assert set(ABOUT) == {entry.handler for entry in ROUTES}
    assert set(PARAMETERS) == {name for said in ABOUT.values() for name in said.parameters}
    assert set(about.INPUTS) >= {said.body for said in ABOUT.values() if isinstance(said.body, type)}
    schemas = {reference.rpartition("/")[2] for reference in references(OPENAPI) if "/schemas/" in reference}
    assert schemas == set(OPENAPI["components"]["schemas"])


def test_a_route_of_which_nothing_is_said_is_an_error() -> None:
    async def unheard_of(request: Any) -> Any: ...

    with pytest.raises(KeyError):
        _ = Description([ROUTES[0]._replace(handler=unheard_of)]).openapi


def test_needs_are_told() -> None:
    for entry in ROUTES:
        for method in entry.methods.lower().split():
            operation = OPENAPI["paths"][entry.path.replace(":path}", "}")][method]
            schemes = [name for requirement in operation.get("security", []) for name in requirement]
            if entry.need in ("generate", "admin"):
                assert schemes == ["key", "bearer", *(["token"] if entry.by_token else [])]
                assert operation["security"][0] == {"key": [entry.need]}
                assert {"401", "403", "429", "503"} <= set(operation["responses"])
            elif entry.need == "signed":
                assert set(schemes) in ({"signature"}, {"storage", "key", "bearer"})
            else:
                assert not schemes or {} in operation["security"]  # a key is heeded, not asked for


def test_every_error_has_the_form_of_its_dialect() -> None:
    for _, path, operation in OPERATIONS:
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                names = set(map(str, references(response["content"])))
                form = "OpenAIError" if path.startswith("/v1/") else "Error"
                allowed = {form} | ({"NotCancelled"} if path.rstrip("/").endswith("/cancel") else set())
                assert {name.rpartition("/")[2] for name in names} <= allowed
        assert "500" in operation["responses"]
        assert ("400" if path.startswith("/v1/images") else "500") in operation["responses"]


def test_the_input_is_described_as_it_is_read() -> None:
    schema = OPENAPI["components"]["schemas"]["GenerateInput"]
    assert set(schema["properties"]) == set(GenerateInput.model_fields)
    assert schema["required"] == ["prompt"]
    sizes = schema["properties"]["image_size"]["anyOf"]
    assert {"type": "string", "enum": list(SIZES)} in sizes
    query = {parameter["name"] for parameter in OPENAPI["paths"]["/run/{app}"]["get"]["parameters"]}
    assert set(GenerateInput.model_fields) - query == {"image_bytes", "image", "mask_bytes"}


def test_asyncapi_holds_together() -> None:
    """There is no validator of it here; these are the rules of its specification that it may break."""
    assert ASYNCAPI["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= set(ASYNCAPI["info"])
    for reference in references(ASYNCAPI):
        resolved(ASYNCAPI, reference)
    assert set(ASYNCAPI["channels"]) == set(CHANNELS)
    for channel in ASYNCAPI["channels"].values():
        assert set(re.findall(r"\{(\w+)\}", channel["address"])) == set(channel["parameters"])
        assert set(channel["bindings"]) == {"ws"}
        for message in channel["messages"].values():
            assert message["$ref"].startswith("#/components/messages/")
    for operation in ASYNCAPI["operations"].values():
        assert operation["action"] in ("send", "receive")
        channel = operation["channel"]["$ref"]
        assert all(message["$ref"].startswith(f"{channel}/messages/") for message in operation["messages"])
    for message in ASYNCAPI["components"]["messages"].values():
        schema = resolved(ASYNCAPI, message["payload"]["$ref"])
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_the_event_of_a_webhook_is_as_described() -> None:
    for said in (
        webhooks.body("id", 200, b'{"a": 1}'),
        webhooks.body("id", 422, b"[]"),
        webhooks.body("id", 200, b"{"),
    ):
        conforms(OPENAPI, "JobEvent", json.loads(said))


# ---- a live server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("description")
    models = [model_folder(folder / name, name) for name in ("fake", "spare")]
    many = {"max_jobs": 100_000, "max_jobs_per_owner": 100_000}
    with serving_aside(folder, models=models, max_side=128, lora_hub=False, **many) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http, verify=False, timeout=30) as http:
        yield http


def test_the_documents_are_served(http: httpx.Client) -> None:
    assert http.get("/openapi.json").json() == json.loads(json.dumps(OPENAPI))
    assert http.get("/asyncapi.json").json() == json.loads(json.dumps(ASYNCAPI))


def test_the_page_asks_nobody_else(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe-eval" not in policy
    assert "script-src 'self';" in policy
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(linked) >= 4
    for link in linked:
        assert link.startswith("/")
        assert http.get(link).status_code == 200
    assert not re.search(r"<script(?![^>]* src=)", page.text), "the policy would not let it run"
    assert "validatorUrl: null" in http.get("/docs.js").text
    assert WEB_DIR and (WEB_DIR / "vendor/swagger-ui/LICENSE").is_file()


def events_of(answer: requests.Response | httpx.Response) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/run/fal-ai/lcm/stream", {"prompt": "x", "request_id": "r"}),
        ("/run/fal-ai/lcm/stream", {"prompt": "nan"}),
        ("/v1/images/generations", {"prompt": "x", "stream": True, "partial_images": 3}),
        ("/v1/images/generations", {"prompt": "nan", "stream": True}),
    ],
)
def test_events_are_as_described(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = http.post(path, json=body)
    assert answer.headers["content-type"].startswith(EVENTS)
    said = OPENAPI["paths"][path.replace("fal-ai/lcm", "{app}")]["post"]["responses"]["200"]["content"][EVENTS]
    schema = said["schema"]["properties"]["data"]["contentSchema"] | {"components": OPENAPI["components"]}
    events = events_of(answer)
    assert events
    for event in events:
        jsonschema_rs.validator_for(schema).validate(event)


def test_events_of_models_and_jobs_are_as_described(http: httpx.Client) -> None:
    with http.stream("GET", "/models/events") as answer:  # without end, so only its first event is read
        line = next(line for line in answer.iter_lines() if line.startswith("data: "))
        conforms(OPENAPI, "ModelList", json.loads(line.removeprefix("data: ")))
    job = http.post("/queue/fal-ai/lcm", json={"prompt": "x"}).json()
    events = events_of(http.get(f"{job['status_url']}/stream?logs=1"))
    assert events[-1]["status"] == "COMPLETED"
    for event in events:
        conforms(OPENAPI, "JobStatus", event)


@run
async def test_frames_of_sockets_are_as_described(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        async with server.connect() as client:
            for sent, name in (
                ({"prompt": "x", "previews": True, "request_id": 7}, "RealtimePictures"),
                ({"prompt": "x", "image": b"junk"}, "RealtimeError"),
                ({"prompt": 5}, "RealtimeError"),
                ({"prompt": "nan"}, "RealtimeError"),
            ):
                for frame in (msgpack.packb(sent), json.dumps(sent, default=lambda data: "anVuaw==")):
                    await client.send(frame)
                    while True:
                        said = await client.recv()
                        data = json.loads(said) if isinstance(said, str) else _as_json(msgpack.unpackb(said))
                        if not data.get("preview"):
                            break
                        conforms(ASYNCAPI, "RealtimePreview", data)
                    conforms(ASYNCAPI, name, data)
        async with server.connect("/ws/fal-ai/lcm") as client:
            for prompt, name in (("x", "Pictures"), (5, "Error")):
                await client.send(json.dumps({"prompt": prompt}))
                for model in ("OneshotStart", name, "OneshotEnd"):
                    conforms(ASYNCAPI, model, json.loads(await client.recv()))
    async with serving(tmp_path, keys=True) as server, server.connect() as client:
        conforms(ASYNCAPI, "RealtimeUnauthorized", json.loads(await client.recv()))


def _as_json(data: Any) -> Any:
    """Msgpack with its bytes as text, because a schema has no other."""
    if isinstance(data, dict):
        return {key: _as_json(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_as_json(value) for value in data]
    return "bytes" if isinstance(data, bytes) else data


# ---- schemathesis ----------------------------------------------------------------------------------------------------

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance, response_headers_conformance]
ENDLESS = {"get /models/events"}
LABELS = [f"{method} {path}" for method, path, _ in OPERATIONS if f"{method} {path}" not in ENDLESS]
FIRST = [f"{method} {path}" for method, path, operation in OPERATIONS if "operationId" in operation]


class Fuzz:
    """Cases for a live server, of which some meet what is there: an app, a job, a file, an upload, a model."""

    def __init__(self, server: Server) -> None:
        self._url = server.http
        self._session = requests.Session()
        fuzzed = json.loads(json.dumps(OPENAPI))
        for item in fuzzed["paths"].values():
            for operation in item.values():
                # Receivers would be asked for on other hosts, and no test goes there.
                kept = [one for one in operation.get("parameters", ()) if one["name"] != "fal_webhook"]
                operation["parameters"] = kept
        self._schema = schemathesis.openapi.from_dict(fuzzed)

    def close(self) -> None:
        self._session.close()

    def ask(self, label: str, examples: int) -> None:
        """Send ``examples`` cases of one operation. Raises: FailureGroup: an answer is not as described."""
        method, path = label.split(" ", 1)
        operation = self._schema[path][method]
        known = self._known(path)
        strategies = [operation.as_strategy(mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
        positive, negative = strategies
        cases = st.one_of(positive, positive.map(lambda case: self._at(case, known)), negative)
        if not operation.body and not operation.query and not known:
            cases = positive

        @settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def every(case: schemathesis.Case) -> None:
            response = case.call(base_url=self._url, session=self._session, timeout=20)
            # A deadline of the client's own may be too short, and that is all that may be a matter of the server.
            assert response.status_code < 500 or response.status_code == 504, response.text
            case.validate_response(response, checks=CHECKS)

        every()

    def _at(self, case: schemathesis.Case, known: dict[str, Any]) -> schemathesis.Case:
        parameters = case.path_parameters or {}
        case.path_parameters = {**parameters, **{name: known[name] for name in parameters if name in known}}
        if "signature" in known:
            case.query = {**(case.query or {}), "signature": known["signature"]}
        if isinstance(case.body, dict) and "image" in known:
            case.body = {**case.body, **{name: known["image"] for name in ("image", "mask") if name in case.body}}
        return case

    def _known(self, path: str) -> dict[str, Any]:
        post = self._session.post
        if "{id}" in path:
            return {
                "app": "fal-ai/lcm",
                "id": post(f"{self._url}/queue/fal-ai/lcm", json={"prompt": "x"}).json()["request_id"],
            }
        if "/upload/{name}" in path:
            url = post(f"{self._url}/rest/storage/upload/initiate", json={}).json()["upload_url"]
            name, _, signature = url.rpartition("/")[2].partition("?signature=")
            return {"name": name, "signature": signature, "number": 1}
        if "{upload}" in path:
            begun = post(f"{self._url}/files/upload/multipart").json()
            return {"name": begun["access_url"].rpartition("/")[2], "upload": begun["uploadId"], "number": 1}
        if path.endswith("/edits"):
            picture = io.BytesIO()
            Image.new("RGBA", (64, 64)).save(picture, "PNG")
            return {"image": picture.getvalue()}
        if "files/{name}" in path:
            url = post(f"{self._url}/files/upload", data=b"GIF89a").json()["access_url"]
            return {"name": url.rpartition("/")[2]}
        return {"app": "fal-ai/lcm", "name": "spare"} if "{" in path else {}


@pytest.fixture(scope="module")
def fuzz(server: Server) -> Iterator[Fuzz]:
    fuzz = Fuzz(server)
    yield fuzz
    fuzz.close()


@pytest.mark.parametrize("label", [label for label in FIRST if label not in ENDLESS])
def test_every_answer_is_as_described(fuzz: Fuzz, label: str) -> None:
    fuzz.ask(label, 12)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("label", LABELS)
def test_every_answer_is_as_described_at_length(fuzz: Fuzz, label: str) -> None:
    fuzz.ask(label, 200)
