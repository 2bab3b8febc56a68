"""docs/troubleshooting.md explains every message of distplb, and none that distplb does not have.

A row begins with texts as they are printed, `…` for values. A message counts as explained too where docs/inputs.md
shows it, with the input that it answers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pages import ROOT

import distplb

PACKAGE = Path(distplb.__file__).parent
# What ends a call or warns, with its text as the first argument.
SAYS = {"DistplbError", "OptionError", "LostRanksError", "HalfMovedError", "DisagreementError", "UntrainedError"}
SAYS |= {"_Refused", "BadParameter", "UsageError", "warn", "warning"}
MIN_LETTERS = 10  # of a text's parts together; shorter ones are made elsewhere, of values alone


class Message(NamedTuple):
    """A text in the code, `…` for what is filled in."""

    place: str
    text: str


def filled(node: ast.expr) -> str:
    """The text of an expression, as far as it is known."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{[^{}]*\}", "…", node.value)  # fields of a template
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return filled(node.left) + filled(node.right)
    if isinstance(node, ast.IfExp):
        return filled(node.body)
    return "…"


@cache
def messages() -> list[Message]:
    """Of all errors and warnings of the package."""
    return [
        Message(f"{path.relative_to(PACKAGE.parent)}:{node.lineno}", filled(node.args[0]))
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and node.args and called(node) in SAYS
    ]


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def parts(text: str) -> list[str]:
    return [part for part in re.split(r"\s*…\s*", text) if part]


def explained() -> Iterator[str]:
    """The texts that begin the rows of the page."""
    for row in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        if row.startswith("| `"):
            yield from re.findall(r"`(.*?)`", row.split(" | ")[0])


def fits(quoted: str, text: str) -> bool:
    """Whether the quoted parts stand in the text, in their order."""
    return re.search(".*".join(re.escape(part) for part in parts(quoted)), text, flags=re.DOTALL) is not None


def test_every_message_is_explained_or_shown_with_its_input() -> None:
    shown = re.sub(r"\s+", " ", (ROOT / "docs" / "inputs.md").read_text())
    quoted = list(explained())
    missing = [
        message
        for message in messages()
        if sum(map(len, parts(message.text))) >= MIN_LETTERS
        and not any(fits(one, message.text) for one in quoted)
        and not re.search(".{0,300}?".join(re.escape(part) for part in parts(message.text)), shown)
    ]
    assert not missing, "\n".join(f"{place}: {text}" for place, text in missing)


def test_every_text_that_is_explained_is_one_of_the_code() -> None:
    texts = [message.text for message in messages()]
    texts += [
        filled(node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]
    for one in explained():
        assert sum(map(len, parts(one))) >= MIN_LETTERS, f"{one} fits too much"
        assert any(fits(one, text) for text in texts), one
