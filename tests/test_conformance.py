"""Every point of docs/conformance.md has a test, and the page is up to date."""

from __future__ import annotations

import runpy
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "conformance.py"
conformance = runpy.run_path(str(PAGE))
POINTS = {number for points in conformance["POINTS"].values() for number in points}


def test_there_are_65_points() -> None:
    assert POINTS == set(range(1, 66))


def test_every_point_is_shown_by_a_test() -> None:
    shown = conformance["shown"]()
    assert set(shown) <= POINTS
    assert not POINTS - set(shown), "no test has these points"


def test_the_page_is_up_to_date() -> None:
    assert conformance["PAGE"].read_text() == conformance["render"](), "run: python docs/conformance.py"
