"""What a recipe can say about training an embedder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from khaosz.config.closed import Closed


class EmbedConfig(Closed):
    """InfoNCE on the cosines of a query with the passages of its batch (van den Oord et al. 2018,
    arXiv:1807.03748), divided by `temperature`.

    `pooling`, the prefixes and `max_length` are stored with the model: who embeds with it later
    embeds as it was trained. `symmetric` adds the same loss of a passage against the queries
    (Radford et al. 2021, arXiv:2103.00020), both at half weight.
    """

    pooling: Literal["mean", "last"] = "mean"
    temperature: float = Field(default=0.05, gt=0)
    symmetric: bool = False
    query_prefix: str = ""
    passage_prefix: str = ""
    max_length: int | None = Field(
        default=None, ge=2, description="tokens of a text, its prefix included; None: the window"
    )
    negatives: int = Field(default=4, ge=0, description="hard negatives of a record, the first")
