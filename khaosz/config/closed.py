"""The base class of all configuration: closed, frozen and validated."""

from __future__ import annotations

from types import NoneType
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from khaosz.errors import ConfigError, nearest, quoted

MOST_TOKENS = 2**24  # of a window or an answer


class Closed(BaseModel):
    """A frozen pydantic model that rejects unknown keys.

    `parse` builds it from untrusted data and turns pydantic's report into one `ConfigError`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,  # TOML has `inf`; no field accepts it
    )

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would take `true` for 1.
        kinds = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {*(get_args(kinds) or (kinds,))} <= {int, float, NoneType}:
            raise ValueError("is a boolean, not a number")
        return value

    @classmethod
    def parse(cls, values: dict[str, Any], *, source: str = "configuration") -> Self:
        """Raises `ConfigError` with `source`, the key and the nearest known key."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _config_error(cls, error, source, values) from None

    @classmethod
    def hint_for(cls, path: list[str], values: dict[str, Any]) -> str:
        """A hint about the unknown key at `path` of `values`: the nearest key, or all."""
        owner = _owner(cls, path[:-1])
        if guess := nearest(path[-1], owner.model_fields):
            return f"did you mean '{'.'.join([*path[:-1], guess])}'?"
        return f"known keys: {', '.join(sorted(owner.model_fields))}"

    def updated(self, **changes: Any) -> Self:
        """A validated copy with `changes`; raises `ConfigError`."""
        return type(self).parse({**self.model_dump(exclude_unset=True), **changes})


def _config_error(
    cls: type[Closed], error: ValidationError, source: str, values: dict[str, Any]
) -> ConfigError:
    # A misspelled required key is also reported as missing; the misspelling explains both.
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{source}: unknown key {quoted(key)}", hint=cls.hint_for(path, values))
    reason = first["msg"].removeprefix("Value error, ")
    value = (
        f" (got {quoted(first['input'])})" if key and not isinstance(first["input"], dict) else ""
    )
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    place = f"{source}: {key}: " if key else f"{source}: "
    return ConfigError(f"{place}{reason}{value}{others}")


def _owner(cls: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The model class that contains the key at `path`, following nested models."""
    for part in path:
        field = cls.model_fields.get(part)
        if field is None:
            break
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                cls = candidate
                break
    return cls
