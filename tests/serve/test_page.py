"""The files of the page, as served."""

from __future__ import annotations

import gzip
import re
from http.client import HTTPConnection
from pathlib import Path
from typing import get_args

import pytest
from serving import Service, served

from khaosz.errors import DocumentCode
from khaosz.serve.page import page_files
from khaosz.serve.replies import Code

FIRST_LOAD = 300 * 1024  # bytes, compressed


def get(service: Service, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection("127.0.0.1", service.port, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        response_headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, response_headers, response.read()
    finally:
        connection.close()


def first_load() -> list[str]:
    """The index and the files that it references."""
    index = page_files()["/"].content.decode()
    return ["/", *(f"/{path}" for path in re.findall(r'(?:src|href)="\./([^"]+)"', index))]


def test_first_load_is_small() -> None:
    files = page_files()
    assert any(path.endswith(".js") for path in first_load())
    assert sum(len(files[path].packed) for path in first_load()) <= FIRST_LOAD


def test_files_are_served_plain_and_compressed(service: Service) -> None:
    for path, file in page_files().items():
        status, headers, content = get(service, path)
        assert (status, content) == (200, file.content), path
        status, packed, content = get(service, path, **{"Accept-Encoding": "br, gzip"})
        assert packed["content-encoding"] == "gzip" and gzip.decompress(content) == file.content
        for each in (headers, packed):
            policy = each["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert each["x-content-type-options"] == "nosniff"
            assert ("immutable" in each["cache-control"]) == (path != "/")
        status, not_modified, content = get(service, path, **{"If-None-Match": headers["etag"]})
        assert (status, content) == (304, b"") and "content-security-policy" in not_modified


@pytest.mark.parametrize(
    "path",
    ["/assets/../page.py", "/assets/%2e%2e/page.py", "/assets/", "/page.py", "/assets/..%5cpage.py",
     "//assets/x.js", "/assets//etc/passwd", "/index.html"],
)  # fmt: skip
def test_other_paths_are_not_found(service: Service, path: str) -> None:
    assert get(service, path)[0] == 404


def test_only_the_page_needs_no_key(tiny: Path) -> None:
    with served(tiny, key="sesame") as service:
        assert all(get(service, path)[0] == 200 for path in first_load())
        for path in ("/v1/models", "/openapi.json", "/metrics", "/assets/../v1/models", "//"):
            assert get(service, path)[0] in (401, 404), path
        assert get(service, "/v1/models")[0] == 401


def test_files_reference_no_other_host() -> None:
    """Without a browser; the browser tests check actual requests. URLs that identify formats or
    licences are allowed."""
    names = {"www.w3.org", "github.com", "react.dev", "preactjs.com", "n"}
    for path, file in page_files().items():
        hosts = re.findall(rb"https?://([\w.-]+)", file.content)
        assert {host.decode() for host in hosts} <= names, path


def test_every_error_code_has_a_chinese_text() -> None:
    root = Path(__file__).parents[2]
    paths = [root / "khaosz/errors.py", *(root / "khaosz/serve").rglob("*.py")]
    source = "\n".join(path.read_text("utf-8") for path in paths)
    codes = set(re.findall(r'code="(\w+)"', source))
    for each in (DocumentCode, *get_args(Code)):
        codes.update(get_args(each))
    assert len(codes) > 25
    table = (root / "web/src/errorText.ts").read_text("utf-8")
    translated = set(re.findall(r'^  (\w+): "', table, re.MULTILINE))
    assert codes - translated == {"context_length_exceeded"}  # this one has a text in strings.ts
    assert all(f'"{code}"' in source for code in translated)
