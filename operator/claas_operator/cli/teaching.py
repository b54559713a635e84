"""Commands that change something: make an adapter, teach it, stop, go back, fork."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from claas_operator.cli.command import Command
from claas_operator.cli.exits import Exit
from claas_operator.cli.options import Target, connection, output
from claas_operator.cli.output import Format, say, write_fields, write_json
from claas_operator.cli.problem import Problem

if TYPE_CHECKING:
    from claas_client.models import Request
    from claas_operator.cli.door import Door, NewAdapter, Work

timeout_option = click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop waiting after so long; exit code 7."
)


@contextmanager
def opened(target: Target, command: str) -> Iterator[Door]:
    """The installation, for the length of a command."""
    door = target.door(command)
    try:
        yield door
    finally:
        door.close()


@click.command(
    "init-lora",
    cls=Command,
    examples=[
        "claas init-lora --output-uri s3://my-bucket/loras/user123/coder-v1/",
        "claas init-lora --output-uri s3://my-bucket/loras/user123/small/ --name small --r 8 --alpha 16 \\",
        "    --target-modules q_proj,v_proj",
        "# adopt a PEFT folder that was trained elsewhere",
        "claas init-lora --output-uri s3://my-bucket/loras/user123/mine/ --init-from s3://my-bucket/peft/mine/",
    ],
)
@click.option("--output-uri", required=True, metavar="URI", help="Where the first version goes: s3://BUCKET/PATH/.")
@click.option("--name", metavar="NAME", help="Of the adapter; one made of the uri when absent.")
@click.option("--base-model", metavar="ID", help="Its hub id; the installation's default when absent.")
@click.option("--r", "lora_r", type=click.IntRange(1, 512), metavar="N", help="Rank; 16 when absent.")
@click.option("--alpha", "lora_alpha", type=float, metavar="X", help="Scaling numerator; 32 when absent.")
@click.option("--target-modules", metavar="A,B,…", help="Layers to adapt; every linear one when absent.")
@click.option("--init-from", metavar="URI", help="Start from the version or PEFT folder there.")
@timeout_option
@output
@connection
def init_lora(
    target: Target,
    output_uri: str,
    name: str | None,
    base_model: str | None,
    lora_r: int | None,
    lora_alpha: float | None,
    target_modules: str | None,
    init_from: str | None,
    timeout: float | None,
    form: Format,
) -> Exit:
    """Make an adapter: a new one is without effect until it is trained. Waits for its first version.

    The same command again is the same adapter.
    """
    from claas_operator.cli.door import NewAdapter

    modules = tuple(part.strip() for part in target_modules.split(",")) if target_modules else ()
    wanted = NewAdapter(output_uri, name, base_model, lora_r, lora_alpha, modules, init_from)
    return _init(target, "claas init-lora", wanted, timeout, form)


def _init(target: Target, command: str, wanted: NewAdapter, timeout: float | None, form: Format) -> Exit:
    with opened(target, command) as door:
        from claas_operator.cli.progress import Spinner

        try:
            with Spinner("the first version is being written"):
                made = door.init(wanted, timeout)
        except KeyboardInterrupt:
            say("\nclaas: stopped waiting; the adapter is still being made: claas get adapters")
            return Exit.INTERRUPTED
    if form is Format.JSON:
        write_json({"lora_uri": made.lora_uri, "name": made.name})
    else:
        write_fields([("lora_uri", made.lora_uri), ("name", made.name)])
    return Exit.OK


@click.command(
    cls=Command,
    examples=[
        "claas distill --adapter coder --prompt 'Write a function to calculate factorial' \\",
        "    --response @answer.py --feedback 'Good, but negative numbers never end'",
        "# what a test said, as feedback by the environment, and a better answer for the teacher alone",
        "pytest -q | claas distill --adapter coder --prompt @task.txt --response @answer.py --feedback @- \\",
        "    --feedback-source Environment --solution @fixed.py",
        "# a manifest, or a body of the REST API, from a file or from stdin",
        "claas distill -f examples/request.yaml",
        "jq '{adapter: \"coder\", samples: .}' samples.json | claas distill -f - -o json | jq .metadata.total_loss",
        "# without an adapter: a version by its uri; the new one lies beside it",
        "claas distill --lora-uri s3://my-bucket/loras/user123/coder-v1/ --prompt … --response … --feedback …",
        "# do not wait; look later",
        "id=$(claas distill --no-wait -f request.yaml) && claas get request $id",
    ],
)
@click.option("--adapter", metavar="NAME", help="The adapter to train: its head moves.")
@click.option("--lora-uri", metavar="URI", help="A version to train instead; nothing but this uri is read.")
@click.option("--prompt", metavar="TEXT", help="What was asked.")
@click.option("--response", metavar="TEXT", help="What the model answered.")
@click.option("--feedback", metavar="TEXT", help="What was said about the answer.")
@click.option("--feedback-source", type=click.Choice(["Person", "Environment"]), help="Environment: tests, tools.")
@click.option("--solution", metavar="TEXT", help="A better answer, shown to the teacher only.")
@click.option("-f", "--file", "file", metavar="FILE", help="All of it, YAML or JSON; - is stdin.")
@click.option(
    "-t",
    "--training",
    multiple=True,
    metavar="NAME=VALUE",
    help="A hyper-parameter, such as learning_rate=1e-4, alpha=0.5 or preset=paper; again for more.",
)
@click.option("--teacher", type=click.Choice(["Server", "Self"]), help="Whose distribution it is pulled towards.")
@click.option("--priority", type=click.IntRange(-1000, 1000), help="Higher runs first inside the namespace.")
@click.option("--idempotency-key", metavar="KEY", help="The same key again is the same request: safe to repeat.")
@click.option("--no-wait", is_flag=True, help="Print the request's id and go.")
@timeout_option
@output
@connection
def distill(target: Target, no_wait: bool, timeout: float | None, form: Format, **given: Any) -> Exit:
    """Feedback on a model's response becomes one training step: a new version of the adapter, and nine numbers.

    TEXT may be @FILE, or @- for stdin (@@ begins a text with an @). FILE is a DistillRequest, or a body of the REST
    API; flags add to such a body or replace what it says. While it waits it shows what happens; Ctrl-C stops the
    waiting, not the request.
    """
    work = _work(given)
    with opened(target, "claas distill") as door:
        try:
            request = door.submit(work)
        except KeyboardInterrupt:
            say("\nclaas: interrupted while the request was sent; it may have arrived: claas get requests")
            return Exit.INTERRUPTED
        if no_wait:
            write_json(request.model_dump(mode="json")) if form is Format.JSON else click.echo(request.id)
            return Exit.OK
        return follow(door, request, timeout, form)


def follow(door: Door, request: Request, timeout: float | None, form: Format) -> Exit:
    """Waits for the request's end, shows its progress to a person, and prints what came of it."""
    from claas_operator.cli.progress import Progress

    try:
        with Progress(request) as progress:
            for seen in door.watch(request.id, timeout):
                request = seen
                progress.show(seen)
    except KeyboardInterrupt:
        say(f"\nclaas: stopped waiting; request {request.id} goes on. Look: claas get request {request.id}")
        say(f"Stop it: claas cancel {request.id}")
        return Exit.INTERRUPTED
    except Problem as problem:
        if problem.code is Exit.WAIT_ENDED:
            problem.fix = f"look: claas get request {request.id}; stop it: claas cancel {request.id}"
        raise
    return told(request, form)


