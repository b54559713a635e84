"""kubectl and helm as a user types them, with limits and errors that show what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Object = dict[str, Any]


class CommandFailed(RuntimeError):
    """A kubectl or helm command failed; the message is its own."""


class Kubectl:
    """A cluster seen through its command-line tools."""

    def __init__(self, kubeconfig: Path, tools: Path) -> None:
        self.kubeconfig = kubeconfig
        self.env = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "PATH": f"{tools}:{os.environ['PATH']}",
            "KUBECACHEDIR": f"{kubeconfig}.cache",
        }

    def run(self, *command: str, stdin: str | None = None, seconds: float = 60) -> str:
        """Run any command with KUBECONFIG set; returns stdout.

        Raises:
            CommandFailed: it exited non-zero, or took longer than `seconds`.
        """
        try:
            done = subprocess.run(
                command, input=stdin, env=self.env, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"{' '.join(command)}: no end after {seconds:.0f} s") from None
        if done.returncode:
            raise CommandFailed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def __call__(self, *args: str, stdin: str | None = None, seconds: float = 60) -> str:
        """`kubectl ARGS`."""
        return self.run("kubectl", *args, stdin=stdin, seconds=seconds)

    def helm(self, *args: str, seconds: float = 300) -> str:
        """`helm ARGS`."""
        return self.run("helm", *args, seconds=seconds)

    def get(self, *args: str) -> Any:
        """`kubectl get ARGS -o json`, parsed; for a list, its items."""
        found = json.loads(self("get", *args, "-o", "json"))
        return found["items"] if found["kind"] == "List" else found

    def apply(self, *objects: Object, namespace: str | None = None) -> str:
        """`kubectl apply` of objects."""
        where = ["-n", namespace] if namespace else []
        return self(
            "apply", *where, "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        )

    def wait(self, what: str, condition: str, *, namespace: str, seconds: float) -> float:
        """`kubectl wait WHAT --for=CONDITION`; returns the seconds it took."""
        started = time.monotonic()
        self("wait", what, f"--for={condition}", "-n", namespace, f"--timeout={seconds:.0f}s", seconds=seconds + 10)
        return time.monotonic() - started

    @contextmanager
    def background(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        """A command that runs until the block ends."""
        process = subprocess.Popen(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def follow(self, what: str, *, namespace: str, seconds: float) -> Iterator[Object]:
        """The states of one object as `kubectl get -w` shows them, until the caller stops or `seconds` pass."""
        decoder, text = json.JSONDecoder(), ""
        command = ["kubectl", "get", what, "-n", namespace, "-w", "-o", "json", f"--request-timeout={seconds:.0f}s"]
        with self.background(*command) as process:
            assert process.stdout is not None
            for line in process.stdout:
                text += line
                if line.startswith("}"):
                    value, _ = decoder.raw_decode(text)
                    text = ""
                    yield value
            raise CommandFailed(f"{' '.join(command)} ended: {text.strip()}")

    @contextmanager
    def forwarded(self, service: str, port: int, *, namespace: str) -> Iterator[int]:
        """A local port that leads to `service`; the block runs once it listens."""
        with self.background("kubectl", "-n", namespace, "port-forward", f"svc/{service}", f":{port}") as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("Forwarding from 127.0.0.1:"):
                raise CommandFailed(f"port-forward to {service}: {line.strip()}")
            yield int(line.split("127.0.0.1:")[1].split(" ")[0])


def condition(obj: Object, kind: str) -> Object:
    """The condition of that type, or {}."""
    return next((c for c in obj.get("status", {}).get("conditions", []) if c["type"] == kind), {})
