"""`python -m claas_operator.shim`: serves the REST API."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from claas_operator.settings import SettingsError
from claas_operator.shim.settings import load


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser("python -m claas_operator.shim", description="The REST API of CLaaS.")
    parser.add_argument(
        "--config", type=Path, default=Path("/etc/claas/shim.yaml"), help="settings (default %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="(default %(default)s)")
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    options = parser.parse_args(arguments)
    try:
        settings = load(options.config)
    except SettingsError as error:
        print(f"claas shim: {error}", file=sys.stderr)
        return 1
    from claas_operator.shim.app import run

    return run(settings, host=options.host, port=options.port, log_level=options.log_level)


if __name__ == "__main__":
    sys.exit(main())
