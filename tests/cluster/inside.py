"""The cluster of two nodes, from inside the namespaces that ``nodes`` makes for it.

    python -m cluster.inside STATE LISTENING_FD     the control plane, the network, and both nodes
    python -m cluster.inside STATE NODE             one node

Both run as process 1 of a process namespace, so killing one ends all that it started, mounts and networks included.
Traps that this avoids, each met once:

* two kubelets on one machine need a cgroup root and a containerd each, or each kills the other's Pods;
* ``ip netns exec`` mounts a new /sys without the cgroups: ``nsenter`` it is;
* without CAP_SYS_RESOURCE no process may lower its OOM score, as every sandbox asks: ``restrict_oom_score_adj``;
* a kubelet refuses a loopback address, and cgroup v1 unless told otherwise.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from cluster import controlplane
from cluster.api import Api, ApiError, write_kubeconfig
from cluster.layout import (
    API_PORT,
    API_URL,
    CLUSTER_LOG,
    ETCD_PORTS,
    GATEWAY,
    GPUS,
    NETWORK_BITS,
    NODES,
    PODS,
    Layout,
    Node,
)
from cluster.pki import Authority, Pair
from cluster.process import ClusterError, kill, run, say, spawn, wait_for
from cluster.programs import PAUSE_IMAGE, PAUSE_TAR

API_SECONDS = 60
CONTAINERD_SECONDS = 60
NODE_SECONDS = 120
IMPORT_SECONDS = 120
CNI_FOLDERS = ["/usr/lib/cni", "/opt/cni/bin"]


def mount(*arguments: str | Path) -> None:
    run(["mount", *arguments], seconds=10)


def ip(arguments: str, node: Node | None = None) -> None:
    """Runs ``ip``, in the node's network where one is given."""
    run(["ip", *(["-n", node.name] if node else []), *arguments.split()], seconds=10)


def allow_routing() -> None:
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")


class Components:
    """The processes that one process 1 has started."""

    def __init__(self, layout: Layout, prefix: str = "") -> None:
        self.layout, self.prefix = layout, prefix
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str | Path], *, log: str = "", fds: Sequence[int] = ()) -> None:
        name = self.prefix + name
        self.running[name] = spawn(command, self.layout.log(log or name), pass_fds=fds)

    def stop(self, name: str) -> None:
        kill([self.running.pop(self.prefix + name)])

    @property
    def logs(self) -> list[Path]:
        return [self.layout.log(name) for name in self.running]

    def watch(self) -> NoReturn:
        """Reaps whatever ends, as process 1 must, and notes which components did."""
        names = {process.pid: name for name, process in self.running.items()}
        while True:
            try:
                pid, status = os.wait()
            except ChildProcessError:  # nothing is left to look after
                sys.exit("every component has ended")
            if name := names.pop(pid, None):
                say(f"{name} ended ({os.waitstatus_to_exitcode(status)})")
                with self.layout.died.open("a") as died:
                    died.write(f"{name}\n")


def proxy_command(layout: Layout, node: Node) -> list[str | Path]:
    """kube-proxy; ``conntrack`` limits are the machine's own business."""
    return [
        *(layout.programs / "kube", "kube-proxy", "--kubeconfig", layout.state / "proxy.kubeconfig"),
        *(
            "--hostname-override",
            node.name,
            "--cluster-cidr",
            PODS,
            "--proxy-mode",
            "iptables",
            "--conntrack-max-per-core",
            "0",
        ),
    ]


