"""Chromium, driven by Playwright; foreign requests and console errors fail a test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving import Service, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 800}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install 'khaosz[browser]'")
    if CHROMIUM is None:
        pytest.skip("Chromium not found")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


@contextmanager
def open_page(
    browser: Any, port: int, path: str = "/", *, viewport: dict[str, int] | None = None, **more: Any
) -> Iterator[Any]:
    """A page in a fresh profile. Asserts at the end that no other host was requested and that the
    console has no errors, which include violations of the Content-Security-Policy."""
    foreign: list[str] = []
    errors: list[str] = []
    more.setdefault("locale", "en-US")
    context = browser.new_context(
        viewport=viewport or DESK, permissions=["clipboard-read", "clipboard-write"], **more
    )

    def intercept(route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("blob", "data") or address.netloc == f"127.0.0.1:{port}":
            route.continue_()
        else:
            foreign.append(route.request.url)
            route.abort()

    context.route("**/*", intercept)
    page = context.new_page()
    # The browser also logs 4xx responses that the page handles.
    page.on(
        "console",
        lambda message: (
            errors.append(message.text)
            if message.type in ("error", "warning")
            and "Failed to load resource" not in message.text
            else None
        ),
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(15_000)
    try:
        page.goto(f"http://127.0.0.1:{port}{path}")
        page.wait_for_selector("main")
        yield page
        assert not foreign, foreign
        assert not errors, errors
    finally:
        context.close()


def wait_for(page: Any, condition: Callable[[], bool]) -> None:
    """`wait_until` that lets Playwright process the page's events meanwhile."""
    wait_until(lambda: page.wait_for_timeout(50) or condition())


def wait_for_model(page: Any) -> None:
    """Until a model is selected, Enter does not send."""
    page.wait_for_function("() => document.querySelector('.picker select')?.value")


def ask(page: Any, text: str) -> None:
    wait_for_model(page)
    page.fill("#message", text)
    page.focus("#message")
    page.keyboard.press("Enter")


def hold_first_put(page: Any) -> list[Any]:
    """Hold the first save of a conversation; the returned list then contains its route."""
    routes: list[Any] = []

    def hold(route: Any) -> None:
        if route.request.method == "PUT" and not routes:
            routes.append(route)
        else:
            route.continue_()

    page.route("**/v1/conversations/*", hold)
    return routes


def stored_conversations(service: Service) -> list[dict[str, Any]]:
    """The conversations that the server stores, with their messages."""
    listed = service.ask("GET", "/v1/conversations")[2]["data"]
    return [service.ask("GET", f"/v1/conversations/{each['id']}")[2] for each in listed]


def last_answer(page: Any, number: int = -1) -> Any:
    """The last answer, or that with index `number`, once it is complete."""
    # Wait for rendering: the send button is then replaced by the stop button.
    page.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    page.wait_for_selector("button[aria-label='Send'], button[aria-label='发送']")
    page.wait_for_selector(".message.assistant .actions")
    return page.locator(".message.assistant").nth(number)
