"""`python -m claas_operator.cli`: the `claas` command where its script is not on the PATH."""

from __future__ import annotations

import sys

from claas_operator.cli import main

if __name__ == "__main__":
    sys.exit(main())
