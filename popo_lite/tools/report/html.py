"""Make HTML pages that open offline, run no script but their own, and show untrusted text as text."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from popo_lite.redaction import without_home
from popo_lite.tools.console import words


def render(template: Path, hide: Callable[[str], str] = str, **values: Any) -> str:
    """Return the page that `template` makes of `values`; every text among them is untrusted, and passed to `hide`."""

    def shown(value: Any) -> Any:
        """Return text without secrets, home folder, and characters that draw over others or turn text around."""
        is_text = isinstance(value, str) and not isinstance(value, Markup)  # a macro's result is Markup
        return without_home(hide(words.printable(value))) if is_text else value

    folders = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(
        loader=folders, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=shown
    )
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The policy allows this script by its digest: one that a model wrote would not run even if it got into the page.
    environment.globals |= {"script": Markup(script), "script_digest": Markup(digest)}  # noqa: S704  # our own files
    return environment.get_template(template.name).render(**values)
