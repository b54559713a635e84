"""The cluster of two nodes, as the host sees it: start or reuse it, end it, look into it, bring it images.

Nodes ``l40s`` and ``a100`` each have containerd, kubelet, kube-proxy, a network, mounts, processes and cgroups of their
own. The whole cluster lives in one process namespace: one SIGKILL of its first process leaves no process, mount or
network; the cgroups, which outlive it, are swept at the next ``up`` or ``down``. It reaches nothing outside, and is
reached only through the API server, which a forwarder serves on a loopback port of the host.

Runs on machines with cgroup version 1. Version 2 is provided for, but has not been tried.
"""

import fcntl
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import programs
from cluster.api import Api, write_kubeconfig
from cluster.inside import node_ready
from cluster.layout import CLUSTER_LOG, MASKED, NODES, Layout
from cluster.pki import Authority
from cluster.process import POLL_SECONDS, ClusterError, file_lock, run, say, tails, try_lock, wait_for

UP_SECONDS = 300
END_SECONDS = 30
LOAD_SECONDS = 900
REF_NAME = "org.opencontainers.image.ref.name"

CGROUPS = Path("/sys/fs/cgroup")
KUBELET_SYSCTLS = {  # what a kubelet sets, for the whole machine
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up.

    Attributes:
        kubeconfig: of a cluster admin, good on the host.
        tools: a folder with the matching kubectl and helm.
        state: its files; the logs are in ``state/log``.
    """

    kubeconfig: Path
    tools: Path
    state: Path


def up() -> Cluster:
    """Starts the cluster, or reuses the healthy one that runs.

    Raises:
        ClusterError: what was waited for in vain, with the log of the part that failed.
    """
    _require_root()
    have = programs.ensure()
    layout = Layout.default(have.node)
    with _lock(layout):
        if problem := _problem(layout):
            if running := _top(layout):
                say(
                    f"the cluster that runs is of no use ({problem}): process {running[0]} and all of it end, "
                    "and a new one starts"
                )
            _clear(layout)
            _start(layout)
        else:
            say("the cluster is up already")
    return Cluster(layout.kubeconfig, have.tools, layout.state)


def down(*, images_too: bool = False) -> None:
    """Ends the cluster and leaves nothing but its logs, and in the cache the nodes' images unless ``images_too``."""
    _require_root()
    layout = Layout.default()
    with _lock(layout):
        _clear(layout)
        if images_too and layout.data.exists():
            shutil.rmtree(layout.data)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise ClusterError(
            "the cluster of two nodes needs root (namespaces, mounts, cgroups); "
            "to use another cluster instead, set KUBECONFIG"
        )


def _lock(layout: Layout) -> AbstractContextManager[int]:
    """One for all clusters of the cache: a lock file per cluster would stay behind when the cluster is forgotten."""
    return file_lock(layout.data.parent / "nodes.lock", "starts or ends a cluster", UP_SECONDS + END_SECONDS)


def _problem(layout: Layout) -> str | None:
    """Why the cluster in ``layout.state`` cannot be used; None when it can."""
    if not _top(layout):
        return "it is not running"
    if not layout.ready.exists():
        return "its start was not finished"
    if Layout.load(layout.state).programs != layout.programs:
        return "it runs other versions"
    if layout.died.exists():
        return f"these have ended: {', '.join(layout.died.read_text().split())}"
    api = _api(layout)
    if not api.ready():
        return "its API server does not answer"
    if unready := [node.name for node in NODES.values() if not node_ready(api, node)]:
        return f"not Ready: {', '.join(unready)}"
    return None


def _api(layout: Layout) -> Api:
    url = json.loads(layout.kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
    authority = Authority(layout.state / "pki")
    return Api(url, authority.certificate, authority.issue("admin", "admin", groups=["system:masters"]))


def _start(layout: Layout) -> None:
    layout.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if layout.logs.exists():
        shutil.rmtree(layout.logs)
    layout.logs.mkdir()
    layout.data.mkdir(parents=True, exist_ok=True)
    layout.save()
    guard = _prepare_machine(layout)
    listening = socket.create_server(("127.0.0.1", 0))  # here, so that it belongs to the host's network
    authority = Authority(layout.state / "pki")
    admin = authority.issue("admin", "admin", groups=["system:masters"])
    write_kubeconfig(layout.kubeconfig, f"https://127.0.0.1:{listening.getsockname()[1]}", authority.certificate, admin)

    unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
    with layout.log(CLUSTER_LOG).open("ab") as log, listening:
        process = subprocess.Popen(
            [*unshare, *_command(layout), str(listening.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[listening.fileno(), guard],
            start_new_session=True,  # a Ctrl-C is for `up`, which then ends it
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
    os.close(guard)
    try:
        _follow(layout, process)
    except BaseException:
        _end(layout)
        raise


def _command(layout: Layout) -> list[str]:
    return [sys.executable, "-m", "cluster.inside", str(layout.state)]


def _follow(layout: Layout, process: subprocess.Popen[bytes]) -> None:
    """Repeats what the cluster says of itself until it is ready."""
    end = time.monotonic() + UP_SECONDS
    with layout.log(CLUSTER_LOG).open(errors="replace") as said:
        while True:
            ready, ended = layout.ready.exists(), process.poll() is not None
            sys.stderr.write(said.read())
            sys.stderr.flush()
            if ready:
                return
            if ended:
                raise ClusterError(f"the cluster ended while it started; its logs are in {layout.logs}")
            if time.monotonic() > end:
                raise ClusterError(f"the cluster was not ready after {UP_SECONDS} s{tails([layout.log(CLUSTER_LOG)])}")
            time.sleep(POLL_SECONDS)


def _clear(layout: Layout) -> None:
    """Ends whatever runs in ``layout``, removes all that it leaves on the machine, and its files but the logs."""
    _end(layout)
    wait_for(f"the cgroups {layout.cgroup} to be empty", lambda: _sweep_cgroups(layout.cgroup), END_SECONDS)
    _restore_machine(layout)
    if layout.data.exists():
        for leftover in [*layout.data.glob("*/kubelet"), *layout.data.glob("*/plugins")]:
            shutil.rmtree(leftover)
    if layout.state.exists():
        for entry in layout.state.iterdir():
            if entry != layout.logs:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _end(layout: Layout) -> None:
    """Kills the cluster's first process, and returns when nothing of the cluster runs any more."""
    top = [os.pidfd_open(pid) for pid in _top(layout)]
    try:
        for descriptor in top:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        # Process 1 of a process namespace is gone only after all others in it are
        end = time.monotonic() + END_SECONDS
        for descriptor in top:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                raise ClusterError(
                    f"waited {END_SECONDS} s for the processes of the cluster in {layout.state} to end, in vain"
                )
    finally:
        for descriptor in top:
            os.close(descriptor)


def _top(layout: Layout) -> list[int]:
    """The cluster's first process: `unshare`, and process 1 of the namespace that it made."""
    return [pid for pid, command in _commands() if _is_inside(command, layout.state) and command[-1].isdigit()]


def _node_process(layout: Layout, node: str) -> int:
    """Process 1 of a node, as the host counts.

    Raises:
        ClusterError: there is none.
    """
    for pid, command in _commands():
        if _is_inside(command, layout.state) and command[-1] == node and len(command) == 5:  # not nsenter or unshare
            return pid
    raise ClusterError(f"node {node} does not run (nodes: {', '.join(NODES)}; start them: python -m cluster up)")


def _is_inside(command: Sequence[str], state: Path) -> bool:
    return command[-4:-1] == ["-m", "cluster.inside", str(state)]


def _commands() -> list[tuple[int, list[str]]]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
                found.append((int(folder.name), (folder / "cmdline").read_text(errors="replace").split("\0")[:-1]))
    return sorted(found)


def _cgroup_roots() -> list[Path]:
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]  # version 2
    return [
        path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()
    ]  # version 1: one per controller


def _sweep_cgroups(name: str) -> bool:
    """Removes the cgroups of the cluster as far as nothing is in them; whether all are gone."""
    groups = [root / name for root in _cgroup_roots()]
    for group in groups:
        for folder, _, _ in os.walk(group, topdown=False):
            try:
                os.rmdir(folder)
            except OSError:
                return False  # the kernel has not yet buried its last process
    return not any(group.exists() for group in groups)


def _prepare_machine(layout: Layout) -> int:
    """Makes what must exist on the machine itself, and notes what ``_restore_machine`` has to undo.

    Returns:
        A file descriptor that the cluster must hold for as long as it uses the folders that are common to all clusters.
    """
    for root in _cgroup_roots():
        for group in (root / layout.cgroup, *(root / layout.cgroup / node for node in NODES)):
            group.mkdir()
        if root == CGROUPS:  # version 2 hands controllers down only when told to
            available = (root / "cgroup.controllers").read_text().split()
            for group in (root, root / layout.cgroup, *(root / layout.cgroup / node for node in NODES)):
                (group / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in available))
    created = [path for path in MASKED if not Path(path).exists()]
    sysctls = {}
    for name, value in KUBELET_SYSCTLS.items():
        before = Path("/proc/sys", name).read_text().strip()
        if before != value:
            sysctls[name] = before
    (layout.state / "machine.json").write_text(json.dumps({"created": created, "sysctls": sysctls}))
    for path in created:
        Path(path).mkdir(parents=True)
    guard = os.open(_guarded(), os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(guard, fcntl.LOCK_SH)
    return guard


def _restore_machine(layout: Layout) -> None:
    noted = layout.state / "machine.json"
    if not noted.exists():
        return
    undo = json.loads(noted.read_text())
    for name, value in undo["sysctls"].items():
        Path("/proc/sys", name).write_text(value + "\n")
    # Removing a folder would also unmount what another cluster has mounted over it
    guard = os.open(_guarded(), os.O_RDONLY) if Path(_guarded()).exists() else None
    if guard is None or try_lock(guard):
        for path in undo["created"]:
            if Path(path).is_dir() and not any(Path(path).iterdir()):
                Path(path).rmdir()
    if guard is not None:
        os.close(guard)


def _guarded() -> str:
    return "/var/lib/kubelet"


def enter(node: str) -> list[str]:
    """The command prefix that runs a program on ``node``: in its mounts, network and processes."""
    return ["nsenter", f"--target={_node_process(Layout.default(), node)}", "--mount", "--net", "--pid", "--"]


def load(image: Path, nodes: Sequence[str]) -> None:
    """Imports an image archive on each of ``nodes`` that does not have exactly that image yet, on all at once.

    Args:
        image: a Docker archive (``images.export`` writes one) or an OCI archive.

    Raises:
        ClusterError: it is no image archive, a node does not run, or a node refused the image.
    """
    wanted = archive_ids(image)
    with ThreadPoolExecutor() as pool:
        for imported in pool.map(functools.partial(_load, image, wanted), nodes):
            say(imported)


def _load(image: Path, wanted: Mapping[str, str], node: str) -> str:
    names, started = ", ".join(wanted), time.monotonic()
    ctr = [*enter(node), str(Layout.load(Layout.default().state).programs / "ctr"), "--namespace", "k8s.io", "images"]
    rows = [line.split() for line in run([*ctr, "list"], seconds=30).splitlines()[1:]]
    there = {row[0]: row[2] for row in rows if len(row) > 2}  # name -> manifest; the CRI plugin adds the id as a name
    if all(name in there and there[name] == there.get(wanted_id) for name, wanted_id in wanted.items()):
        return f"{node} has {names} already"
    with image.open("rb") as archive:  # by stdin: the node may not see the file's folder
        done = subprocess.run(
            [*ctr, "import", "-"], stdin=archive, capture_output=True, text=True, timeout=LOAD_SECONDS
        )
    if done.returncode:
        raise ClusterError(f"node {node} refused {image}: {done.stderr.strip()[-1000:]}")
    return f"imported {names} on {node} in {time.monotonic() - started:.1f} s"


def archive_ids(archive: Path) -> dict[str, str]:
    """Image name -> image id (``sha256:…`` of its configuration) of a Docker or an OCI archive.

    Raises:
        ClusterError: it is none, or names no image.
    """

    def read(name: str) -> Any:
        member = files.extractfile(name)
        assert member is not None, f"{name} is a folder"
        return json.load(member)

    ids: dict[str, str] = {}
    try:
        with tarfile.open(archive) as files:
            if "index.json" in files.getnames():
                for entry in read("index.json")["manifests"]:
                    if name := entry.get("annotations", {}).get(REF_NAME):
                        ids[name] = read("blobs/" + entry["digest"].replace(":", "/"))["config"]["digest"]
            else:
                for entry in read("manifest.json"):
                    ids.update(dict.fromkeys(entry["RepoTags"] or [], "sha256:" + Path(entry["Config"]).stem))
    except (tarfile.TarError, OSError, KeyError) as error:
        raise ClusterError(f"{archive} is no image archive: {error}") from None
    if not ids:
        raise ClusterError(f"{archive} names no image: give it one when you export it")
    return ids


def status() -> str:
    """What runs, in words, a line each."""
    layout = Layout.default()
    running = _top(layout)
    if not running:
        return f"down ({layout.state})"
    saved = Layout.load(layout.state)
    problem = _problem(saved)
    lines = [
        f"{'up' if problem is None else 'up, but ' + problem} ({layout.state})",
        f"process   {running[0]} (kill it, and everything ends)",
        f"programs  {saved.programs}",
        f"memory    {_memory_bytes(running[0]) >> 20} MB in all its processes, shared pages counted once",
        f"images    {layout.data}",
        f"logs      {layout.logs}",
    ]
    return "\n".join(lines)


def _memory_bytes(top: int) -> int:
    """Proportional set size of a process and all its descendants."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    total = 0
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != top:
            ancestor = parents[ancestor]
        if ancestor == top:
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total
