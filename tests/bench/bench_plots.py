"""The results of the benches as PNG, one panel for each case: what each side took, and where a bound lies.

    python tests/bench/bench_plots.py build/student.json build/teacher.json     build/student.png, build/teacher.png

Takes what student_step, step_against_trl, step_against_peft, teacher_scoring, warm_request and cold_start write with
--out (`operator_load.py plot` draws the operator's). Needs Pillow alone.

* student: our step, plain PEFT's and TRL's; the time for as many times as fast as was asked for, and the goal beyond.
* teacher: plain prefill, frames, stock JSON; what frames may take by either of their bounds.
* warm request: its parts one after another, the median's and each round's; where the bound is, from its creation on.
* cold start: the first seconds of each process, plain PEFT's below it; where the bound is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from operator_plots import COLORS, written
from PIL import Image, ImageDraw, ImageFont

WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 760, 150, 90, 30, 24, 36  # of a panel, in pixels
PALE = (170, 205, 230)

Result = Mapping[str, Any]
Color = tuple[int, int, int]


class Part(NamedTuple):
    """From where to where, and how it looks."""

    start: float
    end: float
    color: Color


class Row(NamedTuple):
    """A bar of parts; `spread` is the least and the most of what it shows the median of."""

    label: str
    parts: Sequence[Part]
    spread: tuple[float, float] | None = None

    @property
    def end(self) -> float:
        """Where the last part ends."""
        return max(part.end for part in self.parts)


class Panel(NamedTuple):
    """Rows on one scale, and lines across them."""

    title: str
    rows: Sequence[Row]
    lines: Sequence[tuple[str, float]] = ()
    legend: Mapping[str, Color] = {}

    @property
    def right(self) -> float:
        """The scale's end."""
        ends = [value for row in self.rows for value in (row.end, *(row.spread or ()))]
        return max([*ends, *(value for _, value in self.lines)])

    @property
    def height(self) -> int:
        """In pixels."""
        return TOP + ROW * (len(self.rows) + len(self.lines) + bool(self.legend)) + BOTTOM


# What is drawn of each


def student(result: Result) -> list[Panel]:
    """A panel for each case; where one side trains its adapters one by one, for all of them together."""
    return [_student(case) for case in result["cases"]]


def _student(case: Mapping[str, Any]) -> Panel:
    times = case["adapters"]
    rows = [_bar("ours", case["ms"], case["all_ms"], COLORS[0])]
    lines = []
    if "plain_ms" in case:
        rows.append(_bar("plain PEFT", case["plain_ms"], case["plain_all_ms"], COLORS[1], times))
        if case.get("target"):
            lines.append((f"{case['target']:g} x plain PEFT", case["plain_ms"] * times / case["target"]))
    if "trl_ms" in case:
        whole, teacher = case["trl_ms"] * times, case["trl_teacher_ms"] * times
        parts = [Part(0, whole - teacher, COLORS[2]), Part(whole - teacher, whole, PALE)]
        rows.append(Row("TRL (its teacher pale)", parts, _spread(case["trl_all_ms"], times)))
    if case.get("goal_ms"):
        lines.append(("goal", case["goal_ms"]))
    return Panel(f"{case['case']}: a step, ms", rows, lines)


def teacher(result: Result) -> list[Panel]:
    """A panel for each case."""
    limits = result["bounds"]
    share, times = limits["frames_of_prefill"]["at_most"], limits["json_of_frames"]["at_least"]
    return [
        Panel(
            f"{case['case']} tokens: from the call to arrays in hand, ms",
            [
                _bar(label, case[f"{name}_ms"], case[f"{name}_all_ms"], color)
                for label, name, color in zip(
                    ("plain prefill", "frames", "stock JSON"), ("prefill", "frames", "json"), COLORS, strict=False
                )
            ],
            [
                (f"{share:g} x prefill, frames at most", share * case["prefill_ms"]),
                (f"JSON / {times:g}, frames at most", case["json_ms"] / times),
            ],
        )
        for case in result["cases"]
    ]


def warm(result: Result) -> list[Panel]:
    """One panel: the medians of the parts, then each request's."""
    names = [name for name in result["median_ms"] if name != "bound to complete"]
    legend = dict(zip(names, [*COLORS, (200, 170, 0), PALE], strict=False))
    rounds = [("median of each part", result["median_ms"])]
    rounds += [(f"request {number}", one) for number, one in enumerate(result["rounds_ms"], 1)]
    rows = [Row(label, _stacked([(one[name], legend[name]) for name in names])) for label, one in rounds]
    limit = result["bounds"]["overhead_ms"]["at_most"]
    alone = result["teacher_alone_ms"] + result["student_alone_ms"]
    lines = [(f"teacher and student alone + {limit:g} ms", result["median_ms"]["created to bound"] + alone + limit)]
    return [Panel(f"a warm request of {result['tokens']} response tokens, ms since its creation", rows, lines, legend)]


