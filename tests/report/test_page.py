"""The report page: every section, no request, nothing unescaped, readable by machines and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from mim_refiner.cli.app import main
from mim_refiner.errors import InputError
from mim_refiner.report.numbers import recipe_differences
from mim_refiner.report.page import write_report
from mim_refiner.report.panels import comparison_panels, learning_panels, rates, run_colour
from mim_refiner.report.run_files import read_run

SECTIONS = ("verdict", "numbers", "blocks", "atlas", "learning", "neighbours", "clusters", "patches", "map", "run")
VOID = {"meta", "link", "img", "br", "circle", "input", "hr"}
CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)


class Page(HTMLParser):
    """Every tag with its attributes, and whether tags close in the right order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def page(written):
    return Page(written)


def test_every_section_is_there_and_named(page):
    sections = {attributes["id"]: attributes for attributes in page.all("section")}
    assert list(sections) == [f"run0-{name}" for name in SECTIONS]
    ids = {attributes.get("id") for _, attributes in page.tags}
    for attributes in sections.values():
        assert attributes["aria-labelledby"] in ids
    links = [attributes["href"] for attributes in page.all("a") if attributes["href"].startswith("#run0")]
    assert links == [f"#run0-{name}" for name in SECTIONS]


def test_the_verdict_and_the_numbers_are_said(page):
    assert "The refined encoder is better. k-NN accuracy rose." in page.text
    assert "45.0 +15.0 42.0 to 48.0 change +10.0 to +20.0" in page.text  # value, change, its interval, paired interval
    assert "3 min 20 s" in page.text  # cost
    assert "1 h 6 min" in page.text
    assert "1 unreadable image was skipped" in page.text
    assert "block 1 is best by k-NN." in page.text
    assert "keeps 25 % of the neighbours from before" in page.text


def test_no_line_breaks_at_the_hyphen_of_k_nn(written):
    assert '<span class="one">k-NN accuracy (%)</span></th>' in written
    assert not re.search(r"<(?:p|h2|th|td|caption|li)\b[^>]*>[^<]*k-NN", written)
    assert ".one { white-space: nowrap; }" in written


def test_nothing_is_fetched(written):
    named = set(re.findall(r"""(?:https?:)?//[\w.-]+""", re.sub(r"base64,[\w+/=]+", "", written)))
    assert named <= {"http://www.w3.org", "//www.w3.org"}  # names of SVG, never fetched
    for attributes in Page(written).all("img", "script", "link", "a", "image", "use"):
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:")), attributes
    assert "default-src 'none'" in written
    assert not re.search(r"@import|url\((?!data:|#)", written)


def test_names_from_outside_are_escaped(make_run):
    text = write_report([make_run()]).read_text()
    assert "dog </script" not in text
    assert "</script><b>" not in text
    assert "img<3>" not in text
    assert "img&lt;" in text
    assert "mim-refiner <refine>" not in text


def test_it_is_accessible(page):
    assert page.tags[0] == ("html", {"lang": "en"})
    assert len(page.all("main")) == len(page.all("h1")) == 1
    assert page.all("nav")[0]["aria-label"]
    for attributes in page.all("img"):
        assert attributes["alt"]
    for attributes in page.all("span", "div"):
        if attributes.get("role") == "img":
            assert attributes["aria-label"]
    assert {attributes.get("scope") for attributes in page.all("th")} <= {"row", "col"}
    assert len(page.all("caption")) == len(page.all("table"))
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))  # those inside the figures too
    for attributes in page.all("svg"):
        assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")


def test_figures_can_be_saved(page):
    saved = {attributes["download"]: attributes["href"] for attributes in page.all("a") if "download" in attributes}
    assert saved["run0-block-curves-cls.svg"].startswith("data:image/svg+xml;base64,")
    assert saved["run0-loss-by-head.png"].startswith("data:image/png;base64,")
    assert {"summary.json", "recipe.json"} <= saved.keys()


