"""Curves of compliance as PNG: one panel per preference, one thin line per trial, one thick line per arm's mean."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

COLORS = {"feedback": (0, 110, 180), "shuffled": (210, 110, 0), "empty": (120, 120, 120)}
WIDTH, HEIGHT, MARGIN = 360, 260, 44  # of a panel, in pixels
COLUMNS = 3


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the trials' compliance on held-out prompts over the number of requests."""
    panels: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        panels[record["preference"]].append(record)
    rows = -(-len(panels) // COLUMNS)
    image = Image.new("RGB", (WIDTH * min(COLUMNS, len(panels)), HEIGHT * rows + 24), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for index, (name, trials) in enumerate(sorted(panels.items())):
        _panel(draw, font, (index % COLUMNS * WIDTH, index // COLUMNS * HEIGHT), name, trials)
    x = MARGIN
    for arm, color in COLORS.items():
        if any(record["arm"] == arm for record in records):
            draw.text((x, HEIGHT * rows + 2), arm, fill=color, font=font)
            x += 90
    image.save(path)


def _panel(
    draw: ImageDraw.ImageDraw, font: Any, corner: tuple[int, int], name: str, trials: Sequence[Mapping[str, Any]]
) -> None:
    last = max(int(step) for trial in trials for step in trial["compliance"])
    width, height = WIDTH - 1.5 * MARGIN, HEIGHT - 2 * MARGIN

    def at(step: float, share: float) -> tuple[float, float]:
        return corner[0] + MARGIN + width * step / last, corner[1] + MARGIN + height * (1 - share)

    draw.text((corner[0] + MARGIN, corner[1] + 14), f"{name}: share of compliant answers", fill="black", font=font)
    for share in (0.0, 0.5, 1.0):
        draw.line([at(0, share), at(last, share)], fill=(225, 225, 225))
        x, y = at(0, share)
        draw.text((x - 28, y - 8), f"{share:.1f}", fill="black", font=font)
    for step in range(0, last + 1, 5):
        x, y = at(step, 0)
        draw.text((x - 6, y + 4), str(step), fill="black", font=font)
    for arm, color in COLORS.items():
        curves = [{int(k): v for k, v in trial["compliance"].items()} for trial in trials if trial["arm"] == arm]
        pale = tuple((value + 2 * 255) // 3 for value in color)
        for curve in curves:
            draw.line([at(step, curve[step]) for step in sorted(curve)], fill=pale, width=1)
        if curves:
            mean = {step: sum(curve[step] for curve in curves) / len(curves) for step in curves[0]}
            draw.line([at(step, mean[step]) for step in sorted(mean)], fill=color, width=3)
