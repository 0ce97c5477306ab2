"""Conversations stored by the server, in two windows of one or two users."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import (
    ask,
    hold_first_put,
    last_answer,
    open_page,
    stored_conversations,
    wait_for,
)
from serving import Service, served

from khaosz.serve.app import record_routes

pytestmark = pytest.mark.browser


@pytest.fixture
def place(taught: Path, tmp_path: Path) -> Iterator[Service]:
    with served(taught, routers=record_routes(tmp_path, tmp_path / "runs")) as running:
        yield running


def open_in_both(one: Any, two: Any) -> None:
    """Start a conversation in one window and open it in the other."""
    ask(one, "plain")
    last_answer(one)
    one.locator(".history li a").wait_for()
    two.goto(one.url)
    assert last_answer(two).locator(".markdown").inner_text() == "the fox"


def test_two_windows_merge_their_messages(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as one, open_page(browser, place.port) as two:
        open_in_both(one, two)
        for page in (one, two):  # each is unaware of the other
            ask(page, "think")
            page.locator(".message.assistant").nth(1).wait_for()
            last_answer(page)
        two.get_by_text("changed in another window").wait_for()
        # Both questions are versions, each with its answer.
        assert two.locator(".message.user").last.locator(".versions span").inner_text() == "2/2"
        two.locator(".message.user").last.get_by_role("button", name="Previous version").click()
        text = last_answer(one).locator("> .markdown").inner_text()
        assert text and last_answer(two).locator("> .markdown").inner_text() == text
        both = sorted(["plain", "the fox", "think", "think", text, text])
        wait_for(
            two,
            lambda: (
                sorted(node["content"] for node in stored_conversations(place)[0]["nodes"]) == both
            ),
        )
    assert len(stored_conversations(place)) == 1


def set_system_prompt(page: Any, text: str) -> None:
    page.get_by_role("button", name="Chat settings").click()
    page.get_by_label("System prompt").fill(text)
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")


def rename(page: Any, title: str) -> None:
    page.locator(".history li").hover()
    page.get_by_role("button", name="Rename").click()
    page.fill("dialog input", title)
    page.keyboard.press("Enter")
    page.locator(".history li a", has_text=title).wait_for()


def test_two_windows_merge_titles_and_settings(browser: Any, place: Service) -> None:
    """Of the window that continues from an older state, and of the other."""
    with open_page(browser, place.port) as one, open_page(browser, place.port) as two:
        open_in_both(one, two)
        ask(two, "think")
        two.locator(".message.assistant").nth(1).wait_for()
        last_answer(two)
        wait_for(two, lambda: len(stored_conversations(place)[0]["nodes"]) == 4)
        set_system_prompt(one, "Be brief.")
        one.get_by_text("changed in another window").wait_for()
        wait_for(one, lambda: stored_conversations(place)[0]["system"] == "Be brief.")
        rename(two, "a name")
        set_system_prompt(one, "Be very brief.")
        wait_for(one, lambda: stored_conversations(place)[0]["system"] == "Be very brief.")
        ask(one, "plain")
        one.locator(".message.assistant").nth(1).wait_for()
        last_answer(one)
        wait_for(one, lambda: len(stored_conversations(place)[0]["nodes"]) == 6)
    [conversation] = stored_conversations(place)
    assert (conversation["title"], conversation["system"]) == ("a name", "Be very brief.")


def test_window_with_partial_answer_does_not_overwrite_it(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as one, open_page(browser, place.port) as two:
        routes: list[Any] = []
        one.route("**/v1/conversations/*/generations", lambda route: routes.append(route))
        ask(one, "plain")
        wait_for(one, lambda: bool(routes))
        two.goto(one.url)
        two.locator(".bubble").wait_for()
        set_system_prompt(two, "Be brief.")
        wait_for(two, lambda: stored_conversations(place)[0]["system"] == "Be brief.")
        routes[0].continue_()
        last_answer(one)
        wait_for(one, lambda: stored_conversations(place)[0]["nodes"][1]["content"] == "the fox")
        set_system_prompt(two, "Be very brief.")
        wait_for(two, lambda: stored_conversations(place)[0]["system"] == "Be very brief.")
    assert stored_conversations(place)[0]["nodes"][1]["content"] == "the fox"


def test_change_during_a_save_is_saved(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        ask(page, "plain")
        last_answer(page)
        page.locator(".history li a").wait_for()
        wait_for(page, lambda: bool(stored_conversations(place)[0]["nodes"][-1]["content"]))
        page.wait_for_load_state("networkidle")
        routes = hold_first_put(page)
        set_system_prompt(page, "Be")
        wait_for(page, lambda: bool(routes))
        set_system_prompt(page, "Be brief.")
        page.keyboard.press("Control+k")
        page.locator(".empty").wait_for()
        routes[0].continue_()
        wait_for(page, lambda: stored_conversations(place)[0]["system"] == "Be brief.")


def test_conversation_deleted_elsewhere_is_saved_again(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        ask(page, "plain")
        last_answer(page)
        page.locator(".history li a").wait_for()
        [conversation] = stored_conversations(place)
        place.ask("DELETE", f"/v1/conversations/{conversation['id']}")
        ask(page, "think")
        page.locator(".message.assistant").nth(1).wait_for()
        last_answer(page)
        wait_for(page, lambda: [len(each["nodes"]) for each in stored_conversations(place)] == [4])


def test_exports_and_imports_all_conversations(
    browser: Any, place: Service, tmp_path: Path
) -> None:
    """With their times, in several requests because of the size."""
    ids = [f"00000000-0000-4000-8000-{i:012}" for i in range(130)]
    many = [
        {
            "id": id, "title": f"c{i}", "updated": 1_000_000 + i, "selected": id,
            "nodes": [
                {
                    "id": id, "parent": None, "role": "user", "created": 5,
                    "content": "春" * 10_000,
                }
            ],
        }
        for i, id in enumerate(ids)
    ]  # fmt: skip
    for half in (many[:65], many[65:]):
        body = json.dumps({"conversations": half}, ensure_ascii=False)
        assert place.ask("POST", "/v1/conversations/import", body.encode())[0] == 200
    with open_page(browser, place.port, "/#/settings") as page:
        with page.expect_download() as download:
            page.get_by_role("button", name="Export all").click()
        download.value.save_as(tmp_path / "out.json")
        exported = json.loads((tmp_path / "out.json").read_text("utf-8"))["conversations"]
        assert {each["id"] for each in exported} == set(ids)
        page.set_input_files("input[type=file]", tmp_path / "out.json")
        page.get_by_text("Conversations imported: 130").wait_for()
    listed = place.ask("GET", "/v1/conversations?limit=1000")[2]["data"]
    assert sorted((each["title"], each["updated"]) for each in listed) == sorted(
        (each["title"], each["updated"]) for each in many * 2
    )
    assert len({each["id"] for each in listed}) == 260


def test_export_is_disabled_until_the_storage_is_known(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/settings") as page:
        export = page.get_by_role("button", name="Export all")
        routes: list[Any] = []
        page.route("**/openapi.json", lambda route: routes.append(route))
        page.reload()
        export.wait_for()
        assert export.is_disabled() and page.locator("input[type=file]").is_disabled()
        routes[0].continue_()
        export.and_(page.locator(":enabled")).wait_for()
        page.route("**/v1/conversations**", lambda route: route.abort("connectionrefused"))
        export.click()
        page.get_by_role("status").get_by_text("can't be reached").wait_for()
