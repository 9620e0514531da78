"""Train a GPT-2 to reason in continuous thoughts, stage by stage.

    python train.py config/prosqa.py                        # the paper's recipe
    python train.py config/prosqa_small.py --seed=1         # override any setting
    torchrun --nproc_per_node=8 train.py config/prosqa.py   # the same batch on eight GPUs

main() is the whole loop: examples -> batch -> loss -> optimizer -> validation -> next stage.
The losses are added up in nanococonut/training/step.py.
"""

import math
import shlex
import sys

import nanococonut  # isort: skip  # noqa: F401  # before torch: sets OpenMP's wait policy
import torch

from nanococonut import ops
from nanococonut.curriculum import Curriculum
from nanococonut.evaluation.accuracy import evaluate_splits
from nanococonut.inference.engine import Engine
from nanococonut.runtime.device import Interrupt, keep_freed_memory, select_precision
from nanococonut.runtime.distributed import Distributed, run_distributed
from nanococonut.runtime.graphs import GraphCache
from nanococonut.training.loader import TrainLoader
from nanococonut.training.log import RunLog, console, print_data, print_summary
from nanococonut.training.setup import init_model, init_optimizers, init_tokenizer, load_config
from nanococonut.training.state import Schedule, TrainState
from nanococonut.training.step import TrainStep
from nanococonut.weights.checkpoint import RunDir


def main() -> None:
    config, run_name, fallback_info = load_config(sys.argv[1:], __doc__)  # defaults < file < flags
    keep_freed_memory()
    dist = Distributed.from_env()  # one process unless torchrun started more
    device = dist.device(config.device)
    use_bf16 = select_precision(config.dtype, device)
    run = RunDir(config.out_dir or f"out/{run_name}", config, dist)  # never overwrites a run

    # ---- data: examples -> tokens; a worker thread prepares the next epoch
    data = run.load_data()  # refuses to resume on different examples
    tokenizer = init_tokenizer(config, data.train)
    curriculum = Curriculum.from_config(config)
    loader = TrainLoader(config, curriculum, tokenizer, data, dist)
    print_data(loader, data)

    # ---- model and optimizers
    torch.manual_seed(config.seed)
    model = init_model(config, tokenizer, run.manifest.get("model")).to(device)
    optimizers = init_optimizers(config, model)  # [AdamW] or [AdamW, Muon]
    kernels, kernels_reason = ops.choose_training_backend(config.kernels, model, use_bf16)
    use_graphs = ops.choose_graph(config.graph, model)
    graphs = GraphCache(64 if use_graphs else 0)
    train_step = TrainStep(model, kernels, use_bf16, graphs, config.thought_loss)
    # the stop classifier only observes the model, so its gradient must not affect clipping
    clipped = [p for name, p in model.named_parameters() if not name.startswith("stop.")]

    # ---- state: what a resumed run needs in addition to weights and moments
    schedule = Schedule(config, curriculum, loader.steps_per_epoch)
    state = TrainState.from_saved(run.restore(model, optimizers))
    if config.resume:
        schedule.check_epochs(run.manifest["config"]["epochs"], state)
        console.print(f"resuming {run.path} at step {state.step}", markup=False)
    log = RunLog(run, schedule, state)  # drops the lines of metrics.jsonl after state.step
    log.header(model, loader.n_examples, f"{kernels} ({kernels_reason})", use_graphs)
    interrupt = Interrupt(dist.world)
    stopping = False

    def save() -> None:
        manifest = {
            "tokenizer": tokenizer.spec,
            "n_thoughts": curriculum.n_thoughts(state.stage),
            "hub_commit": data.commit,
            "fell_back": fallback_info,
            "kernels": kernels,
            "graph": use_graphs,
            **state.manifest(),
        }
        # on a GPU, write the checkpoint in the background while training continues
        run.save(model, optimizers, state.step, manifest, background=device.type == "cuda")

    # ---- the loop: one iteration is one optimizer step
    model.train()
    with log:
        while state.step < schedule.max_steps and not stopping:
            stage = schedule.stage(state)
            if schedule.resets_optimizer(state):
                optimizers = init_optimizers(config, model)
            schedule.set_lr(optimizers, state.step)

            # forward and backward, accumulating gradients over the micro-batches
            step_batch = loader.get(state.step, stage, train_step.prepare)
            # dropout depends on the step and process only, so no random state has to be saved
            torch.manual_seed(dist.seed(config.seed * 1_000_003 + state.step))
            train_step.zero_grad()
            for micro_batch in step_batch.micro_batches:
                train_step(micro_batch)
            # the interrupt flag is reduced too, so that all processes stop after the same step
            totals, stopping = dist.all_reduce_gradients(
                model.parameters(), train_step.totals, interrupt.received
            )
            if config.grad_clip:
                torch.nn.utils.clip_grad_norm_(clipped, config.grad_clip)

            # optimizer step
            for optimizer in optimizers:
                optimizer.step()
            if device.type == "cuda" and state.step + 1 < schedule.max_steps:
                loader.prefetch(state.step + 1, stage, train_step.prepare)  # while the GPU is busy
            loss, n_correct, n_counted = totals.tolist()  # on one GPU, the only sync of a step
            if not math.isfinite(loss):
                raise run.diverged("loss", state.step)
            state.advance(stage, n_correct, n_counted)
            log.step(state, loss, step_batch.n_examples)
            run.end_save(wait=False)  # raises if a background save failed

            # validate at the end of each stage, and every eval_interval steps of the last stage
            is_last = schedule.is_last_stage(state)
            stage_done = schedule.stage_done(state)  # out of epochs, or accurate enough
            if schedule.eval_due(state, stage_done):
                with train_step.autocast():
                    engine = Engine.from_config(
                        model, tokenizer, config, kernels="torch", graph="off"
                    )
                    scores = evaluate_splits(engine, loader.val_splits, stage, dist)
                n_thoughts = curriculum.n_thoughts(stage)
                log.validation(state, state.record(scores, n_thoughts, is_last, stage_done))
            if stage_done and not is_last:
                state.next_stage()  # before saving: a resumed run starts in the next stage
            if state.step % config.save_interval == 0 or state.is_best:
                save()

    # ---- save, and report
    save()
    loader.close()
    run.close()
    interrupt.close()
    if stopping:
        print(f"stopped at step {state.step}, saved in {run.path}; continue with --resume")
        sys.exit(interrupt.exit_code)
    print_summary(run_name, schedule, state, loader.val_splits)
    print(f"try it: python sample.py --out_dir {shlex.quote(str(run.path))}")


if __name__ == "__main__":
    run_distributed(main)
