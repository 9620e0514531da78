"""Ask a trained model questions and look at its thoughts.

python sample.py --latent 6                    a question of the model's task, six thoughts
python sample.py --latent 0 --question "..."   your own question, without thoughts
python sample.py --out_dir out/prosqa_small    a run of your own
python sample.py --nodes                       ProsQA: the concept named after each thought
python sample.py < questions.txt               one question per line, from a file or a pipe
python sample.py --view view.html              ProsQA: an interactive page about the thoughts
"""

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from select import select

import nanococonut  # isort: skip  # before torch: sets OpenMP's wait policy
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from nanococonut import Engine
from nanococonut.data import prosqa
from nanococonut.data.examples import Example, is_correct, split_answer
from nanococonut.data.graph import reachable
from nanococonut.data.tasks import TASKS, generated
from nanococonut.evaluation.accuracy import held_out_examples, is_capped, thoughts_as_trained
from nanococonut.evaluation.insight import count
from nanococonut.evaluation.interchange import NOUNS, kind_of
from nanococonut.evaluation.page import view_page
from nanococonut.evaluation.readout import concept_probabilities
from nanococonut.evaluation.view import question_view
from nanococonut.ops import BACKENDS
from nanococonut.runtime.cli import Options, option
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class SampleConfig(Options):
    latent: int | None = option(None, "thoughts before the answer (None: as in training)", ge=0)
    question: str | None = option(None, "question to ask (None: one of the model's task)")
    out_dir: str | None = option(None, "run or checkpoint (None: newest in out/, or bundled)")
    max_new_tokens: int | None = option(None, "maximum answer length (None: as in training)", ge=1)
    temperature: float = option(0.0, "sampling temperature (below 1e-6: greedy)", ge=0)
    nodes: bool = option(False, "ProsQA: also show the concept named after each thought")
    view: str | None = option(None, "ProsQA: write an interactive page about the thoughts")
    seed: int | None = option(
        None, "seed of questions and samples (None: random)", ge=0, le=2**32 - 1
    )
    device: str = option("auto", "auto, cpu, cuda, mps")
    kernels: str = option(
        "auto", "backend (c, packed: faster for GPT-2 on a CPU)", choices=BACKENDS
    )
    dtype: str = option("float32", "dtype of the model", choices=("float32", "bfloat16"))
    graph: str = option("auto", "replay steps as CUDA graphs", choices=("auto", "on", "off"))


def find_checkpoint(out_dir: str | None) -> Path:
    """Return the best checkpoint of out_dir (None: of the newest run in out/, or the bundled)."""
    if out_dir is None:
        manifests = list(Path("out").glob(f"*/step_*/{checkpoint.MANIFEST}"))
        if not manifests:
            console.print("no run in out/, so this is the bundled model (config/prosqa_small.py)")
            return checkpoint.BUNDLED
        out_dir = max(manifests, key=lambda path: path.stat().st_mtime).parents[1]
    return checkpoint.resolve(out_dir, best=True)


def task_questions(engine: Engine, seed: int) -> Iterator[Example]:
    """Yield examples of the model's task: from its validation file, or newly generated."""
    examples = held_out_examples(engine, 'Ask your own question with --question="...".')
    for i in itertools.count(seed):
        candidates = examples or generated(engine.config.task, 1, i, engine.config)
        yield candidates[i % len(candidates)]


def read_questions(interactive: bool) -> Iterator[str | None]:
    """Yield questions from stdin, or None to request an example question from the task.

    In a terminal, yield None first, then what the user types, or None for an empty line. Otherwise
    yield the lines of a file or pipe, or a single None if there are none.
    """
    if interactive:
        yield None
        with suppress(EOFError, KeyboardInterrupt):
            while True:
                yield console.input("\nquestion (empty: a new one, Ctrl-D: quit) ") or None
    else:
        lines = piped_lines()
        yield next(lines, None)
        yield from lines


