"""A headless Chromium for tests of pages, where one is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver


class Browser:
    """A window that opens files, and says what the page did."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, path: Path, *, width: int = 1280, scheme: str = "light", media: str = "screen") -> None:
        """Shows a file; width in CSS pixels, scheme "light" or "dark", media "screen" or "print"."""
        self.messages()
        self.requests()
        self._driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False},
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self._driver.get(path.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that the body of a function returns in the page."""
        return self._driver.execute_script(script, *arguments)

    def messages(self) -> list[str]:
        """What the console was told since the last call: warnings and errors, a broken Content-Security-Policy too."""
        return [m["message"] for m in self._driver.get_log("browser") if m["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        logged = [json.loads(m["message"])["message"] for m in self._driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in logged if m["method"] == "Network.requestWillBeSent"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser until the end of the block; skips the test where Chromium or its driver is missing."""
    program, service = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or service is None:
        pytest.skip("chromium or chromedriver not found: install both to test pages in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
