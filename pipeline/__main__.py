"""`python -m pipeline`: nothing but the call, so that no class here is pickled by value."""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
