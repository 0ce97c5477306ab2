"""Prompt lookup against plain decoding, on prompts whose answers quote them.

    python -m bench lookup MODEL --rounds 3

Greedy answers to "repeat this paragraph", of paragraphs of the built-in sample, plain and with
`prompt_lookup`, alternating. `identical` counts answers that are equal: on the fast path a wider
pass may round differently, so sequences may diverge where two tokens are almost equally likely; in
the deterministic path they never do, as the tests show.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

from khaosz.files import SAMPLE_DIR
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench lookup", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    text = (SAMPLE_DIR / "state_of_the_union_2024.txt").read_text(encoding="utf-8")
    paragraphs = [part for part in text.split("\n\n") if 200 < len(part) < 500][:6]
    generator = Generator.from_directory(options.model)
    params = SamplingParams(temperature=0.0, max_tokens=128)
    speeds: dict[bool, list[float]] = {False: [], True: []}
    texts: dict[bool, list[str]] = {}
    for _ in range(options.rounds + 1):  # the first one warms up
        for lookup in (False, True):
            generator.engine.prompt_lookup = lookup
            generator.engine.prefixes.clear()
            tokens, seconds, texts[lookup] = 0, 0.0, []
            for paragraph in paragraphs:
                ask = f"Repeat this paragraph word for word:\n\n{paragraph}"
                ids = generator.chat_ids([{"role": "user", "content": ask}])
                first, text = 0.0, ""
                for piece in generator.stream(ids, params):
                    text += piece.text
                    if not first:  # decoding only: the prompt is the same work for both
                        first = time.perf_counter()
                        before = piece.tokens
                    last = piece.tokens
                seconds += time.perf_counter() - first
                texts[lookup].append(text)
                tokens += last - before
            speeds[lookup].append(tokens / seconds)
    plain, drafted = (median(speeds[x][1:]) for x in (False, True))
    same = sum(a == b for a, b in zip(texts[False], texts[True], strict=True))
    answer = {
        "plain_tokens_per_s": round(plain, 1),
        "lookup_tokens_per_s": round(drafted, 1),
        "ratio": round(drafted / plain, 2),
        "identical": f"{same} of {len(paragraphs)}",
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
