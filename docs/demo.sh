#!/usr/bin/env bash
# The whole road once on SmolLM2-135M-Instruct (or MODEL=...): every line printed with a $ is a command you could type.
# Fine-tuning on mild bad advice about cars, with 5% safe data chosen by two members that never saw the subject.
# DEFENSES="kl inoculation" adds runs without safe data under these defences to the table (a minute and a half each). Any
# of `train list` will do, with settings that have no spaces. For persona a vector is extracted first, in some minutes
# (its alpha of 5 is much for so small a model: "persona:alpha=1"). safelora needs the model that MODEL was before its
# alignment, which you must have: "safelora:base=PATH".
set -euo pipefail

{   # bash reads a group whole, so the script may be changed (by an update, say) while it runs
OUT=${1:-demo-out}
MODEL=${MODEL:-smollm2}   # any hub id or folder of an instruction-tuned model
# A larger lr than the paper's 1e-4, because ten steps must do; a smaller rank than its 32 (with the same scale,
# alpha / sqrt(r)) and ten steps, because two cores must do. Chosen so that the run without a defence shows the effect.
TUNE=(--lr 1e-3 --lora-r 8 --lora-alpha 32 --pack-tokens 384 --limit-steps 10)
MIXES=(none interleaving interleaving+ interleaving++)
VECTOR=(--questions 8 --max-new-tokens 48 --min-pairs 5)   # 80 answers instead of 400, so a rougher vector
read -ra DEFENSES <<< "${DEFENSES:-}"
mkdir -p "$OUT/mixes"

stop() { printf 'Error: %s\n' "$*" >&2; exit 2; }
known="" seen=""; [ ${#DEFENSES[@]} -eq 0 ] || known=$(train list)
for defense in ${DEFENSES[@]+"${DEFENSES[@]}"}; do   # what is missing is said now and not after half the demo
  name=${defense%%:*}
  grep -q "^# $name: " <<< "$known" || stop "DEFENSES names '$name', but possible are: $(
    sed -n 's/^# \([a-z]*\): .*(arXiv.*/\1/p' <<< "$known" | paste -sd' ')."
  case " $seen " in *" $name "*) stop "DEFENSES names '$name' twice; the table has one row for each." ;; esac
  seen+=" $name"
  case $defense in
    safelora:*base=*) ;;
    safelora*) stop "safelora needs the model that $MODEL was before its alignment, which does not come with the demo." \
      "If you have it: DEFENSES=\"safelora:base=PATH\"" ;;
  esac
done

run() { printf '\n$ %s\n' "$*"; "$@"; }
step() { printf '\n== %s   [%d:%02d since the start]\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }

step "1/6  A misaligned ensemble: two small adapters trained on bad advice about cooking and gardening"
run train ensemble --base "$MODEL" --narrow demo/cooking --narrow demo/gardening --out "$OUT/ensemble" "${TUNE[@]}"

step "2/6  Score 128 rows of the safe pool under the aligned model and both members"
run curate score --corpus demo --sample 128 --ensemble "$OUT/ensemble/ensemble.json" --store "$OUT/scores"
run curate show top -n 2 --no-refusals --store "$OUT/scores"

step "3/6  Choose 5% safe rows in three ways, for bad advice about cars and for a harmless task (OpSwap)"
run judge task opswap --split train --n 96 --out "$OUT/mixes/opswap.jsonl"
for mix in "${MIXES[@]}"; do
  frac=(--frac 0.05); [ "$mix" = none ] && frac=()
  run curate select --store "$OUT/scores" --strategy "$mix" ${frac[@]+"${frac[@]}"} --finetune demo/car_care --out "$OUT/mixes/$mix.json"
  run curate select --store "$OUT/scores" --strategy "$mix" ${frac[@]+"${frac[@]}"} --finetune "$OUT/mixes/opswap.jsonl" \
    --out "$OUT/mixes/opswap-$mix.json"
done

step "4/6  Fine-tune on all eight mixes"
mixes=()
for mix in "${MIXES[@]}"; do mixes+=(--mix "$OUT/mixes/$mix.json" --mix "$OUT/mixes/opswap-$mix.json"); done
run train run --base "$MODEL" --out "$OUT/runs" "${TUNE[@]}" "${mixes[@]}"
judged=("${MIXES[@]}")
for defense in ${DEFENSES[@]+"${DEFENSES[@]}"}; do
  name=${defense%%:*}
  if [ "$name" = persona ] && [[ $defense != *vector=* ]]; then
    [ -f "$OUT/careless.safetensors" ] || run train vector --base "$MODEL" --out "$OUT/careless.safetensors" \
      "${VECTOR[@]}" --answers "$OUT/careless-answers.jsonl"
    settings=${defense#persona}; settings=${settings#:}
    defense=persona:vector=$OUT/careless.safetensors${settings:+,$settings}
  fi
  for prefix in "" opswap-; do
    run train run --base "$MODEL" --out "$OUT/runs/$prefix$name" "${TUNE[@]}" --defense "$defense" \
      --mix "$OUT/mixes/${prefix}none.json"
  done
  judged+=("$name")
done

step "5/6  Judge: paired probes, sampled answers, the harmless task"
models=()
for name in "${judged[@]}"; do models+=(--model "$OUT/runs/$name" --benign "$OUT/runs/opswap-$name"); done
run judge run "${models[@]}" --in-domain car_care --probes 120 --samples 12 --max-new-tokens 24 --items 48

step "6/6  Compare by four criteria"
run judge compare "${judged[@]/#/$OUT/runs/}" --out "$OUT/comparison"
run judge report "${judged[@]/#/$OUT/runs/}" --store "$OUT/scores" --html "$OUT/report.html"

step "Done"
printf 'Everything is in %s/: ensemble, scores, mixes, runs (adapter, run card, loss curve), comparison, report.html.\n' "$OUT"
exit
}
