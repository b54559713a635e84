"""The resources themselves as a `Door`: what kubectl would do, with the REST API's models (`shim.spec` translates)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import ValidationError

from claas_client.models import Adapter, Health, Lineage, Place, Request, Version
from claas_crds import names
from claas_crds.adapter import LoraAdapterStatus
from claas_crds.model import explain
from claas_crds.reasons import ConditionType
from claas_crds.request import DistillRequestSpec
from claas_operator import queueing, snapshot
from claas_operator.cli import installation
from claas_operator.cli.door import Made, NewAdapter, Work
from claas_operator.cli.exits import Exit
from claas_operator.cli.kube import Gone, Kube, Object, WatchBroken
from claas_operator.cli.problem import Problem
from claas_operator.shim import models, spec
from claas_operator.shim.settings import ShimSettings
from claas_store import uris
from claas_store.errors import UriInvalid

GROUP: Final = f"/apis/{names.API_VERSION}"
RECONNECTS: Final = 8
CREATE_TRIES: Final = 3


class ClusterDoor:
    """One namespace of one cluster."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self.way = f"the cluster at {kube.where}, namespace {kube.namespace}"

    def close(self) -> None:
        """Closes the connections."""
        self._kube.close()

    # Requests

    def submit(self, work: Work) -> Request:
        """Asks for a training step; returns when it is accepted."""
        manifest = dict(work.body) if work.manifest else _manifest_of(work)
        _validated(manifest)
        metadata = dict(manifest.get("metadata") or {})
        if (elsewhere := metadata.get("namespace")) not in (None, self._kube.namespace):
            fix = f"add -n {elsewhere}, or take metadata.namespace out"
            said = f"metadata.namespace is {elsewhere}, and -n or the context says {self._kube.namespace}"
            raise Problem(said, fix, Exit.USAGE)
        if work.key:
            metadata["name"] = f"cli-{hashlib.sha256(work.key.encode()).hexdigest()[:40]}"
        elif not metadata.get("name"):
            # Named here, so that a creation whose answer was lost is found again, and not made twice.
            stem = metadata.get("generateName") or f"{_stem(manifest['spec'])}-"
            metadata["name"] = f"{stem}{secrets.token_hex(4)}"
        metadata.pop("generateName", None)
        return _request(self._create(names.REQUEST_PLURAL, {**manifest, "metadata": metadata}, again=bool(work.key)))

    def watch(self, id: str, timeout: float | None) -> Iterator[Request]:
        """The request now, and after each of its changes, until it has ended."""
        uid = None
        for raw in self._until(names.REQUEST_PLURAL, id, timeout):
            if uid not in (None, raw["metadata"]["uid"]):
                raise Problem(f"request {id} was deleted while it was waited for", "", Exit.NOT_FOUND)
            uid = raw["metadata"]["uid"]
            yield (request := _request(raw))
            if request.ended:
                return
        raise Problem(f"request {id} has not ended within {timeout:g} s; it goes on", "", Exit.WAIT_ENDED)

    def request(self, id: str) -> Request:
        """The request as it is now."""
        return _request(self._get(names.REQUEST_PLURAL, id))

    def uid_of(self, id: str) -> str:
        """What logs call the request."""
        return str(self._get(names.REQUEST_PLURAL, id)["metadata"]["uid"])

    def requests(self, adapter: str | None) -> Iterator[Request]:
        """The namespace's requests, or those of one adapter."""
        for raw in self._list(names.REQUEST_PLURAL):
            if adapter in (None, (raw["spec"].get("adapterRef") or {}).get("name")):
                yield _request(raw)

    def place(self, id: str) -> Place | None:
        """Where a pending request stands: among all namespaces' where those may be read, else among its own's."""
        now = datetime.now(UTC)
        mine = self._parsed([self._get(names.REQUEST_PLURAL, id)], now)
        if not mine or mine[0].ended is not None:
            return None
        note = ""
        try:
            everyone = self._parsed(self._kube.list(f"{GROUP}/{names.REQUEST_PLURAL}"), now)
        except Problem as problem:
            if problem.code is not Exit.DENIED:
                raise
            everyone = self._parsed(self._list(names.REQUEST_PLURAL), now)
            note = "among this namespace's requests; those of others are not seen"
        found = queueing.place(mine[0], everyone, now)
        return Place.model_validate(spec.to_place(found, note).model_dump())

    @staticmethod
    def _parsed(raws: Iterable[Object], now: datetime) -> list[snapshot.Request]:
        """As the operator's planner sees them; what cannot be parsed is in nobody's way."""
        found = []
        for raw in raws:
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                entry = snapshot.parse(snapshot.Kind.REQUEST, raw, now)
                if isinstance(entry, snapshot.Request):
                    found.append(entry)
        return found

    def cancel(self, id: str) -> Request:
        """Sets spec.cancel."""
        return _request(self._kube.merge(self._path(names.REQUEST_PLURAL, id), {"spec": {"cancel": True}}))

    # Adapters

    def init(self, wanted: NewAdapter, timeout: float | None) -> Made:
        """Makes a LoraAdapter, and returns when it has its first version. The same again is the same adapter."""
        try:
            body = models.InitBody.model_validate(
                {
                    "output_uri": wanted.output_uri,
                    "name": wanted.name,
                    "base_model": wanted.base_model or self._default_base_model(),
                    "lora_r": wanted.lora_r,
                    "lora_alpha": wanted.lora_alpha,
                    "target_modules": list(wanted.target_modules) or None,
                    "init_from": wanted.init_from,
                }
            )
            manifest = spec.adapter_object(body, _NO_SETTINGS)
        except ValidationError as error:
            raise Problem(_explain_options(error), "", Exit.USAGE) from None
        except UriInvalid as error:
            raise Problem(f"--output-uri: {error}", "", Exit.USAGE) from None
        name = manifest["metadata"]["name"]
        del manifest["metadata"]["labels"]
        raw = self._create(names.ADAPTER_PLURAL, manifest, again=True)
        if not spec.same_adapter(manifest, raw):
            fix = f"`claas get adapter {name}` shows it; choose another --name"
            raise Problem(f"there is an adapter {name} already, and it is another one", fix, Exit.CONFLICT)
        for seen in self._until(names.ADAPTER_PLURAL, name, timeout):
            adapter = _adapter(seen)
            if adapter.lora_uri:
                return Made(adapter.lora_uri, name)
            if (why := spec.unmade(seen)) is not None:
                fix = f"kubectl delete la {name}; then again with what is right"
                raise Problem(f"{name}: {why.get('reason')}: {why.get('message')}", fix, Exit.REQUEST_FAILED)
        raise Problem(f"adapter {name} has no version yet; it goes on", f"claas get adapter {name}", Exit.WAIT_ENDED)

    def adapter(self, name: str) -> Adapter:
        """The adapter and its head."""
        return _adapter(self._get(names.ADAPTER_PLURAL, name))

    def adapters(self) -> Iterator[Adapter]:
        """The namespace's adapters."""
        for raw in self._list(names.ADAPTER_PLURAL):
            yield _adapter(raw)

    def versions(self, name: str) -> Iterator[Version]:
        """How the adapter's head moved, newest first."""
        status = _status(self._get(names.ADAPTER_PLURAL, name))
        for entry in reversed(status.history):
            yield Version.model_validate(spec.to_version(entry, status.version).model_dump())

    def lineage(self, name: str, version: str | None) -> Lineage:
        """A version and its ancestors."""
        found = spec.lineage(self._get(names.ADAPTER_PLURAL, name), version)
        if found is None:
            fix = f"`claas get versions {name}` lists them"
            raise Problem(f"adapter {name} has no version {version}", fix, Exit.NOT_FOUND)
        return Lineage.model_validate(found.model_dump())

    def rollback(self, name: str, version: str, timeout: float | None) -> Adapter:
        """Sets spec.rollbackTo, and returns when the head has moved."""
        raw = self._get(names.ADAPTER_PLURAL, name)
        status = _status(raw)
        if version not in [entry.version for entry in status.history]:
            fix = f"`claas get versions {name}` lists them"
            raise Problem(f"adapter {name} has no version {version}", fix, Exit.NOT_FOUND)
        if version in status.collecting:
            raise Problem(f"version {version} is being collected", "choose a newer one", Exit.CONFLICT)
        if status.version == version and raw["spec"].get("rollbackTo") in (None, version):
            return _adapter(raw)
        path = self._path(names.ADAPTER_PLURAL, name)
        end = None if timeout is None else time.monotonic() + timeout
        if raw["spec"].get("rollbackTo") == version:
            # Asked for before: each change of the field counts once, so it is taken back first, and that is noticed.
            self._kube.merge(path, {"spec": {"rollbackTo": None}})
            for seen in self._until(names.ADAPTER_PLURAL, name, _left(end)):
                if not _status(seen).rollback_answered:
                    break
        generation = self._kube.merge(path, {"spec": {"rollbackTo": version}})["metadata"]["generation"]
        for seen in self._until(names.ADAPTER_PLURAL, name, _left(end)):
            status = _status(seen)
            if status.rolled_back_generation >= generation:
                return _adapter(seen)
            if status.rollback_answered == version and status.observed_generation >= generation:
                told = next((c for c in status.conditions if c.type == ConditionType.ROLLED_BACK), None)
                said = f"{told.reason}: {told.message}" if told else "the operator has refused it"
                raise Problem(f"adapter {name} does not go back: {said}", "", Exit.CONFLICT)
        fix = f"a request holds the adapter, or no operator runs: claas get adapter {name}; claas health"
        raise Problem(f"adapter {name} has not gone back yet; it goes on", fix, Exit.WAIT_ENDED)

    def health(self) -> Health:
        """Whether a request would be served now, part by part."""
        return installation.health(self._kube, installation.the_release(self._kube))

    # The API server

    def _path(self, plural: str, name: str = "") -> str:
        base = f"{GROUP}/namespaces/{self._kube.namespace}/{plural}"
        if name and not _OBJECT_NAME.fullmatch(name):
            fix = "names have small letters, digits, '-' and '.'"
            raise Problem(f"{name!r} is not a name of an object", fix, Exit.USAGE)
        return f"{base}/{name}" if name else base

    def _get(self, plural: str, name: str) -> Object:
        return self._kube.get(self._path(plural, name))

    def _list(self, plural: str) -> Iterator[Object]:
        return self._kube.list(self._path(plural))

    def _create(self, plural: str, manifest: Object, *, again: bool) -> Object:
        """Creates it. `again`: one of this name may be there already, and is then given.

        A creation whose answer was lost is sent again: the name is this command's own, and tells whether it arrived.
        """
        for left in reversed(range(CREATE_TRIES)):
            try:
                return self._kube.create(self._path(plural), manifest, fieldValidation="Strict")
            except Problem as problem:
                if problem.code is Exit.UNREACHABLE and left:
                    again = True
                elif problem.code is not Exit.CONFLICT or not again:
                    raise
                else:
                    break
        found = self._get(plural, manifest["metadata"]["name"])
        if plural == names.REQUEST_PLURAL and not _same_request(manifest["spec"], found["spec"]):
            raise Problem("this --idempotency-key was used for another request", "use another", Exit.CONFLICT)
        return found

    def _until(self, plural: str, name: str, timeout: float | None) -> Iterator[Object]:
        """The object now and after each change, until nobody asks on or `timeout` seconds have passed."""
        end, broken = None if timeout is None else time.monotonic() + timeout, 0
        while True:
            raw = self._get(plural, name)
            yield raw
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return
            version = raw["metadata"]["resourceVersion"]
            try:
                since = time.monotonic()
                for kind, item in self._kube.watch(self._path(plural), f"metadata.name={name}", version, left):
                    broken = 0
                    if kind == "DELETED":
                        raise Problem(f"{name} was deleted while it was waited for", "", Exit.NOT_FOUND)
                    if kind != "BOOKMARK":
                        yield item
                if time.monotonic() - since > 0.5:
                    continue  # every watch ends some time
            except (Gone, WatchBroken):
                pass
            broken += 1
            if broken > RECONNECTS:
                raise Problem("the watch breaks again and again", "try again", Exit.UNREACHABLE)
            if broken > 1:
                time.sleep(min(5.0, 0.1 * 2**broken))

    def _default_base_model(self) -> str:
        release = installation.the_release(self._kube)
        try:
            return str(installation.settings(self._kube, release)["defaultBaseModel"])
        except Problem as problem:
            if problem.code not in (Exit.DENIED, Exit.NOT_FOUND):
                raise
            said = "--base-model is needed: this kubeconfig may not read the installation's default"
            raise Problem(said, f"ask whoever runs {release}, or look at `claas get adapters`", Exit.USAGE) from None