def told(request: Request, form: Format) -> Exit:
    """Prints a request that has ended; its exit code."""
    if form is Format.JSON:
        write_json(request.model_dump(mode="json"))
    elif request.state == "Complete":
        from claas_operator.cli.tables import step_fields

        write_fields(step_fields(request))
    if request.state == "Complete":
        return Exit.OK
    raise Problem(
        f"request {request.id} {request.state.lower()}: {request.reason}: {request.message}",
        f"claas reasons {request.reason}" if request.reason else "",
        Exit.REQUEST_FAILED,
    )


TEXTS = ("prompt", "response", "feedback", "solution")


def _work(given: dict[str, Any]) -> Work:
    """What the flags and the file say together.

    Raises:
        Problem: nothing, or what contradicts itself.
    """
    from claas_operator.cli.door import Work

    key, file = given.pop("idempotency_key") or "", given.pop("file")
    training = dict(_pair(words) for words in given.pop("training"))
    teacher = given.pop("teacher")
    if file == "-" and "@-" in (given[name] for name in TEXTS):
        raise Problem("-f - and @- both read stdin", "give one of them as a file", Exit.USAGE)
    flags = {name: value for name, value in given.items() if value is not None}
    flags |= {name: _text(name, flags[name]) for name in TEXTS if name in flags}
    flags |= ({"training": training} if training else {}) | ({"teacher": {"mode": teacher}} if teacher else {})
    if file is None:
        _complete(flags)
        return Work(flags, key=key)
    body = _read(file)
    if "kind" in body or "spec" in body:
        if flags:
            said = f"--{next(iter(flags)).replace('_', '-')} cannot change a manifest"
            raise Problem(said, "edit the file, or give a body of the REST API", Exit.USAGE)
        _is_request(body, file)
        return Work(body, manifest=True, key=key)
    body = {**body, **flags, **({"training": {**body.get("training", {}), **training}} if training else {})}
    return Work(body, lite=_is_lite(body), key=key)


