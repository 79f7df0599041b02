"""How long to go on trying what fails: pauses that grow, a number of tries, a deadline."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

from lcm_rt.errors import LcmError, ModelLoading, Overloaded, RequestTimeout, Unavailable

FIRST_S, LONGEST_S = 0.1, 2.0  # in a realtime session somebody looks on


class Patience:
    """For one call, or one stretch without a connection.

    Only what may pass is tried again: ``Overloaded`` and ``Unavailable``. That a model is loading uses up no try.

    Args:
        tries: how often, after the first time; None is without end.
        timeout_s: seconds from now, the tries included; None is without end.
        clock: seconds, monotonic.
    """

    def __init__(
        self, tries: int | None, timeout_s: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tries = tries
        self._timeout_s = timeout_s
        self._clock = clock
        self._begun_at = clock()
        self._failures = 0

    def left_s(self) -> float | None:
        """Seconds until the deadline, if there is one. Raises: RequestTimeout: it has passed."""
        left = self._left_s()
        if left <= 0:
            raise RequestTimeout(f"there was no answer within {self._timeout_s:g} s")
        return None if self._timeout_s is None else left

    def _left_s(self) -> float:
        return math.inf if self._timeout_s is None else self._begun_at + self._timeout_s - self._clock()

    def renew(self) -> None:
        """Something worked: the tries begin anew, the deadline stays."""
        self._failures = 0

    def pause(self, error: LcmError, retry_after_s: float = 0.0) -> float:
        """Seconds to wait before the next try, at random around what is due, so that not all come back at once.

        Args:
            retry_after_s: how long the server asks to be left alone.

        Raises: LcmError: ``error``, once it is of no use to go on.
        """
        due = min(FIRST_S * 2.0 ** min(self._failures, 10), LONGEST_S)
        pause = max(due * random.uniform(0.5, 1.5), retry_after_s * random.uniform(1.0, 1.25))
        if not isinstance(error, ModelLoading):
            self._failures += 1
        out = self._tries is not None and self._failures > self._tries
        if out or not isinstance(error, Overloaded | Unavailable) or pause >= self._left_s():
            raise error
        return pause
