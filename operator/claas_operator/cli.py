"""The `claas` command. Help, and what needs no cluster, work with the base install; the rest says what to install."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from claas_crds import names
from claas_crds.adapter import LoraAdapterSpec
from claas_crds.model import Model, explain
from claas_crds.request import DistillRequestSpec

SPECS: dict[str, type[Model]] = {names.ADAPTER_KIND: LoraAdapterSpec, names.REQUEST_KIND: DistillRequestSpec}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 well, 1 not, 2 a wrong command line."""
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="claas", description="Continual learning as a service on Kubernetes.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    operator = commands.add_parser("operator", help="the control loop")
    actions = operator.add_subparsers(required=True, metavar="ACTION")
    run = actions.add_parser("run", help="run it in the foreground, against the cluster of KUBECONFIG or of this Pod")
    run.add_argument(
        "--config", type=Path, default=Path("/etc/claas/config.yaml"), help="settings (default %(default)s)"
    )
    run.add_argument(
        "--liveness", metavar="URL", help="serve the liveness probe there, e.g. http://0.0.0.0:8080/healthz"
    )
    run.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    run.set_defaults(run=_operator_run)

    crds = commands.add_parser("crds", help="print the CustomResourceDefinitions, for kubectl apply -f -")
    crds.set_defaults(run=_crds)

    validate = commands.add_parser("validate", help="check manifests without a cluster, as the API server would")
    validate.add_argument("files", nargs="+", metavar="FILE", help="YAML with any number of documents; - is stdin")
    validate.set_defaults(run=_validate)
    return parser


def _operator_run(options: argparse.Namespace) -> int:
    from claas_operator.settings import SettingsError, load

    try:
        settings = load(options.config)
    except SettingsError as error:
        print(f"claas operator: {error}", file=sys.stderr)
        return 1
    try:
        from claas_operator.main import log_as_json, run
    except ModuleNotFoundError as error:
        print(f"claas operator needs {error.name}: pip install 'claas[operator]'", file=sys.stderr)
        return 1
    log_as_json(options.log_level)
    return run(settings, options.liveness)


def _crds(_: argparse.Namespace) -> int:
    from claas_crds.generate import files

    print("---\n".join(text for path, text in files().items() if path.parts[0] == "crds"), end="")
    return 0


def _validate(options: argparse.Namespace) -> int:
    problems = [problem for file in options.files for problem in problems_of(file)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{len(options.files)} file(s): valid")
    return 1 if problems else 0


def problems_of(file: str) -> Iterator[str]:
    """What is wrong with the manifests in `file`, one line each: where, which field, what to do. Never their text."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except OSError as error:
        yield f"{file}: {error.strerror or type(error).__name__}"
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
    if not isinstance(document, dict):
        yield "a manifest is a mapping with apiVersion, kind, metadata and spec"
        return
    kind, api_version = document.get("kind"), document.get("apiVersion")
    if kind not in SPECS:
        yield f"kind: must be {' or '.join(SPECS)}"
        return
    if api_version != names.API_VERSION:
        yield f"{kind}: apiVersion: must be {names.API_VERSION}"
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not (metadata.get("name") or metadata.get("generateName")):
        yield f"{kind}: metadata: needs a name (or a generateName)"
    if unknown := sorted(set(document) - {"apiVersion", "kind", "metadata", "spec", "status"}):
        yield f"{kind}: unknown field {unknown[0]}"
    try:
        SPECS[kind].model_validate(document.get("spec"))
    except ValidationError as error:
        yield f"{kind}: {explain(error)}"


if __name__ == "__main__":
    sys.exit(main())
