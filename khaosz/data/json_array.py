"""The elements of one large JSON array, one at a time: a window that slides over the file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from khaosz.errors import DataError

_WINDOW = 1 << 16  # characters


def starts_array(head: bytes, encoding: str) -> bool:
    text = codecs.getincrementaldecoder(encoding)(errors="ignore").decode(head[:4096])
    return text.lstrip("\ufeff \t\r\n").startswith("[")


def array_elements(path: Path, texts: Iterator[str], limit: int) -> Iterator[bytes]:
    """The JSON of each element as UTF-8. `texts` are the consecutive parts of the file `path`.

    Raises DataError, with the number of elements before, for damage and for an element of more
    than `limit` characters.
    """
    decode = json.JSONDecoder().raw_decode
    window = ""
    at = 0
    ended = False
    elements = 0

    def extend(wanted: int) -> None:
        """Drop what was consumed and read until `wanted` characters are ahead."""
        nonlocal window, at, ended
        parts = [window[at:]]
        length = len(parts[0])
        while length < wanted and not ended:
            text = next(texts, None)
            if text is None:
                ended = True
            else:
                parts.append(text)
                length += len(text)
        window, at = "".join(parts), 0

    def next_character() -> str:
        nonlocal at
        while True:
            while at < len(window) and window[at] in " \t\r\n":
                at += 1
            if at < len(window) or ended:
                return window[at : at + 1]
            extend(_WINDOW)

    def broken(what: str) -> DataError:
        return DataError(
            f"{path}: {what} after {elements} records of the JSON array",
            hint="repair the file, or store one JSON object a line as .jsonl",
        )

    next_character()  # the opening bracket, seen before
    at += 1
    while (character := next_character()) != "]":
        if elements:
            if character != ",":
                raise broken("expected a comma" if character else "cut short")
            at += 1
            next_character()
        wanted = _WINDOW
        while True:
            try:
                _, end = decode(window, at)
            except (ValueError, RecursionError) as error:
                fault = error
            else:
                # "1" may be the beginning of "1.5"; anything else has its own end.
                if ended or (end < len(window) and window[end] not in ".eE+-0123456789"):
                    break
                fault = ValueError("cut short")
            if ended or len(window) - at > limit:
                raise broken(getattr(fault, "msg", str(fault))) from fault
            wanted = 2 * max(wanted, len(window) - at)
            extend(wanted)
        element = window[at:end]
        at = end
        elements += 1
        yield element.encode("utf-8", errors="surrogatepass")
    at += 1
    if next_character():
        raise broken("something follows the end")
