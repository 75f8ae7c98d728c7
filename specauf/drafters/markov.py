"""DSpark's Markov head (arXiv 2607.05147): what the token before a slot says about the slot's own.

    vanilla   u[k] = e[k]                                   e[k] = W1[x[k-1]]
    gated     u[k] = sigmoid(G [h[k] ; e[k]]) * e[k]
    rnn       u[k] = tanh(o)                                (a, c, o) = J [s[k-1] ; e[k] ; h[k]]
                                                            s[k] = sigmoid(a) s[k-1] + (1 - sigmoid(a)) tanh(c)

W2 u[k] is added to the logits that h[k] gives.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specauf.drafters.vocabulary import TargetVocabulary
from specauf.linear import Linear, linear

MARKOV_HEADS = ("vanilla", "gated", "rnn")


class MarkovHead(nn.Module):
    """W1, W2 and what the kind adds, with the names that all trainers and servers give them.

    Args:
        vocab_size: tokens that may stand before a slot, and that may be drafted.
        hidden_size: width of h.
        rank: width of e, u and s.
        kind: one of `MARKOV_HEADS`.
        std: of the random weights.
    """

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, kind: str, std: float) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = Linear(rank, vocab_size, bias=False)
        nn.init.normal_(self.markov_w1.weight, std=std)
        # A fresh head changes nothing, and tokens that training with `head_tokens` leaves out stay as they are.
        nn.init.zeros_(self.markov_w2.weight)
        if kind == "gated":
            self.gate_proj = _affine(hidden_size + rank, rank, std)
        if kind == "rnn":
            self.joint_proj = _affine(2 * rank + hidden_size, 3 * rank, std)

    def embed(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows rank"]:
        """E of slots behind these tokens."""
        rows: Tensor = self.markov_w1(tokens)
        return rows

    def step(
        self, hidden: Float[Tensor, "blocks hidden"], embedded: Float[Tensor, "blocks rank"], state: Tensor | None
    ) -> tuple[Float[Tensor, "blocks rank"], Tensor | None]:
        """U of one slot, and the state after it; None stands before slot 1."""
        if self.kind == "vanilla":
            return embedded, None
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], -1))) * embedded, None
        state = torch.zeros_like(embedded) if state is None else state
        keep, candidate, out = self.joint_proj(torch.cat([state, embedded, hidden], -1)).chunk(3, dim=-1)
        keep = torch.sigmoid(keep)
        return torch.tanh(out), keep * state + (1 - keep) * torch.tanh(candidate)

    def latents(
        self, hidden: Float[Tensor, "blocks slots hidden"], embedded: Float[Tensor, "blocks slots rank"]
    ) -> Float[Tensor, "blocks slots rank"]:
        """U of all slots at once, where the tokens before them are known."""
        if self.kind != "rnn":
            return self.step(hidden.flatten(0, 1), embedded.flatten(0, 1), None)[0].view_as(embedded)
        state, found = None, []
        for slot in range(hidden.shape[1]):
            latent, state = self.step(hidden[:, slot], embedded[:, slot], state)
            found.append(latent)
        return torch.stack(found, 1)


def _affine(inputs: int, outputs: int, std: float) -> Linear:
    layer = Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class BiasedHead(nn.Module):
    """Rows [h ; u] to logits: the target's head on h, and W2 u.

    Args:
        markov: the drafter's.
        vocabulary: the target's; with a reduced head only its rows of W2 are used.
    """

    def __init__(self, markov: MarkovHead, vocabulary: TargetVocabulary) -> None:
        super().__init__()
        self.vocabulary, ids = vocabulary, vocabulary.draft_ids
        # Taken once: each time its gradient would be one of all rows.
        self.w2 = markov.markov_w2.weight if ids is None else markov.markov_w2.weight[ids]

    def trained(self) -> list[Tensor]:
        """What `block_loss` gathers gradients of: the rows of W2 that are used."""
        return [self.w2]

    def forward(self, rows: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows draft_vocab"]:
        """Logits with the bias added."""
        width = self.vocabulary.hidden_size
        logits = self.vocabulary.logits(rows[..., :width])
        return logits + self.bias(rows[..., width:]).to(logits.dtype)

    def bias(self, latents: Float[Tensor, "*rows rank"]) -> Float[Tensor, "*rows draft_vocab"]:
        """What is added."""
        return linear(latents, self.w2)