def test_contrast_of_text_in_both_themes():
    """WCAG AA: 4.5 to 1 for every text colour on both grounds."""
    style = (Path(read_run.__code__.co_filename).parent / "templates" / "style.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in style.split("@media", 2)[:2])

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (light, dark):
        for ground in ("paper", "card"):
            for ink in ("ink", "muted", "link", "good", "bad", "open"):
                low, high = sorted((luminance(theme[ground]), luminance(theme[ink])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


def test_a_thousand_thumbnails_stay_below_8_megabytes(make_run):
    assert write_report([make_run(count=1000)]).stat().st_size < 8_000_000


def test_without_labels_and_without_most_files(make_run):
    run = make_run(labelled=False)
    assert "The images have no labels" in Page(write_report([run]).read_text()).text
    for name in ("evaluation/gallery.json", "evaluation/blocks.json", "atlas.json", "summary.json"):
        (run / name).unlink()
    page = Page(write_report([run]).read_text())
    assert len(page.all("section")) == len(SECTIONS)
    for words in ("This run is not finished.", "it stands at step 40", "No atlas here.", "No block curves here.",
                  "No neighbour gallery here.", "No map here.", "mim-refiner analyze"):  # fmt: skip
        assert words in page.text, words


def test_several_runs_are_compared(make_run, tmp_path):
    out = tmp_path / "both.html"
    assert main(["report", str(make_run("a")), str(make_run("bb", after=0.5)), "--out", str(out), "--quiet"]) == 0
    page = Page(out.read_text())
    assert "The runs side by side" in page.text
    assert "50.0 (+20.0)" in page.text
    assert "seed" in page.text  # the one key in which the recipes differ
    assert [attributes["id"] for attributes in page.all("article")] == ["run0", "run1"]
    assert not any("gallery" in (attributes.get("id") or "") for _, attributes in page.tags)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))


def folder(tmp_path: Path, **files: object) -> Path:
    """A folder of result files, {name with _ for the place of a slash: record}."""
    for name, record in files.items():
        path = tmp_path / "folder" / (name.replace("__", "/") + (".yaml" if name == "recipe" else ".json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    return tmp_path / "folder"


COMPARISON = {
    "kind": "comparison",
    "results": [
        {"model": f"runs/{name}", "metric": "knn_top1", "value": value, "ci95": [value - 0.05, value + 0.05],
         "block": 11, "pooling": "cls"}
        for name, value in (("mae", 0.4), ("refined", 0.55))
    ],
    "change": [{"model": "runs/refined", "metric": "knn_top1", "block": 11, "pooling": "cls", "difference": 0.15,
                "ci95": [0.1, 0.2], "verdict": "better"}],
    "verdict": {"verdict": "better", "reason": "k-NN accuracy of block 11 (cls) rose.", "ci95": [0.1, 0.2],
                "knn_difference": 0.15},
}  # fmt: skip


def test_a_comparison_of_evaluate_shows_its_table_and_verdict(tmp_path):
    page = Page(write_report([folder(tmp_path, evaluation__comparison=COMPARISON)]).read_text())
    assert "Comparison of encoders: folder" in page.text
    assert "The second encoder is better. k-NN accuracy of block 11 (cls) rose." in page.text
    assert "metric block pooling mae refined" in page.text
    assert "k-NN accuracy (%) 11 cls 40.0 [35.0, 45.0] 55.0 [50.0, 60.0] (+15.0*)" in page.text
    assert "No neighbour gallery here." not in page.text  # nobody promised one


@pytest.mark.parametrize(
    ("files", "title", "headline"),
    [
        ({"recipe": {"command": "pretrain"}, "summary": {"after": {"knn_top1": 0.4}}},
         "Pre-training report: folder", "The encoder is pre-trained. refine it next: mim-refiner refine --model"),
        ({"evaluation__knn": {"metric": "knn_top1", "value": 0.5, "ci95": None, "block": 3, "pooling": "cls"}},
         "Evaluation report: folder", "One encoder, measured."),
        ({"regimes": {"kind": "regimes"}}, "Analysis report: folder", "One encoder, looked at."),
        ({"verdict": {"kind": "verdict", "verdict": "worse", "reason": "It fell."}}, "Analysis report: folder",
         "The second encoder is worse. It fell."),
    ],
)  # fmt: skip
def test_a_folder_is_titled_as_what_it_is(tmp_path, files, title, headline):
    page = Page(write_report([folder(tmp_path, **files)]).read_text())
    assert title in page.text
    assert headline in page.text
    assert "Refinement" not in page.text


def test_the_measures_behind_a_verdict_without_labels_are_on_the_page(make_run):
    run = make_run()
    summary = json.loads((run / "summary.json").read_text())
    rows = [
        {"measure": "neighbour consistency", "before": 0.3, "after": 0.35, "difference": 0.05, "ci95": [0.01, 0.09],
         "change": "rose"},
        {"measure": "effective rank", "before": 20.0, "after": 18.0, "difference": -2.0, "ci95": [-3, -1],
         "change": "fell"},
    ]  # fmt: skip
    summary["verdict"] = {"verdict": "no clear change", "reason": "x", "measures": rows, "next": ["more images"]}
    (run / "summary.json").write_text(json.dumps(summary))
    text = Page(write_report([run]).read_text()).text
    assert "neighbour consistency (%) 30.0 35.0 +5.0 (+1.0 to +9.0) rose" in text
    assert "effective rank 20.00 18.00 -2.00 (-3.00 to -1.00) fell" in text
    assert "What to try next more images" in text


def test_the_atlas_has_a_scale_in_words_for_both_themes(page):
    assert "The stronger the colour, the better: 30.0 40.0 . The framed cell" in page.text
    assert "arker" not in page.text


def test_a_run_has_one_colour_everywhere():
    records = [{"phase": "refinement", "step": step, "total_step": step, "loss": 1.0} for step in (1, 2)]
    logs = {"a": records, "b": [{**record, "knn_top1": 0.5} for record in records]}
    loss, knn = comparison_panels(logs)
    assert run_colour(0) in loss.inline
    assert run_colour(0) not in knn.inline  # run a was not measured
    assert run_colour(1) in knn.inline
    assert ">b</text>" in knn.inline  # named also where it stands alone


def test_the_rate_is_drawn_to_its_true_peak_between_two_log_lines():
    recipe = {"batch_size": 256, "warmup": {"epochs": 3, "warmup_epochs": 1, "base_lr": 1e-3, "end_lr": 1e-6}}
    records = [{"phase": "warmup", "step": s, "total_step": s, "epoch": s / 7, "lr": 5e-4} for s in (5, 10, 15, 20)]
    steps, values = rates(records, recipe)
    assert max(values) == 1e-3
    assert steps[values.index(1e-3)] == 8  # after 7 of the rise
    assert values[-1] < values[-2] < 1e-3
    [panel] = learning_panels(records, "", recipe)
    assert panel.title.endswith("peak 0.001")
    assert rates(records, {}) is None  # an older folder: the log's lines are drawn


def test_a_loss_of_several_heads_is_named_as_their_sum():
    records = [{"phase": "r", "step": 1, "total_step": 1, "loss": 3.0, "loss/1": 1.0, "loss/2": 2.0}]
    assert [panel.title for panel in learning_panels(records)] == ["loss of each head", "loss (sum over the heads)"]
    assert [panel.title for panel in learning_panels([{"step": 1, "total_step": 1, "loss": 3.0}])] == ["loss"]


def test_folders_without_results_are_refused(tmp_path, make_run):
    with pytest.raises(InputError, match="no such run folder; give"):
        read_run(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no results to report; give"):
        read_run(tmp_path / "empty")
    run = make_run()
    for drawn in ("metrics.jsonl", "evaluation/blocks.json", "evaluation/gallery.json"):  # which takes seconds
        (run / drawn).unlink()
    (run / "summary.json").write_text("[" * 9000)
    assert "Damaged and left out: summary.json: nested too deeply" in write_report([run]).read_text()
    (run / "summary.json").write_text('{"before": 3, "verdict": [1], "seconds": {"total": "x"}}')
    assert write_report([run]).exists()


PROBE = """<script>
window.addEventListener("load", () => {
  const map = document.querySelector(".map svg"), legend = document.querySelector(".legend button");
  map.focus();
  for (let i = 0; i < 3; i++) map.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  const here = [...document.querySelectorAll("circle.here")].map((dot) => dot.dataset.i);
  const card = document.getElementById("hover");
  legend.click();
  const dim = document.querySelectorAll(".map circle.dim").length;
  document.body.dataset.probe = JSON.stringify({
    here, card: card.textContent, hidden: card.hidden, dim, pressed: legend.getAttribute("aria-pressed"),
    wide: document.documentElement.scrollWidth > window.innerWidth + 1,
    hiddenLinks: [...document.querySelectorAll("nav a")].some((a) => a.getBoundingClientRect().right > innerWidth),
    drawn: [...document.querySelectorAll(".drawing svg")].every((svg) => svg.getBoundingClientRect().height > 50),
  });
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
@pytest.mark.parametrize("width", [1200, 500])
def test_in_a_real_browser(written, tmp_path, width):
    probed = tmp_path / "probed.html"
    probed.write_text(written.replace("</body>", PROBE), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--disable-dev-shm-usage"]
    command += [f"--window-size={width},900", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []  # errors, refused requests, warnings
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["here"] == ["2", "2"]  # the same image on both maps
    assert seen["card"] == "owl, img<2>.png"
    assert not seen["hidden"]
    assert seen["dim"] == 2 * (40 - 14)
    assert seen["pressed"] == "true"
    assert not seen["wide"]
    assert not seen["hiddenLinks"]
    assert seen["drawn"]


def test_runs_of_two_commands_are_compared_by_the_settings_of_both():
    refined = SimpleNamespace(recipe={"command": "refine", "seed": 0, "heads": {"blocks": [1]}, "batch_size": 32})
    other = SimpleNamespace(recipe=refined.recipe | {"heads": {"blocks": [2]}})
    mae = SimpleNamespace(recipe={"command": "pretrain", "seed": 0, "mask_ratio": 0.75, "batch_size": 64})
    assert [row["key"] for row in recipe_differences([refined, mae])] == ["command", "batch_size"]
    assert [row["key"] for row in recipe_differences([refined, other])] == ["heads.blocks"]


def test_commands_to_try_next_are_code_that_does_not_break_inside_an_option(make_run):
    verdict = {"verdict": "no clear change", "reason": "x", "next": ["more images: mim-refiner evaluate --test MORE"]}
    path = make_run()
    summary = json.loads((path / "summary.json").read_text()) | {"verdict": verdict}
    (path / "summary.json").write_text(json.dumps(summary))
    written = write_report([path]).read_text()
    assert (
        '<li>more images: <code><span class="one">mim-refiner</span> evaluate <span class="one">--test</span> MORE'
        "</code></li>"
    ) in written
