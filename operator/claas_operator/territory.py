"""Which namespaces are this release's: those that its settings name (none named: all), without what is another's.

Two operators at one request would run it twice, on workers of two kinds. So each release says in its operator's
ClusterRole what it serves (an annotation that the chart writes, and no tenant can), and of two that name the same
namespace the older one has it: also while it is upgraded or down, until `helm uninstall` takes its ClusterRole away.

Only decisions end here. Every operator reads all requests and adapters: a version that another release's adapter began
as is needed, whoever serves that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from claas_crds import names
from claas_operator.api import Api
from claas_operator.snapshot import parse_time

EVERY: Final = "*"
_ROLES: Final = "/apis/rbac.authorization.k8s.io/v1/clusterroles"


@dataclass(frozen=True)
class Claim:
    """What a release says that it serves."""

    since: datetime
    role: str  # its ClusterRole
    namespaces: frozenset[str]  # none: all

    @property
    def order(self) -> tuple[datetime, str]:
        """Of two the smaller has precedence."""
        return self.since, self.role

    def covers(self, namespace: str) -> bool:
        """Whether it names that namespace."""
        return not self.namespaces or namespace in self.namespaces


@dataclass(frozen=True)
class Territory:
    """What `own` names (nothing: all), but for what older releases have."""

    own: frozenset[str] = frozenset()
    older: tuple[Claim, ...] = ()

    def serves(self, namespace: str) -> bool:
        """Whether we decide about what is in that namespace."""
        named = not self.own or namespace in self.own
        return named and not any(claim.covers(namespace) for claim in self.older)

    @property
    def taken(self) -> dict[str, str]:
        """Namespaces that we name and others have, with the ClusterRole of who has each; `*`: all."""
        found = dict[str, str]()
        for claim in self.older:
            both = claim.namespaces & self.own if claim.namespaces and self.own else claim.namespaces or self.own
            for namespace in sorted(both) or [EVERY]:
                found.setdefault(namespace, claim.role)
        return found


def territory(own: frozenset[str], role: str, roles: Iterable[Mapping[str, Any]]) -> Territory:
    """What is left of what a release names, beside those whose ClusterRoles are among these.

    Args:
        role: its own ClusterRole. Who runs without one (an operator on somebody's machine) comes after everybody.
    """
    claims = [claim for found in roles if (claim := _claim(found)) is not None]
    mine = next((claim for claim in claims if claim.role == role), None)
    older = [
        claim
        for claim in sorted(claims, key=lambda claim: claim.order)
        if claim.role != role
        and (mine is None or claim.order < mine.order)
        and (not own or not claim.namespaces or claim.namespaces & own)
    ]
    return Territory(own, tuple(older))


def _claim(role: Mapping[str, Any]) -> Claim | None:
    metadata = role["metadata"]
    text = (metadata.get("annotations") or {}).get(names.OPERATOR_NAMESPACES)
    since = parse_time(metadata.get("creationTimestamp"))
    if not text or since is None:
        return None  # no operator's, or of a release that did not say
    return Claim(since, metadata["name"], frozenset() if text == EVERY else frozenset(text.split(",")))


async def survey(api: Api, own: frozenset[str], role: str) -> Territory:
    """The territory as the ClusterRoles are now.

    Raises:
        ApiException, aiohttp.ClientError, TimeoutError, OSError: the API server failed.
    """
    selector = {"labelSelector": f"{names.COMPONENT_LABEL}={names.COMPONENT_OPERATOR}"}
    found = await api.get_path(_ROLES, selector) or {}
    return territory(own, role, found.get("items") or [])
