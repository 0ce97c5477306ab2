"""The training view, in Chromium."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import PHONE, open_page
from serving import Service, served

from khaosz.serve.records.runs import run_routes

pytestmark = pytest.mark.browser


def row(step: int, **more: Any) -> dict[str, Any]:
    metrics = {"loss": 5 / step, "lr": 0.01, "tokens_per_s": 100.0, "elapsed_s": step / 2}
    metrics["kl"] = (step - 1) / 100  # 0 cannot be drawn on a logarithmic scale
    return {"step": step, "tokens": 64 * step, **metrics, **more}


def append(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)


def create_run(path: Path, steps: int, total: int, **config: Any) -> Path:
    path.mkdir(parents=True)
    (path / "train_config.json").write_text(json.dumps({"stage": "pt", "lr": 0.01, **config}))
    (path / "plan.json").write_text(json.dumps({"total_steps": total}))
    append(path / "metrics.jsonl", *(row(i) for i in range(1, steps)))
    append(path / "metrics.jsonl", row(steps, val_loss=0.5, val_bits_per_byte=1.25))
    append(path / "samples.jsonl", {"step": 1, "prompt": "春天", "text": "<b>early</b>"})
    append(path / "samples.jsonl", {"step": steps, "prompt": "春天", "text": "来了"})
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    create_run(folder / "演示/pt", 20, 40)
    old = create_run(folder / "other", 10, 10, lr=0.02, model={"heads": 4})
    past = time.time() - 7200
    for file in old.iterdir():
        os.utime(file, (past, past))
    return folder


@pytest.fixture
def place(tiny: Path, folder: Path) -> Iterator[Service]:
    with served(tiny, routers=[run_routes(folder)]) as running:
        yield running


def chart(page: Any, title: str) -> Any:
    return page.locator(".chart").filter(has=page.locator("figcaption", has_text=title))


def test_follows_a_running_run(browser: Any, place: Service, folder: Path) -> None:
    now = time.time()
    for file in (folder / "演示/pt").iterdir():
        os.utime(file, (now, now))
    with open_page(browser, place.port, "/#/training") as page:
        entry = page.locator(".runs li").first
        assert entry.locator("a").inner_text() == "演示/pt"
        assert entry.locator(".state").inner_text() == "running"
        assert "step 20 of 40" in entry.inner_text()
        chart(page, "Loss").locator(".plot .line").first.wait_for(state="attached")
        titles = page.locator(".chart figcaption").all_inner_texts()
        assert [title.split("\n")[0] for title in titles] == [
            "Loss", "Bits per byte", "KL divergence", "Learning rate", "Tokens per second"
        ]  # fmt: skip
        page.wait_for_load_state("networkidle")  # so that no refresh is in progress
        files = [folder / "演示/pt" / name for name in ("metrics.jsonl", "samples.jsonl")]
        append(files[0], *(row(i) for i in range(21, 40)), row(40, reward=1.5))
        append(files[1], {"step": 40, "prompt": "春天", "text": "万物生长"})
        # The end may fall into a second that the page has already fetched.
        for file in files:
            os.utime(file, (now, now))
        entry.get_by_text("step 40 of 40").wait_for()
        assert entry.locator(".state").inner_text() == "finished"
        chart(page, "Reward").wait_for()
        page.get_by_text("万物生长").wait_for()


def test_reads_values_by_mouse_and_keyboard(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/training") as page:
        plot = chart(page, "Loss").locator(".plot")
        box = plot.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 60)
        values = chart(page, "Loss").locator(".values")
        assert values.inner_text().split("\n")[0] == "step 20"
        assert "training 0.25" in " ".join(values.inner_text().split())
        assert "held-out 0.5" in " ".join(values.inner_text().split())
        assert page.locator(".values").count() == 1
        assert page.locator(".cross").count() == page.locator(".chart").count()
        page.mouse.move(2, 2)
        assert page.locator(".cross").count() == 0
        plot.focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        announcement = chart(page, "Loss").locator("[role=status]")
        assert announcement.inner_text() == "step 2: training 2.5, held-out 0.5"
        page.keyboard.press("End")
        assert announcement.inner_text() == "step 20: training 0.25, held-out 0.5"
        page.keyboard.press("Escape")
        assert page.locator(".cross").count() == 0
        # As a table.
        chart(page, "Loss").get_by_text("Show as table").click()
        rows = chart(page, "Loss").locator("tbody tr").all_inner_texts()
        assert rows[0].split() == ["1", "5", "0.5"] and rows[-1].split() == ["20", "0.25", "0.5"]


def test_selects_axes_and_smoothing(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/training") as page:
        picture = chart(page, "Loss").locator(".plot .line:not(.held) path").last
        picture.wait_for()

        def drawing() -> tuple[str, list[str]]:
            ticks = chart(page, "Loss").locator("text").all_text_contents()
            return str(picture.get_attribute("d")), ticks

        drawings = [drawing()]
        page.select_option(".tuning select", "tokens")
        drawings.append(drawing())
        assert "1,000" in drawings[-1][1]
        page.get_by_label("Log scale").check()
        drawings.append(drawing())
        assert "0.5" in drawings[-1][1] and "0" not in drawings[-1][1]
        assert len({ticks[0] for ticks in drawings}) >= 2
        smooth = chart(page, "Loss").locator(".plot .line:not(.held) path")
        assert smooth.count() == 2  # raw and smoothed
        page.get_by_label("Smoothing").fill("0")
        assert smooth.count() == 1


def test_compares_runs(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/training") as page:
        page.get_by_label("Compare other").check()
        page.locator(".legend").wait_for()
        assert page.locator(".legend li").all_inner_texts()[:2] == ["演示/pt", "other"]
        lines = chart(page, "Loss").locator(".plot .line")
        lines.nth(3).wait_for(state="attached")
        colours = [lines.nth(i).get_attribute("class") for i in range(lines.count())]
        assert colours == ["line c0", "line held c0", "line c1", "line held c1"]
        table = page.locator(".configuration tbody")
        rows = [text.split("\t") for text in table.locator("tr").all_inner_texts()]
        assert rows == [
            ["lr", "0.01", "0.02"],
            ["model.heads", "–", "4"],
            ["plan.total_steps", "40", "10"],
        ]
        page.get_by_label("Show all keys").check()
        assert table.get_by_text("stage").count() == 1
        address = page.url
        page.reload()
        page.locator(".legend").wait_for()
        assert page.url == address
        page.get_by_label("Compare 演示/pt").uncheck()
        page.locator(".legend").wait_for(state="detached")
        assert page.locator(".runs li.open a").all_inner_texts() == ["other"]
        page.get_by_text("Configuration").click()
        assert page.locator(".configuration").get_by_text("model.heads").is_visible()


def test_shows_samples_of_every_step(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/training/other") as page:
        page.get_by_text("Samples at step 10").wait_for()
        assert page.locator(".sample p").inner_text() == "来了"
        page.get_by_label("Samples", exact=True).fill("0")
        page.get_by_text("Samples at step 1", exact=True).wait_for()
        assert page.locator(".sample p").inner_text() == "<b>early</b>"  # text, not markup


def test_without_runs_shows_how_to_start(browser: Any, tiny: Path, tmp_path: Path) -> None:
    with (
        served(tiny, routers=[run_routes(tmp_path)]) as service,
        open_page(browser, service.port, "/#/training", locale="zh-CN") as page,
    ):
        page.get_by_text("还没有训练任务").wait_for()
        assert "khaosz demo" in page.locator(".empty").inner_text()


def test_fits_a_phone(browser: Any, place: Service) -> None:
    with open_page(browser, place.port, "/#/training", viewport=PHONE) as page:
        chart(page, "Loss").locator(".plot .line").first.wait_for(state="attached")
        fits = "(() => { const p = document.querySelector('.page');"
        assert page.evaluate(fits + " return p.scrollWidth <= p.clientWidth })()")


def test_draws_values_that_differ_only_by_rounding(
    browser: Any, place: Service, folder: Path
) -> None:
    append(folder / "other/metrics.jsonl", row(11, accuracy=1 / 3), row(12, accuracy=1 / 3 + 6e-17))
    with open_page(browser, place.port, "/#/training/other") as page:
        chart(page, "Accuracy").locator(".plot .line").first.wait_for(state="attached")


def test_samples_of_a_step_may_arrive_one_by_one(
    browser: Any, place: Service, folder: Path
) -> None:
    with open_page(browser, place.port, "/#/training/other") as page:
        append(folder / "other/samples.jsonl", {"step": 11, "prompt": "first", "text": "one"})
        page.get_by_text("Samples at step 11").wait_for()
        append(folder / "other/samples.jsonl", {"step": 11, "prompt": "second", "text": "two"})
        page.get_by_text("two").wait_for()
        assert page.locator(".sample p").all_inner_texts() == ["one", "two"]


def test_restarted_run_replaces_the_old_metrics(browser: Any, place: Service, folder: Path) -> None:
    """Without a refresh meanwhile: the page was in the background, or the server unreachable."""
    with open_page(browser, place.port, "/#/training/other") as page:
        chart(page, "Loss").get_by_text("Show as table").click()
        first = chart(page, "Loss").locator("tbody tr").first
        assert first.inner_text().split() == ["1", "5", "0.5"]
        page.wait_for_load_state("networkidle")
        for name in ("metrics.jsonl", "samples.jsonl"):
            (folder / "other" / name).unlink()
        (folder / "other/train_config.json").write_text(json.dumps({"stage": "pt", "lr": 0.03}))
        append(folder / "other/metrics.jsonl", *(row(i, loss=7 / i) for i in range(1, 31)))
        first.get_by_text("7", exact=True).wait_for()
        page.get_by_text("Configuration").click()
        page.locator(".configuration").get_by_text("0.03").wait_for()
        assert page.get_by_text("来了").count() == 0


def test_selected_run_stays_when_another_is_newer(
    browser: Any, place: Service, folder: Path
) -> None:
    with open_page(browser, place.port, "/#/training") as page:
        selected = page.locator(".runs li.open a")
        assert selected.inner_text() == "演示/pt"
        append(folder / "other/metrics.jsonl", row(11))
        future = time.time() + 5
        os.utime(folder / "other/metrics.jsonl", (future, future))
        page.locator(".runs li").first.get_by_text("other").wait_for()
        page.wait_for_timeout(100)
        assert selected.inner_text() == "演示/pt"
