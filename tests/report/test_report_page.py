"""Reports of real runs in a real browser, as wide as a laptop's window and as a phone's."""

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

from distplb.report.figures import PANELS
from distplb.report.page import write_report
from distplb.report.run import Run
from distplb.report.trials import with_trials

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'distplb[test]'")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EXAMPLE = Path(__file__).parents[2] / "examples" / "pretrain_moe.py"
SMALL = ["--iterations=16", "--every=4", "--turn=4", "--ffn=32", "--batch=2", "--sequence=32", "--experts=8"]
WIDTHS = {"laptop": (1280, 800, 960), "phone": (390, 844, 360)}  # of the window, its height, of the images
LEAST_PIXELS = 11  # of letters
DEADLINE_MS = 120_000

IMAGES = "Array.from(document.images, one => [one.complete, one.naturalWidth, one.width, one.alt])"
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
SMALLEST_LETTERS = """Math.min(...Array.from(document.querySelectorAll("body *"))
    .filter(one => one.innerText).map(one => parseFloat(getComputedStyle(one).fontSize)))"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install it, playwright drives it")


def moving(folder: str) -> None:
    """Other experts are hot in every window, and moves cost next to nothing, however long they take here."""
    job = Job()
    rebalancer = job.rebalancer(every=4, model=FREE, engine="reference", folder=folder)
    for iteration in range(16):
        hot = 2 * (iteration // 4 % 2)
        job.iterate(by_slot(skewed((hot, hot + 1)), rebalancer.placement))
        rebalancer.step()
    rebalancer.close()


@pytest.fixture(scope="module")
def moved_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a job on two ranks in which rebalances are known to move experts."""
    folder = tmp_path_factory.mktemp("moving") / "run"
    on_ranks(2, moving, str(folder))
    write_report(folder, folder.with_suffix(".html"))
    return folder.with_suffix(".html")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the quickstart writes, of a smaller job on two ranks. Measured times decide whether it moves anything."""
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
        # Without a sandbox of its own, which a root user's Chromium refuses to start with.
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class Seen:
    """One look at a page, and whatever the browser had to say."""

    def __init__(self, browser: Any, page: Path, width: int, height: int) -> None:
        self.said, self.requests = list[str](), list[str]()
        self.tab = browser.new_page(viewport={"width": width, "height": height})
        self.tab.set_default_timeout(DEADLINE_MS)
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(page.as_uri(), wait_until="networkidle")

    @property
    def outside(self) -> list[str]:
        """What was asked of anybody but the page itself."""
        return [address for address in self.requests[1:] if not address.startswith("data:")]


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("of", ["page", "moved_page"])
def test_the_page_of_a_real_run_shows_what_there_is_and_asks_for_nothing(
    of: str, device: str, request: pytest.FixtureRequest, browser: Any
) -> None:
    page: Path = request.getfixturevalue(of)
    width, height, image_width = WIDTHS[device]
    seen = Seen(browser, page, width, height)
    assert seen.said == []
    assert seen.requests[0] == page.as_uri()
    assert seen.outside == []
    run = with_trials(Run.read(page.with_suffix("")))
    assert len(run.events) == 4
    lacking = [panel for panel in PANELS if panel.lacks(run)]
    assert of == "page" or not lacking
    assert seen.tab.locator(".lacks").all_inner_texts() == [panel.lacks(run) for panel in lacking]
    shown_panels = [panel for panel in PANELS if panel not in lacking]
    images = seen.tab.evaluate(IMAGES)
    assert len(images) == len(shown_panels)
    for panel, (complete, natural, shown, alt) in zip(shown_panels, images, strict=True):
        assert complete
        assert natural == image_width
        assert image_width - 4 <= shown <= image_width, "letters are as large as they were drawn"
        assert alt.startswith(f"{panel.title}. ")
    assert seen.tab.evaluate(OVERFLOW) <= 0
    assert seen.tab.evaluate(SMALLEST_LETTERS) >= LEAST_PIXELS
    assert seen.tab.locator("tbody tr").count() == len(run.events)
    seen.tab.close()


def test_what_the_page_may_not_do_is_noticed(page: Path, browser: Any, tmp_path: Path) -> None:
    """The checks above would see a script, an image from elsewhere and too wide a table."""
    source = page.read_text(encoding="utf-8")
    harm = '<script>alert(1)</script><img src="http://127.0.0.1:9/x.png"><p style="width: 3000px">wide</p></body>'
    worse = tmp_path / "worse.html"
    worse.write_text(source.replace("</body>", harm), encoding="utf-8")
    seen = Seen(browser, worse, 1280, 800)
    assert any("script" in text for text in seen.said), "the page's policy did not stop the script"
    assert any("127.0.0.1" in text for text in seen.said), "nor the image"
    assert seen.tab.evaluate(OVERFLOW) > 0
    worse.write_text(
        worse.read_text(encoding="utf-8").replace("default-src 'none'; img-src data:;", ""), encoding="utf-8"
    )
    assert Seen(browser, worse, 1280, 800).outside == ["http://127.0.0.1:9/x.png"]
