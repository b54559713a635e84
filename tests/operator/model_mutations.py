"""Take every precondition of the protocol away, one at a time, and see the model find it: `make model-mutations`.

Each mutation replaces one place of the operator, or of the model's workers where the precondition is theirs, in a copy,
and walks through random histories (`test_model.walk`) until an invariant breaks or a request cannot end. One that
survives all of them is a precondition that nothing here needs, and ends the run non-zero.

Defence in depth is kept although another rule stands before it; of these the model is expected to find nothing, of the
first four as the protocol has it:
- attempt compared at Commit, headSeq compared at Commit: mutated below, and expected to survive. What stands before them
  is taken away together with them (`HEAD_SEQ`), or they would hide its loss.
- `If-None-Match` on every object, parent compared at adoption: the store's and the step's, which are not in this model
  (tests/store, tests/worker/test_step.py). Here an attempt that writes where another has written breaks an invariant.
- the request read live, and not ended, at Commit: mutated below, and expected to survive since a result of the current
  attempt stands. While a worker could replace its own, this was the only rule against a success that became a failure.
"""
# ruff: noqa: E501 (places are quoted as they are)

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, MODEL = ROOT / "operator" / "claas_operator", ROOT / "tests" / "operator" / "test_model.py"
WALKS = 4000
LIMIT_SECONDS = 300  # of CPU, for one mutation


class Mutation(NamedTuple):
    """In `file` (of the operator, or the model itself), each `old`, which occurs once there, becomes `new`.

    `survives`: why the model is not expected to find it. `often`: rules that are tried five times as often, where what
    finds it is rare. `never`: rules that are not tried, where they break what is left by themselves, or hide it.
    `hangs`: the kind whose watch hangs, where it takes that one.
    """

    write: str
    what: str
    changes: tuple[tuple[str, str, str], ...]
    survives: str = ""
    often: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    hangs: str = ""


def one(
    write: str,
    what: str,
    file: str,
    old: str,
    new: str,
    survives: str = "",
    often: str = "",
    never: str = "",
    hangs: str = "",
) -> Mutation:
    return Mutation(write, what, ((file, old, new),), survives, tuple(often.split()), tuple(never.split()), hangs)


def without_rv(write: str, action: str, kind: str, often: str = "") -> Mutation:
    """The write of that action goes on whatever has become of the object."""
    entry = kind.lower()
    live = (
        f"            case {'OnAdapter' if kind == 'ADAPTER' else 'OnRequest'}() if type(action).__name__ in {action!r}:\n"
        f"                raw = await self._api.get(Kind.{kind}, action.{entry}.namespace, action.{entry}.name)\n"
        f'                version = int(raw["metadata"]["resourceVersion"]) if raw else 0\n'
        f"                await self._patch(Kind.{kind}, action.{entry}, version, action.status)\n"
    )
    first = "        match action:\n            case Commit():\n"
    return one(
        write, "rv", "apply.py", first, f"        match action:\n{live}            case Commit():\n", often=often
    )


PLAN, APPLY, WORKERS, ADAPTERS, RETENTION, STATUS = (
    f"{name}.py" for name in ("plan", "apply", "workers", "adapters", "retention", "status")
)
THE_MODEL = "test_model.py"
# Where nobody takes locks away by hand, the head cannot move under one.
HEAD_SEQ = (
    (
        PLAN,
        "elif adapter.active == request.uid and adapter.status.head_seq == parent.head_seq:",
        "elif adapter.active == request.uid:",
    ),
    (
        APPLY,
        "if (parent.adapter_uid, parent.head_seq) != (adapter.uid, adapter.status.head_seq):",
        "if parent.adapter_uid != adapter.uid:",
    ),
)
# Why the live read before a Commit finds nothing in this model any more.
STANDS = "defence in depth: what a worker has reported stands, and no End goes over a success"
BUSY = "if adapter.active != request.uid and (adapter.active or not is_first or adapter.rollback):"

LIVE = """        live = await self._live_request(action.request)
        if live.ended is not None or not succeeded(live.result):
            raise Lost("the request has no successful result of its current attempt any more")
"""
# Of an ended request the snapshot keeps no result: what was decided on stands in for it.
ENDED = "live = action.request if live.ended is not None else live\n        "

