"""Every slider and choice of every lesson, used in JupyterLab in a real browser: pictures change.

Needs the extra `browser` (playwright) and an installed Chromium; skipped, with a message, without.
"""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VIEW = "application/vnd.jupyter.widget-view+json"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
AREAS = ".jp-OutputArea-output:has(.jupyter-widgets)"  # outputs that show a living widget
START, RUN = 120, 500  # seconds that the server, and a lesson, may take on a busy machine

log = logging.getLogger(__name__)
pytestmark = pytest.mark.slow


def widget_cells(path: Path) -> int:
    """How many outputs of a lesson are widgets."""
    cells = json.loads(path.read_text())["cells"]
    return sum(VIEW in output.get("data", {}) for c in cells for output in c.get("outputs", []))


LESSONS = sorted(p for p in (ROOT / "notebooks").glob("*/*.ipynb") if widget_cells(p))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not "
                                     "installed: pip install -e '.[browser]'")
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as p:
        launched = p.chromium.launch(executable_path=executable,
                                     args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    """The address of a JupyterLab on a copy of the lessons."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, **{f"JUPYTER_{name}_DIR": str(root / name.lower())
                            for name in ("CONFIG", "DATA", "RUNTIME")}}
    with (root / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
             f"--ServerApp.root_dir={root / 'notebooks'}"],
            stdout=log, stderr=subprocess.STDOUT, env=env)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START * 2):
            try:
                urllib.request.urlopen(f"{address}/api").close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (root / "log.txt").read_text()
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def run_all(page, widgets: int) -> None:
    """Run every cell, and wait until its widgets are there and the kernel rests."""
    resting = page.get_by_text("| Idle")  # in the status bar; "Initializing" before
    resting.wait_for(timeout=START * 1000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    for running in ("some", "!some"):  # it has begun, and it has ended
        test = running.replace("some", "[...document.querySelectorAll('.jp-InputPrompt')]"
                               ".some(p => p.textContent.includes('*'))")
        page.wait_for_function(f"() => {test}", timeout=RUN * 1000)
    page.wait_for_function("([a, n]) => document.querySelectorAll(a).length === n",
                           arg=[AREAS, widgets], timeout=START * 1000)


@contextmanager
def changed(page, area):
    """What is done inside must change a picture of the widget.  Yields a list, for the seconds."""
    pictures = "a => [...a.querySelectorAll('img')].map(i => i.src).join()"
    area.locator("img").first.wait_for(timeout=START * 1000)
    before = area.evaluate(pictures)
    seconds, start = [], time.perf_counter()
    yield seconds
    page.wait_for_function(f"([a, before]) => ({pictures})(a) !== before",
                           arg=[area.element_handle(), before], timeout=START * 1000)
    seconds.append(time.perf_counter() - start)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_sliders_and_choices_change_what_is_shown(lesson, browser, server):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    # A workspace of its own, where no other lesson is open.
    page.goto(f"{server}/lab/workspaces/{lesson.stem}/tree/{lesson.parent.name}/{lesson.name}",
              timeout=START * 1000)
    page.locator(".jp-CodeCell").first.wait_for(timeout=START * 1000)
    run_all(page, widget_cells(lesson))

    moved, answers = 0, []
    for area in page.locator(AREAS).all():
        area.scroll_into_view_if_needed()
        for handle in area.locator(".noUi-handle").all():
            for _ in range(3):
                with changed(page, area) as seconds:
                    handle.focus()
                    handle.press("ArrowRight")
                answers += seconds
            moved += 1
        for choice in area.locator("select").all():
            with changed(page, area):
                choice.select_option(index=(choice.evaluate("c => c.selectedIndex") + 1) % 2)
            moved += 1
    assert moved
    if answers:  # seen with --log-cli-level=INFO
        log.info("%s: a slider takes at most %.0f ms to answer", lesson.stem, 1000 * max(answers))
    page.close()
