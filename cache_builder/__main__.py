"""`python -m cache_builder`."""

from cache_builder.cli import main

raise SystemExit(main())
