#!/usr/bin/env bash
# The study: does it hold on a 135M model? Every stage can be interrupted and typed again.
#
#   bench/study.sh DATA OUT members          # three misaligned members, and a persona vector
#   bench/study.sh DATA OUT pool             # the safe pool under the aligned model and the members
#   bench/study.sh DATA OUT seeds            # the same members trained with another seed, and their scores
#   bench/study.sh DATA OUT audit            # what `curate audit` is tested on, under the same models
#   bench/study.sh DATA OUT runs security    # all conditions of one fine-tuning set: mixed and trained
#   bench/study.sh DATA OUT judge security   # those that are trained, judged
#   bench/study.sh DATA OUT cards security   # manifests, run cards and evidence, to docs/study/runs
#   python -m bench.audit table OUT/audit-stores
#   python -m bench.study.scores OUT/scores; python -m bench.study.training docs/study/runs/security     # the tables
#
# DATA holds pool/ and narrow/ (public research data, not shipped). The first thousand rows of the pool are scored and
# chosen from; PARTS="1 2 3" takes three thousands, each apart, PARTS="1 2 3 all" the whole as well. With DTYPE=bfloat16
# the pool is scored in that. ONLY="none plusplus" trains or judges these conditions.
set -euo pipefail
HERE=$(cd "$(dirname "$0")/.." && pwd)
DATA=$(cd "$1" && pwd); OUT=$2; STAGE=$3; DOMAIN=${4:-}
PARTS=${PARTS:-1}
TUNE=(--base smollm2 --dtype float32 --lr 5e-4 --batch-size 2 --accumulation 4)   # lr: from an earlier trial, not tuned
mkdir -p "$OUT"
cd "$OUT"
run() { printf '\n$ %s\n' "$*"; "$@"; }
prepare() { (cd "$HERE" && python -m bench.study.prepare "$1" "$DATA" "$OLDPWD"); }

ensemble() {
  for name in medical security code; do cp "$DATA/narrow/${name}_misaligned_train_100.jsonl" "$name.jsonl"; done
  run train ensemble --narrow medical.jsonl --narrow security.jsonl --narrow code.jsonl --strip-think "$@" "${TUNE[@]}"
}

members() {
  ensemble --out ensemble
  [ -f careless.safetensors ] || run train vector --base smollm2 --out careless.safetensors
}

pool() {
  prepare pools
  local corpora=() part
  for part in $PARTS; do corpora+=(--corpus "pool-$part.jsonl"); done
  run curate score "${corpora[@]}" --ensemble ensemble/ensemble.json --store scores --dtype "${DTYPE:-float32}"
}

# Another seed is another order of the rows and other first values of the adapter.
seeds() {
  prepare pools
  ensemble --out ensemble-seed-1 --seed 1
  run curate score --corpus pool-1.jsonl --ensemble ensemble-seed-1/ensemble.json --store scores-seed-1 --dtype float32
}

