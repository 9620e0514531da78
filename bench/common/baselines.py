"""Providers of bench/latency.py: our engine, and what a user would take instead of it."""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any, TypedDict

import torch

from bench.common.worker import Worker, clone_commit, worker_setup
from bench.common.workload import THOUGHTS, Workload
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

N_CHECKED = 9  # greedy tokens that are compared
Prompts = list[list[int]]


class Timing(TypedDict):
    """Generated tokens, and seconds. first_token, answer: from the start of the request."""

    tokens: list[list[int]]
    prefill: float
    latent_step: float
    first_token: float
    token_step: float
    answer: float


class EngineProvider:
    """Our engine, with these kernels and CUDA graphs."""

    versions: dict[str, str] | None = None  # None: this process's
    max_batch: int | None = None  # any

    def __init__(self, name: str, workload: Workload, kernels: str, graph: str) -> None:
        self.name = name
        self.engine = Engine(workload.model, kernels=kernels, graph=graph)

    def generate(
        self, prompts: Prompts, n_thoughts: int, forced_tokens: list[int], n_tokens: int
    ) -> Timing:
        eos = -1  # no token ends a sequence
        out = self.engine.run(prompts, n_thoughts, forced_tokens, eos, n_tokens)
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


class WorkerProvider:
    """Another implementation, in its own process."""

    def __init__(
        self, name: str, worker: Worker, versions: dict[str, str], max_batch: int | None
    ) -> None:
        self.name, self.worker, self.versions, self.max_batch = name, worker, versions, max_batch

    def generate(self, *request: Any) -> Timing:
        """Generate as EngineProvider does, from the same arguments."""
        names = ("prompts", "n_thoughts", "forced_tokens", "n_tokens")
        return self.worker.request(dict(zip(names, request, strict=True)))

    def cast(self, dtype: torch.dtype) -> None:
        self.worker.request({"dtype": str(dtype).removeprefix("torch.")})

    def close(self) -> None:
        self.worker.close()


Provider = EngineProvider | WorkerProvider


def start(workload: Workload, options: Any) -> tuple[list[Provider], dict[str, str]]:
    """Start every provider that this machine has. The first is ours, as a user has it by default.

    options: LatencyConfig. Also returns name -> why it is missing.
    """
    ours = EngineProvider("nanococonut", workload, "auto", "auto")
    providers: list[Provider] = [ours]
    missing: dict[str, str] = {}
    if ours.engine.kernels != "torch" or ours.engine.graph:
        providers.append(EngineProvider("nanococonut, eager", workload, "torch", "off"))
    else:
        missing["nanococonut, eager"] = "is what nanococonut is here: torch operations, one by one"
    if workload.device.type == "cuda" and ours.engine.kernels != "torch":
        providers.append(EngineProvider("nanococonut, torch graph", workload, "torch", "on"))
    config = workload.model.config
    is_plain = not config.smear and config.thought == "hidden"
    if not (options.peers and is_plain):
        why = "runs plain GPT-2s only" if options.peers else "not requested"
        return providers, missing | dict.fromkeys(("released", "transformers"), why)

    here = sys.executable if importlib.util.find_spec("transformers") else None
    others = {  # name -> Python, the option that names it, what it needs, largest batch
        "released": (options.released_python, "--released_python", "transformers 4.46.2", 1),
        "transformers": (
            options.transformers_python or here, "--transformers_python", "transformers 5", None
        ),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        setup = worker_setup(workload.model, workload, path, options.released)
        for name, (python, flag, needs, max_batch) in others.items():
            if python is None:
                missing[name] = f"give {flag} a Python that has torch and {needs}"
                continue
            worker = Worker(name, python, flag, f"torch and {needs}")
            worker.send(setup | {"kind": name})
            try:
                versions = worker.receive()["versions"]
            except UserError as e:
                missing[name] = str(e).replace("\n", " ")
                continue
            if name == "released":
                versions["coconut"] = clone_commit(options.released)
            providers.append(WorkerProvider(name, worker, versions, max_batch))
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