def _manifest_of(work: Work) -> Object:
    """A body of the REST API as a DistillRequest.

    Raises:
        Problem: a field is wrong.
    """
    kind = models.LiteBody if work.lite else models.DistillBody
    try:
        body: Any = kind.model_validate_json(json.dumps(work.body))
        content = spec.request_spec(body, _NO_SETTINGS)
        content["samples"] = spec.samples_of(body)
    except ValidationError as error:
        raise Problem(_explain(error), "", Exit.USAGE) from None
    except ValueError as error:
        raise Problem(str(error), "numbers must be finite, and texts Unicode", Exit.USAGE) from None
    del content["ttlSecondsAfterFinished"]  # people look at what they have asked for
    if not work.lite:
        content["teacher"] = body.teacher.model_dump(exclude_none=True) if body.teacher else {}
    return {"apiVersion": names.API_VERSION, "kind": names.REQUEST_KIND, "metadata": {}, "spec": content}


def _validated(manifest: Object) -> None:
    """As the API server would, and before anything is sent.

    Raises:
        Problem: a field is wrong; it is named, and its text never quoted.
    """
    try:
        DistillRequestSpec.model_validate(manifest.get("spec"))
    except ValidationError as error:
        too_large = "PayloadTooLarge" in {problem["type"] for problem in error.errors(include_input=False)}
        fix = "or use --url: the REST API puts large samples into the store by itself" if too_large else ""
        raise Problem(explain(error), fix, Exit.USAGE) from None


