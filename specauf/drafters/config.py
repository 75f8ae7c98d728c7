"""What a drafter is made of: derived from its target's config, written and read in z-lab's layout."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from specauf.cache.target import refuse_unknown_scales
from specauf.drafters.foreign import refuse_other_architectures, require_numbers, require_structure
from specauf.drafters.kind_of_config import zlab_kind
from specauf.drafters.vocabulary import target_scales
from specauf.errors import UserError

DtypeName = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a block drafter.

    Attributes:
        hidden_size: equals the target's, since embedding and head are the target's.
        vocab_size: rows of the target's stored embedding (with its padding rows).
        num_target_layers: depth of the target.
        taps: 0-based target layers whose outputs feed `fc`, in its input order; () for a drafter without features.
        block_size: slots of a block with the anchor's; a block drafts `block_size - 1` tokens.
        mask_token_id: row of the target's embedding that stands in the drafted slots.
        feature_dim: inputs of `fc`; `len(taps) * hidden_size`, or r when training on a sketch of r numbers a token.
        rope_theta: base of the rotary embedding, over the whole head, with absolute positions and no scaling.
        rms_norm_eps: of all norms.
        embedding_scale: factor on the target's embedded tokens (Gemma).
        logit_softcap: cap of the target's logits (Gemma 2), None without.
    """

    kind: ClassVar[str] = "dflash"
    architecture: ClassVar[str] = "DFlashDraftModel"  # servers' name of the code that runs it
    own: ClassVar[tuple[str, ...]] = ()  # fields of `config.json` that DFlash has not

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_target_layers: int
    taps: tuple[int, ...]
    block_size: int
    mask_token_id: int
    feature_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    embedding_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that no server loads."""
        counts = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        for name in (*counts, "intermediate_size"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name}: {getattr(self, name)} found, at least 1 expected; correct the drafter's config"
                )
        if self.block_size < 2:
            raise UserError(
                f"block_size: {self.block_size} found, at least 2 expected (the anchor and one drafted slot)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}; choose a divisor"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim: {self.head_dim} found, an even number expected (rotary pairs)")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(
                f"mask_token_id: {self.mask_token_id} found, a row of the target's stored embedding "
                f"(0..{self.vocab_size - 1}) expected; choose an unused or reserved token, rows added by resizing "
                "do not ship with the target"
            )
        _check_taps(self.taps, self.num_target_layers)

    @property
    def sample_from_anchor(self) -> bool:
        """Each slot's hidden state predicts the token behind it, the anchor's too, and the last slot is not there."""
        return False

    @property
    def slots(self) -> int:
        """Drafted slots of a block."""
        return self.block_size - 1

    def block(self, block_size: int | None) -> int:
        """The block size to decode with: the trained one, or the shorter one that is given.

        Raises:
            UserError: it is longer than trained, or has no drafted slot.
        """
        if block_size is not None and not 2 <= block_size <= self.block_size:
            raise UserError(
                f"block_size: {block_size} found, 2 to {self.block_size} expected (the drafter was trained with "
                f"{self.block_size})"
            )
        return block_size or self.block_size

    @property
    def raw_feature_dim(self) -> int:
        """Numbers a token when all taps are given in full."""
        return len(self.taps) * self.hidden_size

    @classmethod
    def from_target(
        cls,
        target_config: dict[str, Any],
        *,
        num_hidden_layers: int = 2,
        block_size: int = 16,
        taps: tuple[int, ...] | list[int],
        mask_token_id: int,
        feature_dim: int | None = None,
        vocab_size: int | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        rope_theta: int | float | None = None,
        **more: Any,
    ) -> "DrafterConfig":
        """The drafter for a target, from the target's `config.json` as a dict.

        Heads, sizes and rope base are the target's unless given. Rotary is always over the whole head and unscaled,
        whatever the target does (`partial_rotary_factor` and `rope_scaling` are not copied: servers run drafters
        without them).

        Args:
            target_config: the target's config; a multi-modal one is read at its `text_config`.
            num_hidden_layers: depth of the drafter.
            block_size: slots of a block, the anchor's included.
            taps: target layers to read, as the cache holds them; () for a drafter without features.
            mask_token_id: an embedding row that the corpus never uses.
            feature_dim: numbers a token that the cache holds, when it holds a sketch.
            vocab_size: rows of the stored embedding, when the config says otherwise (padded or resized vocabularies).
            num_attention_heads: the target's when None.
            num_key_value_heads: the target's when None.
            head_dim: the target's when None.
            intermediate_size: the target's when None.
            rope_theta: the target's when None.
            more: fields of a subclass.

        Raises:
            UserError: the target's config lacks a number, or is of a kind that a drafter cannot sit on.
        """
        text = target_config.get("text_config") or target_config
        refuse_unknown_scales(text)

        def need(name: str, given: int | float | None) -> Any:
            value = text.get(name) if given is None else given
            if not isinstance(value, int | float):
                raise UserError(
                    f"{name}: {value!r} in the target's config, one number expected; give the drafter's {name}"
                )
            return value

        hidden, depth = need("hidden_size", None), need("num_hidden_layers", None)
        heads = need("num_attention_heads", num_attention_heads)
        if head_dim is None and text.get("head_dim") is None:
            head_dim = hidden // heads
        key_value_heads = num_key_value_heads
        if key_value_heads is None and text.get("num_key_value_heads") is None:
            key_value_heads = heads
        chosen = tuple(taps)
        scale, softcap = target_scales(text)
        return cls(
            hidden_size=hidden,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=need("num_key_value_heads", key_value_heads),
            head_dim=need("head_dim", head_dim),
            intermediate_size=need("intermediate_size", intermediate_size),
            vocab_size=need("vocab_size", vocab_size),
            num_target_layers=depth,
            taps=chosen,
            block_size=block_size,
            mask_token_id=mask_token_id,
            feature_dim=len(chosen) * hidden if feature_dim is None else feature_dim,
            rope_theta=float(need("rope_theta", _rope_theta(text) if rope_theta is None else rope_theta)),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            max_position_embeddings=text.get("max_position_embeddings", 32768),
            bos_token_id=_first(text.get("bos_token_id")),
            eos_token_id=_first(text.get("eos_token_id")),
            embedding_scale=scale,
            logit_softcap=softcap,
            **more,
        )

    def to_zlab(self, dtype: DtypeName = "bfloat16") -> dict[str, Any]:
        """The `config.json` that z-lab's loader, SGLang, vLLM and llama.cpp's converter read."""
        return {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            "block_size": self.block_size,
            "dflash_config": {
                "mask_token_id": self.mask_token_id,
                "target_layer_ids": list(self.taps),
                "block_size": self.block_size,
                "causal": False,
                # z-lab's package embeds and caps by these, where they are.
                **({} if self.embedding_scale == 1.0 else {"input_embedding_scale": self.embedding_scale}),
                **({} if self.logit_softcap is None else {"final_logit_softcapping": self.logit_softcap}),
            },
            "num_target_layers": self.num_target_layers,
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": self.num_hidden_layers,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "max_position_embeddings": self.max_position_embeddings,
            "vocab_size": self.vocab_size,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    @classmethod
    def from_zlab(cls, raw: dict[str, Any], **more: Any) -> "DrafterConfig":
        """Read a z-lab style `config.json`, refusing what this code would run differently from the servers.

        Raises:
            UserError: a field is missing or asks for something that is not built here.
        """
        require_structure(raw)
        require_numbers(raw)
        inner = raw.get("dflash_config") or {}

        def given(name: str, default: int | float) -> Any:
            value = raw.get(name)
            return default if value is None else value

        def need(*names: str) -> Any:
            for source in (inner, raw):
                for name in names:
                    if source.get(name) is not None:
                        return source[name]
            raise UserError(f"{names[0]}: missing in the drafter's config.json; it is not a DFlash checkpoint")

        def whole(name: str) -> int:
            value = need(name)
            if type(value) is not int:
                raise UserError(f"{name}: {value!r} in the drafter's config.json, a whole number expected")
            return value

        kind = zlab_kind(raw)
        if kind != cls.kind:
            raise UserError(f"drafter: the config.json is that of a {kind} drafter, {cls.kind} expected")
        refuse_other_architectures(raw)
        hidden, taps, theta = whole("hidden_size"), need("target_layer_ids"), _rope_theta(raw)
        if not isinstance(taps, list) or not all(type(tap) is int for tap in taps):
            raise UserError(f"target_layer_ids: {taps!r} in the drafter's config.json, whole numbers expected")
        if theta is None:
            raise UserError("rope_theta: missing in the drafter's config.json; write the base it was trained with")
        return cls(
            hidden_size=hidden,
            num_hidden_layers=whole("num_hidden_layers"),
            num_attention_heads=whole("num_attention_heads"),
            num_key_value_heads=whole("num_key_value_heads"),
            head_dim=whole("head_dim"),
            intermediate_size=whole("intermediate_size"),
            vocab_size=whole("vocab_size"),
            num_target_layers=whole("num_target_layers"),
            taps=tuple(taps),
            block_size=whole("block_size"),
            mask_token_id=whole("mask_token_id"),
            feature_dim=len(taps) * hidden,
            rope_theta=float(theta),
            rms_norm_eps=given("rms_norm_eps", 1e-6),
            max_position_embeddings=given("max_position_embeddings", 32768),
            initializer_range=given("initializer_range", 0.02),
            bos_token_id=_first(raw.get("bos_token_id")),
            eos_token_id=_first(raw.get("eos_token_id")),
            embedding_scale=float(inner.get("input_embedding_scale", raw.get("input_embedding_scale")) or 1.0),
            logit_softcap=inner.get("final_logit_softcapping", raw.get("final_logit_softcapping")),
            **more,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "DrafterConfig":
        """The reverse of `to_dict`; unknown fields are refused."""
        unknown = set(raw) - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(f"drafter config: unknown fields {sorted(unknown)}; written by another version of specauf")
        values: dict[str, Any] = raw | {"taps": tuple(raw["taps"])}
        return cls(**values)


def _check_taps(taps: tuple[int, ...], num_target_layers: int) -> None:
    """Taps are different layers of the target and never its last one."""
    if len(set(taps)) != len(taps):
        raise UserError(f"taps: {list(taps)} repeats a layer; give each layer once")
    for tap in taps:
        if tap == num_target_layers - 1:
            raise UserError(
                f"taps: layer {tap} is the last of {num_target_layers}; transformers gives its output normed and the "
                f"servers do not, take at most {num_target_layers - 2}"
            )
        if not 0 <= tap < num_target_layers:
            raise UserError(f"taps: layer {tap} found, 0..{num_target_layers - 2} expected for this target")


def _rope_theta(config: dict[str, Any]) -> int | float | None:
    """The rope base, wherever this family keeps it (that of the full-attention layers if there are two)."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return rope.get("rope_theta", config.get("rope_theta"))


def _first(token: int | list[int] | None) -> int | None:
    return (token[0] if token else None) if isinstance(token, list) else token
