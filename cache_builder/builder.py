"""Building a cache: lock, plan, target, first shard with the feature fit, all other shards, manifest."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors.numpy import load
from torch import Tensor

from cache_builder.chat import ChatRenderer
from cache_builder.config import BUILD, BuildConfig, told
from cache_builder.document import BuiltDocument
from cache_builder.documents import Advance, DocumentMaker
from cache_builder.features import fit_features, reconstruction_error
from cache_builder.identity import make_identity
from cache_builder.plan import Plan, make_plan
from cache_builder.target import Target
from cache_builder.writer import (
    IDENTITY,
    StorageSpec,
    begin,
    committed_shards,
    shard_name,
    write_manifest,
    write_shard,
    write_target,
)
from specauf.cache.features import FeatureCodec
from specauf.cache.location import Location
from specauf.cache.objects import read_checked
from specauf.cache.reader import FEATURE_FIT, MANIFEST, TARGET
from specauf.cache.schema import CommitRecord, FeatureKind, Identity, Manifest, from_json, to_json
from specauf.errors import UserError
from specauf.targets import load_target


@dataclass(frozen=True)
class Build:
    """One cache in the making, as every rank sees it.

    Attributes:
        config: of the build.
        plan: which documents stand in which shard.
        target: runs over them.
        maker: makes them.
        identity: of the cache.
    """

    config: BuildConfig
    plan: Plan
    target: Target
    maker: DocumentMaker
    identity: Identity

    def missing(self) -> list[int]:
        """Shards that are not committed yet."""
        committed = committed_shards(self.config.out, self.identity)
        return [n for n in range(self.plan.num_shards) if n not in committed]

    def claim(self) -> None:
        """Mark the directory as this build's; only the first rank does.

        Raises:
            UserError: the directory holds another cache.
        """
        place = Location(self.config.out)
        place.sweep()
        files = place.files() if place.exists() else {}
        if not {MANIFEST, IDENTITY} & files.keys() and committed_shards(self.config.out, self.identity):
            # The manifest was lost or thrown away; the commit records say that the shards are this build's.
            place.write(IDENTITY, to_json(self.identity))
        begin(self.config.out, self.identity)
        place.write(BUILD, told(self.config))

    def prepare(self, advance: Advance) -> None:
        """Fit how features are stored, and store the target; only the first rank does, before any other shard.

        Raises:
            UserError: the sample is too small for the sketch, or what `build_shard` raises.
        """
        if f"{TARGET}.json" in Location(self.config.out).files():
            return
        # Scales and basis come from the first shard, so that one rank or many fit the same.
        documents, drops = self._make(0, advance)
        codec, errors = self.fit(documents)
        write_target(
            self.config.out,
            self.identity,
            config={name: v for name, v in self.target.model.config.to_dict().items() if name != "_name_or_path"},
            embed_tokens=self.target.embed_tokens,
            lm_head=None if self.target.tied else self.target.lm_head,
            tokenizer=self.target.tokenizer,
            codec=codec,
        )
        if errors:
            said = ", ".join(f"{tap}: {error:.3f}" for tap, error in zip(self.target.taps, errors, strict=True))
            print(f"features: {codec.kind}, relative squared error by tap {said}", file=sys.stderr)
        if 0 in self.missing():
            self._write(0, documents, drops, codec)

    def fit(self, documents: list[BuiltDocument]) -> tuple[FeatureCodec, list[float]]:
        """`fit_codec` on some documents, as this build stores features."""
        return fit_codec(
            (d.features for d in documents if d.features is not None),
            self.config.features,
            taps=len(self.target.taps),
            rank=self.identity.sketch_rank,
            fit_tokens=self.config.fit_tokens,
        )

    def build_shard(self, number: int, codec: FeatureCodec, advance: Advance) -> None:
        """Make one shard and commit it.

        Raises:
            UserError: the target gives NaN, the disk is full, or no document of the shard is left.
        """
        documents, drops = self._make(number, advance)
        self._write(number, documents, drops, codec)

    def finish(self) -> Manifest:
        """Write the manifest."""
        return write_manifest(self.config.out, self.identity, self.plan.drops)

    def _make(self, number: int, advance: Advance) -> tuple[list[BuiltDocument], dict[str, int]]:
        documents, drops = self.maker.make(self.plan.shard(number), advance)
        if not documents:
            counts = ", ".join(f"{reason} {n}" for reason, n in sorted(drops.items()))
            raise UserError(
                f"{shard_name(number)}: none of its {len(self.plan.shard(number))} documents is left ({counts}): "
                "raise --documents_per_shard, or relax what drops them"
            )
        return documents, drops

    def _write(self, number: int, documents: list[BuiltDocument], drops: dict[str, int], codec: FeatureCodec) -> None:
        spec = StorageSpec(self.identity, codec, self.config.compress_features, self.target.device)
        write_shard(self.config.out, number, documents, spec, drops)


def open_build(config: BuildConfig, *, device: torch.device | str = "cpu") -> Build:
    """Plan the corpus and load the target.

    Raises:
        UserError: the corpus, the target or a setting is wrong.
    """
    if Location(config.out).is_file():
        raise UserError(f"{config.out} is a file, expected a directory for the cache: give another --out")
    plan = make_plan(config)
    model, tokenizer = load_target(config.target, device=device)
    target = Target(model, tokenizer, config.target, k=config.k)
    renderer = ChatRenderer(tokenizer, target.stop_ids, config.target.template_options)
    if plan.conversation(0).text is None:
        renderer.require_template()
    identity = make_identity(config, plan, target)
    maker = DocumentMaker(config, plan, target, renderer, identity.mask_token_id)
    return Build(config, plan, target, maker, identity)


def load_codec(out: str, identity: Identity) -> FeatureCodec:
    """How features are stored, from the target's files of a cache in the making.

    Raises:
        UserError: the files are damaged.
    """
    taps = len(identity.taps)
    if identity.features in ("none", "bf16"):
        return FeatureCodec(identity.features, taps)
    place = Location(out)
    record = from_json(CommitRecord, place.read(f"{TARGET}.json"), f"{out}/{TARGET}.json")
    arrays = load(read_checked(place.child(TARGET), record, [FEATURE_FIT])[FEATURE_FIT])
    return FeatureCodec(identity.features, taps, arrays["channel_scale"], arrays.get("basis"))


def fit_codec(
    parts: Iterable[Tensor], kind: FeatureKind, *, taps: int, rank: int, fit_tokens: int
) -> tuple[FeatureCodec, list[float]]:
    """How features are stored, fitted on some documents, and the relative error of each tap on tokens between.

    Args:
        parts: features of each document.
        kind: how they are to be stored.
        taps: taps that are concatenated.
        rank: of a sketch.
        fit_tokens: tokens to fit on.

    Raises:
        UserError: there are fewer tokens than the sketch's rank.
    """
    if kind not in ("int8", "sketch"):
        return FeatureCodec(kind, taps), []
    whole = torch.cat(list(parts))
    step = max(1, len(whole) // fit_tokens)
    codec = fit_features(whole[::step][:fit_tokens].float(), kind, taps, rank)
    unseen = whole[step // 2 :: 4 * step].float()
    return codec, reconstruction_error(unseen, codec)
