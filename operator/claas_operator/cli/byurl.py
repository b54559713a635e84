"""The REST API as a `Door`: `claas_client`, with its exceptions as problems that name the command's own options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from claas_client import errors
from claas_client.client import Client
from claas_client.models import Adapter, Health, Lineage, Place, Request, Version
from claas_operator.cli.door import Made, NewAdapter, Work
from claas_operator.cli.exits import Exit
from claas_operator.cli.problem import Problem


class UrlDoor:
    """A server at one url."""

    def __init__(self, url: str, *, key: str | None, token: str | None, namespace: str | None) -> None:
        """
        Raises:
            Problem: `url` is none.
        """
        try:
            self._client = Client(url, api_key=key, token=token, namespace=namespace)
        except (ValueError, TypeError) as error:
            raise Problem(f"--url: {error}", "give it as https://HOST[:PORT]", Exit.USAGE) from None
        except Exception as error:  # noqa: BLE001  # httpx.InvalidURL derives from Exception
            raise Problem(f"--url: {error}", "give it as https://HOST[:PORT]", Exit.USAGE) from None
        self.way = self._client.calls.url

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def submit(self, work: Work) -> Request:
        """Asks for a training step; returns when it is accepted."""
        body, lite = (_body_of(work.body), False) if work.manifest else (dict(work.body), work.lite)
        if reserved := {"self", "idempotency_key"} & set(body):
            raise Problem(f"{reserved.pop()}: there is no such field", "see `claas distill --help`", Exit.USAGE)
        send: Any = self._client.submit_lite if lite else self._client.submit
        with _problems():
            accepted: Request = send(idempotency_key=work.key or None, **body).accepted
            return accepted

    def watch(self, id: str, timeout: float | None) -> Iterator[Request]:
        """The request now, and after each of its changes, until it has ended, for `timeout` seconds at most."""
        with _problems():
            for event in self._client.events(id, timeout=timeout):
                yield event.request

    def request(self, id: str) -> Request:
        """The request as it is now."""
        with _problems():
            return self._client.request(id)

    def requests(self, adapter: str | None) -> Iterator[Request]:
        """The namespace's requests, or those of one adapter."""
        with _problems():
            yield from self._client.requests(adapter=adapter)

    def place(self, id: str) -> Place | None:
        """The server's answer has it."""
        return None

    def cancel(self, id: str) -> Request:
        """Asks to stop it."""
        with _problems():
            return self._client.cancel(id)

    def init(self, wanted: NewAdapter, timeout: float | None) -> Made:
        """Makes an adapter, and returns when it has its first version."""
        options: dict[str, Any] = {
            name: value
            for name in ("name", "base_model", "lora_r", "lora_alpha", "init_from")
            if (value := getattr(wanted, name)) is not None
        }
        if wanted.target_modules:
            options["target_modules"] = list(wanted.target_modules)
        with _problems():
            made = self._client.init_lora(wanted.output_uri, timeout=timeout, **options)
            return Made(made.lora_uri, wanted.name)

    def adapter(self, name: str) -> Adapter:
        """The adapter and its head."""
        with _problems():
            return self._client.adapter(name)

    def adapters(self) -> Iterator[Adapter]:
        """The namespace's adapters."""
        with _problems():
            yield from self._client.adapters()

    def versions(self, name: str) -> Iterator[Version]:
        """How the adapter's head moved, newest first."""
        with _problems():
            yield from self._client.versions(name)

    def lineage(self, name: str, version: str | None) -> Lineage:
        """A version and its ancestors."""
        with _problems():
            return self._client.lineage(name, version=version)

    def rollback(self, name: str, version: str, timeout: float | None) -> Adapter:
        """Makes an old version the head, and returns when it is."""
        with _problems():
            return self._client.rollback(name, version, timeout=timeout)

    def health(self) -> Health:
        """Whether a request would be served now, part by part."""
        with _problems():
            return self._client.health()


# Of a DistillRequest's spec, what a body has a word for.
_SAME_WORDS = ("loraUri", "baseModel", "pool", "samples", "training", "teacher", "priority")


def _body_of(manifest: Any) -> dict[str, Any]:
    """A DistillRequest's manifest as a body of /v1/distill.

    Raises:
        Problem: it says something that the REST API has no word for.
    """
    spec = manifest.get("spec") or {}
    if (spec.get("teacher") or {}).get("mode") == "Provided":
        fix = "send a body with teacher_logprobs instead, or use a kubeconfig"
        raise Problem("spec.teacher.mode Provided is not for --url", fix, Exit.USAGE)
    if foreign := sorted(set(spec) - {*_SAME_WORDS, "adapterRef"}):
        raise Problem(f"spec.{foreign[0]} is not for --url", "leave it out, or use a kubeconfig", Exit.USAGE)
    body = {_snake(name): _snake_names(spec[name]) for name in _SAME_WORDS if name in spec}
    if name := (spec.get("adapterRef") or {}).get("name"):
        body["adapter"] = name
    return body


def _snake_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {_snake(name): _snake_names(item) for name, item in value.items()}
    return [_snake_names(item) for item in value] if isinstance(value, list) else value


def _snake(name: str) -> str:
    return {"teacherTopK": "teacher_top_k"}.get(name) or "".join(f"_{c.lower()}" if c.isupper() else c for c in name)


_CODES: dict[type[errors.ProblemError], Exit] = {
    errors.RequestFailed: Exit.REQUEST_FAILED,
    errors.BadRequest: Exit.USAGE,
    errors.Unauthorized: Exit.DENIED,
    errors.Forbidden: Exit.DENIED,
    errors.NotFound: Exit.NOT_FOUND,
    errors.Conflict: Exit.CONFLICT,
    errors.TooManyRequests: Exit.UNREACHABLE,
    errors.ServerProblem: Exit.UNREACHABLE,
}


@contextmanager
def _problems() -> Iterator[None]:
    """The client's exceptions, as this command tells them."""
    try:
        yield
    except errors.ProblemError as error:
        fields = [f"{found.field}: {found.detail}" for found in error.errors]
        said = "\n  ".join(fields) or error.detail or error.title
        fix = error.fix
        if isinstance(error, errors.Unauthorized):
            fix = "give --key or --token (or CLAAS_API_KEY or CLAAS_TOKEN); this one is not accepted"
        if isinstance(error, errors.ServerProblem) and error.request_id:
            fix = f"{fix}; the server's log calls this {error.request_id}".lstrip("; ")
        raise Problem(said, fix, _CODES.get(type(error), Exit.FAILED)) from None
    except errors.WaitTimeout as error:
        raise Problem(str(error), "", Exit.WAIT_ENDED) from None
    except errors.ConnectionFailed as error:
        fix = "is the url right, and the server up? `claas doctor --url …` looks closer"
        if error.idempotency_key:
            fix = f"it may have arrived: send it again with --idempotency-key {error.idempotency_key}, and it runs once"
        raise Problem(str(error), fix, Exit.UNREACHABLE) from None
    except errors.AnswerInvalid as error:
        raise Problem(str(error), "is --url that of a CLaaS server?", Exit.UNREACHABLE) from None
    except ValueError as error:
        raise Problem(str(error), "", Exit.USAGE) from None
