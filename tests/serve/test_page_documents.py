"""The documents view, in Chromium: knowledge bases, uploads, errors and search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from browser_helpers import PHONE, open_page, wait_for
from knowledge_helpers import BASES, KnowledgeClient, serve_knowledge
from make_documents import pdf_bytes
from serving import wait_until

pytestmark = pytest.mark.browser

REPORT = "本公司二零二五年的营业收入为三百二十亿元。\n董事会由九名董事组成，任期三年。"


@pytest.fixture(scope="module")
def knowledge(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnowledgeClient]:
    with serve_knowledge(taught, tmp_path_factory.mktemp("data")) as running:
        yield running


def report() -> dict[str, Any]:
    placed = [(72.0, 760.0 - 20 * i, line) for i, line in enumerate(REPORT.split("\n"))]
    content = pdf_bytes([[(72.0, 760.0, "目录")], placed], title="年度报告")
    return {"name": "年报 2025.pdf", "mimeType": "application/pdf", "buffer": content}


def create(page: Any, name: str) -> None:
    page.get_by_role("button", name="New knowledge base").first.click()
    page.get_by_label("Name").fill(name)
    page.keyboard.press("Enter")
    page.wait_for_url(f"**#/documents/{quote(name)}")
    page.locator(".drop").wait_for()


def test_uploads_and_finds_a_chinese_pdf(browser: Any, knowledge: KnowledgeClient) -> None:
    with open_page(browser, knowledge.service.port, "/#/documents") as page:
        create(page, "报告")
        page.set_input_files(".drop input", report())
        ready = page.locator(".files li.ready")
        ready.wait_for()
        assert ready.locator(".file-name").inner_text() == "年报 2025.pdf"
        assert "passages" in ready.locator(".file-state").inner_text()
        page.locator(".retrieval-test input").fill("营业收入是多少？")
        page.keyboard.press("Enter")
        hit = page.locator(".hit").first
        hit.wait_for()
        assert "年报 2025.pdf, pp. 1–2" in hit.inner_text() and "#1" in hit.inner_text()
        quote = page.locator(".quote").inner_text()
        assert "三百二十亿元" in quote and "年报 2025.pdf, p" in quote
        hit.click()
        mark = page.locator("dialog mark")
        mark.wait_for()
        assert "三百二十亿元" in mark.inner_text()
        assert page.locator("dialog h2").inner_text().startswith("年报 2025.pdf")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Ask about these documents").click()
        picker = page.locator(".picker select").nth(1)
        assert picker.input_value() == "报告"


def test_unreadable_files_show_the_reason(browser: Any, knowledge: KnowledgeClient) -> None:
    with open_page(browser, knowledge.service.port, "/#/documents") as page:
        create(page, "mixed")
        page.set_input_files(
            ".drop input",
            [
                {"name": "broken.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.7 no"},
                {"name": "run.exe", "mimeType": "application/octet-stream", "buffer": b"MZ"},
                {"name": "note.md", "mimeType": "text/markdown", "buffer": b"# Tea\n\nGreen tea."},
            ],
        )
        page.locator(".files li.ready", has_text="note.md").wait_for()
        page.locator(".files li.failed", has_text="broken.pdf").wait_for()
        rejected = page.locator(".files li.failed", has_text="run.exe")
        rejected.wait_for()
        assert ".exe files cannot be read" in rejected.inner_text()
        rejected.get_by_role("button", name="Close").click()
        assert page.locator(".files li").count() == 2
        page.get_by_role("button", name="Delete: broken.pdf").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        page.locator(".files li.failed").wait_for(state="detached")
        page.get_by_role("button", name="Delete knowledge base").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        page.get_by_role("link", name="mixed").wait_for(state="detached")
    assert knowledge.ask("GET", "/mixed")[0] == 404


def test_unreadable_files_show_the_reason_in_chinese(
    browser: Any, knowledge: KnowledgeClient
) -> None:
    sent = {
        "broken.pdf": b"%PDF-1.7 no",
        "picture.pdf": pdf_bytes([[]]),
        "lines.jsonl": '{"text": "春眠不觉晓"}\nnot JSON\n'.encode(),
        "run.exe": b"MZ",
    }
    knowledge.create("坏文件")
    address = f"/#/documents/{quote('坏文件')}"
    with open_page(browser, knowledge.service.port, address, locale="zh-CN") as page:
        page.locator(".drop").wait_for()
        files = [{"name": n, "mimeType": "x/y", "buffer": raw} for n, raw in sent.items()]
        page.set_input_files(".drop input", files)
        for name, state, message in (
            ("broken.pdf", "failed", "文件已损坏"),
            ("picture.pdf", "failed", "OCR"),
            ("run.exe", "failed", "不支持此文件类型"),
            ("lines.jsonl", "ready", "部分内容未能读取"),
        ):
            file = page.locator(f".files li.{state}", has_text=name)
            file.wait_for()
            assert message in file.inner_text()
        # The server's message has the line number.
        tooltip = page.locator(".partial span").get_attribute("title")
        assert "line 2: not valid JSON" in tooltip


def test_unusable_knowledge_base_shows_the_reason(
    browser: Any, taught: Path, tmp_path: Path
) -> None:
    with serve_knowledge(taught, tmp_path) as running:
        running.create("坏")
        running.ready("坏", running.upload("坏", "a.md", b"A text."))
    (tmp_path / "bases/坏.kb").write_bytes(b"not a database " * 1000)
    with serve_knowledge(taught, tmp_path) as running:
        wait_until(lambda: running.ask("GET", "/坏")[1]["error"] is not None)
        address = f"/#/documents/{quote('坏')}"
        with open_page(browser, running.service.port, address, locale="zh-CN") as page:
            page.get_by_role("alert").get_by_text("知识库无法读写").wait_for()


def test_uploads_dropped_files(browser: Any, knowledge: KnowledgeClient) -> None:
    with open_page(browser, knowledge.service.port, "/#/documents", locale="zh-CN") as page:
        page.get_by_role("button", name="新建知识库").first.click()
        page.get_by_label("名称").fill("拖放")
        page.keyboard.press("Enter")
        page.wait_for_url(f"**#/documents/{quote('拖放')}")
        dropped = page.evaluate_handle(
            """() => { const data = new DataTransfer();
                 data.items.add(new File(["春眠不觉晓，处处闻啼鸟。"], "诗.txt"));
                 return data }"""
        )
        page.dispatch_event(".drop", "drop", {"dataTransfer": dropped})
        page.locator(".files li.ready", has_text="诗.txt").wait_for()


def test_fits_a_phone(browser: Any, knowledge: KnowledgeClient) -> None:
    with open_page(browser, knowledge.service.port, "/#/documents", viewport=PHONE) as page:
        create(page, "phone")
        long = {"name": "x" * 90 + ".txt", "mimeType": "text/plain", "buffer": b"A word."}
        page.set_input_files(".drop input", [report(), long])
        page.wait_for_function("() => document.querySelectorAll('.files li.ready').length === 2")
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_failed_actions_show_the_error(browser: Any, knowledge: KnowledgeClient) -> None:
    """Although the refreshes after them succeed."""
    knowledge.create("taken")
    knowledge.ready("taken", knowledge.upload("taken", "a.txt", b"A text."))
    with open_page(browser, knowledge.service.port, "/#/documents/taken") as page:
        page.get_by_role("button", name="New knowledge base").first.click()
        name = page.get_by_label("Name")
        name.fill("taken")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("already").wait_for()
        name.fill("a/b")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("letters").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("alert").wait_for(state="detached")
        page.route(
            f"**{BASES}/**",
            lambda route: route.abort() if route.request.method == "DELETE" else route.continue_(),
        )
        for button in ("Delete: a.txt", "Delete knowledge base"):
            page.get_by_role("button", name=button).click()
            page.get_by_role("dialog").get_by_role("button", name="Delete").click()
            page.get_by_role("dialog").wait_for(state="detached")
            page.wait_for_load_state("networkidle")
            page.get_by_role("alert").get_by_text("can't be reached").wait_for()


def test_polling_continues_after_errors(browser: Any, knowledge: KnowledgeClient) -> None:
    """Otherwise a file would be shown as being read forever."""
    knowledge.create("away")
    file = knowledge.upload("away", "a.txt", b"A text.")
    knowledge.ready("away", file)
    reading = {"data": [{**knowledge.file("away", file["id"]), "status": "reading"}]}
    requests: list[Any] = []
    with open_page(browser, knowledge.service.port, "/#/settings") as page:

        def respond(route: Any) -> None:
            requests.append(route)
            if len(requests) == 1:
                route.fulfill(json=reading)
            elif len(requests) < 8:  # each refresh requests files and knowledge bases
                route.abort("connectionrefused")
            else:
                route.continue_()

        page.get_by_role("link", name="Documents").wait_for()
        page.wait_for_load_state("networkidle")
        page.route(f"**{BASES}**", respond)
        page.goto(page.url.replace("settings", "documents/away"))
        page.get_by_role("alert").get_by_text("can't be reached").wait_for()
        page.locator(".files li.ready").wait_for()
        page.get_by_role("alert").wait_for(state="detached")


def test_deleting_a_knowledge_base_cancels_its_uploads(
    browser: Any, knowledge: KnowledgeClient
) -> None:
    files = [{"name": f"{i}.txt", "mimeType": "text/plain", "buffer": b"A text."} for i in range(6)]
    with open_page(browser, knowledge.service.port, "/#/documents") as page:
        routes: list[Any] = []
        page.route(f"**{BASES}/twice/files/*", lambda route: routes.append(route))
        for _ in range(2):
            create(page, "twice")
            assert page.locator(".files li").count() == 0
            page.set_input_files(".drop input", files)
            wait_for(page, lambda: len(routes) >= 3)
            page.get_by_role("button", name="Delete knowledge base").click()
            page.get_by_role("dialog").get_by_role("button", name="Delete").click()
            page.get_by_text("twice", exact=True).wait_for(state="detached")
        create(page, "twice")
        for route in routes:
            route.abort()
        page.unroute(f"**{BASES}/twice/files/*")
        page.wait_for_timeout(500)
        assert knowledge.ask("GET", "/twice/files")[1]["data"] == []
        assert page.locator(".files li").count() == 0
