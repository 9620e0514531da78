"""How far half precision leads the thoughts astray: the hidden state after 1, 2, ... fed-back ones.

    python bench/drift.py                        a random GPT-2 124M, prompts of random tokens
    python bench/drift.py --checkpoint out/RUN   a trained one, asked its task's questions
                                                 (nanococonut/bundled/prosqa_small is one)

The same weights, rounded to bfloat16 and float16, think by themselves, with a cache of that dtype;
beside them float32 thinks in plain torch. A table of what is between their hidden states: relative
error (of norms; mean and worst row), cosine (mean), and in how many rows the most probable next
word is the same. On a GPU the kernels' drift stands beside plain torch's. The last line is JSON.
"""

import copy
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from nanococonut.runtime.device import select_device
from nanococonut.runtime.provenance import provenance

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

import torch
from torch import Tensor

from nanococonut import ops
from nanococonut.batch import build_prompt
from nanococonut.config import TrainConfig
from nanococonut.curriculum import Curriculum
from nanococonut.data.tasks import TASKS, generated
from nanococonut.inference.engine import Engine
from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DriftConfig:
    checkpoint: str | None = option(None, "a run's folder or one checkpoint's, not a random model")
    n_layer: int = option(12, "of the random model", "random model", ge=1)
    n_head: int = option(12, "of the random model", "random model", ge=1)
    n_embd: int = option(768, "of the random model", "random model", ge=1)
    vocab_size: int = option(50260, "of the random model", "random model", ge=2)
    thoughts: int = option(12, "thoughts fed back", ge=1)
    rows: int = option(16, "prompts", ge=1)
    length: int = option(100, "longest prompt of random tokens, the shortest half of it", ge=1)
    seed: int = option(0, "of weights and prompts", ge=0)
    device: str = option("auto", "auto, cpu, cuda, mps")
    kernels: str = option("auto", "beside plain torch", choices=("auto", "triton", "torch"))
    out: str | None = option(None, "append the JSON row to this file")

    def __post_init__(self) -> None:
        validate(self)
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads.\n"
                "Choose n_embd as a multiple of n_head."
            )


def subject(config: DriftConfig) -> tuple[str, GPT, list[list[int]]]:
    """What is measured: its name, the model in float32, and prompts as tokens."""
    where, questions = select_device(config.device), None
    if config.checkpoint:
        folder = checkpoint.resolve(config.checkpoint, best=True)
        model, tokenizer, manifest = checkpoint.load(folder, where)
        trained = make_config(TrainConfig, manifest["config"])
        split = next(iter(TASKS[trained.task].splits), None)
        if split and not trained.data:
            rows = TASKS[trained.task].render(
                generated(split, config.rows, config.seed, trained), trained.render
            )
            questions = [tokenizer.encode(row["question"]) for row in rows]
        name = Path(config.checkpoint).resolve().name
    else:
        torch.manual_seed(config.seed)
        shape = (config.n_layer, config.n_head, config.n_embd)
        block_size = max(1024, config.length + config.thoughts + 3)
        model = GPT(GPTConfig(config.vocab_size, block_size, *shape)).to(where).eval()
        name = "random"
    if questions:
        curriculum = Curriculum.from_config(trained)
        prompts = [build_prompt(curriculum, q, config.thoughts, tokenizer)[0] for q in questions]
    else:
        draw = torch.Generator().manual_seed(config.seed)
        span = (config.length + 1) // 2, config.length + 1
        lengths = torch.randint(*span, (config.rows,), generator=draw).tolist()
        top = model.config.vocab_size
        prompts = [torch.randint(top, (n,), generator=draw).tolist() for n in lengths]
    longest = max(map(len, prompts))
    if longest + config.thoughts + 3 > model.config.block_size:
        raise UserError(
            f"a prompt of {longest} tokens and {config.thoughts} thoughts do not fit into the "
            f"model's block_size={model.config.block_size}.\nAsk for fewer --thoughts or a shorter "
            "--length."
        )
    return name, model, prompts


def think(
    model: GPT, prompts: list[list[int]], thoughts: int, dtype: torch.dtype, kernels: str
) -> tuple[Tensor, Tensor]:
    """Hidden states after 1 to `thoughts` thoughts (B, thoughts, C), and the most probable next
    word at each (B, thoughts): of the model's weights rounded to dtype, on the path of inference.
    """
    rounded = copy.deepcopy(model).to(dtype)
    # what is fed back for thought n is the state after n - 1: so one thought more
    done = Engine(rounded, kernels=kernels).run(prompts, thoughts + 1, [0], -1, 1)
    states = done.thoughts[:, 1:]
    with torch.no_grad():
        return states, rounded.head(states).argmax(-1)


def compared(
    states: Tensor, words: Tensor, true_states: Tensor, true_words: Tensor
) -> dict[str, list[float]]:
    """For each number of thoughts: error and worst (relative; mean and greatest of the rows),
    cosine (mean), same_word (share of the rows)."""
    got, want = states.double(), true_states.double()
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)  # (B, thoughts)
    return {
        "error": error.mean(0).tolist(),
        "worst": error.max(0).values.tolist(),
        "cosine": torch.cosine_similarity(got, want, dim=-1).mean(0).tolist(),
        "same_word": (words == true_words).double().mean(0).tolist(),
    }


def main() -> None:
    given, _ = parse_cli(DriftConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(DriftConfig, given)
    name, model, prompts = subject(config)
    kernels, reason = ops.choose_backend(config.kernels, model)
    c = model.config
    print(
        f"{name}: {c.n_layer} layers, width {c.n_embd}; {len(prompts)} prompts of "
        f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens; kernels: {kernels} "
        f"({reason})"
    )
    truth = think(model, prompts, config.thoughts, torch.float32, "torch")
    found = {}
    for kind in ("torch",) if kernels == "torch" else ("torch", "triton"):
        for dtype in DTYPES[kind == "torch" :]:  # torch's float32 is what they are held against
            got = think(model, prompts, config.thoughts, getattr(torch, dtype), kind)
            found[f"{dtype} {kind}"] = compared(*got, *truth)
    for label, figures in found.items():
        print(f"{label:<16} thoughts     error     worst      cosine  same word")
        for n, (error, worst, cosine, same) in enumerate(zip(*figures.values(), strict=True), 1):
            print(f"{n:>25} {error:9.2e} {worst:9.2e} {cosine:11.7f} {same:10.1%}")
    row = {
        "bench": "drift",
        "model": name,
        **{k: getattr(c, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size", "smear")},
        "rows": len(prompts),
        "tokens": [min(map(len, prompts)), max(map(len, prompts))],
        **{k: v for k, v in asdict(config).items() if k in ("thoughts", "seed")},
        "device": model.wte.weight.device.type,
        "drift": {
            label: {k: [float(f"{x:.8g}") for x in v] for k, v in figures.items()}
            for label, figures in found.items()
        },
        **provenance(),
    }
    print(json.dumps(row))
    if config.out:
        checkpoint.append_row(Path(config.out), row)


if __name__ == "__main__":
    run_main(main)
