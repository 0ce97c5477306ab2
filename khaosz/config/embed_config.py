"""Recipe keys of the embed stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from khaosz.config.closed import MOST_TOKENS, Closed


class EmbedConfig(Closed):
    """InfoNCE over the cosine similarities of a query and the passages of its batch, divided by
    `temperature` (van den Oord et al. 2018, arXiv:1807.03748).

    `pooling`, the prefixes and `max_length` are stored with the model, so that it embeds later as
    it was trained. `symmetric` adds the same loss of a passage over the queries (Radford et al.
    2021, arXiv:2103.00020), both with weight 1/2.
    """

    pooling: Literal["mean", "last"] = "mean"
    temperature: float = Field(default=0.05, ge=1e-3, le=100)
    symmetric: bool = False
    query_prefix: str = ""
    passage_prefix: str = ""
    max_length: int | None = Field(
        default=None,
        ge=2,
        le=MOST_TOKENS,
        description="tokens of a text, with its prefix; None: the window",
    )
    negatives: int = Field(default=4, ge=0, le=10_000, description="hard negatives used per record")
