"""One realtime connection's state: which message runs, waits or is dropped; knows no socket, no clock, no model.

Call order, for the shell around it: ``receive`` each frame; cancel with the engine whatever it returns that was taken
(what is parked, ``answer`` at once); ``take`` messages while it gives some and run them; tell it ``begun``; ``answer``
each taken message exactly once (or ``retry`` it); send the replies that ``answer`` returns, in that order, and tell it
``sent`` for each.

The rules it keeps:

* At most ``WINDOW`` messages are past the mailbox, so that the next one is decoded while the current one is stepped.
* At most ``max_buffering`` messages wait, in the mailbox or decoded; when one more comes, the oldest of them is
  dropped. With 1 that is *latest wins*. What has begun is never dropped, and neither is the newest message.
* Replies leave in the order of their messages.
* A client that does not read gets no more work done for it: a reply counts as in the window until it is sent.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

WINDOW = 2
MAX_WAITING_BYTES = 64 * 2**20
"""However many messages may wait, together they take no more than this, but for the newest."""

Reply = TypeVar("Reply")


@dataclass(eq=False, slots=True)
class Message(Generic[Reply]):
    """One frame on its way through a session; ``frame`` is as it came from the socket."""

    number: int
    frame: bytes | str
    begun: bool = False
    answered: bool = False
    retried: bool = False
    dropped: bool = False
    parked: bool = False
    replies: list[Reply] = field(default_factory=list)


class Session(Generic[Reply]):
    """The mailbox, order and counts of one connection.

    Args:
        max_buffering: how many messages may wait, 1 to 60.
    """

    def __init__(self, max_buffering: int = 1) -> None:
        self.max_buffering = max_buffering
        self.received = 0
        self.superseded = 0
        self._mailbox: deque[Message[Reply]] = deque()
        self._open: deque[Message[Reply]] = deque()  # taken and not wholly delivered, in order
        self._unsent = 0

    def receive(self, frame: bytes | str) -> list[Message[Reply]]:
        """Put a frame into the mailbox.

        Returns: messages already taken that must make room: cancel them with the engine unless they have begun there,
            and ``answer`` them with no reply once that is sure.
        """
        self.received += 1
        self._mailbox.append(Message(self.received, frame))
        ahead = [m for m in self._open if not (m.begun or m.answered or m.dropped)]
        if not any(m.begun and not m.answered for m in self._open):
            # The one on its way to the engine goes on, or a client that is faster than the decoder would see nothing.
            first = next((m for m in ahead if not m.parked), None)
            ahead = [m for m in ahead if m is not first]
        surplus = len(ahead) + len(self._mailbox) - self.max_buffering
        victims = ahead[: max(surplus, 0)]
        for message in victims:
            message.dropped = True
        for _ in range(surplus - len(victims)):
            self._mailbox.popleft()
            self.superseded += 1
        while len(self._mailbox) > 1 and sum(len(m.frame) for m in self._mailbox) > MAX_WAITING_BYTES:
            self._mailbox.popleft()
            self.superseded += 1
        return victims

    def take(self) -> Message[Reply] | None:
        """The oldest message that waits, or None while the window is full or nothing waits."""
        if not self._mailbox or len(self._open) + self._unsent >= WINDOW:
            return None
        message = self._mailbox.popleft()
        self._open.append(message)
        return message

    def begun(self, message: Message[Reply]) -> None:
        """The engine has started on ``message``: from here on it is not replaced by a newer one."""
        message.begun = True

    def retry(self, message: Message[Reply]) -> bool:
        """Put a taken message that was lost back into the mailbox, once, unless a newer one waits there.

        So the last message that a client sent is rendered even when the engine process dies under it.

        Returns: whether it was put back; if not, ``answer`` it.
        """
        if message.retried or message.dropped or self._mailbox or self._open[-1] is not message:
            return False
        self._open.remove(message)
        message.retried, message.begun = True, False
        self._mailbox.append(message)
        return True

    def park(self, message: Message[Reply]) -> None:
        """A taken message cannot begin yet, for no fault of its own: it keeps its place, but newer ones may drop it."""
        message.parked, message.begun = True, False

    def unpark(self, message: Message[Reply]) -> None:
        """Now it can."""
        message.parked = False

    def answer(self, message: Message[Reply], *replies: Reply) -> list[Reply]:
        """Settle a taken message; without replies it counts as superseded.

        Returns: the replies that may leave now, in order.
        """
        message.answered = True
        message.replies = list(replies)
        message.frame = b""  # it may be large, and its reply may have to wait for an earlier one
        if not replies:
            self.superseded += 1
            self._open.remove(message)
        ready: list[Reply] = []
        while self._open and self._open[0].answered:
            ready += self._open.popleft().replies
        self._unsent += len(ready)
        return ready

    def leads(self, message: Message[Reply]) -> bool:
        """No earlier message is unanswered: what is known of this one already may be shown."""
        return bool(self._open) and self._open[0] is message

    def sent(self) -> None:
        """One of the replies has left."""
        self._unsent -= 1

    @property
    def idle(self) -> bool:
        """Every message is answered, and every reply sent."""
        return not self._mailbox and not self._open and not self._unsent

    @property
    def waiting(self) -> int:
        """Messages in the mailbox."""
        return len(self._mailbox)
