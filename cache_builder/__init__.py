"""cache_builder: run the target once over a corpus and write what training needs to a sharded Zarr cache."""

import os

# The same bytes whatever the number of threads: MKL's products, which attention uses, else depend on it.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
