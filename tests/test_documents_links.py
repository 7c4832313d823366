"""The documents: every link leads somewhere, and the front page stays short."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
)
_LINK = re.compile(r'\]\(([^)\s]+)\)|src="([^"]+)"')
_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def _prose(document: Path) -> str:
    """The text of a document without its blocks of code, where `#` begins a comment and brackets are Python's."""
    return _CODE.sub("", document.read_text(encoding="utf-8"))


def _anchors(document: Path) -> set[str]:
    """Fragments that lead to the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_documents() -> None:
    assert "README.md" in DOCUMENTS, "they are listed by git"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_to_a_file_and_a_heading(name: str) -> None:
    document = ROOT / name
    for match in _LINK.finditer(_prose(document)):
        link = match[1] or match[2]
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in _anchors(target), f"{link}: no such heading"


def test_the_front_page_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 2200
