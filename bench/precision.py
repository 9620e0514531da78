"""Measure what bfloat16, kernels and CUDA graphs change: thoughts, or the loss of a training run.

    python bench/precision.py                            a random GPT-2 124M, random prompts
    python bench/precision.py --checkpoint out/RUN       a trained model, its task's questions
    python bench/precision.py --of=loss --steps=50       50 steps of config/prosqa_small.py

--of=hidden: the same weights, rounded to bfloat16 and float16, think with a cache of that dtype.
Their hidden states after 1, 2, ... thoughts are compared with those of float32 in plain torch. On a
GPU the kernels' error is next to plain torch's.

--of=loss: train.py runs once per variant, with the same examples, weights and seeds: float32 in
plain torch, and whatever else this machine has (bfloat16; on a GPU also kernels and CUDA graphs).
Their loss curves are compared with the first.

--out appends the results; every variant prints a line of JSON.
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import torch
from torch import Tensor

from bench.common.results import ResultWriter, command_line
from nanococonut import ops
from nanococonut.batch import build_prompt
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.tasks import TASKS, generated
from nanococonut.inference.engine import Engine
from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.device import select_device
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint

TRAIN = Path(__file__).parent.parent / "train.py"
DTYPES = ("float32", "bfloat16", "float16")
PLAIN = {"dtype": "float32", "kernels": "torch", "graph": "off"}
VARIANTS = {  # of a training run, by device
    "cpu": {"bfloat16": {"dtype": "bfloat16"}},
    "cuda": {
        "float32, again": {},  # torch's own kernels have atomics: the noise
        "float32, graphs": {"graph": "on"},
        "float32, graphs, kernels": {"graph": "on", "kernels": "triton"},
        "bfloat16": {"dtype": "bfloat16"},
        "bfloat16, graphs, kernels": {"dtype": "bfloat16", "graph": "on", "kernels": "triton"},
    },
}


@dataclass(frozen=True)
class PrecisionConfig:
    of: str = option("hidden", "what is compared", choices=("hidden", "loss"))
    checkpoint: str | None = option(None, "hidden: a run or checkpoint, instead of a random model")
    n_layer: int = option(12, "hidden: layers of the random model", ge=1)
    n_head: int = option(12, "hidden: heads of the random model", ge=1)
    n_embd: int = option(768, "hidden: width of the random model", ge=1)
    vocab_size: int = option(50260, "hidden: vocabulary of the random model", ge=2)
    thoughts: int = option(12, "hidden: thoughts", ge=1)
    prompts: int = option(16, "hidden: prompts", ge=1)
    length: int = option(100, "hidden: longest random prompt; the shortest has half", ge=1)
    kernels: str = option("auto", "hidden: compared too", choices=("auto", "triton", "torch"))
    config: str = option("config/prosqa_small.py", "loss: training config")
    steps: int = option(200, "loss: optimizer steps", ge=1)
    seed: int = option(0, "of weights and prompts, or of the training run", ge=0)
    device: str = option("auto", "auto, cpu, cuda, mps")
    out: str | None = option(None, "append the results to this file")

    def __post_init__(self) -> None:
        validate(self)
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads.\n"
                "Choose n_embd as a multiple of n_head."
            )


# ---- hidden states


def load_subject(config: PrecisionConfig) -> tuple[str, GPT, list[list[int]]]:
    """Return a name, the model in float32, and prompts as tokens."""
    device, rng = select_device(config.device), torch.Generator().manual_seed(config.seed)
    prompts: list[list[int]] = []
    if config.checkpoint:
        folder = checkpoint.resolve(config.checkpoint, best=True)
        model, tokenizer, manifest = checkpoint.load(folder, device)
        name, trained = (
            Path(config.checkpoint).resolve().name,
            make_config(TrainConfig, manifest["config"]),
        )
        split = next(iter(TASKS[trained.task].splits), None)
        if split and not trained.data:
            examples = generated(split, config.prompts, config.seed, trained)
            curriculum = Curriculum.from_config(trained)
            for example in TASKS[trained.task].render(examples, trained.render):
                question = tokenizer.encode(example["question"])
                prompts.append(build_prompt(curriculum, question, config.thoughts, tokenizer)[0])
    else:
        torch.manual_seed(config.seed)
        shape = (config.n_layer, config.n_head, config.n_embd)
        block_size = max(1024, config.length + config.thoughts + 3)
        model = GPT(GPTConfig(config.vocab_size, block_size, *shape)).to(device).eval()
        name = "random"
    if not prompts:
        span = (config.length + 1) // 2, config.length + 1
        lengths = torch.randint(*span, (config.prompts,), generator=rng).tolist()
        n = model.config.vocab_size
        prompts = [torch.randint(n, (length,), generator=rng).tolist() for length in lengths]
    longest = max(map(len, prompts))
    if longest + config.thoughts + 3 > model.config.block_size:
        raise UserError(
            f"a prompt of {longest} tokens and {config.thoughts} thoughts do not fit into the "
            f"model's block_size={model.config.block_size}.\nUse fewer --thoughts or a shorter "
            "--length."
        )
    return name, model, prompts


def think(
    model: GPT, prompts: list[list[int]], n_thoughts: int, dtype: torch.dtype, kernels: str
) -> tuple[Tensor, Tensor]:
    """Return the hidden states after 1 to n_thoughts thoughts (B, n_thoughts, C) and the most
    probable next token at each (B, n_thoughts), with the weights rounded to dtype."""
    rounded = copy.deepcopy(model).to(dtype)
    # thought n is the hidden state after n - 1 of them, so generate one more
    out = Engine(rounded, kernels=kernels).run(prompts, n_thoughts + 1, [0], -1, 1)
    hidden = out.thoughts[:, 1:]
    with torch.no_grad():
        return hidden, rounded.head(hidden).argmax(-1)


def compare_hidden(
    hidden: Tensor, tokens: Tensor, true_hidden: Tensor, true_tokens: Tensor
) -> dict[str, list[float]]:
    """Return, for each number of thoughts: error and worst (relative; mean and greatest over the
    prompts), cosine (mean), same_token (fraction of the prompts)."""
    got, expected = hidden.double(), true_hidden.double()
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)  # (B, n_thoughts)
    return {
        "error": error.mean(0).tolist(),
        "worst": error.max(0).values.tolist(),
        "cosine": torch.cosine_similarity(got, expected, dim=-1).mean(0).tolist(),
        "same_token": (tokens == true_tokens).double().mean(0).tolist(),
    }


def measure_hidden(config: PrecisionConfig) -> None:
    name, model, prompts = load_subject(config)
    kernels, reason = ops.choose_backend(config.kernels, model)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    print(f"{name}: {len(prompts)} prompts of {shortest} to {longest} tokens")
    print(f"kernels: {kernels} ({reason})")
    c, device = model.config, model.wte.weight.device
    shape = {k: getattr(c, k) for k in ("n_layer", "n_embd", "vocab_size")}
    shape |= {"parameters": model.n_params(), "examples": len(prompts), "seed": config.seed}
    reference = think(model, prompts, config.thoughts, torch.float32, "torch")
    command = command_line(config, "bench/precision.py")
    for provider in ("torch",) if kernels == "torch" else ("torch", "triton"):
        for dtype in DTYPES[provider == "torch" :]:  # torch's float32 is the reference
            states = think(model, prompts, config.thoughts, getattr(torch, dtype), provider)
            stats = compare_hidden(*states, *reference)
            labels = {"checkpoint": name}
            results = ResultWriter(
                "precision", device, dtype, command, config.out, shape=shape, labels=labels
            )
            print(
                f"{dtype + ' ' + provider:<16} thoughts     error     worst      cosine  same token"
            )
            for n, numbers in enumerate(zip(*stats.values(), strict=True), 1):
                error, worst, cosine, same = numbers
                detail = dict(worst=worst, cosine=cosine, same_token=same)
                results.add(
                    "hidden_error",
                    provider,
                    [error],
                    "fraction",
                    detail=detail,
                    spread={},
                    thoughts=n,
                )
                print(f"{n:>25} {error:9.2e} {worst:9.2e} {cosine:11.7f} {same:10.1%}")
            print(results.summary())


# ---- losses


def run_losses(
    config: PrecisionConfig, settings: dict[str, str], device: str, run_dir: Path
) -> list[float]:
    """Return the loss of every step of a run. Raise UserError if train.py refuses it."""
    command = [sys.executable, str(TRAIN), config.config, f"--out_dir={run_dir}"]
    command += [f"--max_steps={config.steps}", f"--seed={config.seed}", f"--device={device}"]
    # no dropout: kernels have none, and another path draws it in another order
    command += ["--fallback=None", "--dropout=0.0"]
    command += [f"--{name}={value}" for name, value in (PLAIN | settings).items()]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"train.py failed with {settings or PLAIN}: {run.stderr.strip()[-300:]}")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def measure_loss(config: PrecisionConfig) -> None:
    device = select_device(config.device)
    command = command_line(config, "bench/precision.py")
    with tempfile.TemporaryDirectory() as folder:
        plain = run_losses(config, {}, device.type, Path(folder) / "plain")
        print(
            f"{Path(config.config).name} on {device.type}, {len(plain)} steps, seed {config.seed}"
        )
        print(f"float32, plain: loss {plain[0]:.3f} to {plain[-1]:.3f}; relative differences of")
        print(f"{'':<28} first step    median  greatest  mean of the last tenth")
        for name, settings in VARIANTS["cuda" if device.type == "cuda" else "cpu"].items():
            curve = run_losses(config, settings, device.type, Path(folder) / name)
            apart = [abs(a - b) / b for a, b in zip(curve, plain, strict=True)]
            tail = -max(1, len(plain) // 10)
            mean, plain_mean = statistics.fmean(curve[tail:]), statistics.fmean(plain[tail:])
            last = abs(mean - plain_mean) / plain_mean
            labels = {"config": Path(config.config).name, "variant": name}
            dtype = settings.get("dtype", "float32")
            shape = {"steps": len(plain), "seed": config.seed}
            results = ResultWriter(
                "precision", device, dtype, command, config.out, shape=shape, labels=labels
            )
            detail = {"first": apart[0], "greatest": max(apart), "last_tenth": last}
            detail |= {"plain": [plain[0], plain[-1]]}
            results.add("loss_difference", "nanococonut", apart, "fraction", detail=detail)
            median = statistics.median(apart)
            print(f"{name:<28} {apart[0]:10.2e} {median:9.2e} {max(apart):9.2e} {last:9.2e}")
            print(results.summary())


def main() -> None:
    given, path = parse_cli(PrecisionConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(PrecisionConfig, given, {"config": path} if path else {})
    measure_hidden(config) if config.of == "hidden" else measure_loss(config)


if __name__ == "__main__":
    run_main(main)
