"""Hooks of MkDocs: the README is the home page, and a link to a file outside docs/ becomes the file's path."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[((?:[^\[\]`]|`[^`]*`|!\[[^\]]*\]\([^)]*\))+)\]\(([^)\s#]*)(#[^)\s]*)?\)")
IMAGE = re.compile(r'(src(?:set)?="|!\[[^\]]*\]\()docs/')
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the README as index.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=IMAGE.sub(r"\1", readme)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Rewrite the links of a page, except in code blocks."""
    source = page.file.src_uri
    folder = "" if source == "index.md" else posixpath.dirname(f"docs/{source}")

    def rewritten(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2], link[3] or ""
        if not path or ":" in path:
            return link[0]
        file = posixpath.normpath(posixpath.join(folder, path))
        file = "docs/index.md" if file == "README.md" else file
        if file.startswith("docs/"):
            return f"[{text}]({posixpath.relpath(file, posixpath.dirname(f'docs/{source}'))}{anchor})"
        if not (ROOT / file).exists():
            return link[0]  # MkDocs warns of it
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{file}{anchor})"
        return f"`{file}`" if posixpath.basename(file) in text else f"{text} (`{file}`)"

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(rewritten, part) for part in parts[::2]]
    return "".join(parts)
