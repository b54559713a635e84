"""`python -m claas_crds`: write the CRD files and docs/reasons.md; `--check`: only say which differ; `reasons`: print
the table of reasons."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from claas_crds.generate import files
from claas_crds.reasons import table


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 when `--check` finds a file that differs."""
    parser = argparse.ArgumentParser(prog="python -m claas_crds", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("files", "reasons"), default="files")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs from the models")
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).resolve().parents[2], help="the repository (default: this one)"
    )
    options = parser.parse_args(arguments)
    if options.what == "reasons":
        print(table())
        return 0
    if not (options.root / "pyproject.toml").is_file():
        parser.error(f"{options.root} is not the repository: name it with --root")
    stale = [
        path
        for path, text in files().items()
        if not (file := options.root / path).is_file() or file.read_text(encoding="utf-8") != text
    ]
    if options.check:
        for path in stale:
            print(f"{path} differs from the models: run `python -m claas_crds` and commit it", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        (options.root / path).parent.mkdir(parents=True, exist_ok=True)
        (options.root / path).write_text(files()[path], encoding="utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
