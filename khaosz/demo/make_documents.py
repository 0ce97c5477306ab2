"""Write the binary files of `khaosz/demo/documents`: `python -m khaosz.demo.make_documents`.

The other files of the folder are edited by hand. The bytes are the same on every machine.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent / "documents"

_W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_HEADER = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>'
_TYPES = (
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default'
    ' Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/><Override PartName='
    '"/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.'
    'wordprocessingml.document.main+xml"/><Override PartName="/word/styles.xml" ContentType='
    '"application/vnd.openxmlformats-officedocument.wordprocessingml.styles+xml"/></Types>'
)
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"
_STYLES = (
    f'<w:styles xmlns:w="{_W}">'
    + "".join(
        f'<w:style w:type="paragraph" w:styleId="H{level}"><w:name w:val="heading {level}"/><w:rPr>'
        f'<w:b/><w:sz w:val="{size}"/></w:rPr></w:style>'
        for level, size in ((1, 32), (2, 26))
    )
    + "</w:styles>"
)

# Style and text; of a table, its rows.
LEASE: tuple[tuple[str, str], ...] = (
    ("H1", "房屋租赁合同"),
    ("", "出租方（甲方）：周文彬　　承租方（乙方）：林晓梅"),
    ("H2", "第一条　房屋"),
    (
        "",
        "甲方将梧桐路 36 号 1204 室租给乙方居住，建筑面积 78 平方米。房内家具和电器见附件清单。",
    ),
    ("H2", "第二条　租期"),
    ("", "租期自 2026 年 3 月 1 日起，至 2028 年 2 月 29 日止，共二十四个月。"),
    ("H2", "第三条　租金与押金"),
    ("", "月租金为人民币 5600 元，乙方于每月 5 日前汇入甲方账户。"),
    ("", "押金为两个月租金，即 11200 元，乙方退房并结清费用后十个工作日内无息退还。"),
    ("", "物业费由甲方承担，水费、电费和燃气费由乙方承担。"),
    ("H2", "第四条　使用"),
    ("", "乙方可以饲养一只猫，不得饲养犬类。未经甲方书面同意，不得转租。"),
    ("H2", "第五条　提前解约"),
    ("", "任何一方提前解约，应提前三十天书面通知对方，并支付一个月租金作为违约金。"),
)

MANUAL: tuple[tuple[str, ...], ...] = (
    (
        "Brisa A2 Air Purifier",
        "User manual",
        "",
        "1. Safety",
        "Keep the purifier at least 30 cm from walls and curtains. Do not use it in a",
        "bathroom. Unplug it before you open the front panel.",
        "",
        "2. Controls",
        "Press the fan button to change between the speeds 1, 2, 3 and automatic. In",
        "night mode the display is off and the noise is 24 dB. Hold the child lock for",
        "three seconds to lock all buttons.",
    ),
    (
        "3. Filter",
        "Replace the filter every eight months, or when the red filter light stays on.",
        "After replacing it, hold the reset button for five seconds until the light goes",
        "out. The filter has the order number BF-210. Never wash it.",
        "",
        "4. Troubleshooting",
        "If the display shows E3, the fan is blocked: switch the purifier off and remove",
        "what blocks the outlet. If it shows E5, the sensor is dirty: clean it with a dry",
        "cotton bud.",
        "",
        "5. Warranty",
        "The warranty covers three years from the date of purchase. Filters are excluded.",
        "Customer service answers on weekdays from 9 a.m. to 6 p.m. at 0800 555 0147.",
    ),
)


def docx(paragraphs: Sequence[tuple[str, str]]) -> bytes:
    """A Word document (ECMA-376) of paragraphs."""
    body = "".join(
        "<w:p>"
        + (f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else "")
        + f'<w:r><w:t xml:space="preserve">{escape(text)}</w:t></w:r></w:p>'
        for style, text in paragraphs
    )
    parts = {
        "[Content_Types].xml": _TYPES,
        "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}"><Relationship Id="r1" Type="{_OFFICE}'
        '/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/_rels/document.xml.rels": f'<Relationships xmlns="{_PACKAGE}"><Relationship Id="r1"'
        f' Type="{_OFFICE}/styles" Target="styles.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{_W}"><w:body>{body}</w:body></w:document>',
        "word/styles.xml": _STYLES,
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as container:
        for name, part in parts.items():
            container.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), _HEADER + part)
    return out.getvalue()


def pdf(pages: Sequence[Sequence[str]]) -> bytes:
    """A PDF (ISO 32000) of lines of Latin text in Helvetica."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "",
               "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]  # fmt: skip
    kids = []
    for lines in pages:
        escaped = [re.sub(r"[()\\]", r"\\\g<0>", line) for line in lines]
        shown = "".join(f"({line}) Tj T*\n" for line in escaped)
        stream = f"BT /F1 11 Tf 16 TL 72 760 Td\n{shown}ET"
        kids.append(f"{len(objects) + 1} 0 R")
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R"
            f" >> >> /Contents {len(objects) + 2} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    out, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    out += (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size"
        f" {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    )
    return out.encode("ascii")


def files() -> dict[str, bytes]:
    return {"租房合同.docx": docx(LEASE), "air-purifier-manual.pdf": pdf(MANUAL)}


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_bytes(content)
