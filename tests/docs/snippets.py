"""Fenced blocks of the documentation, and how their commands are made small enough to run in a test.

A block runs unless its first line says otherwise: ``bash no-run`` is only given to the option parser,
``bash extra=onnx`` runs where that extra is installed. Blocks of one page run in order, in one folder and one
Python namespace.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mim_refiner.cli.app import parser

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[a-z]+)(?P<marks>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
EXTRAS = {"onnx": "onnxruntime", "hf": "transformers", "tensorboard": "tensorboard"}
ARCHITECTURE = "vit_w32_d3_h2_p8"  # in place of the one on the page

# Numbers that shrink a run. They come last and so win over those of the page.
SMALL = {
    "pretrain": {"batch_size": 16, "training.epochs": 1, "training.warmup_epochs": 0, "decoder_dim": 16},
    "refine": {
        "batch_size": 16, "heads.blocks": "[1,2]", "frozen_blocks": 0, "heads.queue_size": 32, "refinement.top_k": 4,
        "heads.projector_hidden": 16, "heads.predictor_hidden": 16, "heads.out_dim": 8, "views.num_local": 1,
        "warmup.epochs": 1, "refinement.epochs": 1, "warmup.warmup_epochs": 0, "refinement.warmup_epochs": 0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    where: str
    language: str
    marks: str
    body: str

    @property
    def runs(self) -> bool:
        """Whether the block may be executed here."""
        return "no-run" not in self.marks

    @property
    def needs(self) -> str | None:
        """The module that the block's extra brings."""
        found = re.search(r"extra=(\w+)", self.marks)
        return EXTRAS[found[1]] if found else None


def blocks(page: Path) -> Iterator[Block]:
    """The shell, Python and YAML blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        indent = len(found["indent"])
        body = "".join(line[indent:] for line in found["body"].splitlines(keepends=True))
        line = text[: found.start()].count("\n") + 1
        yield Block(f"{page.relative_to(DOCS.parent)}:{line}", found["language"], found["marks"].strip(), body)


def commands(block: Block) -> Iterator[list[str]]:
    """The words of every line of a shell block."""
    for line in block.body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def own_words(words: list[str]) -> list[str] | None:
    """What follows ``mim-refiner`` in a command (behind torchrun, too), or None for another program."""
    last = len(words) if words[0] == "torchrun" else 1
    places = [place for place, word in enumerate(words[:last]) if word.rpartition("/")[2] == "mim-refiner"]
    return words[places[0] + 1 :] if places else None


def parse(words: list[str]) -> None:
    """Give a command to the option parser without running it; raises the parser's error for what it refuses."""
    if words[0] != "--version":
        parser().commands[words[0]].make_context(words[0], list(words[1:]))


def shrunk(words: list[str]) -> list[str]:
    """The same command with smaller numbers."""
    small = list(words)
    if "--arch" in small:
        small[small.index("--arch") + 1] = ARCHITECTURE
    for block_option in ("--block", "--blocks"):
        if block_option in small:
            place = small.index(block_option) + 1
            small[place] = small[place].replace("8", "1")
    for key, value in SMALL.get(small[0], {}).items():
        small += ["--set", f"{key}={value}"]
    if small[0] == "analyze" and "--parts" not in small:
        small += ["--parts", "atlas"]  # the others take minutes
    return [*small, "--quiet"] if small[0] not in ("inspect", "models") else small
