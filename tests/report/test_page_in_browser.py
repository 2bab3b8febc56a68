"""Reports of real runs in a real browser, in the widths of a laptop and a phone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import FREE, Job, by_slot, skewed
from ranks import on_ranks
from recorded_runs import many_steps

from distplb import EventLog
from distplb.report.figures import FIGURES
from distplb.report.interval_trials import with_trials
from distplb.report.page import write_report
from distplb.report.run import Run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'distplb[test]'")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EXAMPLE = Path(__file__).parents[2] / "examples" / "pretrain_moe.py"
SMALL = ["--iterations=16", "--every=4", "--turn=4", "--ffn=32", "--batch=2", "--sequence=32", "--experts=8"]
WIDTHS = {"laptop": (1280, 800, 960), "phone": (390, 844, 360)}  # width and height of the window, width of the images
MIN_PIXELS = 11  # height of letters
DEADLINE_MS = 120_000

IMAGES = "Array.from(document.images, one => [one.complete, one.naturalWidth, one.width, one.alt])"
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
SMALLEST_LETTERS = """Math.min(...Array.from(document.querySelectorAll("body *"))
    .filter(one => one.innerText).map(one => parseFloat(getComputedStyle(one).fontSize)))"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install it, playwright drives it")


def moving(folder: str) -> None:
    """Other experts are hot in each window, and moves cost almost nothing, however long they take here."""
    job = Job()
    rebalancer = job.rebalancer(every=4, model=FREE, engine="reference", folder=folder)
    for iteration in range(16):
        hot = 2 * (iteration // 4 % 2)
        job.iterate(by_slot(skewed((hot, hot + 1)), rebalancer.placement))
        rebalancer.step()
    rebalancer.close()


@pytest.fixture(scope="module")
def moved_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a job on two ranks whose rebalances are known to move experts."""
    folder = tmp_path_factory.mktemp("moving") / "run"
    on_ranks(2, moving, str(folder))
    log = EventLog(folder / "steps.jsonl")
    for step in many_steps(200, layers=2, slots=4, gpus=2):
        log(step)
    log.close()
    write_report(folder, folder.with_suffix(".html"))
    return folder.with_suffix(".html")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that the quickstart writes for a smaller job on two ranks; measured times decide whether it moves."""
    folder = tmp_path_factory.mktemp("quickstart")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    options = [*SMALL, "--balance=rebalanced", f"--data={folder}", f"--report={folder}"]
    command = [sys.executable, *launcher, str(EXAMPLE), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "plain-rebalanced.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses to start as root with its sandbox.
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class PageView:
    """A page in the browser, with the messages and requests that it causes."""

    def __init__(self, browser: Any, page: Path, width: int, height: int) -> None:
        self.messages, self.requests = list[str](), list[str]()
        self.tab = browser.new_page(viewport={"width": width, "height": height})
        self.tab.set_default_timeout(DEADLINE_MS)
        self.tab.on("console", lambda message: self.messages.append(message.text))
        self.tab.on("pageerror", lambda error: self.messages.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(page.as_uri(), wait_until="networkidle")

    @property
    def outside_requests(self) -> list[str]:
        """Requests to anything but the page itself."""
        return [address for address in self.requests[1:] if not address.startswith("data:")]


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("of", ["page", "moved_page"])
def test_the_page_of_a_real_run_shows_what_there_is_and_asks_for_nothing(
    of: str, device: str, request: pytest.FixtureRequest, browser: Any
) -> None:
    page: Path = request.getfixturevalue(of)
    width, height, image_width = WIDTHS[device]
    view = PageView(browser, page, width, height)
    assert view.messages == []
    assert view.requests[0] == page.as_uri()
    assert view.outside_requests == []
    run = with_trials(Run.read(page.with_suffix("")))
    assert len(run.events) == 4
    lacking = [figure for figure in FIGURES if figure.lacks(run)]
    assert of == "page" or not lacking
    assert view.tab.locator(".lacks").all_inner_texts() == [figure.lacks(run) for figure in lacking]
    shown_figures = [figure for figure in FIGURES if figure not in lacking]
    images = view.tab.evaluate(IMAGES)
    assert len(images) == len(shown_figures)
    for figure, (complete, natural, shown, alt) in zip(shown_figures, images, strict=True):
        assert complete
        assert natural == image_width
        assert image_width - 4 <= shown <= image_width, "letters must have the size in which they were drawn"
        assert alt.startswith(f"{figure.title}. ")
    assert view.tab.evaluate(OVERFLOW) <= 0
    assert view.tab.evaluate(SMALLEST_LETTERS) >= MIN_PIXELS
    assert view.tab.locator("tbody tr").count() == len(run.events)
    view.tab.close()


def test_what_the_page_may_not_do_is_noticed(page: Path, browser: Any, tmp_path: Path) -> None:
    """The checks above notice a script, an image from another host and a table that is too wide."""
    source = page.read_text(encoding="utf-8")
    harm = '<script>alert(1)</script><img src="http://127.0.0.1:9/x.png"><p style="width: 3000px">wide</p></body>'
    worse = tmp_path / "worse.html"
    worse.write_text(source.replace("</body>", harm), encoding="utf-8")
    view = PageView(browser, worse, 1280, 800)
    assert any("script" in text for text in view.messages), "the page's policy did not stop the script"
    assert any("127.0.0.1" in text for text in view.messages), "nor the image"
    assert view.tab.evaluate(OVERFLOW) > 0
    worse.write_text(
        worse.read_text(encoding="utf-8").replace("default-src 'none'; img-src data:;", ""), encoding="utf-8"
    )
    assert PageView(browser, worse, 1280, 800).outside_requests == ["http://127.0.0.1:9/x.png"]
