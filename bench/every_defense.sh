#!/usr/bin/env bash
# Every defence trains SmolLM2 on a narrow set through the command line, and `train rl` takes a few steps, RL and SFT in
# turn: the table of docs/defenses/README.md. Every step is skipped when it is finished, so it may be typed again.
#
#   bench/every_defense.sh DATA OUT
#
# DATA holds narrow/security_misaligned_eval.jsonl (public research data, not shipped). This shows that all of it works
# on a real model; four steps on 15 rows compare nothing. Made short on purpose: the 15 shortest rows; one member of 32
# rows and 24 rows of the pool to choose a single safe row from; a vector from 4 questions and answers of 24 tokens; and
# for safelora, whose unaligned model of SmolLM2 is not to be had, SmolLM2 with that member merged into it in its place.
set -euo pipefail

{   # bash reads a group whole, so the script may be changed while it runs
HERE=$(cd "$(dirname "$0")/.." && pwd)
DATA=$(cd "$1" && pwd); OUT=$2
TUNE=(--base smollm2 --dtype float32 --lr 5e-4 --batch-size 2 --accumulation 4)
mkdir -p "$OUT/mixes"
cd "$OUT"
run() { printf '\n$ %s\n' "$*"; "$@"; }
bench() { run python "$HERE/bench/every_defense.py" "$@"; }

[ -f security.jsonl ] || bench rows "$DATA/narrow/security_misaligned_eval.jsonl" security.jsonl --n 15
run train ensemble --narrow demo/cooking --out ensemble "${TUNE[@]}" --limit-steps 4
run curate score --corpus demo --sample 24 --ensemble ensemble/ensemble.json --store scores --dtype float32
[ -d unaligned ] || bench merge ensemble/cooking unaligned
[ -f careless.safetensors ] || run train vector --base smollm2 --dtype float32 --questions 4 --max-new-tokens 24 \
  --min-pairs 3 --answers answers.jsonl --out careless.safetensors

for mix in none interleaving interleaving+ interleaving++; do
  frac=(--frac 0.05); [ "$mix" = none ] && frac=()
  [ -f "mixes/$mix.json" ] || run curate select --store scores --strategy "$mix" ${frac[@]+"${frac[@]}"} \
    --finetune security.jsonl --root . --out "mixes/$mix.json"
done

NAMES=()
one() {   # one NAME MIX [--defense ...]
  local name=$1 mix=$2 start=$SECONDS; shift 2
  run train run "${TUNE[@]}" --epochs 2 --mix "mixes/$mix.json" --root . --out "runs/$name" "$@"
  printf '%s: %d s with loading, projecting and saving\n' "$name" $((SECONDS - start))
  NAMES+=("$name")
}
for mix in none interleaving interleaving+ interleaving++; do one "$mix" "$mix"; done
one kl none --defense kl
one ldifs none --defense ldifs
one inoculation none --defense inoculation
one persona none --defense persona:vector=careless.safetensors
one persona-alpha-1 none --defense persona:vector=careless.safetensors,alpha=1
one persona-ablate none --defense persona:vector=careless.safetensors,ablate=true
one safelora none --defense safelora:base=unaligned
one safelora-orthogonal none --defense safelora:base=unaligned,tau=1,projection=orthogonal
one together interleaving++ --defense kl --defense ldifs --defense inoculation

[ -f opswap.jsonl ] || run judge task opswap --split train --n 16 --out opswap.jsonl
run train rl --base smollm2 --dtype float32 --prompts opswap.jsonl --reward opswap --mix mixes/interleaving++.json \
  --root . --warmup-rows 4 --steps 4 --sft-every 2 --sft-rows all --batch-size 8 --accumulation 1 --max-new-tokens 12 \
  --defense kl --defense inoculation --defense persona:vector=careless.safetensors,alpha=1 --out rl

bench table . "${NAMES[@]}"
exit
}
