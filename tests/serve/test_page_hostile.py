"""Unusual messages, names and numbers on the page, in Chromium."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import DESK, PHONE, open_page
from knowledge_helpers import serve_knowledge
from serving import Service, served

from khaosz.serve.app import record_routes

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def place(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("records")
    with served(taught, routers=record_routes(folder, folder / "runs")) as running:
        yield running


def chat(answer: str, title: str = "hostile", updated: int = 1) -> dict[str, Any]:
    id, question, reply = (str(uuid.uuid4()) for _ in range(3))
    nodes = [
        {"id": question, "parent": None, "role": "user", "content": "show", "created": 1},
        {"id": reply, "parent": question, "role": "assistant", "content": answer, "created": 1},
    ]
    return {"id": id, "title": title, "nodes": nodes, "selected": reply, "updated": updated}


def store(service: Service, *chats: dict[str, Any]) -> None:
    body = json.dumps({"conversations": chats})
    assert service.ask("POST", "/v1/conversations/import", body)[0] == 200


def store_chat(service: Service, answer: str) -> str:
    stored = chat(answer)
    store(service, stored)
    id: str = stored["id"]
    return id


def open_answer(page: Any, text: str) -> Any:
    page.wait_for_selector(".message.assistant .actions")
    page.locator(".message.assistant .markdown").get_by_text(text).first.wait_for()
    page.wait_for_function("() => !document.querySelector('.math:not([data-done])')")
    return page.locator(".message.assistant .markdown")


HUGE = r"""start

$\rule{99999em}{99999em}$ $\rule[-50000em]{9em}{99999pt}$ $\raisebox{9999em}{X}$

$\raisebox{-9999em}{X}$

$\kern-9999em\rule{99em}{1em}$ $\hspace{-9999em}N$ $\hspace{9999em}N$ $\smash{\rule{1em}{999em}}$

$$\mathllap{\rule{50em}{30em}}\lower 99em\hbox{\rule{9em}{9em}}\genfrac(){9999pt}{0}{a}{b}$$

$$\renewcommand{\arraystretch}{999}\begin{matrix}\Huge{\Huge a}\\b\end{matrix}$$

$\raisebox{6em}{\raisebox{6em}{\raisebox{6em}{\raisebox{6em}{\rule{20em}{6em}}}}}$

$$KERNS\rule{20em}{6em}$$

Z̷̢͉̜̹̖̱̦̲̱̘̓͛̆͊̈́͌̒̚͝A̵̧̛͇̜̙̩͕͔̙̲̔̉̈́́̅͘͠

