"""How full the micro-batches of a stage are, from the lengths of its first records.

Rows of pairs, of answers and of texts may stay partly empty; how far is known before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, cycle, islice
from typing import Any

from khaosz.config import PAIR_STAGES, ROLLOUT_STAGES, TrainConfig
from khaosz.config.presets import Derived
from khaosz.data.batches.batch import padded
from khaosz.data.batches.sequences import (
    fit_rows,
    group_into_batches,
    packed_shape,
    rows_with_least_padding,
)
from khaosz.data.records.chat import to_messages
from khaosz.data.records.comparisons import Rated
from khaosz.data.records.layouts import read_record
from khaosz.data.records.learned import learned_chats
from khaosz.data.records.pairs import TextEncoder, to_texts
from khaosz.data.records.preference import encode_pair, encode_prompt, to_prompt
from khaosz.data.records.readers import Skip, expand_inputs, open_source, parsed
from khaosz.data.records.turns import LeftOut
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import DataError
from khaosz.memory.training import Packed
from khaosz.parallel import ParallelContext
from khaosz.trainer.calibration import compiler_problem
from khaosz.trainer.stages.limits import PREFERENCE_PAIRS, TEXT_PAIRS, embedded_length

_SAMPLE = 256  # records whose lengths stand for all
_STEPS = 8
_LONGEST = 2_048  # tokens of a window that follows from data


def largest_micro_batch(
    config: TrainConfig, tokenizer: Tokenizer, parallel: ParallelContext, rows: int
) -> Packed | None:
    """The largest micro-batch of some steps, packed as the stage packs them; None where the data
    cannot be read yet."""
    window, rollout = config.window, config.rollout
    assert window is not None
    examples = _first_lengths(config, tokenizer, window)
    if not examples:
        return None
    if config.stage in ROLLOUT_STAGES:
        per_update = rollout.prompts * rollout.group // rollout.minibatches
        per_step, one_shape = max(1, per_update // parallel.world), False
    else:
        usual = PREFERENCE_PAIRS if config.stage in PAIR_STAGES else TEXT_PAIRS
        per_step = -(-(config.batch_pairs or usual) // parallel.world)
        one_shape = config.compile != "off" and compiler_problem(parallel.device) is None
    endless, steps = cycle(examples), []
    for _ in range(_STEPS):
        groups, lengths, scored = list[list[int]](), list[int](), list[int]()
        for example in islice(endless, per_step):
            numbers = list(range(len(lengths), len(lengths) + len(example)))
            groups += [numbers] if config.stage in PAIR_STAGES else [[n] for n in numbers]
            lengths += [length for length, _ in example]
            scored += [count for _, count in example]
        steps.append((groups, lengths, scored))
    if one_shape:  # at least while the model is timed
        fitted = config.stage in PAIR_STAGES and config.micro_batch is None
        if fitted:
            rows = rows_with_least_padding([step[:2] for step in steps], window, rows)
    sizes, targets, passes = set[int](), set[int](), 0
    for groups, lengths, scored in steps:
        if config.stage == "embed":
            placed = fit_rows(lengths, window)
            starts = range(0, len(placed), rows)
            batches = [list(chain(*placed[start : start + rows])) for start in starts]
        else:
            batches = group_into_batches(groups, lengths, window, rows)
        passes = max(passes, len(batches))
        for members in batches:
            its = [lengths[i] for i in members]
            shape = packed_shape(its, fit_rows(its, window), window)
            sizes.add(rows * window if one_shape else shape[0] * shape[1])
            targets.add(padded(sum(scored[i] for i in members)))
    longest = max(length for example in examples for length, _ in example)
    shapes = len(sizes), len(targets)
    return Packed(max(sizes), max(targets), longest, several=passes > 1, shapes=shapes)


def window_for(lengths: Sequence[int], context: int) -> Derived:
    """The window of a run on chats: the longest in whole 64 tokens, 2,048 at most. Only where it is
    shorter than the longest, chats are cut, which preparation reports."""
    longest = max(lengths)
    window = min(-(-longest // 64) * 64, _LONGEST, context)
    return Derived(
        "window", window, f"the longest of {len(lengths):,} chats has {longest:,} tokens"
    )


def derives_window(config: TrainConfig) -> bool:
    """Whether the window follows from the data: adapters are often trained on little data."""
    return config.window is None and config.stage == "sft" and config.lora is not None


def chat_lengths(config: TrainConfig, tokenizer: Tokenizer) -> list[int]:
    """Tokens of the first chats; none where the data cannot be read yet."""
    return [length for [(length, _)] in _first_lengths(config, tokenizer, _LONGEST)]


def input_bytes(config: TrainConfig) -> int:
    """Bytes of the files of records, 0 where they do not exist yet."""
    with suppress(DataError, OSError):
        paths = [path for path in (config.data, config.val) if path is not None]
        return sum(path.stat().st_size for path in expand_inputs(paths))
    return 0


Lengths = list[tuple[int, int]]  # of the sequences of one example, and what is scored of each


def _first_lengths(config: TrainConfig, tokenizer: Tokenizer, window: int) -> list[Lengths]:
    """Of the first examples."""
    lengths: list[Lengths] = []
    with suppress(DataError, OSError):
        batch = next(
            open_source(expand_inputs([config.data])[0], config.columns, every_column=True)
        )
        for _, record in islice(parsed(batch), _SAMPLE):
            with suppress(DataError, RecursionError):
                if not isinstance(record, Skip):
                    lengths += _lengths(config, tokenizer, window, record)
    return lengths


def _lengths(config: TrainConfig, tokenizer: Tokenizer, window: int, record: Any) -> list[Lengths]:
    if config.stage in ROLLOUT_STAGES:
        rollout = config.rollout
        prompt = encode_prompt(tokenizer, to_prompt(record, config.columns).prompt, window)
        answer = min(rollout.max_new_tokens, window - len(prompt))
        return [[(len(prompt) + answer, answer)]] * rollout.group
    if config.stage == "sft":
        chat = to_messages(record, config.columns)
        learned = learned_chats(tokenizer, chat.messages, chat.tools or None, chat.weights)
        return [[(len(ids), sum(mask))] for ids, mask in learned]
    if config.stage == "embed":
        embed = config.embed
        encoder = TextEncoder(
            tokenizer, embedded_length(config, window), embed.query_prefix, embed.passage_prefix
        )
        texts = to_texts(record, config.columns)
        negatives = texts.negatives[: embed.negatives]
        query, against = encoder.query(texts.query), [*map(encoder.passage, negatives)]
        return [
            [(len(encoder.cut(ids)), 0) for ids in (query, encoder.passage(positive), *against)]
            for positive in texts.positives
        ]
    pairs = read_record(record, ("comparison", "rated"), config.columns)
    if isinstance(pairs, Rated):
        raise LeftOut("compared with other records")
    encoded = [encode_pair(tokenizer, pair, window) for pair in pairs]
    return [
        [
            (len(e.prompt_ids) + len(answer), len(answer))
            for answer in (e.chosen_ids, e.rejected_ids)
        ]
        for e in encoded
    ]
