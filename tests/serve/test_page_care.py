"""Small things of the page that lose work or patience where they are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import answer, ask, comes, first_put_held, ready, visited
from serving import Service, served, slowed, wait_until

from khaosz.serve.app import record_routes

pytestmark = pytest.mark.browser

LONG = "春 fox " * 20  # the tiny model goes on to its limit


@pytest.fixture
def place(taught: Path, tiny: Path, tmp_path: Path) -> Iterator[Service]:
    with served(taught, tiny, routers=record_routes(tmp_path, tmp_path / "runs")) as running:
        slowed(running, "tiny")
        yield running


def started(page: Any) -> None:
    """A long answer is on its way."""
    page.select_option(".picker select", "tiny")
    page.get_by_role("button", name="Sampling").click()
    page.get_by_label("Temperature").fill("0")  # or it may end by itself
    page.get_by_label("Longest answer").fill("1900")
    page.keyboard.press("Escape")
    ask(page, LONG)
    page.locator(".message.assistant .markdown").wait_for()


def kept(service: Service) -> list[dict[str, Any]]:
    found = service.ask("GET", "/v1/conversations")[2]["data"]
    return [service.ask("GET", f"/v1/conversations/{each['id']}")[2] for each in found]


def put(service: Service, *titles: str) -> None:
    """Conversations of these titles, which are also what is asked in them."""
    made = []
    for i, title in enumerate(titles):
        ids = [f"00000000-0000-4000-8000-0000000000{i}{n}" for n in range(3)]
        question = {"id": ids[1], "parent": None, "role": "user", "content": title, "created": 1}
        reply = {**question, "id": ids[2], "parent": ids[1], "role": "assistant"}
        nodes = [question, {**reply, "content": f"{title}, answered"}]
        made.append({"id": ids[0], "title": title, "nodes": nodes, "selected": ids[2]})
    body = json.dumps({"conversations": made})
    assert service.ask("POST", "/v1/conversations/import", body)[0] == 200


def opened(page: Any, title: str) -> None:
    page.locator(".history li a", has_text=title).click()
    page.locator(".bubble", has_text=title).wait_for()


def said(service: Service) -> list[str]:
    [conversation] = kept(service)
    return [node["content"] for node in conversation["nodes"]]


def test_who_looks_elsewhere_at_once_loses_no_question(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        ready(page)
        page.fill("#message", "plain")
        # Both keys before the page has come to keep anything.
        page.evaluate(
            """() => { const key = (of, what) => of.dispatchEvent(
                 new KeyboardEvent("keydown", {bubbles: true, cancelable: true, ...what}));
               key(document.getElementById("message"), {key: "Enter"});
               key(document.body, {key: "k", ctrlKey: true}) }"""
        )
        page.locator(".empty").wait_for()
        page.wait_for_function("() => document.querySelector('.history li a')")
        page.locator(".history li a").click()
        assert answer(page).locator(".markdown").inner_text() == "the fox"
        comes(page, lambda: said(place) == ["plain", "the fox"])


def test_an_answer_under_way_brings_nothing_back(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        started(page)
        entry = page.locator(".history li")
        entry.hover()
        entry.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        page.locator(".empty").wait_for()
        page.get_by_text("Nothing here yet.").wait_for()
        loaded = place.models.find("tiny").loaded
        assert loaded is not None
        wait_until(lambda: loaded.worker.held == 0)  # nobody waits for it any more
        page.wait_for_timeout(300)
        assert kept(place) == []


def test_who_scrolls_up_is_left_there(browser: Any, place: Service) -> None:
    low = {"width": 800, "height": 420}
    with visited(browser, place.port, viewport=low) as page:
        started(page)
        page.wait_for_function(
            "() => { const e = document.querySelector('.scroll');"
            " return e.scrollHeight > e.clientHeight + 200 }"
        )
        page.evaluate("document.querySelector('.scroll').scrollBy(0, -30)")
        page.wait_for_timeout(100)
        said = len(page.locator(".message.assistant .markdown").inner_text())
        page.wait_for_function(
            "n => document.querySelector('.message.assistant .markdown').innerText.length > n + 50",
            arg=said,
        )
        assert (
            page.evaluate(
                "() => { const e = document.querySelector('.scroll');"
                " return e.scrollHeight - e.scrollTop - e.clientHeight }"
            )
            > 30
        )
        page.get_by_role("button", name="To the end").click()
        page.keyboard.press("Escape")
        answer(page)


def test_a_question_without_an_answer_can_be_asked_again(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        page.locator(".picker select").select_option("taught")
        page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
        ask(page, "plain")
        page.get_by_text("can't be reached").wait_for()
        page.unroute("**/v1/chat/completions")
        page.reload()
        assert page.locator(".bubble").inner_text() == "plain"
        page.get_by_text("no answer yet").wait_for()
        page.get_by_role("button", name="Try again").click()
        assert answer(page).locator(".markdown").inner_text() == "the fox"


def test_a_dialog_gives_the_focus_back_and_keeps_keys_to_itself(
    browser: Any, place: Service
) -> None:
    with visited(browser, place.port) as page:
        opener = page.get_by_role("button", name="Sampling")
        opener.focus()
        page.keyboard.press("Enter")
        box = page.get_by_label("System prompt")
        box.fill("Be brief.")
        page.keyboard.press("Control+k")
        assert box.input_value() == "Be brief."
        # Text selected from the field to beside the dialog.
        place_of = box.bounding_box()
        page.mouse.move(place_of["x"] + 40, place_of["y"] + 20)
        page.mouse.down()
        page.mouse.move(20, 300)
        page.mouse.up()
        assert page.get_by_role("dialog").is_visible()
        page.get_by_role("dialog").get_by_role("button", name="Close").click()
        page.get_by_role("dialog").wait_for(state="detached")
        page.wait_for_function("() => document.activeElement.ariaLabel === 'Sampling'")


def test_a_draft_waits_and_escape_of_an_input_method_stops_nothing(
    browser: Any, place: Service
) -> None:
    with visited(browser, place.port) as page:
        page.fill("#message", "half a thought")
        page.get_by_role("link", name="Settings").click()
        page.get_by_role("link", name="Chat", exact=True).click()
        assert page.input_value("#message") == "half a thought"
        started(page)
        page.evaluate(
            """() => document.getElementById("message").dispatchEvent(new KeyboardEvent(
                 "keydown", {key: "Escape", bubbles: true, isComposing: true}))"""
        )
        page.wait_for_timeout(100)
        assert page.get_by_role("button", name="Stop").is_visible()
        page.keyboard.press("Escape")
        assert "stopped" in answer(page).locator(".facts").inner_text()


def test_a_server_that_is_late_is_met_again(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        page.route("**/openapi.json", lambda route: route.abort("connectionrefused"))
        page.reload()
        page.get_by_text("can't be reached").wait_for()
        page.unroute("**/openapi.json")
        page.get_by_role("button", name="Try again").click()
        ask(page, "plain")
        assert answer(page).locator(".markdown").inner_text() == "the fox"


def test_a_prompt_that_is_written_is_kept_once_or_twice(browser: Any, place: Service) -> None:
    """And not with every key; the last one is in it all the same."""
    with visited(browser, place.port) as page:
        ask(page, "plain")
        answer(page)
        page.get_by_role("button", name="Sampling").click()
        puts: list[str] = []
        page.on("request", lambda sent: puts.append(sent.method) if sent.method == "PUT" else None)
        page.evaluate(
            """() => { const area = document.querySelector("dialog textarea");
               for (const letter of "Answer like a pirate, always.") {
                 area.value += letter;
                 area.dispatchEvent(new InputEvent("input", {bubbles: true})) } }"""
        )
        comes(page, lambda: kept(place)[0]["system"] == "Answer like a pirate, always.")
        assert 1 <= len(puts) <= 2


def test_a_conversation_that_comes_late_takes_no_other_s_place(
    browser: Any, place: Service
) -> None:
    """The answer would go into another conversation than the address and the list name."""
    put(place, "slow", "quick")
    with visited(browser, place.port) as page:
        ready(page)
        held: list[Any] = []
        page.route("**/v1/conversations/*", lambda route: held.append(route))
        for other in ("quick", ""):
            held.clear()
            page.locator(".history li a", has_text="slow").click()
            comes(page, lambda: bool(held))
            if other:
                page.locator(".history li a", has_text=other).click()
                comes(page, lambda: len(held) == 2)
                held.pop().continue_()
                page.locator(".bubble", has_text=other).wait_for()
            else:
                page.keyboard.press("Control+k")
                page.locator(".empty").wait_for()
            with page.expect_response("**/v1/conversations/*"):
                held[0].continue_()
            page.wait_for_timeout(100)
            assert page.locator(".bubble").all_inner_texts() == ([other] if other else [])


def test_nothing_is_asked_while_another_answer_comes(browser: Any, place: Service) -> None:
    """Neither by an example nor by an editor that was open already: it would not be kept."""
    with visited(browser, place.port) as page:
        ask(page, "plain")
        answer(page)
        page.locator(".message.user").hover()
        page.get_by_role("button", name="Edit").click()
        page.fill(".editor textarea", "think")
        started(page)
        page.focus(".editor textarea")
        page.keyboard.press("Enter")
        assert page.input_value(".editor textarea") == "think"
        page.keyboard.press("Control+k")
        example = page.locator(".examples button").first
        example.wait_for()
        assert example.is_disabled()
        page.keyboard.press("Escape")
        example.and_(page.locator(":enabled")).click()
        answer(page)
        assert page.locator(".history li").count() == 2


def test_an_answer_again_that_fails_takes_the_former_one_from_nobody(
    browser: Any, place: Service
) -> None:
    with visited(browser, place.port) as page:
        page.locator(".picker select").select_option("taught")
        ask(page, "plain")
        answer(page)
        page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
        answer(page).get_by_role("button", name="Answer again").click()
        page.get_by_text("can't be reached").wait_for()
        assert answer(page).locator(".markdown").inner_text() == "the fox"
        page.reload()
        assert answer(page).locator(".markdown").inner_text() == "the fox"
        assert page.locator(".message").count() == 2


def test_an_answer_that_broke_off_says_so(browser: Any, place: Service) -> None:
    """Also later, and to who looked elsewhere when it did."""
    half = {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
    with visited(browser, place.port) as page:
        sent = {"content_type": "text/event-stream", "body": f"data: {json.dumps(half)}\n\n"}
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**sent))
        ask(page, "plain")
        page.get_by_text("can't be reached").wait_for()
        comes(page, lambda: said(place) == ["plain", "half"])
        page.reload()
        assert "broken off" in answer(page).locator(".facts").inner_text()


def deleted(page: Any) -> None:
    page.locator(".history li").hover()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()


def test_what_could_not_be_deleted_is_still_kept(browser: Any, place: Service) -> None:
    put(place, "poem")
    with visited(browser, place.port) as page:
        opened(page, "poem")
        page.route("**/v1/conversations/*", lambda route: route.abort("connectionrefused"))
        deleted(page)
        page.get_by_role("alert").get_by_text("can't be reached").wait_for()
        page.unroute("**/v1/conversations/*")
        ask(page, "plain")
        comes(page, lambda: said(place)[2:] == ["plain", "the fox"])


def test_what_is_being_written_brings_nothing_back(browser: Any, place: Service) -> None:
    put(place, "poem")
    with visited(browser, place.port) as page:
        opened(page, "poem")
        held = first_put_held(page)
        page.get_by_role("button", name="Sampling").click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.keyboard.press("Escape")
        comes(page, lambda: bool(held))
        deleted(page)
        page.wait_for_timeout(200)
        held[0].continue_()
        page.locator(".empty").wait_for()
        page.wait_for_load_state("networkidle")
        assert kept(place) == []


def test_the_meter_is_of_what_is_shown(browser: Any, place: Service) -> None:
    put(place, "a title of many more tokens", "poem")
    with visited(browser, place.port) as page:
        ready(page)
        opened(page, "poem")
        meter = page.locator(".meter")
        meter.wait_for()
        page.wait_for_load_state("networkidle")
        small = meter.get_attribute("title")
        held: list[Any] = []
        page.route("**/tokenize", lambda route: route.continue_() if held else held.append(route))
        opened(page, "many more")
        comes(page, lambda: bool(held))
        with page.expect_response("**/tokenize"):
            opened(page, "poem")
        page.wait_for_timeout(200)
        with page.expect_response("**/tokenize"):
            held[0].continue_()
        page.wait_for_timeout(100)
        assert meter.get_attribute("title") == small


def test_what_a_file_holds_can_end_no_page(browser: Any, place: Service) -> None:
    """The server keeps what an answer was found by as it comes."""
    put(place, "odd")
    [conversation] = kept(place)
    conversation["nodes"][1] |= {"retrieval": {"hits": [{}]}, "citations": [{}]}
    conversation["settings"] = {"stop": "x", "temperature": "hot"}
    body = json.dumps({"conversations": [conversation]})
    assert place.ask("POST", "/v1/conversations/import", body)[0] == 200
    with visited(browser, place.port) as page:
        opened(page, "odd")
        assert answer(page).locator(".markdown").inner_text() == "odd, answered"
        page.get_by_role("button", name="Sampling").click()
        assert page.get_by_label("Stop at").input_value() == ""
        page.keyboard.press("Escape")
        page.get_by_role("link", name="Settings").click()
        for broken in (None, {}, {"id": "x", "nodes": [None]}):
            content = json.dumps({"conversations": [broken]}).encode()
            file = {"name": "c.json", "mimeType": "application/json", "buffer": content}
            page.set_input_files("input[type=file]", file)
            page.get_by_text("holds no conversations").wait_for()
    assert len(kept(place)) == 1


@pytest.mark.parametrize("full", [False, True])
def test_an_answer_is_kept_once_the_server_is_there_again(
    browser: Any, place: Service, full: bool
) -> None:
    """Or once it has room again."""
    why = "the disk is full" if full else "can't be reached"
    with visited(browser, place.port) as page:
        ready(page)
        puts: list[Any] = []

        def away(route: Any) -> None:
            if route.request.method == "PUT":
                puts.append(route)
            if route.request.method == "PUT" and len(puts) == 2:
                if full:
                    told = {"message": why, "type": "server_error", "code": "disk_full"}
                    route.fulfill(status=507, json={"error": told})
                else:
                    route.abort("connectionrefused")
            else:
                route.continue_()

        page.route("**/v1/conversations/*", away)
        ask(page, "plain")
        page.get_by_role("alert").get_by_text(why).wait_for()
        assert said(place) == ["plain", ""]
        page.get_by_role("alert").wait_for(state="detached")
        comes(page, lambda: said(place) == ["plain", "the fox"])


def test_a_very_long_search_finds_what_it_says(browser: Any, place: Service) -> None:
    put(place, "poem")
    with visited(browser, place.port) as page:
        page.locator(".history li").wait_for()
        page.focus(".search input")
        page.keyboard.insert_text("z" * 300)
        page.get_by_text("Nothing found.").wait_for()
