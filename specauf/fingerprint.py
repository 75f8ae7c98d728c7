"""What tells a target's weights on disk from others, at the speed at which they are read."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from specauf.errors import UserError

# Of each end of every file; the whole of the middle is in the checksum, which the first caches do not have.
END_BYTES = 1 << 20
CHECKSUM, CODE = "checksum", "code"


def weights_on_disk(place: Path, gguf_file: str | None, *, runs_code: bool = False) -> dict[str, str]:
    """Digests of the files that make the model: `fingerprint` of their names, sizes and both ends, `checksum` of all.

    And `code` of the Python files there, where there are any and they are run.

    Args:
        place: the model's directory.
        gguf_file: name of the one file that is loaded; else all weights and settings there.
        runs_code: the model is what the Python files beside it make of the weights.

    Raises:
        UserError: there are none.
    """
    patterns = [gguf_file] if gguf_file else ["*.safetensors", "*.bin", "*.json"]
    files = sorted({p for pattern in patterns for p in place.glob(pattern)})
    if not files:
        raise UserError(f"target: no {' or '.join(patterns)} in {place}; give a directory with config and weights")
    ends, whole = hashlib.sha256(), hashlib.sha256()
    for path in files:
        size, crc = path.stat().st_size, 0
        ends.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            # sha256 of an 8-billion target would take as long as loading it; this finds a change by accident as well.
            while piece := file.read(END_BYTES):
                crc = google_crc32c.extend(crc, piece)
            file.seek(0)
            ends.update(file.read(END_BYTES))
            if size > END_BYTES:
                file.seek(max(END_BYTES, size - END_BYTES))
                ends.update(file.read())
        whole.update(f"{path.name}:{size}:{crc}\n".encode())
    found = {"fingerprint": ends.hexdigest(), CHECKSUM: whole.hexdigest()}
    sources = {path.name: path.read_bytes() for path in sorted(place.glob("*.py"))} if runs_code else {}
    if sources:
        code = hashlib.sha256()
        for name, data in sources.items():
            code.update(f"{name}:{len(data)}\n".encode() + data)
        found[CODE] = code.hexdigest()
    return found


def comparable(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two targets' identities, without the digests that one lacks, for it was written before there were any."""
    left_out = {CHECKSUM, CODE} - (one.keys() & two.keys())
    first, second = ({key: v for key, v in target.items() if key not in left_out} for target in (one, two))
    return first, second
