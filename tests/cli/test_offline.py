"""What the command says of itself, and what it does without a cluster: help, exit codes, pipes, terminals, imports."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from claas_crds.reasons import Reason
from claas_operator.cli import ENTRIES, exits, reference
from claas_operator.cli.exits import Exit
from clikit import ROOT, Claas, plain

HELP_SECONDS = 0.3
# Of the least that a command may import before it is needed.
HEAVY = ("pydantic", "httpx", "rich", "yaml", "kubernetes", "fastapi", "boto3", "numpy", "torch", "claas_client")

claas = Claas()


def test_help_lists_every_command_and_the_exit_codes() -> None:
    done = claas("--help")
    assert done.code == 0
    for name, entry in ENTRIES.items():
        assert re.search(rf"^ +{name} +{re.escape(entry.line[:40])}", done.out, re.MULTILINE), name
    for code, meaning in exits.rows():
        assert re.search(rf"^ +{code} +{re.escape(meaning[:30])}", done.out, re.MULTILINE), code


def test_every_exit_code_has_a_meaning_of_its_own() -> None:
    assert set(exits.MEANINGS) == set(Exit)
    assert len(set(exits.MEANINGS.values())) == len(Exit)


@pytest.mark.parametrize(
    "name", [*ENTRIES, "get requests", "get adapters", "get versions", "get lineage", "operator run"]
)
def test_every_command_teaches_by_examples(name: str) -> None:
    done = claas(*name.split(), "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: claas {name} ")
    if name != "operator":
        assert "Examples:\n" in done.out
        assert re.search(rf"^  .*claas {name.split()[0]}", done.out.partition("Examples:")[2], re.MULTILINE)
    assert max(map(len, done.out.splitlines())) <= 120


def test_help_imports_nothing_that_takes_time() -> None:
    code = (
        "import sys\n"
        "from claas_operator.cli import main\n"
        "main(['--help'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"


def test_help_is_there_at_once() -> None:
    """The best of five, without what this environment's own .pth files import: a busy machine is not our fault."""
    paths = [str(ROOT / "operator"), *sys.path]
    code = f"import sys; sys.path[:0] = {paths!r}; from claas_operator.cli import main; sys.exit(main(['--help']))"
    command = [sys.executable, "-S", "-c", code]
    took = []
    for _ in range(5):
        started = time.monotonic()
        subprocess.run(command, capture_output=True, timeout=60, check=True)
        took.append(time.monotonic() - started)
    assert min(took) < HELP_SECONDS, took


def test_the_page_in_docs_is_made_from_the_commands() -> None:
    assert reference.PATH.read_text() == reference.markdown(), "run `make docs`"


def test_the_page_names_every_command_and_option() -> None:
    page = reference.markdown()
    for name in ENTRIES:
        assert f"\n## claas {name}\n" in page
    assert "--idempotency-key" in page


def test_a_misspelt_command_or_option_is_guessed() -> None:
    done = claas("distil")
    assert (done.code, done.out) == (2, "")
    assert "Did you mean distill?" in done.err
    done = claas("get", "adaptors")
    assert "Did you mean adapters?" in done.err
    done = claas("distill", "--promt", "x")
    assert (done.code, done.out) == (2, "")
    assert "--prompt" in done.err


def test_version() -> None:
    assert re.fullmatch(r"claas \d+\.\d+\.\d+\n", claas("--version").out)


# reasons: a list, as everybody gets it


def test_piped_a_table_is_tab_separated_and_plain() -> None:
    done = claas("reasons")
    assert done.out.startswith("REASON\tMEANS\n")
    assert {row[0] for row in done.rows} == {reason.value for reason in Reason}
    assert all(len(row) == 2 for row in done.rows)
    assert (done.err, "\x1b" in done.out) == ("", False)


def test_piped_json_is_one_line() -> None:
    done = claas("reasons", "-o", "json", "AdapterBusy", "NoCapacity")
    assert list(done.json) == ["AdapterBusy", "NoCapacity"]
    assert done.out.count("\n") == 1


def test_validate_and_crds_as_json() -> None:
    done = claas("validate", "-", "-o", "json", stdin="kind: Pod")
    assert (done.code, done.json["valid"], len(done.json["problems"])) == (Exit.FAILED, False, 1)
    assert claas("validate", str(ROOT / "examples" / "request.yaml"), "-o", "json").json["valid"]
    assert {item["kind"] for item in claas("crds", "-o", "json").json["items"]} == {"CustomResourceDefinition"}


def test_on_a_terminal_a_table_is_rich_s() -> None:
    seen = claas.on_terminal("reasons", "AdapterBusy").out
    assert "\x1b[" in seen
    assert "\t" not in seen
    assert re.search(r"REASON +MEANS", plain(seen))


def test_on_a_terminal_without_colours_there_are_none() -> None:
    seen = Claas({"NO_COLOR": "1"}).on_terminal("reasons", "AdapterBusy").out
    assert not re.search(r"\x1b\[3\dm", seen)


def test_an_unknown_reason_is_an_error_with_a_guess() -> None:
    done = claas("reasons", "NoCapasity")
    assert (done.code, done.out) == (Exit.NOT_FOUND, "")
    assert "did you mean NoCapacity?" in done.err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m claas_operator.cli crds | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.startswith("#") or "apiVersion" in done.stdout


