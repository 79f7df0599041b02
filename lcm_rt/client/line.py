"""A realtime session's memory: what is to be said, what was said and not answered yet; knows no socket and no clock.

The rules it keeps:

* Of what cannot be sent yet, only the newest ``max_buffering`` messages are kept. With 1 that is *latest wins*.
* Answers come in the order of their messages, so an answer tells that older ones will have none: they are superseded.
* When the connection is lost, the newest message goes out again, over the next one, unless a newer one waits already.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lcm_rt.client import messages
from lcm_rt.client.values import Output, Preview
from lcm_rt.errors import LcmError, Superseded, Unauthorized

Waiter = TypeVar("Waiter")


@dataclass(eq=False, slots=True)
class Message(Generic[Waiter]):
    """What was asked; its number goes out as its ``request_id``, and the caller's own comes back in the answer."""

    number: int
    fields: Mapping[str, Any]
    waiter: Waiter | None

    def frame(self) -> bytes:
        """What is sent. It reads files. Raises: InputError, ImageError, TooLarge."""
        return messages.to_frame({**messages.prepare(self.fields), "request_id": self.number})


Settled = list[tuple[Message[Waiter], Output | LcmError]]


@dataclass(slots=True)
class Heard(Generic[Waiter]):
    """What a frame tells: which messages are settled by what, a preview, an error of the connection itself."""

    settled: Settled[Waiter]
    preview: Preview | None = None
    refusal: LcmError | None = None


class Line(Generic[Waiter]):
    """The messages of one session.

    Args:
        max_buffering: how many messages may wait to be sent.
    """

    def __init__(self, max_buffering: int = 1) -> None:
        self._max_buffering = max_buffering
        self._numbers = itertools.count(1)
        self._unsent: deque[Message[Waiter]] = deque()
        self._unanswered: dict[int, Message[Waiter]] = {}  # in order

    @property
    def idle(self) -> bool:
        """Nothing to say, and nothing to hear."""
        return not self._unsent and not self._unanswered

    def post(self, fields: Mapping[str, Any], waiter: Waiter | None = None) -> Settled[Waiter]:
        """Have a message sent; those that it replaces are settled."""
        self._unsent.append(Message(next(self._numbers), fields, waiter))
        return [_superseded(self._unsent.popleft()) for _ in range(len(self._unsent) - self._max_buffering)]

    def take(self) -> Message[Waiter] | None:
        """The message to be sent now; from here on an answer is owed to it."""
        if not self._unsent:
            return None
        message = self._unsent.popleft()
        self._unanswered[message.number] = message
        return message

    def refuse(self, message: Message[Waiter], error: LcmError) -> Settled[Waiter]:
        """A message that was taken cannot be sent at all."""
        return [(message, error)] if self._unanswered.pop(message.number, None) else []

    def hear(self, frame: bytes | str) -> Heard[Waiter]:
        """A frame of the server; one that is none of its is a refusal too."""
        try:
            return self._hear(messages.from_frame(frame))
        except LcmError as error:
            return Heard([], refusal=error)

    def _hear(self, data: dict[str, Any]) -> Heard[Waiter]:
        kind, number = data.get("type"), data.get("request_id")
        message = self._unanswered.get(number) if isinstance(number, int) else None
        if kind == "x-fal-message" or data.get("error") == "TIMEOUT":
            return Heard([])
        if data.get("status") == "error":
            return Heard([], refusal=Unauthorized("the server does not know this key"))
        if kind == "x-fal-error":
            error = messages.error_of(data, code=data.get("error"))
            return Heard(self._settle(message, error)) if message else Heard([], refusal=error)
        if message is None:
            return Heard([])  # not asked for over this connection
        data["request_id"] = message.fields.get("request_id")
        if data.get("preview"):
            return Heard([], preview=messages.preview_of(data))
        return Heard(self._settle(message, messages.output_of(data, {})))

    def _settle(self, message: Message[Waiter], answer: Output | LcmError) -> Settled[Waiter]:
        older = list(itertools.takewhile(lambda number: number != message.number, self._unanswered))
        settled: Settled[Waiter] = [_superseded(self._unanswered.pop(number)) for number in older]
        del self._unanswered[message.number]
        return [*settled, (message, answer)]

    def lost(self) -> Settled[Waiter]:
        """The connection is gone: put the newest message back, if it was sent; the others are settled."""
        sent = list(self._unanswered.values())
        self._unanswered.clear()
        if sent and not self._unsent:
            self._unsent.append(sent.pop())
        return [_superseded(message) for message in sent]

    def clear(self, error: LcmError) -> Settled[Waiter]:
        """Give all of them up, because of ``error``."""
        dropped = [*self._unanswered.values(), *self._unsent]
        self._unanswered.clear()
        self._unsent.clear()
        return [(message, error) for message in dropped]


def _superseded(message: Message[Waiter]) -> tuple[Message[Waiter], LcmError]:
    return message, Superseded("a newer message took its place")
