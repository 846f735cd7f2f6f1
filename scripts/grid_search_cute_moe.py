"""`kestrel-kernels tune moe` under the name it has elsewhere.

python -m scripts.grid_search_cute_moe [--num-tokens 8 16 32] [--quick] [--output results.json] ...
"""

from __future__ import annotations

import sys

from kestrel_kernels._tune import main

if __name__ == "__main__":
    sys.exit(main(["moe", *sys.argv[1:]]))
