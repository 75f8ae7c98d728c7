"""Wrong uses and what answers them: the table of docs/wrong-uses.md, which tests/test_wrong_uses.py writes."""

from pathlib import Path

FIT = "specauf fit -c fit --model.loss=auf --model.drafter=dflash-b8 --data.cache=cache --trainer.accelerator=cpu"
BUILD = "cache-builder build --config target.yaml --corpus prompts.jsonl --max_length 200 --max_new_tokens 24 --out new"
EVALUATE = "specauf evaluate run --target target --benchmarks '[prompts.jsonl]' --max_new_tokens 8 --out out"

# What is wrong: a command of the place that tests/test_wrong_uses.py makes, and a part of the one line that answers it.
# Words behind a command that holds the option already stand in its place, as on any command line.
CASES: dict[str, list[tuple[str, str]]] = {
    "Names": [
        ("specauf evaluat", "unknown command 'evaluat'. Did you mean evaluate?"),
        ("cache-builder biuld", "unknown command 'biuld'. Did you mean build?"),
        (f"{FIT} --model.loss=aufs", "unknown loss 'aufs'. Did you mean auf?"),
        (f"{FIT} --model.drafter=dflsh", "unknown drafter 'dflsh'. Did you mean dflash?"),
        (f"{FIT} -c configs/nosuch.yaml", "nosuch"),
        (f"{FIT} --model.loss.weighting=Nosuch", "Nosuch"),
        (f"{FIT} --model.loss.weighting=my_losses.Mine", "No module named 'my_losses'"),
        (f"{FIT} --trainer.strategy=nosuch", "nosuch"),
        ("specauf sweep --losses 'auf nosuch' --cache cache", "unknown loss 'nosuch'"),
        (f"{BUILD} --config nosuch", "unknown target 'nosuch'"),
        (f"{BUILD} --corpus nosuch", "unknown corpus 'nosuch'"),
        (f"{BUILD} --features sketsh", "sketsh"),
        (f"{EVALUATE} --benchmarks '[humanevil]'", "unknown benchmark 'humanevil'. Did you mean humaneval?"),
        (f"{EVALUATE} --target nosuch", "unknown target 'nosuch'"),
        ("specauf export run --to gguf --out exported", "gguf"),
    ],
    "Options and types": [
        ("specauf fit -c fit --model.drafter=dflash-b8 --data.cache=cache", "model.loss"),
        ("specauf fit -c fit --model.loss=auf --model.drafter=dflash-b8", "data.cache"),
        (f"{FIT} --data.bach_size=4", "bach_size"),
        (f"{FIT} --data.batch_size=many", "batch_size"),
        (f"{FIT} --data.batch_size=0", "data.batch_size is 0: give at least 1"),
        (f"{FIT} --data.batch_size=500", "500"),
        (f"{FIT} --data.num_workers=-1", "data.num_workers is -1"),
        (f"{FIT} --trainer.max_steps=0", "max_steps"),
        (f"{FIT} --model.loss=decay --model.loss.weighting.gamma=-1", "loss gamma is -1"),
        (f"{FIT} --model.head_tokens=1", "model.head_tokens is 1"),
        (f"{FIT} --model.schedule.init_args.warmup=2", "warmup"),
        (f"{FIT} --model.drafter.init_args.block_size=1", "block_size"),
        (f"{FIT} --checkpoints.every_n_steps=0", "every_n_steps is 0"),
        (f"{FIT} --trainer.accelerator=gpu", "gpu"),
        (f"{FIT} --data.seed=-1", "data.seed is -1: give at least 0"),
        (f"{FIT} --trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch is 0"),
        (f"{FIT} --trainer.max_epochs=-1 --trainer.max_time=00:00:01:00", "spread over the run's length"),
        (f"{FIT} --trainer.val_check_interval=99", "val_check_interval"),
        (
            f"{FIT} --data.batch_size=4 --trainer.val_check_interval=3 --trainer.accumulate_grad_batches=2",
            "give a multiple of 2",
        ),
        (f"{FIT} --trainer.accumulate_grad_batches=0", "trains nothing"),
        (f"{FIT} --trainer.limit_train_batches=0", "trains nothing"),
        (f"{FIT} --trainer.accelerator=tpu", "torch_xla"),
        (f"{FIT} --model.optimizer=torch.optim.Muon", "model.optimizer: Muon only supports 2D"),
        (f"{FIT} --model.optimizer.init_args.lr=-1", "model.optimizer: Invalid learning rate"),
        (f"{FIT} --model.optimizer.init_args.betas='[1.0, 1.0]'", "model.optimizer: Invalid beta"),
        (f"{FIT} --trainer.callbacks+=LearningRateFinder", "LearningRateFinder"),
        (f"{FIT} --trainer.callbacks+=BatchSizeFinder", "cannot set data.batch_size"),
        (
            f"{FIT} --trainer.callbacks+=StochasticWeightAveraging --trainer.callbacks.swa_lrs=0.01 "
            "--trainer.callbacks.device=null",
            "configs/trainer/ema.yaml",
        ),
        (
            f"{FIT} --trainer.callbacks+=GradientAccumulationScheduler --trainer.callbacks.scheduling='{{0: 2}}'",
            "trainer.accumulate_grad_batches",
        ),
        (
            f"{FIT} -c configs/trainer/early-stopping.yaml --trainer.limit_val_batches=0",
            "EarlyStopping monitors val/tau, but trainer.limit_val_batches is 0",
        ),
        (f"{FIT} --trainer.enable_checkpointing=false", "every run keeps last.ckpt: leave it out"),
        (f"{FIT} --seed_everything=-1", "seed_everything is -1"),
        (f"{FIT} --trainer.overfit_batches=1", "configs/debug/overfit.yaml"),
        (f"{FIT} --trainer.fast_dev_run=true --ckpt_path=run", "leave one of them out"),
        ("specauf validate -c run/config.yaml --ckpt_path=run --trainer.limit_val_batches=0", "validates nothing"),
        (f"{FIT} --trainer.precision=bf16-true", "give bf16-mixed"),
        (f"{FIT} --trainer.strategy=fsdp", "give ddp"),
        (f"{FIT} --model.drafter.init_args.attention=flex", "attention is flex"),
        (f"{FIT} --model.drafter.init_args.intermediate_size=0", "intermediate_size: 0"),
        ("specauf sweep --losses 'auf auf' --cache cache", "auf auf"),
        ("specauf sweep --losses auf --seeds '0 00' --cache cache", "0 00"),
        ("specauf sweep --losses 'auf configs/loss/auf.yaml' --cache cache", "both called auf"),
        ("specauf sweep --losses auf --cache cache --model.loss=ce", "sets"),
        (f"{BUILD} --k 0", "k is 0, expected 1 or more"),
        (f"{BUILD} --k 5000", "5000"),
        (f"{BUILD} --held_out 2", "held_out is 2.0, expected a share from 0 to 1"),
        (f"{BUILD} --max_new_tokens 300", "max_new_tokens is 300, max_length is 200"),
        (f"{BUILD} --temperature -1", "temperature is -1"),
        (f"{BUILD} --target.taps '[1, 7]'", "taps"),
        (f"{BUILD} --target.taps '[]' --features none", "taps is empty, expected layers from 0 to 6"),
        (f"{BUILD} --target.taps '[1, 3, 1]'", "tap 1 is given twice"),
        (f"{BUILD} --sketch_rank 5000", "sketch_rank is 5000, 5 taps of 32 channels allow 1 to 160"),
        (f"{BUILD} --fit_tokens 10", "sketch_rank is 32, fit_tokens is 10"),
        (f"{BUILD} --keep_mass 0", "keep_mass is 0.0, expected a share above 0"),
        (f"{EVALUATE} --block_sizes '[99]'", "block_sizes: 99 found"),
        (f"{EVALUATE} --temperatures '[0, 0]'", "temperatures: 0.0 given twice"),
        (f"{EVALUATE} --benchmarks '[]'", "benchmarks: none given"),
        (f"{EVALUATE} --max_new_tokens 1", "max_new_tokens is 1: give at least 2"),
        (f"{EVALUATE} --device cuda:99", "device: cuda:99 found"),
        (f"{EVALUATE} --temperatures '[-1]'", "temperature: -1.0 found"),
        (f"{EVALUATE} --limit 0", "limit is 0"),
        (f"{EVALUATE} --top_p 0.9", "top_p is 0.9, but all temperatures are 0"),
    ],
    "Paths and files": [
        (f"{FIT} --data.cache=nowhere", "nowhere"),
        (f"{FIT} --data.cache=prompts.jsonl", "prompts.jsonl"),
        (f"{FIT} --ckpt_path=nowhere.ckpt", "--ckpt_path=nowhere.ckpt does not exist"),
        (f"{FIT} --ckpt_path=broken.ckpt", "broken.ckpt"),
        (f"{FIT} --ckpt_path=empty", "holds no checkpoints/last.ckpt"),
        (f"{FIT} --ckpt_path=last", "--ckpt_path=last but"),
        (f"{FIT} --model.drafter.init_args.init=nowhere", "nowhere"),
        (f"{FIT} --trainer.default_root_dir=prompts.jsonl/run", "prompts.jsonl"),
        (f"{FIT} --trainer.default_root_dir=s3://bucket/run", "trainer.default_root_dir is s3://bucket/run"),
        (f"{FIT} --checkpoints.directory=s3://bucket/run", "checkpoints.directory is s3://bucket/run"),
        (f"{BUILD} --corpus nowhere.jsonl", "corpus nowhere.jsonl does not exist"),
        (f"{BUILD} --corpus broken.jsonl", "broken.jsonl line 2 is not JSON"),
        (f"{BUILD} --corpus empty.jsonl", "empty"),
        (f"{BUILD} --corpus latin.jsonl", "is not UTF-8"),
        (f"{BUILD} --corpus numbers.jsonl", "prompt is a number"),
        (f"{BUILD} --corpus data.csv", "'.csv'"),
        (f"{BUILD} --out prompts.jsonl", "prompts.jsonl"),
        (f"{BUILD} --out /proc/cache", "/proc/cache"),
        (f"{BUILD} --config nowhere.yaml", "nowhere.yaml"),
        (f"{BUILD} --config broken.yaml", "broken.yaml"),
        ("cache-builder inspect nowhere", "nowhere"),
        ("cache-builder inspect cache --sample=-1", "sample is -1"),
        ("cache-builder verify nowhere", "nowhere"),
        ("cache-builder shrink nowhere --out smaller", "nowhere"),
        (f"{EVALUATE} --benchmarks '[nowhere.jsonl]'", "benchmark file nowhere.jsonl does not exist"),
        (f"{EVALUATE} --benchmarks '[broken.jsonl]'", "broken.jsonl line 2 is not JSON"),
        (f"{EVALUATE} --benchmarks '[blank.jsonl]'", "blank.jsonl line 1 has prompt, which is empty"),
        (f"{EVALUATE} --benchmarks '[prompts.jsonl, ./prompts.jsonl]'", "benchmarks: prompts given twice"),
        (f"{EVALUATE} --out prompts.jsonl", "prompts.jsonl"),
        (f"{EVALUATE} --target lacking", "1 tensors are missing from its weights"),
        ("specauf evaluate nowhere --target target --out out", "nowhere does not exist"),
        ("specauf report nowhere", "nowhere"),
        ("specauf report cut", "evaluation.json: runs missing"),
        ("specauf report edited", "evaluation.json: field benchmark is missing"),
        (f"{EVALUATE} --out cut", "evaluation.jsonl line 1 is no row of `specauf evaluate`"),
        ("specauf export nowhere --out exported", "nowhere"),
        ("specauf export --check prompts.jsonl", "prompts.jsonl"),
        ("specauf export mistyped --out exported", "dflash_config: 'none' in the drafter's config.json, an object"),
        ("specauf import worded --out ours", "rope_theta: 'large' in the drafter's config.json, a number expected"),
        ("specauf export --check drafter --dtype float16", "check: goes with --cache, --target and --json only"),
        ("specauf import target --out ours", "target"),
        ("specauf doctor --no-hub --json prompts.jsonl/doctor.json", "prompts.jsonl/doctor.json"),
    ],
    "Order of steps": [
        (f"{FIT} --data.cache=unfinished", "unfinished"),
        (f"{FIT} --trainer.default_root_dir=run", "run directory run already holds a run"),
        (f"{FIT} --trainer.default_root_dir=masked --ckpt_path=run", "run directory masked already holds a run"),
        (f"{FIT} -c resumed.yaml", "give it as --ckpt_path=run/checkpoints/last.ckpt"),
        ("specauf validate -c run/config.yaml", "ckpt_path"),
        ("specauf export empty --out exported", "holds no drafter"),
        ("specauf export run --out target", "target exists"),
        ("specauf evaluate empty --target target --out out", "holds no drafter"),
        ("specauf report run", "run"),
        ("specauf audit cache empty", "holds no drafter"),
        ("cache-builder verify unfinished", "unfinished"),
        ("specauf export run --out exported --push_to_hub me/mine", "token"),
    ],
    "Mixed up": [
        (f"{FIT} --data.cache=without", "features: none in the cache"),
        (f"{FIT} --model.drafter.init_args.init=wide", "hidden_size"),
        ("specauf fit -c run/config.yaml --ckpt_path=run/checkpoints/last.ckpt --data.cache=without", "cache"),
        ("specauf fit -c run/config.yaml --ckpt_path=run/checkpoints/last.ckpt --seed_everything=7", "seed"),
        (f"{BUILD} --out cache", "cache"),
        ("cache-builder shrink without --out smaller --features bf16", "features: bf16 asked for"),
        ("cache-builder shrink cache --out smaller --k 1000", "k: 1000 asked for"),
        ("cache-builder shrink cache --out cache/smaller --k 2", "cache/smaller lies inside the cache"),
        ("cache-builder shrink cache --out= --k 2", "out is empty"),
        ("specauf evaluate wide --target target --benchmarks '[prompts.jsonl]' --out out", "hidden_size"),
        ("specauf audit without run", "features"),
        ("specauf export masked --out exported", "no server reads this kind"),
        ("specauf export --check wide --cache cache", "hidden_size"),
    ],
    "Damage and missing packages": [
        (f"{FIT} --data.cache=newer", "format"),
        (f"{FIT} --data.cache=flipped", "field tokens: object tokens/c/0 is damaged"),
        (f"{FIT} --data.cache=flipped --data.num_workers=1", "field tokens: object tokens/c/0 is damaged"),
        ("cache-builder verify flipped", "flipped"),
        (f"{FIT} -c configs/logger/wandb.yaml", "pip install -U 'wandb"),
        (f"{FIT} -c configs/logger/mlflow.yaml", "pip install -U 'mlflow"),
        (f"{EVALUATE} --benchmarks '[gsm8k]'", "gsm8k"),
        ("specauf export broken --out exported", "broken"),
    ],
}


def page(answers: dict[str, str]) -> str:
    """docs/wrong-uses.md: every command with the whole line that answers it."""
    count = sum(map(len, CASES.values()))
    lines = [
        "# Wrong uses",
        "",
        f"{count} things that go wrong, each answered by one line and exit status 2. Nothing is lost or half-written.",
        "`tests/test_wrong_uses.py` runs them all in a directory with a cache, a run, a target and files broken as",
        "their names say, and holds this page to what it sees. `...` stands for options that are right.",
    ]
    for title, cases in CASES.items():
        lines += ["", f"## {title}", "", "| command | answer |", "|---|---|"]
        lines += [row(command, answers[command]) for command, _ in cases]
    return "\n".join(lines) + "\n"


def row(command: str, answer: str) -> str:
    """The command's line of the page."""
    answer = answer.replace("|", "\\|")
    return f"| `{_short(command)}` | {answer} |"


def _short(command: str) -> str:
    short = {FIT: "specauf fit ...", BUILD: "cache-builder build ...", EVALUATE: "specauf evaluate ..."}
    return next((s + command[len(whole) :] for whole, s in short.items() if command.startswith(whole)), command)


PAGE = Path(__file__).parent.parent / "docs/wrong-uses.md"
