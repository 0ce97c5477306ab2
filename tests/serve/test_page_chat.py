"""Chatting on the page, in a real browser with a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import PHONE, answer, ask, ready, visited
from serving import Service, served, slowed, wait_until

pytestmark = pytest.mark.browser

LONG = "春 fox " * 20  # the tiny model goes on to its limit


@pytest.fixture(scope="module")
def place(taught: Path, tiny: Path) -> Iterator[Service]:
    with served(taught, tiny) as running:
        slowed(running, "tiny")
        yield running


def test_an_answer_is_streamed_and_kept(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        ask(page, "plain")
        assert answer(page).locator(".markdown").inner_text() == "the fox"
        assert "tokens" in answer(page).locator(".facts").inner_text()
        assert page.locator(".message.user .bubble").inner_text() == "plain"
        page.reload()
        assert answer(page).locator(".markdown").inner_text() == "the fox"
        assert page.locator(".history li").count() == 1
        page.keyboard.press("Control+k")
        page.wait_for_selector(".empty")
        page.locator(".history li a").click()
        assert answer(page).locator(".markdown").inner_text() == "the fox"


def test_it_can_be_stopped(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        page.select_option(".picker select", "tiny")
        page.get_by_role("button", name="Sampling").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Longest answer").fill("1900")
        page.keyboard.press("Escape")
        ask(page, LONG)
        page.wait_for_selector(".message.assistant .markdown")
        page.get_by_role("button", name="Stop").click()
        assert "stopped" in answer(page).locator(".facts").inner_text()
        said = answer(page).locator(".markdown").inner_text()
        assert said
        loaded = place.models.find("tiny").loaded
        assert loaded is not None
        wait_until(lambda: loaded.worker.held == 0)
        page.reload()
        assert answer(page).locator(".markdown").inner_text() == said
        ask(page, LONG)
        page.wait_for_function(
            "() => document.querySelectorAll('.message.assistant .markdown').length === 2"
        )
        page.keyboard.press("Escape")
        assert "stopped" in answer(page).locator(".facts").inner_text()


def test_answers_and_questions_have_versions(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        ask(page, "plain")
        answer(page).get_by_role("button", name="Answer again").click()
        page.wait_for_selector(".message.assistant .versions")
        assert answer(page).locator(".versions span").inner_text() == "2/2"
        answer(page).get_by_role("button", name="Previous version").click()
        assert answer(page).locator(".versions span").inner_text() == "1/2"

        question = page.locator(".message.user")
        question.hover()
        question.get_by_role("button", name="Edit").click()
        page.fill(".editor textarea", "think")
        page.keyboard.press("Enter")
        assert answer(page).locator("> .markdown").inner_text() == "二"
        question = page.locator(".message.user")
        assert question.locator(".versions span").inner_text() == "2/2"
        question.get_by_role("button", name="Previous version").click()
        assert page.locator(".bubble").inner_text() == "plain"
        # The branch is there with its own versions.
        assert answer(page).locator(".versions span").inner_text() in ("1/2", "2/2")
        page.reload()
        assert page.locator(".bubble").inner_text() == "plain"


def test_thoughts_are_folded_away(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        ask(page, "think")
        found = answer(page)
        assert found.locator("> .markdown").inner_text() == "二"
        assert not found.locator(".thought .markdown").is_visible()
        found.get_by_text("Thought").click()
        assert found.locator(".thought .markdown").inner_text() == "一 + 一"


def test_enter_while_composing_never_sends(browser: Any, place: Service) -> None:
    """The input method's own Enter: as Chromium sends it (229), by `isComposing`, and Safari's,
    which comes when the composition has ended."""
    with visited(browser, place.port) as page:
        page.focus("#message")
        session = page.context.new_cdp_session(page)
        session.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6,
                                                 "selectionEnd": 6})  # fmt: skip
        for kind in ("rawKeyDown", "keyUp"):
            session.send("Input.dispatchKeyEvent", {
                "type": kind, "key": "Process", "code": "Enter", "windowsVirtualKeyCode": 229,
            })  # fmt: skip
        session.send("Input.insertText", {"text": "你好"})
        for extra in ({"isComposing": True}, {"keyCode": 229}):
            page.evaluate(
                """extra => document.getElementById("message").dispatchEvent(
                     new KeyboardEvent("keydown", {key: "Enter", bubbles: true, ...extra}))""",
                extra,
            )
        page.wait_for_timeout(200)
        assert page.locator(".message").count() == 0
        assert page.input_value("#message") == "你好"
        page.keyboard.press("Shift+Enter")
        page.keyboard.insert_text("吗")
        assert page.input_value("#message") == "你好\n吗"
        ready(page)
        page.keyboard.press("Enter")
        page.wait_for_selector(".message.user")
        assert page.locator(".bubble").inner_text() == "你好\n吗"
        answer(page)


def test_language_and_theme_are_remembered(browser: Any, place: Service) -> None:
    with visited(browser, place.port, "/#/settings") as page:
        page.get_by_text("中文").click()
        assert page.locator("html").get_attribute("lang") == "zh-CN"
        assert page.locator(".page h1").inner_text() == "设置"
        page.get_by_text("深色").click()
        ground = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(ground)
        page.reload()
        assert page.locator(".page h1").inner_text() == "设置"
        assert page.evaluate(ground) == dark
        page.get_by_text("浅色").click()
        assert page.evaluate(ground) != dark
    with visited(browser, place.port, locale="zh-CN") as page:
        assert page.get_by_text("新对话").first.is_visible()


HOSTILE = r"""
<script>window.harmed = 1</script><img src=x onerror="window.harmed = 2">
<svg onload="window.harmed = 3"></svg><iframe src="https://evil.example/"></iframe>
[click](javascript:window.harmed=4) ![leak](https://evil.example/?secret=1)
[ok](https://example.org/page "title") <a href="https://evil.example" onclick="x">raw</a>
![relative](/v1/models) [data](data:text/html,<script>window.harmed=5</script>)

| a | b |
|---|--:|
| 1 | <b onmouseover="window.harmed=6">2</b> |

```python
def f(x):
    return "<img src=x onerror=window.harmed=7>"
```

Euler: $e^{i\pi} + 1 = 0$ and $$\int_0^1 x^2\,dx = \frac{1}{3}$$ but it costs $5 and $6.

$\href{javascript:window.harmed=8}{x}$
"""


def kept(text: str) -> str:
    """A file as the page itself exports it."""
    ids = ["00000000-0000-4000-8000-00000000000" + str(i) for i in range(3)]
    none = {"reasoning": None, "citations": None, "retrieval": None, "created": 1}
    nodes = [
        {"id": ids[1], "parent": None, "role": "user", "content": "show", "model": None,
         "finish_reason": None, **none},
        {"id": ids[2], "parent": ids[1], "role": "assistant", "content": text, "model": "m",
         "finish_reason": "stop", **none},
    ]  # fmt: skip
    conversation = {"id": ids[0], "title": "kept", "system": None, "settings": {}, "nodes": nodes,
                    "knowledge_base": None, "selected": ids[2]}  # fmt: skip
    return json.dumps({"conversations": [conversation]})


def imported(page: Any, text: str) -> None:
    file = {"name": "c.json", "mimeType": "application/json", "buffer": kept(text).encode()}
    page.set_input_files("input[type=file]", file)
    page.get_by_text("1 conversations imported").wait_for()
    page.locator(".history li a", has_text="kept").first.click()
    page.wait_for_selector(".message.assistant")


def test_what_a_model_writes_can_do_no_harm(browser: Any, place: Service) -> None:
    """A conversation of a file takes the same way through the page as an answer."""
    with visited(browser, place.port, "/#/settings") as page:
        imported(page, HOSTILE)
        page.wait_for_selector(".markdown math")
        page.wait_for_selector(".hljs-keyword")
        page.wait_for_timeout(300)
        assert page.evaluate("window.harmed") is None
        inside = ".message.assistant .markdown"
        for bad in ("script", "img", "iframe", "svg", "[onclick]", "[onerror]", "[style]"):
            assert page.locator(f"{inside} {bad}").count() == 0, bad
        links = page.locator(f"{inside} a")
        for i in range(links.count()):
            assert links.nth(i).get_attribute("rel") == "noopener noreferrer nofollow"
            assert links.nth(i).get_attribute("href").startswith("https://")
        assert page.locator(f"{inside} math").count() == 2
        assert "costs $5 and $6" in page.locator(inside).inner_text()
        page.locator("[data-copy]").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith("def f(x):") and "<img src=x" in copied


def test_conversations_go_out_and_come_back(browser: Any, place: Service, tmp_path: Path) -> None:
    with visited(browser, place.port, "/#/settings") as page:
        imported(page, "a **bold** word")
        page.goto(page.url.split("#")[0] + "#/settings")
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Export all").click()
        waiting.value.save_as(tmp_path / "out.json")
        out = json.loads((tmp_path / "out.json").read_text())
        [conversation] = out["conversations"]
        assert conversation["nodes"][1]["content"] == "a **bold** word"
        page.set_input_files("input[type=file]", tmp_path / "out.json")
        page.wait_for_function("() => document.querySelectorAll('.history li').length === 2")
        broken = {"name": "c.json", "mimeType": "application/json", "buffer": b"{"}
        page.set_input_files("input[type=file]", broken)
        page.get_by_text("holds no conversations").wait_for()


def test_conversations_are_searched_renamed_and_deleted(browser: Any, place: Service) -> None:
    with visited(browser, place.port, "/#/settings") as page:
        imported(page, "春眠不觉晓")
        page.keyboard.press("Control+k")
        ask(page, "plain")
        answer(page)
        page.wait_for_function("() => document.querySelectorAll('.history li').length === 2")
        page.fill(".search input", "不觉")
        page.wait_for_function("() => document.querySelectorAll('.history li').length === 1")
        entry = page.locator(".history li")
        entry.hover()
        entry.get_by_role("button", name="Rename").click()
        page.fill("dialog input", "诗")
        page.keyboard.press("Enter")
        page.locator(".history li a", has_text="诗").wait_for()
        entry.hover()
        entry.get_by_role("button", name="Delete").click()
        page.locator("dialog").get_by_role("button", name="Delete").click()
        page.get_by_text("Nothing found.").wait_for()
        page.fill(".search input", "")
        page.wait_for_function("() => document.querySelectorAll('.history li').length === 1")


def test_two_windows_of_a_browser_lose_nothing(browser: Any, place: Service) -> None:
    """Where it keeps the conversations itself."""
    with visited(browser, place.port) as one:
        ask(one, "plain")
        answer(one)
        entry = one.locator(".history li a")
        entry.wait_for()
        two = one.context.new_page()
        two.goto(one.url)
        answer(two)
        for page in (one, two):  # neither knows of the other's
            ask(page, "think")
            page.locator(".message.assistant").nth(1).wait_for()
            answer(page)
        two.get_by_text("went on in another window too").wait_for()
        one.reload()
        answer(one)
        assert one.locator(".message.user").last.locator(".versions span").inner_text() == "2/2"
        # What was deleted in one of them goes on in the other.
        one.locator(".history li").hover()
        one.get_by_role("button", name="Delete").click()
        one.get_by_role("dialog").get_by_role("button", name="Delete").click()
        entry.wait_for(state="detached")
        ask(two, "plain")
        two.locator(".message.assistant").nth(2).wait_for()
        answer(two)
        one.reload()
        entry.click()
        assert answer(one, 2).locator(".markdown").inner_text() == "the fox"


def test_settings_of_a_conversation_are_sent(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        page.get_by_role("button", name="Sampling").click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Longest answer").fill("3")
        page.get_by_label("Stop at").fill("END")
        page.keyboard.press("Escape")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "plain")
        body = sent.value.post_data_json
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (body["temperature"], body["max_tokens"], body["stop"]) == (0.5, 3, ["END"])
        answer(page)
        page.keyboard.press("Control+k")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "plain")
        assert "temperature" not in sent.value.post_data_json
        answer(page)


def test_a_key_is_asked_for(browser: Any, taught: Path) -> None:
    with served(taught, key="sesame") as service, visited(browser, service.port) as page:
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("did not take this key").wait_for()
        page.get_by_label("Key", exact=True).fill("sesame")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('.picker select').value === 'taught'")
        ask(page, "plain")
        assert answer(page).locator(".markdown").inner_text() == "the fox"


@pytest.mark.parametrize("key", ["sesame", "芝麻"])
def test_a_key_of_any_letters_is_tried(browser: Any, taught: Path, key: str) -> None:
    """An input method's letters: the page would never ask for another key."""
    with served(taught, key=key) as service, visited(browser, service.port) as page:
        for wrong in ("ｓｅｓａｍｅ", "开门"):
            page.get_by_label("Key", exact=True).fill(wrong)
            page.keyboard.press("Enter")
            page.get_by_text("did not take this key").wait_for()
        page.get_by_label("Key", exact=True).fill(key)
        page.keyboard.press("Enter")
        ready(page)


def test_an_address_that_is_cut_short_ends_no_page(browser: Any, place: Service) -> None:
    with visited(browser, place.port, "/#/chat/100%") as page:
        ready(page)
        page.evaluate("location.hash = '#/training/100%25'")
        page.evaluate("location.hash = '#/settings'")
        page.get_by_role("heading", name="Settings").wait_for()


def test_errors_are_said_and_nothing_is_lost(browser: Any, taught: Path) -> None:
    with served(taught) as service, visited(browser, service.port) as page:
        page.wait_for_function("() => document.querySelector('.picker select').value === 'taught'")
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        ask(page, "plain")
        page.get_by_text("can't be reached").wait_for()
        assert page.locator(".bubble").inner_text() == "plain"
        assert page.get_by_role("button", name="Try again").is_visible()
        page.unroute("**/v1/**")
        page.get_by_role("button", name="Try again").click()
        assert answer(page).locator(".markdown").inner_text() == "the fox"
        assert page.locator(".message").count() == 2


def test_a_phone_shows_it_without_scrolling_sideways(browser: Any, place: Service) -> None:
    with visited(browser, place.port, "/#/settings", viewport=PHONE) as page:
        wide = "document.documentElement.scrollWidth > innerWidth"
        assert not page.evaluate(wide)
        imported_on_phone(page, HOSTILE + "\n\n" + "x" * 400 + "\n\n```\n" + "y" * 400 + "\n```")
        assert not page.evaluate(wide)
        for element in (".column", ".composer", ".top"):
            box = page.locator(element).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"], element


def imported_on_phone(page: Any, text: str) -> None:
    file = {"name": "c.json", "mimeType": "application/json", "buffer": kept(text).encode()}
    page.set_input_files("input[type=file]", file)
    page.get_by_text("1 conversations imported").wait_for()
    page.get_by_role("button", name="Menu").click()
    page.locator(".history li a", has_text="kept").click()
    page.wait_for_selector(".message.assistant")


def test_hands_that_have_only_a_keyboard(browser: Any, place: Service) -> None:
    with visited(browser, place.port) as page:
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("?")
        page.get_by_role("dialog").wait_for()
        page.keyboard.press("Escape")
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "message"
        page.keyboard.type("plain")
        ready(page)
        page.keyboard.press("Enter")
        answer(page)
        # Every control has a name that a screen reader can say.
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("button, a[href], input, select, textarea")]
              .filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length))
              .map(e => e.outerHTML)"""
        )
        assert unnamed == []
