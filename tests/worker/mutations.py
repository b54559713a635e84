"""Break every formula of the loss, one at a time, and see its tests fail: `make mutations`.

Each mutation replaces one place of `claas_worker/sdpo.py` in a copy of the package and runs `test_sdpo.py` against the
copy until the first failure. A mutation that survives is a formula that no test holds, and ends the run non-zero.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "worker" / "claas_worker"
TESTS = "tests/worker/test_sdpo.py"
LIMIT_SECONDS = 300


class Mutation(NamedTuple):
    """`old`, which occurs once in the module, becomes `new`."""

    what: str
    old: str
    new: str


MUTATIONS = (
    # Section 2: buckets
    Mutation("ids beyond V are kept", "(ids >= 0) & (ids < vocabulary)", "(ids >= 0)"),
    Mutation("padding is a bucket", "listed = (ids >= 0) & (ids < vocabulary)", "listed = ids < vocabulary"),
    Mutation("duplicates count twice", "listed[:, 1:] &= ids[:, 1:] != ids[:, :-1]", "pass"),
    Mutation("of duplicates the smallest wins", "log_q.argsort(dim=-1, descending=True", "log_q.argsort(dim=-1"),
    Mutation("-9999 is a mass", "padding | (log_q <= ZERO_MASS)", "padding"),
    Mutation("NaN logprobs pass", "(log_q.isnan() | (log_q > LOGPROB_SLACK))", "(log_q > LOGPROB_SLACK)"),
    Mutation("logprobs above zero pass", "(log_q.isnan() | (log_q > LOGPROB_SLACK))", "log_q.isnan()"),
    Mutation("a sum above 1 passes", "(mass > 1 + slack, NonFinite", "(mass > 1e9, NonFinite"),
    Mutation("a sum just above 1 is refused", "SUM_SLACK = 1e-3", "SUM_SLACK = 1e-9"),
    Mutation("a sum just above 1 is not rescaled", "rescaled = whole | (mass > 1)", "rescaled = whole"),
    Mutation("a whole vocabulary is not rescaled", "rescaled = whole | (mass > 1)", "rescaled = mass > 1"),
    Mutation(
        "the teacher's tail has no floor",
        "torch.where(rescaled, 0.0, 1 - mass).clamp_min(TAIL_FLOOR)",
        "torch.where(rescaled, 0.0, 1 - mass).clamp_min(1e-30)",
    ),
    Mutation(
        "the student's tail has no floor",
        "log_p_tail = p_tail.clamp_min(TAIL_FLOOR).log()",
        "log_p_tail = p_tail.clamp_min(1e-30).log()",
    ),
    Mutation("a floored tail has a gradient", "resolved = p_tail > TAIL_FLOOR", "resolved = p_tail >= 0"),
    Mutation(
        "the tail keeps the buckets' mass",
        "torch.where(t.bucket, 0.0, torch.inf)",
        "torch.where(t.bucket, torch.inf, torch.inf)",
    ),
    Mutation("dropped ids empty column 0", "torch.where(t.bucket, 0.0, torch.inf)", "torch.where(t.bucket, 0.0, 0.0)"),
    Mutation(
        "zero mass stays a bucket at alpha 1", "bucket = listed & ~zero if alpha == 1 else listed", "bucket = listed"
    ),
    Mutation(
        "zero mass joins the tail at every alpha",
        "bucket = listed & ~zero if alpha == 1 else listed",
        "bucket = listed & ~zero",
    ),
    # Section 3: divergence
    Mutation(
        "alpha is the student's share", "log_m_p = _log_mixture(d, alpha)", "log_m_p = _log_mixture(d, 1 - alpha)"
    ),
    Mutation(
        "the divergence swaps its weights",
        "(1 - alpha) * _kl(log_p, log_m, log_m_p) + alpha *",
        "alpha * _kl(log_p, log_m, log_m_p) + (1 - alpha) *",
    ),
    Mutation("half of the divergence is lost", " + alpha * _kl(log_q, log_m, log_m_q)", ""),
    Mutation(
        "alpha 0 is the reverse KL",
        "return _kl(log_q, log_p, -d).sum(-1), p - q",
        "return _kl(log_p, log_q, d).sum(-1), p - q",
    ),
    Mutation(
        "alpha 1 is the forward KL",
        "return _kl(log_p, log_q, d).sum(-1), -torch.where",
        "return _kl(log_q, log_p, -d).sum(-1), -torch.where",
    ),
    Mutation("alpha 0's gradient has the other sign", "p - q, d.expm1()", "q - p, d.expm1()"),
    Mutation(
        "alpha 1's gradient has the other sign",
        ", -torch.where(p > 0, p * d, 0.0), d",
        ", torch.where(p > 0, p * d, 0.0), d",
    ),
    Mutation(
        "the gradient lacks 1 - alpha",
        "-(1 - alpha) * torch.where(p > 0, p * log_m_p, 0.0), log_m_p",
        "-torch.where(p > 0, p * log_m_p, 0.0), log_m_p",
    ),
    Mutation(
        "the mixture is inexact near 0",
        "near = (weight * d.clamp(-1, 1).expm1()).log1p()",
        "near = (weight * d.clamp(-1, 1)).log1p()",
    ),
    Mutation("KL is inexact near 0", "near = p * (d.expm1() - d)", "near = p * d * d"),
    Mutation("far KL forgets - p + q", "far = log_q.exp() - p - torch.where", "far = -torch.where"),
    # Section 3: advantage
    Mutation("alpha 0's advantage is a log ratio", "p - q, d.expm1()", "p - q, d"),
    Mutation(
        "alpha 1's advantage is that of M",
        "torch.where(p > 0, p * d, 0.0), d\n",
        "torch.where(p > 0, p * d, 0.0), d / 2\n",
    ),
    Mutation(
        "every advantage is positive",
        "advantage = log_ratio.gather(1, b[:, None]).squeeze(1)",
        "advantage = log_ratio.gather(1, b[:, None]).squeeze(1).abs()",
    ),
    Mutation(
        "the advantage is of a wrong bucket",
        "pad(is_y.to(torch.uint8), (0, 1), value=1).argmax(-1)",
        "is_y.to(torch.uint8).argmax(-1)",
    ),
    Mutation(
        "the advantage is not clamped",
        "advantage = advantage.clamp(-options.advantage_clip, options.advantage_clip)",
        "pass",
    ),
    Mutation(
        "clamps are not counted",
        "clamped = advantage.abs() > options.advantage_clip",
        "clamped = advantage.abs() > math.inf",
    ),
    Mutation(
        "a refused token is only in the tail",
        "if alpha == 1:\n        advantage = advantage.masked_fill",
        "if alpha == 2:\n        advantage = advantage.masked_fill",
    ),
    # Section 3: ratio and policy gradient
    Mutation("the ratio is upside down", "else log_p_y - t.log_mu", "else t.log_mu - log_p_y"),
    Mutation("the ratio is unbounded", "r = log_r.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()", "r = log_r.exp()"),
    Mutation("maximum for minimum", "pg = -torch.minimum(", "pg = -torch.maximum("),
    Mutation("the policy loss has the other sign", "pg = -torch.minimum(", "pg = torch.minimum("),
    Mutation("clipping below only", "r.clamp(1 - eps, 1 + eps) * advantage", "r.clamp(min=1 - eps) * advantage"),
    Mutation(
        "clipped tokens keep their gradient",
        "torch.where(clip_active | (log_r.abs()",
        "torch.where((clip_active & False) | (log_r.abs()",
    ),
    Mutation("bad tokens are clipped above", "((advantage < 0) & (r < 1 - eps))", "((advantage < 0) & (r > 1 + eps))"),
    Mutation("a bounded ratio keeps its gradient", " | (log_r.abs() > MAX_LOG_RATIO), 0.0", ", 0.0"),
    Mutation("the policy gradient lacks the ratio", "0.0, -r * advantage)", "0.0, -advantage)"),
    Mutation(
        "the divergence is not weighted",
        "weight = torch.ones_like(r) if t.log_mu is None else r.clamp",
        "weight = torch.ones_like(r) if True else r.clamp",
    ),
    Mutation("the divergence's weight is unbounded", "r.clamp(max=MAX_DIVERGENCE_RATIO)", "r"),
    # Gradient in the logits
    Mutation(
        "the softmax's mean is not subtracted from the buckets",
        "slope[:, :-1] - log_p[:, :-1].exp() * total[:, None]",
        "slope[:, :-1]",
    ),
    Mutation("the tail's slope is not shared out", "(slope[:, -1] / p_tail.clamp_min(TAIL_FLOOR) - total)", "(-total)"),
    Mutation("the policy gradient misses its token", "p.scatter_add_(1, t.y[:, None], pg_slope[:, None])", "pass"),
    Mutation("pgWeight does not reach the gradient", "pg_slope = options.pg_weight * pg_slope", "pass"),
    Mutation(
        "jsdRegWeight does not reach the gradient", "(options.jsd_reg_weight * weight)[:, None]", "weight[:, None]"
    ),
    Mutation(
        "the gradient is not a mean",
        "slope.div_(count), lm_head_weight, source.dtype)\n    metrics",
        "slope, lm_head_weight, source.dtype)\n    metrics",
    ),
    # Section 4: numbers
    Mutation("pg_loss forgets pgWeight", 'options.pg_weight * total["pg"]', 'total["pg"]'),
    Mutation("jsd_reg forgets jsdRegWeight", 'options.jsd_reg_weight * total["weighted_jsd"]', 'total["weighted_jsd"]'),
    Mutation("jsd is weighted", '"jsd": divergence,', '"jsd": weight * divergence,'),
    Mutation("mean_advantage has no sign", '"mean_advantage": advantage,', '"mean_advantage": advantage.abs(),'),
    Mutation("every advantage counts as positive", "POSITIVE_ADVANTAGE = 1e-6", "POSITIVE_ADVANTAGE = -1e9"),
    Mutation("mean_is_ratio is clipped", '"mean_is_ratio": r,', '"mean_is_ratio": r.clamp(1 - eps, 1 + eps),'),
    Mutation("clip_fraction counts one side", '"clip_fraction": (r - 1).abs() > eps', '"clip_fraction": r - 1 > eps'),
    Mutation(
        "N is that of the part",
        "count = n if total_tokens is None else total_tokens\n    if count < max(n, 1)",
        "count = n\n    if count < max(n, 1)",
    ),
    Mutation(
        "entropy has the other sign",
        "entropy = norm.log().squeeze(1) - torch",
        "entropy = norm.log().squeeze(1) + torch",
    ),
    Mutation(
        "the student's top-K mass is the tail's",
        "torch.where(t.listed, log_p_ids.exp(), 0.0)",
        "torch.where(t.listed, 0.0, log_p_ids.exp())",
    ),
    # Section 6: guards
    Mutation("response ids beyond V pass", "((y < 0) | (y >= vocabulary), Tok", "((y < 0) | (y > vocabulary), Tok"),
    Mutation("infinite rollout logprobs pass", "else ~log_mu.isfinite()", "else log_mu.isnan()"),
    Mutation(
        "masked tokens are included",
        "(mask.to(device) != 0).nonzero()",
        "(mask.to(device) == mask.to(device)).nonzero()",
    ),
    Mutation("NaN logits pass", 'if total["unscored"]:', "if False:"),
    # Anchor
    Mutation("the anchor's gradient lacks its mean", "p.mul_(log_ratio.sub_(kl))", "p.mul_(log_ratio)"),
    Mutation("the anchor is a sum", "return _attach(student, (total / count)", "return _attach(student, total"),
)


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass although the formula is broken."""
    source = (PACKAGE / "sdpo.py").read_text()
    if source.count(mutation.old) != 1:
        sys.exit(f"{mutation.what}: {mutation.old!r} occurs {source.count(mutation.old)} times in sdpo.py, not once")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder) / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / PACKAGE.name / "sdpo.py").write_text(source.replace(mutation.old, mutation.new))
        path = os.pathsep.join([folder, str(ROOT / "tests")])
        command = [sys.executable, "-m", "pytest", TESTS, "-x", "-q", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode not in (0, 1):
        said = (done.stdout + done.stderr)[-2000:]
        sys.exit(f"{mutation.what}: the tests did not run ({done.returncode})\n{said}")
    failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
    print(f"{'caught  ' if done.returncode else 'SURVIVED'} {mutation.what}: {failed[1] if failed else ''}", flush=True)
    return done.returncode == 0


def main() -> None:
    """All of them, or those whose description holds a word."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only mutations whose description holds it")
    word = parser.parse_args().word
    started = time.monotonic()
    chosen = [mutation for mutation in MUTATIONS if word in mutation.what]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        alive = [one.what for one, lives in zip(chosen, pool.map(survives, chosen), strict=True) if lives]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} caught in {time.monotonic() - started:.0f} s")
    if alive:
        sys.exit("survived: " + "; ".join(alive))


if __name__ == "__main__":
    main()
