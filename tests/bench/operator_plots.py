"""The operator's load as PNG: for each run its course over time, and what all runs cost by their number of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 380, 230, 52  # of a panel, in pixels
COLORS = [(0, 110, 180), (210, 110, 0), (0, 140, 90), (150, 60, 150), (90, 90, 90), (190, 40, 40)]

Curve = list[tuple[float, float]]
Record = Mapping[str, Any]


def written(value: float) -> str:
    """As people write it: 29,890 and 0.0123."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plot(records: Sequence[Record], path: Path) -> None:
    """One row of panels over time, one over the number of requests; a colour per run."""
    loads = [record for record in records if record["kind"] == "load"]
    over_time = {
        "requests that wait": lambda row: row["queue"],
        "created to bound, median, s": lambda row: row["wait_p50"],
        "writes to requests and adapters per s": lambda row: row["writes"],
        "operator's memory, MB": lambda row: row["rss_bytes"] / 1e6 or None,
    }
    over_requests = {
        "seconds until all are Complete": lambda record: record["load"]["seconds"],
        "operator's CPU seconds": lambda record: record["load"]["cpu_seconds"]["operator"],
        "writes to requests and adapters, thousands": lambda record: (
            record["load"]["writes_per_request"] * record["requests"] / 1e3
        ),
        "operator's memory at most, MB": lambda record: record["load"]["rss_bytes"] / 1e6,
    }
    image = Image.new("RGB", (WIDTH * len(over_time), HEIGHT * 2 + 20 * (len(loads) + 1)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for column, (title, of) in enumerate(over_time.items()):
        curves = [
            [(row["second"], value) for row in load["load"]["timeline"] if (value := of(row)) is not None]
            for load in loads
        ]
        _panel(draw, font, (column * WIDTH, 0), f"{title}, over seconds", curves)
    sizes = sorted({load["spec_bytes"] for load in loads})
    for column, (title, of) in enumerate(over_requests.items()):
        curves = [
            sorted((load["requests"], of(load)) for load in loads if load["spec_bytes"] == size) for size in sizes
        ]
        _panel(draw, font, (column * WIDTH, HEIGHT), f"{title}, over requests", curves, dots=True)
    for i, load in enumerate(loads):
        text = f"{load['at']}: {load['requests']} requests of {load['spec_bytes']} bytes, {load['cpus']} cores"
        draw.text((MARGIN, 2 * HEIGHT + 20 * i), text, fill=COLORS[i % len(COLORS)], font=font)
    image.save(path)


def _panel(
    draw: ImageDraw.ImageDraw,
    font: Any,
    corner: tuple[int, int],
    title: str,
    curves: Sequence[Curve],
    dots: bool = False,
) -> None:
    points = [point for curve in curves for point in curve] or [(1.0, 1.0)]
    right, top = max(x for x, _ in points) or 1, max(y for _, y in points) or 1
    width, height = WIDTH - 1.5 * MARGIN, HEIGHT - 1.4 * MARGIN

    def at(x: float, y: float) -> tuple[float, float]:
        return corner[0] + MARGIN + width * x / right, corner[1] + 0.7 * MARGIN + height * (1 - y / top)

    draw.text((corner[0] + MARGIN, corner[1] + 8), title, fill="black", font=font)
    for share in (0.0, 0.5, 1.0):
        draw.line([at(0, top * share), at(right, top * share)], fill=(225, 225, 225))
        x, y = at(0, top * share)
        draw.text((corner[0] + 4, y - 8), f"{written(top * share)}", fill="black", font=font)
        x, y = at(right * share, 0)
        draw.text((x - 8, y + 4), f"{written(right * share)}", fill="black", font=font)
    for i, curve in enumerate(curves):
        color = COLORS[i % len(COLORS)]
        if len(curve) > 1:
            draw.line([at(x, y) for x, y in curve], fill=color, width=2)
        if dots:
            for x, y in curve:
                a, b = at(x, y)
                draw.ellipse([a - 3, b - 3, a + 3, b + 3], fill=color)