def _complete(flags: dict[str, Any]) -> None:
    if not flags.get("adapter") and not flags.get("lora_uri"):
        raise Problem("nothing says what to train", "give --adapter NAME, --lora-uri URI or -f FILE", Exit.USAGE)
    for name in ("prompt", "response"):
        if name not in flags:
            raise Problem(f"--{name} is missing", f"give --{name} TEXT, or -f FILE", Exit.USAGE)


def _is_lite(body: dict[str, Any]) -> bool:
    samples = body.get("samples") if isinstance(body.get("samples"), list) else [body]
    return any(isinstance(sample, dict) and "teacher_logprobs" in sample for sample in samples or [])


def _is_request(body: dict[str, Any], file: str) -> None:
    from claas_crds import names

    if body.get("kind") != names.REQUEST_KIND:
        fix = f"`kubectl apply -f {file}` takes other kinds; `claas validate {file}` checks them"
        raise Problem(f"{file}: kind: must be {names.REQUEST_KIND}", fix, Exit.USAGE)
    if body.get("apiVersion") != names.API_VERSION:
        raise Problem(f"{file}: apiVersion: must be {names.API_VERSION}", "", Exit.USAGE)


def _read(file: str) -> dict[str, Any]:
    import yaml

    text = _contents("-f", file)
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        raise Problem(f"{where}: neither YAML nor JSON", "", Exit.USAGE) from None
    if len(documents) != 1 or not isinstance(documents[0], dict):
        fix = "one request a call; several samples go into `samples`"
        raise Problem(f"{file}: must hold one mapping, and holds {len(documents)} document(s)", fix, Exit.USAGE)
    return {str(name): value for name, value in documents[0].items()}


def _text(name: str, given: str) -> str:
    if given.startswith("@@"):
        return given[1:]
    return _contents(f"--{name}", given[1:]) if given.startswith("@") else given


