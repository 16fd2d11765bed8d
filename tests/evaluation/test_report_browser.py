"""The pages in a real browser: nothing wider than the screen, no request, no complaint, every image decoded, and paper.

Needs a Chromium: the one that DIFFRC_CHROMIUM names, or one on the PATH. It is spoken to over a pipe (the DevTools protocol).
"""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.evaluation.report import Parts, render, render_study
from engines.recipe import METHODS

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60.0
LAUNCH = """import fcntl, os, sys  # Chromium reads commands from 3 and answers on 4
far = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for place, fd in zip((3, 4), far):
    os.dup2(fd, place)
os.execv(sys.argv[3], sys.argv[3:])"""

FACTS = """(async () => {
  await Promise.all([...document.images].map(image => image.decode().catch(() => 0)));
  const page = document.documentElement;
  const frames = [...document.querySelectorAll('.scroll, .sheet, pre')];
  const wide = [...document.body.querySelectorAll('*')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > page.clientWidth + 1 && box.width > 0 && !frames.some(f => f.contains(e)) && !e.closest('svg svg');
  });
  return JSON.stringify({
    width: page.scrollWidth, seen: page.clientWidth,
    wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    images: document.images.length,
    broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).length,
    paper: getComputedStyle(document.body).backgroundColor,
    lost: [...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href'))).length,
    small: [...document.querySelectorAll('main p, main td, main .label, main svg text')]
      .filter(e => e.getBoundingClientRect().width && parseFloat(getComputedStyle(e).fontSize) < 9).length,
  });
})()"""


def chromium() -> str | None:
    """The browser to test with."""
    named = os.environ.get("DIFFRC_CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A headless Chromium and what it says: commands go down one pipe, answers and events come up another, each ends with a 0 byte."""

    def __init__(self, path: str, profile: Path) -> None:
        down, self._down = os.pipe()
        self._up, up = os.pipe()
        options = ["--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", f"--user-data-dir={profile}"]
        options += ["--remote-debugging-pipe", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        command = [sys.executable, "-c", LAUNCH, str(down), str(up), path, *options]
        self._process = subprocess.Popen(
            command, pass_fds=(down, up), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(down)
        os.close(up)
        self._buffer = b""
        self._count = 0
        self._session = ""
        self.events: list[dict[str, Any]] = []

    def attach(self) -> None:
        """Open a tab, and hear everything of it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its result; events that come meanwhile are kept."""
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        os.write(self._down, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self.events.append(answer)

    def wait(self, method: str) -> None:
        """Until an event of this name is there."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._up], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._up, 1 << 16)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(self, page: Path, width: int, dark: bool) -> dict[str, Any]:
        """Load a page on a screen of this width; what `FACTS` finds there."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        self.wait("Page.loadEventFired")
        found = self.call("Runtime.evaluate", expression=FACTS, awaitPromise=True, returnByValue=True)["result"]["value"]
        return dict(json.loads(found))

    def screenshot(self) -> bytes:
        """PNG of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """The page on A4 paper."""
        return base64.b64decode(self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)["data"])

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(SECONDS)
        os.close(self._down)
        os.close(self._up)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = chromium()
    if path is None:
        pytest.skip("no Chromium here: install one, or name it in DIFFRC_CHROMIUM")
    started = Browser(path, tmp_path_factory.mktemp("profile"))
    try:
        started.attach()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def page_of(
    tmp_path_factory: pytest.TempPathFactory, full_parts: Callable[..., Parts], study_document: Callable[[], dict[str, Any]]
) -> Callable[[str], Path]:
    """page_of("run") -> the page as a file, with hostile names; "thousand" has a thousand classes."""
    folder = tmp_path_factory.mktemp("pages")
    many = tuple(f"class {k} with a name that has no end" for k in range(1000))
    pages = {
        "run": lambda: render(full_parts()),
        "thousand": lambda: render(full_parts(many, METHODS)),
        "study": lambda: render_study(study_document()),
    }

    def write(name: str) -> Path:
        path = folder / f"{name}.html"
        if not path.exists():
            path.write_text(pages[name](), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [
        ("run", 360, False),
        ("run", 360, True),
        ("run", 1280, False),
        *(
            pytest.param(name, width, dark, marks=pytest.mark.slow)
            for name in ("run", "thousand", "study")
            for width in (320, 390, 1280)
            for dark in (False, True)
        ),
    ],
)
def test_a_page_fits_its_screen_asks_for_nothing_and_complains_of_nothing(
    browser: Browser, page_of: Callable[[str], Path], name: str, width: int, dark: bool
) -> None:
    page = page_of(name)
    found = browser.open(page, width, dark)
    assert found["width"] <= found["seen"] == width
    assert found["wide"] == []
    assert found["images"] > 0
    assert found["broken"] == 0
    assert found["lost"] == 0
    assert found["small"] == 0
    red, green, blue = map(int, re.findall(r"\d+", found["paper"])[:3])
    assert (max(red, green, blue) < 60) == dark
    methods = [event.get("method") for event in browser.events]
    assert not {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"} & set(methods)
    asked = {event["params"]["request"]["url"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:image/")} == {page.as_uri()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "study"])
def test_a_page_is_printed_on_several_sheets_in_light_colors_with_its_tables_open(
    browser: Browser, page_of: Callable[[str], Path], name: str
) -> None:
    browser.open(page_of(name), 1280, dark=True)
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf)) >= 2
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    shown = """[getComputedStyle(document.body).backgroundColor, document.documentElement.scrollWidth <= innerWidth,
                [...document.querySelectorAll('details:not(.long) table')].every(e => e.getBoundingClientRect().height > 0)].join()"""
    seen = browser.call("Runtime.evaluate", expression=shown, returnByValue=True)["result"]["value"]
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
    assert seen == "rgb(255, 255, 255),true,true"
