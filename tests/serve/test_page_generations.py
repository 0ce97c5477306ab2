"""The page and answers that belong to the server: reloads, windows, lost connections, kills."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import ask, last_answer, open_page, stored_conversations, wait_for
from fork_server import ForkServer
from serving import Service, served, slowed

from khaosz.serve.app import record_routes

pytestmark = pytest.mark.browser

TEXT = "() => document.querySelector('.message.assistant .markdown')?.textContent.length ?? 0"


@pytest.fixture(scope="module")
def place(taught: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data = tmp_path_factory.mktemp("answers")
    with served(taught, tiny, routers=record_routes(data, data / "runs")) as running:
        slowed(running, "tiny")
        yield running


def start_endless(page: Any) -> None:
    page.select_option(".picker select", "tiny")
    page.get_by_role("button", name="Chat settings").click()
    page.get_by_label("Temperature").fill("0")  # else it might end early
    page.get_by_label("Max tokens").fill("1900")
    page.keyboard.press("Escape")
    ask(page, "fox")
    grows(page)


def grows(page: Any) -> None:
    """Wait until the answer has grown."""
    length = page.evaluate(TEXT)
    page.wait_for_function(f"n => ({TEXT})() > n", arg=length)


def stored_answer(service: Service, page: Any) -> dict[str, Any]:
    id = page.url.rsplit("/", 1)[1]
    node: dict[str, Any] = service.ask("GET", f"/v1/conversations/{id}")[2]["nodes"][-1]
    return node


def test_reload_finds_the_growing_answer(browser: Any, place: Service) -> None:
    """So does another window, which can stop it; either can continue it."""
    with open_page(browser, place.port) as one, open_page(browser, place.port) as two:
        start_endless(one)
        one.reload()
        grows(one)
        two.goto(one.url)
        grows(two)
        two.get_by_role("button", name="Stop").click()
        texts = []
        for page in (one, two):
            assert "stopped" in last_answer(page).locator(".metadata").inner_text()
            texts.append(last_answer(page).locator("> .markdown").text_content())
        assert texts[0] == texts[1]
        assert stored_answer(place, one)["finish_reason"] == "stopped"
        one.reload()
        last_answer(one).get_by_role("button", name="Continue").click()
        grows(one)
        one.keyboard.press("Escape")
        assert "stopped" in last_answer(one).locator(".metadata").inner_text()
        text = last_answer(one).locator("> .markdown").text_content()
        assert len(text) > len(texts[0])
        one.reload()
        assert last_answer(one).locator("> .markdown").text_content() == text
        assert "tokens/s" in last_answer(one).locator(".metadata").inner_text()


def test_closed_window_leaves_a_complete_answer(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        page.select_option(".picker select", "taught")
        with page.expect_response("**/generations"):
            ask(page, "think")
        url = page.url
    with open_page(browser, place.port) as page:
        page.goto(url)
        assert last_answer(page).locator("> .markdown").inner_text() == "二"
        wait_for(page, lambda: stored_answer(place, page)["finish_reason"] == "stop")


def test_broken_stream_is_read_again(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        page.select_option(".picker select", "taught")
        broken: list[Any] = []

        def breaks(route: Any) -> None:
            if len(broken) > 1:
                route.continue_()
            else:
                broken.append(route)
                route.fulfill(content_type="text/event-stream", body=": waiting\n\n")

        page.route("**/v1/generations/*?stream=true", breaks)
        ask(page, "plain")
        page.get_by_text("shown when it is back").wait_for()
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"
        page.get_by_role("alert").wait_for(state="detached")
        assert len(broken) == 2


def test_offline_and_back(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        start_endless(page)
        page.context.set_offline(True)
        page.keyboard.press("Escape")  # cannot be stopped now
        page.get_by_text("can't be reached").first.wait_for()
        page.context.set_offline(False)
        grows(page)
        page.keyboard.press("Escape")
        assert "stopped" in last_answer(page).locator(".metadata").inner_text()


def test_lost_response_does_not_lose_the_answer(browser: Any, place: Service) -> None:
    """The server got the request, the page no response."""
    with open_page(browser, place.port) as page:
        page.select_option(".picker select", "taught")

        def lose(route: Any) -> None:
            route.fetch()
            route.abort("connectionreset")

        page.route("**/v1/conversations/*/generations", lose)
        ask(page, "plain")
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"
        assert page.locator(".problem").count() == 0
        assert page.locator(".message").count() == 2


def test_windows_with_growing_answers_keep_both(browser: Any, place: Service) -> None:
    """Both windows send to one conversation while the other's answer grows."""
    with open_page(browser, place.port) as one, open_page(browser, place.port) as two:
        one.select_option(".picker select", "taught")
        ask(one, "plain")
        last_answer(one)
        two.goto(one.url)
        last_answer(two)
        for page in (one, two):
            page.select_option(".picker select", "tiny")
            ask(page, f"from window {one is page}")
            page.locator(".message.assistant .markdown").nth(1).wait_for()
        for page in (one, two):
            page.keyboard.press("Escape")
            last_answer(page)
        [conversation] = [each for each in stored_conversations(place) if each["id"] in one.url]
        contents = [node["content"] for node in conversation["nodes"]]
        assert {"from window True", "from window False"} <= {*contents}
        assert len(contents) == 6 and all(contents)
        two.reload()  # the newest branch; the other one is a version
        assert last_answer(two, 1).locator(".markdown").text_content()
        assert two.locator(".message.user").last.locator(".versions span").inner_text() in (
            "1/2", "2/2",
        )  # fmt: skip


def has_stored_text(data: Path) -> bool:
    with closing(sqlite3.connect(data / "conversations.db")) as db:
        return db.execute("SELECT count(*) FROM generation_parts").fetchone() != (0,)


def test_killed_server_leaves_an_answer_to_continue(
    browser: Any, fork_server: ForkServer, tiny: Path, tmp_path: Path
) -> None:
    """The window stays open all the time."""
    with fork_server.khaosz(f"tiny={tiny}", "--data", tmp_path) as server:
        port = server.port
        with open_page(browser, port) as page:
            start_endless(page)
            wait_for(page, lambda: has_stored_text(tmp_path))
            server.kill()
            page.get_by_text("shown when it is back").wait_for()
            with fork_server.khaosz(f"tiny={tiny}", "--data", tmp_path, port=port):
                metadata = last_answer(page).locator(".metadata")
                assert "interrupted: the server was stopped" in metadata.inner_text()
                assert page.get_by_role("alert").count() == 0
                before = last_answer(page).locator("> .markdown").text_content()
                last_answer(page).get_by_role("button", name="Continue").click()
                grows(page)
                page.keyboard.press("Escape")
                text = last_answer(page).locator("> .markdown").text_content()
                assert len(text) > len(before) > 0
                page.reload()
                assert last_answer(page).locator("> .markdown").text_content() == text
