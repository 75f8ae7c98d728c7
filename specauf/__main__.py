"""`python -m specauf` is `specauf`."""

import sys

from specauf.cli import main

sys.exit(main())
