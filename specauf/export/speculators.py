"""speculators' layout, which vLLM serves by itself: z-lab's tensors with the verifier's embedding and head."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool, Int
from safetensors.torch import save_file
from torch import Tensor

from specauf.drafters import DFlash2Config, DFlashDrafter, Drafter, DrafterConfig, DSparkConfig, TargetVocabulary
from specauf.drafters.config import DtypeName
from specauf.drafters.files import WEIGHTS, open_weights
from specauf.errors import UserError
from specauf.export.card import About, card
from specauf.export.check import Checked, require_sound
from specauf.export.directory import CARD, DTYPES, new_directory, read_config, write_config
from specauf.export.facts import TargetFacts
from specauf.export.layout import body_shapes
from specauf.export.zlab import servable, vocabulary_fields

VERSION = "0.9.0"
"""Release of the package `speculators` whose reader this layout was tested against."""

_KINDS = {kind.kind: kind for kind in (DrafterConfig, DFlash2Config, DSparkConfig)}  # speculators names them as we do

# Fields of z-lab's config that speculators keeps elsewhere or does not know.
_NOT_TRANSFORMER = (
    "architectures",
    "block_size",
    "dflash_config",
    "num_target_layers",
    "dtype",
    "torch_dtype",
    "sample_from_anchor",
)


def export_speculators(
    drafter: Drafter,
    directory: Path | str,
    *,
    target: TargetFacts,
    verifier: str | None = None,
    vocabulary: TargetVocabulary | None = None,
    dtype: torch.dtype = torch.bfloat16,
    about: About | None = None,
) -> Checked:
    """Write a drafter in speculators' layout, check what was written, and only then let it appear under its name.

    Args:
        drafter: a DFlash, DFlash 2 or DSpark drafter over raw features (a sketch folded in).
        directory: must not exist.
        target: its target; must hold the embedding and head unless `vocabulary` is given.
        verifier: hub id or directory of the target, which speculators and `vllm serve DIRECTORY` load; None leaves it
            open, and speculators then uses the embedding and head in the checkpoint.
        vocabulary: with a reduced head when given, written with its `d2t` and `t2d`; for DFlash alone.
        dtype: of the stored weights.
        about: what the model card says.

    Returns:
        What the check found.

    Raises:
        UserError: no server runs this drafter, the embedding is not known, the directory exists, or a check fails.
    """
    ready = servable(drafter, "speculators")
    source = vocabulary or target.vocabulary
    if source is None:
        raise UserError(
            f"embed_tokens: not known from {target.where}, speculators' layout holds the target's embedding and head; "
            "give the cache (--cache) or the target (--target)"
        )
    if vocabulary_fields(target):
        raise UserError(
            f"model_type: {target.model_type} scales its embedding or caps its logits, which speculators' layout "
            "cannot say; export --to zlab"
        )
    if type(ready) is not DFlashDrafter and source.draft_ids is not None:
        raise UserError(
            f"draft_vocab_size: {source.draft_vocab_size} found, {source.vocab_size} expected; a {ready.name} drafter "
            "goes with the target's whole head alone, leave `vocabulary` out"
        )
    ready.check(source, ready.config.feature_dim)
    name = next(name for name, known in DTYPES.items() if known == dtype)
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in ready.state_dict().items()}
    tensors["embed_tokens.weight"] = source.embedding.to("cpu", dtype, copy=True).contiguous()
    # A copy even when tied: safetensors refuses two names for one memory, and readers expect both names.
    tensors["lm_head.weight"] = source.head.to("cpu", dtype, copy=True).contiguous()
    if source.draft_ids is not None:
        tensors["t2d"], tensors["d2t"] = vocabulary_tables(source.draft_ids, source.vocab_size)
    config = speculators_config(
        ready.config,
        draft_vocab_size=source.draft_vocab_size,
        verifier=verifier,
        architectures=list(target.architectures or _causal_lm(target.model_type)),
        dtype=name,  # type: ignore[arg-type]
    )
    with new_directory(Path(directory)) as draft:
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        write_config(draft, config)
        (draft / CARD).write_text(card("speculators", Path(directory).name, config, about or About()))
        return require_sound(draft, target)


def _causal_lm(model_type: str) -> tuple[str, ...]:
    """The class name that transformers gives a family's causal LM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # a table of names

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return (name,) if isinstance(name, str) else ()


def speculators_config(
    config: DrafterConfig,
    *,
    draft_vocab_size: int,
    verifier: str | None,
    architectures: list[str],
    dtype: DtypeName = "bfloat16",
) -> dict[str, Any]:
    """The `config.json` that speculators and vLLM read.

    `aux_hidden_state_layer_ids` count the embedding's output as 0, so they are z-lab's ids + 1.
    """
    import transformers

    zlab = config.to_zlab(dtype)
    left = {*_NOT_TRANSFORMER, *config.own}
    inner = {name: value for name, value in zlab.items() if name not in left}
    return {
        "architectures": zlab["architectures"],
        "speculators_model_type": config.kind,
        "speculators_version": VERSION,
        "transformers_version": transformers.__version__,
        "dtype": dtype,
        "speculators_config": {
            "algorithm": config.kind,
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": config.slots,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": architectures},
        },
        "transformer_layer_config": inner,
        "draft_vocab_size": draft_vocab_size,
        "block_size": zlab["block_size"],
        "target_hidden_size": None,
        "aux_hidden_state_layer_ids": [tap + 1 for tap in config.taps],
        "mask_token_id": config.mask_token_id,
        **{name: getattr(config, name) for name in config.own},
        # Says "no layer is causal"; vLLM has read False as "full attention is causal too" (its issue 56692).
        "sliding_window_non_causal": True,
        "sample_from_anchor": config.sample_from_anchor,
        "tie_word_embeddings": False,
        # Not speculators' own: keeps the way back without loss.
        "num_target_layers": config.num_target_layers,
    }


