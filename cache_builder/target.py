"""The target as the builder runs it: hidden states, taps and the top-k of the output head, for any architecture."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cache_builder.kv_cache import SlotCache
from cache_builder.sparse import topk_logprobs
from specauf.cache.target import refuse_unknown_scales
from specauf.errors import UserError
from specauf.rotary import frequencies_stay
from specauf.target_forward import cache_argument
from specauf.targets import TargetConfig, default_taps

# Layers of these types keep keys and values only; any other type keeps a state that the builder's cache cannot hold.
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


# What families with learned positions call their table.
_POSITIONS = frozenset({"wpe", "embed_positions", "position_embedding", "positions_embed"})


@dataclass(frozen=True)
class Step:
    """What one forward pass leaves.

    Attributes:
        hidden: final-normed hidden states, the output head's input.
        features: the taps, concatenated in order; None when they are not wanted.
    """

    hidden: Float[Tensor, "batch tokens hidden"]
    features: Float[Tensor, "batch tokens features"] | None


class Target:
    """A causal language model with its body, its head and hooks on the tapped layers.

    Args:
        model: any Hugging Face causal language model.
        tokenizer: its tokenizer.
        config: names the taps.
        k: log-probabilities to keep of each row.

    Raises:
        UserError: the architecture has no list of layers, taps are none, do not fit it or are given twice, its head is
            not a plain matrix, or what its parts give is not what the whole gives.
    """

    def __init__(self, model: Any, tokenizer: Any, config: TargetConfig, *, k: int) -> None:
        self.model, self.tokenizer, self.name, self.k = model, tokenizer, config.name, k
        self.text_config = model.config.get_text_config()
        self.num_layers: int = self.text_config.num_hidden_layers
        self.hidden_size: int = self.text_config.hidden_size
        self.taps = config.taps if config.taps is not None else default_taps(self.num_layers)
        _require_taps(self.taps, self.num_layers, config.name)
        self.body: Any = model.get_decoder()
        if self.body is model:  # Llama 4's text model takes itself for its decoder
            self.body = model.model
        head = model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise UserError(
                f"target {config.name}: its output head is no plain matrix, which drafters share: not supported"
            )
        self._cache_argument = cache_argument(self.body)
        self.embed_tokens: Float[Tensor, "vocabulary hidden"] = model.get_input_embeddings().weight
        self.lm_head: Float[Tensor, "vocabulary hidden"] = head.weight
        if not 1 <= k <= self.vocab_size:
            raise UserError(f"k is {k}, the target's vocabulary has {self.vocab_size} tokens: give --k from 1 to that")
        refuse_unknown_scales(self.text_config.to_dict())  # before an hour of building, not behind it
        self._layers = _find_layers(self.body, self.num_layers, config.name)
        self._check()

    @property
    def device(self) -> torch.device:
        """Where the target computes."""
        return self.lm_head.device

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return self.embed_tokens.shape[0]

    @property
    def tied(self) -> bool:
        """Whether embedding and output head are one matrix."""
        return self.embed_tokens.data_ptr() == self.lm_head.data_ptr()

    def config_for_drafters(self) -> dict[str, Any]:
        """The target's config; sizes that it calls by names of its own (GPT-2's n_embd) by the usual ones too."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name != "_name_or_path"}
        if "text_config" in config:
            return config
        usual = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        return {name: getattr(self.text_config, name) for name in usual if hasattr(self.text_config, name)} | config

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        found = configured if isinstance(configured, list) else [configured]
        return frozenset(int(i) for i in [*found, self.tokenizer.eos_token_id] if i is not None)

    def require_positions(self, length: int) -> None:
        """Check that documents of so many tokens can be read, whatever stands beside them in a batch.

        Raises:
            UserError: the target has no positions for them, or other rotary frequencies from some length on.
        """
        rope, original = frequencies_stay(self.text_config) or ("", length)
        if length > original:
            raise UserError(
                f"max_length is {length}, but target {self.name} changes its rotary frequencies (rope_type {rope}) "
                f"beyond {original} tokens, for a whole batch at once: lower --max_length to that"
            )
        most = getattr(self.text_config, "max_position_embeddings", None) or length
        tables = [m for n, m in self.body.named_modules() if isinstance(m, nn.Embedding) and n in _POSITIONS]
        if tables and length > most:
            raise UserError(f"max_length is {length}, target {self.name} has {most} positions: lower --max_length")

    def place_for_features(self, tokens: int) -> torch.device:
        """Where so many tokens' features wait until they are stored: here, while they take an eighth of what is free.

        A large target's are 40 kB a token: on their way to the host and back they would take as long as its pass.
        """
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + cached
            if 8 * tokens * len(self.taps) * self.hidden_size * torch.bfloat16.itemsize > free:
                return torch.device("cpu")
        return self.device

    def new_cache(self, rows: int, columns: int) -> SlotCache:
        """An empty key-value cache for so many rows and columns.

        Raises:
            UserError: the target has layers that keep another state than keys and values.
        """
        kinds = set(getattr(self.text_config, "layer_types", None) or ()) - ATTENTION_LAYERS
        if kinds:
            raise UserError(
                f"target {self.name}: layers of type {min(kinds)} keep a state that the builder's generation does not "
                "hold: answer the prompts with a server and build with --regenerate=false"
            )
        return SlotCache(self.num_layers, rows, columns)

    def forward(
        self,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch columns"] | None,
        positions: Int[Tensor, "batch tokens"],
        *,
        cache: SlotCache | None = None,
        features: bool = True,
    ) -> Step:
        """Run the body.

        Args:
            ids: tokens.
            mask: True where a column (all of them, cached ones included) holds a token; None when every one does.
            positions: of each token in its own document.
            cache: holds the columns before `ids` and takes theirs; None runs without.
            features: also keep the taps.
        """
        with self._tapping(features) as taps:
            hidden = self.body(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=cache is not None,
                **{self._cache_argument: cache},
            ).last_hidden_state
        return Step(hidden, torch.cat([taps[t] for t in self.taps], -1) if features else None)

    def topk(self, hidden: Float[Tensor, "rows hidden"]) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
        """The k most probable next tokens of each row, most probable first, and their exact log-probabilities.

        Raises:
            UserError: the logits hold NaN or Inf.
        """
        softcap = getattr(self.text_config, "final_logit_softcapping", None)
        return topk_logprobs(hidden, self.lm_head, self.k, softcap=softcap)

    @contextmanager
    def _tapping(self, wanted: bool) -> Iterator[dict[int, Tensor]]:
        taps: dict[int, Tensor] = {}

        def keep(tap: int, output: Any) -> None:
            taps[tap] = output[0] if isinstance(output, tuple) else output

        hooks = [
            self._layers[t].register_forward_hook(lambda _m, _i, output, t=t: keep(t, output))
            for t in (self.taps if wanted else ())
        ]
        try:
            yield taps
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare body, hooks and head with the model's own logits and hidden states on a few tokens."""
        ids = torch.arange(min(6, self.vocab_size), device=self.device)[None]
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        step = self.forward(ids, None, positions)
        whole = self.model(ids, output_hidden_states=True)
        expected = torch.cat([whole.hidden_states[t + 1] for t in self.taps], -1)
        best, values = self.topk(step.hidden[0])
        exact = whole.logits[0].float().log_softmax(-1).gather(-1, best)
        assert step.features is not None
        if not torch.allclose(step.features.float(), expected.float(), 1e-2, 1e-2 * float(expected.abs().mean())):
            raise UserError(f"target {self.name}: taps differ from the model's own hidden states: not supported")
        if not torch.allclose(values, exact, rtol=1e-2, atol=5e-2):
            raise UserError(
                f"target {self.name}: its logits are more than final norm and output head, which drafters cannot "
                "share: not supported"
            )


def _require_taps(taps: Sequence[int], layers: int, name: str) -> None:
    """Refuse taps that cannot be read, and those that would store nothing or the same twice.

    Raises:
        UserError: there is none, one lies beyond the layers, or is given twice.
    """
    if not taps:
        raise UserError(
            f"target {name}: taps is empty, expected layers from 0 to {layers - 2}: set --target.taps; a cache without "
            "features takes --features=none and any taps"
        )
    if wrong := [t for t in taps if not 0 <= t < layers - 1]:
        raise UserError(
            f"target {name}: tap {wrong[0]} of {layers} layers, "
            f"expected 0 to {layers - 2}, for the last layer's output is normed: set --target.taps"
        )
    if twice := [t for i, t in enumerate(taps) if t in taps[:i]]:
        raise UserError(f"target {name}: tap {twice[0]} is given twice, expected every tap once: set --target.taps")


def _find_layers(body: nn.Module, count: int, name: str) -> nn.ModuleList:
    """The list of decoder layers: the one list of modules as long as the target is deep."""
    lists = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UserError(f"target {name}: {type(body).__name__} has no list of {count} layers to tap: not supported")
    return lists[0]
