"""The one base of all configuration: closed, frozen, validated, with errors a person can act on."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from khaosz.errors import ConfigError, nearest


class Closed(BaseModel):
    """A frozen pydantic model that refuses unknown keys.

    Build it from outside data with `parse`, which turns pydantic's report into one `ConfigError`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,  # TOML can say `inf`; no number of ours may
    )

    @classmethod
    def parse(cls, values: dict[str, Any], *, source: str = "configuration") -> Self:
        """Raises `ConfigError` naming `source`, the key and the nearest known key."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _explain(cls, error, source) from None

    def updated(self, **changes: Any) -> Self:
        """A validated copy with `changes`; raises `ConfigError`."""
        return type(self).parse({**self.model_dump(exclude_unset=True), **changes})


def _explain(cls: type[BaseModel], error: ValidationError, source: str) -> ConfigError:
    # A misspelt required key is missing as well: the misspelling explains both.
    found = error.errors()
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        owner = _owner(cls, path[:-1])
        guess = nearest(path[-1], owner.model_fields)
        hint = f"did you mean '{'.'.join([*path[:-1], guess])}'?" if guess else None
        if hint is None:
            hint = f"known keys: {', '.join(sorted(owner.model_fields))}"
        return ConfigError(f"{source}: unknown key '{key}'", hint=hint)
    reason = first["msg"].removeprefix("Value error, ")
    shown = f" (got {first['input']!r})" if key and not isinstance(first["input"], dict) else ""
    others = f" ({error.error_count() - 1} more like it)" if error.error_count() > 1 else ""
    where = f"{source}: {key}: " if key else f"{source}: "
    return ConfigError(f"{where}{reason}{shown}{others}")


def _owner(cls: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The model class that holds the key at `path`, following nested models."""
    for part in path:
        field = cls.model_fields.get(part)
        if field is None:
            break
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                cls = candidate
                break
    return cls
