"""A headless Chromium that keeps what a page logs and asks for, for tests of the status page."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright

# For people to look at; git ignores it.
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
# Of a busy machine.
PATIENCE_S = 60.0
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 900}


@dataclass
class Visit:
    """An open page."""

    page: Page
    errors: list[str] = field(default_factory=list)
    """What the console shows as an error or a warning, and exceptions."""
    asked: list[str] = field(default_factory=list)
    """The URL of every request."""

    def logged(self, message: ConsoleMessage) -> None:
        """Notes what a developer would be warned of."""
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    async def wait_for(self, condition: str) -> None:
        """Returns once the JavaScript expression `condition` is true."""
        # Not wait_for_function, whose eval the page's policy refuses.
        async with asyncio.timeout(PATIENCE_S):
            while not await self.page.evaluate(condition):  # noqa: ASYNC110 - nothing else tells
                await asyncio.sleep(0.05)

    async def text(self, selector: str) -> str:
        """What a reader sees of the element."""
        return await self.page.inner_text(selector)

    async def shoot(self, name: str) -> None:
        """Keeps a picture of the whole page."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        await self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    async def tree(self) -> list[dict[str, Any]]:
        """The accessibility tree: its nodes that are not ignored."""
        session = await self.page.context.new_cdp_session(self.page)
        found = await session.send("Accessibility.getFullAXTree")
        return [node for node in found["nodes"] if not node["ignored"]]


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser; skips where Chromium is not installed."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    # Without a proxy that the environment names; nothing leaves the loopback interface.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, env=dict(environment))
        try:
            yield browser
        finally:
            await browser.close()


async def visit(browser: Browser, url: str, *, dark: bool = False, size: dict[str, int] = DESK) -> Visit:
    """Opens `url` in a profile of its own."""
    context = await browser.new_context(
        viewport={"width": size["width"], "height": size["height"]},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        timezone_id="UTC",
    )
    opened = Visit(await context.new_page())
    page = opened.page
    page.on("console", opened.logged)
    page.on("pageerror", lambda error: opened.errors.append(str(error)))
    page.on("request", lambda request: opened.asked.append(request.url))
    await page.goto(url)
    return opened
