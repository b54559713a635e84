"""The API server for the command: raw JSON by path, each call with a time-out, failures as problems for people.

The kubernetes package serves for kubeconfigs, credentials and TLS; it takes a second to import, so only here, when a
command needs it.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from claas_operator.cli.exits import Exit
from claas_operator.cli.problem import Problem, missing

Object = dict[str, Any]

CALL_SECONDS: Final = (5.0, 30.0)  # to connect, to read
WATCH_SECONDS: Final = 240  # after which the API server ends a watch, and we open the next
PAGE: Final = 500
TRIES: Final = 3
BUSY: Final = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})


class Gone(Exception):
    """The watch cannot go on from its resourceVersion: list again."""


class WatchBroken(Exception):
    """The watch's connection was lost: read again and watch on."""


@dataclass(frozen=True)
class Cluster:
    """Which cluster, as whom and where.

    Attributes:
        kubeconfig: a file; None: KUBECONFIG, ~/.kube/config, or the Pod's service account.
        context: of the kubeconfig; None: its current one.
        namespace: None: the context's.
    """

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str | None = None


class Kube:
    """A connection to one API server."""

    def __init__(self, cluster: Cluster, command: str = "this command") -> None:
        """
        Raises:
            Problem: the kubernetes package is not installed, or no kubeconfig can be used.
        """
        try:
            import urllib3
            from kubernetes import client, config
        except ModuleNotFoundError as error:
            raise missing(error.name, "operator", f"{command} (by kubeconfig)") from None
        self._refused, self._broken = client.ApiException, (urllib3.exceptions.HTTPError, OSError)
        configuration = client.Configuration()
        self.where, self.namespace = _load(config, configuration, cluster)
        configuration.retries = urllib3.Retry(connect=2, read=0, redirect=2, status=0, other=0, backoff_factor=0.2)
        self._client = client.ApiClient(configuration)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def get(self, path: str, **query: str) -> Object:
        """What lies at `path`.

        Raises:
            Problem: nothing does, or the API server refuses or does not answer.
        """
        return self._call("GET", path, query=query)

    def find(self, path: str, **query: str) -> Object | None:
        """What lies at `path`; None when nothing does."""
        return self._call("GET", path, query=query, absent_ok=True) or None

    def list(self, path: str, **query: str) -> Iterator[Object]:
        """Every object of the collection at `path`, page by page."""
        query = {"limit": str(PAGE), **query}
        while True:
            page = self._call("GET", path, query=query)
            yield from page.get("items") or []
            following = (page.get("metadata") or {}).get("continue")
            if not following:
                return
            query["continue"] = following

    def create(self, path: str, body: Object, **query: str) -> Object:
        """Creates an object in the collection at `path`."""
        return self._call("POST", path, body=body, query=query)

    def merge(self, path: str, body: Object) -> Object:
        """A JSON merge patch (RFC 7386)."""
        return self._call("PATCH", path, body=body, headers={"Content-Type": "application/merge-patch+json"})

    def watch(
        self, path: str, field_selector: str, version: str, seconds: float | None = None
    ) -> Iterator[tuple[str, Object]]:
        """(type, object) of each change after the resourceVersion `version`, for so many seconds at most.

        Raises:
            Gone: `version` is too old.
            WatchBroken: the connection was lost.
        """
        limit = WATCH_SECONDS if seconds is None else max(1, min(WATCH_SECONDS, round(seconds)))
        query = {
            "watch": "true",
            "fieldSelector": field_selector,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(limit),
        }
        for line in self._lines(path, query, limit + 15):
            event = json.loads(line)
            if event["type"] == "ERROR":
                if event["object"].get("code") == HTTPStatus.GONE:
                    raise Gone
                raise WatchBroken(str(event["object"].get("reason")))
            yield event["type"], event["object"]

    def lines(self, path: str, query: Mapping[str, str], silence_seconds: float) -> Iterator[str]:
        """The lines of a text that may go on growing, such as a log.

        Raises:
            Problem: it cannot be read.
        """
        try:
            yield from self._lines(path, query, silence_seconds)
        except WatchBroken:
            return

    def _lines(self, path: str, query: Mapping[str, str], silence_seconds: float) -> Iterator[str]:
        response = self._open(path, query, silence_seconds)
        rest = b""
        try:
            for piece in response.stream(amt=None, decode_content=False):
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    if line:
                        yield line.decode("utf-8", "replace")
            if rest:
                yield rest.decode("utf-8", "replace")
        except self._broken as error:
            raise WatchBroken(type(error).__name__) from error
        finally:
            response.close()
            response.release_conn()

    def _open(self, path: str, query: Mapping[str, str], silence_seconds: float) -> Any:
        try:
            return self._client.call_api(
                path,
                "GET",
                query_params=list(query.items()),
                header_params={"Accept": "*/*"},
                response_types_map={},
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=(CALL_SECONDS[0], silence_seconds),
            )
        except self._refused as error:
            if error.status == HTTPStatus.GONE:
                raise Gone from None
            raise self._problem("GET", path, error) from None
        except self._broken as error:
            raise self._silent(error) from None

    def _call(
        self,
        verb: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        headers: Mapping[str, str] | None = None,
        absent_ok: bool = False,
    ) -> Object:
        for left in reversed(range(TRIES)):
            try:
                answer = self._client.call_api(
                    path,
                    verb,
                    query_params=list((query or {}).items()),
                    header_params={"Accept": "application/json", "Content-Type": "application/json", **(headers or {})},
                    body=body,
                    response_types_map={200: "object", 201: "object", 202: "object"},
                    auth_settings=["BearerToken"],
                    _return_http_data_only=True,
                    _request_timeout=CALL_SECONDS,
                )
                return answer if isinstance(answer, dict) else {}
            except self._refused as error:
                if absent_ok and error.status == HTTPStatus.NOT_FOUND:
                    return {}
                # 429 was not begun; the others may have been done.
                again = error.status == HTTPStatus.TOO_MANY_REQUESTS or (verb == "GET" and error.status in BUSY)
                if not again or not left:
                    raise self._problem(verb, path, error) from None
            except self._broken as error:
                if verb != "GET" or not left:
                    raise self._silent(error) from None
            time.sleep(random.uniform(0.1, 0.5) * (TRIES - left))
        raise AssertionError("unreachable")

    def _silent(self, error: Exception) -> Problem:
        return Problem(
            f"no answer from the API server {self.where} ({type(error).__name__})",
            "is the cluster up, and is this the right kubeconfig and context?",
            Exit.UNREACHABLE,
        )

    def _problem(self, verb: str, path: str, error: Any) -> Problem:
        said = _status_message(error)
        match error.status:
            case HTTPStatus.UNAUTHORIZED:
                fix = "log in again: the API server does not accept the credentials of this kubeconfig"
                return Problem("the API server does not know who you are", fix, Exit.DENIED)
            case HTTPStatus.FORBIDDEN:
                fix = "ask for a role there; whoever has `edit` in a namespace may use its adapters and requests"
                return Problem(said or f"you may not {verb} {path}", fix, Exit.DENIED)
            case HTTPStatus.NOT_FOUND:
                if "the server could not find the requested resource" in said or not said:
                    fix = "install CLaaS (`claas deploy`), or the kinds alone: `claas crds | kubectl apply -f -`"
                    return Problem(f"the API server {self.where} serves no {path}", fix, Exit.NOT_FOUND)
                return Problem(said, "", Exit.NOT_FOUND)
            case HTTPStatus.CONFLICT:
                return Problem(said, "", Exit.CONFLICT)
            case HTTPStatus.BAD_REQUEST | HTTPStatus.UNPROCESSABLE_ENTITY:
                return Problem(said, "", Exit.USAGE)
            case HTTPStatus.TOO_MANY_REQUESTS | HTTPStatus.SERVICE_UNAVAILABLE | HTTPStatus.GATEWAY_TIMEOUT:
                return Problem(f"the API server is busy: {said}", "try again in a moment", Exit.UNREACHABLE)
        return Problem(f"the API server answers HTTP {error.status} to {verb} {path}: {said}")


