"""The page with a server that keeps conversations and documents: what is asked about a Chinese PDF
is cited, and nothing is lost between windows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browsing import answer, ask, visited
from knowledge_helpers import KnowledgeClient
from make_documents import pdf_bytes
from serving import learnt, served

from khaosz.serve.app import record_routes
from khaosz.serve.knowledge.library import MAX_UPLOAD, Library
from khaosz.serve.retrieval_models import RetrievalModels

pytestmark = pytest.mark.browser

REPORT = ["本公司二零二五年的营业收入为三百二十亿元。", "董事会由九名董事组成，任期三年。"]
QUESTION = "营业收入是多少？"
SAID = "营业收入为三百二十亿元[1]。"


@contextmanager
def keeping(model: Path, data: Path) -> Iterator[KnowledgeClient]:
    library = Library(data, RetrievalModels(), max_upload=MAX_UPLOAD)
    routers = record_routes(data, data / "runs")
    with served(model, library=library, routers=routers) as service:
        yield KnowledgeClient(service)


@pytest.fixture(scope="module")
def kept(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[KnowledgeClient, Path, Path]]:
    """A base with the report, and a model that has learnt to answer the very prompt that the
    service builds of it."""
    data = tmp_path_factory.mktemp("kept")
    placed = [(72.0, 760.0 - 20 * i, line) for i, line in enumerate(REPORT)]
    with keeping(tiny, data) as first:
        first.create("报告")
        first.ready("报告", first.upload("报告", "年报 2025.pdf", pdf_bytes([placed])))
        body = json.dumps({
            "model": "tiny", "messages": [{"role": "user", "content": QUESTION}],
            "knowledge_base": "报告", "max_tokens": 1,
        })  # fmt: skip
        status, _, answered = first.service.ask("POST", "/v1/chat/completions", body)
        assert status == 200 and answered["retrieval"]["found"], answered
        prompt = answered["retrieval"]["prompt"]
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": SAID}]
    model = learnt([(chat, None)], tmp_path_factory.mktemp("reader") / "reader")
    with keeping(model, data) as running:
        yield running, model, data


def test_an_answer_from_a_chinese_pdf_opens_its_source(browser: Any, kept: Any) -> None:
    knowing, _, _ = kept
    assert [base["id"] for base in knowing.ask("GET")[1]["data"]] == ["报告"]
    with visited(browser, knowing.service.port, locale="zh-CN") as page:
        page.locator(".picker select").nth(1).select_option("报告")
        ask(page, QUESTION)
        found = answer(page)
        assert found.locator("> .markdown").inner_text() == "营业收入为三百二十亿元1。"
        found.locator(".cite").click()
        mark = page.locator("dialog mark")
        mark.wait_for()
        assert "营业收入为三百二十亿元" in mark.inner_text()
        assert page.locator("dialog h2").inner_text() == "年报 2025.pdf"
        page.keyboard.press("Escape")
        found.get_by_role("button", name="怎样找到的").click()
        inspector = page.locator("dialog")
        assert "词语 #1" in inspector.locator(".hit").first.inner_text()
        inspector.get_by_text("实际发送的提示").click()
        assert "<passage" in inspector.locator(".prompt").inner_text()
        page.keyboard.press("Escape")
        # What isn't in the documents is said to be so, and no model is asked.
        page.keyboard.press("Control+k")
        page.wait_for_selector(".empty")
        ask(page, "月球有多远？")
        page.get_by_text("资料中没有找到答案").wait_for()


def test_conversations_are_kept_by_the_server(browser: Any, kept: Any) -> None:
    """Also for another browser."""
    knowing, _, _ = kept
    with visited(browser, knowing.service.port) as page:
        ask(page, "旧的 question")
        answer(page)
        page.locator(".history li a", has_text="旧的 question").wait_for()
    with visited(browser, knowing.service.port) as page:
        page.fill(".search input", "旧的")
        page.locator(".history li a", has_text="旧的 question").click()
        assert page.locator(".bubble").inner_text() == "旧的 question"


def test_a_finished_answer_outlives_the_server(browser: Any, kept: Any, tmp_path: Path) -> None:
    knowing, _, data = kept
    with visited(browser, knowing.service.port) as page:
        ask(page, "remember this")
        answer(page)
        said = answer(page).locator("> .markdown").inner_text()
        page.locator(".history li a", has_text="remember this").wait_for()
        page.wait_for_function(
            "() => fetch('/v1' + location.hash.slice(1).replace('/chat/', '/conversations/'))"
            ".then(r => r.json()).then(c => c.nodes[1]?.finish_reason)"
        )
        address = page.url.split("#")[1].split("/")[-1]
    # What is on the disk now is what a power cut would leave: another process reads it.
    from khaosz.serve.records.conversation_store import ConversationStore

    for suffix in ("", "-wal", "-shm"):
        source = data / f"conversations.db{suffix}"
        if source.exists():
            (tmp_path / source.name).write_bytes(source.read_bytes())
    store = ConversationStore(tmp_path / "conversations.db")
    assert store.get(address)["nodes"][1]["content"].split() == said.split()
    store.close()
