"""The preferences view, in Chromium with a real model: blind ranking of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import PHONE, open_page, wait_for
from serving import Service, served, wait_until

from khaosz.data.records.preference import to_pairs
from khaosz.serve.records.drawn_answers import DrawnFile, Peer, answer_routes
from khaosz.serve.records.preferences import PreferenceFile, preference_routes

pytestmark = pytest.mark.browser


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "preferences.jsonl"


@pytest.fixture
def place(tiny: Path, taught: Path, file: Path) -> Iterator[Service]:
    rankings, drawn = PreferenceFile(file), DrawnFile(file.with_name("answers.jsonl"))
    with served(f"far={tiny}") as other:
        peer = Peer("elsewhere", f"http://127.0.0.1:{other.port}/v1", "far")
        answers = partial(answer_routes, rankings, drawn, [peer])
        routers: list[Any] = [preference_routes(rankings, [peer.name]), answers]
        with served(tiny, taught, routers=routers) as running:
            yield running


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def sample(page: Any, prompt: str, n: int = 4, model: str = "tiny") -> list[str]:
    """The answers in the order in which they are shown."""
    page.get_by_label("Model").select_option(model)
    page.get_by_label("Number of answers").fill(str(n))
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate answers").click()
    page.locator(".strip").wait_for()
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 30)))")
    return page.locator(".card .markdown").all_inner_texts()


def prevent_end(page: Any, place: Service, **more: Any) -> None:
    """Suppress end tokens: no answer is empty, and equal answers are unlikely."""
    bias = {str(token): -100 for token in place.engine.end_ids}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(
            post_data={**route.request.post_data_json, "logit_bias": bias, **more}
        ),
    )


def chips(page: Any) -> str:
    return "".join(page.locator(".strip ol li").all_inner_texts()).replace("\n", "")


def test_ranking_by_keys_is_saved(browser: Any, place: Service, file: Path) -> None:
    with open_page(browser, place.port, "/#/preferences") as page:
        page.get_by_text("Rankings saved: 0").wait_for()
        prevent_end(page, place)
        with page.expect_request("**/v1/chat/completions") as completion:
            sample(page, "春天 fox", n=3)
        body = completion.value.post_data_json
        page.keyboard.press("Enter")  # nothing is ranked, and the form is not submitted again
        page.keyboard.press("3")
        page.keyboard.press("=")
        page.keyboard.press("1")
        assert chips(page) == "3=1>2"  # the remaining answer is ranked last
        page.keyboard.press("Backspace")
        page.keyboard.press("Backspace")
        assert chips(page) == "3"
        page.keyboard.press("2")
        assert chips(page) == "3>2>1"
        page.keyboard.press("=")
        assert chips(page) == "3>2=1"
        with page.expect_request("**/v1/preferences") as saved:
            page.keyboard.press("Enter")
        page.get_by_text("Rankings saved: 1").wait_for()
        page.get_by_text("Preference pairs: 2").wait_for()
        assert page.locator(".card").count() == 0
    [record] = records(file)
    best, tied = saved.value.post_data_json["ranked"]
    assert record["answers"] == [best, *tied] and record["ranking"] == [0, [1, 2]]
    assert record["prompt"] == [{"role": "user", "content": "春天 fox"}] == body["messages"]
    assert record["model"] == "tiny" and len(record["finish_reasons"]) == 3
    assert set(record["finish_reasons"]) <= {"stop", "length"}
    settings = {"temperature": 0.9, "max_tokens": 12, "seed": body["seed"]}
    assert record["sampling"] == settings and body["n"] == 3
    assert len(to_pairs(record)) == 2


def test_answers_appear_in_random_order(browser: Any, place: Service) -> None:
    """The same seed gives the same answers, but in different orders over several rounds."""
    orders = set()
    with open_page(browser, place.port, "/#/preferences") as page:
        # The seed of sampling is fixed, the shuffling is not.
        prevent_end(page, place, seed=1)
        for _ in range(12):
            answers = sample(page, "fox", n=4)
            orders.add(tuple(answers))
            assert "tiny" not in page.locator(".ranking").inner_text()
            page.keyboard.press("s")
    assert len({tuple(sorted(each)) for each in orders}) == 1
    assert len(orders) > 3


def test_ranking_by_mouse_and_arrow_keys(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/preferences") as page:
        prevent_end(page, place)
        sample(page, "fox", n=4)
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
        assert "rank 3" in card.inner_text()
        page.get_by_role("button", name="Undo").click()
        card.locator("header").drag_to(page.locator(".chip", has_text="3"))
        assert chips(page) == "1>3>2>4"
        save = page.get_by_role("button", name="Save ranking")
        for _ in range(3):
            page.get_by_role("button", name="better than").first.click()
        assert chips(page) == "1=3=2=4" and save.is_disabled()
        page.get_by_text("All answers are tied").wait_for()
        page.get_by_role("button", name="Skip").click()
        page.get_by_text("Skipped").wait_for()
        assert place.ask("GET", "/v1/preferences")[2]["count"] == 0


def test_prompts_of_a_file_follow_one_another(browser: Any, place: Service) -> None:
    lines = '{"prompt": "first"}\n{"messages": [{"role": "user", "content": "第二"}]}\n'
    file = {"name": "p.jsonl", "mimeType": "application/json", "buffer": lines.encode()}
    with open_page(browser, place.port, "/#/preferences") as page:
        field = page.get_by_label("Prompt", exact=True)
        page.set_input_files(".prompt-form input[type=file]", file)
        page.get_by_text("Prompts left: 1").wait_for()
        assert field.input_value() == "first"
        prevent_end(page, place)
        sample(page, "first", n=2)
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        # The next one is sampled automatically.
        page.wait_for_function(
            "() => document.querySelector('.prompt-form textarea').value === '第二'"
        )
        page.locator(".strip").wait_for()
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        page.get_by_text("Rankings saved: 2").wait_for()
        assert field.input_value() == ""
        empty = {"name": "p.txt", "mimeType": "text/plain", "buffer": b"\n\n"}
        page.set_input_files(".prompt-form input[type=file]", empty)
        page.get_by_text("No prompts found").wait_for()


def test_late_save_does_not_affect_the_next_prompt(
    browser: Any, place: Service, file: Path
) -> None:
    """Neither its text, which is being typed, nor its ranking."""
    with open_page(browser, place.port, "/#/preferences") as page:
        prevent_end(page, place)
        routes: list[Any] = []
        page.route("**/v1/preferences", lambda route: routes.append(route))
        for skipped in (False, True):
            sample(page, "fox", n=3)
            for key in "123":
                page.keyboard.press(key)
            page.keyboard.press("Enter")
            wait_for(page, lambda: bool(routes))
            field = page.get_by_label("Prompt", exact=True)
            field.fill("the next")
            if skipped:
                sample(page, "the next", n=2)
                page.keyboard.press("2")
            with page.expect_response("**/v1/preferences"):
                routes.pop().continue_()
            page.get_by_text("Preference pairs: 3").wait_for()
            page.wait_for_timeout(100)
            assert field.input_value() == "the next"
            assert chips(page) == ("2>1" if skipped else "")
    assert len(records(file)) == 2


def test_failed_save_can_be_repeated(browser: Any, place: Service, file: Path) -> None:
    with open_page(browser, place.port, "/#/preferences") as page:
        prevent_end(page, place)
        sample(page, "fox", n=2)
        page.keyboard.press("2")
        page.route("**/v1/preferences", lambda route: route.abort("connectionrefused"))
        page.keyboard.press("Enter")
        page.get_by_role("alert").wait_for()
        assert chips(page) == "2>1"
        page.unroute("**/v1/preferences")
        page.keyboard.press("Enter")
        page.get_by_text("Preference pairs: 1").wait_for()
        assert page.get_by_role("alert").count() == 0
    assert len(records(file)) == 1


def test_identical_answers_cannot_be_ranked(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/preferences") as page:
        page.get_by_label("Model").select_option("taught")  # always gives the same answer
        page.get_by_label("Temperature").fill("0.05")
        page.get_by_label("Prompt", exact=True).fill("plain")
        page.get_by_role("button", name="Generate answers").click()
        page.get_by_text("All answers are identical").wait_for()
        assert page.locator(".card").count() == 0
        assert page.locator(".round-status").inner_text() == ""  # no longer generating


def test_file_continues_after_a_prompt_that_cannot_be_ranked(browser: Any, place: Service) -> None:
    file = {"name": "p.txt", "mimeType": "text/plain", "buffer": b"plain\nfox\n"}
    with open_page(browser, place.port, "/#/preferences") as page:
        page.get_by_label("Model").select_option("taught")  # always gives the same answer
        page.set_input_files(".prompt-form input[type=file]", file)
        page.get_by_role("button", name="Generate answers").click()
        page.get_by_text("All answers are identical").wait_for()
        page.get_by_role("button", name="Next prompt").click()
        assert page.get_by_label("Prompt", exact=True).input_value() == "fox"


def test_stopping_or_leaving_cancels_sampling(browser: Any, place: Service) -> None:
    loaded = place.models.find("tiny").loaded
    assert loaded is not None
    with open_page(browser, place.port, "/#/preferences") as page:
        page.get_by_label("Max tokens").fill("1900")
        prevent_end(page, place)
        for leave in ("Stop", "Chat"):
            page.goto(page.url.split("#")[0] + "#/preferences")
            page.get_by_label("Prompt", exact=True).fill("fox")
            page.get_by_role("button", name="Generate answers").click()  # waits for a model
            page.locator(".card .markdown").first.wait_for()
            if leave == "Stop":
                page.get_by_role("button", name="Stop").click()
            else:
                page.get_by_role("link", name="Chat").click()
            wait_until(lambda: loaded.worker.open_requests == 0)
            page.locator(".card").first.wait_for(state="detached")


def test_exports_rankings_and_copies_the_command(
    browser: Any, place: Service, file: Path, tmp_path: Path
) -> None:
    record = {"messages": [{"role": "user", "content": "x"}], "ranked": ["甲", "乙"]}
    assert place.ask("POST", "/v1/preferences", json.dumps(record))[0] == 201
    with open_page(browser, place.port, "/#/preferences") as page:
        with page.expect_download() as download:
            page.get_by_role("button", name="Export").click()
        assert download.value.suggested_filename == "preferences.jsonl"
        download.value.save_as(tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes() == file.read_bytes()
        page.get_by_role("button", name="Copy").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith("khaosz train recipes/dpo.toml")
        assert copied.endswith("/preferences.jsonl")


def test_composing_does_not_rank(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/preferences") as page:
        prevent_end(page, place)
        sample(page, "fox", n=3)
        page.evaluate(
            """() => document.body.dispatchEvent(
                 new KeyboardEvent("keydown", {key: "1", bubbles: true, isComposing: true}))"""
        )
        field = page.get_by_label("Prompt", exact=True)
        field.focus()
        page.keyboard.type("12s=")
        assert field.input_value().endswith("12s=") and page.locator(".chip").count() == 0


def test_fits_a_phone_in_chinese(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/preferences", viewport=PHONE, locale="zh-CN") as page:
        prevent_end(page, place)
        page.get_by_label("最大词元数").fill("12")
        page.locator(".prompt-form textarea").first.fill("春")
        page.get_by_role("button", name="生成回答").click()
        page.locator(".strip").wait_for()
        page.get_by_role("button", name="将回答 2 排在下一位").click()
        page.get_by_role("article", name="回答 2").get_by_text("第 1 名").wait_for()
        fits = "(() => { const p = document.querySelector('.page');"
        assert page.evaluate(fits + " return p.scrollWidth <= p.clientWidth })()")


def test_several_models_are_ranked_blind_by_annotators(
    browser: Any, place: Service, file: Path
) -> None:
    """Two annotators get the same answers; a ranking is taken back; the agreement is shown."""
    prompts = {"name": "p.txt", "mimeType": "text/plain", "buffer": "fox\n狗\n".encode()}
    with open_page(browser, place.port, "/#/preferences") as page:
        page.get_by_text("Models to compare: 0").click()
        page.get_by_role("checkbox", name="tiny").check()
        page.get_by_role("checkbox", name="taught").check()
        page.get_by_role("checkbox", name="elsewhere").check()
        bodies: list[str] = []
        page.on("response", lambda each: "/answers" in each.url and bodies.append(each.text()))
        page.get_by_label("Max tokens").fill("12")
        for name in ("ann", "李"):
            page.get_by_label("Annotator").fill(name)
            page.set_input_files(".prompt-form input[type=file]", prompts)
            page.get_by_text("1 of 2, skipped: 0").wait_for()
            page.get_by_role("button", name="Generate answers").click()
            for n in (1, 2):
                page.locator(".strip").wait_for()
                shown = page.locator(".ranking").inner_text()
                assert not any(name in shown for name in ("tiny", "taught", "elsewhere"))
                assert not any(name in body for name in ("tiny", "elsewhere") for body in bodies)
                page.keyboard.press("1")
                page.keyboard.press("Enter")
                page.get_by_text(f"Rankings saved: {n + 2 * (name == '李')}").wait_for()
        assert page.evaluate("localStorage.getItem('khaosz.annotator')") == "李"
        rows = records(file)
        assert [row["annotator"] for row in rows] == ["ann", "ann", "李", "李"]
        assert {tuple(sorted(row["answers"])) for row in rows[:2]} == {
            tuple(sorted(row["answers"])) for row in rows[2:]
        }
        for row in rows:
            models = {source["model"] for same in row["sources"] for source in same}
            assert models == {"tiny", "taught", "elsewhere"}
            assert row["sources"][0][0]["sampling"]["max_tokens"] == 12
        page.get_by_role("button", name="Take the last ranking back").click()
        page.get_by_text("The last ranking was taken back.").wait_for()
        assert page.get_by_label("Prompt", exact=True).input_value() == "狗"
        assert records(file) == rows[:3]
        page.reload()  # what 李 has ranked is left out of the file
        page.set_input_files(".prompt-form input[type=file]", prompts)
        page.get_by_text("left out: 1").wait_for()
        assert page.get_by_label("Prompt", exact=True).input_value() == "狗"
        page.get_by_text("1 of 1, skipped: 0").wait_for()
        page.get_by_text("Agreement and disputed prompts").click()
        page.get_by_text("Krippendorff's alpha").wait_for()
        page.get_by_role("cell", name="taught").wait_for()
        page.get_by_text("ann: 2 · 李: 1").wait_for()
