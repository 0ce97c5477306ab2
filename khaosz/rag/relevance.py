"""Whether passages may be about a question: the floor below which no model is asked.

A retriever ranks; it does not know whether a passage answers. So the model is asked unless the
passages are plainly about something else, and what it makes of them counts. What is plain depends
on the retriever: words in common for a lexical one, the cosine for an embedder whose cosines were
measured (`Embedder.good_cosine`). An embedder without a measured cosine has no floor, since words
cannot judge what was found by meaning. `python -m bench answers` measures both kinds of error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from khaosz.rag.knowledge_base import KnowledgeBase
from khaosz.rag.models.protocols import GoodCosine
from khaosz.rag.scripts import to_simplified
from khaosz.rag.search.bm25 import is_common
from khaosz.rag.search.hit import Hit
from khaosz.rag.store.records import indexed_text
from khaosz.rag.terms import is_character, normalise, terms

# Share of a question's words that its best passage must have. 99.7 % of CMRC 2018's questions
# reach it, and 2 to 4 % of questions on another subject altogether.
MIN_OVERLAP = 0.34
CHARACTER = 0.25  # weight of a single Chinese character against a pair or a word
# Share of a question's Chinese characters, of three or more, that will do too: words are pairs, and
# an abbreviation shares none ("餐补" with "餐费补贴").
MIN_CHARACTERS = 0.75
_FEW = 5  # passages of a knowledge base: the retriever leaves none out
# Where a prompt holds the whole knowledge base, a paraphrase that shares little will do too.
_WHOLE, _LESS_OVERLAP = 3, 0.15
_STEM = 5  # letters that two forms of a word share: employ, employees
_LETTER = re.compile("[a-z]")
_HAN = re.compile("[㐀-鿿]")
_ASKS_FOR_TIME = re.compile(
    r"\bwhen\b|\bhow (?:long|soon|late)\b|\b(?:deadline|date|until|due)\b"
    r"|多久|多长|几[天日年月号点]|何时|时候|哪[一]?[天年月日]|期限|日期|截止|到期"
)
_TIME = re.compile(
    r"\d ?[年月日天号]|[一二三四五六七八九十两半] ?[年月日天]|\b(?:19|20)\d\d\b"
    r"|\b(?:days?|weeks?|months?|years?)\b"
)


def has_relevant(knowledge_base: KnowledgeBase, query: str, hits: Sequence[Hit]) -> bool:
    """False if the passages are plainly unrelated to the question. query: lines that each count
    alone, since of a follow-up the question before may name the subject. Without hits it is True
    for a knowledge base of a few passages, all in another script than the question."""
    chunks = knowledge_base.store.chunk_count
    few, least = chunks <= _FEW, _LESS_OVERLAP if chunks <= _WHOLE else MIN_OVERLAP
    if not hits:
        return few and _is_foreign(query, knowledge_base.first_hits(_FEW))
    is_dense = any("dense" in hit.legs for hit in hits)
    embedder = knowledge_base.embedder() if is_dense else None
    if embedder is not None and any(
        hit.legs["dense"].score >= _good_cosine(embedder.good_cosine, query, hit.text)
        for hit in hits
        if "dense" in hit.legs
    ):
        return True
    lines = [to_simplified(normalise(line)) for line in query.splitlines() if line.strip()]
    passages = [to_simplified(normalise(indexed_text(hit.headings, hit.text))) for hit in hits]
    for line in lines:
        for passage in passages:
            if overlap(line, passage) >= least or _characters(line, passage) >= MIN_CHARACTERS:
                return True
    # Of a few passages, none was left out by the retriever, and a paraphrase may share no word
    # with its answer: "when is the agreement over", "the contract ends on 3 May".
    return few and any(
        _ASKS_FOR_TIME.search(line) and _TIME.search(passage)
        for line in lines
        for passage in passages
    )


def _good_cosine(cosine: GoodCosine, query: str, passage: str) -> float:
    if isinstance(cosine, Mapping):
        return cosine[f"{_main_language(query)}-{_main_language(passage)}"]
    return -1.0 if cosine is None else cosine


def _main_language(text: str) -> str:
    """A character of Chinese says as much as about four letters."""
    return "zh" if 4 * len(_HAN.findall(text)) > len(_LETTER.findall(text.lower())) else "en"


def _is_foreign(query: str, hits: Sequence[Hit]) -> bool:
    """Whether no passage has a letter of the query's script: word search cannot find them, and a
    model may still read them."""
    script = _HAN if _HAN.search(query) else _LETTER
    return bool(hits) and not any(script.search(normalise(hit.text)) for hit in hits)


def _characters(question: str, passage: str) -> float:
    """The share of the question's Chinese characters that the passage has, without common ones; 0
    of fewer than three."""
    characters = {each for each in terms(question) if is_character(each) and not is_common(each)}
    return len(characters.intersection(passage)) / len(characters) if len(characters) > 2 else 0.0


def overlap(question: str, passage: str) -> float:
    """The share, 0 to 1, of the question's words that the passage has; both in lower case and in
    simplified characters. Question words and other common ones don't count, nor do words of a
    script that the passage doesn't have: across languages only names and numbers can match. A
    question of common words alone is not unrelated to anything: 1."""
    words = {term for term in terms(question) if not is_common(term)}
    if not _HAN.search(passage):
        words = {word for word in words if not _HAN.match(word)}
        if not words and _HAN.search(question):
            return 0.0
    elif not _LETTER.search(passage):
        words = {word for word in words if not _LETTER.match(word)} or words
    if not words:
        return 1.0
    passage_words = set(terms(passage))
    stems = {word[:_STEM] for word in passage_words if len(word) >= _STEM and _LETTER.match(word)}
    weights = {word: CHARACTER if is_character(word) else 1.0 for word in words}
    matched = sum(
        weight
        for word, weight in weights.items()
        if word in passage_words or (len(word) >= _STEM and word[:_STEM] in stems)
    )
    return matched / sum(weights.values())
