"""How the threads of a command wait for each other."""

import os


def share_cores() -> None:
    """Let a waiting thread sleep soon, unless the environment says how threads wait; call it before torch is imported.

    GNU's OpenMP, which torch's Linux builds carry, has a thread spin for milliseconds at the end of every product. If
    another program wants a core, the spinning thread keeps it from the one that is waited for. This number spans the
    gaps between a small model's products; with a tenth of it threads sleep in each, and decoding takes a third longer
    (docs/decisions.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
