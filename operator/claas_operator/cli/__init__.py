"""The `claas` command: CLaaS from a shell. Help, and what needs no cluster, work with the base install.

It works by kubeconfig (the resources themselves) or by url and key (the REST API): `door` is what both can do. Answers
go to stdout, everything else to stderr; a mistake that was foreseen is one line and an exit code (`exits`), never a
traceback. Nothing is imported before it is needed: `claas --help` is there at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click

from claas_operator.cli.command import HELP_WIDTH, Entry, Group
from claas_operator.cli.exits import Exit
from claas_operator.cli.problem import Problem

TRAIN, LOOK, INSTALL, OFFLINE = "Teach", "Look", "Install and run", "Without a cluster"

ENTRIES: Final = {
    "init-lora": Entry("claas_operator.cli.teaching:init_lora", "make a new adapter, without effect so far", TRAIN),
    "distill": Entry("claas_operator.cli.teaching:distill", "feedback on a response becomes a training step", TRAIN),
    "cancel": Entry("claas_operator.cli.teaching:cancel", "stop a request", TRAIN),
    "rollback": Entry("claas_operator.cli.teaching:rollback", "make an old version the head again", TRAIN),
    "fork": Entry("claas_operator.cli.teaching:fork", "a new adapter that starts from another's version", TRAIN),
    "get": Entry("claas_operator.cli.looking:get", "requests, adapters, versions: a list, or one", LOOK),
    "logs": Entry("claas_operator.cli.looking:logs", "of the worker that runs a request", LOOK),
    "health": Entry("claas_operator.cli.looking:health", "could a request be served now? each part's state", LOOK),
    "doctor": Entry("claas_operator.cli.checking:doctor", "what is wrong with an installation, how to mend it", LOOK),
    "fsck": Entry("claas_operator.cli.looking:fsck", "walk an adapter's versions in the store and check them", LOOK),
    "deploy": Entry("claas_operator.cli.installing:deploy", "check the cluster, then install the chart", INSTALL),
    "serve": Entry("claas_operator.cli.installing:serve", "the REST API on this machine, for a kubeconfig", INSTALL),
    "operator": Entry("claas_operator.cli.offline:operator", "the control loop, in the foreground", INSTALL),
    "validate": Entry("claas_operator.cli.offline:validate", "check manifests as the API server would", OFFLINE),
    "reasons": Entry("claas_operator.cli.offline:reasons", "what each reason in a status means", OFFLINE),
    "crds": Entry("claas_operator.cli.offline:crds", "print the CustomResourceDefinitions", OFFLINE),
}

HELP: Final = """Continual learning as a service: feedback on one model response becomes one training step on your own
LoRA adapter.

By kubeconfig it reads and writes the resources LoraAdapter and DistillRequest; with --url and --key (or CLAAS_URL and
CLAAS_API_KEY) it asks the REST API. Each command's --help has examples.
"""

EXAMPLES: Final = [
    "claas deploy --dry-run                                    # is this cluster fit for it?",
    "claas init-lora --output-uri s3://my-bucket/loras/user123/coder-v1/",
    "claas distill --adapter coder-v1 --prompt 'Write …' --response 'def …' --feedback 'Too long'",
    "claas get adapters",
]


@click.group(
    cls=Group,
    entries=ENTRIES,
    examples=EXAMPLES,
    codes=True,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH},
)
@click.version_option(package_name="claas", message="claas %(version)s")
def claas() -> None:
    """Replaced by HELP."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code (`exits.MEANINGS`)."""
    try:
        code: int = claas.main(args=arguments, prog_name="claas", standalone_mode=False)
    except Problem as problem:
        click.echo(f"claas: {problem}", err=True)
        return int(problem.code)
    except click.ClickException as error:
        error.show()
        return int(Exit.USAGE)
    except (click.Abort, KeyboardInterrupt):
        return int(Exit.INTERRUPTED)
    return int(code or 0)
