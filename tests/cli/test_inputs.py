"""Whatever people give is read right, or refused in words that help."""

from __future__ import annotations

from pathlib import Path

import pytest
from inputs.case import Case, answered
from inputs.every import KINDS, page

PAGE = Path(__file__).parents[2] / "docs" / "inputs.md"
EVERY = [pytest.param(case, id=f"{kind}: {case.given}"[:100]) for kind, cases in KINDS.items() for case in cases]


@pytest.mark.parametrize("case", EVERY)
def test_an_input_is_answered(case: Case, tmp_path: Path) -> None:
    assert answered(case, tmp_path) == case.answer


def test_the_page_has_every_input() -> None:
    """`(cd tests && python -m inputs > ../docs/inputs.md)` writes it anew."""
    assert PAGE.read_text() == page()