def vocabulary_tables(
    draft_ids: Int[Tensor, " draft_vocab"], vocab_size: int
) -> tuple[Bool[Tensor, " vocab"], Int[Tensor, " draft_vocab"]]:
    """`t2d` (which target ids the head has) and `d2t` (offsets: draft id i is target id i + d2t[i])."""
    ids = draft_ids.to("cpu", torch.int64)
    known = torch.zeros(vocab_size, dtype=torch.bool)
    known[ids] = True
    return known, ids - torch.arange(len(ids))


def draft_ids(d2t: Int[Tensor, " draft_vocab"]) -> Int[Tensor, " draft_vocab"]:
    """Target ids of the head's rows, from the offsets."""
    return d2t + torch.arange(len(d2t))


def is_speculators(raw: dict[str, Any]) -> bool:
    """Whether a config.json is speculators'."""
    return "speculators_model_type" in raw


def to_zlab_config(raw: dict[str, Any], num_target_layers: int | None = None) -> dict[str, Any]:
    """A z-lab `config.json` from speculators', which leaves out whatever equals transformers' defaults.

    Args:
        raw: speculators' config.
        num_target_layers: depth of the target, which only our exports store.

    Raises:
        UserError: it is no drafter of `_KINDS`, or a field is missing.
    """
    kind = raw.get("speculators_model_type")
    if kind not in _KINDS:
        raise UserError(
            f"speculators_model_type: {kind!r} found, {' or '.join(map(repr, _KINDS))} expected; this drafter is not "
            "supported"
        )
    known = _KINDS[kind]
    if raw.get("sample_from_anchor") and known is not DSparkConfig:
        raise UserError("sample_from_anchor: true found, false expected; this drafter is not supported")
    depth = raw.get("num_target_layers")  # our own exports hold it; it is to be compared, not replaced
    depth = num_target_layers if depth is None else depth
    inner, aux = raw.get("transformer_layer_config"), raw.get("aux_hidden_state_layer_ids")
    for name, value in (
        ("transformer_layer_config", inner),
        ("aux_hidden_state_layer_ids", aux),
        ("mask_token_id", raw.get("mask_token_id")),
        ("block_size", raw.get("block_size")),
        *((name, raw.get(name)) for name in known.own),
        *([("sample_from_anchor", raw.get("sample_from_anchor"))] if known is DSparkConfig else []),  # readers differ
    ):
        if value is None:
            raise UserError(f"{name}: missing in the drafter's config.json; speculators' {kind} layout expected")
    if depth is None:
        raise UserError(
            "num_target_layers: not in speculators' config, the target's depth expected; give --num-target-layers, "
            "--cache or --target"
        )
    assert isinstance(inner, dict)
    assert isinstance(aux, list)
    if not all(type(i) is int for i in aux):
        raise UserError(f"aux_hidden_state_layer_ids: {aux} in the drafter's config.json, whole numbers expected")
    return _with_defaults(inner) | {
        "architectures": [known.architecture],
        **({"sample_from_anchor": raw.get("sample_from_anchor")} if known is DSparkConfig else {}),
        "block_size": raw["block_size"],
        "dflash_config": {
            "mask_token_id": raw["mask_token_id"],
            "target_layer_ids": [i - 1 for i in aux],
            "block_size": raw["block_size"],
            "causal": False,
            **{name: raw[name] for name in known.own},
        },
        "num_target_layers": depth,
    }


def _with_defaults(inner: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    kind = inner.get("model_type", "qwen3")
    try:
        full = AutoConfig.for_model(kind, **{k: v for k, v in inner.items() if k != "model_type"}).to_dict()
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"transformer_layer_config: transformers refuses it as a {kind!r} config ({reason}); a whole "
            "'qwen3' config expected"
        ) from error
    found: dict[str, Any] = full
    return found


def read_speculators(
    directory: Path, num_target_layers: int | None = None
) -> tuple[DrafterConfig, dict[str, Tensor], Int[Tensor, " draft_vocab"] | None]:
    """Config, body tensors as stored, and the target ids of a reduced head (None for a whole one).

    The embedding and head are left behind: they are the target's.

    Raises:
        UserError: it is no drafter of `_KINDS` in speculators' layout, or a tensor is missing.
    """
    raw = read_config(directory)
    plain = to_zlab_config(raw, num_target_layers)
    config = _KINDS[raw["speculators_model_type"]].from_zlab(plain)
    reduced = raw.get("draft_vocab_size", config.vocab_size)
    if config.own and reduced != config.vocab_size:
        raise UserError(
            f"draft_vocab_size: {reduced} found, {config.vocab_size} expected; a {config.kind} drafter is read with "
            "the target's whole head alone"
        )
    with open_weights(directory) as weights:
        wanted = body_shapes(config)
        for name, shape in wanted.items():
            if name not in weights.names:
                raise UserError(f"{directory}: tensor {name} missing; it is not a whole drafter of this kind")
            if weights.shape(name) != shape:
                raise UserError(f"{directory}: tensor {name} has shape {weights.shape(name)}, {shape} expected")
        left = set(weights.names) - set(wanted) - {"embed_tokens.weight", "lm_head.weight", "t2d", "d2t"}
        if left:
            raise UserError(f"{directory}: tensor {min(left)} unknown; it is not a drafter of this kind")
        ids = draft_ids(weights["d2t"]) if "d2t" in weights.names else None
        return config, {name: weights[name] for name in wanted}, ids
