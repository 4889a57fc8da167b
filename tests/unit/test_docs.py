"""Test that the pages are true where that is cheap: messages, keys, links, the site, and what is generated."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from popo_lite.resuming import RULES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if "://" in target:
            continue
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_quoted_messages_are_in_the_code():
    code = []
    for path in sorted((ROOT / "popo_lite").rglob("*.py")):
        found = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)
        ]
        texts = sorted((node for node in found if isinstance(node.value, str)), key=lambda node: node.lineno)
        code.append("".join(str(node.value) for node in texts))
    source = "\n".join(code)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    lines = [line for language, text in FENCE.findall(page) if language == "message" for line in text.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("…")]
    # A message may be put together from parts, at "; " or ": ".
    pieces = [piece for part in parts for piece in re.split(r"[;:] |[;:]$", part)]
    assert len(pieces) > 50
    assert [piece for piece in pieces if piece not in source] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_set_keys_that_exist(page):
    keys = re.findall(r"--set [\"'\\]*([a-z_]+(?:\.[a-z_]+)+)=", page.read_text(encoding="utf-8"))
    assert set(keys) - {"section.key"} <= RULES.keys()


def test_outputs_are_filled_and_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from outputs import refreshed

    page = (
        "<!-- run: echo one > file -->\n\n<!-- output: cat file; pwd; echo 3.1 s -->\n```text\n```\n"
        "<!-- output 1+1: seq 9 -->\n```text\nold\n```\n<!-- output: exit 3 -->\n```text\nstays\n```\n"
    )
    new, failures = refreshed(page, tmp_path)
    assert FENCE.findall(new) == [("text", "one\n~/popo\n3.1 s\n"), ("text", "1\n...\n9\n"), ("text", "stays\n")]
    assert [failure.splitlines()[0] for failure in failures] == ["exit 3: exit code 3"]
    other = tmp_path / "again"
    other.mkdir()
    slower = new.replace("echo 3.1 s", "echo 4.25 s")
    assert refreshed(slower, other)[0] == slower


def test_the_site_builds(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        build, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html")}
    assert pages.keys() >= {path.stem for path in PAGES if path.name != "README.md"} | {"index", "404"}
    loaded = r"(?:<script[^>]* src=|<img[^>]* src=|<link[^>]* rel=\"(?:stylesheet|preconnect)\"[^>]* href=)\"https?:"
    assert [name for name, html in pages.items() if re.search(loaded, html)] == []
    assert [name for name, html in pages.items() if re.search(r'href="(?:\.\./|[^":]*\.md\b)', html)] == []
