"""A worker that runs another implementation for bench/latency.py or bench/training.py.

    released         generate() of the released code, called as in its run.py: batch 1 only
    transformers     thoughts by `inputs_embeds` and a DynamicCache, tokens by generate()
    released_train   optimizer steps of the released code

The worker runs under another Python and shares only JSON lines and a weights file with nanococonut.
The first line on stdin is the setup; each further line is a request, answered by one on stdout.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def released(gpt2: Any, setup: dict[str, Any]) -> Callable:
    sys.path.insert(0, setup["clone"])
    from coconut import Coconut

    device, special = setup["device"], setup["special"]
    model = Coconut(gpt2, special["latent"], special["bot"], special["eot"], -1)  # -1: no eos
    model.eval()
    starts: list[float] = []  # of each GPT-2 forward pass
    ends: list[float] = []
    gpt2.register_forward_pre_hook(lambda *_: starts.append(now(device)))
    gpt2.register_forward_hook(lambda *_: ends.append(now(device)))

    def generate(request: dict) -> dict:
        n_thoughts, n_tokens = request["n_thoughts"], request["max_new_tokens"]
        starts.clear()
        ends.clear()
        start = now(device)
        ids = request["prefixes"][0] + [special["latent"]] * n_thoughts
        ids += request["forced_tokens"]
        ids = torch.tensor([ids], device=device)
        tokens = model.generate(ids, None, max_new_tokens=n_tokens)[0, ids.shape[1] :].tolist()
        end = now(device)
        # passes: the prompt, one per thought (the last one also reads the forced tokens), and one
        # per token after the first; between passes, the code builds the next input
        first = n_thoughts + 1
        return {
            "tokens": [tokens],
            "prefill": ends[0] - start,
            "latent_step": (starts[n_thoughts] - starts[1]) / (n_thoughts - 1),
            "first_token": starts[first] - start,
            "token_step": (end - starts[first]) / (n_tokens - 1),
            "answer": end - start,
        }

    return generate


def transformers(gpt2: Any, setup: dict[str, Any]) -> Callable:
    from transformers import DynamicCache

    device = setup["device"]
    first: list[float] = []  # when the first token's scores were ready

    def note_time(ids: Tensor, scores: Tensor) -> Tensor:
        first.append(now(device))
        return scores

    def generate(request: dict) -> dict:
        n_thoughts, n_tokens = request["n_thoughts"], request["max_new_tokens"]
        first.clear()
        start = now(device)
        ids, cache = torch.tensor(request["prefixes"], device=device), DynamicCache()
        out = gpt2.transformer(input_ids=ids, past_key_values=cache, use_cache=True)
        hidden = out.last_hidden_state[:, -1:]
        prefilled = now(device)
        for _ in range(n_thoughts):
            out = gpt2.transformer(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
            hidden = out.last_hidden_state
        thought = now(device)
        # placeholder ids for the thoughts: they are in the cache, so generate() does not read them
        slots = [0] * n_thoughts + request["forced_tokens"]
        ids = torch.cat([ids, ids.new_tensor([slots] * len(ids))], 1)
        out = gpt2.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[note_time],
        )
        tokens = out[:, ids.shape[1] :].tolist()
        end = now(device)
        return {
            "tokens": tokens,
            "prefill": prefilled - start,
            "latent_step": (thought - prefilled) / n_thoughts,
            "first_token": first[0] - start,
            "token_step": (end - first[0]) / (n_tokens - 1),
            "answer": end - start,
        }

    return generate


def released_train(gpt2: Any, setup: dict[str, Any]) -> Callable:
    sys.path.insert(0, setup["clone"])
    from coconut import Coconut

    device, special = setup["device"], setup["special"]
    model = Coconut(gpt2, special["latent"], special["bot"], special["eot"], special["eos"])
    optimizer = torch.optim.AdamW(model.parameters(), **setup["adamw"])
    batches = [
        {name: torch.tensor(values, device=device) for name, values in batch.items()}
        for batch in setup["batches"]
    ]

    def check() -> dict[str, float]:
        """Return loss and gradient norm of the first batch, without dropout."""
        model.eval()
        loss = model(**batches[0]).loss
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        optimizer.zero_grad()
        return {"loss": loss.item(), "gradient": norms.norm().item()}

    def step(i: int) -> dict[str, float]:
        model.train()
        start = now(device)
        loss = model(**batches[i]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device, as our step does
        return {"seconds": now(device) - start}

    return lambda request: step(request["i"]) if request else check()


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    torch.set_grad_enabled(setup["kind"] == "released_train")
    import transformers as hf  # before sys.path has the clone, whose module names are common

    hf.logging.set_verbosity_error()
    config = hf.GPT2Config(**setup["gpt2"], bos_token_id=None, eos_token_id=None)
    gpt2 = hf.GPT2LMHeadModel(config).eval()
    gpt2.transformer.load_state_dict(load_file(setup["weights"]))  # the head is tied
    gpt2.to(setup["device"])
    kinds = (released, transformers, released_train)
    serve = {kind.__name__: kind for kind in kinds}[setup["kind"]](gpt2, setup)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": hf.__version__}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        request, reply = json.loads(line), {"out_of_memory": True}
        if "dtype" in request:
            gpt2.to(getattr(torch, request.pop("dtype")))
        with suppress(torch.OutOfMemoryError):
            reply = serve(request)
        if "out_of_memory" in reply:  # here, because the caught error held on to tensors
            torch.cuda.empty_cache()
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
