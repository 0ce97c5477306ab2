"""Conversations that the server keeps, in two windows of two people or of one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import answer, ask, comes, first_put_held, visited
from serving import Service, served

from khaosz.serve.app import record_routes

pytestmark = pytest.mark.browser


@pytest.fixture
def place(taught: Path, tmp_path: Path) -> Iterator[Service]:
    with served(taught, routers=record_routes(tmp_path, tmp_path / "runs")) as running:
        yield running


def kept(service: Service) -> list[dict[str, Any]]:
    found = service.ask("GET", "/v1/conversations")[2]["data"]
    return [service.ask("GET", f"/v1/conversations/{each['id']}")[2] for each in found]


def both_look(one: Any, two: Any) -> None:
    """At one conversation."""
    ask(one, "plain")
    answer(one)
    one.locator(".history li a").wait_for()
    two.goto(one.url)
    assert answer(two).locator(".markdown").inner_text() == "the fox"


def test_two_windows_lose_nothing(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as one, visited(browser, place.port) as two:
        both_look(one, two)
        for page in (one, two):  # neither knows of the other's
            ask(page, "think")
            page.locator(".message.assistant").nth(1).wait_for()
            answer(page)
        two.get_by_text("went on in another window too").wait_for()
        # Both questions stand beside one another, each with its answer.
        assert two.locator(".message.user").last.locator(".versions span").inner_text() == "2/2"
        two.locator(".message.user").last.get_by_role("button", name="Previous version").click()
        answered = answer(one).locator("> .markdown").inner_text()
        assert answered and answer(two).locator("> .markdown").inner_text() == answered
        both = sorted(["plain", "the fox", "think", "think", answered, answered])
        comes(two, lambda: sorted(node["content"] for node in kept(place)[0]["nodes"]) == both)
    assert len(kept(place)) == 1


def prompted(page: Any, text: str) -> None:
    page.get_by_role("button", name="Sampling").click()
    page.get_by_label("System prompt").fill(text)
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")


def renamed(page: Any, title: str) -> None:
    page.locator(".history li").hover()
    page.get_by_role("button", name="Rename").click()
    page.fill("dialog input", title)
    page.keyboard.press("Enter")
    page.locator(".history li a", has_text=title).wait_for()


def test_settings_and_names_of_two_windows_are_kept(browser: Any, place: Service) -> None:
    """Of the one that goes on in an older state, and of the other."""
    with visited(browser, place.port) as one, visited(browser, place.port) as two:
        both_look(one, two)
        ask(two, "think")
        two.locator(".message.assistant").nth(1).wait_for()
        answer(two)
        comes(two, lambda: len(kept(place)[0]["nodes"]) == 4)
        prompted(one, "Be brief.")
        one.get_by_text("went on in another window too").wait_for()
        comes(one, lambda: kept(place)[0]["system"] == "Be brief.")
        renamed(two, "a name")
        prompted(one, "Be very brief.")
        comes(one, lambda: kept(place)[0]["system"] == "Be very brief.")
        ask(one, "plain")
        one.locator(".message.assistant").nth(1).wait_for()
        answer(one)
        comes(one, lambda: len(kept(place)[0]["nodes"]) == 6)
    [conversation] = kept(place)
    assert (conversation["title"], conversation["system"]) == ("a name", "Be very brief.")


def test_an_answer_is_not_set_back_by_who_saw_it_begin(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as one, visited(browser, place.port) as two:
        held: list[Any] = []
        one.route("**/v1/chat/completions", lambda route: held.append(route))
        ask(one, "plain")
        comes(one, lambda: bool(held))
        two.goto(one.url)
        two.locator(".bubble").wait_for()
        prompted(two, "Be brief.")
        comes(two, lambda: kept(place)[0]["system"] == "Be brief.")
        held[0].continue_()
        answer(one)
        comes(one, lambda: kept(place)[0]["nodes"][1]["content"] == "the fox")
        prompted(two, "Be very brief.")
        comes(two, lambda: kept(place)[0]["system"] == "Be very brief.")
    assert kept(place)[0]["nodes"][1]["content"] == "the fox"


def test_a_change_is_kept_though_one_before_it_is_still_on_its_way(
    browser: Any, place: Service
) -> None:
    with visited(browser, place.port) as page:
        ask(page, "plain")
        answer(page)
        page.locator(".history li a").wait_for()
        comes(page, lambda: bool(kept(place)[0]["nodes"][-1]["content"]))
        page.wait_for_load_state("networkidle")
        held = first_put_held(page)
        prompted(page, "Be")
        comes(page, lambda: bool(held))
        prompted(page, "Be brief.")
        page.keyboard.press("Control+k")
        page.locator(".empty").wait_for()
        held[0].continue_()
        comes(page, lambda: kept(place)[0]["system"] == "Be brief.")


def test_what_was_deleted_in_another_window_goes_on_here(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        ask(page, "plain")
        answer(page)
        page.locator(".history li a").wait_for()
        [conversation] = kept(place)
        place.ask("DELETE", f"/v1/conversations/{conversation['id']}")
        ask(page, "think")
        page.locator(".message.assistant").nth(1).wait_for()
        answer(page)
        comes(page, lambda: [len(each["nodes"]) for each in kept(place)] == [4])


def test_all_that_is_kept_is_exported(browser: Any, place: Service, tmp_path: Path) -> None:
    """And comes back with its times, in the several parts that so much of it takes."""
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
    with visited(browser, place.port, "/#/settings") as page:
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Export all").click()
        waiting.value.save_as(tmp_path / "out.json")
        exported = json.loads((tmp_path / "out.json").read_text("utf-8"))["conversations"]
        assert {each["id"] for each in exported} == set(ids)
        page.set_input_files("input[type=file]", tmp_path / "out.json")
        page.get_by_text("130 conversations imported").wait_for()
    listed = place.ask("GET", "/v1/conversations?limit=1000")[2]["data"]
    assert sorted((each["title"], each["updated"]) for each in listed) == sorted(
        (each["title"], each["updated"]) for each in many * 2
    )
    assert len({each["id"] for each in listed}) == 260


def test_nothing_is_exported_before_it_is_known_where_it_is_kept(
    browser: Any, place: Service
) -> None:
    with visited(browser, place.port, "/#/settings") as page:
        export = page.get_by_role("button", name="Export all")
        held: list[Any] = []
        page.route("**/openapi.json", lambda route: held.append(route))
        page.reload()
        export.wait_for()
        assert export.is_disabled() and page.locator("input[type=file]").is_disabled()
        held[0].continue_()
        export.and_(page.locator(":enabled")).wait_for()
        page.route("**/v1/conversations**", lambda route: route.abort("connectionrefused"))
        export.click()
        page.get_by_role("status").get_by_text("can't be reached").wait_for()
