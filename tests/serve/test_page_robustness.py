"""Races, failures and odd input on the page, in Chromium with a real server."""

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
    wait_for_model,
)
from serving import Service, served, slowed, wait_until

from khaosz.serve.app import record_routes

pytestmark = pytest.mark.browser

LONG = "春 fox " * 20  # the tiny model generates up to its limit
GENERATE = "**/v1/conversations/*/generations"  # requests of new answers


@pytest.fixture
def place(taught: Path, tiny: Path, tmp_path: Path) -> Iterator[Service]:
    with served(taught, tiny, routers=record_routes(tmp_path, tmp_path / "runs")) as running:
        slowed(running, "tiny")
        yield running


def start_long_answer(page: Any) -> None:
    """Start an answer that streams until it is stopped."""
    page.select_option(".picker select", "tiny")
    page.get_by_role("button", name="Chat settings").click()
    page.get_by_label("Temperature").fill("0")  # else it might end early
    page.get_by_label("Max tokens").fill("1900")
    page.keyboard.press("Escape")
    ask(page, LONG)
    page.locator(".message.assistant .markdown").wait_for()


def import_conversations(service: Service, *titles: str) -> None:
    """Import a conversation per title, with the title as its question."""
    conversations = []
    for i, title in enumerate(titles):
        ids = [f"00000000-0000-4000-8000-0000000000{i}{n}" for n in range(3)]
        question = {"id": ids[1], "parent": None, "role": "user", "content": title, "created": 1}
        reply = {**question, "id": ids[2], "parent": ids[1], "role": "assistant"}
        nodes = [question, {**reply, "content": f"{title}, answered"}]
        conversations.append({"id": ids[0], "title": title, "nodes": nodes, "selected": ids[2]})
    body = json.dumps({"conversations": conversations})
    assert service.ask("POST", "/v1/conversations/import", body)[0] == 200


def open_conversation(page: Any, title: str) -> None:
    page.locator(".history li a", has_text=title).click()
    page.locator(".bubble", has_text=title).wait_for()


def stored_texts(service: Service) -> list[str]:
    [conversation] = stored_conversations(service)
    return [node["content"] for node in conversation["nodes"]]


