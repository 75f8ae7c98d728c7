"""Whole runs on a GPU, or on a device that only pretends to be one, beside the same on the CPU.

    python -m tests.elsewhere.scenarios NAME DIR [cuda]

In a process of their own, for the made-up device stays registered with torch, which no other test should meet. Ends in
an AssertionError where the two differ.
"""

import contextlib
import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

import cache_builder.driver
from cache_builder.target import Target
from specauf.cache import open_cache
from specauf.data.batch import BlockTargets
from specauf.decoding import speculative_generate, speculative_generate_batch
from specauf.module import DrafterModule
from specauf.objectives import AcceptUntilFail, CrossEntropy, ExponentialDecay, ForwardKL, Objective, Survival
from specauf.objectives.block_loss import block_loss
from tests.builder.conftest import digests, make_target, make_tokenizer, write_jsonl
from tests.builder.test_build import config
from tests.drafters.tiny import greedy_answer, prompt, tiny_dflash, tiny_target
from tests.elsewhere.device import NAME, Elsewhere, register, waits
from tests.training.conftest import write_tiny_cache
from tests.training.running import fit_here, logged, validate_here

CUDA = sys.argv[3:] == ["cuda"]
DEVICE = torch.device("cuda", 0) if CUDA else register()
CLOSE = 1e-2 if CUDA else 1e-4  # sums of another order, which a few steps of training make larger


class ElsewhereAccelerator(Accelerator):
    """Lightning's way to the device."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to do."""

    def teardown(self) -> None:
        """Nothing to do."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """None."""
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """One, whatever is asked for."""
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> Any:
        """The one."""
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        """The one."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """It is."""
        return True

    @staticmethod
    def name() -> str:
        """As in --trainer.accelerator."""
        return NAME


if not CUDA:
    AcceleratorRegistry.register(NAME, ElsewhereAccelerator)
    StrategyRegistry.register(NAME, SingleDeviceStrategy, device=DEVICE)
THERE = ("--trainer.accelerator=gpu",) if CUDA else (f"--trainer.accelerator={NAME}", f"--trainer.strategy={NAME}")


def elsewhere() -> contextlib.AbstractContextManager[Any]:
    """Where the device may be used."""
    return contextlib.nullcontext() if CUDA else Elsewhere()


@contextlib.contextmanager
def count_waits() -> Iterator[Callable[[], int]]:
    """A function that says how often the device was waited for."""
    waits.clear()
    if not CUDA:
        yield waits.total
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield lambda: sum("synchronizing" in str(w.message) for w in caught)
        torch.cuda.set_sync_debug_mode("default")


def it_is_a_device(folder: Path) -> None:
    """What would end a run on a GPU ends one here."""
    with Elsewhere():
        x = torch.arange(6.0, device=DEVICE)
        assert x.device == DEVICE
        assert (x * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5, 7, 9, 11]
        assert x[torch.tensor([1, 2])].cpu().numpy().tolist() == [1, 2]
        for wrong in (
            lambda: x + torch.ones(6),
            lambda: torch.ones(6).mul_(x),
            lambda: torch.cat([x, torch.ones(1)]),
            lambda: torch.where(torch.ones(6, dtype=torch.bool), x, x),
            lambda: torch.ones(3, 6) @ x,
        ):
            with pytest.raises(RuntimeError, match="two devices"):
                wrong()
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
        y = torch.zeros(6)
        assert y.copy_(x) is y
        weight = torch.nn.Linear(6, 2).to(DEVICE).weight
        (weight @ x).sum().backward()
        assert weight.grad is not None
        assert weight.grad.device == DEVICE


EVERY = "--model.full_block_every=2"
TRAININGS: list[tuple[str, ...]] = [
    ("--model.loss=auf", EVERY),
    ("--model.loss=auf-kl", "--model.head_tokens=100", "--trainer.gradient_clip_val=1.0"),
    ("--model.loss=auf", "--model.drafter=domino", EVERY),
    ("--model.loss=auf", "--model.drafter=dspark", EVERY),
    ("--model.loss=auf", "--model.drafter=dflash2", "--model.drafter.init_args.conv_group_size=4", EVERY),
]
MORE_TRAININGS: list[tuple[str, ...]] = [
    ("--model.loss=decay",),
    ("--model.loss=dspark", "--model.drafter=masked"),
    ("--model.loss=survival", "--model.optimizer=specauf.optimizers.MuonAdamW"),
    ("--model.loss=expected-length", "--trainer.accumulate_grad_batches=2"),
]


def training(folder: Path) -> None:
    """Trainings, a warm start, a resumed run and validation have the numbers of the CPU."""
    cache = write_tiny_cache(folder / "cache", documents=12, features="sketch", sketch_rank=16)
    shared = []

    def look(module: DrafterModule) -> None:
        shared.append(module.head_vocabulary.embedding.data_ptr() == module.vocabulary.embedding.data_ptr())

    DrafterModule.on_train_epoch_start = look  # type: ignore[method-assign]
    trained_alike(folder, cache, TRAININGS)
    assert shared
    assert all(shared)
    begun = folder / "0-there"
    trained_alike(folder / "warm", cache, [("--model.loss=dpace", f"--model.drafter.init_args.init={begun}")])
    further = (*THERE, *TRAININGS[0], "--trainer.max_epochs=2", f"--ckpt_path={begun}/checkpoints/last.ckpt")
    with elsewhere():
        assert fit_here(cache, begun, *further) == 0
        # torch cannot detach a wrapper that inference mode has made.
        assert validate_here(cache, begun, "--trainer.inference_mode=false") == 0


def more_training(folder: Path) -> None:
    """Other losses, drafters and optimizers."""
    trained_alike(folder, write_tiny_cache(folder / "cache"), MORE_TRAININGS)


def mixed_precision(folder: Path) -> None:
    """Half precision trains about as well; for a GPU, whose kernels are others than the CPU's."""
    cache = write_tiny_cache(folder / "cache")
    for drafter in ("dflash", "dflash2", "domino", "dspark"):
        for precision in ("32-true", "bf16-mixed", "16-mixed"):
            words = (*THERE, "--model.loss=auf-kl", f"--model.drafter={drafter}", f"--trainer.precision={precision}")
            with elsewhere():
                assert fit_here(cache, folder / drafter / precision, *words, "--trainer.max_epochs=2") == 0
        exact, *halves = (list(logged(folder / drafter / p).values()) for p in ("32-true", "bf16-mixed", "16-mixed"))
        for half in halves:
            assert half == pytest.approx(exact, rel=0.05)


