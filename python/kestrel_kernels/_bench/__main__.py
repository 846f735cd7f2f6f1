"""`python -m kestrel_kernels._bench`: the same as `kestrel-kernels bench`."""

import sys

from kestrel_kernels._bench import main

sys.exit(main(sys.argv[1:]))
