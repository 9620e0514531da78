"""Check that a refactoring changes no number: compute everything below before and after it.

    python tests/gate.py record FILE   write the numbers of this tree to FILE, as JSON
    python tests/gate.py check FILE    compute them again; exit with 1 if one differs from FILE's

The comparison is bit for bit, so FILE is for one machine and one torch. Each part is a process with
one thread, and two run at a time. pytest does not collect this file. It needs NANOCOCONUT_DATA and
TIKTOKEN_CACHE_DIR.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from nanococonut.data.tasks import TASKS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file
from torch import Tensor

# -- every name of the project that is used here
from kernels.append import append
from kernels.feedback import embed, feedback
from kernels.latent_attention import SplitWorkspace, latent_attention
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_residual import linear_residual
from kernels.ln_linear_gelu import ln_linear_gelu
from kernels.prefix_attention import PrefixBuffers, prefix_attention
from nanococonut.batch import build_sequence, collate, tokenize
from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS, Curriculum
from nanococonut.data import prosqa
from nanococonut.data.files import read_examples
from nanococonut.inference.engine import Engine
from nanococonut.runtime.cli import make_config, read_config_file
from nanococonut.tokenizer import Tokenizer
from nanococonut.weights.checkpoint import BUNDLED, load

ROOT = Path(__file__).resolve().parent.parent
TRAIN, CONFIGS = ROOT / "train.py", ROOT / "config"
# four steps an epoch: stages end at steps 4, 12, 20, 28, and 15 is within a stage and an epoch
SETTINGS = (
    "--train_examples=256 --batch_size=64 --micro_batch_size=32 --val_examples=40 --epochs=12 "
    "--first_stage_epochs=1 --epochs_per_stage=2 --warmup_steps=5 --advance_at=1 --device=cpu "
    "--kernels=torch"
).split()


def digest(*values: Any) -> str:
    """Return the SHA-256 of tensors (dtype, shape and bytes) and of other values (as JSON)."""
    sha = hashlib.sha256()
    for x in values:
        if isinstance(x, Tensor):
            sha.update(f"{x.dtype} {tuple(x.shape)}".encode())
            x = x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        sha.update(x if isinstance(x, bytes) else json.dumps(x).encode())
    return sha.hexdigest()


def train(out: str, steps: int, *flags: str) -> dict[str, Any]:
    """Train a run. Return its losses, its validations and the digest of its last weights."""
    command = [TRAIN, CONFIGS / "prosqa_small.py", *SETTINGS, f"--max_steps={steps}"]
    command = [sys.executable, *map(str, command), f"--out_dir={out}", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    timed = ("examples_per_s", "minutes")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in rows]
    assert sum("loss" in row for row in rows) == steps
    weights = load_file(Path(out) / f"step_{steps:08}" / "model.safetensors")
    return {"rows": rows, "weights": digest(*(x for pair in sorted(weights.items()) for x in pair))}


def losses(method: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        return train(out, 40, f"--method={method}")


def resume() -> dict[str, Any]:
    """Train with dropout, whose random numbers must continue, too."""
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as resumed_out:
        uninterrupted = train(out, 30, "--dropout=0.1")
        train(resumed_out, 15, "--dropout=0.1")
        resumed = train(resumed_out, 30, "--dropout=0.1", "--resume")
    assert uninterrupted == resumed, "a resumed run differs from an uninterrupted one"
    return resumed


def greedy() -> dict[str, Any]:
    model, tokenizer, manifest = load(BUNDLED)
    config = make_config(TrainConfig, manifest["config"])
    graphs = prosqa.GraphConfig(n_nodes=13, min_hops=2, max_hops=3)
    examples = prosqa.generate(200, 20241209, graphs)
    rendered = TASKS[config.task].render(examples, config.render)
    questions = [example["question"] for example in rendered]
    engine = Engine(model, tokenizer, Curriculum.from_config(config), kernels="torch", graph="off")
    values: dict[str, Any] = {"rows": digest(examples), "questions": digest(questions)}
    for n in (0, 3, 6):
        for start in range(0, len(questions), 50):
            out = engine.generate(questions[start : start + 50], n, max_new_tokens=40)
            for i, text in enumerate(out.text):
                n_tokens = len(out.tokens[i]) + out.n_thoughts[i]
                values[f"{n} thoughts, row {start + i}"] = [text, n_tokens, digest(out.thoughts[i])]
    return values


def layouts() -> dict[str, Any]:
    tokenizer, values = Tokenizer.gpt2(), {}
    data = Path(os.environ["NANOCOCONUT_DATA"])
    for task, name, n in (
        ("prosqa", "prosqa_valid.json", 300),
        ("prontoqa", "prontoqa_valid.json", 100),
        ("gsm8k", "gsm8k_valid.txt", 100),
    ):
        examples = read_examples(data / name)[:n]
        assert len(examples) == n
        settings = read_config_file(CONFIGS / f"{task}.py", TrainConfig)
        rendered = TASKS[task].render(examples, make_config(TrainConfig, settings).render)
        tokenized = [tokenize(tokenizer, example) for example in rendered]
        for method in METHODS:
            config = make_config(TrainConfig, settings, {"method": method})
            curriculum = Curriculum.from_config(config)
            for stage in range(curriculum.max_latent_stage + 2):
                sequences = (build_sequence(curriculum, stage, x, tokenizer) for x in tokenized)
                batches = (collate([sequence]) for sequence in sequences)
                tensors = ((b.prefix, b.n_thoughts, b.suffix, b.targets) for b in batches)
                values[f"{task} {method} {stage}"] = digest(*(t for ts in tensors for t in ts))
    return values


def kernels() -> dict[str, Any]:
    """Return digests of the kernels' outputs on Triton's interpreter."""
    return {f"{name} {d}": digest(*x) for d in ("float32", "float16") for name, x in outputs(d)}


def outputs(dtype: str) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield what each kernel returns and writes in place, and its gradients."""
    rng = torch.Generator().manual_seed(1)
    B, nh, hs, T = 3, 2, 16, 40
    C = nh * hs

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(getattr(torch, dtype))

    lengths, active = torch.tensor([5, 0, 33]), torch.tensor([True, False, True])
    x, ln_w, ln_b = randn(B, C) * 2 + 3, randn(C) + 1, randn(C)
    w, b, up = randn(3 * C, C) / C**0.5, randn(3 * C), randn(B, 3 * C)
    cache, wte, wpe = randn(2, B, nh, T, hs), randn(11, C), randn(T, C)
    for impl in ("gemv", "gemm_tile", "library", "auto"):
        kv = cache.clone()
        out = append(x, ln_w, ln_b, w, b, kv, lengths, impl=impl)
        yield f"append {impl}", [out, kv]
        yield f"linear_residual {impl}", [linear_residual(x, w, b, up.clone(), impl)]
        yield f"ln_linear_gelu {impl}", [ln_linear_gelu(x, ln_w, ln_b, w, b, impl=impl)]
    for name, mask in (("all", None), ("active", active)):
        state = x.clone(), lengths.clone(), randn(B, C)
        feedback(state[0], ln_w, ln_b, wpe, *state[1:], mask)
        yield f"feedback {name}", [*state]
    out = torch.zeros_like(x)
    embed(wte, torch.tensor([3, 0, 10]), wpe, lengths, out)
    yield "embed", [out]

    q, k, v = (randn(B, nh, *s, hs).requires_grad_() for s in ((), (300,), (300,)))
    lengths = torch.tensor([5, 0, 290])
    for splits in (1, 2):
        with torch.no_grad():
            workspace = SplitWorkspace(*k.shape, "cpu", splits)
            for n_new in (0, 1):
                out = latent_attention(q, k, v, lengths, workspace, n_new)
                yield f"latent_attention {splits} {n_new}", [out]
        total, query, keys, values = torch.zeros(()), q, k, v
        buffers = PrefixBuffers(*k.shape, "cpu", splits)
        for _ in range(3):
            query, lse, keys, values = prefix_attention(query, keys, values, lengths, buffers)
            total = total + query.float().square().sum() + lse[[0, 2]].sum()
        grads = torch.autograd.grad(total, (q, k, v))
        yield f"prefix_attention {splits}", [total, query, *grads]

    h, head = randn(11, 24).requires_grad_(), (randn(101, 24) / 5).requires_grad_()
    targets = torch.randint(101, (11,), generator=rng)
    targets[:3] = -100
    loss, is_correct = linear_cross_entropy(h[3:], head, targets[3:], 3)
    correct = torch.cat([targets[:3] == -100, is_correct])
    grads = torch.autograd.grad(loss / 8, (h, head))
    yield "linear_cross_entropy", [loss, correct, *grads]


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "kernels": kernels,
    "resume": resume,
    "layouts": layouts,
    "greedy": greedy,
    **{f"losses {m}": partial(losses, m) for m in ("coconut", "cot", "soft_thought")},
}


