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

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

import torch
from torch import Tensor

from nanococonut import checkpoint, device, ops
from nanococonut.config import TrainConfig, build, check_values, opt, parse_cli
from nanococonut.curriculum import asking
from nanococonut.engine import Engine
from nanococonut.errors import UserError, main_guard
from nanococonut.loader import curriculum_of, rendered
from nanococonut.model import GPT, GPTConfig
from nanococonut.tasks import TASKS, generated

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DriftConfig:
    checkpoint: str | None = opt(None, "a run's folder or one checkpoint's, not a random model")
    n_layer: int = opt(12, "of the random model", "random model", at_least=1)
    n_head: int = opt(12, "of the random model", "random model", at_least=1)
    n_embd: int = opt(768, "of the random model", "random model", at_least=1)
    vocab_size: int = opt(50260, "of the random model", "random model", at_least=2)
    thoughts: int = opt(12, "thoughts fed back", at_least=1)
    rows: int = opt(16, "prompts", at_least=1)
    length: int = opt(100, "longest prompt of random tokens, the shortest half of it", at_least=1)
    seed: int = opt(0, "of weights and prompts", at_least=0)
    device: str = opt("auto", "auto, cpu, cuda, mps")
    kernels: str = opt("auto", "beside plain torch", choices=("auto", "triton", "torch"))
    out: str | None = opt(None, "append the JSON row to this file")

    def __post_init__(self) -> None:
        check_values(self)
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads.\n"
                "Choose n_embd as a multiple of n_head."
            )


def subject(config: DriftConfig) -> tuple[str, GPT, list[list[int]]]:
    """What is measured: its name, the model in float32, and prompts as tokens."""
    where, questions = device.choose(config.device), None
    if config.checkpoint:
        folder = checkpoint.find(config.checkpoint, best=True)
        model, tokenizer, manifest = checkpoint.load(folder, where)
        trained = build(TrainConfig, manifest["config"])
        split = next(iter(TASKS[trained.task].splits), None)
        if split and not trained.data:
            rows = rendered(trained, generated(split, config.rows, config.seed, trained))
            questions = [tokenizer.encode(row["question"]) for row in rows]
        name = Path(config.checkpoint).resolve().name
    else:
        torch.manual_seed(config.seed)
        shape = (config.n_layer, config.n_head, config.n_embd)
        block_size = max(1024, config.length + config.thoughts + 3)
        model = GPT(GPTConfig(config.vocab_size, block_size, *shape)).to(where).eval()
        name = "random"
    if questions:
        curriculum = curriculum_of(trained)
        prompts = [asking(curriculum, q, config.thoughts, tokenizer)[0] for q in questions]
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
    config = build(DriftConfig, given)
    name, model, prompts = subject(config)
    kernels, reason = ops.choose(config.kernels, model)
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
        **checkpoint.provenance(),
    }
    print(json.dumps(row))
    if config.out:
        checkpoint.append_row(Path(config.out), row)


if __name__ == "__main__":
    main_guard(main)