def cold(result: Result) -> list[Panel]:
    """One panel: each process since its start, and plain PEFT's beside it."""
    legend = dict(
        zip(
            ("Python, settings", "imports", "model", "until claimed", "adapter", "teacher", "step", "save"),
            [COLORS[4], PALE, COLORS[0], (225, 225, 225), COLORS[2], COLORS[3], COLORS[1], COLORS[5]],
            strict=True,
        )
    )
    rows = []
    for number, one in enumerate(result["processes"], 1):
        timings = [one["timings"][f"{name}Ms"] / 1000 for name in ("load", "teacher", "step", "save")]
        before, imports = one["loaded_seconds"] - one["load_step_seconds"], one["imports_seconds"]
        claimed = one["result_seconds"] - sum(timings)  # with what lies between the parts
        lengths = [before, imports, one["load_step_seconds"] - imports, claimed - one["loaded_seconds"], *timings]
        rows.append(Row(f"process {number}", _stacked(zip(lengths, legend.values(), strict=True))))
        plain = one["plain"]
        inside = [plain["imports_seconds"], plain["load_seconds"], plain["step_seconds"]]
        start = max(0.0, plain["first_step_seconds"] - sum(inside))
        colors = [legend[name] for name in ("Python, settings", "imports", "model", "step")]
        rows.append(Row("plain PEFT", _stacked(zip([start, *inside], colors, strict=True))))
    lines = [("first step at most, when warm", result["bounds"]["first_step_seconds"]["at_most"])]
    return [Panel(f"{result['process']}: seconds since the process' start, to its result", rows, lines, legend)]


def _bar(label: str, median: float, values: Sequence[float], color: Color, times: int = 1) -> Row:
    name = f"{label}, {times} x" if times > 1 else label
    return Row(name, [Part(0, median * times, color)], _spread(values, times))


def _spread(values: Sequence[float], times: int) -> tuple[float, float]:
    return min(values) * times, max(values) * times


def _stacked(lengths: Any) -> list[Part]:
    """One after another; what a clock's rounding makes negative is nothing."""
    parts, at = [], 0.0
    for length, color in lengths:
        parts.append(Part(at, at + max(0.0, length), color))
        at = parts[-1].end
    return parts


DRAWN: Mapping[str, Callable[[Result], list[Panel]]] = {
    "student_step": student,
    "step_against_trl": student,
    "step_against_peft": student,
    "teacher_scoring": teacher,
    "warm_request": warm,
    "cold_start": cold,
}

# Drawing


def plot(result: Result, path: Path) -> None:
    """All panels of a result below each other, and where it comes from."""
    panels = DRAWN[result["bench"]](result)
    image = Image.new("RGB", (WIDTH, sum(panel.height for panel in panels) + ROW), "white")
    draw, font, y = ImageDraw.Draw(image), ImageFont.load_default(12), 0
    for panel in panels:
        _panel(draw, font, y, panel)
        y += panel.height
    source = f"{result['bench']}, {result['at']}, {result['commit'] or 'commit unknown'}, {result['machine']}"
    draw.text((8, y + 2), source, fill=COLORS[4], font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _panel(draw: ImageDraw.ImageDraw, font: Any, top: int, panel: Panel) -> None:
    bars = top + TOP
    axis = bars + ROW * len(panel.rows)

    def at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / panel.right

    draw.text((8, top + 8), panel.title, fill="black", font=font)
    for share in (0.0, 0.5, 1.0):
        x = at(panel.right * share)
        draw.line([(x, bars), (x, axis)], fill=(225, 225, 225))
        draw.text((x - 8, axis + 2), f"{written(panel.right * share)}", fill="black", font=font)
    for number, row in enumerate(panel.rows):
        y = bars + ROW * number
        draw.text((8, y + 4), row.label, fill="black", font=font)
        for part in row.parts:
            draw.rectangle([at(part.start), y + 4, at(part.end), y + ROW - 5], fill=part.color)
        if row.spread is not None:
            draw.line([(at(row.spread[0]), y + ROW // 2), (at(row.spread[1]), y + ROW // 2)], fill="black")
        most = max([row.end, *(row.spread or ())])
        draw.text((at(most) + 4, y + 4), f"{written(row.end)}", fill="black", font=font)
    y = axis + 18
    for label, value in panel.lines:
        draw.line([(at(value), bars), (at(value), axis)], fill=COLORS[5])
        text = f"{label}: {written(value)}"
        right = at(value) + 4 + draw.textlength(text, font=font) > WIDTH
        x = at(value) - 4 - draw.textlength(text, font=font) if right else at(value) + 4
        draw.text((x, y), text, fill=COLORS[5], font=font)
        y += ROW
    x = 8.0
    for label, color in panel.legend.items():
        draw.rectangle([x, y + 4, x + 8, y + 12], fill=color)
        draw.text((x + 11, y), label, fill="black", font=font)
        x += 19 + draw.textlength(label, font=font)


def main() -> None:
    """One picture for each result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of the benches")
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where the pictures go (default: build)")
    options = parser.parse_args()
    for path in options.results:
        picture = options.folder / path.with_suffix(".png").name
        plot(json.loads(path.read_text()), picture)
        print(picture)


if __name__ == "__main__":
    main()
