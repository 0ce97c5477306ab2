"""Answers prompts with llama.cpp, in an interpreter that has llama-cpp-python; see plain_questions.

    PYTHON -m bench.peer_llama_cpp MODEL.gguf < prompts.json > answers.json

Reads a list of prompt texts and `max_tokens`; writes a list of texts and finish reasons. Greedy,
without penalties. Imports nothing of khaosz, which that environment does not have.
"""

from __future__ import annotations

import json
import sys

from llama_cpp import Llama


def main() -> None:
    asked = json.load(sys.stdin)
    model = Llama(sys.argv[1], n_ctx=4096, n_threads=asked["threads"], verbose=False)
    answers = []
    for text in asked["prompts"]:
        ids = model.tokenize(text.encode(), add_bos=False, special=True)
        choice = model.create_completion(
            ids, max_tokens=asked["max_tokens"], temperature=0.0, repeat_penalty=1.0
        )["choices"][0]
        answers.append({"text": choice["text"], "reason": choice["finish_reason"]})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
