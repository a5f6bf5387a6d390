"""Fine-tunes any model on any dataset for a common task, makes it forget, and records every state.

    accelerate launch recipes/record/record.py --config recipes/record/imdb.yaml
    accelerate launch recipes/record/record.py --config recipes/record/imdb.yaml --plan   # only cost and disk
    accelerate launch recipes/record/record.py --help

The same as `know-hf record`, as a script for `accelerate launch`. Flags go before the YAML. Run again, it goes on with
the first state that is missing.
"""

import sys

from know_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["record", *sys.argv[1:]]))
