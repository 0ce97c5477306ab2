"""JSON schemas as llguidance can hold them.

llguidance refuses keywords that it does not know. What it would accept and not hold is rewritten
here into something at least as strict, or refused before the first token. Sources: JSON Schema
2020-12 (https://json-schema.org/draft/2020-12), RFC 3339 for dates and times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Any

from khaosz.errors import GenerationError

Schema = dict[str, Any]

# llguidance computes bounds in fp64 and writes digits from int64: the largest number that is both.
_EDGE = 2**63 - 1024
_EXACT = 2**53  # up to here every integer is an fp64 number
_NEAR = Fraction(1, 10**9)  # how far an excluded bound is moved to be included
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_ONE = ("items", "additionalProperties", "additionalItems")  # keywords with one schema
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")

_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    f"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    f"|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?"
_ZONE = "(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_ATOM = "[A-Za-z0-9_+-]{1,20}"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
# Stricter than llguidance's, which have February 29 in every year, leap seconds at any minute and
# local parts beyond 64 characters.
_FORMATS = {
    "date": f"^{_DAY}$",
    "time": f"^{_TIME}{_ZONE}$",
    "date-time": f"^{_DAY}T{_TIME}{_ZONE}$",
    "email": f"^{_ATOM}(\\.{_ATOM}){{0,2}}@({_LABEL}\\.){{1,4}}[A-Za-z]{{2,20}}$",
}


def prepared(schema: object, has_names_left: Callable[[str, list[str]], bool]) -> Schema:
    """A copy of a schema that llguidance holds as JSON Schema defines it.

    `has_names_left` says whether a pattern matches any name but these. Raises `GenerationError`
    without a parameter's name, with the path in the schema.
    """
    if not isinstance(schema, dict):
        raise GenerationError("is not an object")
    _check_ends(schema)
    _check_multiples(schema)
    return _object(schema, "", has_names_left)


def _fail(path: str, why: str) -> GenerationError:
    return GenerationError(f"cannot be used: {why}" + (f" (at {path[1:]})" if path else ""))


def _prepared(schema: object, path: str, names: Callable[[str, list[str]], bool]) -> Any:
    return _object(schema, path, names) if isinstance(schema, dict) else schema


def _object(schema: Schema, path: str, names: Callable[[str, list[str]], bool]) -> Schema:
    # Unknown keywords mean nothing, but this one would switch checks off.
    out = {key: value for key, value in schema.items() if key != "x-guidance"}
    if out.get("uniqueItems") is False:
        del out["uniqueItems"]
    for key in _ONE:
        if key in out:
            out[key] = _prepared(out[key], f"{path}.{key}", names)
    for key in (*_MANY, "items"):
        if isinstance(out.get(key), list):
            out[key] = [_prepared(v, f"{path}.{key}.{i}", names) for i, v in enumerate(out[key])]
    for key in _NAMED:
        if isinstance(out.get(key), dict):
            out[key] = {
                name: _prepared(value, f"{path}.{key}.{name}", names)
                for name, value in out[key].items()
            }
    if "prefixItems" in out and "additionalItems" in out:
        raise _fail(path, "prefixItems beside additionalItems, of an older draft")
    for value in [out["const"]] if "const" in out else out.get("enum") or ():
        _check_constant(value, path)
    if any(key in out for key in _BOUNDS):
        _bound(out, path)
    if isinstance(out.get("patternProperties"), dict):
        _declare_names(out, names)
    _check_count(out, path)
    if (pattern := _FORMATS.get(str(out.get("format")))) is not None:
        del out["format"]
        out["allOf"] = [*out.get("allOf", ()), {"pattern": pattern}]
    return out


def _check_constant(value: object, path: str) -> None:
    """A number is written from its fp64 value."""
    match value:
        case bool() | None | str():
            return
        case int() | float():
            if (
                not _finite(value)
                or abs(value) > _EDGE
                or (_rounded(number := Fraction(str(value))) != number)
            ):
                raise _fail(path, f"the constant {value} is not held exactly")
        case list():
            for each in value:
                _check_constant(each, path)
        case dict():
            for each in value.values():
                _check_constant(each, path)


def _bound(schema: Schema, path: str) -> None:
    """Bounds of numbers as fp64 numbers within int64, none of which an excluded value can pass."""
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    whole = isinstance(kinds, list) and "integer" in kinds and "number" not in kinds
    low, over = _strictest(schema, "minimum", "exclusiveMinimum", 1, path)
    high, under = _strictest(schema, "maximum", "exclusiveMaximum", -1, path)
    for key in _BOUNDS:
        schema.pop(key, None)
    if whole:
        # Exact arithmetic: near 2**53 and beyond, adding 1 to an fp64 number changes nothing.
        if low is not None:
            low, over = Fraction(math.floor(low) + 1 if over else math.ceil(low)), False
        if high is not None:
            high, under = Fraction(math.ceil(high) - 1 if under else math.floor(high)), False
    if low is not None and high is not None and (low > high or (low == high and (over or under))):
        schema.update(minimum=1, maximum=0)  # llguidance drops such an option, or refuses it
        return
    if (low or 0) > _EDGE or (high or 0) < -_EDGE:
        raise _fail(path, "a bound beyond 64 bits")
    if low is not None:
        if low >= 10**17 and high is None:
            high = Fraction(_EDGE)
        low, over = _inside(max(low, Fraction(-_EDGE)), over, 1, high)
        schema["exclusiveMinimum" if over else "minimum"] = _number(low)
    if high is not None:
        if high <= -(10**17) and low is None:
            schema["minimum"] = -_EDGE
        high, under = _inside(min(high, Fraction(_EDGE)), under, -1, low)
        schema["exclusiveMaximum" if under else "maximum"] = _number(high)
    if low is not None and high is not None and low > high:
        raise _fail(path, "no number within the bounds is an fp64 number")


def _strictest(
    schema: Schema, including: str, excluding: str, sign: int, path: str
) -> tuple[Fraction | None, bool]:
    """The bound that allows less, and whether it excludes its value; draft 4 says so by `true`."""
    bounds: list[tuple[Fraction, bool]] = []
    excluded = schema.get(excluding)
    for key, value in ((including, schema.get(including)), (excluding, excluded)):
        if value is None or (key == excluding and isinstance(value, bool)):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise _fail(path, f"{key} is not a number")
        bounds.append((Fraction(str(value)), key == excluding or excluded is True))
    if not bounds:
        return None, False
    return max(bounds, key=lambda bound: (sign * bound[0], bound[1]))


def _finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def _inside(
    bound: Fraction, excluded: bool, sign: int, other: Fraction | None
) -> tuple[Fraction, bool]:
    """The next fp64 number inwards. llguidance would write an excluded whole number where the
    other bound has the same whole part."""
    near = _rounded(bound, sign)
    if near != bound:
        excluded = False
    elif excluded and abs(near) >= _EXACT:
        near, excluded = (
            _rounded(Fraction(math.nextafter(float(near), sign * math.inf)), sign),
            False,
        )
    if excluded and near.denominator == 1 and other is not None and abs(near - other) <= 1:
        return _inside(near + sign * min(_NEAR, abs(other - near) / 10), False, sign, None)
    return near, excluded


def _rounded(value: Fraction, sign: int = 1) -> Fraction:
    """The nearest number, in the direction of `sign`, that llguidance reads and writes exactly: an
    integer in fp64, or fifteen digits, which its parser of JSON keeps."""
    if value.denominator == 1:
        near = float(value)
        if (Fraction(near) - value) * sign < 0:
            near = math.nextafter(near, sign * math.inf)
        return Fraction(near)
    rounding = ROUND_CEILING if sign > 0 else ROUND_FLOOR
    context = Context(prec=15, rounding=rounding)
    return Fraction(context.divide(Decimal(value.numerator), Decimal(value.denominator)))


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


def _declare_names(schema: Schema, names: Callable[[str, list[str]], bool]) -> None:
    """A pattern that matches declared names only is a dead end of llguidance: a comma is allowed
    and no name after it. Its schema moves to these names."""
    declared = schema.get("properties")
    required = schema.get("required")
    known = [*declared] if isinstance(declared, dict) else []
    known += [n for n in required if n not in known] if isinstance(required, list) else []
    for pattern, inner in [*schema["patternProperties"].items()]:
        if known and not names(pattern, known):
            del schema["patternProperties"][pattern]
            schema["properties"] = {**(schema.get("properties") or {})}
            for name in known:
                if not names(pattern, [n for n in known if n != name]):
                    continue  # matches others only, or nothing
                mine = schema["properties"].get(name, True)
                schema["properties"][name] = {"allOf": [mine, inner]}


def _check_count(schema: Schema, path: str) -> None:
    """A model may write a name twice, which counts once. Declared names come once."""
    least = schema.get("minProperties")
    if not isinstance(least, int) or (
        schema.get("additionalProperties") is False and not schema.get("patternProperties")
    ):
        return
    if least > len(set(schema.get("required") or ())) + 1:
        raise _fail(path, "minProperties, where names may be repeated")


def _schemas(schema: object) -> Iterator[Schema]:
    if not isinstance(schema, dict):
        return
    yield schema
    for key in _ONE:
        yield from _schemas(schema.get(key))
    for key in (*_MANY, "items"):
        if isinstance(schema.get(key), list):
            for each in schema[key]:
                yield from _schemas(each)
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            for each in schema[key].values():
                yield from _schemas(each)


def _check_multiples(root: Schema) -> None:
    """llguidance holds coefficients and their common multiples in 32 bits."""
    found: set[tuple[int, int]] = set()
    for schema in _schemas(root):
        value = schema.get("multipleOf")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**32:
            raise _fail("", f"multipleOf {value} is not between 0 and 2**32")
        scaled, digits = float(value), 0
        while scaled % 1:
            scaled, digits = scaled * 10, digits + 1
        if scaled >= 2**32 or Fraction(str(value)) != Fraction(int(scaled), 10**digits):
            raise _fail("", f"multipleOf {value} is not held exactly")
        found.add((int(scaled), digits))
    if len(found) > 1:
        most = max(digits for _, digits in found)
        sizes = sorted(number * 10 ** (most - digits) for number, digits in found)
        if math.prod(sizes) >= 2**32:
            raise _fail("", "several multipleOf with a common multiple beyond 32 bits")


def _check_ends(root: Schema) -> None:
    """Refuse a schema that only an infinite value fits, such as a list node that requires the next.
    The schemas behind references that finite values fit are found first, the smallest first."""
    targets = {
        ref: target
        for schema in _schemas(root)
        if isinstance(ref := schema.get("$ref"), str)
        and (target := target_of(root, ref)) is not None
    }
    finite: set[str] = set()
    while more := {
        ref for ref, s in targets.items() if ref not in finite and _is_finite(s, targets, finite)
    }:
        finite |= more
    if not _is_finite(root, targets, finite):
        raise _fail("", "no finite value fits it: a reference requires itself")


def target_of(root: Mapping[str, Any], ref: str) -> object | None:
    """What a local JSON pointer refers to. llguidance checks all others."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    value: Any = root
    for part in ref[2:].split("/") if len(ref) > 1 else ():
        part = part.replace("~1", "/").replace("~0", "~")
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (LookupError, TypeError, ValueError):
            return None
    target: object = value
    return target


def _is_finite(schema: object, targets: dict[str, object], finite: set[str]) -> bool:
    def fits(each: object) -> bool:
        return _is_finite(each, targets, finite)

    if not isinstance(schema, dict):
        return True
    ref = schema.get("$ref")
    if ref in targets and ref not in finite:
        return False
    if not all(map(fits, _list(schema.get("allOf")))):
        return False
    for key in ("anyOf", "oneOf"):
        if (options := _list(schema.get(key))) and not any(map(fits, options)):
            return False
    match schema.get("type"):
        case "object":
            declared = schema.get("properties")
            required = _list(schema.get("required"))
            if isinstance(declared, dict):
                return all(fits(declared.get(name)) for name in required if isinstance(name, str))
        case "array":
            first = _list(schema.get("prefixItems"))
            least = schema.get("minItems", 0)
            if isinstance(least, int):
                return all(map(fits, first[:least])) and (
                    least <= len(first) or fits(schema.get("items"))
                )
    return True


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
