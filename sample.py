"""Ask a trained model a question and see what it thinks.

python sample.py --latent 6                          a question of its task, six thoughts
python sample.py --latent 0 --question "..."         your own question, no thoughts
python sample.py --out_dir out/prosqa_small          a run of your own
python sample.py --nodes                             ProsQA: where in the graph each thought is
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanococonut.config import TrainConfig
from nanococonut.curriculum import METHODS, Curriculum
from nanococonut.data import prosqa
from nanococonut.data.examples import Example, extract_answer
from nanococonut.data.search import reachable
from nanococonut.data.tasks import TASKS, generated, load_data
from nanococonut.evaluation.probe import concept_probabilities
from nanococonut.inference.engine import Engine
from nanococonut.model import GPT
from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.device import select_device
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.tokenizer import Tokenizer
from nanococonut.weights import checkpoint

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class SampleConfig:
    latent: int | None = option(None, "thoughts before the answer (None: as trained)", ge=0)
    question: str | None = option(None, "ask this (None: one of the task's own)")
    out_dir: str | None = option(None, "run or checkpoint (None: newest in out/, else the bundled)")
    method: str | None = option(
        None, "layout of the question (None: as trained)", choices=tuple(METHODS)
    )
    max_new_tokens: int | None = option(None, "longest answer (None: the run's own)", ge=1)
    temperature: float = option(0.0, "0: greedy; more: words are drawn", ge=0)
    nodes: bool = option(
        False, "ProsQA: also which concepts it would name after 0, 1, ... thoughts"
    )
    seed: int | None = option(
        None,
        "of the drawn question and words (None: others every time)",
        ge=0,
        le=2**32 - 1,
    )
    device: str = option("auto", "auto, cpu, cuda, mps")
    kernels: str = option("auto", "what runs a step", choices=("auto", "triton", "torch"))
    graph: str = option("auto", "steps by CUDA graphs", choices=("auto", "on", "off"))

    def __post_init__(self) -> None:
        validate(self)


def choose(out_dir: str | None) -> Path:
    """The checkpoint to ask: the one given, else the newest run here, else the bundled one."""
    if out_dir:
        return checkpoint.resolve(out_dir, best=True)
    runs = [run for run in Path("out").glob("*") if checkpoint.list_checkpoints(run)]
    if runs:
        newest = max(runs, key=lambda run: checkpoint.list_checkpoints(run)[-1].stat().st_mtime)
        return checkpoint.resolve(newest, best=True)
    console.print("no run in out/: asking the bundled prosqa_small (config/prosqa_small.py)")
    return checkpoint.BUNDLED


def thoughts_table(model: GPT, tokenizer: Tokenizer, thoughts: torch.Tensor) -> Table:
    """What each thought (n, C) would say if it were a word: its five most probable tokens."""
    table = Table(title="thoughts, as the words they are nearest to", title_justify="left")
    table.add_column("#", justify="right", no_wrap=True, min_width=2)
    for i in range(5):
        table.add_column(f"word {i + 1}", no_wrap=True)
    for i, p in enumerate(model.head(thoughts).softmax(-1)):
        best = p.topk(min(5, len(p)))
        words = [repr(tokenizer.decode([t]))[1:-1].strip() for t in best.indices.tolist()]
        shown = (f"{w} {v:.0%}" for w, v in zip(words, best.values.tolist(), strict=True))
        table.add_row(str(i + 1), *map(escape, shown))
    return table


def nodes_table(
    model: GPT,
    tokenizer: Tokenizer,
    curriculum: Curriculum,
    render: str,
    question: str,
    thoughts: int,
) -> Table:
    """What each number of thoughts has come to: the concepts that the model would name if it had to
    speak then, and how many steps from the entity each is ("-": not reached from it). Shares are of
    what all concepts have together; the last column says how much that is."""
    edges, entity, _ = prosqa.parse_question(question)
    away = reachable(edges, entity)
    table = Table(title="if it had to speak: concept (steps away)", title_justify="left")
    table.add_column("#", justify="right", no_wrap=True)
    for i in range(3):
        table.add_column(f"node {i + 1}", no_wrap=True)
    table.add_column("a node", justify="right", no_wrap=True)
    for k in range(thoughts + 1):
        values = concept_probabilities(model, tokenizer, curriculum, question, render, k)
        all_of_them = sum(values.values())
        best = sorted(values.items(), key=lambda item: -item[1])[:3]
        shown = [
            f"{node} ({away[node][0] if node in away else '-'}) {p / all_of_them:.0%}"
            for node, p in best
        ]
        table.add_row(str(k), *map(escape, shown), f"{all_of_them:.1%}")
    return table


def answer(
    engine: Engine,
    trained: TrainConfig,
    question: str,
    known: str | None,
    thoughts: int,
    max_new_tokens: int,
    nodes: bool,
    temperature: float,
    seed: int,
) -> None:
    """Ask one question and print everything there is to see."""
    model, tokenizer, curriculum = engine.model, engine.tokenizer, engine.curriculum
    console.print(f"\n[bold]question[/]  {escape(question)}")
    asked = TASKS[trained.task].render_question(question, trained.render)
    if unknown := tokenizer.unknown_words(asked):
        console.print(
            f"[yellow]warning[/]   never trained on: {escape(', '.join(unknown[:8]))}. "
            "Do not expect sense from this answer."
        )
    # first use of anything is slow: not timed
    engine.generate([asked], thoughts, max_new_tokens, temperature, seed)
    out = engine.generate([asked], thoughts, max_new_tokens, temperature, seed)
    if out.n_thoughts[0]:
        console.print(thoughts_table(model, tokenizer, out.thoughts[0]))
    if nodes:
        console.print(nodes_table(model, tokenizer, curriculum, trained.render, question, thoughts))
    text = out.text[0]
    if trained.render == "compact":
        text = TASKS[trained.task].expand(text, question)
    chain, mark, _ = text.rpartition("###")
    for step in chain.splitlines():
        console.print(f"[bold]step[/]      {escape(step)}")
    said = extract_answer(text) if mark else text.strip()
    verdict = ""
    if known is not None:
        right = said == extract_answer(known)
        verdict = "  [green](right)[/]" if right else f"  [red](wrong: {escape(known)})[/]"
    console.print(f"[bold]answer[/]    {escape(said)}{verdict}")
    n = max(1, len(out.tokens[0]))
    had = out.n_thoughts[0]
    per_thought = f"{1e3 * out.seconds_thoughts / had:.2f} ms a thought, " if had else ""
    console.print(
        f"[dim]first word after {1e3 * out.seconds_first:.1f} ms, {per_thought}"
        f"{1e3 * out.seconds_decode / n:.2f} ms a word, {len(out.tokens[0])} tokens[/]"
    )


def main() -> None:
    given, _ = parse_cli(SampleConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(SampleConfig, given)
    folder = choose(config.out_dir)
    model, tokenizer, manifest = checkpoint.load(folder, select_device(config.device))
    trained = make_config(TrainConfig, manifest["config"])
    curriculum = Curriculum.from_config(trained)
    if config.method:
        curriculum = replace(curriculum, method=config.method)
        if curriculum.rules.thought_type in {"hidden", "soft", "projected"} - {
            model.config.thought
        }:
            raise UserError(
                f"--method={config.method} feeds back something else than this model, trained by "
                f"{manifest['method']}.\nLeave it out, or ask a model trained by {config.method}."
            )
    engine = Engine(model, tokenizer, curriculum, config.kernels, config.graph)
    if config.nodes and trained.task != "prosqa":
        raise UserError(f"--nodes is for prosqa, this is a model of {trained.task}.\nLeave it out.")
    trained_thoughts = manifest["n_thoughts"] if curriculum.rules.n_thoughts_rule != "none" else 0
    thoughts = trained_thoughts if config.latent is None else config.latent
    name = "bundled" if folder == checkpoint.BUNDLED else str(folder)
    console.print(
        f"{name}: {manifest['method']}, stage {manifest['stage']}, step {manifest['step']}, "
        f"{model.n_params():,} parameters, {thoughts} thoughts; kernels: {engine.kernels} "
        f"({engine.reason}), CUDA graphs {'on' if engine.graph else 'off'}",
        markup=False,
    )
    if thoughts != manifest["n_thoughts"]:
        console.print(
            f"[yellow]note[/]      it was trained to answer after {manifest['n_thoughts']}"
        )
    if curriculum.rules.n_thoughts_rule == "none" and thoughts:
        console.print(f"[yellow]note[/]      {curriculum.method} has no thoughts in training")

    seed = config.seed if config.seed is not None else torch.seed() % 2**32
    rows = iter(range(seed, seed + 10**9))

    # a task of one's own has its questions in a file: those that were held out
    from_file = trained.data or trained.valid_data or not TASKS[trained.task].splits
    skipped: list[str] | None = [] if trained.skip_bad_rows else None
    own = None
    if from_file and not config.question:
        revision = manifest.get("hub_commit") or trained.hub_revision
        own = load_data(replace(trained, hub_revision=revision), skipped).val["valid"]

    def drawn() -> Example:
        if own:
            return own[next(rows) % len(own)]
        return generated(trained.task, 1, next(rows), trained)[0]

    question = config.question
    talk = question is None and sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        known = TASKS[trained.task].solve(question) if question is not None else None
        if question is None:
            row = drawn()
            question, known = row["question"], row["answer"]
        try:
            answer(
                engine,
                trained,
                question,
                known,
                thoughts,
                config.max_new_tokens or trained.max_new_tokens,
                config.nodes,
                config.temperature,
                seed,
            )
        except UserError as e:
            if not talk:
                raise
            console.print(f"[red]{escape(str(e))}[/]")
        if not talk:
            return
        try:
            question = console.input("\nyour question (empty: another one, Ctrl-D: end) ") or None
        except (EOFError, KeyboardInterrupt):
            return


if __name__ == "__main__":
    run_main(main)
