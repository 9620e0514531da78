#!/usr/bin/env bash
# Every row that needs a GPU, in one call of at most nine minutes: bash bench/gpu_suite.sh [FOLDER]
# What only checks (compute-sanitizer, loss curves, drift), in another: ... gpu_suite.sh FOLDER checks
# Rows and logs go to FOLDER (default bench/results/gpu); copy what is worth keeping. A part that
# fails or runs out of its time does not end the others. With NANOCOCONUT_RELEASED (a clone of
# facebookresearch/coconut) and NANOCOCONUT_RELEASED_PYTHON the released code is measured too.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu}
mkdir -p "$out"
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "error: torch sees no CUDA GPU. Run this on a machine that has one." >&2
  exit 2
}
failed=0
# run SECONDS NAME COMMAND...: shown, and kept in FOLDER/NAME.log
run() {
  echo "== ${*:3}"
  timeout "$1" "${@:3}" 2>&1 | tee "$out/$2.log" || { echo "failed: ${*:3}"; failed=1; }
}

if [ "${2:-}" = checks ]; then  # the limits' sum is 530 s
  # without torch's cache: in it, a read behind a tensor's end lies within a block
  small=(tests/kernels/test_append.py tests/kernels/test_prefix_attention.py -k
    "(gradient or append) and not 31 and not bfloat16 and not float16")
  for tool in memcheck racecheck; do
    if command -v compute-sanitizer > /dev/null; then
      run 150 "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 1 python -m pytest -q -x -m gpu "${small[@]}"
    else
      echo "no compute-sanitizer here: $tool not run"
    fi
  done
  run 30 drift python bench/drift.py --out="$out/drift.jsonl"
  run 200 loss python bench/loss.py --out="$out/loss.jsonl"
  exit $failed
fi

# the limits' sum is 540 s, with the tests' 110
released=()
if [ -n "${NANOCOCONUT_RELEASED:-}" ] && [ -n "${NANOCOCONUT_RELEASED_PYTHON:-}" ]; then
  released=("--released=$NANOCOCONUT_RELEASED" "--released_python=$NANOCOCONUT_RELEASED_PYTHON")
fi
# tests compile some hundred kernels, each on one core: file beside file
names=() pids=()
for file in tests/test_*.py tests/kernels/test_*.py; do
  if grep -qE "mark\.gpu|device" "$file"; then
    name=$(basename "$file" .py)
    timeout -s INT 110 python -m pytest -q -m "gpu and not slow" "$file" > "$out/$name.log" 2>&1 &
    names+=("$name") pids+=($!)
  fi
done
for i in "${!pids[@]}"; do
  wait "${pids[$i]}"
  code=$?
  echo "${names[$i]}: $(tail -n 1 "$out/${names[$i]}.log")"
  [ $code = 0 ] || [ $code = 5 ] || failed=1  # 5: it has no such tests
done
run 160 latency python bench/latency.py --checkpoint=random "${released[@]}" \
  --out="$out/latency.jsonl"
run 45 kernels python bench/kernels.py --out="$out/kernels.jsonl"
run 45 throughput python bench/throughput.py --checkpoint=random \
  --out="$out/throughput.jsonl"
for dtype in float32 bfloat16; do
  run 40 "training_$dtype" python bench/training.py --config=config/prosqa_scratch.py \
    --batch_size=64 --device=cuda --dtype="$dtype" --out="$out/training.jsonl"
done
run 80 train python train.py config/prosqa_small.py --device=cuda --out_dir="$out/prosqa_small"
run 20 accuracy python bench/accuracy.py --checkpoint="$out/prosqa_small" --device=cuda \
  --out="$out/accuracy.jsonl"
exit $failed
