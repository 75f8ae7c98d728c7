"""Read in the environment `dflash_mlx` by its scripts: z-lab's drafter of a directory, on a CPU."""

import dflash.model_mlx
import mlx.core as mx

# It asks the hub for any name; here a name is a directory.
dflash.model_mlx.snapshot_download = lambda name, **_: name
# What it fuses on a CPU goes through the machine's C++ compiler.
mx.disable_compile()

load_draft = dflash.model_mlx.load_draft
