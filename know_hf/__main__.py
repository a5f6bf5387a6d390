"""`python -m know_hf` is `know-hf`."""

import sys

from .cli import main

if __name__ == "__main__":  # the processes of a comparison import this module again
    sys.exit(main())
