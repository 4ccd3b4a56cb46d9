"""`python -m retain`, and so `accelerate launch -m retain`."""

import sys

from retain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