def run_cluster(layout: Layout, listening_fd: int) -> NoReturn:
    """Starts the control plane and both nodes, marks the cluster ready, and stays."""
    started = time.monotonic()
    mount("-t", "tmpfs", "tmpfs", "/run")  # names of network namespaces, locks of iptables
    allow_routing()
    ip("link set lo up")
    ip("link add node0 type bridge")
    ip(f"address add {GATEWAY}/{NETWORK_BITS} dev node0")
    ip("link set node0 up")
    ip(f"route add default via {GATEWAY}")

    authority = Authority(layout.state / "pki")
    kube = layout.programs / "kube"
    components = Components(layout)

    def kubeconfig(name: str, user: str) -> Path:
        return write_kubeconfig(
            layout.state / f"{name}.kubeconfig", API_URL, authority.certificate, authority.issue(name, user)
        )

    components.start("etcd", controlplane.etcd_command(kube, layout.state / "etcd", *ETCD_PORTS))
    to_kubelet = authority.issue("to-kubelet", "kubelet-client", groups=["system:masters"])
    api_server = [
        *controlplane.api_server_command(kube, authority, ETCD_PORTS[0], API_PORT, [f"IP:{GATEWAY}"]),
        *("--bind-address", "0.0.0.0", "--advertise-address", GATEWAY, "--endpoint-reconciler-type", "lease"),
        *("--kubelet-preferred-address-types", "InternalIP", "--kubelet-certificate-authority", authority.certificate),
        *("--kubelet-client-certificate", to_kubelet.certificate, "--kubelet-client-key", to_kubelet.key),
    ]
    components.start("kube-apiserver", api_server)
    forward = [sys.executable, "-m", "cluster.forward", str(listening_fd), GATEWAY, str(API_PORT)]
    components.start("forward", forward, fds=[listening_fd])
    kubeconfig("proxy", "system:kube-proxy")
    for node in NODES.values():
        start_node(components, authority, node)

    admin = authority.issue("admin", "admin", groups=["system:masters"])
    api = Api(API_URL, authority.certificate, admin)
    wait_for("the API server", api.ready, API_SECONDS, needs=components.running, logs=components.logs)
    say(f"the API server is ready after {time.monotonic() - started:.1f} s")
    # These give up on an API server that does not answer soon
    manager = kubeconfig("controller-manager", "system:kube-controller-manager")
    components.start("kube-controller-manager", controlplane.controller_manager_command(kube, authority, manager))
    scheduler: list[str | Path] = [
        kube,
        "kube-scheduler",
        "--kubeconfig",
        kubeconfig("scheduler", "system:kube-scheduler"),
    ]
    components.start("kube-scheduler", [*scheduler, "--leader-elect=false", "--secure-port", "0"])
    binding = {
        "metadata": {"name": "kube-proxy"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:kube-proxy"}],
    }
    api("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding)
    # Here too, so that the API server reaches Services (webhooks); it may be called after any node
    components.start("kube-proxy", proxy_command(layout, next(iter(NODES.values()))))
    dns = {"kubernetes cluster.local 10.in-addr.arpa": f"kubeconfig {kubeconfig('dns', 'system:coredns')}"}
    write_corefile(layout.state / "Corefile", dns)
    grant_dns(api)
    components.start("coredns", [layout.programs / "coredns", "-conf", layout.state / "Corefile"])

    for node in NODES.values():
        logs = [layout.log(f"{node.name}-{name}") for name in ("containerd", "kubelet", "kube-proxy")]
        registered, ready = partial(api.get, node_path(node)), partial(node_ready, api, node)
        wait_for(f"node {node.name} to register", registered, NODE_SECONDS, needs=components.running, logs=logs)
        # A resource that no device plugin manages stays as written
        gpus = {"nvidia.com/gpu": GPUS}
        api("PATCH", f"{node_path(node)}/status", {"status": {"capacity": gpus, "allocatable": gpus}})
        wait_for(f"node {node.name} to be Ready", ready, NODE_SECONDS, needs=components.running, logs=logs)
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    wait_for(
        "service account `default`",
        lambda: bool(api.get(account)),
        API_SECONDS,
        needs=components.running,
        logs=components.logs,
    )
    layout.ready.touch()
    say(f"both nodes are Ready after {time.monotonic() - started:.1f} s")
    components.watch()


def node_path(node: Node) -> str:
    return f"/api/v1/nodes/{node.name}"


def node_ready(api: Api, node: Node) -> bool:
    """Whether the node is Ready, has its GPUs and takes Pods."""
    found = api.get(node_path(node))
    if not found:
        return False
    conditions = {condition["type"]: condition["status"] for condition in found["status"].get("conditions", [])}
    gpus = found["status"].get("allocatable", {}).get("nvidia.com/gpu")
    return conditions.get("Ready") == "True" and gpus == GPUS and not found["spec"].get("taints")


def write_corefile(path: Path, plugins: Mapping[str, str]) -> None:
    """CoreDNS for the cluster's own names; there is no other network to ask about."""
    blocks = "".join(f"  {plugin} {{\n    {option}\n  }}\n" for plugin, option in plugins.items())
    path.write_text(f".:53 {{\n  bind {GATEWAY}\n{blocks}  errors\n}}\n")


def grant_dns(api: Api) -> None:
    """Lets CoreDNS read what its kubernetes plugin watches, and no more."""
    rules = [
        {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"}
    user = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:coredns"}
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    api("POST", f"{rbac}/clusterroles", {"metadata": {"name": "system:coredns"}, "rules": rules})
    api(
        "POST",
        f"{rbac}/clusterrolebindings",
        {"metadata": {"name": "system:coredns"}, "roleRef": role, "subjects": [user]},
    )


def start_node(components: Components, authority: Authority, node: Node) -> None:
    """Gives the node a network with routes to every Pod, its certificate, and namespaces in which it starts itself."""
    layout = components.layout
    identity = authority.issue(
        node.name, f"system:node:{node.name}", groups=["system:nodes"], hosts=[f"DNS:{node.name}", f"IP:{node.address}"]
    )
    write_kubeconfig(layout.state / f"{node.name}.kubeconfig", API_URL, authority.certificate, identity)
    ip(f"netns add {node.name}")
    ip(f"link add {node.name} type veth peer name eth0 netns {node.name}")
    ip(f"link set {node.name} master node0 up")
    ip("link set lo up", node)
    ip(f"address add {node.address}/{NETWORK_BITS} dev eth0", node)
    ip("link set eth0 up", node)
    ip(f"route add default via {GATEWAY}", node)
    ip(f"route add {node.pods} via {node.address}")
    namespaces = [
        "nsenter",
        f"--net=/run/netns/{node.name}",
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child=KILL",
    ]
    # Into the log that `up` shows: what a node says is meant for people
    components.start(
        node.name, [*namespaces, sys.executable, "-m", "cluster.inside", layout.state, node.name], log=CLUSTER_LOG
    )


def run_node(layout: Layout, node: Node) -> NoReturn:
    """containerd with the images of earlier runs, then the kubelet and kube-proxy as soon as there is an API server."""
    data = layout.data / node.name
    for folder in ("/run", "/var/lib/cni", "/var/log/containers"):
        mount("-t", "tmpfs", "tmpfs", folder)
    for folder in ("kubelet", "plugins"):
        if (data / folder).exists():
            shutil.rmtree(data / folder)
        (data / folder).mkdir(parents=True)
    mount("--bind", data / "kubelet", "/var/lib/kubelet")
    allow_routing()
    components = Components(layout, f"{node.name}-")
    settings = layout.state / node.name
    settings.mkdir(exist_ok=True)
    start_containerd(components, node)

    pki = layout.state / "pki"
    api = Api(API_URL, pki / "ca.crt", Pair(pki / f"{node.name}.crt", pki / f"{node.name}.key"))
    wait_for("the API server", api.ready, API_SECONDS, needs=components.running, logs=components.logs)
    (settings / "resolv.conf").write_text(f"nameserver {GATEWAY}\n")
    (settings / "kubelet.json").write_text(json.dumps(kubelet_configuration(layout, node), indent=1))
    kubelet: list[str | Path] = [layout.programs / "kube", "kubelet", "--config", settings / "kubelet.json"]
    kubelet += ["--kubeconfig", layout.state / f"{node.name}.kubeconfig", "--hostname-override", node.name]
    components.start(
        "kubelet", [*kubelet, "--node-ip", node.address, "--node-labels", f"nvidia.com/gpu.product={node.product}"]
    )
    components.start("kube-proxy", proxy_command(layout, node))
    components.watch()


def kubelet_configuration(layout: Layout, node: Node) -> dict[str, object]:
    """Of the node's kubelet: its own cgroups, no lower limit on the machine's disk, no swap business."""
    pki = layout.state / "pki"
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "readOnlyPort": 0,
        "tlsCertFile": str(pki / f"{node.name}.crt"),
        "tlsPrivateKeyFile": str(pki / f"{node.name}.key"),
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{layout.cgroup}/{node.name}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "podLogsDir": str(layout.logs / "pods" / node.name),
        "volumePluginDir": str(layout.data / node.name / "plugins"),
        "clusterDomain": "cluster.local",
        "clusterDNS": [GATEWAY],
        "resolvConf": str(layout.state / node.name / "resolv.conf"),
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 99,
        "imageGCLowThresholdPercent": 98,
    }


def start_containerd(components: Components, node: Node) -> None:
    """Starts containerd on the images of earlier runs without their containers; where those are damaged, on nothing."""
    layout = components.layout
    root, settings = layout.data / node.name / "containerd", layout.state / node.name
    write_cni(settings / "cni", node)
    config = settings / "containerd.toml"

    def start(cri: bool) -> None:
        config.write_text(containerd_configuration(root, settings / "cni", cri))
        components.start("containerd", [layout.programs / "containerd", "-c", config])
        wait_for(
            f"containerd on {node.name}", serving, CONTAINERD_SECONDS, needs=components.running, logs=components.logs
        )

    def serving() -> bool:
        return subprocess.run([layout.programs / "ctr", "version"], capture_output=True, timeout=10).returncode == 0

    # First without CRI, which would take up the containers that the last run's end has left
    try:
        start(cri=False)
        remove_containers(layout)
        import_pause(layout)
    except ClusterError as error:
        say(f"node {node.name}: starting without stored images, they are damaged ({str(error).splitlines()[0]})")
        components.stop("containerd")
        shutil.rmtree(root)
        start(cri=False)
        import_pause(layout)
    components.stop("containerd")
    start(cri=True)


def ctr(layout: Layout, *arguments: str | Path, seconds: float = 30) -> str:
    return run([layout.programs / "ctr", "--namespace", "k8s.io", *arguments], seconds=seconds)


def remove_containers(layout: Layout) -> None:
    """Removes what the Pods of the last run have left in containerd's database: nothing of it runs any more."""
    if containers := ctr(layout, "containers", "list", "--quiet").split():
        ctr(layout, "containers", "remove", *containers)
    if sandboxes := [line.split()[0] for line in ctr(layout, "sandboxes", "list").splitlines()[1:]]:
        ctr(layout, "sandboxes", "remove", "--force", *sandboxes)
    for line in ctr(layout, "snapshots", "list").splitlines()[1:]:
        key, kind = line.split()[0], line.split()[-1]
        if kind != "Committed":  # an image being unpacked
            ctr(layout, "snapshots", "remove", key)


def import_pause(layout: Layout) -> None:
    if PAUSE_IMAGE not in ctr(layout, "images", "list", "--quiet").split():
        ctr(layout, "images", "import", layout.programs / PAUSE_TAR, seconds=IMPORT_SECONDS)


def containerd_configuration(root: Path, cni: Path, cri: bool) -> str:
    """containerd's settings; ``cri`` is the interface by which the kubelet runs Pods."""
    disabled = (
        [] if cri else ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
    )
    return f"""\
version = 3
root = "{root}"
state = "/run/containerd"
disabled_plugins = {json.dumps(disabled)}
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE_IMAGE}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = {json.dumps(CNI_FOLDERS)}
    conf_dir = "{cni}"
"""


def write_cni(folder: Path, node: Node) -> None:
    """The Pod network: a bridge per node, no masquerading, because every Pod address has a route back."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": node.pods}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }
    plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
    folder.mkdir(exist_ok=True)
    (folder / "10-pods.conflist").write_text(json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}))


def main(state: str, what: str) -> NoReturn:
    layout = Layout.load(Path(state))
    os.environ["PATH"] = os.pathsep.join(
        [str(layout.programs), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    )  # shim, runc, iptables
    try:
        if what in NODES:
            run_node(layout, NODES[what])
        run_cluster(layout, int(what))
    except (ClusterError, ApiError) as error:
        say(str(error))
        sys.exit(1)  # and with process 1 ends everything


if __name__ == "__main__":
    main(*sys.argv[1:])
