"""Conversations to fine-tune on, from records of every layout, and their loss masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from khaosz.config import ColumnsConfig
from khaosz.data.records.conversations import Conversation
from khaosz.data.records.layouts import read_record
from khaosz.errors import DataError


def to_messages(record: Any, columns: ColumnsConfig | None = None) -> Conversation:
    """Read one record of any layout with a conversation, or a prompt and its answer.

    Turns after the last assistant turn are dropped: nothing in them is trained. Raises DataError
    with a short reason for an unknown layout or role, content that is not text, or no assistant
    turn; `LeftOut` for an assistant turn without text and tool calls, and for an answer that is
    labelled undesirable.
    """
    chat: Conversation = read_record(record, ("chat",), columns)
    return chat


def cut_at_turn(loss_mask: np.ndarray, limit: int) -> int:
    """The longest prefix length <= `limit` that ends where an assistant turn ends, 0 if none does.

    loss_mask: (length,), 1 on trained tokens. A turn ends on the last 1 of a run.
    """
    trained = np.asarray(loss_mask) != 0
    following = np.append(trained[1:], False)
    ends = np.flatnonzero(trained & ~following) + 1
    ends = ends[ends <= limit]
    return int(ends[-1]) if ends.size else 0


def weighted_mask(loss_mask: list[int], weights: list[int] | None) -> list[int]:
    """`loss_mask` without the assistant turns of weight 0; each run of 1 is one turn.

    Raises DataError where the chat template marks another number of turns.
    """
    if weights is None:
        return loss_mask
    trained = np.asarray(loss_mask) != 0
    starts = trained & ~np.append(False, trained[:-1])
    if int(starts.sum()) != len(weights):
        raise DataError(
            f"weights of {len(weights)} turns, but the chat template trains {int(starts.sum())}"
        )
    of_turn = np.asarray([0, *weights])[np.cumsum(starts)]
    return [int(value) for value in trained * of_turn]
