"""Ranking answers blind on the page, in a real browser with a real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import PHONE, comes, visited
from serving import Service, served, wait_until

from khaosz.data.records.preference import to_pairs
from khaosz.serve.records.preferences import PreferenceFile, preference_routes

pytestmark = pytest.mark.browser


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "preferences.jsonl"


@pytest.fixture
def place(tiny: Path, taught: Path, file: Path) -> Iterator[Service]:
    with served(tiny, taught, routers=[preference_routes(PreferenceFile(file))]) as running:
        yield running


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def sampled(page: Any, prompt: str, n: int = 4, model: str = "tiny") -> list[str]:
    """Answers as they are shown, in their order."""
    page.get_by_label("Model").select_option(model)
    page.get_by_label("Answers", exact=True).fill(str(n))
    page.get_by_label("Longest answer").fill("12")
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Sample answers").click()
    page.locator(".strip").wait_for()
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 30)))")
    return page.locator(".card .markdown").all_inner_texts()


def endless(page: Any, place: Service, **more: Any) -> None:
    """Answers that never end by themselves: none is empty, and no two are likely to be alike."""
    never = {str(token): -100 for token in place.engine.end_ids}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(
            post_data={**route.request.post_data_json, "logit_bias": never, **more}
        ),
    )


def chips(page: Any) -> str:
    return "".join(page.locator(".strip ol li").all_inner_texts()).replace("\n", "")


def test_a_ranking_by_keys_is_a_record(browser: Any, place: Service, file: Path) -> None:
    with visited(browser, place.port, "/#/preferences") as page:
        page.get_by_text("0 rankings so far").wait_for()
        endless(page, place)
        with page.expect_request("**/v1/chat/completions") as sent:
            sampled(page, "春天 fox", n=3)
        asked = sent.value.post_data_json
        page.keyboard.press("Enter")  # nothing is ranked yet, and the form is not sent again
        page.keyboard.press("3")
        page.keyboard.press("=")
        page.keyboard.press("1")
        assert chips(page) == "3=1>2"  # the last comes last by itself
        page.keyboard.press("Backspace")
        page.keyboard.press("Backspace")
        assert chips(page) == "3"
        page.keyboard.press("2")
        assert chips(page) == "3>2>1"
        page.keyboard.press("=")
        assert chips(page) == "3>2=1"
        with page.expect_request("**/v1/preferences") as told:
            page.keyboard.press("Enter")
        page.get_by_text("1 rankings so far").wait_for()
        page.get_by_text("Saved: 2 pairs").wait_for()
        assert page.locator(".card").count() == 0
    [record] = records(file)
    best, equals = told.value.post_data_json["ranked"]
    assert record["answers"] == [best, *equals] and record["ranking"] == [0, [1, 2]]
    assert record["prompt"] == [{"role": "user", "content": "春天 fox"}] == asked["messages"]
    assert record["model"] == "tiny" and len(record["finish_reasons"]) == 3
    assert set(record["finish_reasons"]) <= {"stop", "length"}
    how = {"temperature": 0.9, "max_tokens": 12, "seed": asked["seed"]}
    assert record["sampling"] == how and asked["n"] == 3
    assert len(to_pairs(record)) == 2


def test_the_order_tells_nothing(browser: Any, place: Service) -> None:
    """The same seed gives the same answers; over some rounds they are not always in that order."""
    orders = set()
    with visited(browser, place.port, "/#/preferences") as page:
        # The page's numbers for seeds and shuffling; the seed is held, the shuffling is not.
        endless(page, place, seed=1)
        for _ in range(12):
            shown = sampled(page, "fox", n=4)
            orders.add(tuple(shown))
            assert "tiny" not in page.locator(".ranking").inner_text()
            page.keyboard.press("s")
    assert len({tuple(sorted(each)) for each in orders}) == 1
    assert len(orders) > 3


def test_ranking_by_mouse_and_arrow_keys(browser: Any, place: Service) -> None:
    with visited(browser, place.port, "/#/preferences") as page:
        endless(page, place)
        sampled(page, "fox", n=4)
        for number in (2, 4, 1):
            page.get_by_role("button", name=f"Rank answer {number} next").click()
        assert chips(page) == "2>4>1>3"
        page.get_by_role("button", name="better than").nth(1).click()
        assert chips(page) == "2>4=1>3"
        page.locator(".chip", has_text="3").drag_to(page.locator(".chip", has_text="2"))
        assert chips(page) == "3>2>4=1"
        page.locator(".chip", has_text="2").focus()
        page.keyboard.press("ArrowLeft")
        assert chips(page) == "2>3>4=1"
        page.locator(".chip", has_text="2").focus()
        page.keyboard.press("ArrowRight")
        assert chips(page) == "3>2>4=1"
        card = page.get_by_role("article", name="Answer 1")
        assert "place 3" in card.inner_text()
        page.get_by_role("button", name="Undo").click()
        card.locator("header").drag_to(page.locator(".chip", has_text="3"))
        assert chips(page) == "1>3>2>4"
        save = page.get_by_role("button", name="Save ranking")
        for _ in range(3):
            page.get_by_role("button", name="better than").first.click()
        assert chips(page) == "1=3=2=4" and save.is_disabled()
        page.get_by_text("If all are equal, skip").wait_for()
        page.get_by_role("button", name="Skip").click()
        page.get_by_text("Skipped").wait_for()
        assert place.ask("GET", "/v1/preferences")[2]["count"] == 0


def test_prompts_of_a_file_come_one_after_the_other(browser: Any, place: Service) -> None:
    lines = '{"prompt": "first"}\n{"messages": [{"role": "user", "content": "第二"}]}\n'
    file = {"name": "p.jsonl", "mimeType": "application/json", "buffer": lines.encode()}
    with visited(browser, place.port, "/#/preferences") as page:
        field = page.get_by_label("Prompt", exact=True)
        page.set_input_files(".asking input[type=file]", file)
        page.get_by_text("1 prompts left").wait_for()
        assert field.input_value() == "first"
        endless(page, place)
        sampled(page, "first", n=2)
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        # The next one is sampled by itself.
        page.wait_for_function("() => document.querySelector('.asking textarea').value === '第二'")
        page.locator(".strip").wait_for()
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        page.get_by_text("2 rankings so far").wait_for()
        assert field.input_value() == ""
        empty = {"name": "p.txt", "mimeType": "text/plain", "buffer": b"\n\n"}
        page.set_input_files(".asking input[type=file]", empty)
        page.get_by_text("No prompts were found").wait_for()


def test_what_is_saved_late_disturbs_nothing(browser: Any, place: Service, file: Path) -> None:
    """Neither the next prompt, which is being written, nor the ranking of it."""
    with visited(browser, place.port, "/#/preferences") as page:
        endless(page, place)
        held: list[Any] = []
        page.route("**/v1/preferences", lambda route: held.append(route))
        for skipped in (False, True):
            sampled(page, "fox", n=3)
            for key in "123":
                page.keyboard.press(key)
            page.keyboard.press("Enter")
            comes(page, lambda: bool(held))
            field = page.get_by_label("Prompt", exact=True)
            field.fill("the next")
            if skipped:
                sampled(page, "the next", n=2)
                page.keyboard.press("2")
            with page.expect_response("**/v1/preferences"):
                held.pop().continue_()
            page.get_by_text("Saved: 3 pairs").wait_for()
            page.wait_for_timeout(100)
            assert field.input_value() == "the next"
            assert chips(page) == ("2>1" if skipped else "")
    assert len(records(file)) == 2


def test_a_ranking_that_could_not_be_saved_is_saved_again(
    browser: Any, place: Service, file: Path
) -> None:
    with visited(browser, place.port, "/#/preferences") as page:
        endless(page, place)
        sampled(page, "fox", n=2)
        page.keyboard.press("2")
        page.route("**/v1/preferences", lambda route: route.abort("connectionrefused"))
        page.keyboard.press("Enter")
        page.get_by_role("alert").wait_for()
        assert chips(page) == "2>1"
        page.unroute("**/v1/preferences")
        page.keyboard.press("Enter")
        page.get_by_text("Saved: 1 pairs").wait_for()
        assert page.get_by_role("alert").count() == 0
    assert len(records(file)) == 1


def test_answers_that_are_alike_cannot_be_ranked(browser: Any, place: Service) -> None:
    with visited(browser, place.port, "/#/preferences") as page:
        page.get_by_label("Model").select_option("taught")  # says one thing by heart
        page.get_by_label("Temperature").fill("0.05")
        page.get_by_label("Prompt", exact=True).fill("plain")
        page.get_by_role("button", name="Sample answers").click()
        page.get_by_text("The answers are all the same").wait_for()
        assert page.locator(".card").count() == 0
        assert page.locator(".told").inner_text() == ""  # nobody is answering any more


def test_a_file_goes_on_behind_a_prompt_that_cannot_be_ranked(browser: Any, place: Service) -> None:
    file = {"name": "p.txt", "mimeType": "text/plain", "buffer": b"plain\nfox\n"}
    with visited(browser, place.port, "/#/preferences") as page:
        page.get_by_label("Model").select_option("taught")  # says one thing by heart
        page.set_input_files(".asking input[type=file]", file)
        page.get_by_role("button", name="Sample answers").click()
        page.get_by_text("The answers are all the same").wait_for()
        page.get_by_role("button", name="Next prompt").click()
        assert page.get_by_label("Prompt", exact=True).input_value() == "fox"


def test_sampling_is_stopped_and_left(browser: Any, place: Service) -> None:
    loaded = place.models.find("tiny").loaded
    assert loaded is not None
    with visited(browser, place.port, "/#/preferences") as page:
        page.get_by_label("Longest answer").fill("1900")
        endless(page, place)
        for leave in ("Stop", "Chat"):
            page.goto(page.url.split("#")[0] + "#/preferences")
            page.get_by_label("Prompt", exact=True).fill("fox")
            page.get_by_role("button", name="Sample answers").click()  # once there is a model
            page.locator(".card .markdown").first.wait_for()
            if leave == "Stop":
                page.get_by_role("button", name="Stop").click()
            else:
                page.get_by_role("link", name="Chat").click()
            wait_until(lambda: loaded.worker.held == 0)
            page.locator(".card").first.wait_for(state="detached")


def test_they_are_exported_and_the_command_is_copied(
    browser: Any, place: Service, file: Path, tmp_path: Path
) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}], "ranked": ["甲", "乙"]}
    assert place.ask("POST", "/v1/preferences", json.dumps(asked))[0] == 201
    with visited(browser, place.port, "/#/preferences") as page:
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Export").click()
        assert waiting.value.suggested_filename == "preferences.jsonl"
        waiting.value.save_as(tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes() == file.read_bytes()
        page.get_by_role("button", name="Copy").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith("khaosz train recipes/dpo.toml")
        assert copied.endswith("/preferences.jsonl")


def test_composing_never_ranks(browser: Any, place: Service) -> None:
    with visited(browser, place.port, "/#/preferences") as page:
        endless(page, place)
        sampled(page, "fox", n=3)
        page.evaluate(
            """() => document.body.dispatchEvent(
                 new KeyboardEvent("keydown", {key: "1", bubbles: true, isComposing: true}))"""
        )
        field = page.get_by_label("Prompt", exact=True)
        field.focus()
        page.keyboard.type("12s=")
        assert field.input_value().endswith("12s=") and page.locator(".chip").count() == 0


def test_it_fits_a_phone_in_chinese(browser: Any, place: Service) -> None:
    with visited(browser, place.port, "/#/preferences", viewport=PHONE, locale="zh-CN") as page:
        endless(page, place)
        page.get_by_label("最长回答").fill("12")
        page.locator(".asking textarea").first.fill("春")
        page.get_by_role("button", name="采样回答").click()
        page.locator(".strip").wait_for()
        page.get_by_role("button", name="接着排回答 2").click()
        page.get_by_role("article", name="回答 2").get_by_text("第 1 名").wait_for()
        wide = "(() => { const p = document.querySelector('.page');"
        assert page.evaluate(wide + " return p.scrollWidth <= p.clientWidth })()")
