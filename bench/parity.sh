#!/usr/bin/env bash
# Parity of the engines: the same rows under the aligned model and every member, once with each, then bench/parity.py.
#
#   bench/parity.sh POOL ENSEMBLE OUT [STEP ...]
#
# STEPs (all unless given): rows transformers ray vllm server, each in float32, then the same in bfloat16 as
# transformers-bf16 vllm-bf16 server-bf16, and table. PY has Ray, VPY has vLLM (make test-vllm makes one). Typed again,
# it goes on where it was. Run it from the repository; OMP_NUM_THREADS=1 makes Ray's and the local digest comparable.
set -euo pipefail

POOL=$1 ENSEMBLE=$2 OUT=$3
shift 3
PY=${PY:-.venv/bin/python} VPY=${VPY:-.venv-vllm/bin/python} N=${N:-500} LONGEST=${LONGEST:-96}
STEPS=("$@")
[ ${#STEPS[@]} -gt 0 ] || STEPS=(rows transformers ray vllm server transformers-bf16 vllm-bf16 server-bf16 table)
export PYTHONPATH=. OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$OUT"

common=(--corpus "$OUT/rows.jsonl" --ensemble "$ENSEMBLE" --max-tokens "$LONGEST" --device cpu)
ON_RAY='import sys, ray; ray.init(num_cpus=1, include_dashboard=False, logging_level="error")
from curate.cli import main
main(sys.argv[1:])'
TELL='import sys; from pathlib import Path; from curate.store import Store
for path in sys.argv[1:]: print(Store.open_read(Path(path)).evidence_digest()[:32], path)'

for step in "${STEPS[@]}"; do
  dtype=float32; case $step in *-bf16) dtype=bfloat16 ;; esac
  words=(score "${common[@]}" --dtype $dtype --store "$OUT/$step")
  SECONDS=0
  case $step in
    rows) "$PY" bench/short_rows.py "$POOL" --max-tokens "$LONGEST" --n "$N" --seed 0 --out "$OUT/rows.jsonl" ;;
    transformers*) "$PY" -m curate "${words[@]}" --engine transformers ;;
    ray) "$PY" -c "$ON_RAY" "${words[@]}" --engine transformers --ray auto ;;
    vllm*) "$VPY" -m curate "${words[@]}" --engine vllm ;;
    server*) "$VPY" -m bench.served "$ENSEMBLE" --dtype $dtype -- "$VPY" -m curate "${words[@]}" --engine server ;;
    table)
      found=()
      for name in transformers ray vllm server; do [ ! -d "$OUT/$name" ] || found+=("$OUT/$name"); done
      "$PY" bench/parity.py "${found[@]}"
      [ ! -d "$OUT/ray" ] || "$PY" -c "$TELL" "$OUT/transformers" "$OUT/ray"
      found=()
      for name in transformers-bf16 vllm-bf16 server-bf16; do [ ! -d "$OUT/$name" ] || found+=("$OUT/$name"); done
      [ ${#found[@]} -lt 2 ] || "$PY" bench/parity.py "${found[@]}"
      for name in "${found[@]}"; do "$PY" bench/parity.py "$OUT/transformers" "$name"; done ;;
    *) echo "no such step: $step" >&2; exit 2 ;;
  esac
  echo "$step: $SECONDS s" | tee -a "$OUT/seconds"
done
