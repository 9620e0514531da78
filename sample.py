"""Ask a trained model a question and look at its thoughts.

python sample.py --latent 6                    a question of its task, answered after six thoughts
python sample.py --latent 0 --question "..."   your own question, without thoughts
python sample.py --out_dir out/prosqa_small    a run of yours
python sample.py --nodes                       ProsQA: which concepts each thought encodes
python sample.py --view view.html              ProsQA: the same as an interactive page
"""

import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import nanococonut  # isort: skip  # first: sets OMP_WAIT_POLICY
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from bench.common.page import view_page
from nanococonut import Engine
from nanococonut.curriculum import METHODS
from nanococonut.data import prosqa
from nanococonut.data.examples import Example, extract_answer
from nanococonut.data.search import reachable
from nanococonut.data.tasks import TASKS, generated, load_data
from nanococonut.evaluation.interchange import NOUNS, kind_of
from nanococonut.evaluation.probe import concept_probabilities
from nanococonut.evaluation.view import question_view
from nanococonut.ops import BACKENDS
from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class SampleConfig:
    latent: int | None = option(None, "thoughts before the answer (None: as trained)", ge=0)
    question: str | None = option(None, "question to ask (None: one of the task's own)")
    out_dir: str | None = option(None, "run or checkpoint (None: newest in out/, else the bundled)")
    method: str | None = option(
        None, "token layout of the question (None: as trained)", choices=tuple(METHODS)
    )
    max_new_tokens: int | None = option(None, "longest answer (None: as in training)", ge=1)
    temperature: float = option(0.0, "0: greedy; above: sample tokens", ge=0)
    nodes: bool = option(False, "ProsQA: also show the concepts that each thought encodes")
    view: str | None = option(None, "ProsQA: write an interactive page about the thoughts")
    seed: int | None = option(
        None, "of questions and sampled tokens (None: random)", ge=0, le=2**32 - 1
    )
    device: str = option("auto", "auto, cpu, cuda, mps")
    kernels: str = option("auto", "backend of each step", choices=BACKENDS)
    graph: str = option("auto", "run steps as CUDA graphs", choices=("auto", "on", "off"))

    def __post_init__(self) -> None:
        validate(self)


def find_checkpoint(out_dir: str | None) -> Path:
    """Return the best checkpoint of out_dir, else of the newest run in out/, else the bundled."""
    runs = [run for run in Path("out").glob("*") if checkpoint.list_checkpoints(run)]
    if out_dir is None and not runs:
        console.print("no run in out/, so this is the bundled model (config/prosqa_small.py)")
        return checkpoint.BUNDLED
    newest = max(runs, key=lambda r: checkpoint.list_checkpoints(r)[-1].stat().st_mtime, default="")
    return checkpoint.resolve(out_dir or newest, best=True)


def held_out_examples(engine: Engine) -> list[Example]:
    """Return the validation examples of a run that trained on a file; [] if they are generated."""
    config = engine.config
    if TASKS[config.task].splits and not config.data and not config.valid_data:
        return []
    revision = engine.manifest.get("hub_commit") or config.hub_revision
    skipped: list[str] | None = [] if config.skip_bad_rows else None
    return load_data(replace(config, hub_revision=revision), skipped).val["valid"]


def new_table(title: str, columns: list[str]) -> Table:
    headers = [Column(name, no_wrap=True) for name in columns]
    return Table(*headers, title=title, title_justify="left")


def thoughts_table(engine: Engine, thoughts: torch.Tensor) -> Table:
    """Return the five most probable tokens at each thought, (n, C): the head applied to it."""
    columns = ["#", *[f"token {i + 1}" for i in range(5)]]
    table = new_table("Thoughts, decoded to tokens", columns)
    for i, p in enumerate(engine.model.head(thoughts).softmax(-1)):
        best = p.topk(min(5, len(p)))
        tokens = [repr(engine.tokenizer.decode([t]))[1:-1].strip() for t in best.indices.tolist()]
        cells = [f"{t} {v:.0%}" for t, v in zip(tokens, best.values.tolist(), strict=True)]
        table.add_row(str(i + 1), *map(escape, cells))
    return table


def nodes_table(engine: Engine, question: str, n_thoughts: int) -> Table:
    """Return the three concepts that the model would most probably name after 0, 1, ... thoughts.

    Each has its distance from the entity in steps ("-": unreachable). Percentages are fractions of
    the total probability of all concepts, the last column.
    """
    edges, entity, _ = prosqa.parse_question(question)
    steps = reachable(edges, entity)  # node -> fewest steps
    columns = ["#", *[f"concept {i + 1}" for i in range(3)], "total"]
    table = new_table(f"Concepts after # thoughts (steps from {entity})", columns)
    for k in range(n_thoughts + 1):
        values = concept_probabilities(engine, question, k)
        total = sum(values.values())
        best = sorted(values.items(), key=lambda item: -item[1])[:3]
        cells = [
            f"{node} ({steps[node] if node in steps else '-'}) {p / total:.0%}" for node, p in best
        ]
        table.add_row(str(k), *map(escape, cells), f"{total:.1%}")
    return table


