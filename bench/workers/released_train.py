"""The released code for bench/training.py: takes single optimizer steps on request.

Runs under its own Python (the released code needs transformers 4.46.2) and shares only JSON lines
and a file of weights with nanococonut. The first line on stdin says what to build; then "check"
asks for loss and gradient of the first batch, and a number for a step on that batch.
"""

import json
import sys
import time

import torch
from safetensors.torch import load_file


def padded(batch: dict[str, list], pad: int, device: str) -> dict[str, torch.Tensor]:
    """Pad as the released collator does: on the left, so that thoughts share their columns."""
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
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    import transformers  # before the clone's path, which holds modules of common names

    sys.path.insert(0, setup["clone"])
    from coconut import Coconut

    device, special = setup["device"], setup["special"]
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**setup["gpt2"]))
    gpt2.transformer.load_state_dict(load_file(setup["weights"]))  # the head is tied to it
    model = Coconut(gpt2, special["latent"], special["bot"], special["eot"], special["eos"])
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), **setup["adamw"])
    batches = [padded(batch, special["eos"], device) for batch in setup["batches"]]

    def check() -> dict[str, float]:
        model.eval()  # no dropout
        loss = model(**batches[0]).loss
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        optimizer.zero_grad()
        model.train()
        return {"loss": loss.item(), "gradient": norms.norm().item()}

    def step(i: int) -> dict[str, float]:
        began, memory = time.perf_counter(), 0.0
        loss = model(**batches[i]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        if device == "cuda":
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated() / 2**20
        return {"seconds": time.perf_counter() - began, "loss": value, "memory_mib": memory}

    reply = {
        "attention": gpt2.config._attn_implementation,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(reply), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(check() if request == "check" else step(request)), flush=True)


if __name__ == "__main__":
    main()
