"""A year in the life of an adapter: a hundred versions, five kept, two forks and a rollback, killed again and again."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from claas_store.fsck import Kind, fsck
from claas_store.stores import open_store
from claas_store.uris import is_beside
from claas_store.version import find_manifest, read_version
from store import examples
from store.chains import name, names_in

VERSIONS = 100
KEEP_LAST = 5


class Mortal:
    """The process of `lives.py`, started again whenever it was killed."""

    def __init__(self, chance: float, seed: int) -> None:
        self._random, self._chance = random.Random(seed), chance
        self._process: subprocess.Popen[str] | None = None
        self.kills = 0

    def ask(self, order: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None when the process was killed before it gave one."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        killer = None
        if self._random.random() < self._chance:
            killer = threading.Timer(self._random.uniform(0, 0.06), process.kill)
            killer.start()
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if killer is not None:
            killer.join()
            self._process = None
            self.kills += 1
            process.wait(timeout=30)
        assert line or killer is not None, "it died by itself: its traceback is on stderr"
        answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
        return answer

    def insist(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer, after as many tries as it takes, each the next attempt."""
        for attempt in range(1, 50):
            adopt = self._random.random() < 0.8  # else the earlier attempt's version, if it is whole, is an orphan
            if (answer := self.ask({**order, "attempt": attempt, "adopt": adopt})) is not None:
                return answer
        raise AssertionError("killed fifty times in a row")

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)

    def _start(self) -> subprocess.Popen[str]:
        tests = str(Path(__file__).parent.parent)
        environment = {**os.environ, "PYTHONPATH": ":".join([tests, *(path for path in sys.path if path)])}
        process = subprocess.Popen(
            [sys.executable, "-m", "store.lives"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"ready": True}
        return process


class Adapter:
    """What the operator keeps of an adapter: its head, its history, and what it has collected."""

    def __init__(self, mortal: Mortal, uri: str, uid: str, origin: dict[str, Any]) -> None:
        self._mortal, self.root, self.uid = mortal, uri, uid
        self.history: list[str] = [mortal.insist({**origin, "uri": uri, "uid": uid})["uri"]]
        self.head = self.history[0]
        self.collected: set[str] = set()
        self.referenced: set[str] = set()  # forks begin there

    def train(self, number: int) -> None:
        order = {"op": "step", "parent": self.head, "number": number, "uid": self.uid}
        self.head = self._mortal.insist(order)["uri"]
        self.history.append(self.head)

    def roll_back(self, versions: int) -> None:
        self.head = self.history[-1 - versions]
        assert self.head not in self.collected
        self.history.append(self.head)

    def collect(self) -> None:
        """All but the last of the history, the head and what forks name."""
        kept = {*self.history[-KEEP_LAST:], self.head} | self.referenced
        old = [uri for uri in dict.fromkeys(self.history) if uri not in kept | self.collected]
        if old:
            self._mortal.insist({"op": "collect", "root": self.root, "names": [name(uri) for uri in old]})
            self.collected |= set(old)

    @property
    def kept(self) -> set[str]:
        return set(self.history) - self.collected

    def known(self) -> list[str]:
        return [name(uri) for uri in dict.fromkeys(self.history)]


@pytest.mark.parametrize(("where", "chance"), [pytest.param("file", 0.12, marks=pytest.mark.stress), ("s3", 0.05)])
def test_a_hundred_versions_two_forks_and_a_rollback_under_random_kills(
    where: str, chance: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    home = str(request.getfixturevalue("bucket")) if where == "s3" else f"file://{request.getfixturevalue('root')}/"
    model = str(examples.model_dir(tmp_path / "model"))
    mortal = Mortal(chance, seed=int(os.environ.get("CLAAS_SEED", "6")))
    try:
        adapter = Adapter(mortal, f"{home}coder/", "uid-coder", {"op": "first"})
        forks = []
        for number in range(1, VERSIONS):
            adapter.train(number)
            if number in (30, 60):
                source = adapter.history[-3]
                adapter.referenced.add(source)
                origin = {"op": "fork", "source": source, "model": model}
                forks.append(Adapter(mortal, f"{home}fork-{number}/", f"uid-{number}", origin))
            for fork in forks[: (number % 10 == 0 and 2) or 0]:
                fork.train(1000 + number)
            if number == 75:
                adapter.roll_back(3)
            adapter.collect()
        family = [adapter, *forks]
        assert mortal.kills > 3, "too few to prove anything"

        for one in family:
            report = fsck(one.root, known=one.known())
            assert report.ok, "\n".join(report.lines())
            assert {finding.kind for finding in report.findings} <= {
                Kind.COLLECTED, Kind.INTERRUPTED, Kind.ORPHANED
            }  # fmt: skip
            # From the head every parent's digest is right, through collected ones back to the first, and a fork's on.
            chain = fsck(one.head)
            assert chain.ok, "\n".join(chain.lines())
            for uri in one.kept:
                assert read_version(uri).uri == uri, "what is referenced was not collected"
            assert all(find_manifest(uri) is None for uri in one.collected)
        # Off the head's chain: the three that were rolled back over.
        assert fsck(adapter.head).versions == VERSIONS - 3
        assert len(adapter.kept) == KEEP_LAST + len(forks)
        parents = [fork.history[0] for fork in forks]
        assert {read_version(uri).manifest.parent.uri for uri in parents} == adapter.referenced  # type: ignore[union-attr]

        for one in family:
            mortal.insist({"op": "sweep", "root": one.root, "known": one.known()})
            report = fsck(one.root, known=one.known())
            assert report.ok and {finding.kind for finding in report.findings} <= {Kind.COLLECTED}
            beside = [found for found in names_in(home) if is_beside(one.root, found)]
            assert beside == sorted(one.known()), "each version or its tombstone, and nothing else"
        mortal.insist({"op": "destroy", "root": adapter.root})
        assert names_in(home) == sorted({name(uri) for fork in forks for uri in fork.history})
        for fork in forks:
            assert fsck(fork.head).ok, "a fork is whole without its origin"
            mortal.insist({"op": "destroy", "root": fork.root})
        assert list(open_store(home).list(home)) == []
    finally:
        mortal.end()
