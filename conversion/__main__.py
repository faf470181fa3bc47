"""`python -m conversion` runs `faim2f convert`."""

import sys

from hf_faim2f.cli.convert import PROGRAM, main
from hf_faim2f.cli.output import interrupted, sigterm_interrupts, silence_libraries

if __name__ == "__main__":
    silence_libraries()
    try:
        with sigterm_interrupts(1):
            sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(interrupted(PROGRAM))
