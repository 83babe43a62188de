"""The gallery record (analysis.gallery) as the page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mim_refiner.report.tables import STAGES

MAP_SIZE = 320  # units of the SVG
MARGIN = 10
# Okabe-Ito and three more, told apart on light and on dark ground
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e6a700", "#56b4e9", "#8c6239", "#d62f3a", "#7a6ff0", "#8a8f94")


def class_colour(number: int) -> str:
    """Ten distinct colours, then hues by the golden angle."""
    return COLOURS[number] if number < len(COLOURS) else f"hsl({number * 137.5 % 360:.0f} 60% 50%)"


def gallery_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """Thumbnails, neighbour rows, clusters, patch maps and feature maps of every model, ready for the templates."""
    sheet, items = record["thumbnails"], record["items"]
    labels, names = items["label"], record["class_names"]
    words = None if labels is None else [_class_word(label, names) for label in labels]
    thumbs = [
        {
            "column": row % sheet["columns"],
            "row": row // sheet["columns"],
            "label": None if words is None else words[row],
            "alt": items["name"][row] if words is None else f"{words[row]}, {items['name'][row]}",
        }
        for row in range(sheet["count"])
    ]
    classes = sorted(set(labels)) if labels is not None else []
    colour = {label: number for number, label in enumerate(classes)}
    models = record["models"]
    return {
        "data": record["data"],
        "block": record["block"],
        "pooling": record["pooling"],
        "sheet": {**sheet, "rows": -(-sheet["count"] // sheet["columns"])},
        "thumbs": thumbs,
        "labelled": labels is not None,
        "classes": [
            {"number": number, "name": _class_word(label, names), "colour": class_colour(number)}
            for label, number in colour.items()
        ],
        "queries": _queries(record, labels),
        "shares": [
            {
                "model": STAGES.get(name, name),
                "same": None if model["same_label"] is None else f"{100 * model['same_label']:.1f}",
                "kept": f"{100 * record['kept_neighbors'][name]:.0f}" if name in record["kept_neighbors"] else None,
            }
            for name, model in models.items()
        ],
        "clusters": [_clusters(name, model["clusters"], names) for name, model in models.items()],
        "patches": {
            "rows": record["patch_rows"],
            "models": [
                {
                    "name": STAGES.get(name, name),
                    "png": model["patches"]["png"],
                    "explained": f"{100 * sum(model['patches']['explained']):.0f}",
                    "grid": "×".join(map(str, model["patches"]["grid"])),
                }
                for name, model in models.items()
            ],
        },
        "maps": [
            _map(method, STAGES.get(name, name), model["maps"][method], labels, colour)
            for method in ("pca", "umap")
            for name, model in models.items()
            if method in model["maps"]
        ],
    }


def _class_word(label: int, names: Sequence[str] | None) -> str:
    return names[label] if names and 0 <= label < len(names) else f"class {label}"


def _queries(record: Mapping[str, Any], labels: Sequence[int] | None) -> list[dict[str, Any]]:
    rows = []
    for position, query in enumerate(record["queries"]):
        strips = []
        for name, model in record["models"].items():
            neighbors = [
                {"row": row, "similarity": f"{similarity:.2f}",
                 "same": None if labels is None else labels[row] == labels[query]}
                for row, similarity in zip(model["neighbors"][position], model["similarity"][position], strict=True)
            ]  # fmt: skip
            hits = None if labels is None else sum(bool(neighbor["same"]) for neighbor in neighbors)
            strips.append({"model": STAGES.get(name, name), "neighbors": neighbors, "hits": hits})
        rows.append({"row": query, "strips": strips})
    return rows


def _clusters(model: str, clusters: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    confusion = clusters["confusion"]
    groups = []
    for number, (size, examples) in enumerate(zip(clusters["sizes"], clusters["examples"], strict=True)):
        purest = ""
        if confusion and size:
            counts = confusion["counts"][number]
            top = max(range(len(counts)), key=counts.__getitem__)
            purest = f"{100 * counts[top] / size:.0f} % {_class_word(confusion['classes'][top], names)}"
        groups.append({"number": number + 1, "size": size, "examples": examples, "purest": purest})
    table = None
    if confusion:
        table = {
            "classes": [_class_word(label, names) for label in confusion["classes"]],
            "rows": [
                [{"count": count, "heat": round(100 * count / max(1, max(row)))} for count in row]
                for row in confusion["counts"]
            ],
        }
    return {"model": STAGES.get(model, model), "groups": groups, "confusion": table}


def _map(
    method: str, model: str, entry: Mapping[str, Any], labels: Sequence[int] | None, colour: Mapping[int, int]
) -> dict[str, Any]:
    """Points in SVG units, the same image at the same position of every map."""
    explained = entry.get("explained")
    points = []
    for row, (x, y) in enumerate(_scaled(entry["points"])):
        number = 0 if labels is None else colour[labels[row]]
        points.append({"x": x, "y": y, "row": row, "number": number, "colour": class_colour(number)})
    note = f"two components hold {100 * sum(explained):.0f} % of the variance" if explained else ""
    return {"method": method.upper(), "model": model, "note": note, "points": points}


def _scaled(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Fit into the square, equal scale on both axes."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    span = max(max(xs) - min(xs), max(ys) - min(ys), 1e-12)
    factor = (MAP_SIZE - 2 * MARGIN) / span
    middle_x, middle_y, half = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2, MAP_SIZE / 2
    return [(round(half + factor * (x - middle_x), 1), round(half - factor * (y - middle_y), 1)) for x, y in points]
