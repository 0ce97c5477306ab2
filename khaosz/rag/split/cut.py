"""The best place to end a chunk: paragraphs before sentences before lines, clauses and words.

Only the window between `low` and `high` is searched. The order is the one that retrieves best:
`python -m bench rag_split --only evidence`.
"""

from __future__ import annotations

from khaosz.rag.split import sentence

# Fractions of the window.
_PARAGRAPH_FROM = 0.05  # a paragraph ends a chunk that is longer than this
_REST_FROM = 0.2  # a longer rest of a cut paragraph is a chunk of its own
_SENTENCE_FROM = 0.3  # a line end is preferred to a sentence end before this
# A long sentence is cut at a clause if it would leave more characters of the window empty.
_MAX_UNUSED = 120
_MAX_TITLE = 80  # characters of a line that may be a title, if no mark ends it


def last_prose_cut(text: str, start: int, low: int, high: int) -> int:
    """The best place in (low, high] to end the chunk of prose that opens at `start`."""
    span = high - start
    if low and text[low - 1] != "\n":
        # The rest of a long paragraph reads better alone than with half of the next one.
        end = _first_paragraph_end(text, max(low, start + int(span * _REST_FROM)), high)
        if end:
            return end
    floor = max(low, start + int(span * _PARAGRAPH_FROM))
    end = _last_paragraph_end(text, floor, high) or _last_record_end(text, floor, high)
    if end:
        return end
    late = max(low, high - _MAX_UNUSED)
    middle = max(low, start + int(span * _SENTENCE_FROM))
    return (
        sentence.last_sentence_end(text, late, high)
        or sentence.last_clause_end(text, late, high)
        or sentence.last_sentence_end(text, middle, late)
        or sentence.last_line_end(text, middle, high)
        or sentence.last_sentence_end(text, low, middle)
        or sentence.last_clause_end(text, middle, high)
        or sentence.last_space_end(text, low, high)
        or sentence.last_clause_end(text, low, middle)
        or sentence.last_character_end(text, low, high)
    )


def _first_paragraph_end(text: str, low: int, high: int) -> int:
    line = text.find("\n", low, high)
    while line >= 0:
        end = sentence.paragraph_end(text, line, low, high)
        if end > low:
            return end
        line = text.find("\n", max(line + 1, end), high)
    return 0


def _last_paragraph_end(text: str, low: int, high: int) -> int:
    titles, last_end = 0, 0
    line = text.rfind("\n", low, high)
    while line >= 0:
        end = sentence.paragraph_end(text, line, low, high)
        if end > low and text[line - 1] in sentence.SENTENCE_MARKS:
            return end
        content = line
        while content > low and text[content - 1].isspace():
            content -= 1
        if end > low:
            # A title and "as follows:" go with the next paragraph; three such lines are a list.
            if not _is_title(text, low, content):
                return end
            if titles == 2:
                return last_end
            titles += 1
            last_end = last_end or end
        line = text.rfind("\n", low, content)
    return last_end


def _is_title(text: str, low: int, content: int) -> bool:
    if text[content - 1] in ":：":
        return True
    if text[content - 1] in sentence.LINE_ENDS:
        return False
    above = text.rfind("\n", max(low, content - _MAX_TITLE), content)
    return above >= 0 and not sentence.is_item(text, above + 1)


def _last_record_end(text: str, low: int, high: int) -> int:
    # A single character first: most texts have none, and that search is fast.
    if text.find("}", low, high) >= 0:
        end = text.rfind("}, {", low, high) + 3
        if end > low:
            return end
    if text.find("\\", low, high) >= 0:
        end = text.rfind("\\n\\n", low, high) + 4
        if end > low and sentence.may_open(text, end):
            return end
    return 0