end
""".replace("KERNS", r"\kern-3em" * 60)


@pytest.mark.parametrize("viewport", [DESK, PHONE])
def test_formulas_do_not_cover_the_page(browser: Any, place: Service, viewport: Any) -> None:
    id = store_chat(place, HUGE)
    with open_page(browser, place.port, f"/#/chat/{id}", viewport=viewport) as page:
        open_answer(page, "end")
        assert page.locator(".math math").count() == 12
        for top in (0, 10**6):
            page.evaluate("top => { document.querySelector('.scroll').scrollTop = top }", top)
            outside = page.evaluate(
                """() => {
                     const found = [];
                     const markdown = document.querySelector(".message.assistant .markdown");
                     const {left, right, top, bottom} = markdown.getBoundingClientRect();
                     const [width, height] = [innerWidth, innerHeight];
                     for (let x = 2; x < width; x += 9) for (let y = 2; y < height; y += 9) {
                       const isInside = x > left - 5 && x < right + 5
                         && y > top - 5 && y < bottom + 5;
                       if (isInside) continue;
                       const element = document.elementFromPoint(x, y);
                       if (element?.closest(".markdown")) found.push([x, y, element.outerHTML]);
                     }
                     return found.slice(0, 3);
                   }"""
            )
            assert outside == []
        heights = page.locator(".math").evaluate_all("all => all.map(each => each.clientHeight)")
        assert max(heights) <= 0.7 * viewport["height"] + 4
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate(
            "(() => { const s = document.querySelector('.scroll');"
            " return s.scrollWidth <= s.clientWidth })()"
        )


def test_formulas_have_a_maths_font(browser: Any, place: Service) -> None:
    """Brackets grow with what they enclose, which needs a font with a MATH table."""
    text = (
        r"$$\begin{pmatrix}a\\b\\c\\d\end{pmatrix}$$" + "\n\n"
        r"\begin{align}a&=b\\c+d&=e\end{align}" + "\n\nend"
    )
    id = store_chat(place, text)
    with open_page(browser, place.port, f"/#/chat/{id}") as page:
        open_answer(page, "end")
        page.evaluate("document.fonts.ready")
        assert page.evaluate("document.fonts.check('16px \"KHAOSZ Math\"')")
        boxes = page.locator(".math").first
        bracket = boxes.locator("mo").first.bounding_box()["height"]
        assert bracket > 0.9 * boxes.locator("mtable").first.bounding_box()["height"]
        # Aligned at the equals signs.
        signs = page.locator(".math").nth(1).locator("mo", has_text="=")
        assert signs.count() == 2
        assert abs(signs.nth(0).bounding_box()["x"] - signs.nth(1).bounding_box()["x"]) < 1


def test_unusual_markdown_does_not_stop_the_page(browser: Any, place: Service) -> None:
    code = "\n".join(f"value_{i} = [{i}]  # 注释" for i in range(5000))
    parts = [
        ">" * 3000 + " quoted",
        "\n".join("  " * i + "- item" for i in range(800)),
        "\\frac{1}{".join(["$"] + ["x"] * 300) + "}" * 300 + "$",
        "$" + "{" * 3000 + "}" * 3000 + "$",
        r"$\def\a{\a\a}\a$",
        f"```python\n{code}\n```",
        "w" * 20_000,
        "end",
    ]
    for text in ["\n\n".join(parts[2:]), *(f"{each}\n\nend" for each in parts[:2])]:
        id = store_chat(place, text)
        with open_page(browser, place.port, f"/#/chat/{id}") as page:
            answer = open_answer(page, "end")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert answer.bounding_box()["width"] <= 800
            page.focus("#message")
            page.keyboard.type("still here")
            assert page.input_value("#message") == "still here"


def test_right_to_left_text_is_isolated(browser: Any, place: Service) -> None:
    id = store_chat(place, "مرحبا بالعالم 123\n\nleft\n\n- שלום\n\nend")
    with open_page(browser, place.port, f"/#/chat/{id}") as page:
        answer = open_answer(page, "end")
        directions = "all => all.map(each => getComputedStyle(each).direction)"
        assert answer.locator("p").evaluate_all(directions) == ["rtl", "ltr", "ltr"]
        assert answer.locator("li").evaluate_all(directions) == ["rtl"]


def test_tasks_have_names(browser: Any, place: Service) -> None:
    id = store_chat(place, "- [ ] buy **milk**\n- [x] rest\n  - [x] sleep\n- [ ]  \n\nend")
    with open_page(browser, place.port, f"/#/chat/{id}") as page:
        open_answer(page, "end")
        assert not page.get_by_role("checkbox", name="buy milk", exact=True).is_checked()
        assert page.get_by_role("checkbox", name="rest", exact=True).is_checked()
        assert page.get_by_role("checkbox", name="sleep", exact=True).is_checked()


def test_all_conversations_are_listed(browser: Any, tiny: Path, tmp_path: Path) -> None:
    with served(tiny, routers=record_routes(tmp_path, tmp_path / "runs")) as service:
        store(service, *(chat(f"answer {i}", f"chat {i}", 1000 + i) for i in range(230)))
        with open_page(browser, service.port) as page:
            page.wait_for_function(
                "() => document.querySelectorAll('.history li a').length === 100"
            )
            assert page.locator(".history li a").first.inner_text() == "chat 229"
            for count in (200, 230):
                page.locator(".history li.more").scroll_into_view_if_needed()
                page.wait_for_function(
                    "count => document.querySelectorAll('.history li a').length === count",
                    arg=count,
                )
            assert page.locator(".history li.more").count() == 0
            assert page.locator(".history li a").last.inner_text() == "chat 0"
            # The search covers all, and the list starts again afterwards.
            page.fill(".search input", "answer 3")
            page.wait_for_function("() => document.querySelectorAll('.history li a').length === 11")
            page.fill(".search input", "")
            page.wait_for_function(
                "() => document.querySelectorAll('.history li a').length === 100"
            )
            # By the keyboard.
            page.get_by_role("button", name="Show more").press("Enter")
            page.wait_for_function("() => document.querySelectorAll('.history li a').length >= 200")


NAMES = ["constructor", "__proto__", "toString", "hasOwnProperty", "valueOf"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for run, steps in (("constructor", 60_000), ("__proto__", 1), ("a very long name " * 5, 10)):
        folder = tmp_path / "runs" / run
        folder.mkdir(parents=True)
        config = {"stage": "pt", "constructor": 1, "toString": {"valueOf": 2}}
        (folder / "train_config.json").write_text(json.dumps(config))
        (folder / "plan.json").write_text(json.dumps({"total_steps": steps}))
        rows = [
            {
                "step": step,
                "loss": 1 / step,
                "reward": 1.25,
                "accuracy": 0.5,
                "val_bits_per_byte": 1.5,
            }
            | {name: step / 2 for name in NAMES}
            for step in sorted({1, max(1, steps // 2), steps})
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "runs"


def test_names_of_object_members_are_metrics(browser: Any, tiny: Path, runs: Path) -> None:
    with (
        served(tiny, routers=record_routes(runs.parent, runs)) as service,
        open_page(browser, service.port, "/#/training/constructor,__proto__") as page,
    ):
        for name in NAMES:
            page.locator(".chart figcaption", has_text=name).first.wait_for()
        assert page.locator(".problem").count() == 0
        page.evaluate("location.hash = '#/training/constructor'")
        page.get_by_text("Configuration").click()
        assert "toString.valueOf" in page.locator("table.settings").inner_text()
        page.get_by_role("link", name="Settings").click()
        page.get_by_role("heading", name="Settings").wait_for()


@pytest.mark.parametrize("width", [1280, 1181, 1000, 390])
def test_training_runs_do_not_overlap(browser: Any, tiny: Path, runs: Path, width: int) -> None:
    with (
        served(tiny, routers=record_routes(runs.parent, runs)) as service,
        open_page(
            browser, service.port, "/#/training", viewport={"width": width, "height": 800}
        ) as page,
    ):
        page.locator(".runs li").nth(2).wait_for()
        page.locator(".runs").get_by_text("step 60,000 of 60,000").wait_for()
        overlaps = page.evaluate(
            """() => [...document.querySelectorAll(".runs li")].flatMap(row => {
                 const names = ":scope > a, .stage, .state, .advance progress, .advance small,"
                   + " .spark, .figures, time";
                 const all = [...row.querySelectorAll(names)];
                 const parts = all.filter(each => each.textContent || each.tagName !== "SPAN");
                 const box = each => {
                   const range = document.createRange();
                   range.selectNodeContents(each);
                   return (each.textContent ? range : each).getBoundingClientRect();
                 };
                 const boxes = parts.map(box);
                 const inside = row.getBoundingClientRect();
                 return boxes.flatMap((a, i) => [
                   ...(a.right > inside.right + 1 ? [parts[i].className + " leaves the row"] : []),
                   ...boxes.slice(i + 1).flatMap((b, j) =>
                     Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
                     Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4
                       ? [parts[i].outerHTML + " overlaps " + parts[i + 1 + j].outerHTML] : [])]);
               })"""
        )
        assert overlaps == []
        # The columns of all rows start at the same place.
        if width > 1180:
            for part in (".state", ".advance", ".figures"):
                lefts = page.locator(f".runs {part}").evaluate_all(
                    "all => all.map(each => Math.round(each.getBoundingClientRect().left))"
                )
                assert len(set(lefts)) == 1, part
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_key_dialog_keeps_the_focus(browser: Any, taught: Path) -> None:
    with served(taught, key="sesame") as service, open_page(browser, service.port) as page:
        key = page.get_by_label("API key", exact=True)
        key.wait_for()
        focused = "document.activeElement.type"
        assert page.evaluate(focused) == "password"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("rejected this key").wait_for()
        assert page.evaluate(focused) == "password"
        for pressed in ("Tab", "Shift+Tab"):
            for _ in range(6):
                page.keyboard.press(pressed)
                assert page.evaluate("!!document.activeElement.closest('dialog')")
        key.focus()
        key.select_text()
        page.keyboard.type("sesame")  # replaces the wrong one
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('.picker select').value === 'taught'")
        assert page.get_by_role("dialog").count() == 0


def test_a_declined_key_is_not_asked_for_by_a_refresh(browser: Any, taught: Path) -> None:
    with served(taught, key="sesame") as service, open_page(browser, service.port) as page:
        page.get_by_role("dialog").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Try again").wait_for()
        page.evaluate("fetch('/v1/models')")
        page.fill(".search input", "x")  # searches in the background
        page.wait_for_timeout(500)
        assert page.get_by_role("dialog").count() == 0
        page.get_by_role("button", name="Try again").click()
        page.get_by_label("API key", exact=True).wait_for()


def test_source_panel_closes_on_a_phone(browser: Any, tiny: Path, tmp_path: Path) -> None:
    """With the passage far down in its document; also the only knowledge base has its name, and
    files are in natural order."""
    with serve_knowledge(tiny, tmp_path / "data") as knowledge:
        knowledge.create("laws")
        text = "\n\n".join(f"Paragraph {i}. " + "quartz " * 30 for i in range(60))
        names = ["10.md", "2.md", "1.md"]
        files = [knowledge.upload("laws", name, text.encode()) for name in names]
        files.append(knowledge.upload("laws", "3.md", f"{text}\n\nPenguins swim.\n".encode()))
        knowledge.ready("laws", *files)
        port = knowledge.service.port
        phone = {"viewport": PHONE, "is_mobile": True, "has_touch": True}
        with open_page(browser, port, "/#/documents", **phone) as page:
            page.locator(".files li").nth(3).wait_for()
            assert page.locator(".tabs a").inner_text() == "laws"
            listed = page.locator(".file-name").all_inner_texts()
            assert [each.strip() for each in listed] == ["1.md", "2.md", "3.md", "10.md"]
            page.locator(".retrieval-test input").fill("penguins")
            page.keyboard.press("Enter")
            for close in ("button", "Escape", "back"):
                page.locator(".hit").first.click()
                mark = page.locator("dialog mark")
                mark.wait_for()
                page.wait_for_function(
                    "() => document.querySelector('dialog mark').getBoundingClientRect().top < 844"
                )
                button = page.get_by_role("dialog").get_by_role("button", name="Close")
                box = button.bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
                assert box["y"] >= 0 and box["y"] + box["height"] <= 120
                if close == "button":
                    button.tap()
                elif close == "Escape":
                    page.keyboard.press("Escape")
                else:
                    page.go_back()
                page.get_by_role("dialog").wait_for(state="detached")
                assert page.url.endswith("#/documents")
