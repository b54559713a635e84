"""Draws `docs/alpha.png`: advantage and divergence over alpha, by `sdpo_loss` itself. `make docs`."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from claas_worker.sdpo import sdpo_loss

OUT = Path(__file__).with_suffix(".png")
# One position, six tokens, of which the teacher lists four. It moves mass from the first token to the second.
STUDENT = torch.tensor([0.60, 0.20, 0.10, 0.06, 0.03, 0.01], dtype=torch.float64)
TEACHER = torch.tensor([0.20, 0.60, 0.10, 0.02, 0.05, 0.03], dtype=torch.float64)
LISTED = 4
TOKENS = {
    "student 0.60, teacher 0.20": 0,
    "student 0.20, teacher 0.60": 1,
    "both 0.10": 2,
    "in the tail: student 0.04, teacher 0.08": 4,
}
INNER = torch.linspace(0.01, 0.99, 99).tolist()


def metrics(token: int, *, alpha: float, listed: int = LISTED) -> dict[str, float]:
    """Of one response token."""
    return sdpo_loss(
        STUDENT.log()[None],  # (1, V)
        torch.tensor([token]),
        torch.arange(listed)[None],  # (1, K)
        TEACHER[:listed].log()[None],
        alpha=alpha,
    ).metrics


def curve(axes: Axes, name: str, label: str, **of: int) -> None:
    """A metric over alpha: a line between the ends, and the ends, which have definitions of their own, as points."""
    (line,) = axes.plot(INNER, [metrics(alpha=alpha, **of)[name] for alpha in INNER], label=label)
    ends = [metrics(alpha=alpha, **of)[name] for alpha in (0.0, 1.0)]
    axes.plot([0.0, 1.0], ends, "o", color=line.get_color(), clip_on=False, zorder=3)


def main() -> None:
    """Draw both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for label, token in TOKENS.items():
        curve(left, "mean_advantage", label, token=token)
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(title="advantage A of a response token", xlabel="alpha", ylabel="nats (alpha = 0: Q/P - 1)")
    for listed in (len(STUDENT), LISTED, 2, 1):
        name = "all six tokens" if listed == len(STUDENT) else f"top {listed} and a tail"
        curve(right, "jsd", name, token=0, listed=listed)
    right.set(title="divergence D of the position", xlabel="alpha", ylabel="nats")
    for axes in (left, right):
        axes.set_xlim(0, 1)
        axes.legend(fontsize=8)
    figure.savefig(OUT, dpi=110)
    print(OUT)


if __name__ == "__main__":
    main()