def _contents(option: str, file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        said = f"{option}: {file}: {error.strerror or type(error).__name__}"
        raise Problem(said, "name a file that can be read, or - for stdin", Exit.USAGE) from None
    except UnicodeDecodeError:
        raise Problem(f"{option}: {file} is not UTF-8 text", "convert it first", Exit.USAGE) from None


def _pair(words: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = words.partition("=")
    if not equals or not name:
        raise Problem(f"-t {words!r} is not NAME=VALUE", "for example -t learning_rate=1e-4", Exit.USAGE)
    for number in (int, float):  # YAML would read 1e-4 as a text
        with suppress(ValueError):
            return name.strip(), number(value)
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return name.strip(), value


@click.command(cls=Command, examples=["claas cancel coder-1a2b3c4d", "claas cancel coder-1a2b3c4d -o json"])
@click.argument("id", metavar="REQUEST")
@output
@connection
def cancel(target: Target, id: str, form: Format) -> Exit:
    """Stop a request. One that waits ends at once; of one that runs nothing is saved, unless its step is done."""
    with opened(target, "claas cancel") as door:
        request = door.cancel(id)
    if form is Format.JSON:
        write_json(request.model_dump(mode="json"))
    elif request.ended:
        click.echo(f"request {request.id} had ended already: {request.state}")
    else:
        click.echo(f"request {request.id} is being stopped")
    return Exit.OK


@click.command(
    cls=Command,
    examples=[
        "claas get versions coder                # which there are",
        "claas rollback coder coder-v1",
    ],
)
@click.argument("adapter")
@click.argument("version")
@timeout_option
@output
@connection
def rollback(target: Target, adapter: str, version: str, timeout: float | None, form: Format) -> Exit:
    """Make VERSION the head of ADAPTER again. Nothing is lost: its history grows by one entry, and later versions stay.

    Waits until the head has moved; a request that holds the adapter is finished first.
    """
    with opened(target, "claas rollback") as door:
        from claas_operator.cli.progress import Spinner

        try:
            with Spinner(f"{adapter} goes back to {version}"):
                found = door.rollback(adapter, version, timeout)
        except KeyboardInterrupt:
            say(f"\nclaas: stopped waiting; the rollback goes on: claas get adapter {adapter}")
            return Exit.INTERRUPTED
    if form is Format.JSON:
        write_json(found.model_dump(mode="json"))
    else:
        from claas_operator.cli.tables import adapter_fields

        write_fields(adapter_fields(found))
    return Exit.OK


@click.command(
    cls=Command,
    examples=[
        "claas fork coder --output-uri s3://my-bucket/loras/user123/coder-bold/ --name coder-bold",
        "# from an older version",
        "claas fork coder --version coder-v1 --output-uri s3://my-bucket/loras/user123/coder-again/",
        "# from a uri, of a version or of a PEFT folder",
        "claas fork s3://my-bucket/loras/user123/coder-v1/ --output-uri s3://my-bucket/loras/user123/other/",
    ],
)
@click.argument("source", metavar="ADAPTER|URI")
@click.option("--output-uri", required=True, metavar="URI", help="Where the new adapter's first version goes.")
@click.option("--name", metavar="NAME", help="Of the new adapter; one made of the uri when absent.")
@click.option("--version", metavar="VERSION", help="Of ADAPTER; its head when absent.")
@timeout_option
@output
@connection
def fork(
    target: Target,
    source: str,
    output_uri: str,
    name: str | None,
    version: str | None,
    timeout: float | None,
    form: Format,
) -> Exit:
    """Make a new adapter that starts from another's version; from then on each goes its own way."""
    from claas_operator.cli.door import NewAdapter

    if "://" in source:
        if version:
            raise Problem("--version goes with an adapter's name", "name the version by its uri", Exit.USAGE)
        return _init(target, "claas fork", NewAdapter(output_uri, name, init_from=source), timeout, form)
    with opened(target, "claas fork") as door:
        adapter = door.adapter(source)
        uri = adapter.lora_uri
        if version is not None:
            uri = next((found.lora_uri for found in door.versions(source) if found.version == version), None)
        if uri is None:
            fix = f"claas get versions {source}"
            raise Problem(f"adapter {source} has no version {version or 'yet'}", fix, Exit.NOT_FOUND)
    wanted = NewAdapter(
        output_uri,
        name,
        adapter.base_model,
        adapter.lora_r or None,
        adapter.lora_alpha or None,
        tuple(adapter.target_modules),
        uri,
    )
    return _init(target, "claas fork", wanted, timeout, form)
