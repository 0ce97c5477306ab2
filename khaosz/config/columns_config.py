"""Recipe keys that name the columns and roles of the data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from khaosz.config.closed import Closed


class ColumnsConfig(Closed):
    """Columns of records whose layout is not a known one: `prompt = "ask"` reads the column `ask`
    as the prompt. A named column wins over columns that a known layout would use instead.

    `role` and `content` are keys of a message, `roles` maps the data's roles to the known ones.
    """

    text: str | None = Field(default=None, description="a text to pretrain on")
    messages: str | None = Field(default=None, description="a list of messages")
    prompt: str | None = Field(default=None, description="text or messages")
    response: str | None = Field(default=None, description="the answer to learn")
    system: str | None = Field(default=None, description="system message")
    tools: str | None = Field(default=None, description="tools that the chat may call")
    chosen: str | None = Field(default=None, description="the better answer")
    rejected: str | None = Field(default=None, description="the worse answer")
    label: str | None = Field(default=None, description="whether the answer is a good one")
    score: str | None = Field(default=None, description="how good the answer is")
    query: str | None = Field(default=None, description="of an embedder's pair")
    positive: str | None = Field(default=None, description="passages that answer the query")
    negative: str | None = Field(default=None, description="passages that do not")
    role: str | None = Field(default=None, description="key of a message")
    content: str | None = Field(default=None, description="key of a message")
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(
        default_factory=dict, description="role in the data -> known role"
    )

    @field_validator("*")
    @classmethod
    def _named(cls, value: object) -> object:
        if value == "":
            raise ValueError("an empty name")
        return value