# Options that contradict each other, and mistakes in a request, before anything is asked


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["distill", "--prompt", "p", "--response", "r"], "nothing says what to train"),
        (["distill", "--adapter", "a", "--response", "r"], "--prompt is missing"),
        (["distill", "--adapter", "a", "--prompt", "p"], "--response is missing"),
        (
            ["distill", "--adapter", "a", "--prompt", "@absent.txt", "--response", "r"],
            "--prompt: absent.txt: No such file",
        ),
        (["distill", "-f", "absent.yaml"], "-f: absent.yaml: No such file"),
        (["distill", "-f", "-", "--prompt", "@-"], "both read stdin"),
        (["distill", "--adapter", "a", "--prompt", "p", "--response", "r", "-t", "alpha"], "is not NAME=VALUE"),
        (["get", "requests", "--key", "k"], "--key and --token go with --url"),
        (["get", "requests", "--url", "https://x.test", "--key", "k", "--token", "t"], "contradict each other"),
        (["get", "requests", "--url", "x.test"], "is not the url of a server"),
        (["get", "requests", "--kubeconfig", "/absent"], "no kubeconfig can be used"),
        (["fork", "s3://b/a/", "--version", "v", "--output-uri", "s3://b/c/"], "--version goes with an adapter's name"),
        (["serve", "--auth", "None"], "--auth None needs a namespace"),
        (["serve", "--auth-namespace", "x"], "--auth-namespace goes with --auth None"),
        (["deploy", "--chart", "/absent"], "--chart: there is no /absent"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(words: list[str], says: str) -> None:
    done = Claas({"KUBECONFIG": "/nonexistent"})(*words)
    assert (done.code, done.out) == (Exit.USAGE, "")
    assert done.err.startswith("claas: ")
    assert says in done.err
    assert len(done.err.splitlines()) >= 2, "what to do is said too"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "must hold one mapping"),
        ("a: 1\n---\nb: 2", "holds 2 document(s)"),
        ("a: [", "neither YAML nor JSON"),
        ("kind: Pod\nspec: {}", "kind: must be DistillRequest"),
        ("kind: DistillRequest\napiVersion: v1\nspec: {}", "apiVersion: must be claas.dev/v1alpha1"),
    ],
)
def test_a_file_that_is_no_request_is_refused(text: str, says: str) -> None:
    done = Claas({"KUBECONFIG": "/nonexistent"})("distill", "-f", "-", stdin=text)
    assert (done.code, done.out) == (Exit.USAGE, "")
    assert says in done.err


def test_nobody_answers() -> None:
    done = claas("health", "--url", "http://127.0.0.1:9")
    assert (done.code, done.out) == (Exit.UNREACHABLE, "")
    assert "given up after 4 tries" in done.err


def test_fsck_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = Claas({"CLAAS_FILE_ROOTS": str(tmp_path)})("fsck", f"file://{tmp_path}/absent/")
    assert done.code == Exit.FAILED
    assert "nothing lies there" in done.out


# The base install


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with `pip install .` alone; its folder of programs."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    uv = [sys.executable, "-m", "uv", "-q"]
    subprocess.run([*uv, "venv", "--python", sys.executable, str(folder)], check=True, timeout=120)
    target = ["--python", str(folder / "bin" / "python")]
    subprocess.run([*uv, "pip", "install", *target, str(ROOT)], check=True, timeout=240)
    return folder / "bin"


def test_the_base_install_helps_validates_and_brings_the_client(bare: Path, tmp_path: Path) -> None:
    claas = Claas({"PYTHONPATH": ""}, command=[str(bare / "claas")])
    assert "distill" in claas("--help").out
    assert claas("validate", str(ROOT / "examples" / "request.yaml")).code == 0
    assert claas("reasons", "-o", "json").json["AdapterBusy"]
    code = "import claas_client, pathlib; print((pathlib.Path(claas_client.__file__).parent / 'py.typed').exists())"
    done = subprocess.run([bare / "python", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["get", "adapters"], "operator"),
        (["distill", "--adapter", "a", "--prompt", "p", "--response", "r"], "operator"),
        (["doctor"], "operator"),
        (["logs", "x"], "operator"),
        (["serve"], "operator"),
        (["fsck", "s3://bucket/a/"], "store"),
    ],
)
def test_the_base_install_says_what_is_missing(bare: Path, words: list[str], extra: str) -> None:
    done = Claas({"PYTHONPATH": ""}, command=[str(bare / "claas")])(*words)
    assert done.code == Exit.FAILED
    assert f"pip install 'claas[{extra}]'" in done.err


def test_the_base_install_works_by_url(bare: Path) -> None:
    claas = Claas({"PYTHONPATH": "", "CLAAS_URL": "http://127.0.0.1:9"}, command=[str(bare / "claas")])
    assert claas("get", "adapters").code == Exit.UNREACHABLE


def test_the_examples_of_the_repository_are_valid() -> None:
    files = sorted(map(str, (ROOT / "examples").rglob("*.yaml")))
    assert claas("validate", *files).code == 0
