"""Building a cache: lock, plan, target, first shard with the feature fit, all other shards, manifest."""

import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from cache_builder.beginning import (
    as_begun,
    begin,
    begun_with,
    differences,
    require_place,
    restore_identity,
    says_whose,
)
from cache_builder.chat import ChatRenderer
from cache_builder.config import BUILD, BuildConfig, read_told, told
from cache_builder.dates import prompt_date
from cache_builder.document import BuiltDocument
from cache_builder.documents import Advance, DocumentMaker
from cache_builder.fit import Fitting, loss_text
from cache_builder.identity import make_identity, template_hash
from cache_builder.manifest import committed_shards, forget_shards
from cache_builder.plan import Plan, make_plan
from cache_builder.target import Target
from cache_builder.writer import (
    StorageSpec,
    fit_can_be_read,
    fit_digest,
    load_codec,
    write_manifest,
    write_shard,
    write_target,
)
from specauf.cache.features import FeatureCodec
from specauf.cache.location import Location, StoreError, sha256
from specauf.cache.reader import FEATURE_FIT, IDENTITY, LOCK, MANIFEST, TARGET
from specauf.cache.schema import CommitRecord, Identity, Manifest, from_json, open_sealed
from specauf.errors import UserError
from specauf.targets import load_target
from specauf.template_dates import asks_date, plain_template


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

    def claim(self, again: Collection[str] = ()) -> None:
        """Mark the directory as this build's; only the first rank does.

        Args:
            again: damaged parts; nothing of them is thrown away before the directory is known to be this build's.

        Raises:
            UserError: the directory holds another cache, or was begun with another setting of storage.
        """
        place = Location(self.config.out)
        files = place.files()
        readable = files.keys() - ({MANIFEST} & set(again))
        if MANIFEST not in readable and not says_whose(place) and committed_shards(self.config.out, self.identity):
            # The manifest was lost or thrown away; the commit records say that the shards are this build's.
            restore_identity(place, self.identity)
        begin(self.config.out, self.identity, damaged_manifest=MANIFEST in again)
        if MANIFEST in readable:
            # What is sealed in must not be replaced by a record that was damaged since: that shard is made again.
            sealed = open_sealed(place.read(MANIFEST), f"{self.config.out}/{MANIFEST}").shards
            records = {f"{entry.name}.json": entry.record for entry in sealed}
            for name, data in place.read_all(list(records)).items():
                if sha256(data) != records[name]:
                    place.remove(name)
        if not self._told_before(place, files):
            place.write(BUILD, told(self.config))
        place.sweep()
        for name in again:
            if name == MANIFEST:
                place.remove(MANIFEST)
            elif name != TARGET:
                place.remove(f"{name}.json")

    def _told_before(self, place: Location, files: Collection[str]) -> bool:
        """Whether the build that began the cache left its settings there, and they are to stay.

        Those of a finished cache are, for its fingerprint covers them; before, the latest place of the target counts.

        Raises:
            UserError: it stored features otherwise, so that shards would not be alike.
        """
        if BUILD not in files or set(files) <= {LOCK, IDENTITY, BUILD}:  # nothing is stored yet
            return False
        try:
            data = place.read(BUILD)
            before = read_told(data, self.config.out)
        except StoreError:
            raise
        except UserError:
            return False  # damaged: written again
        if before.compress_features != self.config.compress_features:
            raise UserError(
                f"compress_features: {before.compress_features} in the build that began {self.config.out}, "
                f"{self.config.compress_features} now: give the same, or another --out"
            )
        if MANIFEST not in files:
            return before.target == self.config.target
        try:
            known = open_sealed(place.read(MANIFEST), MANIFEST).notes.get(BUILD)
        except StoreError:
            raise
        except UserError:
            return True  # a repair writes the manifest again, by these settings
        return known is None or known.sha256 == sha256(data)

    def prepare(self, advance: Advance, *, again: bool = False) -> bool:
        """Fit how features are stored, and store the target; only the first rank does, before any other shard.

        Args:
            advance: reports progress.
            again: also where the target is stored already, for its files are damaged.

        Returns:
            Whether there was anything to do; if so, other shards than before may be missing.

        Raises:
            UserError: the sample is too small for the sketch, or what `make` and `write` raise.
        """
        stored = f"{TARGET}.json" in Location(self.config.out).files()
        if stored and not again and (fit_can_be_read(self.config.out, self.identity) or not self.missing()):
            return False
        before, codec = self._stored_fit()
        first: tuple[int, list[BuiltDocument], dict[str, int]] | None = None
        if codec is None:
            # Scales and basis come from the first shard with a document, so that one rank or many fit the same.
            first = self._first(advance)
            codec, errors = self.fit(first[1])
            if said := loss_text(codec, errors, self.target.taps):
                print(said, file=sys.stderr)
        if fit_digest(codec) not in (None, before):
            # Codes of another fit would be decoded wrongly, and no digest could tell. Before the new one is stored: a
            # build that is killed in between would take it for that of the shards.
            forget_shards(self.config.out, self.identity)
        write_target(
            self.config.out,
            self.identity,
            config=self.target.config_for_drafters(),
            embed_tokens=self.target.embed_tokens,
            lm_head=None if self.target.tied else self.target.lm_head,
            tokenizer=self.target.tokenizer,
            codec=codec,
        )
        if first is not None and first[0] in self.missing():
            self.write(*first, codec)
        return True

    def _stored_fit(self) -> tuple[str | None, FeatureCodec | None]:
        """Digest of the fit that the shards were stored with, as far as it is known, and the fit where it is whole."""
        place = Location(self.config.out)
        try:
            record = from_json(CommitRecord, place.read(f"{TARGET}.json"), TARGET)
            digest = record.objects[FEATURE_FIT].sha256
        except StoreError:
            raise
        except (FileNotFoundError, KeyError, UserError):
            digest = None
        try:
            data = place.child(TARGET).read(FEATURE_FIT)
        except FileNotFoundError:
            return digest, None
        if digest is None or sha256(data) != digest:
            return digest or sha256(data), None
        return digest, load_codec(self.config.out, self.identity)

    def _first(self, advance: Advance) -> tuple[int, list[BuiltDocument], dict[str, int]]:
        """Number, documents and drops of the first shard of which anything is left."""
        committed = committed_shards(self.config.out, self.identity)
        total: Counter[str] = Counter(self.plan.drops)
        for number in range(self.plan.num_shards):
            if number in committed and not committed[number].counts.documents:
                total.update(committed[number].drops)
                continue
            documents, drops = self.make(number, advance)
            if documents:
                return number, documents, drops
            total.update(drops)
            self.write(number, [], drops, FeatureCodec("none", 0))
        said = ", ".join(f"{n} {reason}" for reason, n in sorted(total.items()))
        raise UserError(f"corpus {self.config.corpus}: no document is left ({said}): relax what drops them")

    def fit(self, documents: list[BuiltDocument], more: str | None = None) -> tuple[FeatureCodec, list[float]]:
        """How this build stores features, fitted on some documents, and the relative error of each tap on others.

        Args:
            documents: made by this build.
            more: what gives more of them, where it is not the build's own first shard.

        Raises:
            UserError: they have too few tokens for the sketch.
        """
        if more is None:
            all_of_them = self.plan.num_shards == 1
            more = "give more documents or --features=int8" if all_of_them else "raise --documents_per_shard"
        fitting = Fitting(
            self.config.features, len(self.target.taps), self.identity.sketch_rank, self.config.fit_tokens, more
        )
        return fitting.measured(d.features for d in documents if d.features is not None)

    def make(self, number: int, advance: Advance) -> tuple[list[BuiltDocument], dict[str, int]]:
        """A shard's documents, and how many were left out for which reason.

        Raises:
            UserError: the target gives NaN.
        """
        return self.maker.make(self.plan.shard(number), advance)

    def write(
        self,
        number: int,
        documents: list[BuiltDocument],
        drops: dict[str, int],
        codec: FeatureCodec,
        confirm: Callable[[], object] = lambda: None,
    ) -> None:
        """Commit a shard.

        Args:
            number: of the shard.
            documents: as `make` gives them.
            drops: as well.
            codec: how features are stored.
            confirm: of the lock, just before the shard is replaced.

        Raises:
            UserError: the features hold NaN, or the disk is full.
        """
        spec = StorageSpec(self.identity, codec, self.config.compress_features, self.target.device, confirm)
        write_shard(self.config.out, number, documents, spec, drops)

    def require_begun(self) -> None:
        """Check that the first rank began the cache under this rank's identity: ranks may start on two days.

        Raises:
            UserError: it did not.
        """
        found = begun_with(self.config.out)
        differ = {} if found is None else differences(found, self.identity)
        for name, (begun, here) in differ.items():
            raise UserError(
                f"{self.config.out} was begun with {name} {begun!r}, this rank has {here!r}: run the same build again"
            )

    def finish(self) -> Manifest:
        """Write the manifest."""
        return write_manifest(self.config.out, self.identity, self.plan.num_shards, self.plan.drops)


