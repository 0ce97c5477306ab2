"""Which encodings of text files are read right, and what other detectors make of them.

    python -m bench.encodings TEXTS [chardet charset_normalizer]

TEXTS: a folder with one UTF-8 file for each language (zh.txt, zh_hant.txt, ja.txt, ko.txt, en.txt,
fr.txt, de.txt, es.txt, ru.txt, pl.txt, el.txt, tr.txt), one text a line. From each, samples of five
lengths are encoded as its files are, and decoded. A sample counts if the whole text is the same.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from khaosz.data.records.charset import decode_bytes

ENCODINGS = {
    "zh": ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"),
    "zh_hant": ("big5", "gb18030", "utf-16-le"),
    "ja": ("cp932", "euc_jp", "utf-16-be"),
    "ko": ("cp949",),
    "en": ("utf-8", "utf-16-le", "cp1252"),
    "fr": ("cp1252", "iso-8859-1", "iso-8859-15"),
    "de": ("cp1252", "iso-8859-1"),
    "es": ("cp1252", "iso-8859-1"),
    "ru": ("cp1251", "koi8-r", "utf-16-le"),
    "pl": ("cp1250", "iso-8859-2"),
    "el": ("cp1253",),
    "tr": ("cp1254",),
}
SIZES = (20, 60, 200, 1000, 10_000)
SAMPLES = 60


def samples(lines: list[str], encoding: str, size: int, draw: random.Random) -> list[bytes]:
    """Texts of about `size` bytes, half of them running and half lists, that are not ASCII."""
    found: list[bytes] = []
    for attempt in range(SAMPLES * 30):
        at = draw.randrange(len(lines))
        running = " ".join(lines[at : at + 1 + size // 8])
        listed = "\n".join(draw.choice(lines)[:12] for _ in range(2 + size // 12))
        text = (running, listed)[attempt % 2].encode(encoding, "ignore").decode(encoding)[:size]
        while len(text.encode(encoding)) > size:
            text = text[:-1]
        raw = text.encode(encoding)
        if len(raw) >= 0.6 * size and (not text.isascii() or encoding.startswith("utf")):
            found.append(raw)
        if len(found) == SAMPLES:
            break
    return found


def detector(name: str) -> Callable[[bytes], str]:
    if name == "khaosz":
        return lambda raw: decode_bytes(raw)[0]
    module = importlib.import_module(name)
    return lambda raw: raw.decode(module.detect(raw)["encoding"] or "ascii", "replace")


def main() -> None:
    folder, *peers = sys.argv[1:]
    names = ["khaosz", *peers]
    right: Counter[tuple[str, int]] = Counter()
    total: Counter[int] = Counter()
    for language, encodings in ENCODINGS.items():
        path = Path(folder, f"{language}.txt")
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        for encoding in encodings if lines else ():
            for size in SIZES:
                raws = samples(lines, encoding, size, random.Random(size))
                total[size] += len(raws)
                for name in names:
                    decode = detector(name)
                    good = sum(decode(r) == r.decode(encoding).removeprefix("\ufeff") for r in raws)
                    right[name, size] += good
                    print(f"{language} {encoding} {size} {name}: {good} of {len(raws)}")
    for name in names:
        shares = (f"{size}: {100 * right[name, size] / total[size]:.1f} %" for size in SIZES)
        print(f"{name}: {', '.join(shares)}")


if __name__ == "__main__":
    main()
