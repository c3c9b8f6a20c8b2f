"""A tab of the system's headless Chromium, for the tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
"""A microphone that beeps, and a user who allows its use."""


@contextmanager
def open_tab(*arguments: str) -> Iterator[Any]:
    """A Playwright page; the test is skipped where there is no Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium-headless-shell")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *arguments])
        tab = browser.new_page(viewport={"width": 1100, "height": 900})
        tab.set_default_timeout(60_000)  # the machine may be busy
        yield tab
        browser.close()
