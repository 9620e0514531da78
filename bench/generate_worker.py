"""A peer's side of bench/latency.py: answers to prompts of tokens, greedily, and what they took.

    released   the released code's own generate, as its run.py calls it: one row at a time
    dynamic    transformers: thoughts by `inputs_embeds` into a dynamic cache, words by generate

Runs under a Python of its own and shares nothing with nanococonut but JSON lines and a file of
weights. The first line on stdin says what to build; every other one is {"prefixes", "thoughts",
"opening", "tokens"}, with "launches" to have them counted, or {"dtype"} to go on in another one.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

LAUNCHES = "cudaLaunchKernel cudaLaunchKernelExC cuLaunchKernel cuLaunchKernelEx cudaGraphLaunch"


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def count_launches(run: Callable[[], Any]) -> tuple[int, int]:
    """-> (launches that the host makes, kernels that the GPU runs) of a second run."""
    run()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    events = profile.events()
    on_gpu = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    asked = sum(e.name in LAUNCHES.split() for e in events)
    return asked, sum(not name.startswith("Mem") for name in on_gpu)


def released(gpt2: Any, task: dict[str, Any]) -> Callable:
    sys.path.insert(0, task["clone"])
    from coconut import Coconut

    device, special = task["device"], task["special"]
    model = Coconut(gpt2, special["latent"], special["bot"], special["eot"], -1)  # no eos: no end
    model.eval()
    calls: list[tuple[float, float]] = []  # of GPT-2: when each began and ended
    began: list[float] = []
    gpt2.register_forward_pre_hook(lambda *_: began.append(now(device)))
    gpt2.register_forward_hook(lambda *_: calls.append((began[-1], now(device))))

    def answer(prefixes: list, thoughts: int, opening: list, tokens: int) -> dict[str, Any]:
        calls.clear()
        start = now(device)
        ids = torch.tensor([prefixes[0] + [special["latent"]] * thoughts + opening], device=device)
        said = model.generate(ids, None, max_new_tokens=tokens)[0, ids.shape[1] :].tolist()
        end = now(device)
        # a call for the prompt, one for each thought (the last one's with the opening), then one
        # for each further token; between two of them it makes the next one's input
        at = [call[0] for call in calls] + [end]
        first = thoughts + 1
        return {
            "tokens": [said],
            "prefill": calls[0][1] - start,
            "latent_step": (at[thoughts] - at[1]) / (thoughts - 1) if thoughts > 1 else 0.0,
            "first": at[first] - start,
            "token_step": (end - at[first]) / (tokens - 1) if tokens > 1 else 0.0,
            "total": end - start,
        }

    return answer


def dynamic(gpt2: Any, task: dict[str, Any]) -> Callable:
    from transformers import DynamicCache

    device = task["device"]
    first: list[float] = []

    def note(ids: Tensor, scores: Tensor) -> Tensor:
        if not first:
            first.append(now(device))
        return scores

    def answer(prefixes: list, thoughts: int, opening: list, tokens: int) -> dict[str, Any]:
        first.clear()
        start = now(device)
        ids, cache = torch.tensor(prefixes, device=device), DynamicCache()
        prefilled = thought = None
        if thoughts:
            out = gpt2.transformer(input_ids=ids, past_key_values=cache, use_cache=True)
            hidden = out.last_hidden_state[:, -1:]
            prefilled = now(device)
            for _ in range(thoughts):
                out = gpt2.transformer(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
                hidden = out.last_hidden_state
            thought = now(device)
            # ids in the thoughts' places: the cache holds them, so nothing looks at these
            ids = torch.cat([ids, ids.new_tensor([[0] * thoughts + opening] * len(ids))], 1)
        said = gpt2.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[note],
        )
        said = said[:, ids.shape[1] :].tolist()
        end = now(device)
        return {
            "tokens": said,
            "prefill": (prefilled or first[0]) - start,
            "latent_step": (thought - prefilled) / thoughts if thoughts else 0.0,
            "first": first[0] - start,
            "token_step": (end - first[0]) / (tokens - 1) if tokens > 1 else 0.0,
            "total": end - start,
        }

    return answer


def main() -> None:
    task = json.loads(sys.stdin.readline())
    torch.set_num_threads(task["threads"])
    import transformers  # before the path, for the released clone holds modules of common names

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(**task["gpt2"], bos_token_id=None, eos_token_id=None)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    gpt2.transformer.load_state_dict(load_file(task["weights"]))  # the head is tied to it
    gpt2.to(task["device"])
    python = ".".join(map(str, sys.version_info[:3]))
    versions = {
        "python": python,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    answer = {"released": released, "dynamic": dynamic}[task["kind"]](gpt2, task)
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        found: Any = {}
        try:
            with torch.no_grad():
                if dtype := asked.pop("dtype", None):
                    gpt2.to(getattr(torch, dtype))
                elif asked.pop("launches", False):
                    found = count_launches(lambda asked=asked: answer(**asked))
                else:
                    found = answer(**asked)
        except torch.OutOfMemoryError:
            found = {"out_of_memory": True}
        if "out_of_memory" in found and task["device"] == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