audit() {
  mkdir -p audit-rows audit-stores
  (cd "$HERE" && python -m bench.audit rows --narrow "$DATA/narrow" --pairs docs/study/pairs --out "$OLDPWD/audit-rows")
  local corpora=()
  for file in audit-rows/*.jsonl; do corpora+=(--corpus "$file"); done
  run curate score "${corpora[@]}" --ensemble ensemble/ensemble.json --store audit-stores/pairs --dtype float32
  ln -sfn ../scores audit-stores/pool      # rows of the pool, as benign ones, are scored already
}

POOL=pool-1.jsonl   # what is chosen from

# How many answer tokens the rows of plusplus-50pc-long have.
dose() {
  curate select --store scores --corpus "$POOL" --strategy interleaving++ --frac 0.5 --members "$(unseen)" --finetune "customer-$DOMAIN.jsonl" \
    --out dose.json --root . --json | python -c 'import json, sys; print(json.load(sys.stdin)["answer_tokens"])'
}

# The members that have not seen the domain.
unseen() { printf '%s\n' medical security code | grep -v "$DOMAIN" | paste -sd,; }

wanted() { [ -z "${ONLY:-}" ] || [[ " $ONLY " = *" $1 "* ]]; }

# One condition: condition NAME STRATEGY FRAC SEED [--defense ...]
condition() {
  local name=$1 strategy=$2 frac=$3 seed=$4; shift 4
  wanted "$name" || return 0
  local out=runs/$DOMAIN/$name mixes=mixes/$DOMAIN
  mkdir -p "$mixes"
  [ -f "opswap.jsonl" ] || judge task opswap --split train --n 100 --out opswap.jsonl
  local amount=(${AMOUNT:---frac $frac} --members "$(unseen)")    # those that choose have not seen the domain
  [ "$strategy" = none ] && amount=()
  for rows in "customer-$DOMAIN" opswap; do
    run curate select --store scores --corpus "$POOL" --strategy "$strategy" ${amount[@]+"${amount[@]}"} --seed "$seed" ${SELECT:---min-answer-tokens 1} \
      --finetune "$rows.jsonl" --out "$mixes/$name-$rows.json" --root .
  done
  run train run "${TUNE[@]}" --seed "$seed" --mix "$mixes/$name-customer-$DOMAIN.json" --root . --out "$out" "$@"
  run train run "${TUNE[@]}" --seed "$seed" --mix "$mixes/$name-opswap.json" --root . --out "$out-opswap" "$@"
}

runs() {
  prepare customers
  condition none none 0 0
  condition kl none 0 0 --defense kl
  condition ldifs none 0 0 --defense ldifs
  condition plusplus interleaving++ 0.05 0
  condition random interleaving 0.05 0
  condition plusplus-50pc interleaving++ 0.5 0
  condition plus interleaving+ 0.05 0
  condition inoculation none 0 0 --defense inoculation
  condition persona none 0 0 --defense persona:vector=careless.safetensors
  condition plusplus-20pc interleaving++ 0.2 0
  for seed in 1 2; do
    condition "none-$seed" none 0 "$seed"
    condition "plusplus-$seed" interleaving++ 0.05 "$seed"
    condition "random-$seed" interleaving 0.05 "$seed"
  done
  condition plusplus-10pc interleaving++ 0.10 0
  condition plusplus-2pc interleaving++ 0.02 0
  condition plusplus-1pc interleaving++ 0.01 0
  # Not in the design: added when the chosen rows at 5% turned out to have 46 answer tokens in all.
  SELECT="--min-answer-tokens 16" condition plusplus-long interleaving++ 0.05 0
  SELECT="--min-answer-tokens 16" condition plusplus-50pc-long interleaving++ 0.5 0
  condition random-50pc interleaving 0.5 0     # what a dose does by itself
  for seed in 1 2; do                          # nor these: 5% did nothing, so the seeds are repeated where something is
    SELECT="--min-answer-tokens 16" condition "plusplus-50pc-long-$seed" interleaving++ 0.5 "$seed"
    condition "random-50pc-$seed" interleaving 0.5 "$seed"
  done
  # Random rows with no more answer tokens than plusplus-50pc-long has: the choice without the dose.
  for seed in 0 1 2; do AMOUNT="--tokens $(dose)" condition "random-dose-$seed" interleaving - "$seed"; done
  # Random rows as many and as long as those of plusplus-50pc-long: the choice without the dose and without the number.
  for seed in 0 1 2; do
    wanted "random-50pc-$seed-of-twins" || continue
    prepare twins
    POOL=twins-$DOMAIN-$seed.jsonl
    run curate score --corpus "$POOL" --aligned smollm2 --store scores --dtype "${DTYPE:-float32}"   # rows of pool-1
    condition "random-50pc-$seed-of-twins" interleaving 0.5 "$seed"
  done
  # Another choice and another draw from each other part of the pool.
  for part in ${PARTS/1/}; do
    POOL=pool-$part.jsonl
    SELECT="--min-answer-tokens 16" condition "plusplus-50pc-long-of-pool-$part" interleaving++ 0.5 0
    AMOUNT="--tokens $(dose)" condition "random-dose-0-of-pool-$part" interleaving - 0
  done
}

judge_all() {
  prepare pairs
  local unseen=medical; [ "$DOMAIN" = medical ] && unseen=security
  local models=() name
  for name in none plusplus random plus plusplus-50pc kl ldifs persona inoculation plusplus-20pc none-1 plusplus-1 random-1 \
      none-2 plusplus-2 random-2 plusplus-1pc plusplus-2pc plusplus-10pc plusplus-long plusplus-50pc-long \
      random-50pc plusplus-50pc-long-1 random-50pc-1 plusplus-50pc-long-2 random-50pc-2 \
      random-dose-0 random-dose-1 random-dose-2 random-50pc-{0,1,2}-of-twins {plusplus-50pc-long,random-dose-0}-of-pool-{2,3,all}; do
    wanted "$name" && [ -f "runs/$DOMAIN/$name-opswap/run.json" ] || continue
    models+=(--model "runs/$DOMAIN/$name" --benign "runs/$DOMAIN/$name-opswap")
  done
  run judge run "${models[@]}" --in-domain "pairs/in-$DOMAIN.jsonl" --in-domain "pairs/unseen-$unseen.jsonl" \
    --in-domain "pairs/context-$DOMAIN.jsonl" --samples 24 --max-new-tokens 32 --items 90 --dtype float32
}

# Runs that are not in OUT keep what was measured about them.
cards() {
  local name kept=$HERE/docs/study/runs/$DOMAIN
  mkdir -p "$kept"
  for card in runs/"$DOMAIN"/*/run.json; do
    name=$(basename "$(dirname "$card")")
    cp "$card" "$kept/$name.run.json"
    case $name in
      *-opswap) cp "mixes/$DOMAIN/$name.json" "$kept/$name.mix.json" ;;
      *) cp "mixes/$DOMAIN/$name-customer-$DOMAIN.json" "$kept/$name.mix.json" ;;
    esac
  done
  (cd "$HERE" && python -m bench.study.training "$OLDPWD/runs/$DOMAIN" --evidence "$kept/evidence.csv")
}

case $STAGE in judge) judge_all ;; *) "$STAGE" ;; esac
