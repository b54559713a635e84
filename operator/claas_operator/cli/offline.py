"""Commands that need no cluster and no server: check manifests, explain reasons, print the kinds; and the operator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from claas_operator.cli.command import Command, Entry, Group
from claas_operator.cli.exits import Exit
from claas_operator.cli.options import output
from claas_operator.cli.output import Format, say, write_json, write_table
from claas_operator.cli.problem import Problem, missing


@click.command(
    cls=Command,
    examples=[
        "claas validate examples/*.yaml",
        "claas validate - -o json < request.yaml",
    ],
)
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@output
def validate(files: tuple[str, ...], form: Format) -> Exit:
    """Check manifests of LoraAdapters and DistillRequests without a cluster, as the API server would.

    FILE is YAML with any number of documents; - is stdin. Each mistake is one line that names the file, the document,
    the field and what to do. It never shows a sample's text.
    """
    problems = [problem for file in files for problem in problems_of(file)]
    if form is Format.JSON:
        write_json({"valid": not problems, "files": len(files), "problems": problems})
        return Exit.FAILED if problems else Exit.OK
    for problem in problems:
        say(problem)
    if not problems:
        click.echo(f"{len(files)} file(s): valid")
    return Exit.FAILED if problems else Exit.OK


def problems_of(file: str) -> Iterator[str]:
    """What is wrong with the manifests in `file`, one line each: where, which field, what to do. Never their text."""
    import yaml

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except OSError as error:
        yield f"{file}: {error.strerror or type(error).__name__}"
        return
    except UnicodeDecodeError:
        yield f"{file}: not UTF-8 text"
        return
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        yield f"{where}: not YAML: {getattr(error, 'problem', None) or 'unreadable'}"
        return
    if not documents:
        yield f"{file}: holds no manifest"
    for number, document in enumerate(documents, 1):
        for problem in _problems(document):
            yield f"{file}: document {number}: {problem}"


def _problems(document: Any) -> Iterator[str]:
    from pydantic import ValidationError

    from claas_crds import names
    from claas_crds.adapter import LoraAdapterSpec
    from claas_crds.model import Model, explain
    from claas_crds.request import DistillRequestSpec

    specs: dict[str, type[Model]] = {names.ADAPTER_KIND: LoraAdapterSpec, names.REQUEST_KIND: DistillRequestSpec}
    if not isinstance(document, dict):
        yield "a manifest is a mapping with apiVersion, kind, metadata and spec"
        return
    kind, api_version = document.get("kind"), document.get("apiVersion")
    if not isinstance(kind, str) or kind not in specs:
        yield f"kind: must be {' or '.join(specs)}"
        return
    if api_version != names.API_VERSION:
        yield f"{kind}: apiVersion: must be {names.API_VERSION}"
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not (metadata.get("name") or metadata.get("generateName")):
        yield f"{kind}: metadata: needs a name (or a generateName)"
    if unknown := sorted(map(str, set(document) - {"apiVersion", "kind", "metadata", "spec", "status"})):
        yield f"{kind}: unknown field {unknown[0]}"
    try:
        specs[kind].model_validate(document.get("spec"))
    except ValidationError as error:
        yield f"{kind}: {explain(error)}"


@click.command(
    cls=Command,
    examples=[
        "claas reasons",
        "claas reasons AdapterBusy",
        "claas reasons -o json | jq -r .NoCapacity",
    ],
)
@click.argument("names", nargs=-1, metavar="[REASON]…")
@output
def reasons(names: tuple[str, ...], form: Format) -> Exit:
    """What every reason means, or the REASONs that are named: the words of a request's and an adapter's status."""
    from claas_crds.reasons import Reason, describe

    table = {reason.value: describe(reason) for reason in Reason}
    if unknown := [name for name in names if name not in table]:
        import difflib

        near = difflib.get_close_matches(unknown[0], table, 1)
        fix = f"did you mean {near[0]}?" if near else "`claas reasons` lists them"
        raise Problem(f"there is no reason {unknown[0]!r}", fix, Exit.NOT_FOUND)
    chosen = {name: table[name] for name in names or table}
    if form is Format.JSON:
        write_json(chosen)
    else:
        write_table(("REASON", "MEANS"), list(chosen.items()))
    return Exit.OK


@click.command(
    cls=Command, examples=["claas crds | kubectl apply --server-side -f -", "claas crds -o json | jq .items"]
)
@output
def crds(form: Format) -> Exit:
    """Print the CustomResourceDefinitions, for kubectl apply -f -. The chart installs them too."""
    from claas_crds.generate import RESOURCES, definition, files

    if form is Format.JSON:
        write_json({"apiVersion": "v1", "kind": "List", "items": [definition(resource) for resource in RESOURCES]})
        return Exit.OK
    click.echo("---\n".join(text for path, text in files().items() if path.parts[0] == "crds"), nl=False)
    return Exit.OK


operator = Group(
    "operator",
    help="The control loop. The chart runs it in the cluster; `run` is for development.",
    entries={"run": Entry("claas_operator.cli.offline:run", "run it in the foreground", "Actions")},
)


@click.command(
    cls=Command,
    examples=["claas operator run --config config.yaml", "claas operator run --liveness http://0.0.0.0:8080/healthz"],
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("/etc/claas/config.yaml"),
    show_default=True,
    help="Its settings, as the chart writes them.",
)
@click.option("--liveness", metavar="URL", help="Serve the liveness probe there.")
@click.option("--metrics", metavar="URL", help="Serve Prometheus' metrics there.")
@click.option(
    "--log-level", default="INFO", show_default=True, type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"])
)
def run(config: Path, liveness: str | None, metrics: str | None, log_level: str) -> int:
    """Run the operator in the foreground, against the cluster of KUBECONFIG or of this Pod, until SIGTERM."""
    from claas_operator.settings import SettingsError, load

    try:
        settings = load(config)
    except SettingsError as error:
        raise Problem(f"claas operator: {error}") from None
    try:
        from claas_operator.main import log_as_json
        from claas_operator.main import run as run_operator
    except ModuleNotFoundError as error:
        raise missing(error.name, "operator", "claas operator") from None
    log_as_json(log_level)
    return run_operator(settings, liveness, metrics)
