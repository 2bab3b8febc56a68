"""The page and its command: each figure or the data that it lacks, and no string of a run becomes markup."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from recorded_runs import HOSTILE, RUNS, event, steps, trace

from distplb.cli.main import main
from distplb.report import figures
from distplb.report.page import write_report
from distplb.report.run import Run
from distplb.report.summary import Summary


class Page(HTMLParser):
    """A page as a browser would parse it, as far as the tests need."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.images, self.addresses, self.text, self.rows = (
            set[str](),
            list[dict[str, str]](),
            list[str](),
            "",
            0,
        )
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.rows += tag == "tr"
        self.images += [attributes] * (tag == "img")
        self.addresses += [
            attributes[name] for name in ("src", "srcset", "href", "action", "data") if name in attributes
        ]
        assert not [name for name in attributes if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", ["nothing", "skipped between", "both", "steps beside others"])
def test_the_page_has_each_figure_for_a_laptop_and_a_phone_or_what_it_lacks(name: str, tmp_path: Path) -> None:
    run = write_report(RUNS[name], tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    for figure in figures.FIGURES:
        drawn = [image for image in page.images if image["alt"].startswith(figure.title)]
        assert len(drawn) == (0 if figure.lacks(run) else 1)
        assert (figure.lacks(run) or figure.caption(run)) in page.text
    assert Summary.of(run).headline in page.text
    assert page.rows == (0 if not run.events else len(run.events) + 1)
    pairs = re.findall(
        r'<source media="\(max-width: 640px\)" srcset="(\S+)" width="360".*\n<img src="(\S+)" width="960"', source
    )
    assert len(pairs) == len(page.images)
    for narrow, wide in pairs:
        assert narrow != wide
        for address in (narrow, wide):
            assert ElementTree.fromstring(base64.b64decode(address.split(",")[1])).tag.endswith("svg")


def test_what_is_missing_is_said_with_what_to_switch_on() -> None:
    lacks = {figure.name: figure.lacks(RUNS["nothing"]) for figure in figures.FIGURES}
    of_steps = [text for name, text in lacks.items() if "on_event=EventLog(" in text and "StepBalancer" in text]
    assert len(of_steps) == 3
    assert all("record=" in text for text in lacks.values() if text not in of_steps), lacks
    lacks = {figure.name: figure.lacks(RUNS["dry run"]) for figure in figures.FIGURES}
    assert "leave out dry_run=True" in lacks["moves-by-rebalance"]
    assert lacks["load-by-gpu"] == lacks["imbalance-over-time"] == lacks["hottest-experts"] == ""


# --- strings are untrusted --------------------------------------------------------------------------------------


@pytest.fixture
def hostile() -> Run:
    names, plain = HOSTILE[:2], event(layers=2)
    events = [
        replace(plain, iteration=number, layers=names, reason=text, decision=text, seconds={text: 1.0, "move": 1.0})
        for number, text in enumerate(HOSTILE, 1)
    ]
    recorded = replace(trace(), layers=names, note="".join(HOSTILE[:-1]))
    sampled = tuple(replace(one, layers=names, seconds=dict.fromkeys(HOSTILE, 1.0)) for one in steps(3))
    beside = tuple(Run(text, steps=sampled) for text in HOSTILE)
    return Run(HOSTILE[0], tuple(events), recorded, steps=sampled, beside=beside)


def test_no_string_of_a_run_becomes_markup(hostile: Run, tmp_path: Path) -> None:
    write_report(hostile, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    allowed = "html head meta link title style body header h1 p dl div dt dd main section h2 figure picture source img"
    assert page.tags <= {*allowed.split(), "figcaption", "table", "thead", "tr", "th", "tbody", "td", "footer"}
    assert all(address.startswith("data:") for address in page.addresses)
    assert all(text in page.text for text in HOSTILE[:-1])
    assert "nul� lone� back�wards" in page.text
    assert any(HOSTILE[0] in image["alt"] for image in page.images)
    assert "default-src 'none'" in (tmp_path / "report.html").read_text(encoding="utf-8")


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_the_figures_and_says_where(folder: Path, tmp_path: Path) -> None:
    page, png = tmp_path / "report.html", tmp_path / "figures"
    done = CliRunner().invoke(main, ["report", str(folder), "--output", str(page), "--png", str(png), "--every", "5"])
    assert done.exit_code == 0, done.output
    headline, where, *drawn = done.stdout.splitlines()
    assert headline == Summary.of(Run.read(folder)).headline
    assert where == str(page)
    assert drawn == sorted(str(path) for path in png.iterdir())
    assert [Path(path).name for path in drawn] == [
        f"{n}-{figure.name}.png" for n, figure in enumerate(figures.FIGURES, 1)
    ]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert len(Page(page.read_text()).images) == len(figures.FIGURES)


def test_the_command_tells_the_numbers_as_json(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["report", str(folder / "events.jsonl"), "--output", str(page), "--json"])
    document = json.loads(done.stdout)
    assert document["report"] == str(page)
    assert (document["imbalance_before"], document["imbalance_after"]) == pytest.approx((1.5, 1.2))
    assert (document["slots_moved"], document["bytes_moved"], document["repaid"]) == (8, 8_000_000, [True, True])


@pytest.mark.parametrize(
    ("arguments", "wording"),
    [
        (["nowhere"], "there is no file or folder nowhere; pass the folder of Rebalancer(record=...)"),
        (["{run}/empty.jsonl"], "no events, no trace and no sampled steps"),
        (["{run}/damaged.jsonl"], "the event of iteration 10 is damaged"),
        (["{run}/../noise.npz"], "noise.npz cannot be read"),
        (["{run}", "--every", "1000"], "the trace covers 20 iterations"),
        (["{run}/events.jsonl", "--every", "5"], "events.jsonl has no trace to try intervals on"),
        (["{run}", "--nodes", "2"], "--nodes 2 without --gpus-per-node"),
        (["{run}", "--output", "{run}/no/report.html"], "there is no folder"),
        (["{run}/000000000001.npz", "--gpus-per-node", "3"], "8 experts cannot be spread evenly over 3 GPUs"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], wording: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "empty.jsonl").write_text("")
    (folder / "damaged.jsonl").write_text(event(imbalance_before=(1.5,)).to_json() + "\n")
    (folder.parent / "noise.npz").write_bytes(b"PK\x03\x04 and no more")
    done = CliRunner().invoke(main, ["report", *(one.format(run=folder) for one in arguments)])
    assert done.exit_code == 2
    assert wording in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_missing_library_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distplb.report.page", None)
    done = CliRunner().invoke(main, ["report", str(folder)])
    assert done.exit_code == 2
    assert "pip install 'distplb[report]'" in done.stderr
