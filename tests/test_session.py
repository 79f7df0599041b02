"""The sans-I/O session: latest wins, order, window, retries."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lcm_rt.session import WINDOW, Message, Session


def take_all(session: Session[str]) -> list[Message[str]]:
    return list(iter(session.take, None))


def test_the_newest_message_wins() -> None:
    session: Session[str] = Session()
    for frame in "abc":
        session.receive(frame)
    message = session.take()
    assert message and message.frame == "c"
    assert session.take() is None
    assert session.superseded == 2


def test_one_is_stepped_and_one_waits_decoded() -> None:
    session: Session[str] = Session()
    session.receive("a")
    a = session.take()
    assert a
    session.begun(a)
    session.receive("b")
    b = session.take()
    assert b
    # c replaces b, which the engine holds but has not begun; a goes on.
    assert session.receive("c") == [b]
    assert session.take() is None, "the window is full until the engine has let go of b"
    assert session.answer(b) == []
    c = session.take()
    assert c and c.frame == "c"
    assert session.answer(c, "C") == [], "c may not overtake a"
    assert session.answer(a, "A") == ["A", "C"]
    assert session.superseded == 1


def test_a_message_that_begins_while_it_is_being_replaced_is_answered() -> None:
    session: Session[str] = Session()
    for frame in "ab":
        session.receive(frame)
        message = session.take()
        assert message
        if frame == "a":
            session.begun(message)
    assert session.receive("c") == [message]
    session.begun(message)  # the engine was faster
    assert session.answer(message, "B") == []
    assert session.superseded == 0


def test_a_client_faster_than_the_decoder_sees_pictures() -> None:
    session: Session[str] = Session()
    session.receive("a")
    (a,) = take_all(session)
    for number in range(100):
        assert a not in session.receive(str(number)), "nothing has begun yet: the one on its way goes on"
    session.begun(a)
    assert session.answer(a, "A") == ["A"]


def test_waiting_messages_are_bounded_in_bytes_too() -> None:
    session: Session[str] = Session(max_buffering=60)
    for _ in range(30):
        session.receive(b"x" * 10_000_000)
    assert session.waiting == 6
    assert session.superseded == 24


def test_buffering_keeps_that_many() -> None:
    session: Session[str] = Session(max_buffering=3)
    for frame in "abcde":
        session.receive(frame)
    taken = []
    while message := session.take():
        taken.append(message.frame)
        session.begun(message)
        session.answer(message, "reply")
        session.sent()
    assert taken == ["c", "d", "e"]


def test_a_client_that_does_not_read_gets_no_more_work() -> None:
    session: Session[str] = Session(max_buffering=60)
    for number in range(10):
        session.receive(str(number))
    for message in take_all(session):
        session.begun(message)
        session.answer(message, "reply")
    assert session.take() is None
    session.sent()
    assert len(take_all(session)) == 1


def test_the_newest_message_is_retried_once() -> None:
    session: Session[str] = Session()
    session.receive("a")
    session.receive("b")
    (b,) = take_all(session)
    session.begun(b)
    assert session.retry(b)
    assert session.take() is b
    assert not session.retry(b)
    assert session.answer(b, "lost") == ["lost"]


def test_a_lost_message_is_not_retried_when_a_newer_one_waits() -> None:
    session: Session[str] = Session()
    session.receive("a")
    (a,) = take_all(session)
    session.begun(a)
    session.receive("b")
    assert not session.retry(a)


def test_a_parked_message_keeps_its_place_and_gives_way_to_newer_ones() -> None:
    session: Session[str] = Session(max_buffering=2)
    session.receive("a")
    session.receive("b")
    a, b = take_all(session)
    session.park(a)
    assert session.receive("c") == []  # two may wait, and b goes on
    assert session.receive("d") == [a]
    assert session.answer(a) == []
    session.park(b)
    (c,) = take_all(session)
    assert c.frame == "c"
    assert session.receive("e") == [b]


def test_what_is_not_parked_goes_on() -> None:
    session: Session[str] = Session()
    session.receive("a")
    (a,) = take_all(session)
    session.park(a)
    assert session.receive("b") == [a]
    session.answer(a)
    (b,) = take_all(session)
    assert session.receive("c") == []
    session.begun(b)
    assert session.answer(b, "reply") == ["reply"]
    assert session.superseded == 1


class SessionMachine(RuleBasedStateMachine):
    """Any interleaving of client, engine and socket keeps the session's promises."""

    def __init__(self) -> None:
        super().__init__()
        self.session: Session[int] = Session(max_buffering=2)
        self.sent_frames = 0
        self.open: list[Message[int]] = []
        self.outbox: list[int] = []
        self.delivered: list[int] = []

    @rule()
    def receive(self) -> None:
        self.sent_frames += 1
        for message in self.session.receive(str(self.sent_frames)):
            assert message in self.open and not message.begun
            if message.parked:
                self.open.remove(message)
                self.outbox += self.session.answer(message)

    @rule()
    def take(self) -> None:
        if message := self.session.take():
            assert message.number == int(message.frame)
            self.open.append(message)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.session.begun(data.draw(st.sampled_from(self.open)))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        message = data.draw(st.sampled_from(self.open))
        self.open.remove(message)
        # The engine lets go of a dropped message only if it has not begun.
        replies = () if message.dropped and not message.begun else (message.number,)
        self.outbox += self.session.answer(message, *replies)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        message = data.draw(st.sampled_from(self.open))
        self.open.remove(message)
        if not self.session.retry(message):
            self.outbox += self.session.answer(message, message.number)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        message = data.draw(st.sampled_from(self.open))
        if not message.dropped:
            self.session.park(message)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def unpark(self, data: st.DataObject) -> None:
        self.session.unpark(data.draw(st.sampled_from(self.open)))

    @precondition(lambda self: self.outbox)
    @rule()
    def send(self) -> None:
        self.delivered.append(self.outbox.pop(0))
        self.session.sent()

    @invariant()
    def replies_are_in_order(self) -> None:
        assert self.delivered == sorted(set(self.delivered))

    @invariant()
    def the_window_holds(self) -> None:
        assert len(self.open) <= WINDOW
        assert self.session.waiting <= 2
        assert all(message.frame == b"" for message in self.session._open if message.answered)

    def teardown(self) -> None:
        # However it went, the newest message is answered in the end, and every message is accounted for.
        while True:
            self.take()
            if self.open:
                message = self.open.pop(0)
                self.session.begun(message)
                self.outbox += self.session.answer(message, message.number)
            elif not self.outbox and not self.session.waiting:
                break
            while self.outbox:
                self.send()
        assert self.sent_frames in (0, *self.delivered)
        assert len(self.delivered) + self.session.superseded == self.sent_frames


TestSessionMachine = SessionMachine.TestCase


@given(st.lists(st.binary(max_size=3), min_size=1), st.integers(1, 60))
def test_a_burst_leaves_the_newest_messages(frames: list[bytes], size: int) -> None:
    session: Session[str] = Session(size)
    for frame in frames:
        session.receive(frame)
    taken = []
    while message := session.take():
        session.begun(message)
        taken.append(message.frame)
        session.answer(message)
    assert taken == frames[-size:]