def test_new_chat_right_after_sending_keeps_the_question(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        wait_for_model(page)
        page.fill("#message", "plain")
        # Both keys before the page has saved anything.
        page.evaluate(
            """() => { const key = (of, what) => of.dispatchEvent(
                 new KeyboardEvent("keydown", {bubbles: true, cancelable: true, ...what}));
               key(document.getElementById("message"), {key: "Enter"});
               key(document.body, {key: "k", ctrlKey: true}) }"""
        )
        page.locator(".empty").wait_for()
        page.wait_for_function("() => document.querySelector('.history li a')")
        page.locator(".history li a").click()
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"
        wait_for(page, lambda: stored_texts(place) == ["plain", "the fox"])


def test_running_answer_does_not_restore_a_deleted_conversation(
    browser: Any, place: Service
) -> None:
    with open_page(browser, place.port) as page:
        start_long_answer(page)
        entry = page.locator(".history li")
        entry.hover()
        entry.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        page.locator(".empty").wait_for()
        page.get_by_text("No conversations yet.").wait_for()
        loaded = place.models.find("tiny").loaded
        assert loaded is not None
        wait_until(lambda: loaded.worker.open_requests == 0)  # generation has stopped
        page.wait_for_timeout(300)
        assert stored_conversations(place) == []


def test_scrolling_up_stops_following_the_answer(browser: Any, place: Service) -> None:
    low = {"width": 800, "height": 420}
    with open_page(browser, place.port, viewport=low) as page:
        start_long_answer(page)
        page.wait_for_function(
            "() => { const e = document.querySelector('.scroll');"
            " return e.scrollHeight > e.clientHeight + 200 }"
        )
        page.evaluate("document.querySelector('.scroll').scrollBy(0, -30)")
        page.wait_for_timeout(100)
        length = len(page.locator(".message.assistant .markdown").inner_text())
        page.wait_for_function(
            "n => document.querySelector('.message.assistant .markdown').innerText.length > n + 50",
            arg=length,
        )
        assert (
            page.evaluate(
                "() => { const e = document.querySelector('.scroll');"
                " return e.scrollHeight - e.scrollTop - e.clientHeight }"
            )
            > 30
        )
        page.get_by_role("button", name="Scroll to the end").click()
        page.keyboard.press("Escape")
        last_answer(page)


def test_retries_a_question_without_an_answer(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        page.locator(".picker select").select_option("taught")
        page.route(GENERATE, lambda route: route.abort("connectionrefused"))
        ask(page, "plain")
        page.get_by_text("can't be reached").wait_for()
        page.unroute(GENERATE)
        page.reload()
        assert page.locator(".bubble").inner_text() == "plain"
        page.get_by_text("No answer yet").wait_for()
        page.get_by_role("button", name="Try again").click()
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"


def test_dialog_returns_focus_and_captures_keys(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        opener = page.get_by_role("button", name="Chat settings")
        opener.focus()
        page.keyboard.press("Enter")
        box = page.get_by_label("System prompt")
        box.fill("Be brief.")
        page.keyboard.press("Control+k")
        assert box.input_value() == "Be brief."
        # A text selection that ends outside the dialog.
        bounds = box.bounding_box()
        page.mouse.move(bounds["x"] + 40, bounds["y"] + 20)
        page.mouse.down()
        page.mouse.move(20, 300)
        page.mouse.up()
        assert page.get_by_role("dialog").is_visible()
        page.get_by_role("dialog").get_by_role("button", name="Close").click()
        page.get_by_role("dialog").wait_for(state="detached")
        page.wait_for_function("() => document.activeElement.ariaLabel === 'Chat settings'")


def test_draft_persists_and_composing_escape_does_not_stop(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        page.fill("#message", "half a thought")
        page.get_by_role("link", name="Settings").click()
        page.get_by_role("link", name="Chat", exact=True).click()
        assert page.input_value("#message") == "half a thought"
        start_long_answer(page)
        page.evaluate(
            """() => document.getElementById("message").dispatchEvent(new KeyboardEvent(
                 "keydown", {key: "Escape", bubbles: true, isComposing: true}))"""
        )
        page.wait_for_timeout(100)
        assert page.get_by_role("button", name="Stop").is_visible()
        page.keyboard.press("Escape")
        assert "stopped" in last_answer(page).locator(".metadata").inner_text()


def test_reconnects_to_a_server_that_starts_late(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        page.route("**/openapi.json", lambda route: route.abort("connectionrefused"))
        page.reload()
        page.get_by_text("can't be reached").wait_for()
        page.unroute("**/openapi.json")
        page.get_by_role("button", name="Try again").click()
        ask(page, "plain")
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"


def test_typing_a_system_prompt_saves_at_most_twice(browser: Any, place: Service) -> None:
    """Not for every key, but including the last one."""
    with open_page(browser, place.port) as page:
        ask(page, "plain")
        last_answer(page)
        page.get_by_role("button", name="Chat settings").click()
        puts: list[str] = []
        page.on(
            "request",
            lambda request: puts.append(request.method) if request.method == "PUT" else None,
        )
        page.evaluate(
            """() => { const area = document.querySelector("dialog textarea");
               for (const letter of "Answer like a pirate, always.") {
                 area.value += letter;
                 area.dispatchEvent(new InputEvent("input", {bubbles: true})) } }"""
        )
        wait_for(
            page,
            lambda: stored_conversations(place)[0]["system"] == "Answer like a pirate, always.",
        )
        assert 1 <= len(puts) <= 2


def test_late_conversation_does_not_replace_the_open_one(browser: Any, place: Service) -> None:
    """Otherwise an answer would go to another conversation than the one in the address."""
    import_conversations(place, "slow", "quick")
    with open_page(browser, place.port) as page:
        wait_for_model(page)
        routes: list[Any] = []
        page.route("**/v1/conversations/*", lambda route: routes.append(route))
        for other in ("quick", ""):
            routes.clear()
            page.locator(".history li a", has_text="slow").click()
            wait_for(page, lambda: bool(routes))
            if other:
                page.locator(".history li a", has_text=other).click()
                wait_for(page, lambda: len(routes) == 2)
                routes.pop().continue_()
                page.locator(".bubble", has_text=other).wait_for()
            else:
                page.keyboard.press("Control+k")
                page.locator(".empty").wait_for()
            with page.expect_response("**/v1/conversations/*"):
                routes[0].continue_()
            page.wait_for_timeout(100)
            assert page.locator(".bubble").all_inner_texts() == ([other] if other else [])


def test_sending_is_blocked_while_an_answer_streams(browser: Any, place: Service) -> None:
    """In this conversation; another one is answered meanwhile."""
    with open_page(browser, place.port) as page:
        ask(page, "plain")
        last_answer(page)
        page.locator(".message.user").hover()
        page.get_by_role("button", name="Edit").click()
        page.fill(".editor textarea", "think")
        start_long_answer(page)
        page.focus(".editor textarea")
        page.keyboard.press("Enter")
        assert page.input_value(".editor textarea") == "think"
        page.keyboard.press("Control+k")
        page.locator(".empty").wait_for()
        page.select_option(".picker select", "taught")
        ask(page, "plain")
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"
        page.wait_for_function("() => document.querySelectorAll('.history li').length === 2")
        page.locator(".history li a").last.click()
        page.get_by_role("button", name="Stop").wait_for()
        page.keyboard.press("Escape")
        assert "stopped" in last_answer(page).locator(".metadata").inner_text()


def test_failed_regeneration_keeps_the_previous_answer(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        page.locator(".picker select").select_option("taught")
        ask(page, "plain")
        last_answer(page)
        page.route(GENERATE, lambda route: route.abort("connectionrefused"))
        last_answer(page).get_by_role("button", name="Regenerate").click()
        page.get_by_text("can't be reached").wait_for()
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"
        page.reload()
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"
        assert page.locator(".message").count() == 2


def delete_conversation(page: Any) -> None:
    page.locator(".history li").hover()
    page.locator(".history").get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()


def test_failed_deletion_keeps_saving(browser: Any, place: Service) -> None:
    import_conversations(place, "poem")
    with open_page(browser, place.port) as page:
        open_conversation(page, "poem")
        page.route("**/v1/conversations/*", lambda route: route.abort("connectionrefused"))
        delete_conversation(page)
        page.get_by_role("alert").get_by_text("can't be reached").wait_for()
        page.unroute("**/v1/conversations/*")
        ask(page, "plain")
        wait_for(page, lambda: stored_texts(place)[2:] == ["plain", "the fox"])


def test_running_save_does_not_restore_a_deleted_conversation(browser: Any, place: Service) -> None:
    import_conversations(place, "poem")
    with open_page(browser, place.port) as page:
        open_conversation(page, "poem")
        routes = hold_first_put(page)
        page.get_by_role("button", name="Chat settings").click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.keyboard.press("Escape")
        wait_for(page, lambda: bool(routes))
        delete_conversation(page)
        page.wait_for_timeout(200)
        routes[0].continue_()
        page.locator(".empty").wait_for()
        page.wait_for_load_state("networkidle")
        assert stored_conversations(place) == []


def test_context_meter_belongs_to_the_open_conversation(browser: Any, place: Service) -> None:
    import_conversations(place, "a title of many more tokens", "poem")
    with open_page(browser, place.port) as page:
        wait_for_model(page)
        open_conversation(page, "poem")
        meter = page.locator(".meter")
        meter.wait_for()
        page.wait_for_load_state("networkidle")
        small = meter.get_attribute("title")
        routes: list[Any] = []
        page.route(
            "**/tokenize", lambda route: route.continue_() if routes else routes.append(route)
        )
        open_conversation(page, "many more")
        wait_for(page, lambda: bool(routes))
        with page.expect_response("**/tokenize"):
            open_conversation(page, "poem")
        page.wait_for_timeout(200)
        with page.expect_response("**/tokenize"):
            routes[0].continue_()
        page.wait_for_timeout(100)
        assert meter.get_attribute("title") == small


def test_malformed_conversations_do_not_crash_the_page(browser: Any, place: Service) -> None:
    """The server stores retrieval results without validating them."""
    import_conversations(place, "malformed")
    [conversation] = stored_conversations(place)
    conversation["nodes"][1] |= {"retrieval": {"hits": [{}]}, "citations": [{}]}
    conversation["settings"] = {"stop": "x", "temperature": "hot"}
    body = json.dumps({"conversations": [conversation]})
    assert place.ask("POST", "/v1/conversations/import", body)[0] == 200
    with open_page(browser, place.port) as page:
        open_conversation(page, "malformed")
        assert last_answer(page).locator(".markdown").inner_text() == "malformed, answered"
        page.get_by_role("button", name="Chat settings").click()
        assert page.get_by_label("Stop sequences").input_value() == ""
        page.keyboard.press("Escape")
        page.get_by_role("link", name="Settings").click()
        for broken in (None, {}, {"id": "x", "nodes": [None]}):
            content = json.dumps({"conversations": [broken]}).encode()
            file = {"name": "c.json", "mimeType": "application/json", "buffer": content}
            page.set_input_files("input[type=file]", file)
            page.get_by_text("No conversations found").wait_for()
    assert len(stored_conversations(place)) == 1


@pytest.mark.parametrize("full", [False, True])
def test_saving_is_retried_until_the_server_is_back(
    browser: Any, place: Service, full: bool
) -> None:
    """Or until its disk has space again."""
    message = "the disk is full" if full else "can't be reached"
    with open_page(browser, place.port) as page:
        ask(page, "plain")
        last_answer(page)
        page.wait_for_load_state("networkidle")
        puts: list[Any] = []

        def fail_first_put(route: Any) -> None:
            if route.request.method != "PUT":
                route.continue_()
                return
            puts.append(route)
            if len(puts) > 1:
                route.continue_()
            elif full:
                error = {"message": message, "type": "server_error", "code": "disk_full"}
                route.fulfill(status=507, json={"error": error})
            else:
                route.abort("connectionrefused")

        page.route("**/v1/conversations/*", fail_first_put)
        page.get_by_role("button", name="Chat settings").click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.keyboard.press("Escape")
        page.get_by_role("alert").get_by_text(message).wait_for()
        assert stored_conversations(place)[0]["system"] is None
        page.get_by_role("alert").wait_for(state="detached")
        wait_for(page, lambda: stored_conversations(place)[0]["system"] == "Be brief.")


def test_search_text_is_limited(browser: Any, place: Service) -> None:
    import_conversations(place, "poem")
    with open_page(browser, place.port) as page:
        page.locator(".history li").wait_for()
        page.focus(".search input")
        page.keyboard.insert_text("z" * 300)
        page.get_by_text("No results.").wait_for()


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_plain_http_is_not_called_private(browser: Any, place: Service, language: str) -> None:
    """Browsers call HTTPS and this machine secure, HTTP in a network not."""
    with open_page(browser, place.port, locale=language) as page:
        claim = page.locator(".empty p")
        claim.wait_for()
        private = claim.inner_text()
        page.add_init_script("Object.defineProperty(window, 'isSecureContext', {value: false})")
        page.reload()
        claim.wait_for()
        assert claim.inner_text() != private
        assert ("HTTPS" in claim.inner_text()) and "HTTPS" not in private
        assert page.locator(".empty h1").inner_text() in (
            "On your own server", "运行在你自己的服务器上",
        )  # fmt: skip
