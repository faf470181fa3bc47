"""`python -m hf_faim2f.cli` runs `faim2f`."""

import sys

from . import main

sys.exit(main())