MUTATIONS = (
    without_rv("Lock", "Lock", "ADAPTER"),
    one(
        "Lock",
        "active is empty",
        PLAN,
        BUSY,
        "if adapter.active != request.uid and (not is_first or adapter.rollback):",
        often="user_cancels user_creates",
    ),
    one(
        "Lock",
        "no rollback waits",
        PLAN,
        BUSY,
        "if adapter.active != request.uid and (adapter.active or not is_first):",
    ),
    one(
        "Lock",
        "no deletion waits",
        PLAN,
        "if adapter.deleting or adapter.status.head_seq == 0 or",
        "if adapter.status.head_seq == 0 or",
    ),
    one(
        *("Lock", "one that was bound before was bound to this adapter", PLAN),
        "if parent is not None and (adapter is None or adapter.uid != parent.adapter_uid):",
        "if parent is not None and adapter is None:",
    ),
    without_rv("Bind", "Bind", "REQUEST"),
    one(
        "Bind",
        "the worker is not Starting or Draining",
        WORKERS,
        "lease.state != names.STATE_READY or pod.deleting",
        "pod.deleting",
    ),
    one(
        "Bind",
        "the attempt never falls",
        PLAN,
        "            attempt = request.status.attempt\n            self._want(request, adapter, is_first, attempt=attempt, but",
        "            attempt = 1\n            self._want(request, adapter, is_first, attempt=attempt, but",
    ),
    one(
        "Bind, Move",
        "never over a claim",
        PLAN,
        "        elif request.claimed:\n",
        "        elif request.claimed and not self._due(request.assigned_at + timedelta(seconds=30)):\n",
    ),
    one(
        "Bind",
        "the adapter's active is this request",
        PLAN,
        "        if adapter is not None and adapter.active != request.uid:\n            self._lock(request, adapter, worker)\n            return True\n",
        "",
    ),
    one(
        "Announce",
        "before the claim",
        THE_MODEL,
        "        worker.running.add(uid)\n        self.show(worker)\n        raw = self.claimable",
        "        raw = self.claimable",
    ),
    one(
        "Claim",
        "tests worker and attempt",
        THE_MODEL,
        'if live is None or (live["status"].get("worker"), live["status"].get("attempt")) != (worker.name, attempt):',
        "if live is None:",
        often="worker_hears time_passes pods_start",
    ),
    one(
        "Claim",
        "no terminal condition",
        THE_MODEL,
        "        if ended(live):\n            return None\n",
        "",
        often="worker_hears worker_claims pods_start leader_turns",
        never="workers_claim",
    ),
    one(
        "Claim",
        "no result of this attempt",
        THE_MODEL,
        '        if (live["status"].get("result") or {}).get("attempt") == attempt:\n            return None\n',
        "",
    ),
    one(
        "Claim",
        "nothing is trained before it",
        THE_MODEL,
        '        raw = self.claimable(worker, uid, seen["status"]["attempt"])\n',
        '        raw = self.claimable(worker, uid, seen["status"]["attempt"]) or seen\n',
    ),
    one(
        "Report",
        "tests worker and attempt",
        THE_MODEL,
        'if raw and (status.get("worker"), status.get("attempt")) == (worker.name, body["attempt"]):',
        "if raw:",
        often="worker_breaks pods_start leader_turns",
        never="workers_succeed all_goes_well",
    ),
    one(
        "Report",
        "a result of the current attempt stands",
        THE_MODEL,
        '            if (status.get("result") or {}).get("attempt") == body["attempt"]:\n                return\n',
        "",
        often="worker_reports_again",
        hangs="LoraAdapter",
    ),
    one(
        "Report",
        "the uid leaves the Lease afterwards",
        THE_MODEL,
        '        worker.training[uid] = (status["attempt"], status["parent"]["uri"], on)\n',
        '        worker.training[uid] = (status["attempt"], status["parent"]["uri"], on)\n        worker.running.discard(uid)\n        self.show(worker)\n',
    ),
    one(
        "Commit",
        "rv",
        APPLY,
        "        await self._patch(Kind.ADAPTER, adapter, adapter.version, action.status)\n\n    async def _free",
        '        raw = await self._api.get(Kind.ADAPTER, adapter.namespace, adapter.name)\n        await self._patch(Kind.ADAPTER, adapter, int(raw["metadata"]["resourceVersion"]) if raw else 0, action.status)\n\n    async def _free',
    ),
    Mutation(
        "Commit",
        "active is this request",
        (
            (
                PLAN,
                "elif adapter.active == request.uid and adapter.status.head_seq == parent.head_seq:",
                "elif adapter.status.head_seq == parent.head_seq:",
            ),
            (
                APPLY,
                '        if adapter.active != live.uid:\n            raise Lost("the adapter is not the request\'s")\n',
                "",
            ),
        ),
        often=("hand_frees", "user_rolls_back"),
    ),
    Mutation(
        "Commit",
        "the request is read live",
        (*HEAD_SEQ, (APPLY, LIVE, LIVE.replace("await self._live_request(action.request)", "action.request"))),
        STANDS,
        often=("hears", "all_goes_well", "watch_hangs"),
        never=("hand_frees",),
    ),
    Mutation(
        "Commit",
        "the request has not ended",
        (*HEAD_SEQ, (APPLY, LIVE, LIVE.replace("if live", f"{ENDED}if live", 1))),
        STANDS,
        often=("hears", "all_goes_well", "watch_hangs"),
        never=("hand_frees",),
    ),
    Mutation(
        "Commit",
        "adapterUid matches",
        (
            (
                APPLY,
                '        if (parent.adapter_uid, parent.head_seq) != (adapter.uid, adapter.status.head_seq):\n            raise Lost("the request trained another head")\n',
                "",
            ),
            (
                PLAN,
                "if parent is not None and (adapter is None or adapter.uid != parent.adapter_uid):",
                "if parent is not None and adapter is None:",
            ),
        ),
    ),
    Mutation(
        "Commit",
        "headSeq matches",
        HEAD_SEQ,
        "defence in depth: the head cannot move under a lock",
        never=("hand_frees",),
    ),
    one(
        "Commit",
        "the attempt is compared",
        APPLY,
        "            or (result.attempt, result.lora_uri) != (decided.attempt, decided.lora_uri)\n",
        "            or False\n",
        "defence in depth: a Bind clears the result, and a Report tests the attempt",
    ),
    one(
        "Commit",
        "no heir while a rollback or deletion waits",
        PLAN,
        "        if adapter.blocked or self._refusal(adapter):\n            return None\n",
        "",
    ),
    without_rv("Complete", "Complete", "REQUEST", often="user_has_the_version hears"),
    one(
        "Complete",
        "the uid is in the history",
        PLAN,
        "            if adapter is not None and request.uid in adapter.committed:\n                self._complete_committed(request, adapter)\n                return\n",
        '            if adapter is not None and (request.uid in adapter.committed or (request.result and request.result.outcome == "Succeeded")):\n                self.first.append(Complete(request=request, status=status.completed(request, adapter.status.uri, adapter.status.version, Reason.SUCCEEDED, self.now)))\n                return\n',
    ),
    without_rv("End otherwise", "End", "REQUEST"),
    one(
        "End otherwise",
        "no successful result of the current attempt",
        PLAN,
        "if result is not None and succeeded(result) and self._is_ours(request, result):",
        "if result is not None and succeeded(result) and not request.cancel and self._is_ours(request, result):",
        often="user_cancels_late",
    ),
    without_rv("Free", "Free", "ADAPTER"),
    one(
        "Free",
        "the request has ended, read live",
        APPLY,
        '            if not isinstance(holder, Request) or holder.ended is None:\n                raise Lost("the request that holds the adapter has not ended")\n',
        "",
        often="user_creates",
        hangs="DistillRequest",
    ),
    one(
        "Free",
        "no living worker's Lease lists it, read live",
        APPLY,
        '            if listed and not await self._pod_is_gone(lease.namespace, lease.name, lease.holder):\n                raise Lost("a living worker still lists the request")\n',
        "",
        often="user_cancels_late",
        hangs="Lease",
    ),
    without_rv("Move, Retry", "Retry", "REQUEST"),
    Mutation(
        "Retry",
        "the claiming worker's Pod is gone",
        (
            (
                PLAN,
                "        if lost(pod_of(request, self.snapshot, self.settings)):\n            self._retry(",
                "        if lost(pod_of(request, self.snapshot, self.settings)) or self._due(request.assigned_at + timedelta(seconds=30)):\n            self._retry(",
            ),
            (
                APPLY,
                '            if not gone and (pod is None or works_for(pod, self._settings)):\n                raise Lost("the claiming worker\'s Pod is there")\n',
                "",
            ),
        ),
    ),
    one(
        "Retry",
        "still no result, read live",
        APPLY,
        '        live = await self._live_request(request)\n        if live.ended is not None or live.result is not None:\n            raise Lost("the request has a result, or has ended")\n',
        "        live = await self._live_request(request)\n",
    ),
    one(
        "Retry",
        "also of a result that was refused",
        PLAN,
        "        elif adapter.status.head_seq > parent.head_seq:\n",
        "        elif False:\n",
    ),
    one(
        "Retry",
        "no result is refused by an adapter of before its binding",
        PLAN,
        "        elif adapter.status.head_seq > parent.head_seq:\n",
        "        elif adapter.status.head_seq != parent.head_seq:\n",
        hangs="LoraAdapter",
    ),
    without_rv("Rollback", "Rollback", "ADAPTER"),
    one(
        "Rollback",
        "active is empty",
        ADAPTERS,
        "    if adapter.active:\n        holder",
        "    if False:\n        holder",
    ),
    one(
        "Rollback",
        "once per change of spec.rollbackTo",
        STATUS,
        '"rollbackAnswered": to.version}',
        '"rollbackAnswered": ""}',
    ),
    one(
        "Rollback",
        "the version is not being collected",
        ADAPTERS,
        "if target is None or asked in adapter.status.collecting:",
        "if target is None:",
    ),
    without_rv("Collect", "Collect", "ADAPTER"),
    one(
        "Collect",
        "never the head, nor what retention keeps",
        RETENTION,
        "kept = {adapter.status.version, adapter.rollback, *recent[: status.keep_last(adapter)]}",
        "kept = {adapter.rollback}",
    ),
    one(
        "Collect",
        "never what a rollback asks for",
        RETENTION,
        "kept = {adapter.status.version, adapter.rollback, ",
        "kept = {adapter.status.version, ",
    ),
    one(
        "Collect",
        "a live re-list before the deletion",
        APPLY,
        '        if any(references.needed(beside(action.root, name), live) for name in action.versions):\n            raise Lost("somebody needs one of the versions")\n',
        "",
        often="user_creates",
    ),
    one(
        "Restore",
        "ends its collection: no tombstone or deletion of it comes into effect",
        THE_MODEL,
        "restored = {uri for uri in versions if (uri, number) in self.restored}",
        "restored: set[str] = set()",
        often="call_hangs kubelet user_has_the_version all_goes_well",
        never="user_recreates_adapter values_change worker_breaks worker_drains user_cancels user_cancels_late"
        " user_deletes leader_dies worker_reports_again",
    ),
    one(
        "Fence",
        "only a Pod seen gone frees what it held",
        APPLY,
        "        return isinstance(pod, Pod) and lost(pod)\n",
        "        return True\n",
        often="user_cancels_late",
        hangs="Lease",
    ),
    one(
        "Second attempts",
        "write under a suffix of their own",
        THE_MODEL,
        'f"{zlib.crc32(uid.encode()):08x}", attempt)\n            assert',
        'f"{zlib.crc32(uid.encode()):08x}", 1)\n            assert',
    ),
    one(
        "History",
        "an entry stays until its request is Complete",
        STATUS,
        "or old.request_uid in keep] + [entry]",
        "or False][:0] + [entry]",
        often="call_hangs leader_dies all_goes_well",
        never="user_rolls_back",  # to what is in no history any more
    ),
    one(
        "A re-created adapter",
        "is another one",
        PLAN,
        "if parent is not None and (adapter is None or adapter.uid != parent.adapter_uid):",
        "if parent is not None and adapter is None:",
    ),
)