def trained_alike(folder: Path, cache: Path, trainings: list[tuple[str, ...]]) -> None:
    """Train for an epoch here and elsewhere, and compare what was logged."""
    for number, options in enumerate(trainings):
        here, there = folder / f"{number}-here", folder / f"{number}-there"
        assert fit_here(cache, here, *options, "--trainer.max_epochs=1") == 0
        with elsewhere():
            assert fit_here(cache, there, *options, *THERE, "--trainer.max_epochs=1") == 0
        for name in ("train/loss", "train/grad_norm", "val/tau"):
            assert logged(there, name), name
            assert logged(there, name) == pytest.approx(logged(here, name), rel=CLOSE), (options, name)


def waiting(folder: Path) -> None:
    """How often AUF asks the device which blocks are left: once a slot where some fail in each, less where none does.

    Decay looks once at all blocks.
    """
    blocks, slots, vocabulary, k = 260, 15, 50, 4
    rows, head = torch.randn(blocks, slots, 8), torch.nn.Linear(8, vocabulary, bias=False).requires_grad_(False)
    logits = head(rows)
    logprobs, ids = logits.log_softmax(-1).topk(k)
    right = logits.argmax(-1)
    failing = right.clone()
    failing.diagonal().copy_((failing.diagonal() + 1) % vocabulary)
    auf, decay = AcceptUntilFail(), ExponentialDecay(4.0)
    # None fails: the blocks that begin, then 1, 2, 4 and 8 slots, of which several together are listed first.
    for labels, objective, times in (
        (right, Objective(auf, CrossEntropy()), 7),
        (right, Objective(auf, ForwardKL()), 7),
        (failing, Objective(auf, CrossEntropy()), slots),
        (right, Objective(decay, CrossEntropy()), 1),
        (right, Objective(Survival(), CrossEntropy()), 1),
    ):
        targets = BlockTargets(labels, torch.ones(blocks, slots).bool(), ids, logprobs, logprobs.exp().sum(-1))
        expected = block_loss(rows, head, targets, objective, chunk_blocks=blocks)
        with elsewhere():
            there, far, given = copy.deepcopy(head).to(DEVICE), rows.to(DEVICE).requires_grad_(), targets.to(DEVICE)
            with count_waits() as waited:
                out = block_loss(far, there, given, objective, chunk_blocks=blocks)
                out.numerator.backward()
                out.summary()
                assert waited() == times or (CUDA and waited() <= times + 1), (times, waited(), waits)
            assert (out.correct.cpu() == (labels == right))[out.seen.cpu()].all()
            # The divergence from a teacher that is the draft itself is nothing but rounding.
            assert out.numerator.item() == pytest.approx(expected.numerator.item(), rel=1e-5, abs=1e-3 if CUDA else 0)


