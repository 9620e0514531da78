"""Sides of bench/latency.py: our engine, and what a user would take instead of it, with the same
weights and prompts. Each is checked to say the same before anything is timed."""

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from generate_worker import count_launches
from safetensors.torch import save_file
from subject import THOUGHTS, Subject
from worker import Worker, as_gpt2, commit_of

from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

TOKENS = 9  # said when greedy tokens are compared
# prompts, thoughts, opening, new tokens -> {"tokens", and in seconds "prefill", "latent_step",
# "first" (from the start to the first word), "token_step", "total"}
Answer = Callable[[list[list[int]], int, list[int], int], dict[str, Any]]


@dataclass
class Side:
    """Somebody who answers. versions: None for this process's. most_rows: in a batch."""

    name: str
    answer: Answer
    launches: Callable[[list[list[int]], int, list[int], int], tuple[int, int]]
    versions: dict[str, str] | None = None
    most_rows: int | None = None
    worker: Worker | None = None
    engine: Engine | None = None

    def cast(self, dtype: str) -> None:
        if self.worker:
            self.worker.ask({"dtype": dtype})


@dataclass
class Sides:
    """first is ours, as a user has it by default. missing: name -> why it is not there."""

    all: list[Side]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> Side:
        return self.all[0]

    def end(self) -> None:
        for side in self.all:
            if side.worker:
                side.worker.end()


def ours(name: str, subject: Subject, kernels: str = "auto", graph: str = "auto") -> Side:
    engine = Engine(subject.model, kernels=kernels, graph=graph)

    def answer(prefixes: list, thoughts: int, opening: list, tokens: int) -> dict[str, Any]:
        out = engine.run(prefixes, thoughts, opening, -1, tokens)  # no token ends it
        return {
            "tokens": out.tokens,
            "prefill": out.seconds_prefill,
            "latent_step": out.seconds_thoughts / thoughts if thoughts else 0.0,
            "first": out.seconds_first,
            "token_step": out.seconds_decode / (tokens - 1) if tokens > 1 else 0.0,
            "total": out.seconds,
        }

    return Side(name, answer, lambda *a: count_launches(lambda: answer(*a)), engine=engine)


def _theirs(name: str, worker: Worker, **more: Any) -> Side:
    def asked(prefixes: list, thoughts: int, opening: list, tokens: int) -> dict[str, Any]:
        return dict(prefixes=prefixes, thoughts=thoughts, opening=opening, tokens=tokens)

    def answer(*a: Any) -> dict[str, Any]:
        found = worker.ask(asked(*a))
        if "out_of_memory" in found:
            raise torch.OutOfMemoryError(f"{name} ran out of memory")
        return found

    def launches(*a: Any) -> tuple[int, int]:
        return tuple(worker.ask(asked(*a) | {"launches": True}))

    return Side(name, answer, launches, worker=worker, **more)


def start(
    subject: Subject,
    released: str | None,
    released_python: str | None,
    transformers_python: str | None,
    others: bool = True,
) -> Sides:
    """All sides there can be. others: those in a Python of their own too."""
    device, config = subject.model.wte.weight.device, subject.model.config
    found = Sides([ours("ours", subject)])
    first = found.first.engine
    if first.kernels != "torch" or first.graph:
        found.all.append(ours("ours, eager", subject, "torch", "off"))
    else:
        found.missing["ours, eager"] = "is what ours is here: torch operations, one by one"
    if device.type != "cuda":
        found.missing["ours, torch + CUDA graph"] = "needs a GPU"
    elif first.kernels != "torch":
        found.all.append(ours("ours, torch + CUDA graph", subject, "torch", "on"))
    wanted = {"released": ("released", released_python, "--released_python", "transformers 4.46.2")}
    if not released:
        wanted.pop("released")
        found.missing["released"] = (
            "not installed: git clone https://github.com/facebookresearch/coconut, a venv with "
            "torch and transformers==4.46.2, then --released CLONE --released_python "
            "VENV/bin/python"
        )
    here = sys.executable if importlib.util.find_spec("transformers") else None
    python = transformers_python or here
    dynamic = "transformers, dynamic cache"
    if python is None:
        found.missing[dynamic] = "not installed: pip install transformers (5), or give "
        found.missing[dynamic] += "--transformers_python VENV/bin/python"
    else:
        wanted[dynamic] = ("dynamic", python, "--transformers_python", "transformers 5")
    plain = config.smear is False and config.thought == "hidden"
    if not plain or not others:
        why = "runs plain GPT-2s only" if not plain else "not asked for"
        found.missing |= dict.fromkeys(wanted, why)
        return found
    with tempfile.TemporaryDirectory() as folder:
        settings, weights = as_gpt2(subject.model)
        path = Path(folder) / "model.safetensors"
        save_file(weights, path)
        special = {n: getattr(subject, n) for n in ("bot", "eot", "latent")}
        task = {
            "clone": str(Path(released).resolve()) if released else None,
            "weights": str(path),
            "gpt2": settings,
            "special": special,
            "threads": torch.get_num_threads(),
            "device": device.type,
        }
        started = {
            name: Worker("generate_worker.py", python, flag, f"torch and {needs}")
            for name, (_, python, flag, needs) in wanted.items()
        }  # side by side: each takes seconds to import what it needs
        for name, worker in started.items():
            try:
                worker.tell(task | {"kind": wanted[name][0]})
            except UserError:
                pass  # it has ended, and hear() says why
        for name, worker in started.items():
            try:
                versions = worker.hear()["versions"]
            except UserError as e:
                found.missing[name] = str(e).replace("\n", " ")
                continue
            more: dict[str, Any] = {"versions": versions}
            if name == "released":
                more["versions"]["coconut"] = commit_of(released)
                more["most_rows"] = 1
            found.all.append(_theirs(name, worker, **more))
    return found


def check(sides: Sides, subject: Subject, lengths: Sequence[int]) -> None:
    """Every side says what plain eager steps say, in float32, greedily: with thoughts and without.
    One that does not, or cannot, is not timed; ours has to (UserError)."""
    truth = ours("truth", subject, "torch", "off").answer
    for length in lengths:
        for thoughts, opening in ((THOUGHTS, subject.opening), (0, [])):
            prompt = subject.prompts(1, length, seed=length)
            wanted = truth(prompt, thoughts, opening, TOKENS)["tokens"]
            for side in list(sides.all):
                try:
                    said = side.answer(prompt, thoughts, opening, TOKENS)["tokens"]
                except UserError as e:
                    sides.all.remove(side)
                    sides.missing[side.name] = f"not timed, {str(e).splitlines()[0]}"
                    continue
                if said == wanted:
                    continue
                if side.engine:
                    raise UserError(
                        f"{side.name} says {said[0][:5]}... where plain steps say "
                        f"{wanted[0][:5]}...\nThis is a defect of ours; nothing was timed."
                    )
                side.worker.end()
                sides.all.remove(side)
                sides.missing[side.name] = (
                    f"not timed: says other tokens than ours, {said[0][:5]} ... not "
                    f"{wanted[0][:5]} ..."
                )