def walks(last: int, seconds: float, often: list[str], never: list[str], hangs: str) -> None:
    """The child's part: histories until one breaks. Exit code 1 and what broke, if one does."""
    sys.path.remove(str(MODEL.parent))  # the copy of the model is meant
    import test_model

    for rule in often:
        test_model.WEIGHTS[rule] *= 5
    for rule in never:
        test_model.WEIGHTS[rule] = 0
    if hangs:
        test_model.HANGING = (test_model.Kind(hangs),)
    for seed in range(last):
        try:
            test_model.walk(seed)
        except Exception as error:  # noqa: BLE001 (whatever breaks is what is asked for)
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"{what}, {time.process_time():.0f} s of CPU")
            sys.exit(1)
        if time.process_time() > seconds:
            break
    print(f"{seed + 1} histories, {time.process_time():.0f} s of CPU")


def mutated(mutation: Mutation) -> dict[str, str]:
    """What the changed files hold, by name.

    Raises:
        SystemExit: a place is not there once, as the code is now.
    """
    texts: dict[str, str] = {}
    for file, old, new in mutation.changes:
        text = texts.get(file) or (MODEL if file == THE_MODEL else PACKAGE / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{mutation.write}, {mutation.what}: occurs {text.count(old)} times in {file}: {old}")
        texts[file] = text.replace(old, new)
    return texts


def judge(mutation: Mutation, count: int, seconds: float) -> tuple[bool, str]:
    """Whether the model finds it, and how."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "claas_operator"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(MODEL, folder)
        for file, text in mutated(mutation).items():
            (Path(folder) / file if file == THE_MODEL else package / file).write_text(text)
        # The order of sets is part of a history: what is found is found again.
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT / "tests")]),
        }
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--child",
            "--walks",
            str(count),
            "--seconds",
            str(seconds),
            "--often",
            *mutation.often,
            "--never",
            *mutation.never,
            "--hangs",
            mutation.hangs,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
        if done.returncode not in (0, 1) or not done.stdout:
            raise SystemExit(f"{mutation.write}, {mutation.what}: {done.stderr[-2000:]}")
        return done.returncode == 1, done.stdout.strip().splitlines()[-1][-160:]


def main() -> int:
    """Exit code: 0 if all is as expected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose name has this in it")
    parser.add_argument("--walks", type=int, default=WALKS)
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="of CPU, for one mutation")
    parser.add_argument("--after", type=int, default=0, help="leave the first so many out")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--places", action="store_true", help="only see that the code has every place")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--often", nargs="*", default=[])
    parser.add_argument("--never", nargs="*", default=[])
    parser.add_argument("--hangs", default="")
    given = parser.parse_args()
    if given.child:
        walks(given.walks, given.seconds, given.often, given.never, given.hangs)
        return 0
    chosen = [m for m in MUTATIONS if given.only in f"{m.write}: {m.what}"][given.after :]
    if given.places:
        print(f"{len([mutated(mutation) for mutation in chosen])} mutations have their places")
        return 0
    wrong, begun = 0, time.monotonic()
    with ThreadPoolExecutor(given.jobs) as threads:
        # What is expected to survive takes longest, and goes first.
        chosen.sort(key=lambda mutation: not mutation.survives)
        tries = {threads.submit(judge, mutation, given.walks, given.seconds): mutation for mutation in chosen}
        for count, done in enumerate(as_completed(tries), 1):
            mutation, (found, how) = tries[done], done.result()
            expected = found != bool(mutation.survives)
            wrong += not expected
            word = "found" if found else "survives" if not expected else f"survives ({mutation.survives})"
            so_far = f"{count}/{len(chosen)}, {time.monotonic() - begun:.0f} s"
            what = f"{mutation.write}: {mutation.what}: {word}: {how}"
            print(f"{so_far}: {'ok ' if expected else 'BAD'} {what}", flush=True)
    print(f"{len(chosen)} mutations, {wrong} not as expected, {time.monotonic() - begun:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
