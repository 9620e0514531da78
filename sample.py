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

from nanococonut import checkpoint, device
from nanococonut.config import METHOD_NAMES, TrainConfig, build, check_values, opt, parse_cli
from nanococonut.curriculum import Curriculum, answer_of
from nanococonut.data import Row, prosqa
from nanococonut.engine import Engine
from nanococonut.errors import UserError, main_guard
from nanococonut.loader import curriculum_of, read_data, render_question
from nanococonut.model import GPT
from nanococonut.nodes import node_values
from nanococonut.tasks import TASKS, generated
from nanococonut.tokenizer import Tokenizer

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class SampleConfig:
    latent: int | None = opt(None, "thoughts before the answer (None: as trained)", at_least=0)
    question: str | None = opt(None, "ask this (None: one of the task's own)")
    out_dir: str | None = opt(None, "run or checkpoint (None: newest in out/, else the bundled)")
    method: str | None = opt(
        None, "layout of the question (None: as trained)", choices=METHOD_NAMES
    )
    max_new_tokens: int | None = opt(None, "longest answer (None: the run's own)", at_least=1)
    temperature: float = opt(0.0, "0: greedy; more: words are drawn", at_least=0)
    nodes: bool = opt(False, "ProsQA: also which concepts it would name after 0, 1, ... thoughts")
    seed: int | None = opt(
        None,
        "of the drawn question and words (None: others every time)",
        at_least=0,
        at_most=2**32 - 1,
    )
    device: str = opt("auto", "auto, cpu, cuda, mps")
    kernels: str = opt("auto", "what runs a step", choices=("auto", "triton", "torch"))
    graph: str = opt("auto", "steps by CUDA graphs", choices=("auto", "on", "off"))

    def __post_init__(self) -> None:
        check_values(self)


def choose(out_dir: str | None) -> Path:
    """The checkpoint to ask: the one given, else the newest run here, else the bundled one."""
    if out_dir:
        return checkpoint.find(out_dir, best=True)
    runs = [run for run in Path("out").glob("*") if checkpoint.steps_in(run)]
    if runs:
        newest = max(runs, key=lambda run: checkpoint.steps_in(run)[-1].stat().st_mtime)
        return checkpoint.find(newest, best=True)
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
    away = prosqa.reachable(edges, entity)
    table = Table(title="if it had to speak: concept (steps away)", title_justify="left")
    table.add_column("#", justify="right", no_wrap=True)
    for i in range(3):
        table.add_column(f"node {i + 1}", no_wrap=True)
    table.add_column("a node", justify="right", no_wrap=True)
    for k in range(thoughts + 1):
        values = node_values(model, tokenizer, curriculum, question, render, k)
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
    asked = render_question(trained, question)
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
    said = answer_of(text) if mark else text.strip()
    verdict = ""
    if known is not None:
        right = said == answer_of(known)
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
    config = build(SampleConfig, given)
    folder = choose(config.out_dir)
    model, tokenizer, manifest = checkpoint.load(folder, device.choose(config.device))
    trained = build(TrainConfig, manifest["config"])
    curriculum = curriculum_of(trained)
    if config.method:
        curriculum = replace(curriculum, method=config.method)
        if curriculum.entry.slot in {"hidden", "soft", "projected"} - {model.config.thought}:
            raise UserError(
                f"--method={config.method} feeds back something else than this model, trained by "
                f"{manifest['method']}.\nLeave it out, or ask a model trained by {config.method}."
            )
    engine = Engine(model, tokenizer, curriculum, config.kernels, config.graph)
    if config.nodes and trained.task != "prosqa":
        raise UserError(f"--nodes is for prosqa, this is a model of {trained.task}.\nLeave it out.")
    trained_thoughts = manifest["n_thoughts"] if curriculum.entry.insert != "none" else 0
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
    if curriculum.entry.insert == "none" and thoughts:
        console.print(f"[yellow]note[/]      {curriculum.method} has no thoughts in training")

    seed = config.seed if config.seed is not None else torch.seed() % 2**32
    rows = iter(range(seed, seed + 10**9))

    # a task of one's own has its questions in a file: those that were held out
    from_file = trained.data or trained.valid_data or not TASKS[trained.task].splits
    skipped: list[str] | None = [] if trained.skip_bad_rows else None
    own = None
    if from_file and not config.question:
        revision = manifest.get("hub_commit") or trained.hub_revision
        own = read_data(replace(trained, hub_revision=revision), skipped)[1]["valid"]

    def drawn() -> Row:
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
    main_guard(main)
