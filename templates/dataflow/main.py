"""What the template's launcher runs: nothing but the call, so that no class here is pickled."""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