def _same_request(wanted: Object, found: Object) -> bool:
    """Whether two specs ask for the same, defaults filled in."""
    one, other = (DistillRequestSpec.model_validate({**spec, "cancel": False}) for spec in (wanted, found))
    return one == other


def _stem(content: Object) -> str:
    """What a request's name begins with: its adapter's name, or the version's."""
    name = (content.get("adapterRef") or {}).get("name")
    if not name:
        try:
            name = uris.version_name(content.get("loraUri") or "")
        except UriInvalid:
            name = ""
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")[:40].strip("-") or "distill"


def _explain(error: ValidationError) -> str:
    """What is wrong with a body, field by field, one a line; never its text."""
    lines = []
    for problem in error.errors(include_input=False):
        path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"]).lstrip(".")
        if problem["type"] == "rule":
            path = ".".join(filter(None, (path, str((problem.get("ctx") or {}).get("field")))))
        said = "there is no such field" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{path}: {said}")
    return "\n  ".join(lines)


def _left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())


def _status(raw: Object) -> LoraAdapterStatus:
    return LoraAdapterStatus.model_validate(raw.get("status") or {})


_OPTIONS: Final = {"lora_r": "--r", "lora_alpha": "--alpha"}


def _explain_options(error: ValidationError) -> str:
    """What is wrong with an adapter that is to be made, as the command's own options."""
    lines = []
    for problem in error.errors(include_input=False):
        field = str(problem["loc"][0])
        option = _OPTIONS.get(field, f"--{field.replace('_', '-')}")
        is_uri = field in ("output_uri", "init_from") and problem["type"] == "string_pattern_mismatch"
        lines.append(f"{option}: {'must be s3://BUCKET/PATH/' if is_uri else problem['msg']}")
    return "\n  ".join(lines)


def _request(raw: Object) -> Request:
    return Request.model_validate(spec.to_request(raw).model_dump())


def _adapter(raw: Object) -> Adapter:
    return Adapter.model_validate(spec.to_adapter(raw).model_dump())


_OBJECT_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
# What a body leaves out is left out here too: the operator's own defaults hold.
_NO_SETTINGS: Final = ShimSettings(instance="-", namespace="-", default_base_model="-")