def decoding(folder: Path) -> None:
    """Greedy answers are those of `generate` on the CPU."""
    for family in ("llama", "mistral"):
        target, ids = tiny_target(family), prompt(9)
        drafter, expected = tiny_dflash(target), greedy_answer(target, ids, 21)
        with elsewhere():
            target.to(DEVICE)
            drafter.to(DEVICE)
            for given in (ids, ids.to(DEVICE)):
                assert speculative_generate(target, drafter, given, max_new_tokens=21).tokens == expected
            if family != "mistral":  # its window takes one prompt at a time
                together = speculative_generate_batch(target, drafter, [prompt(5), ids], max_new_tokens=21)
                assert together[1].tokens == expected
            sampled = speculative_generate(target, drafter, ids, max_new_tokens=21, temperature=1.0, stop_token_ids=[])
            assert len(sampled.tokens) == 21


DOCUMENTS = 20


def building(folder: Path) -> None:
    """Caches of every kind of features, of answers greedy, sampled and given, are those of the CPU.

    Byte for byte, but for a GPU, whose sums differ.
    """
    make_target().save_pretrained(folder / "target")
    make_tokenizer().save_pretrained(folder / "target")
    asked = [[{"role": "user", "content": f"question number {i} " + "x" * (i % 7)}] for i in range(DOCUMENTS)]
    given = [[*turns, {"role": "assistant", "content": "an answer"}] for turns in asked]
    questions, chats = (
        write_jsonl(folder / f"{name}.jsonl", [{"messages": turns} for turns in rows])
        for name, rows in (("questions", asked), ("chats", given))
    )
    for number, (corpus, changes) in enumerate([
        (questions, {"features": "bf16"}),
        (questions, {"features": "int8", "temperature": 1.0, "sample_top_k": 4}),
        (chats, {"features": "sketch", "sketch_rank": 16, "regenerate": False}),
    ]):  # fmt: skip
        here, there = (
            config(folder / "target", corpus, folder / f"{number}-{w}", **changes) for w in ("here", "there")
        )
        cache_builder.driver.build(here)
        with pytest.MonkeyPatch.context() as patch, elsewhere():
            patch.setattr(cache_builder.driver, "device_of", lambda config: DEVICE)
            if number == 1:  # as where the device has no room for them
                patch.setattr(Target, "place_for_features", lambda target, tokens: torch.device("cpu"))
            cache_builder.driver.build(there)
        assert open_cache(there.out).manifest.counts.documents == DOCUMENTS
        if CUDA:
            for n in range(DOCUMENTS):
                mine, theirs = (open_cache(w.out).document(n) for w in (here, there))
                assert np.array_equal(mine.tokens, theirs.tokens)
                if here.features != "sketch":  # whose basis was fitted on either side
                    error = np.abs(np.asarray(mine.features) - np.asarray(theirs.features)).mean()
                    assert error < 1e-3 * np.abs(np.asarray(mine.features)).mean()
        else:
            assert digests(Path(there.out)) == digests(Path(here.out))


SCENARIOS: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (it_is_a_device, training, more_training, mixed_precision, waiting, decoding, building)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # autograd has started a thread for the device, which torch cannot end
