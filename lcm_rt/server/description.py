"""OpenAPI of the HTTP routes and AsyncAPI of the sockets.

Paths, methods and needs are those of the route table, ``about`` has what is said of each handler, and the schemas are
those of the pydantic models that read the input, and of ``shapes``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from http import HTTPStatus
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import lcm_rt
from lcm_rt.errors import LcmError
from lcm_rt.server import openai, shapes
from lcm_rt.server.about import (
    ABOUT,
    CHANNELS,
    DOOR,
    EVENTS,
    INPUTS,
    PARAMETERS,
    PATH_PARAMETERS,
    SECURITY,
    TEXT,
    About,
    Channel,
    Said,
)
from lcm_rt.server.guard import Handler, Need

_INTRODUCTION = """\
Real-time pictures of Latent Consistency Models. Every field is explained in `docs/api.md`.

A server that only its own machine reaches asks nobody for a key. The routes of run, queue, storage and files answer to
the platform's host names too; sockets are described in `/asyncapi.json`."""


_BY_TOKEN: dict[str, list[str]] = {"token": []}


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


class Entry(Protocol):
    """A row of the route table."""

    @property
    def methods(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def handler(self) -> Handler: ...
    @property
    def need(self) -> Need: ...
    @property
    def by_token(self) -> bool: ...


class Description:
    """The description of the routes in ``table``."""

    def __init__(self, table: Sequence[Entry]) -> None:
        self._table = table

    @cached_property
    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document. Raises: KeyError: a handler in the table of which nothing is said."""
        paths: dict[str, dict[str, Any]] = {}
        first: dict[tuple[Handler, str], str] = {}
        for entry in self._table:
            path = re.sub(r"\{(\w+):path\}", r"{\1}", entry.path)
            for method in entry.methods.split():
                operation = _operation(entry, method, path)
                if (known := first.setdefault((entry.handler, method), path)) != path:
                    operation["description"] = f"As `{method} {known}`."
                else:
                    module = entry.handler.__module__.rpartition(".")[2]
                    operation["operationId"] = f"{module}_{entry.handler.__name__}_{method.lower()}"
                paths.setdefault(path, {})[method.lower()] = operation
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "lcm-rt",
                "version": lcm_rt.__version__,
                "description": _INTRODUCTION,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "tags": [{"name": tag} for tag in dict.fromkeys(about.tag for about in ABOUT.values())],
            "paths": paths,
            "webhooks": {
                "jobDone": {
                    "post": {
                        "summary": "A job is done: told to its `fal_webhook`, again until the receiver says 2xx",
                        "requestBody": _request_body(shapes.JobEvent, "application/json"),
                        "responses": {"2XX": {"description": "Taken."}},
                    }
                }
            },
            "components": {
                "schemas": _schemas(_models_said()),
                "securitySchemes": SECURITY,
                "headers": {
                    "ErrorType": {"description": "The `error_type` of the body.", "schema": TEXT},
                    "RetryAfter": {"description": "Seconds after which it may succeed.", "schema": TEXT},
                },
            },
        }

    @cached_property
    def asyncapi(self) -> dict[str, Any]:
        """The AsyncAPI document."""
        return {
            "asyncapi": "3.0.0",
            "info": {
                "title": "lcm-rt, sockets",
                "version": lcm_rt.__version__,
                "description": _SOCKETS,
                "license": {"name": "Apache-2.0"},
            },
            "defaultContentType": "application/json",
            "channels": {name: _channel(channel) for name, channel in CHANNELS.items()},
            "operations": dict(_operations()),
            "components": {
                "messages": {model.__name__: _message(model) for model in _MESSAGES},
                "schemas": _schemas(_MESSAGES),
            },
        }


def _operation(entry: Entry, method: str, path: str) -> dict[str, Any]:
    about = ABOUT[entry.handler]
    parameters = [_path_parameter(name) for name in _names_in(path)]
    parameters += [_parameter(name) for name in about.parameters]
    operation: dict[str, Any] = {"tags": [about.tag], "summary": about.summary}
    if about.body is not None and method == "GET":
        assert isinstance(about.body, type)
        parameters += _query_of(about.body)
    elif about.body is not None:
        operation["requestBody"] = _request_body(about.body, about.media_type)
    if parameters:
        operation["parameters"] = parameters
    if security := _security(entry, about):
        operation["security"] = security
    raises = (*about.raises, *(DOOR if entry.need in ("generate", "admin") else ()), LcmError)
    operation["responses"] = _errors(raises, in_openai=path.startswith(openai.PREFIX)) | {
        str(status): _response(status, said if isinstance(said, tuple) else (said,), about.events)
        for status, said in about.answers.items()
    }
    return operation


def _names_in(path: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", path)


def _path_parameter(name: str) -> dict[str, Any]:
    description, schema = PATH_PARAMETERS[name]
    return {"name": name, "in": "path", "required": True, "description": description, "schema": schema}


def _parameter(name: str) -> dict[str, Any]:
    place, description, schema = PARAMETERS[name]
    return {"name": name, "in": place, "description": description, "schema": schema}


def _query_of(model: type[BaseModel]) -> Iterator[dict[str, Any]]:
    """The fields of ``model`` that a query can spell."""
    schema = model.model_json_schema()
    for name, field in schema["properties"].items():
        kinds = [kind for kind in field.get("anyOf", [field]) if "$ref" not in kind and kind.get("type") != "null"]
        if any("contentEncoding" in kind for kind in kinds):
            continue
        required = name in schema.get("required", ())
        described = {"description": field["description"]} if "description" in field else {}
        kind = {key: value for key, value in kinds[0].items() if key not in ("title", "description")}
        yield {"name": name, "in": "query", "required": required, **described, "schema": kind}


def _security(entry: Entry, about: About) -> list[dict[str, list[str]]]:
    if entry.need in ("open", "signed"):
        return [{name: []} if name else {} for name in about.security]
    roles: list[str] = [entry.need]
    return [{"key": roles}, {"bearer": roles}, *([_BY_TOKEN] if entry.by_token else ())]


def _request_body(said: type[BaseModel] | str, media_type: str) -> dict[str, Any]:
    if isinstance(said, str):
        return {"required": True, "content": {said: {"schema": {}}}}
    return {"required": True, "content": {media_type: {"schema": _reference(said)}}}


def _response(status: int, bodies: Iterable[Said], events: Sequence[type[BaseModel]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for said in bodies:
        if isinstance(said, type):
            content["application/json"] = {"schema": _reference(said)}
        elif said == EVENTS:
            content[said] = {"schema": _event(events)}
        elif said is not None:
            content[said] = {"schema": {"type": "object"} if said == "application/json" else {}}
    response: dict[str, Any] = {"description": _phrase(status)}
    return response | ({"content": content} if content else {})


def _event(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """One event of a stream, whose ``data`` is JSON: for a stream as a whole, schemas have no words."""
    said: dict[str, Any] = {"anyOf": [_reference(model) for model in models]}
    data = {**TEXT, "contentMediaType": "application/json", "contentSchema": said}
    return {"type": "object", "properties": {"event": TEXT, "data": data}, "required": ["data"]}


def _errors(raises: Iterable[type[LcmError]], *, in_openai: bool) -> dict[str, Any]:
    """A response for each status that one of ``raises`` has, with the codes that it may be."""
    codes: dict[int, dict[str, None]] = {}
    for kind in raises:
        status, code = (openai.status_of(kind), openai.code_of(kind)) if in_openai else (kind.status, kind.code)
        codes.setdefault(status, {})[code] = None
    schema = _reference(shapes.OpenAIError if in_openai else shapes.Error)
    headers = {
        "X-Fal-Error-Type": {"$ref": "#/components/headers/ErrorType"},
        "Retry-After": {"$ref": "#/components/headers/RetryAfter"},
    }
    return {
        str(status): {
            "description": f"{_phrase(status)}: {', '.join(f'`{code}`' for code in codes[status])}",
            "headers": headers,
            "content": {"application/json": {"schema": schema}},
        }
        for status in sorted(codes)
    }


def _phrase(status: int) -> str:
    return "Cancelled" if status == 499 else HTTPStatus(status).phrase


def _models_said() -> list[type[BaseModel]]:
    """Every model that is referred to."""
    said: list[Any] = [shapes.Error, shapes.OpenAIError, shapes.JobEvent]
    for about in ABOUT.values():
        said += [about.body, *about.events]
        for bodies in about.answers.values():
            said += bodies if isinstance(bodies, tuple) else (bodies,)
    return list(dict.fromkeys(model for model in said if isinstance(model, type)))


def _schemas(said: Iterable[type[BaseModel]]) -> dict[str, Any]:
    _, schema = models_json_schema(
        [(model, "validation" if model in INPUTS else "serialization") for model in said],
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = schema["$defs"]
    return schemas


# ---- sockets ---------------------------------------------------------------------------------------------------------

_SOCKETS = """\
A binary frame is msgpack, a text frame is JSON, decided per frame; an answer is in the codec of its message, and
control frames are JSON text. Where JSON has base64, msgpack has bytes.

The handshake never fails. Without a key (`Authorization: Key ID:SECRET`) or a token (`fal_jwt_token`) a closed server
says so in a frame, and closes with 1000. A path may also end in `/ws`, or have `/realtime` twice."""

_MESSAGES = list(dict.fromkeys(model for channel in CHANNELS.values() for model in (*channel.sent, *channel.got)))


def _channel(channel: Channel) -> dict[str, Any]:
    models = (*channel.sent, *channel.got)
    return {
        "address": channel.address,
        "description": channel.summary,
        "parameters": {name: {"description": PATH_PARAMETERS[name][0]} for name in _names_in(channel.address)},
        "messages": {model.__name__: {"$ref": f"#/components/messages/{model.__name__}"} for model in models},
        "bindings": {"ws": {"method": "GET", "query": {"type": "object", "properties": channel.query}}},
    }


def _operations() -> Iterator[tuple[str, dict[str, Any]]]:
    """What the server does at each channel, by name."""
    for name, channel in CHANNELS.items():
        for verb, action, models in (("ask", "receive", channel.sent), ("answer", "send", channel.got)):
            messages = [{"$ref": f"#/channels/{name}/messages/{model.__name__}"} for model in models]
            yield f"{name}.{verb}", {"action": action, "channel": {"$ref": f"#/channels/{name}"}, "messages": messages}


def _message(model: type[BaseModel]) -> dict[str, Any]:
    return {"name": model.__name__, "payload": _reference(model)}
