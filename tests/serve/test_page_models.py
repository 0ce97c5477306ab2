"""Fetching a model, thinking and sampling, in Chromium with a real server and a local hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import PHONE, ask, last_answer, open_page, stored_conversations
from catalogue_helpers import KNOWN, hub, tiny_gguf
from hub_server import HubServer
from serving import Service, served, wait_until
from test_serve_thinking import switched_model

from khaosz.interop.fetch.store import models_folder
from khaosz.serve.app import record_routes

__all__ = ["hub", "tiny_gguf"]
pytestmark = pytest.mark.browser


def test_the_first_model_is_fetched_by_a_click(
    browser: Any, hub: HubServer, tmp_path: Path
) -> None:
    with (
        served(runs=tmp_path / "runs", routers=record_routes(tmp_path, tmp_path / "runs")) as empty,
        open_page(browser, empty.port) as page,
    ):
        page.wait_for_url("**/#/models")
        page.get_by_role("heading", name="Choose a model").wait_for()
        entry = page.locator(".proposed").get_by_role("listitem", name=KNOWN)
        assert "needs" in entry.inner_text() and "licence: MIT" in entry.inner_text()
        assert not hub.log, "looking asks no host"
        hub.pause = 0.1
        page.keyboard.press("Tab")
        page.get_by_role("button", name=f"Download: {KNOWN}").press("Enter")
        page.wait_for_function("() => document.querySelector('progress')?.value > 0")
        page.get_by_text("/s · ").wait_for()
        page.get_by_role("button", name=f"Cancel: {KNOWN}").click()
        page.get_by_text("interrupted,").wait_for()
        page.reload()  # another window, or later
        hub.pause = 0.0
        page.get_by_role("button", name=f"Resume: {KNOWN}").click()
        page.wait_for_url("**/#/chat")
        assert hub.ranges
        assert page.locator(".picker select").first.input_value() == KNOWN
        page.get_by_role("button", name="Chat settings").click()
        page.get_by_label("Max tokens").fill("4")
        page.keyboard.press("Escape")
        ask(page, "fox")
        assert KNOWN in last_answer(page).locator(".metadata").inner_text()
        # It lacks Chinese: said once, with the way to one that has it.
        ask(page, "春眠不觉晓，处处闻啼鸟")
        last_answer(page, 1)
        notice = page.locator(".notice")
        assert f"{KNOWN} was not trained for Chinese" in notice.inner_text()
        last_answer(page, 1).get_by_role("button", name="Regenerate").click()
        notice.get_by_role("link", name="Go to qwen3-0.6b").click()
        page.locator(".named", has_text="qwen3-0.6b").wait_for()
        page.go_back()
        last_answer(page, 1)
        assert notice.count() == 0


def test_a_licence_is_accepted_and_a_failure_is_one_line_in_chinese(
    browser: Any, hub: HubServer, tmp_path: Path, tiny_gguf: bytes
) -> None:
    hub.add("me/tiny", {"limited.gguf": tiny_gguf})
    commit = next(iter(hub.files["me/tiny"]))  # of the catalogue
    hub.files["me/tiny"][commit]["limited.gguf"] = tiny_gguf
    hub.sent = {"limited.gguf": bytes(len(tiny_gguf))}
    with (
        served(runs=tmp_path / "runs") as empty,
        open_page(browser, empty.port, locale="zh-CN", viewport=PHONE) as page,
    ):
        button = page.get_by_role("button", name="下载: limited")
        button.wait_for()
        assert button.is_disabled()
        page.get_by_label("我接受此许可证").check()
        button.click()
        alert = page.get_by_role("alert")
        alert.get_by_text("下载的内容与公布的哈希不符").wait_for()
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
        assert not list(models_folder().glob("*/*.gguf"))
        alert.get_by_role("button", name="知道了").click()
        alert.wait_for(state="detached")


@pytest.fixture(scope="module")
def place(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("thinking")
    model = switched_model(taught, folder / "switched")
    with served(model, taught, routers=record_routes(folder, folder / "runs")) as running:
        yield running


def test_thoughts_are_switched_folded_and_not_sent_back(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        switch = page.get_by_role("button", name="Thinking")
        assert switch.get_attribute("aria-pressed") == "true"
        ask(page, "think")
        answer = last_answer(page)
        assert not answer.locator(".thought .markdown").is_visible()
        answer.locator(".thought summary", has_text=" s · ").wait_for()  # time and tokens
        assert "tokens" in answer.locator(".thought summary").inner_text()
        answer.get_by_role("button", name="Copy").click()
        assert page.evaluate("navigator.clipboard.readText()") == "二"

        switch.click()
        with page.expect_request("**/generations") as sent:
            ask(page, "plain")
        body = sent.value.post_data_json
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        assert [message["content"] for message in body["messages"]] == ["think", "二", "plain"]
        last_answer(page, 1).get_by_role("button", name="Details").click()
        assert "Thinking\noff" in page.get_by_role("dialog").inner_text()
        page.keyboard.press("Escape")
        page.select_option(".picker select", "taught")  # whose template has no switch
        switch.wait_for(state="detached")
        assert page.evaluate("location.hash") in page.url
        [stored] = stored_conversations(place)[:1]
        answers = [each for each in stored["nodes"] if each["role"] == "assistant"]
        assert [each["sampling"]["thinking"] for each in answers] == [True, False]
        assert answers[0]["sampling"]["top_k"] == 20, "the model's own"


def test_sampling_shows_the_model_s_own_and_is_checked(browser: Any, place: Service) -> None:
    with open_page(browser, place.port) as page:
        page.wait_for_function("() => document.querySelector('.picker select')?.value")
        page.get_by_role("button", name="Chat settings").click()
        temperature = page.get_by_label("Temperature")
        assert temperature.get_attribute("placeholder") == "0.3 (model)"
        temperature.fill("7")
        page.get_by_role("alert").get_by_text("0 to 2").wait_for()
        temperature.fill("0.5")
        assert page.get_by_role("alert").count() == 0
        page.get_by_label("Top-k").fill("1")
        page.get_by_label("Thinking budget").fill("1")
        page.get_by_label("System prompt").fill("Brief.")
        page.get_by_role("button", name="Use for new conversations, too").click()
        page.get_by_label("Temperature").locator("..").get_by_role("button").click()  # reset
        assert temperature.input_value() == ""
        page.keyboard.press("Escape")
        with page.expect_request("**/generations") as sent:
            ask(page, "think")
        body = sent.value.post_data_json
        assert (body["top_k"], body["thinking_budget"]) == (1, 1) and "temperature" not in body
        last_answer(page).get_by_role("button", name="Details").click()
        shown = page.get_by_role("dialog").inner_text()
        assert "Temperature\n0.3" in shown and "Repetition penalty\n1.1" in shown
        page.keyboard.press("Escape")
        page.reload()
        page.keyboard.press("Control+k")
        page.wait_for_selector(".empty")
        page.get_by_role("button", name="Chat settings").click()
        assert page.get_by_label("Temperature").input_value() == "0.5"
        assert page.get_by_label("System prompt").input_value() == "Brief."
        stored = page.evaluate("localStorage.getItem('khaosz.defaults')")
        assert json.loads(stored)["settings"]["top_k"] == 1


def test_a_service_without_a_model_says_so_in_the_chat(
    browser: Any, hub: HubServer, tmp_path: Path
) -> None:
    with served(runs=tmp_path / "runs") as empty, open_page(browser, empty.port) as page:
        page.wait_for_url("**/#/models")
        page.get_by_role("link", name="Chat").click()
        page.get_by_role("main").get_by_role("link", name="Choose a model").click()
        page.get_by_role("heading", name="Choose a model").wait_for()
        wait_until(lambda: not hub.log)
