"""`python -m hf_faim2f.cli` is `faim2f`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
