#!/usr/bin/env bash
# Run everything that needs a GPU, in one call of at most nine minutes (ten with the released code):
#   bash bench/gpu_suite.sh FOLDER
#   bash bench/gpu_suite.sh FOLDER tests latency kernels throughput training train  # some parts
#   bash bench/gpu_suite.sh FOLDER checks  # compute-sanitizer and losses: slow, only on request
# Results and logs go to FOLDER, and as gpu.tgz to $OUT if that is set. If a part fails or runs out
# of time, the others still run. With NANOCOCONUT_RELEASED (a clone of facebookresearch/coconut) and
# NANOCOCONUT_RELEASED_PYTHON the released code is timed too. Needs a commit (git, or
# NANOCOCONUT_COMMIT) and, for "training", GPT-2's vocabulary (TIKTOKEN_CACHE_DIR).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 # a run that is killed keeps its output
dir=${1:-out/gpu}
if [[ -e "$dir/run" || "$(realpath -m "$dir")/" = "$(realpath -m "${OUT:-/nowhere}")/"* ]]; then
  echo "error: $dir holds an earlier run, or is in \$OUT. Give another folder." >&2
  exit 2
fi
mkdir -p "$dir"
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "error: $PYTHON has no torch with a CUDA GPU. Run this on a GPU, or set PYTHON." >&2
  exit 2
}
git rev-parse -q --verify HEAD > /dev/null 2>&1 || [ -n "${NANOCOCONUT_COMMIT:-}" ] || {
  echo "error: the commit is unknown (no git repository?). Set NANOCOCONUT_COMMIT, which every result records." >&2
  exit 2
}
parts=" ${*:2} "
has() { [[ "$parts" = "  " || "$parts" = *" $1 "* ]]; }
! has training || "$PYTHON" -c 'from nanococonut.tokenizer import Tokenizer; Tokenizer.gpt2()' || {
  echo "error: \"training\" needs GPT-2's vocabulary. Set TIKTOKEN_CACHE_DIR, or name the parts." >&2
  exit 2
}
failed=0
pack() { [ -z "${OUT:-}" ] || tar czf "$OUT/gpu.tgz" -C "$dir" --exclude='*.safetensors' .; }
# run SECONDS NAME COMMAND...: run with a time limit, and copy the output to FOLDER/NAME.log
run() {
  echo "== ${*:3}"
  timeout -k 20 "$1" "${@:3}" 2>&1 | tee "$dir/$2.log" || { echo "failed: ${*:3}"; failed=1; }
  pack # after every part, in case the machine's time limit ends this script
}
# print all results again, the main ones last, as only the end of a long output may be kept
finish() {
  pack
  cd "$dir" && grep -shE '^ *[0-9.,e+-]+(%| (us|ms|x|GB/s|questions/s|examples/s)) ' \
    losses.log kernels.log throughput.log accuracy.log train*.log latency.log
  exit $failed
}

if [[ "$parts" = *" checks "* ]]; then # at most 500 s
  # without torch's caching allocator, which hides reads past the end of a tensor
  tests=(tests/kernels/test_{append,latent_attention,prefix_attention}.py -m gpu -q -x -k
    "(query_and_slots or output_matches or gradients_match) and (dtype0 or float32)")
  for tool in memcheck racecheck; do
    run 150 $tool env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool \
      --error-exitcode 1 "$PYTHON" -m pytest "${tests[@]}"
  done
  run 200 losses "$PYTHON" -m pytest -q -s -m "slow and gpu" tests/training/test_precision.py
  finish
fi

# at most 540 s (580 with the released code). The tests compile hundreds of kernels, one core each,
# so their files run in parallel
files=(tests/kernels/test_{append,feedback,latent_attention,prefix_attention,linear}.py
  tests/kernels/test_linear_cross_entropy.py tests/inference/test_gpu.py
  tests/core/test_{coconut,ops}.py tests/bench/test_kernels.py tests/training/test_precision.py)
pids=()
if has tests; then
  for file in "${files[@]}"; do
    log="$dir/$(basename "$file" .py).log"
    timeout -k 5 -s INT 110 "$PYTHON" -m pytest -q -m "gpu and not slow" "$file" > "$log" 2>&1 &
    pids+=($!)
  done
fi
for i in "${!pids[@]}"; do
  wait "${pids[$i]}" || failed=1
  echo "${files[$i]}: $(tail -n 1 "$dir/$(basename "${files[$i]}" .py).log")"
done
released=()
if [ -n "${NANOCOCONUT_RELEASED:-}" ] && [ -n "${NANOCOCONUT_RELEASED_PYTHON:-}" ]; then
  released=("--released=$NANOCOCONUT_RELEASED" "--released_python=$NANOCOCONUT_RELEASED_PYTHON")
fi
has latency &&
  run 90 latency "$PYTHON" bench/latency.py --contexts=400 "${released[@]}" \
    --out="$dir/latency.jsonl"
has kernels && run 60 kernels "$PYTHON" bench/kernels.py --out="$dir/kernels.jsonl"
has throughput && run 50 throughput "$PYTHON" bench/throughput.py --out="$dir/throughput.jsonl"
if has training; then
  run 40 "training GPT-2" "$PYTHON" bench/training.py --config=config/prosqa.py --batch_size=128 \
    --device=cuda --dtype=bfloat16 --out="$dir/training.jsonl"
  run 30 "training small" "$PYTHON" bench/training.py --config=config/prosqa_scratch.py \
    --batch_size=64 --device=cuda --dtype=bfloat16 --out="$dir/training.jsonl"
  [ ${#released[@]} = 0 ] || run 40 "training released" "$PYTHON" bench/training.py \
    --config=config/prosqa.py --device=cuda "${released[@]}" --out="$dir/training.jsonl"
fi
if has train; then # a run that is stopped saves a checkpoint
  run 140 train "$PYTHON" train.py config/prosqa_scratch.py --epochs=18 --device=cuda \
    --out_dir="$dir/run" # the config's 24 epochs may not fit into the time
  ls "$dir"/run/step_* > /dev/null && run 20 accuracy "$PYTHON" bench/accuracy.py \
    --checkpoint="$dir/run" --out="$dir/accuracy.jsonl"
fi
finish
