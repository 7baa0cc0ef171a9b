#!/usr/bin/env bash
# Does `train rl` learn? SmolLM2-135M on OpSwap tier 1 ('+' means minus, '-' means plus), on a CPU; figures in docs/rl.md.
# From the paper: adapter, generations, temperature, top-p. Not from it: the learning rates and the short warm-up, chosen
# so that RL starts from a model that is sometimes right and a hundred steps of 16 completions are enough to see.
set -euo pipefail
OUT=${1:-rl-out}

python bench/rl.py rows "$OUT" --warmup 24
train rl --base smollm2 --dtype float32 --device cpu --prompts "$OUT/prompts.jsonl" --reward opswap \
  --mix "$OUT/warmup.json" --warmup-rows 24 --warmup-epochs 2 --warmup-lr 1e-3 \
  --steps 100 --lr 3e-5 --schedule constant --batch-size 16 --accumulation 1 --max-new-tokens 10 \
  --save-every 5 --out "$OUT/run"
python bench/rl.py measure "$OUT/run"
