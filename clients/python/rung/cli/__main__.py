"""`python -m rung.cli`: the `rung` command of exactly this interpreter."""

import sys

from rung.cli import main

if __name__ == "__main__":
    sys.exit(main())
