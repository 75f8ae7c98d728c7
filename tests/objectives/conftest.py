import torch
from hypothesis import settings

from specauf.data.batch import BlockTargets

# A shared machine may take its time over the first example.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


def random_targets(blocks, slots, vocab, k=0, seed=0, holes=True):
    """Targets with ragged ends, holes, an empty block and a full one; a teacher of k tokens when k > 0."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab, (blocks, slots), generator=generator)
    length = torch.randint(0, slots + 1, (blocks, 1), generator=generator)
    valid = torch.arange(slots) < length
    if holes:
        valid &= torch.rand(blocks, slots, generator=generator) > 0.1
    valid[0] = True
    if blocks > 1:
        valid[1] = False
    if not k:
        return BlockTargets(labels, valid), None
    p = torch.softmax(2 * torch.randn(blocks, slots, vocab, generator=generator, dtype=torch.float64), -1)
    top, ids = p.topk(k, dim=-1)
    return BlockTargets(labels, valid, ids, top.log(), top.sum(-1)), p


def drafted_logits(targets, vocab, seed=0, hit=0.7, dtype=torch.float64):
    """Random draft logits whose greedy token is the label with probability `hit`."""
    generator = torch.Generator().manual_seed(seed + 1)
    logits = torch.randn(*targets.labels.shape, vocab, generator=generator, dtype=torch.float64)
    hits = torch.rand(targets.labels.shape, generator=generator) < hit
    logits.scatter_add_(-1, targets.labels[..., None], 5.0 * hits[..., None].double())
    return logits.to(dtype)
