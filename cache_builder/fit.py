"""Fitting how a build stores features on tokens of its first shard, and what that loses on tokens that no fit saw."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cache_builder.features import TooFewTokensError, fit_features, reconstruction_error
from specauf.cache.features import FeatureCodec
from specauf.cache.schema import FeatureKind
from specauf.errors import UserError


@dataclass(frozen=True)
class Fitting:
    """How features are to be stored, and on how much that is fitted.

    Attributes:
        kind: of storage.
        taps: taps that are concatenated.
        rank: of a sketch.
        fit_tokens: tokens to fit on, at most.
        more: what gives more tokens where they are too few; empty where nothing does.
    """

    kind: FeatureKind
    taps: int
    rank: int
    fit_tokens: int
    more: str = ""

    @property
    def needed(self) -> bool:
        """Whether this kind of storage is fitted at all."""
        return self.kind in ("int8", "sketch")

    def codec(self, parts: Iterable[Float[Tensor, "_ features"]]) -> FeatureCodec:
        """Fit on some documents' features.

        Raises:
            UserError: there are fewer tokens than the sketch's rank, or they hold NaN or Inf.
        """
        return self._fit(torch.cat(list(parts))) if self.needed else FeatureCodec(self.kind, self.taps)

    def measured(self, parts: Iterable[Float[Tensor, "_ features"]]) -> tuple[FeatureCodec, list[float]]:
        """`codec`, and the relative squared error of each tap on tokens that were not fitted.

        Returns:
            No errors for features that are not fitted, and where the tokens are too few to leave some out.

        Raises:
            UserError: as `codec`.
        """
        if not self.needed:
            return FeatureCodec(self.kind, self.taps), []
        whole = torch.cat(list(parts))
        codec = self._fit(whole)
        return codec, self._errors(whole, codec)

    def _fit(self, whole: Float[Tensor, "tokens features"]) -> FeatureCodec:
        try:
            return self._fit_on(whole[:: self._step(whole)][: self.fit_tokens])
        except TooFewTokensError as error:
            more = self.more if len(whole) < self.fit_tokens else "raise --fit_tokens"
            raise UserError(f"{error}: lower --sketch_rank" + (more and f", or {more}")) from error

    def _errors(self, whole: Float[Tensor, "tokens features"], codec: FeatureCodec) -> list[float]:
        step = self._step(whole)
        if step > 1:
            return reconstruction_error(whole[step // 2 :: 4 * step].cpu().float(), codec)
        # All tokens were wanted for the fit. A quarter of them, the last documents, tells what it loses on others.
        seen = 3 * len(whole) // 4
        if self.fit_tokens <= seen:  # the fit itself left as many out
            seen = self.fit_tokens
        elif seen == 0:
            return []
        else:
            try:
                codec = self._fit_on(whole[:seen])
            except TooFewTokensError:
                return []
        unseen = whole[seen:]
        some = -(-4 * len(unseen) // len(whole))
        return reconstruction_error(unseen[::some].cpu().float(), codec)

    def _step(self, whole: Float[Tensor, "tokens features"]) -> int:
        return max(1, len(whole) // self.fit_tokens)

    def _fit_on(self, sample: Float[Tensor, "tokens features"]) -> FeatureCodec:
        return fit_features(sample.cpu().float(), self.kind, self.taps, self.rank)


def loss_text(codec: FeatureCodec, errors: Sequence[float], taps: Sequence[int]) -> str:
    """What `Fitting.measured` found, in one line; empty for features that are not fitted."""
    if codec.channel_scale is None:
        return ""
    if not errors:
        return f"features: {codec.kind}, error not measured: the first shard has too few tokens to leave some out"
    said = ", ".join(f"{tap}: {error:.3f}" for tap, error in zip(taps, errors, strict=True))
    return f"features: {codec.kind}, relative squared error on tokens not fitted, by tap {said}"
