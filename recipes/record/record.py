"""`know-hf record` as a script for `accelerate launch`.

    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml recipes/record/record.py \\
        --config recipes/record/imdb.yaml
    accelerate launch recipes/record/record.py --config recipes/record/imdb.yaml --plan
    accelerate launch recipes/record/record.py --help

A second run with the same arguments resumes at the first missing state.
"""

import sys

from know_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["record", *sys.argv[1:]]))
