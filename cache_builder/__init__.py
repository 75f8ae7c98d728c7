"""cache_builder: run the target once over a corpus and write what training needs to a sharded Zarr cache."""
