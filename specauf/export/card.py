"""The model card of an exported drafter, and how to serve it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from specauf.drafters.kind_of_config import drafted, zlab_kind

Layout = Literal["zlab", "speculators"]

_NAMES = {"dflash": "DFlash", "dflash2": "DFlash 2", "domino": "Domino", "dspark": "DSpark"}


@dataclass(frozen=True)
class About:
    """What is known of how a drafter came to be; empty where it is not.

    Attributes:
        target: hub id, directory or name of the target.
        target_on_hub: `target` is a hub id.
        corpus: what it was trained on.
        objective: its loss, one line.
        steps: optimizer steps.
        measured: one line a measurement of tau, each with command and date.
        made_from: name of the directory that it was read from, when that was no run: who trained it is not known.
        license: SPDX-style identifier as the hub lists them.
        provenance: further facts by name.
    """

    target: str | None = None
    target_on_hub: bool = False
    corpus: str | None = None
    objective: str | None = None
    steps: int | None = None
    measured: tuple[str, ...] = ()
    made_from: str | None = None
    license: str | None = None
    provenance: dict[str, str] = field(default_factory=dict)


def card(layout: Layout, name: str, config: dict[str, Any], about: About) -> str:
    """README.md of an export.

    Args:
        layout: which directory it lies in.
        name: of the directory.
        config: the config.json beside it.
        about: what is known of the drafter.
    """
    header = ["---", f"license: {about.license or 'unknown'}"]
    if about.target_on_hub and about.target:
        header += ["base_model:", f"- {about.target}"]
    kind = zlab_kind(config)
    header += ["tags:", "- speculative-decoding", f"- {kind}", "- specauf", "---"]
    measured = about.measured or ("Not measured. `specauf evaluate RUN --target TARGET` measures it.",)
    facts = {
        "Target": about.target or "not recorded",
        "Corpus": about.corpus or "not recorded",
        "Objective": about.objective or "not recorded",
        "Optimizer steps": "not recorded" if about.steps is None else f"{about.steps:,}",
        "Layout": f"z-lab ({config['architectures'][0]})" if layout == "zlab" else f"speculators ({kind})",
        "Drafted tokens a block": str(drafted(config)),
        **({} if about.made_from is None else {"Made from": about.made_from}),
        **about.provenance,
    }
    origin = "trained with specauf" if about.made_from is None else f"written by specauf from {about.made_from}"
    lines = [
        *header,
        "",
        f"# {name}",
        "",
        f"A {_NAMES[kind]} block drafter for speculative decoding{f' of {about.target}' if about.target else ''}, "
        f"{origin}. It changes how fast the target decodes, not what it says.",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        "",
        "## Mean emitted length (tau = accepted drafts + 1)",
        "",
        *(f"- {line}" for line in measured),
        "",
        "## Licence",
        "",
        f"Weights of the drafter: {about.license or 'not stated (set with `--license`)'}. The target and the corpus "
        "have licences of their own"
        + ("." if layout == "zlab" else "; this directory holds the target's embedding and head."),
        "",
        "## Use",
        "",
        *(snippets(layout, config, about)),
    ]
    return "\n".join(lines) + "\n"


def snippets(layout: Layout, config: dict[str, Any], about: About) -> list[str]:
    """How each server is started with this drafter."""
    target, here = about.target or "TARGET", "THIS_DIRECTORY"
    slots, kind = drafted(config), zlab_kind(config)
    method = "dspark" if kind == "dspark" else "dflash"  # Domino is a kind of it to SGLang, DFlash 2 to all servers
    size = f"dspark-block-size {slots}" if kind == "dspark" else f"num-draft-tokens {slots + 1}"
    spec = json.dumps({"method": method, "model": here, "num_speculative_tokens": slots})
    vllm = ["vLLM:", "", "```bash", f"vllm serve {target} --speculative-config '{spec}'", "```", ""]
    sglang = [
        "SGLang:",
        "",
        "```bash",
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm {method.upper()} \\",
        f"  --speculative-draft-model-path {here} --speculative-{size}",
        "```",
    ]
    if layout == "speculators":
        return vllm
    if kind == "domino":
        # By default it corrects only a pool of 2,048 tokens.
        return [*sglang[:-2], f"{sglang[-2]} \\", "  --speculative-domino-candidate-pool-size 0", sglang[-1]]
    if config.get("markov_head_type", "vanilla") != "vanilla":
        return sglang
    llama = [
        "",
        "llama.cpp (`TARGET_DIR`: the target's Hugging Face directory; `target.gguf`: the target converted):",
        "",
        "```bash",
        f"python convert_hf_to_gguf.py {here} --target-model-dir TARGET_DIR --outfile drafter.gguf",
        f"llama-server -m target.gguf -md drafter.gguf --spec-type draft-{method} --spec-draft-n-max {slots}",
        "```",
    ]
    if kind == "dspark":
        return [*vllm, *sglang, *llama]
    model = config["architectures"][0]
    return [
        "z-lab's package (`pip install dflash`):",
        "",
        "```python",
        "import torch",
        f"from dflash.model import {model}",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'target = AutoModelForCausalLM.from_pretrained("{target}", dtype=torch.bfloat16)',
        f'tokenizer = AutoTokenizer.from_pretrained("{target}")',
        f'drafter = {model}.from_pretrained("{here}", dtype=torch.bfloat16)',
        'turns = [{"role": "user", "content": "Write a function that reverses a list."}]',
        "inputs = tokenizer.apply_chat_template(",
        '    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        'out = drafter.spec_generate(target, inputs["input_ids"], 256, [tokenizer.eos_token_id])',
        "print(tokenizer.decode(out[0]))",
        "```",
        "",
        *vllm,
        *sglang,
        *llama,
    ]


def describe_objective(loss: dict[str, Any]) -> str:
    """One line for a loss as a run's config.yaml holds it."""

    def short(part: Any) -> str:
        if isinstance(part, dict) and "class_path" in part:
            arguments = part.get("init_args") or {}
            inner = ", ".join(f"{k}={short(v)}" for k, v in arguments.items() if v is not None)
            return f"{str(part['class_path']).rpartition('.')[2]}({inner})"
        return str(part)

    return short(loss)


