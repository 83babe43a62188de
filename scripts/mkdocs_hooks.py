"""What mkdocs.yml cannot say: marks of the snippet tests are no part of the page, and pages may be absent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

OPTIONAL = ("scale.md", "benchmarks.md", "evaluation.md")
MARKS = re.compile(r"^(\s*```(?:bash|python))[^\S\n]+(?:no-run|extra=\w+)\b", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Leave pages that do not exist out of the navigation."""
    docs = Path(config["docs_dir"])
    config["nav"] = _existing(config["nav"], docs)
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Take the marks (no-run, extra=...) off code blocks, and links to absent optional pages off their words."""
    markdown = MARKS.sub(r"\1", markdown)
    for name in OPTIONAL:
        if not (Path(config["docs_dir"]) / name).exists():
            markdown = re.sub(rf"\[([^\]]*)\]\((?:\.\./)*{re.escape(name)}\)", r"\1", markdown)
    return markdown


def _existing(entry: Any, docs: Path) -> Any:
    if isinstance(entry, list):
        kept = [_existing(item, docs) for item in entry]
        return [item for item in kept if item not in (None, [], {})]
    if isinstance(entry, dict):
        return {title: kept for title, item in entry.items() if (kept := _existing(item, docs))}
    return entry if (docs / entry).exists() else None
