"""The pages for people: lines that fit a screen, sentences that read at once, links that lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.layouts import table

ROOT = Path(__file__).parents[1]
# Lists what the program says of combinations that it refuses.
QUOTES_MESSAGES = ("docs/recipe_layouts.md",)
PAGES = sorted(str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MAX_COLUMNS = 100
MAX_WORDS = 40

_FENCE = re.compile(r"^\s*(```|~~~)")
_ITEM = re.compile(r"^\s*([-*+]|\d+\.)\s+")
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_CODE = re.compile(r"(`+).+?\1")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are neither in a code block nor a table row. Blank lines are kept."""
    in_fence = in_list = indented = blank = False
    for number, line in enumerate(text.splitlines(), 1):
        if _FENCE.match(line):
            in_fence = not in_fence
            yield number, ""
            continue
        if in_fence:
            continue
        in_list = bool(_ITEM.match(line)) or (in_list and (not line or line[0] == " " or not blank))
        indented = line.startswith("    ") and not in_list and (indented or blank)
        blank = not line.strip()
        yield number, "" if indented or line.lstrip().startswith(("|", "<!--")) else line


def paragraphs(text: str) -> Iterator[str]:
    """Runs of prose, without headings; an item of a list is one."""
    words: list[str] = []
    for _, line in prose(text):
        starts = _ITEM.match(line)
        if words and (not line.strip() or starts or line.startswith("#")):
            yield " ".join(words)
            words = []
        if line.strip() and not line.startswith("#"):
            words.append(line[starts.end() :] if starts else line.strip())
    if words:
        yield " ".join(words)


def sentences(text: str) -> list[str]:
    """A full stop, question or exclamation mark before a space ends one. Code and a link's target are one
    word."""
    found = []
    for paragraph in paragraphs(text):
        plain = _CODE.sub("CODE", _LINK.sub(lambda link: link[0].partition("](")[0].lstrip("!["), paragraph))
        found += re.split(r"(?<=[.?!])[*_\")\]]*\s+", plain)
    return found


def words(sentence: str) -> int:
    """Those with a letter or digit."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub names them."""
    titles = [line.lstrip("#").strip() for _, line in prose(text) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_lines_and_sentences_are_short(page: str) -> None:
    text = (ROOT / page).read_text()
    unbreakable = re.compile(rf"^\s*([-*+]\s+)?({_LINK.pattern}|`[^`]+`)[.,;:]?$")  # one link, one name
    long_lines = [
        f"{page}:{number}: {len(line)} columns"
        for number, line in prose(text)
        if len(line) > MAX_COLUMNS and not unbreakable.match(line)
    ]
    assert not long_lines, "\n".join(long_lines)
    if page in QUOTES_MESSAGES:
        return
    long_sentences = [f"{page}: {words(s)} words: {s}" for s in sentences(text) if words(s) > MAX_WORDS]
    assert not long_sentences, "\n".join(long_sentences)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = "\n".join(line for _, line in prose((ROOT / page).read_text()))
    tables = "\n".join(line for line in (ROOT / page).read_text().splitlines() if line.startswith("|"))
    for target in _LINK.findall(_CODE.sub("", f"{text}\n{tables}")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(found.read_text()), f"{page}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_tests_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for file in re.findall(r"(?<![\w/.-])((?:tests|tools|configs|launch)/[\w./-]*\w)", text):
        assert (ROOT / file).exists(), f"{page}: {file}"
    for file, test in re.findall(r"(tests/\S+\.py)::(test_\w+)", text):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{page}: {file}::{test}"
    for line in re.findall(r"`pytest ([^`]+)`", text):
        files, _, words_of_names = " ".join(line.split()).partition(" -k ")
        sources = "".join((ROOT / file).read_text() for file in files.split() if file.endswith(".py"))
        for word in words_of_names.strip('"').split(" or ") if words_of_names else ():
            assert re.search(rf"def test_\w*{word}", sources), f"{page}: pytest {line}"


def test_the_checker_sees_what_is_wrong() -> None:
    text = "# A title\n\nOne two three. Four `a b c` five?\nSix.\n\n- seven eight\n  nine\n\n"
    text += "```\nx y z\n```\n| a |\n"
    assert [words(s) for s in sentences(text)] == [3, 3, 1, 3]
    assert anchors("## Rows, blocks and 2 `codes`\n") == {"rows-blocks-and-2-codes"}
    assert [line for _, line in prose("a\n\n    code\n\n- b\n\n    more of b\n") if line] == [
        *("a", "- b", "    more of b")
    ]


def test_the_table_of_layouts_has_the_titles_that_the_tool_writes() -> None:
    assert table([]) in (ROOT / "docs/layouts.md").read_text()
