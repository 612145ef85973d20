"""What the tests of Markdown pages share: reading blocks, commands, links and tables."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    """The text of a file of the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def program(text: str, name: str) -> str:
    """The block of Python that names itself so in its first line."""
    (source,) = (block for block in blocks(text, "python") if block.startswith(f"# {name}\n"))
    return source


def commands(text: str, language: str = "sh") -> list[str]:
    """The lines of the blocks of a language that are no comments."""
    lines = [line.strip() for block in blocks(text, language) for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def links(text: str) -> list[str]:
    """The files that a page links to, as they are written there."""
    return re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", text)


def named_files(text: str) -> list[str]:
    """The files below the project's folders that stand between backticks."""
    folders = "learners|system|actors|deploy|docs|tests"
    return re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)`", text)


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    (found,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of every row of the tables that is not a heading or a rule."""
    kept: list[list[str]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|") and not set(line) <= set("|-: ") and before.startswith("|"):
            kept.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        before = line
    return kept
