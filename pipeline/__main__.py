"""`python -m pipeline`: nothing but the call, so that no class here is pickled by value."""

import os
import sys
from contextlib import suppress

from pipeline.cli import main

if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        # Before the run has taken over the signals there is nothing to finish.
        code = 130
    for stream in (sys.stdout, sys.stderr):
        if stream:
            with suppress(OSError, ValueError):
                stream.flush()
    # A job that was submitted has servers of Beam's beside it, which end with the interpreter. Else
    # all that counts is written and committed; taking Beam apart would cost a quarter of a second.
    if "pipeline.submit.streaming" in sys.modules:
        sys.exit(code)
    os._exit(code)
