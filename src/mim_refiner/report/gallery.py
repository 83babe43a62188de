"""The gallery record (analysis.gallery) as the page shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAP_SIZE = 320  # units of the SVG
MARGIN = 10
# Okabe-Ito and three more, told apart on light and on dark ground
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e6a700", "#56b4e9", "#8c6239", "#d62f3a", "#7a6ff0", "#8a8f94")


class Gallery:
    """What the templates ask beside the ``record`` itself; images go by their rows of its ``items``."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, self.models, self.names = record, record["models"], record["class_names"] or []
        self.labels: Sequence[int] | None = record["items"]["label"]
        self.classes = {label: number for number, label in enumerate(sorted(set(self.labels or ())))}
        self.thumbs = [self._thumb(row, name) for row, name in enumerate(record["items"]["name"])]

    def _thumb(self, row: int, name: str) -> dict[str, Any]:
        """Place on the sheet and words of an image."""
        line, column = divmod(row, self.record["thumbnails"]["columns"])
        label = None if self.labels is None else self.word(self.labels[row])
        return {"column": column, "row": line, "label": label, "alt": name if label is None else f"{label}, {name}"}

    def word(self, label: int) -> str:
        """What a class is called."""
        return self.names[label] if 0 <= label < len(self.names) else f"class {label}"

    def number(self, row: int) -> int:
        """The number of an image's class among those that occur; without labels 0."""
        return 0 if self.labels is None else self.classes[self.labels[row]]

    def colour(self, number: int) -> str:
        """Of ten classes distinct colours, then hues by the golden angle."""
        return COLOURS[number] if number < len(COLOURS) else f"hsl({number * 137.5 % 360:.0f} 60% 50%)"

    def queries(self) -> Iterator[tuple[int, dict[str, list[tuple[int, float, bool | None]]]]]:
        """Of every query its row, and by model its neighbours: row, similarity, whether of the same class."""
        labels = self.labels
        for position, query in enumerate(self.record["queries"]):
            strips = {}
            for name, model in self.models.items():
                rows, similarity = model["neighbors"][position], model["similarity"][position]
                hits = [None if labels is None else labels[row] == labels[query] for row in rows]
                strips[name] = list(zip(rows, similarity, hits, strict=True))
            yield query, strips

    def clusters(self, model: Mapping[str, Any]) -> Iterator[tuple[int, list[int], str]]:
        """Of every cluster its size, the rows of examples, and with labels which class it holds most of."""
        clusters = model["clusters"]
        for number, (size, examples) in enumerate(zip(clusters["sizes"], clusters["examples"], strict=True)):
            purest = ""
            if size and (confusion := clusters["confusion"]):
                counts = confusion["counts"][number]
                label = confusion["classes"][counts.index(max(counts))]
                purest = f", {100 * max(counts) / size:.0f} % {self.word(label)}"
            yield size, examples, purest

    def maps(self) -> Iterator[tuple[str, str, str, list[tuple[float, float]]]]:
        """Method, model, a note, and the points of all images in SVG units."""
        for method in ("pca", "umap"):
            for name, model in self.models.items():
                if entry := model["maps"].get(method):
                    share = 100 * sum(entry.get("explained") or ())
                    note = f"two components hold {share:.0f} % of the variance" if entry.get("explained") else ""
                    yield method.upper(), name, note, _scaled(entry["points"])


def _scaled(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Fit into the square, equal scale on both axes."""
    xs, ys = zip(*points, strict=True)
    span = max(max(xs) - min(xs), max(ys) - min(ys), 1e-12)
    factor = (MAP_SIZE - 2 * MARGIN) / span
    middle_x, middle_y, half = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2, MAP_SIZE / 2
    return [(round(half + factor * (x - middle_x), 1), round(half - factor * (y - middle_y), 1)) for x, y in points]
