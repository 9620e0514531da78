#!/usr/bin/env bash
# Every row that needs a GPU, in one call of under nine minutes: bash bench/gpu_suite.sh [FOLDER]
# Rows and logs go to FOLDER (default bench/results/gpu); copy what is worth keeping.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/gpu}
mkdir -p "$out"
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "error: torch sees no CUDA GPU. Run this on a machine that has one." >&2
  exit 2
}
failed=0
run() { echo "== $*"; timeout "$1" "${@:2}" || { echo "failed: ${*:2}"; failed=1; }; }

run 120 python -m pytest -q -m gpu
for size in "config/prosqa_small.py" "config/prosqa_scratch.py"; do
  for dtype in float32 bfloat16; do
    run 30 python bench/training.py --config="$size" --batch_size=64 --device=cuda \
      --dtype="$dtype" --out="$out/training.jsonl"
  done
done
run 200 python train.py config/prosqa_small.py --device=cuda --out_dir="$out/prosqa_small" \
  > "$out/train.log" 2>&1
for split in prosqa prosqa_matched; do
  run 30 python bench/accuracy.py --checkpoint="$out/prosqa_small" --data="$split" --device=cuda \
    --out="$out/accuracy.jsonl"
done
exit $failed