def piped_lines() -> Iterator[str]:
    """Yield the non-blank lines of stdin if it is a file or a pipe.

    A job runner may leave the pipe open without ever writing to it, so wait one second at most.
    """
    try:
        if sys.stdin.isatty():
            return
        # select takes only sockets on Windows, where a silent pipe blocks
        readers = [sys.stdin] if os.name == "nt" else select([sys.stdin], [], [], 1.0)[0]
        if not readers:
            console.print("[yellow]note[/]      no input on stdin after 1 s, so it is ignored")
            return
        sys.stdin.reconfigure(errors="replace")
        for line in sys.stdin:
            if line := line.lstrip("\ufeff").strip():  # Windows may add a byte order mark
                yield line
    except (AttributeError, OSError, ValueError):  # stdin is None, closed, or not a real file
        return


def new_table(title: str, *columns: str) -> Table:
    # a narrow terminal may wrap text, but must not cut off a number
    headers = [Column(name, no_wrap=name in ("#", "total")) for name in columns]
    return Table(*headers, title=title, title_justify="left", caption_justify="left")


def thoughts_table(engine: Engine, thoughts: torch.Tensor) -> Table:
    """Return a table of the head's five most probable tokens at each thought (n, C)."""
    table = new_table("Thoughts, decoded to tokens", "#", *(f"token {i}" for i in range(1, 6)))
    for i, p in enumerate(engine.model.head(thoughts).softmax(-1), 1):
        best = p.topk(min(5, len(p)))
        tokens = [repr(engine.tokenizer.decode([t]))[1:-1].strip() for t in best.indices.tolist()]
        cells = [f"{t} {v:.0%}" for t, v in zip(tokens, best.values.tolist(), strict=True)]
        table.add_row(str(i), *map(escape, cells))
    return table


def nodes_table(engine: Engine, question: str, n_thoughts: int) -> Table:
    """Return a table of the three concepts that the model most probably names after each thought.

    A cell shows the concept, its distance from the entity in steps ("-": unreachable) and its
    probability. The last column is the total probability of all concepts; the rest goes to other
    words, such as "###" before the answer.
    """
    edges, entity, _ = prosqa.parse_question(question)
    steps = reachable(edges, entity)  # node -> fewest steps
    title = f"Next concept if the thoughts end after # of them (steps from {entity})"
    table = new_table(title, "#", *(f"concept {i}" for i in range(1, 4)), "total")
    for k in range(n_thoughts + 1):
        values = concept_probabilities(engine, question, k)
        total = f"{sum(values.values()):.1%}"
        best = sorted(values.items(), key=lambda item: -item[1])[:3]
        cells = [f"{node} ({steps.get(node, '-')}) {p:.1%}" for node, p in best]
        if total == "0.0%":
            cells = ["no concept", "", ""]
            table.caption = "no concept: the model would write another word, such as ###"
        table.add_row(str(k), *map(escape, cells), total)
    return table


def ask(engine: Engine, config: SampleConfig, example: Example, latent: int) -> None:
    """Ask one question. Print the thoughts, the answer and the times, and write --view.

    config   options, with max_new_tokens and seed set
    example  the question; its answer is "" if unknown
    latent   number of thoughts
    """
    # ---- question
    question, answer = example["question"], example["answer"]
    if config.nodes or config.view:
        prosqa.parse_question(question)  # raises if it is not ProsQA
    console.print(f"\n[bold]question[/]  {escape(question)}")
    if unknown := engine.tokenizer.unknown_words(engine.render(question)):
        names = escape(", ".join(unknown[:8]))
        console.print(
            f"[yellow]warning[/]   not in the vocabulary: {names}. Expect a meaningless answer."
        )

    # ---- generate, twice: the times of the first run include warm-up
    for _ in range(2):
        out = engine.generate(
            [question], latent, config.max_new_tokens, config.temperature, config.seed
        )

    # ---- thoughts
    n_thoughts, n_tokens = out.n_thoughts[0], len(out.tokens[0])
    if n_thoughts:
        console.print(thoughts_table(engine, out.thoughts[0]))
    if config.nodes:
        console.print(nodes_table(engine, question, latent))

    # ---- answer
    text = TASKS[engine.config.task].expand(out.text[0], question, engine.config.render)
    steps, model_answer = split_answer(text, answer)
    if model_answer is not None:
        for step in steps.splitlines():
            console.print(f"[bold]step[/]      {escape(step)}")
    verdict = "[green](correct)[/]" if answer else ""
    if answer and not is_correct(text, answer):
        missing = "" if model_answer else ', no answer after "###"'
        verdict = f"[red](wrong{missing}; correct: {escape(answer)})[/]"
    shown = text.strip() if model_answer is None else model_answer
    console.print(f"[bold]answer[/]    {escape(shown)}  {verdict}")

    # ---- times
    thought_ms = 1e3 * out.seconds_thoughts / max(1, n_thoughts)
    per_thought = f"{thought_ms:.2f} ms per thought, " if n_thoughts else ""
    token_ms = 1e3 * out.seconds_decode / max(1, n_tokens)
    per_token = f"{token_ms:.2f} ms per token, " if n_tokens > 1 else ""  # without the first
    console.print(
        f"[dim]first token after {1e3 * out.seconds_first:.1f} ms, {per_thought}"
        f"{per_token}{n_tokens} tokens[/]"
    )

    # ---- view
    if config.view:
        row = {"name": engine.manifest["method"], "noun": NOUNS[kind_of(engine)]}
        row["view"] = [question_view(engine, example, latent)]
        checkpoint.replace_text(Path(config.view), view_page(row))
        console.print(f"[bold]view[/]      {escape(config.view)}")


