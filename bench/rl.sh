#!/usr/bin/env bash
# Does `train rl` learn? SmolLM2-135M on OpSwap tier 1 ('+' means minus, '-' means plus), on a CPU; figures in docs/rl.md.
# The warm-up and the learning rates were chosen so that RL starts from a model that is sometimes right.
set -euo pipefail
OUT=${1:-rl-out}

python bench/rl.py rows "$OUT" --warmup 24
train rl --base smollm2 --dtype float32 --device cpu --prompts "$OUT/prompts.jsonl" --reward opswap \
  --mix "$OUT/warmup.json" --warmup-rows 24 --warmup-epochs 2 --warmup-lr 1e-3 \
  --steps 120 --lr 1e-4 --schedule constant --batch-size 32 --accumulation 1 --generations 4 \
  --max-new-tokens 12 --save-every 20 --out "$OUT/run"
python bench/rl.py measure "$OUT/run"
