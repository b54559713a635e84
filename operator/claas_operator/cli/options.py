"""Options that several commands share, and what they mean together: which installation, as whom, in which namespace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from claas_operator.cli.exits import Exit
from claas_operator.cli.output import Format
from claas_operator.cli.problem import Problem

if TYPE_CHECKING:
    from claas_operator.cli.door import Door
    from claas_operator.cli.kube import Kube

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Target:
    """What the options say.

    Attributes:
        url: of the REST API; None: by kubeconfig.
        key: an API key for it.
        token: a bearer token for it.
    """

    url: str | None
    key: str | None
    token: str | None
    kubeconfig: str | None
    context: str | None
    namespace: str | None

    def door(self, command: str) -> Door:
        """A connection to what CLaaS offers, by either way. Close it.

        Raises:
            Problem: the options contradict each other, or nothing can be reached by them.
        """
        if self.url:
            from claas_operator.cli.byurl import UrlDoor

            if self.key and self.token:
                raise Problem("--key and --token contradict each other", "give one of them", Exit.USAGE)
            return UrlDoor(self.url, key=self.key, token=self.token, namespace=self.namespace)
        from claas_operator.cli.bycluster import ClusterDoor

        return ClusterDoor(self.kube(command))

    def kube(self, command: str) -> Kube:
        """The API server itself, for what only it has.

        Raises:
            Problem: a url was given instead, the kubernetes package is missing, or no kubeconfig can be used.
        """
        if self.url:
            fix = "leave --url (and CLAAS_URL) out, and give --kubeconfig or KUBECONFIG"
            raise Problem(f"{command} works by kubeconfig only", fix, Exit.USAGE)
        if self.key or self.token:
            raise Problem("--key and --token go with --url", "add --url, or leave them out", Exit.USAGE)
        from claas_operator.cli.kube import Cluster, Kube

        return Kube(Cluster(self.kubeconfig, self.context, self.namespace), command)


_URL = [
    click.option(
        "--url", envvar="CLAAS_URL", metavar="URL", show_envvar=True, help="The REST API, instead of a kubeconfig."
    ),
    click.option(
        "--key", envvar="CLAAS_API_KEY", metavar="KEY", show_envvar=True, help="With --url: an API key of yours."
    ),
    click.option(
        "--token", envvar="CLAAS_TOKEN", metavar="TOKEN", show_envvar=True, help="With --url: a bearer token."
    ),
]
_CLUSTER = [
    click.option("--kubeconfig", metavar="FILE", help="Default: KUBECONFIG, then ~/.kube/config."),
    click.option("--context", metavar="NAME", help="Of the kubeconfig; default: its current one."),
]


def _apply(function: F, options: list[Any]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def _namespace(words: str) -> Any:
    return click.option("-n", "--namespace", envvar="CLAAS_NAMESPACE", metavar="NAME", show_envvar=True, help=words)


def connection(function: F) -> F:
    """Adds the options of `Target`, and gives the command one as `target`."""

    @functools.wraps(function)
    def command(*, url: Any, key: Any, token: Any, kubeconfig: Any, context: Any, namespace: Any, **rest: Any) -> Any:
        return function(target=Target(url, key, token, kubeconfig, context, namespace), **rest)

    words = "Yours; default: that of the kubeconfig's context, or of the key."
    return _apply(command, [_namespace(words), *_CLUSTER, *_URL])  # type: ignore[return-value]


def cluster(function: F) -> F:
    """Adds the options of a command that works by kubeconfig alone."""

    @functools.wraps(function)
    def command(*, kubeconfig: Any, context: Any, **rest: Any) -> Any:
        return function(target=Target(None, None, None, kubeconfig, context, None), **rest)

    return _apply(command, _CLUSTER)  # type: ignore[return-value]


def cluster_in_namespace(function: F) -> F:
    """Adds the options of a command that works by kubeconfig alone, in one namespace."""

    @functools.wraps(function)
    def command(*, kubeconfig: Any, context: Any, namespace: Any, **rest: Any) -> Any:
        return function(target=Target(None, None, None, kubeconfig, context, namespace), **rest)

    return _apply(command, [_namespace("Yours; default: that of the kubeconfig's context."), *_CLUSTER])  # type: ignore[return-value]


output = click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice([form.value for form in Format]),
    default=Format.TABLE.value,
    show_default=True,
    callback=lambda _context, _parameter, value: Format(value),
    help="table: for people (tab-separated when piped); json: for programs.",
)
