"""Providers of bench/latency.py: our engine, and what a user would take instead of it."""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.common.worker import NEEDS, Worker, clone_commit, worker_setup
from bench.common.workload import THOUGHTS, Workload
from nanococonut.inference.engine import Engine, Request
from nanococonut.runtime.errors import UserError

OURS = "nanococonut"
N_CHECKED = 9  # greedy tokens that are compared
# tokens, and seconds of prefill, latent_step, first_token, token_step and answer, of which
# first_token and answer count from the start of the request
Timing = dict[str, Any]


class EngineProvider:
    """Our engine, with these kernels and CUDA graphs."""

    versions: dict[str, str] | None = None  # None: this process's
    max_batch: int | None = None  # any

    def __init__(self, name: str, workload: Workload, kernels: str, graph: str) -> None:
        self.name = name
        self.engine = Engine(workload.model, kernels=kernels, graph=graph)

    def generate(
        self, prompts: list[list[int]], n_thoughts: int, forced_tokens: list[int], n_tokens: int
    ) -> Timing:
        eos = -1  # no token ends a sequence
        out = self.engine.run(Request(prompts, n_thoughts, forced_tokens, eos, n_tokens))
        return {
            "tokens": out.tokens,
            "prefill": out.seconds_prefill,
            "latent_step": out.seconds_thoughts / n_thoughts if n_thoughts else 0.0,
            "first_token": out.seconds_first,
            "token_step": out.seconds_decode / (n_tokens - 1) if n_tokens > 1 else 0.0,
            "answer": out.seconds,
        }

    def cast(self, dtype: torch.dtype) -> None:
        self.engine.model.to(dtype)

    def close(self) -> None:
        pass


Provider = EngineProvider | Worker


def start(workload: Workload, options: Any) -> tuple[list[Provider], dict[str, str]]:
    """Start every provider that this machine has. The first is ours, as a user has it by default.

    options: LatencyConfig. Also returns name -> why it is missing.
    """
    ours = EngineProvider(OURS, workload, "auto", "auto")
    providers: list[Provider] = [ours]
    missing: dict[str, str] = {}
    if ours.engine.kernels != "torch" or ours.engine.graph:
        providers.append(EngineProvider(f"{OURS}, eager", workload, "torch", "off"))
    if workload.device.type == "cuda" and ours.engine.kernels != "torch":
        providers.append(EngineProvider(f"{OURS}, torch graph", workload, "torch", "on"))
    config = workload.model.config
    is_plain = not config.smear and config.thought == "hidden"
    if not (options.peers and is_plain):
        why = "runs plain GPT-2s only" if options.peers else "not requested"
        return providers, dict.fromkeys(NEEDS, why)

    here = sys.executable if importlib.util.find_spec("transformers") else None
    pythons = {
        "released": options.released_python,
        "transformers": options.transformers_python or here,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        setup = worker_setup(workload.model, workload, path, options.released)
        for name, python in pythons.items():
            if python is None:
                missing[name] = "give {} a Python that has {}".format(*NEEDS[name])
                continue
            try:
                worker = Worker(name, python, setup | {"kind": name})
            except UserError as e:
                missing[name] = str(e).replace("\n", " ")
                continue
            if name == "released":
                worker.versions["coconut"] = clone_commit(options.released)
            providers.append(worker)
    return providers, missing


def drop_wrong(
    providers: list[Provider], workload: Workload, missing: dict[str, str], length: int
) -> None:
    """Remove every provider whose greedy tokens after thoughts differ from those of plain eager
    steps in float32. Raise UserError if it is one of ours."""
    reference = EngineProvider("reference", workload, "torch", "off")
    request = workload.prompts(1, length, length), THOUGHTS, [workload.eot], N_CHECKED
    expected = reference.generate(*request)["tokens"]
    for provider in list(providers):
        try:
            tokens = provider.generate(*request)["tokens"]
        except UserError as e:
            reason = str(e).splitlines()[0]
        else:
            if tokens == expected:
                continue
            reason = f"expected tokens {expected[0][:5]} ..., got {tokens[0][:5]} ..."
            if isinstance(provider, EngineProvider):
                raise UserError(
                    f"{provider.name}: {reason}\nThis is a bug of ours; nothing was timed."
                )
        provider.close()
        providers.remove(provider)
        missing[provider.name] = f"not timed, {reason}"
