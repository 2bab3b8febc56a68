"""Every input is read right, or refused with what to pass instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from inputs.case import Case, answer_to
from inputs.page import KINDS, page

PAGE = Path(__file__).parents[2] / "docs" / "inputs.md"
EVERY = [pytest.param(case, id=f"{kind}: {case.input}"[:100]) for kind, cases in KINDS.items() for case in cases]


@pytest.mark.parametrize("case", EVERY)
def test_an_input_is_answered(case: Case, tmp_path: Path) -> None:
    assert answer_to(case, tmp_path) == case.answer


def test_the_page_has_every_input() -> None:
    """To regenerate it: `(cd tests/helpers && python -m inputs > ../../docs/inputs.md)`."""
    assert PAGE.read_text() == page()
