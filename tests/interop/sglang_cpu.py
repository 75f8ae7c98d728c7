"""What SGLang's DFLASH lacks on a CPU, given through its plugins in every process that it starts.

SGLang refuses DFLASH on its own CPU platform, whose compiled kernels no package carries either. A platform from outside
may support it, and then runs SGLang's plain PyTorch. Left to supply is what has kernels for GPUs only: indexing of the
cache's slots, and the lengths of a verified block for attention in PyTorch. Drafting, verifying and accepting are
SGLang's. The environment variable SPECAUF_CYCLES names the file to which emitted tokens are written.
"""

import copy
import json
import os
from pathlib import Path

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

BACKEND = "torch_native"


def platform():
    """Entry point of the group `sglang.srt.platforms`."""
    return f"{__name__}:Platform"


def plugin():
    """Entry point of the group `sglang.srt.plugins`."""
    from sglang.srt.arg_groups.choices import add_draft_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_draft_attention_backend_choices([BACKEND])
    register_attention_backend(BACKEND)(attention)
    for name, hook, kind in (
        ("mem_cache.allocation.assign_req_to_token_pool_func", write_slots, HookType.REPLACE),
        ("model_executor.model_runner.ModelRunner._extend_forward_kwargs", widen, HookType.AFTER),
        ("speculative.dflash_worker_v2.DFlashWorkerV2.forward_batch_generation", write_cycle, HookType.AFTER),
    ):
        HookRegistry.register(f"sglang.srt.{name}", hook, kind)


class Platform(CpuDeviceMixin, SRTPlatform):
    """A CPU that may run DFLASH."""

    _enum = PlatformEnum.OOT

    def is_pin_memory_available(self, device=None):
        return False

    def supports_speculative_algorithm(self, algorithm):
        return algorithm == "DFLASH"

    def supports_speculative_draft_attention_backend(self, algorithm, backend):
        return backend == BACKEND

    def get_speculative_cache_locs_fn(self):
        return read_slots

    def get_kv_pool_cls(self, *, kind):
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        class Pool(MHATokenToKVPool):
            def _init_kv_copy_and_warmup(self):
                # The Triton kernel that moves slots; SGLANG_NATIVE_MOVE_KV_CACHE moves them without.
                self._kv_copy_config = None

        return Pool if kind == "mha" else None

    def init_backend(self):
        # There are no streams to wait for.
        torch.Tensor.record_stream = lambda tensor, stream: None


def attention(runner):
    """Attention in PyTorch, told how long a verified block is: behind a prefix that `seq_lens` counts alone."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class Attention(TorchNativeAttnBackend):
        def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
            if forward_batch.forward_mode.is_target_verify():
                prefix, size = forward_batch.seq_lens, forward_batch.spec_info.draft_token_num
                forward_batch = copy.copy(forward_batch)
                forward_batch.extend_prefix_lens = prefix
                forward_batch.extend_seq_lens = torch.full_like(prefix, size)
                forward_batch.seq_lens = prefix + size
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)

    return Attention(runner)


def spans(req_pool_indices, start_offset, end_offset):
    return zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)


def read_slots(req_pool_indices, req_to_token, start_offset, end_offset, **_):
    """Slots of positions `start_offset` to `end_offset` of all requests, one after the other."""
    rows = spans(req_pool_indices, start_offset, end_offset)
    return torch.cat([req_to_token[row, start:end] for row, start, end in rows]).long()


def write_slots(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, batch_size):
    """The reverse of `read_slots`."""
    done = 0
    for row, start, end in spans(req_pool_indices, start_offset, end_offset):
        req_to_token[row, start:end] = out_cache_loc[done : done + end - start].to(req_to_token.dtype)
        done += end - start


def widen(arguments, runner, *_, **__):
    """SGLang turns a block's embeddings into bfloat16 whatever the model's type; rounded as they are, in that type."""
    if "input_embeds" in arguments:
        arguments["input_embeds"] = arguments["input_embeds"].to(runner.dtype)
    return arguments


def write_cycle(result, *_, **__):
    """One line a cycle with what every request emits; a pass over prompts says nothing."""
    if result.accept_lens is not None:
        with Path(os.environ["SPECAUF_CYCLES"]).open("a") as file:
            print(json.dumps(result.accept_lens.tolist()), file=file)
    return result
