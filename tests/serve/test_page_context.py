"""A full context and deleted messages, in Chromium with a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import PHONE, ask, last_answer, open_page, stored_conversations
from serving import CONTEXT, Service, served

from khaosz.serve.records.conversation_store import ConversationStore
from khaosz.serve.records.conversations import conversation_routes

pytestmark = pytest.mark.browser

WORDS = "春 fox " * 150  # hundreds of tokens: three such turns fill the context


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store = ConversationStore(tmp_path_factory.mktemp("store") / "conversations.db")
    with served(tiny, routers=[conversation_routes(store)]) as running:
        yield running
    store.close()


def limit_answers(page: Any) -> None:
    page.get_by_role("button", name="Chat settings").click()
    page.get_by_label("Max tokens").fill("8")
    page.keyboard.press("Escape")


def ask_and_wait(page: Any, text: str) -> None:
    count = page.locator(".message.assistant").count()
    ask(page, text)
    page.locator(".message.assistant").nth(count).wait_for()
    last_answer(page)


def meter(page: Any) -> tuple[float, str]:
    element = page.locator(".meter meter")
    return float(element.get_attribute("value")), element.get_attribute("aria-label")


@pytest.mark.parametrize("viewport", [None, PHONE])
def test_a_full_context_is_no_dead_end(browser: Any, place: Service, viewport: Any) -> None:
    with open_page(browser, place.port, viewport=viewport) as page:
        limit_answers(page)
        for i in range(6):
            ask_and_wait(page, f"{i} {WORDS}")
            assert page.locator(".problem").count() == 0
        page.locator(".left-out").wait_for()
        # The line is before the first message that the model sees, and the meter counts the rest.
        page.wait_for_function(
            """() => {
                 const above = [...document.querySelector(".left-out").parentElement.children]
                   .findIndex(each => each.className === "left-out");
                 return document.querySelector(".meter")?.title.includes(`left out: ${above}.`);
               }"""
        )
        order = page.locator(".column > *").evaluate_all("all => all.map(each => each.className)")
        above = order.index("left-out")
        assert 0 < above < len(order) - 2 and above % 2 == 0
        value, label = meter(page)
        assert 0.5 < value <= 1
        assert f"of {CONTEXT:,} tokens" in label and f"left out: {above}." in label
        assert page.locator(".meter").inner_text().strip().endswith("%")
        # Found again after a reload, from the stored conversation and the count.
        [stored] = stored_conversations(place)[:1]
        assert stored["nodes"][-1]["left_out"] > 0
        page.reload()
        page.locator(".left-out").wait_for()
        overflows = "document.documentElement.scrollWidth > innerWidth"
        assert not page.evaluate(overflows)


def test_a_message_longer_than_the_context_is_named(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        ask(page, "fox " * CONTEXT)
        page.get_by_text("too long for the model's context").wait_for()
        page.wait_for_selector(".meter")
        assert meter(page)[0] == 1
        assert page.locator(".meter").inner_text().replace("\n", " ") == "Context 100 %"


def delete(page: Any, message: Any, choice: str) -> None:
    message.hover()
    message.get_by_role("button", name="Delete message").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name=choice).click()
    dialog.wait_for(state="detached")


def bubbles(page: Any) -> list[str]:
    texts: list[str] = page.locator(".bubble").all_inner_texts()
    return texts


def test_messages_are_deleted(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        limit_answers(page)
        for text in ("one", "two", "three"):
            ask_and_wait(page, text)
        last_answer(page).get_by_role("button", name="Regenerate").click()
        page.locator(".message.assistant .versions").wait_for()
        last_answer(page)
        id = page.url.rsplit("/", 1)[1]

        def stored() -> list[str]:
            nodes = place.ask("GET", f"/v1/conversations/{id}")[2]["nodes"]
            return [each["content"] for each in nodes if each["role"] == "user"]

        # One of two answers, then a turn in the middle, then the rest from a message on.
        delete(page, page.locator(".message.assistant").last, "Delete this answer")
        assert page.locator(".message.assistant .versions").count() == 0
        delete(page, page.locator(".message.user").nth(1), "question and its answers: 2")
        assert bubbles(page) == ["one", "three"]
        page.reload()
        last_answer(page)
        assert bubbles(page) == stored() == ["one", "three"]
        assert page.locator(".message").count() == 4
        # Nothing happens without confirmation.
        first = page.locator(".message.user").first
        first.hover()
        first.get_by_role("button", name="Delete message").click()
        page.keyboard.press("Escape")
        assert bubbles(page) == ["one", "three"]
        delete(page, page.locator(".message.assistant").first, "everything from here on: 3")
        assert bubbles(page) == ["one"]
        page.get_by_role("button", name="Try again").click()
        last_answer(page)
        delete(page, first, "question and its answers: 2")
        page.wait_for_selector(".empty")
        page.wait_for_function("() => !document.querySelector('.history li.open')")
        assert place.ask("GET", f"/v1/conversations/{id}")[0] == 404


def test_a_deletion_survives_a_change_in_another_window(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as one:
        limit_answers(one)
        ask_and_wait(one, "one")
        ask_and_wait(one, "two")
        two = one.context.new_page()
        two.goto(one.url)
        last_answer(two)
        delete(one, one.locator(".message.user").first, "question and its answers: 2")
        ask_and_wait(two, "three")
        one.reload()
        last_answer(one)
        assert bubbles(one) == ["two", "three"]