def ask(engine: Engine, config: SampleConfig, question: str, answer: str | None) -> None:
    """Ask one question and print the thoughts, the answer and the times.

    config: latent, max_new_tokens and seed are set. answer: the correct one, if it is known.
    """
    # ---- question
    console.print(f"\n[bold]question[/]  {escape(question)}")
    if unknown := engine.tokenizer.unknown_words(engine.render(question)):
        names = escape(", ".join(unknown[:8]))
        console.print(
            f"[yellow]warning[/]   not in the vocabulary: {names}. Expect a meaningless answer."
        )

    # ---- generate, twice: the first run includes one-time costs
    for _ in range(2):
        out = engine.generate(
            [question], config.latent, config.max_new_tokens, config.temperature, config.seed
        )

    # ---- thoughts
    n_thoughts, n_tokens = out.n_thoughts[0], len(out.tokens[0])
    if n_thoughts:
        console.print(thoughts_table(engine, out.thoughts[0]))
    if config.nodes:
        console.print(nodes_table(engine, question, config.latent))

    # ---- answer
    text, task = out.text[0], TASKS[engine.config.task]
    if engine.config.render == "compact":
        text = task.expand(text, question)
    chain, mark, _ = text.rpartition("###")
    for step in chain.splitlines():
        console.print(f"[bold]step[/]      {escape(step)}")
    parsed, verdict = extract_answer(text) if mark else text.strip(), ""
    if answer is not None:
        is_correct = parsed == extract_answer(answer)
        verdict = "[green](correct)[/]" if is_correct else f"[red](wrong: {escape(answer)})[/]"
    console.print(f"[bold]answer[/]    {escape(parsed)}  {verdict}")

    # ---- times
    thought_ms = 1e3 * out.seconds_thoughts / max(1, n_thoughts)
    per_thought = f"{thought_ms:.2f} ms per thought, " if n_thoughts else ""
    token_ms = 1e3 * out.seconds_decode / max(1, n_tokens)
    console.print(
        f"[dim]first token after {1e3 * out.seconds_first:.1f} ms, {per_thought}"
        f"{token_ms:.2f} ms per token, {n_tokens} tokens[/]"
    )


def write_view(engine: Engine, path: Path, question: str, answer: str | None, n: int) -> None:
    """Write the interactive page about the thoughts of one question."""
    example = Example(question=question, steps=[], answer=answer or "")
    view = question_view(engine, example, n)
    row = {"name": engine.manifest["method"], "noun": NOUNS[kind_of(engine)], "view": [view]}
    checkpoint.replace_text(path, view_page(row))
    console.print(f"[bold]view[/]      {escape(str(path))}")


def main() -> None:
    overrides, _ = parse_cli(SampleConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(SampleConfig, overrides)

    # ---- model
    path = find_checkpoint(config.out_dir)
    engine = nanococonut.load(path, config.device, config.kernels, config.graph)
    trained, manifest = engine.config, engine.manifest
    if config.nodes and trained.task != "prosqa":
        raise UserError(f"--nodes is for prosqa, this is a model of {trained.task}.\nLeave it out.")

    # ---- token layout
    if config.method:
        engine.curriculum = replace(engine.curriculum, method=config.method)
        if engine.curriculum.rules.thought_type not in ("", "pause", engine.model.config.thought):
            raise UserError(
                f"--method={config.method} feeds back something else than this model, trained by "
                f"{manifest['method']}.\nLeave it out, or ask a model trained by {config.method}."
            )
    has_thoughts = engine.curriculum.rules.n_thoughts_rule != "none"
    n_trained = manifest["n_thoughts"]
    latent = n_trained * has_thoughts if config.latent is None else config.latent
    console.print(
        f"{'bundled' if path == checkpoint.BUNDLED else path}: {manifest['method']}, "
        f"stage {manifest['stage']}, step {manifest['step']}, {engine.model.n_params():,} "
        f"parameters, {latent} thoughts; kernels: {engine.kernels} ({engine.reason}), "
        f"CUDA graphs {'on' if engine.graph else 'off'}",
        markup=False,
    )
    if latent != n_trained:
        console.print(f"[yellow]note[/]      trained with {n_trained} thoughts")
    if config.view and (trained.task != "prosqa" or not latent or not has_thoughts):
        raise UserError("--view needs a model of prosqa, and a thought or more.\nLeave it out.")
    if latent and not has_thoughts:
        console.print(f"[yellow]note[/]      {engine.curriculum.method} trains without thoughts")

    # ---- settings that were left open
    seed = torch.seed() % 2**32 if config.seed is None else config.seed
    n_new = config.max_new_tokens or trained.max_new_tokens
    config = replace(config, latent=latent, max_new_tokens=n_new, seed=seed)

    # ---- ask once, or until Ctrl-D
    question, task = config.question, TASKS[trained.task]
    examples = [] if question else held_out_examples(engine)
    is_interactive = question is None and sys.stdin.isatty() and sys.stdout.isatty()
    for i in itertools.count(seed):
        if question is None:
            drawn = examples or generated(trained.task, 1, i, trained)
            question, answer = (drawn[i % len(drawn)][key] for key in ("question", "answer"))
        else:
            answer = task.solve(question)
        try:
            ask(engine, config, question, answer)
            if config.view:
                write_view(engine, Path(config.view), question, answer, latent)
        except UserError as e:
            if not is_interactive:
                raise
            console.print(f"[red]{escape(str(e))}[/]")
        if not is_interactive:
            return
        try:
            question = console.input("\nquestion (empty: a new one, Ctrl-D: quit) ") or None
        except (EOFError, KeyboardInterrupt):
            return


if __name__ == "__main__":
    run_main(main)
