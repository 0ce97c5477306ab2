"""The sentence of the found passages that answers a question, quoted without a model.

Each sentence and table row of the passages is scored by the question's terms that it has, the rare
ones counting more; by those that its surroundings have (headings, heads of the table, the sentence
before); and by whether it has what the question asks for: a date, a duration, an amount of money, a
number, a person, a place. A passage that ranks higher in the search counts a little more.
`python -m bench answers --quotes` measures it. Words say which sentence is nearest to a question,
not whether it answers: for that there are only the floor of `has_relevant` and the kind of answer.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from khaosz.rag.knowledge_base import KnowledgeBase
from khaosz.rag.relevance import has_relevant
from khaosz.rag.scripts import to_simplified
from khaosz.rag.search.bm25 import is_common
from khaosz.rag.search.hit import Hit
from khaosz.rag.search.search import with_places
from khaosz.rag.split.sentence import sentence_spans
from khaosz.rag.terms import is_character, normalise, terms

PASSAGES = 5  # that are read; of eight or twelve, no more answers are right
_CHARACTER = 0.5  # weight of a Chinese character against a pair or a word
_NEARBY = 0.35  # of a term that the surroundings have
_KIND = 0.4  # of the kind of answer, against all terms together
_RANK = 0.5  # of the passage's score in the search
_STEM = 5  # letters that two forms of a word share, as in `relevance`
_LONGEST = 600  # characters of a sentence that is quoted
_LEAST = 0.2  # of the terms' weight, below which a sentence says nothing about the question

_NUMERAL = r"(?:\d[\d,.]*|[零〇一二两三四五六七八九十百千万半]+)"
_ENGLISH_NUMERAL = (
    r"(?:\d[\d,.]*|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen"
    r"|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy"
    r"|eighty|ninety|hundred|half|a|an)"
)
_MONTH = r"(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*"
_CLOCK = r"\b\d{1,2}(?:[:.]\d\d\b| ?[ap]\.?m\b)|\bnoon\b|\bmidnight\b|" + _NUMERAL + r" ?[时点]"
_PERIOD = (
    r"[(（](?:年|月|天|日|小时|分钟|years?|months?|days?|hours?|minutes?|min|h)[)）]: \d"
    rf"|{_NUMERAL} ?(?:个?(?:工作日|自然日|月|星期|小时|季度)|天|日|周|年|分钟|秒|学期)"
    rf"|\b{_ENGLISH_NUMERAL}[- ](?:\w+ )?(?:days?|weeks?|months?|years?|hours?|minutes?|seconds?)"
)
_LENGTH = r"\d ?(?:k?m|cm|mm|met(?:re|er)s?|miles?|feet|inch(?:es)?|公里|米|厘米|毫米)\b"
_PRICE = (
    rf"[¥￥$€£] ?\d|{_NUMERAL} ?(?:万|亿)?(?:元|块|美元|欧元|角|分钱)|\d ?%|百分之|千分之|免费"
    r"|\d ?(?:thousand|million|billion)? ?"
    r"(?:yuan|rmb|cny|usd|dollars?|euros?|pounds?|pence|cents?|percent)\b|\bfree\b"
)
_FREQUENCY = (
    r"\b(?:daily|nightly|weekly|monthly|yearly|annually|once|twice|each|every)\b|每[天日夜晚周月年]"
)
_DATE = (
    rf"{_NUMERAL} ?(?:[年月]|日(?!内))|[月日] ?{_NUMERAL} ?号|\b{_MONTH}\b|\b(?:19|20)\d\d\b"
    rf"|{_CLOCK}|周[一二三四五六日末]|星期|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day"
    r"|\d-\d\d?-\d"
)
# What a question asks for, and what an answer then has, for certain or perhaps. The first that
# matches is the kind.
_KINDS = tuple(
    (name, re.compile(asks), re.compile(has), re.compile(perhaps))
    for name, asks, has, perhaps in (
        (
            "person",
            r"谁|哪[位些]人|何人|叫什么名字|姓名|\bwho(?:m|se)?\b",
            r"由|先生|女士|经理|主任|老师|负责|出租方|承租方|甲方|乙方|部门?|公司|供[货应]商",
            r"\b\B",
        ),
        (
            "duration",
            r"多久|多长|几[天年周]|几个(?:月|星期|小时|工作日)|多少[天年]|期限"
            r"|\bhow (?:long|soon|often)\b"
            r"|\bhow many (?:days?|weeks?|months?|years?|hours?|minutes?)"
            r"|\bhow far ahead\b|\bnotice period\b|\bwithin what\b",
            _PERIOD,
            rf"{_FREQUENCY}|{_LENGTH}",
        ),
        (
            "date",
            r"什么时候|何时|什么时间|几[号日月点时]|哪一?[天年月日]|日期|截止|到期"
            r"|\bwhen\b|\bwhat (?:date|time|day|year|month)\b|\bwhich (?:day|year|month)\b"
            r"|\bdeadline\b|\bdue date\b|\bexpir|\buntil\b",
            _DATE,
            _PERIOD,
        ),
        (
            "price",
            r"多少钱|价格|单价|售价|费用|几块|多少元|[租押罚金费]金?是?多少|房租|工资多|薪水"
            r"|\bhow much (?:is|are|does|do|did|will|would)\b|\bhow much\b.*\b(?:cost|pay|charge)"
            r"|\bprice\b|\bcosts?\b|\bfee\b|\bfare\b|(?<!in )\bcharge\b|\bfine\b|\bsalary\b"
            r"|\bwhat\b.*\b(?:deposit|rent|penalty|premium|budget|allowance)\b",
            _PRICE,
            r"(?:元|价|费|[$€£¥]|price|fee|fare|cost|yuan|usd|eur)[^;]*\d",
        ),
        (
            "telephone",
            r"电话|手机号|联系方式|热线|\bphone\b|\btelephone\b|\bcall\b|\bhotline\b",
            r"\d[\d -]{5,}\d",
            r"\b\d{3,5}\b",
        ),
        (
            "address",
            r"邮箱|电子邮件|网址|地址|\be-?mail\b|\baddress\b|\bwebsite\b|\burl\b",
            r"\S@\S|\d+(?:\.\d+){3}|https?://|\bwww\.|\.\w+/",
            r"[路街道]|\b(?:street|road|avenue|lane)\b",
        ),
        (
            "place",
            r"哪里|哪儿|在哪|什么地方|何处|哪个(?:城市|房间|地方|楼)|地点|\bwhere\b",
            r"[路街楼室层门市区县厅馆库]|位于|\b(?:in|at|on|to|near|behind)\b",
            r"\b\B",
        ),
        (
            "number",
            r"多少|几[个人次张本台件条间层箱辆名位盒包度片]|多[大高重宽深远快]|\bpercent"
            r"|\bhow (?:many|much|big|tall|large|heavy|high|deep|fast|far|wide)\b"
            r"|\bmaximum\b|\bminimum\b|\bnumber of\b",
            rf"\d|{_NUMERAL}[个人次张本册台件条间层箱辆名位盒包度片元亿]|\b(?!an?\b){_ENGLISH_NUMERAL}\b",
            r"\b\B",
        ),
        (
            "permission",
            r"可以|能不能|能否|可否|允许|是否|准许|[能会]\S{1,12}吗"
            r"|^(?:can|may|is|are|do|does|must|should)\b",
            r"不得|禁止|可|允许|不能|须|应当|严禁|请勿"
            r"|\b(?:may|must|not|allowed|permitted|forbidden|prohibited|can|cannot|only|no)\b",
            r"\b\B",
        ),
        (
            "reason",
            r"为什么|为何|原因|\bwhy\b",
            r"因|由于|为了|\bbecause\b|\bdue to\b|\bsince\b|\bso that\b",
            r"\b\B",
        ),
    )
)
# Without what these ask for, a sentence does not answer, however much of the question it repeats.
_STRICT = {"telephone", "address", "price", "duration", "date", "number"}
_NAME = re.compile(r"\b[A-Z][a-z]+(?: [A-Z][a-z.]+)+|\b(?:Mr|Ms|Mrs|Dr)\b")
_HEADING = re.compile(r"\s*(?:#{1,6} |=+\s*$|-+\s*$)")
_RULE = re.compile(r"[\s|:+-]+")  # between the heads of a Markdown table and its rows
# The first row of a Markdown table, before the rule below it.
_HEADER = re.compile(r"^[ \t]*(\|.*)\n[ \t]*\|[ \t|:+-]*$", re.M)
# The rows of a Markdown table, or the lines between two tables.
_BLOCK = re.compile(r"(?:^[ \t]*\|.*(?:\n|\Z))+|(?:^(?![ \t]*\|).*(?:\n|\Z))+", re.M)
_WORD = re.compile("[a-z]")
Cells = tuple[tuple[str, str], ...]  # of a row, each with its head
_Kind = tuple[str, re.Pattern[str], re.Pattern[str], re.Pattern[str]]


@dataclass(frozen=True)
class Quote:
    """`hit.text`, a sentence or a table row, is the answer; hit has its place. heads: of the
    table's columns, with the cells of the row. kind: what the question asks for, if that is
    known. score: comparable within one question."""

    hit: Hit
    score: float
    kind: str | None = None
    cells: Cells = ()

    @property
    def text(self) -> str:
        """The sentence on one line, of a row each cell with its head."""
        return _on_one_line(self.hit.text, self.cells)


@dataclass(frozen=True)
class _Unit:
    """A sentence or row: characters `start` to `end` of its passage; nearby: what surrounds
    it."""

    hit: Hit
    start: int
    end: int
    nearby: str
    cells: Cells = ()

    @property
    def shown(self) -> str:
        return _on_one_line(self.hit.text[self.start : self.end], self.cells)


def find_quote(
    knowledge_base: KnowledgeBase, question: str, hits: Sequence[Hit], *, query: str | None = None
) -> Quote | None:
    """The best sentence of the hits; None if they are not about the question (`has_relevant`) or
    have nothing of the kind that it asks for. query: with the words of the questions before, as it
    was searched with."""
    if not has_relevant(knowledge_base, query or question, hits):
        return None
    heads = _first_rows(knowledge_base, hits)
    units = [unit for hit in hits for unit in _units(hit, heads.get(hit.chunk, ""))]
    best = _best(question, units, query or question)
    if best is None:
        return None
    (hit,) = with_places(knowledge_base.store, [best.hit])
    return replace(best, hit=hit)


def _best(question: str, units: Sequence[_Unit], query: str) -> Quote | None:
    asked = to_simplified(normalise(question))
    kind = next((row for row in _KINDS if row[1].search(asked)), None)
    words = Counter(term for term in terms(to_simplified(normalise(query))) if not is_common(term))
    texts = [to_simplified(normalise(unit.shown)) for unit in units]
    unit_terms = [_with_stems(terms(text)) for text in texts]
    nearby = [_with_stems(terms(to_simplified(normalise(unit.nearby)))) for unit in units]
    weights = {
        term: (_CHARACTER if is_character(term) else 1.0)
        * math.log(1 + len(units) / (0.5 + sum(_has(term, each) for each in unit_terms)))
        for term in words
    }
    # Words that no passage has say nothing about which sentence is the best.
    known = {
        term: weight
        for term, weight in weights.items()
        if any(_has(term, each) for each in (*unit_terms, *nearby))
    }
    total, asked_weight = sum(known.values()) or 1.0, sum(weights.values()) or 1.0
    top = max((unit.hit.score for unit in units), default=0.0) or 1.0
    best: Quote | None = None
    for unit, text, own, around in zip(units, texts, unit_terms, nearby, strict=True):
        direct = sum(weight for term, weight in known.items() if _has(term, own)) / total
        near = sum(
            weight for term, weight in known.items() if _has(term, around) and not _has(term, own)
        )
        fits = 0.0 if kind is None else _fits(kind, unit.shown, text)
        if kind is not None and kind[0] in _STRICT and not fits:
            continue
        if (direct * total + near) / asked_weight < _LEAST:
            continue
        score = direct + _NEARBY * near / total + _KIND * fits + _RANK * unit.hit.score / top
        if best is None or score > best.score:
            hit = unit.hit.part(unit.start, unit.end)
            best = Quote(hit, score, kind and kind[0], unit.cells)
    return best


def _on_one_line(text: str, cells: Cells) -> str:
    if cells:
        return "; ".join(f"{head}: {cell}" if head else cell for head, cell in cells)
    return " ".join(text.split())


def _fits(kind: _Kind, written: str, text: str) -> float:
    """1 if the text has what this kind asks for, 0.5 if perhaps, else 0."""
    name, _, has, perhaps = kind
    if has.search(text) or (name == "person" and _NAME.search(written)):
        return 1.0
    return 0.5 if perhaps.search(text) else 0.0


def _with_stems(found: list[str]) -> set[str]:
    """The terms, and the beginnings that two forms of a word share: employ, employees."""
    return {
        *found,
        *(f"{term[:_STEM]}*" for term in found if len(term) >= _STEM and _WORD.match(term)),
    }


def _has(term: str, found: set[str]) -> bool:
    return term in found or (len(term) >= _STEM and f"{term[:_STEM]}*" in found)


def _units(hit: Hit, first_row: str) -> Iterator[_Unit]:
    """The sentences and rows of a passage. first_row: the heads of the table that it continues."""
    title = "\n".join((hit.doc, *hit.headings))
    is_table = _is_table_file(hit)
    text, before, heads = hit.text, "", _cells(first_row)
    header_rows = {match[1].strip() for match in _HEADER.finditer(text)}
    for start, end in _spans(text, is_table=is_table):
        stripped = text[start:end].strip()
        start += text[start:end].index(stripped) if stripped else 0
        end = start + len(stripped)
        if not stripped or len(stripped) > _LONGEST or _RULE.fullmatch(stripped):
            continue
        if is_table or stripped.startswith("|"):
            row = _cells(stripped)
            if stripped in header_rows:
                heads = row
            elif row != heads:
                names = (*heads, *[""] * len(row))
                cells = tuple((head, cell) for head, cell in zip(names, row) if cell)  # noqa: B905
                yield _Unit(hit, start, end, f"{title}\n{' '.join(heads)}", cells)
            continue
        heads = ()
        # A title or a question answers nothing; what follows is about it.
        if not _HEADING.match(stripped) and not stripped.endswith(("?", "？")):
            yield _Unit(hit, start, end, f"{title}\n{before}")
        before = stripped


def _spans(text: str, *, is_table: bool) -> Iterator[tuple[int, int]]:
    """Sentences, and each row of a table."""
    at = 0
    for block in [text] if is_table else _BLOCK.findall(text):
        if is_table or block.lstrip(" \t").startswith("|"):
            for line in block.splitlines(keepends=True):
                yield at, at + len(line)
                at += len(line)
        else:
            for start, end in sentence_spans(block):
                yield at + start, at + end
            at += len(block)


def _is_table_file(hit: Hit) -> bool:
    return hit.doc.lower().endswith((".csv", ".tsv"))


def _cells(row: str) -> tuple[str, ...]:
    """Of a row of Markdown, CSV or TSV."""
    row = row.strip()
    if row.startswith("|"):
        cells = re.split(r"(?<!\\)\|", row.removeprefix("|").removesuffix("|"))
        return tuple(cell.strip().replace("\\|", "|") for cell in cells)
    if not row or "\t" in row:
        return tuple(cell.strip() for cell in row.split("\t")) if row else ()
    delimiter = ";" if row.count(";") > row.count(",") else ","
    return tuple(cell.strip() for cell in next(csv.reader([row], delimiter=delimiter), ()))


def _first_rows(knowledge_base: KnowledgeBase, hits: Sequence[Hit]) -> dict[int, str]:
    """By chunk, the heads of the table that it is from or continues."""
    heads: dict[int, str] = {}
    for hit in hits:
        is_file = _is_table_file(hit)
        if not (is_file or hit.text.lstrip().startswith("|")):
            continue
        document = knowledge_base.store.document_by_hash(hit.hash)
        if document is None:
            continue
        text = knowledge_base.store.text(document.id)
        if is_file:
            heads[hit.chunk] = next((line for line in text.splitlines() if line.strip()), "")
        elif rows := _HEADER.findall(text, 0, hit.start):
            heads[hit.chunk] = rows[-1]
    return heads