def main() -> None:
    config = SampleConfig.from_cli(__doc__)

    # ---- model
    path, dtype = find_checkpoint(config.out_dir), getattr(torch, config.dtype)
    engine = nanococonut.load(path, config.device, config.kernels, config.graph, dtype)
    task, manifest, n_trained = engine.config.task, engine.manifest, engine.manifest["n_thoughts"]
    as_trained = config.latent is None
    latent = n_trained if as_trained else config.latent
    has_thoughts = engine.curriculum.rules.n_thoughts_rule != "none"
    seed = torch.seed() % 2**32 if config.seed is None else config.seed
    capped = is_capped(engine)  # examples with fewer steps were trained with fewer thoughts
    if (config.nodes or config.view) and task != "prosqa":
        raise UserError(f"--nodes and --view are for prosqa, not {task}.\nLeave them out.")
    if config.view and not (latent and has_thoughts):
        raise UserError("--view needs a model with thoughts, and --latent above 0.\nLeave it out.")
    up_to = "up to " if capped and as_trained else ""
    console.print(
        f"{'bundled' if path == checkpoint.BUNDLED else path}: {manifest['method']}, "
        f"stage {manifest['stage']}, step {manifest['step']}, {engine.model.n_params():,} "
        f"parameters, {up_to}{count(latent, 'thought')}; kernels: {engine.kernels} "
        f"({engine.reason}), CUDA graphs {'on' if engine.graph else 'off'}, seed {seed}",
        markup=False,
    )
    if latent != n_trained or capped:
        fewer = ", or fewer for examples with fewer steps; your questions get all" * capped
        console.print(f"[yellow]note[/]      trained with {count(n_trained, 'thought')}{fewer}")
    if manifest.get("best_step", -1) < 0:
        console.print("[yellow]note[/]      not trained to the end: expect wrong answers")
    if latent and not has_thoughts:
        console.print(f"[yellow]note[/]      {manifest['method']} trains without thoughts")

    # ---- ask
    n_new = config.max_new_tokens or engine.config.max_new_tokens
    config = replace(config, max_new_tokens=n_new, seed=seed)
    is_terminal = all(s is not None and s.isatty() for s in (sys.stdin, sys.stdout))
    interactive = is_terminal and config.question is None
    examples = task_questions(engine, seed)
    failed = False  # a question of a file or pipe
    questions = read_questions(interactive) if config.question is None else [config.question]
    for question in questions:
        n_thoughts = latent
        if question is None:
            example = next(examples)
            if as_trained:
                [n_thoughts] = thoughts_as_trained(engine, manifest["stage"], [example])
        else:
            answer = TASKS[task].solve(question) or ""
            example = Example(question=question, steps=[], answer=answer)
        try:
            ask(engine, config, example, n_thoughts)
        except UserError as e:
            if config.question is not None:
                raise
            if interactive:
                console.print(f"[red]{escape(str(e))}[/]")
            else:  # the other questions can be answered
                print(f"error: {e}", file=sys.stderr, flush=True)
                failed = True
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    run_main(main)
