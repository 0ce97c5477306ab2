"""The plain questions of `python -m bench questions`, and how answers to them are graded."""

from __future__ import annotations

import re
from collections import Counter

from bench.plain_questions import is_right, keeps_language, load


def test_forty_in_each_language() -> None:
    questions = load()
    assert Counter(each.language for each in questions) == {"en": 40, "zh": 40}
    assert len({each.id for each in questions}) == len({each.question for each in questions}) == 80
    for each in questions:
        assert each.right and all(group for group in each.right), each.id
        for pattern in (pattern for group in each.right for pattern in group):
            assert not re.search(pattern, ""), f"{each.id}: {pattern} is found in anything"
        assert not is_right(each, "I do not know. 我不知道。"), each.id


def test_answers_are_graded() -> None:
    by_id = {each.id: each for each in load()}
    assert is_right(by_id["en-02"], "It has TWENTY-NINE days.")
    assert not is_right(by_id["en-02"], "It has 28 days.")
    assert is_right(by_id["zh-15"], "一共要２０元。") and not is_right(
        by_id["zh-15"], "一共要120元。"
    )
    assert is_right(by_id["en-30"], "Spring, summer, autumn and winter.")
    assert not is_right(by_id["en-30"], "Spring, summer and winter.")
    assert keeps_language(by_id["zh-13"], "42") and keeps_language(by_id["zh-13"], "等于42。")
    assert not keeps_language(by_id["zh-13"], "The answer is 42.")
    assert not keeps_language(by_id["en-01"], "日本的首都是东京。")
    assert keeps_language(by_id["en-01"], "Tokyo (东京) is the capital of Japan.")