def run_part(part: str) -> dict[str, Any] | None:
    """Return a part's values, from a process of its own; None if it fails (it prints why)."""
    env = dict.fromkeys(("TRITON_INTERPRET", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [sys.executable, __file__, "part", part]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | env)
    return None if done.returncode else json.loads(done.stdout)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return path -> value of all leaves of nested dicts and lists."""
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {p: x for key, v in items for p, x in leaves(v, f"{path} / {key}").items()}


def main(action: str, name: str) -> int:
    if action == "part":
        torch.set_num_threads(1)
        print(json.dumps(PARTS[name]()))
        return 0
    with ThreadPoolExecutor(2) as pool:
        actual = dict(zip(PARTS, pool.map(run_part, PARTS), strict=True))
    failed = [part for part, value in actual.items() if value is None]
    if action == "record" and not failed:
        Path(name).write_text(json.dumps(actual, indent=1) + "\n")
        print(f"{len(leaves(actual))} values of {len(actual)} parts in {name}")
    if action == "record":
        return len(failed) > 0
    expected, n_wrong = json.loads(Path(name).read_text()), 0
    for part in PARTS | expected:
        if part in failed:
            print(f"{part}: FAILED, see above")
            n_wrong += 1
            continue
        before, after = (leaves(x.get(part)) for x in (expected, actual))
        # a value that was not recorded cannot have changed
        differ = [p for p in before if p not in after or before[p] != after[p]]
        n_wrong += bool(differ)
        print(f"{part}: {f'{len(differ)} of {len(before)} DIFFER' if differ else 'equal'}")
        for p in differ[:8]:
            print(f"   {p}: {before[p]!r} -> {after.get(p, '(none)')!r}")
    return n_wrong > 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "check", "part"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
