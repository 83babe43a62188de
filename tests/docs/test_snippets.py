"""Every shell block and Python snippet of the documentation is executed on small data, or at least parsed."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from quick import quickly

sys.path.insert(0, str(Path(__file__).parent))
from snippets import ARCHITECTURE, DOCS, blocks, commands, own_words, parse, shrunk

from mim_refiner.checkpoints.families import mae
from mim_refiner.cli.app import main
from mim_refiner.data.sources import open_source
from mim_refiner.models.backbone import create_vit
from mim_refiner.training.recipes import PRETRAIN_RECIPES, REFINE_RECIPES

sys.path.pop(0)

PAGES = sorted(DOCS.rglob("*.md"))
CONTRIBUTING = DOCS.parent / "CONTRIBUTING.md"
EXECUTED = [
    page
    for page in (*PAGES, CONTRIBUTING)
    if page.name not in ("checkpoints.md", "scale.md", "benchmarks.md", "evaluation.md", "evidence.md")  # no files here
    and any(block.runs and block.language in ("bash", "python") for block in blocks(page))
]
CHECKPOINT = "vit_w48_d4_h3_p16"
PREPARED = ("runs/mae", "runs/photos")  # what the quick start makes; other pages begin with it


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS.parent).with_suffix("")).removeprefix("docs/")


def write_images(folder: Path, start: int, count: int) -> None:
    """Class folders of real 32 px images that travel with the package."""
    source = open_source(str(files("mim_refiner") / "assets" / "cifar10_test.parquet"))
    assert source.labels is not None
    for index in range(start, start + count):
        place = folder / f"class{source.labels[index] % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(bytes(source.read(index)))).save(place / f"{index}.png")


@pytest.fixture(scope="session")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a checkpoint, and the run folders that the quick start makes."""
    folder = tmp_path_factory.mktemp("docs")
    write_images(folder / "photos", 0, 48)
    write_images(folder / "labelled" / "train", 100, 40)
    write_images(folder / "labelled" / "test", 200, 30)
    for name, shape in (("bands", (32, 32, 13)), ("scans", (40, 32, 3)), ("spectrograms", (64, 16, 1))):
        (folder / name).mkdir()
        for number in range(32):
            pixels = np.random.default_rng(number).integers(0, 60_000, shape, dtype=np.uint16)
            np.save(folder / name / f"{number}.npy", pixels)
    torch.manual_seed(0)
    for name, size, channels in (("mae", 32, 3), ("medical", 32, 3), ("bands", 32, 13), ("spectrogram", (64, 16), 1)):
        encoder = create_vit(CHECKPOINT, image_size=size, in_chans=channels)
        torch.save({"model": encoder.state_dict(), "args": {"num_heads": 3}}, folder / f"{name}.pth")
    with contextlib.chdir(folder):
        run(["pretrain", "--data", "photos/", "--arch", ARCHITECTURE, "--out", PREPARED[0]])
        run(["refine", "--data", "photos/", "--model", PREPARED[0], "--out", PREPARED[1]])
        (folder / "checked").mkdir()
        (folder / "checked" / "exclude.txt").write_text("class0/0.png\n0\n")
    return folder


def run(words: list[str]) -> None:
    """Run a command of ours in this process, made small."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), quickly():
        code = main(shrunk(words))
    assert code == 0, f"mim-refiner {' '.join(words)}\n{output.getvalue()[-2000:]}"


@pytest.mark.slow
@pytest.mark.timeout(900)  # seconds on a free core, minutes on a crowded one
@pytest.mark.parametrize("page", EXECUTED, ids=name_of)
def test_snippets_run(page: Path, quick_start: Path, tmp_path: Path):
    for path in quick_start.iterdir():
        if path.name in ("runs", "checked"):
            (tmp_path / path.name).mkdir()
            for below in path.iterdir():
                (tmp_path / path.name / below.name).symlink_to(below)
        else:
            (tmp_path / path.name).symlink_to(path)
    if page.stem == "quickstart":  # it makes these itself
        for made in PREPARED:
            (tmp_path / made).unlink()
        (tmp_path / "checked" / "exclude.txt").unlink()
    if page.stem == "doctor":
        (tmp_path / "checked" / "exclude.txt").unlink()
    names: dict[str, object] = {}
    with contextlib.chdir(tmp_path):
        for block in blocks(page):
            if not block.runs or (block.needs and find_spec(block.needs) is None):
                continue
            if block.language == "yaml" and "title=" in block.marks:
                Path(block.marks.partition('title="')[2].rstrip('"')).write_text(block.body)
            elif block.language == "bash":
                for words in commands(block):
                    own = own_words(words)
                    assert own is not None, f"{block.where}: a block that runs has our commands only: {words}"
                    run(own)
            elif block.language == "python":
                with contextlib.redirect_stdout(io.StringIO()), quickly():
                    exec(compile(block.body, block.where, "exec"), names)


def test_the_family_of_the_page_is_that_of_the_source():
    [shown] = [block.body for block in blocks(CONTRIBUTING) if "DBOT = " in block.body]
    assert shown[shown.index("DBOT = ") :] in inspect.getsource(mae)


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING, DOCS.parent / "README.md"], ids=lambda page: page.stem)
def test_every_block_is_understood(page: Path):
    """Commands have options that exist, Python compiles, YAML parses."""
    for block in blocks(page):
        if block.language == "bash":
            for words in commands(block):
                own = own_words(words)
                if own and "..." not in own:
                    parse(own)
        elif block.language == "python":
            ast.parse(block.body, block.where)
        elif block.language == "yaml":
            yaml.safe_load(block.body)


def test_a_wrong_option_on_a_page_is_caught():
    with pytest.raises(Exception, match=r"No such option:? '?--modell"):
        parse(["refine", "--data", "photos/", "--modell", "mae.pth", "--out", "runs/x"])
    with pytest.raises(KeyError):
        parse(["refined", "--data", "photos/"])


def test_every_recipe_is_on_its_page():
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    missing = [name for name in (*REFINE_RECIPES, *PRETRAIN_RECIPES) if f"`{name}`" not in text]
    assert missing == []


def test_expected_results_are_those_of_the_recipes():
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for name, make in REFINE_RECIPES.items():
        for pair in re.findall(r"[\d.]+ -> [\d.]+", make().expected):
            assert pair.replace("->", "→") in text, f"{name}: {pair}"


def test_every_page_is_in_the_navigation():
    listed = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert [name for page in PAGES if (name := f"{name_of(page)}.md") not in listed] == []


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            optional = target.rpartition("/")[2] in ("scale.md", "benchmarks.md", "evaluation.md")
            if "://" not in target and not optional and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(DOCS)}: {target}")
    assert broken == []
