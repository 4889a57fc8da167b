"""Make HTML pages that open offline, run no script but their own, and show untrusted text as text."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from popo_lite.redaction import without_home
from popo_lite.tools.console import words


def render(template: Path, **values: Any) -> str:
    """Return the page that `template` makes of `values`; every text among them is untrusted."""
    folders = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(
        loader=folders, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The policy allows this script by its digest: one that a model wrote would not run even if it got into the page.
    environment.globals |= {"script": Markup(script), "script_digest": Markup(digest)}  # noqa: S704  # our own files
    return environment.get_template(template.name).render(**values)


def _shown(value: Any) -> Any:
    """Return untrusted text without secrets, home folder, and characters that draw over others or turn text around."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)  # a macro's result is Markup
    return without_home(words.printable(value)) if is_text else value
