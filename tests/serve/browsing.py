"""Debian's Chromium, driven by Playwright, with an eye on what it asks for and complains of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving import wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 800}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install 'khaosz[browser]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


@contextmanager
def visited(
    browser: Any, port: int, path: str = "/", *, viewport: dict[str, int] | None = None, **more: Any
) -> Iterator[Any]:
    """A page in a fresh profile. At its end: nothing was asked of another host, and the console
    has no error, which is where Content-Security-Policy complains."""
    outside: list[str] = []
    errors: list[str] = []
    more.setdefault("locale", "en-US")
    context = browser.new_context(
        viewport=viewport or DESK, permissions=["clipboard-read", "clipboard-write"], **more
    )

    def watched(route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("blob", "data") or address.netloc == f"127.0.0.1:{port}":
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    context.route("**/*", watched)
    page = context.new_page()
    # A status of 4xx that the page deals with is also logged by the browser itself.
    page.on(
        "console",
        lambda said: (
            errors.append(said.text)
            if said.type in ("error", "warning") and "Failed to load resource" not in said.text
            else None
        ),
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(15_000)
    try:
        page.goto(f"http://127.0.0.1:{port}{path}")
        page.wait_for_selector("main")
        yield page
        assert not outside, outside
        assert not errors, errors
    finally:
        context.close()


def comes(page: Any, true: Callable[[], bool]) -> None:
    """`wait_until` for a page, which does nothing while nobody waits for it."""
    wait_until(lambda: page.wait_for_timeout(50) or true())


def ready(page: Any) -> None:
    """There is a model: before, Enter leaves the text where it is."""
    page.wait_for_function("() => document.querySelector('.picker select')?.value")


def ask(page: Any, text: str) -> None:
    ready(page)
    page.fill("#message", text)
    page.focus("#message")
    page.keyboard.press("Enter")


def first_put_held(page: Any) -> list[Any]:
    """The first writing of a conversation waits here, once it was asked for, to go on."""
    held: list[Any] = []

    def hold(route: Any) -> None:
        if route.request.method == "PUT" and not held:
            held.append(route)
        else:
            route.continue_()

    page.route("**/v1/conversations/*", hold)
    return held


def answer(page: Any, number: int = -1) -> Any:
    """The last answer, once it is complete."""
    # What was done just now is drawn by then: the button to send has made room for that to stop.
    page.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    page.wait_for_selector("button[aria-label='Send'], button[aria-label='发送']")
    page.wait_for_selector(".message.assistant .actions")
    return page.locator(".message.assistant").nth(number)
