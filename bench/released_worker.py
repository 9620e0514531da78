"""The released code's side of bench/training.py: single optimizer steps, whenever asked.

Runs under a Python of its own (the released code wants transformers 4.46.2) and shares nothing with
nanococonut but JSON lines and a file of weights. The first line on stdin says what to build; then
"check" asks for the loss and the gradient of the first batch, a number for a step on that batch.
"""

import json
import sys
import time

import torch
from safetensors.torch import load_file


def padded(batch: dict[str, list], pad: int, device: str) -> dict[str, torch.Tensor]:
    """As the released collator pads: on the left until the thoughts stand in the same columns."""
    start = max(batch["first_thought"])
    lefts = [start - first for first in batch["first_thought"]]
    width = max(left + len(ids) for left, ids in zip(lefts, batch["ids"], strict=True))
    columns = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
    for left, ids, labels in zip(lefts, batch["ids"], batch["labels"], strict=True):
        n = len(ids)
        right = width - left - n
        columns["input_ids"].append([pad] * left + ids + [pad] * right)
        columns["labels"].append([-100] * left + labels + [-100] * right)
        columns["attention_mask"].append([0] * left + [1] * n + [0] * right)
        columns["position_ids"].append([0] * left + list(range(n)) + [0] * right)
    return {name: torch.tensor(rows, device=device) for name, rows in columns.items()}


def resident() -> int:
    """KiB that this process has taken at most so far (0 where that is not known)."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/status") as lines:  # getrusage's figure comes from the parent too
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    task = json.loads(sys.stdin.readline())
    torch.set_num_threads(task["threads"])
    import transformers  # before the path, for the clone holds modules of common names

    sys.path.insert(0, task["clone"])
    from coconut import Coconut

    before = resident()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**task["gpt2"]))
    gpt2.transformer.load_state_dict(load_file(task["weights"]))  # the head is tied to it
    special = task["special"]
    model = Coconut(gpt2, special["latent"], special["bot"], special["eot"], special["eos"])
    model.to(task["device"])
    optimizer = torch.optim.AdamW(model.parameters(), **task["adamw"])
    batches = [padded(batch, special["eos"], task["device"]) for batch in task["batches"]]

    def check() -> dict[str, float]:
        model.eval()  # no dropout
        loss = model(**batches[0]).loss
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        optimizer.zero_grad()
        model.train()
        return {"loss": loss.item(), "gradient": norms.norm().item()}

    def memory() -> float | None:
        """The most that the model, its moments and its steps took; on a CPU of this process."""
        if task["device"] == "cuda":
            return round(torch.cuda.max_memory_allocated() / 2**20, 1)
        return round((resident() - before) / 2**10, 1) if before else None

    def step(i: int) -> dict[str, float]:
        began = time.perf_counter()
        loss = model(**batches[i]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        if task["device"] == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "loss": value, "memory_mib": memory()}

    answer = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": gpt2.config._attn_implementation,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(check() if asked == "check" else step(asked)), flush=True)


if __name__ == "__main__":
    main()
