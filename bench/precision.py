"""Measure what bfloat16, kernels and CUDA graphs change: thoughts, or the loss of a training run.

    python bench/precision.py                            a random GPT-2 124M, random prompts
    python bench/precision.py --checkpoint out/RUN       a trained model, its task's questions
    python bench/precision.py --of=loss --steps=50       50 steps of config/prosqa_small.py

--of=hidden: the same weights, rounded to bfloat16 and float16, think with a cache of that dtype.
Their hidden states after 1, 2, ... thoughts are compared with those of float32 in plain torch. On a
GPU the kernels' error is next to plain torch's.

--of=loss: train.py runs once per variant, with the same examples, weights and seeds: float32 in
plain torch, and what else this machine has (bfloat16; on a GPU also kernels and CUDA graphs). Their
loss curves are compared with the first. --out appends results; each variant prints a line of JSON.
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

import nanococonut  # isort: skip  # noqa: F401  # first: sets OMP_WAIT_POLICY
import torch
from torch import Tensor

from bench.common.results import ResultWriter
from bench.common.workload import Workload, WorkloadOptions, load_model
from nanococonut import ops
from nanococonut.batch import build_prompt
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.tasks import TASKS, generated
from nanococonut.inference.engine import Engine
from nanococonut.model import GPT
from nanococonut.runtime.cli import make_config, option, parse_cli
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
class PrecisionConfig(WorkloadOptions):
    of: str = option("hidden", "what is compared", choices=("hidden", "loss"))
    thoughts: int = option(12, "hidden: thoughts", ge=1)
    prompts: int = option(16, "hidden: prompts", ge=1)
    length: int = option(100, "hidden: tokens of a random prompt", ge=1)
    kernels: str = option("auto", "hidden: compared too", choices=("auto", "triton", "torch"))
    config: str = option("config/prosqa_small.py", "loss: training config")
    steps: int = option(200, "loss: optimizer steps", ge=1)
    seed: int = option(0, "of prompts, or of the training run", ge=0)


# ---- hidden states


def load_prompts(config: PrecisionConfig, workload: Workload) -> list[list[int]]:
    """Return questions of a trained model's task, in its layout, or random prompts."""
    prompts = workload.prompts(config.prompts, config.length, config.seed)
    if config.checkpoint != "random":
        folder = checkpoint.resolve(config.checkpoint, best=True)
        _, tokenizer, manifest = checkpoint.load(folder)
        trained = make_config(TrainConfig, manifest["config"])
        curriculum = Curriculum.from_config(trained)
        split = next(iter(TASKS[trained.task].splits), None)
        if split and not trained.data:
            examples = generated(split, config.prompts, config.seed, trained)
            rendered = TASKS[trained.task].render(examples, trained.render)
            questions = [tokenizer.encode(example["question"]) for example in rendered]
            prompts = [
                build_prompt(curriculum, ids, config.thoughts, tokenizer)[0] for ids in questions
            ]
    longest, block_size = max(map(len, prompts)), workload.model.config.block_size
    if longest + config.thoughts + 3 > block_size:
        raise UserError(
            f"a prompt of {longest} tokens and {config.thoughts} thoughts do not fit into the "
            f"model's block_size={block_size}.\nUse fewer --thoughts or a shorter --length."
        )
    return prompts


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
) -> list[dict[str, float]]:
    """Return, for each number of thoughts: error and worst (relative; mean and greatest over the
    prompts), cosine (mean), same_token (fraction of the prompts)."""
    got, expected = hidden.double(), true_hidden.double()
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)  # (B, n_thoughts)
    stats = {
        "error": error.mean(0),
        "worst": error.max(0).values,
        "cosine": torch.cosine_similarity(got, expected, dim=-1).mean(0),
        "same_token": (tokens == true_tokens).double().mean(0),
    }
    return [
        {name: values[i].item() for name, values in stats.items()} for i in range(error.shape[1])
    ]


def measure_hidden(config: PrecisionConfig) -> None:
    """Compare hidden states and append a result for each dtype, kernels and number of thoughts."""
    workload = load_model(config, select_device(config.device))
    prompts, model = load_prompts(config, workload), workload.model
    kernels, reason = ops.choose_backend(config.kernels, model)
    print(f"{workload.name}, kernels: {kernels} ({reason})")
    reference = think(model, prompts, config.thoughts, torch.float32, "torch")
    labels = {"checkpoint": workload.name}
    for provider in ("torch",) if kernels == "torch" else ("torch", "triton"):
        for dtype in DTYPES[provider == "torch" :]:  # torch's float32 is the reference
            states = think(model, prompts, config.thoughts, getattr(torch, dtype), provider)
            shape = workload.shape() | {"examples": len(prompts)}
            results = ResultWriter("precision", config, workload.device, dtype, labels, shape)
            for n, stats in enumerate(compare_hidden(*states, *reference), 1):
                extra = {"spread": {}, "detail": stats, "thoughts": n}
                results.add("hidden_error", provider, [stats.pop("error")], "fraction", **extra)
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
    """Compare loss curves and append a result for each variant."""
    device = select_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        plain = run_losses(config, {}, device.type, Path(folder) / "plain")
        print(f"float32, plain: loss {plain[0]:.3f} to {plain[-1]:.3f}; relative differences:")
        for name, settings in VARIANTS["cuda" if device.type == "cuda" else "cpu"].items():
            curve = run_losses(config, settings, device.type, Path(folder) / name)
            apart = [abs(a - b) / b for a, b in zip(curve, plain, strict=True)]
            tail = -max(1, len(plain) // 10)
            mean, plain_mean = statistics.fmean(curve[tail:]), statistics.fmean(plain[tail:])
            detail = {"first": apart[0], "greatest": max(apart), "plain": [plain[0], plain[-1]]}
            detail["last_tenth"] = abs(mean - plain_mean) / plain_mean
            dtype = settings.get("dtype", "float32")
            labels = {"config": Path(config.config).name, "variant": name}
            shape = {"steps": len(plain), "seed": config.seed}
            results = ResultWriter("precision", config, device, dtype, labels, shape)
            results.add("loss_difference", "nanococonut", apart, "fraction", detail=detail)
            print(results.summary())


def main() -> None:
    given, path = parse_cli(PrecisionConfig, sys.argv[1:], __doc__)
    config = make_config(PrecisionConfig, given, {"config": path} if path else {})
    measure_hidden(config) if config.of == "hidden" else measure_loss(config)


if __name__ == "__main__":
    run_main(main)