def open_build(config: BuildConfig, *, device: torch.device | str = "cpu") -> Build:
    """Plan the corpus and load the target.

    Raises:
        UserError: the corpus, the target or a setting is wrong.
    """
    require_place(config.out)
    known = begun_with(config.out)
    config = _at_the_commit_begun(config, known)
    plan = make_plan(config)
    model, tokenizer = load_target(config.target, device=device)
    target = Target(model, tokenizer, config.target, k=config.k)
    target.require_positions(config.max_length)
    options = config.target.template_options
    date = None
    if asks_date(plain_template(tokenizer, options)):
        date = prompt_date(known, template_hash(tokenizer, options), config.out)
    renderer = ChatRenderer(tokenizer, target.stop_ids, options, date)
    if plan.conversation(0).text is None:
        renderer.require_template()
    identity = as_begun(config.out, make_identity(config, plan, target, date))
    maker = DocumentMaker(config, plan, target, renderer, identity.mask_token_id)
    return Build(config, plan, target, maker, identity)


def _at_the_commit_begun(config: BuildConfig, known: Identity | None) -> BuildConfig:
    """A cache of a hub's target goes on at the commit it was begun with, wherever its branch is now."""
    if known is None or config.target.revision is not None or known.target.get("id") != config.target.model:
        return config
    return replace(config, target=replace(config.target, revision=known.target.get("revision")))
