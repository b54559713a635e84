"""The few calls to an API server that starting a cluster takes, with the standard library; and kubeconfig files.

Everything else in the project uses the kubernetes client.
"""

import base64
import http.client
import json
import os
import ssl
import urllib.parse
from pathlib import Path
from typing import Any

from cluster.pki import Pair

TIMEOUT_SECONDS = 10.0


class ApiError(RuntimeError):
    """The API server answered with an error status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Api:
    """An API server at ``url``, as whom a certificate (``identity``) or a ``token`` names."""

    def __init__(self, url: str, authority: Path, identity: Pair | None = None, *, token: str = "") -> None:
        self.url = url
        self._host = urllib.parse.urlsplit(url).netloc
        self._tls = ssl.create_default_context(cafile=str(authority))
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        if identity is not None:
            self._tls.load_cert_chain(identity.certificate, identity.key)

    def __call__(self, method: str, path: str, body: dict[str, Any] | list[Any] | None = None) -> Any:
        """Sends ``body`` as JSON (a PATCH as a merge patch, a list as a JSON Patch) and gives the answer: decoded
        JSON, or text.

        Raises:
            ApiError: the API server said no.
            OSError, http.client.HTTPException: it could not be reached.
        """
        connection = http.client.HTTPSConnection(self._host, timeout=TIMEOUT_SECONDS, context=self._tls)
        try:
            patch = "application/json-patch+json" if isinstance(body, list) else "application/merge-patch+json"
            headers = self._headers | {"Content-Type": patch if method == "PATCH" else "application/json"}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status >= 400:
                raise ApiError(answer.status, text[:2000])
            return json.loads(text) if "json" in (answer.getheader("Content-Type") or "") else text
        finally:
            connection.close()

    def ready(self) -> bool:
        """Whether it serves, with all that it does after its start (bootstrapping RBAC, for one)."""
        return bool(self.get("/readyz") == "ok")

    def get(self, path: str) -> Any:
        """What lies at ``path``; None while it does not exist or the API server does not serve yet."""
        try:
            return self("GET", path)
        except (ApiError, OSError, http.client.HTTPException) as error:
            if isinstance(error, ApiError) and error.code not in (401, 403, 404, 429, 500, 503):
                raise
            return None  # 401, 403, 500: RBAC and the caches are not there yet


def write_kubeconfig(path: Path, url: str, authority: Path, identity: Pair) -> Path:
    """Writes a kubeconfig that holds all it needs, readable by its owner only. JSON is YAML."""

    def inline(file: Path) -> str:
        return base64.b64encode(file.read_bytes()).decode()

    cluster = {"server": url, "certificate-authority-data": inline(authority)}
    user = {"client-certificate-data": inline(identity.certificate), "client-key-data": inline(identity.key)}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "claas",
        "contexts": [{"name": "claas", "context": {"cluster": "claas", "user": "claas"}}],
        "clusters": [{"name": "claas", "cluster": cluster}],
        "users": [{"name": "claas", "user": user}],
    }
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(content, file, indent=1)
    return path
