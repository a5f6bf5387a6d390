"""`know-hf predict` as a script for `accelerate launch`.

accelerate launch --config_file recipes/accelerate_configs/ddp.yaml recipes/predict/predict.py trajectory/ \\
    --steps 2 --output-dir enhanced/
accelerate launch recipes/predict/predict.py trajectory/ --steps 2 --output-dir enhanced/ --dry-run
accelerate launch recipes/predict/predict.py --help
"""

import sys

from know_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