def _load(config: Any, configuration: Any, cluster: Cluster) -> tuple[str, str]:
    """The API server's url and the namespace, with `configuration` filled in."""
    import yaml

    inside = os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG")
    if inside and not cluster.kubeconfig and not os.path.exists(os.path.expanduser("~/.kube/config")):
        config.load_incluster_config(client_configuration=configuration)
        file = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
        with open(file, encoding="utf-8") as text:
            return configuration.host, cluster.namespace or text.read().strip()
    fix = (
        "name one with --kubeconfig or KUBECONFIG, or use the REST API with --url and --key (or --token); "
        "`claas doctor` checks an installation"
    )
    try:
        config.load_kube_config(cluster.kubeconfig, cluster.context, client_configuration=configuration)
        _, active = config.list_kube_config_contexts(cluster.kubeconfig)
        contexts = {found["name"]: found for found in config.list_kube_config_contexts(cluster.kubeconfig)[0]}
        chosen = contexts.get(cluster.context, active) if cluster.context else active
    except config.ConfigException as error:
        raise Problem(f"no kubeconfig can be used: {error}", fix, Exit.USAGE) from None
    except OSError as error:
        raise Problem(f"the kubeconfig cannot be read: {error}", fix, Exit.USAGE) from None
    except (TypeError, KeyError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise Problem(f"the kubeconfig is not one ({type(error).__name__})", fix, Exit.USAGE) from None
    namespace = (chosen or {}).get("context", {}).get("namespace") or "default"
    return configuration.host, cluster.namespace or namespace


def _status_message(error: Any) -> str:
    """The API server's own words, from a metav1.Status."""
    try:
        said = json.loads(error.body or "").get("message", "")
    except (ValueError, AttributeError, TypeError):
        return str(error.reason or "")
    return str(said)
