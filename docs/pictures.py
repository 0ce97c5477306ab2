"""The pictures of the page in README and guides, from a real service, in both languages:

    python -m docs.pictures MODEL.gguf

English ones are docs/NAME.png, Chinese ones docs/NAME.zh.png. Needs Chromium, playwright and
Pillow. The answers are the model's own.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent
TEXTS: dict[str, dict[str, Any]] = {
    "en": {
        "locale": "en-US",
        "base": "Flat",
        "files": {
            "Lease.md": "# Lease\n\nThe lease ends on 31 December 2027 unless it is renewed in"
            " writing.\n\n## Rent\n\nThe rent is 950 euros a month, due on the fifth.\n",
            "House rules.md": "# House rules\n\nQuiet hours are from 22:00 to 6:00.\n",
        },
        "question": "How much is the rent, and when is it due?",
    },
    "zh": {
        "locale": "zh-CN",
        "base": "租房",
        "files": {
            "租赁合同.md": "# 租赁合同\n\n合同于二零二七年十二月三十一日到期，除非书面续签。\n\n"
            "## 租金\n\n每月租金为八千元，每月五日前支付。\n",
            "住户须知.md": "# 住户须知\n\n晚上十点到早上六点请保持安静。\n",
        },
        "question": "每月租金是多少？什么时候支付？",
    },
}


@contextmanager
def serving(data: Path, *arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", "khaosz", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--data", str(data), "--runs", str(data / "runs")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        match = re.search(r"(http://[\d.:]+)/v1", process.stdout.readline())
        assert match, "the service did not start"
        yield match[1]
    finally:
        process.terminate()
        process.wait()


def save(page: Any, name: str, language: str) -> None:
    page.wait_for_timeout(400)  # animations
    suffix = "" if language == "en" else f".{language}"
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(64)
    picture.save(FOLDER / f"{name}{suffix}.png", optimize=True)


def ask(page: Any, text: str) -> None:
    count = page.locator(".message.assistant .actions").count()
    page.fill("#message", text)
    page.focus("#message")
    page.keyboard.press("Enter")
    page.locator(".message.assistant .actions").nth(count).wait_for()


def take(browser: Any, address: str, language: str) -> None:
    texts = TEXTS[language]
    size = {"width": 1280, "height": 800}
    page = browser.new_context(viewport=size, locale=texts["locale"]).new_page()
    page.set_default_timeout(90_000)
    # So that the pictures can be made again.
    page.add_init_script(
        "localStorage.setItem('khaosz.defaults', '{\"settings\": {\"temperature\": 0}}')"
    )
    page.goto(f"{address}/#/models")
    page.locator(".models-list").first.wait_for()
    save(page, "page-models", language)
    create(page, address, texts)
    page.goto(f"{address}/#/documents/{texts['base']}")
    page.reload()
    page.locator("main button.primary").first.click()
    page.wait_for_url("**/#/chat*")
    ask(page, texts["question"])
    page.locator(".citations button").first.click()
    page.locator("dialog mark").wait_for()
    save(page, "page", language)


def create(page: Any, address: str, texts: dict[str, Any]) -> None:
    bases = f"{address}/v1/knowledge_bases"
    page.request.post(bases, data={"name": texts["base"]})
    for name, content in texts["files"].items():
        page.request.put(f"{bases}/{texts['base']}/files/{name}", data=content.encode())
    listed = f"{bases}/{texts['base']}/files"
    while any(file["status"] != "ready" for file in page.request.get(listed).json()["data"]):
        page.wait_for_timeout(200)


def main(model: str) -> None:
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=shutil.which("chromium")) as browser,
    ):
        for language in TEXTS:
            with (
                tempfile.TemporaryDirectory() as data,
                serving(Path(data), f"assistant={model}") as address,
            ):
                take(browser, address, language)


if __name__ == "__main__":
    main(sys.argv[1])