def tau_lines(record: dict[str, Any], run: str, source: Path) -> tuple[str, ...]:
    """What an evaluation record says of one run, with the command and the date that gave it."""
    figures = record.get("runs", {}).get(run)
    if figures is None:
        return ()
    bench, low_high = record["benchmark"], figures["tau_pooled_95"]
    # A directory's name is enough: where it lay is nobody's business.
    target = Path(record["target"]).name if Path(record["target"]).is_absolute() else record["target"]
    command = f"specauf evaluate {run} --target {target} --benchmarks '[{bench['name']}]'"
    command += f" --limit {bench['prompts']} --max_new_tokens {bench['max_new_tokens']} --dtype {record['dtype']}"
    command += f" --temperatures '[{bench['temperature']:g}]'"
    if bench["block_size"] is not None:
        command += f" --block_sizes '[{bench['block_size']}]'"
    if bench["temperature"]:
        command += f" --sampling {bench['sampling']} --seed {bench['seed']}"
        command += "".join(f" --{name} {bench[name]:g}" for name in ("top_k", "top_p") if bench[name] is not None)
    return (
        f"{figures['tau_pooled']:.3f} pooled over cycles (95 % interval {low_high[0]:.3f} to {low_high[1]:.3f}), "
        f"{figures['tau_per_prompt']:.3f} mean of prompts; {bench['name']}, {bench['prompts']} prompts, "
        f"{bench['setting']}; "
        f"`{command}`, {record['environment']['date']} ({source.name})",
    )
