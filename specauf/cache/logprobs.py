"""How log-probabilities, their tail mass and token ids become small integers, and back. Pure numpy.

The square root of a probability is kept in steps of 1/512 while it is above 1/16 (probability 1/256), and below that
the log-probability in steps of 1/16 nat; the two meet with equal slope. KL(exact || decoded) is about half the sum of
p * (error of log p)^2, and a uniform step in sqrt(p) spreads it evenly over the entries, so that is where bits go.
"""

import math

import numpy as np
from jaxtyping import Float, Int, Int16, UInt16

SQRT_STEPS = 512
KNEE_SQRT = 1 / 16
KNEE_CODE = round(SQRT_STEPS * (1 - KNEE_SQRT))
KNEE_LOGPROB = 2 * math.log(KNEE_SQRT)
LOG_STEP = 2 / (SQRT_STEPS * KNEE_SQRT)
NO_ENTRY = 65535  # a row that keeps fewer than k entries ends in these
MAX_CODE = NO_ENTRY - 1
MASS_STEP = 1 / 256
NO_TAIL = 32767

LOGPROB_ERROR_BOUND = LOG_STEP  # nats; half a step from rounding, and at most as much from fixing the row's mass


def _code_table() -> Float[np.ndarray, " codes"]:
    code = np.arange(NO_ENTRY + 1, dtype=np.float64)
    high = 2 * np.log(np.maximum(1 - code / SQRT_STEPS, KNEE_SQRT))
    low = KNEE_LOGPROB - (code - KNEE_CODE) * LOG_STEP
    table = np.where(code <= KNEE_CODE, high, low)
    table[NO_ENTRY] = -np.inf
    return table


_LOGPROB = _code_table().astype(np.float32)
_PROBABILITY = np.exp(_code_table()).astype(np.float32)
_BLOCK_ROWS = 2048  # what is worked on stays in the processor's cache
_EACH_LANE = np.uint64(0x0001_0001_0001_0001)


def encode_logprobs(logprobs: Float[np.ndarray, "rows k"]) -> UInt16[np.ndarray, "rows k"]:
    """Codes of descending log-probabilities, as differences along k (the first is the code itself).

    Args:
        logprobs: nats, absolute, descending in each row; -inf for entries a row does not have.
    """
    exact = logprobs.astype(np.float64)
    high = SQRT_STEPS * (1 - np.exp(np.minimum(exact, 0) / 2))
    with np.errstate(invalid="ignore"):
        low = KNEE_CODE + (KNEE_LOGPROB - exact) / LOG_STEP
    code = np.minimum(np.round(np.where(exact >= KNEE_LOGPROB, high, low)), MAX_CODE)
    code = np.where(np.isneginf(exact), NO_ENTRY, code).astype(np.int32)
    return np.diff(code, axis=1, prepend=0).astype(np.uint16)


def decode_logprobs(
    deltas: UInt16[np.ndarray, "rows k"], head_mass: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, "rows k"]:
    """Log-probabilities in nats whose probabilities sum to `head_mass` in each row.

    Rounding moves a row's sum by up to half a percent; the stored mass is far more exact, so the row is shifted to it.
    """
    values = np.empty(deltas.shape, np.float32)
    mass = np.log(head_mass)
    for start in range(0, len(deltas), _BLOCK_ROWS):
        part, out = deltas[start : start + _BLOCK_ROWS], values[start : start + _BLOCK_ROWS]
        codes = _running_sums(part).astype(np.intp)  # once for both tables
        _LOGPROB.take(codes, out=out, mode="clip")  # every code is in the table; clipping only saves the check
        sums = np.einsum("rk->r", _PROBABILITY.take(codes, mode="clip"))  # five times the speed of sum(1)
        out += (mass[start : start + _BLOCK_ROWS] - np.log(sums))[:, None]
    return values


def _running_sums(deltas: UInt16[np.ndarray, "rows k"]) -> UInt16[np.ndarray, "rows k"]:
    """Sums along k, none above 65535: four lie side by side in a 64-bit number, and none carries into the next."""
    k = deltas.shape[1]
    padded = np.pad(deltas, ((0, 0), (0, -k % 4))) if k % 4 else np.ascontiguousarray(deltas)
    sums = padded.view("<u8") * _EACH_LANE  # sums within four
    whole = sums >> 48
    # One sum through all rows, less what it was before each: many short sums take three times as long.
    before = np.cumsum(whole).reshape(sums.shape)
    before -= whole
    before -= before[:, :1].copy()
    before *= _EACH_LANE
    sums += before
    return sums.astype("<u8", copy=False).view("<u2")[:, :k]


def encode_head_mass(head_mass: Float[np.ndarray, " rows"]) -> Int16[np.ndarray, " rows"]:
    """Codes of log(mass / tail) in steps of 1/256: a small tail and a small head both keep their relative size.

    32767 says that there is no tail.
    """
    mass = np.clip(head_mass.astype(np.float64), 0, 1)
    with np.errstate(divide="ignore"):
        code = np.round((np.log(mass) - np.log(1 - mass)) / MASS_STEP)
    return np.clip(code, -NO_TAIL, NO_TAIL).astype(np.int16)


def decode_head_mass(codes: Int16[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """Probability the kept entries of each row hold together."""
    mass = 1 / (1 + np.exp(-codes.astype(np.float64) * MASS_STEP))
    return np.where(codes == NO_TAIL, 1.0, mass).astype(np.float32)


def smallest_uint(largest: int) -> np.dtype[np.unsignedinteger]:
    """The narrowest unsigned integer type that holds `largest`."""
    return np.dtype(np.uint16 if largest < 2**16 else np.uint32)


def encode_ids(ids: Int[np.ndarray, "rows k"], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids as ranks into a table of the ids that occur, most frequent first: most ranks have an empty high byte.

    Returns:
        ranks [rows, k] and table [distinct ids]; ties go to the smaller id.
    """
    counts = np.bincount(ids.ravel(), minlength=vocab_size)
    table = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    rank = np.zeros(vocab_size, np.int64)
    rank[table] = np.arange(len(table))
    return rank[ids].astype(smallest_uint(max(0, len(table) - 1))), table.astype(smallest_uint(vocab_size - 1))


def decode_ids(ranks: np.ndarray, table: np.ndarray) -> Int[np.ndarray, "rows k"]:
    """Token ids of ranks."""
    return table.astype(np.int64, copy=False).take(ranks)
