"""The page with a server that stores conversations and documents: citations of a Chinese PDF, and
conversations that outlive browser and server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import ask, last_answer, open_page
from knowledge_helpers import KnowledgeClient
from make_documents import pdf_bytes
from serving import learnt, served

from khaosz.serve.app import record_routes
from khaosz.serve.knowledge.library import MAX_UPLOAD, Library
from khaosz.serve.retrieval_models import RetrievalModels

pytestmark = pytest.mark.browser

REPORT = ["本公司二零二五年的营业收入为三百二十亿元。", "董事会由九名董事组成，任期三年。"]
QUESTION = "营业收入是多少？"
ANSWER = "营业收入为三百二十亿元[1]。"


@contextmanager
def serve_data(model: Path, data: Path) -> Iterator[KnowledgeClient]:
    library = Library(data, RetrievalModels(), max_upload=MAX_UPLOAD)
    routers = record_routes(data, data / "runs")
    with served(model, library=library, routers=routers) as service:
        yield KnowledgeClient(service)


@pytest.fixture(scope="module")
def server(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[KnowledgeClient, Path, Path]]:
    """A knowledge base with the report, and a model trained on the exact prompt that the service
    builds from it."""
    data = tmp_path_factory.mktemp("data")
    placed = [(72.0, 760.0 - 20 * i, line) for i, line in enumerate(REPORT)]
    with serve_data(tiny, data) as first:
        first.create("报告")
        first.ready("报告", first.upload("报告", "年报 2025.pdf", pdf_bytes([placed])))
        body = json.dumps({
            "model": "tiny", "messages": [{"role": "user", "content": QUESTION}],
            "knowledge_base": "报告", "max_tokens": 1,
        })  # fmt: skip
        status, _, response = first.service.ask("POST", "/v1/chat/completions", body)
        assert status == 200 and response["retrieval"]["found"], response
        prompt = response["retrieval"]["prompt"]
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ANSWER}]
    model = learnt([(chat, None)], tmp_path_factory.mktemp("reader") / "reader")
    with serve_data(model, data) as running:
        yield running, model, data


def test_citation_of_a_chinese_pdf_opens_the_source(browser: Any, server: Any) -> None:
    client, _, _ = server

    assert [base["id"] for base in client.ask("GET")[1]["data"]] == ["报告"]
    with open_page(browser, client.service.port, locale="zh-CN") as page:
        page.locator(".picker select").nth(1).select_option("报告")
        ask(page, QUESTION)
        answer = last_answer(page)
        assert answer.locator("> .markdown").inner_text() == "营业收入为三百二十亿元1。"
        answer.locator(".cite").click()
        mark = page.locator("dialog mark")
        mark.wait_for()
        assert "营业收入为三百二十亿元" in mark.inner_text()
        assert page.locator("dialog h2").inner_text() == "年报 2025.pdf，第 1 页"
        page.keyboard.press("Escape")
        answer.get_by_role("button", name="检索详情").click()
        inspector = page.locator("dialog")
        assert "关键词 #1" in inspector.locator(".hit").first.inner_text()
        inspector.get_by_text("发送给模型的提示词").click()
        assert "<passage" in inspector.locator(".prompt").inner_text()
        page.keyboard.press("Escape")
        # Without relevant passages, the model is not called.
        page.keyboard.press("Control+k")
        page.wait_for_selector(".empty")
        ask(page, "二月的月球有多远？")
        page.get_by_text("资料中没有找到答案").wait_for()
        # What was found is shown, and the model can be asked all the same.
        anyway = page.get_by_role("button", name="仍然询问模型")
        anyway.wait_for()
        found = last_answer(page).locator(".citations li")
        assert found.all_inner_texts() == ["找到但未引用：", "1\n年报 2025.pdf，第 1 页"]
        anyway.click()
        anyway.wait_for(state="detached")
        last_answer(page).get_by_role("button", name="检索详情").click()
        page.locator("dialog").get_by_text("发送给模型的提示词").click()
        assert "二月的月球有多远？" in page.locator("dialog .prompt").inner_text()


def test_server_stores_conversations(browser: Any, server: Any) -> None:
    """For other browsers too."""
    client, _, _ = server
    with open_page(browser, client.service.port) as page:
        ask(page, "旧的 question")
        last_answer(page)
        page.locator(".history li a", has_text="旧的 question").wait_for()
    with open_page(browser, client.service.port) as page:
        page.fill(".search input", "旧的")
        page.locator(".history li a", has_text="旧的 question").click()
        assert page.locator(".bubble").inner_text() == "旧的 question"


def test_finished_answer_survives_a_server_crash(browser: Any, server: Any, tmp_path: Path) -> None:
    client, _, data = server
    with open_page(browser, client.service.port) as page:
        ask(page, "remember this")
        last_answer(page)
        text = last_answer(page).locator("> .markdown").inner_text()
        page.locator(".history li a", has_text="remember this").wait_for()
        page.wait_for_function(
            "() => fetch('/v1' + location.hash.slice(1).replace('/chat/', '/conversations/'))"
            ".then(r => r.json()).then(c => c.nodes[1]?.finish_reason)"
        )
        address = page.url.split("#")[1].split("/")[-1]
    # The files on disk now are what a power failure would leave; another store reads a copy.
    from khaosz.serve.records.conversation_store import ConversationStore

    for suffix in ("", "-wal", "-shm"):
        source = data / f"conversations.db{suffix}"
        if source.exists():
            (tmp_path / source.name).write_bytes(source.read_bytes())
    store = ConversationStore(tmp_path / "conversations.db")
    assert store.get(address)["nodes"][1]["content"].split() == text.split()
    store.close()
