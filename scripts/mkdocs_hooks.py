"""What mkdocs.yml cannot say: marks of the snippet tests are no part of the page, and pages may be absent."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

OPTIONAL = ("scale.md", "benchmarks.md", "evaluation.md")
COMMAND_LINE = "<!-- the verbs and their options -->"  # where docs/cli.md has them
PARAMETERS = re.compile(r"<!-- parameters of (\w+) -->")  # where docs/api.md has those of a verb
MARKS = re.compile(r"^(\s*```(?:bash|python))[^\S\n]+(?:no-run|extra=\w+)\b", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Leave pages that do not exist out of the navigation."""
    docs = Path(config["docs_dir"])
    config["nav"] = _existing(config["nav"], docs)
    return config


def command_line() -> str:
    """Every verb with what it does, an example and its options, from the command itself."""
    from mim_refiner.cli.app import EXAMPLES, parser

    examples = {verb.__name__: lines for verb, lines in EXAMPLES.items()}
    parts = []
    for name, command in sorted(parser().commands.items()):
        rows = [_row(option) for option in command.params if option.name != "help"]
        about = re.sub(r"\n(?!\n)[^\S\n]*", " ", (command.help or "").strip()).replace("\n ", "\n\n")
        shown = "\n".join(examples[name])
        table = "\n".join(["| option | what | default |", "|---|---|---|", *rows])
        parts.append(f"## {name}\n\n{about}\n\n```text\n{shown}\n```\n\n{table}\n")
    return "\n".join(parts)


def _row(option: Any) -> str:
    """A row of the table of options."""
    names = ", ".join(option.opts) if option.param_type_name == "option" else (option.metavar or option.name)
    value = f" {option.metavar}".replace("|", "\\|") if option.param_type_name == "option" and option.metavar else ""
    help_text = (getattr(option, "help", None) or "").replace("\\[", "[").replace("|", "\\|")
    default = "needed" if option.required else option.default
    plain = "" if default is None or default is False or callable(default) else str(default)
    return f"| `{names}{value}` | {help_text} | {plain} |"


def parameters(verb: str) -> str:
    """A verb's parameters from the signature of its function, in the words of the command's help."""
    import mim_refiner
    from mim_refiner.cli.app import parser

    about = {option.name: getattr(option, "help", None) or "" for option in parser().commands[verb].params}
    about["reporter"] = "Gets messages and progress; see below."
    rows = []
    for name, parameter in inspect.signature(getattr(mim_refiner, verb)).parameters.items():
        default = "needed" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        what = about[name].replace("\\[", "[")
        cells = (f"`{name}`", f"`{parameter.annotation}`", default, what)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(["| parameter | type | default | what |", "|---|---|---|---|", *rows])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Write the page of the command line and the tables of parameters; take the marks of the tests off code blocks,
    and links to absent optional pages off their words.
    """
    markdown = MARKS.sub(r"\1", markdown)
    if COMMAND_LINE in markdown:
        markdown = markdown.replace(COMMAND_LINE, command_line())
    markdown = PARAMETERS.sub(lambda found: parameters(found[1]), markdown)
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
