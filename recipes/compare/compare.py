r"""Compare the arms of a suite; the same as `know-hf compare`.

    python recipes/compare/compare.py mnist-halves --output-dir outputs/mnist-halves --processes 2
    python recipes/compare/compare.py fashion-halves:vit --output-dir outputs/fashion-vit --processes 2 \
        --data zalando-datasets/fashion_mnist=/path/to/fashion_mnist
"""

import sys

from know_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
