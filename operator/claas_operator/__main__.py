"""`python -m claas_operator`: the operator itself, the same as `claas operator run`."""

from __future__ import annotations

import sys

from claas_operator.cli import main

if __name__ == "__main__":
    sys.exit(main(["operator", "run", *sys.argv[1:]]))
