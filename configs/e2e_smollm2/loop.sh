#!/usr/bin/env bash
# Trains and scores every row of the table: configs/e2e_smollm2/loop.sh DIR/smollm2 DIR/e2e
# What is finished is skipped, what was stopped goes on. JOBS=4 runs four at a time, PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
export BASE=$1 DATA=$2 OUT=${OUT:-out/e2e} RESULTS=${RESULTS:-results/e2e.jsonl} PYTHON=${PYTHON:-.venv/bin/python}
export BEGAN=$(date +%s)
jobs=${ROWS:-$(for seed in 1 2 3; do
  for config in configs/e2e_smollm2/*.toml; do
    row=$(basename "$config" .toml)
    case $row-$seed in *-1 | ft-* | lora-*) echo "$row-$seed" ;; esac
  done
done)}
mkdir -p "$OUT"

one() {
  row=${1%-*} seed=${1##*-} run=$OUT/$1
  if [ ! -f "$run/metrics.json" ]; then
    if [ -f "$run/state.pt" ]; then "$PYTHON" train.py --resume "$run"
    else "$PYTHON" train.py "configs/e2e_smollm2/$row.toml" --seed "$seed" --base "$BASE" --data "$DATA" --out_dir "$run"
    fi >> "$run.txt" 2>&1 || { echo "$1: stopped; $run.txt says why" >&2; return 1; }
  fi
  if [ ! -f "$run/scores.json" ]; then
    "$PYTHON" evaluate.py "$run" --beams 10 --length_penalty 0.8 --no_repeat_ngram 4 --results "$RESULTS" >> "$run.txt" 2>&1
  fi
}

progress() {
  finished=$(find "$OUT" -name scores.json | wc -l)
  left=$((($(date +%s) - BEGAN + 59) * (TOTAL - finished) / (finished - BEFORE) / 60))
  echo "$finished of $TOTAL rows are done; about $left minutes left"
}

export -f one progress
TOTAL=$(wc -w <<< "$jobs") BEFORE=$(find "$OUT" -name scores.json | wc -l)
export TOTAL BEFORE
for job in $jobs; do
  if [ ! -f "$OUT/$job/scores.json" ]; then echo "$job"; fi
done | xargs -r -P "${JOBS:-1}" -I{} bash -c "one {} && progress"
"$PYTHON" evaluate.py --results "$RESULTS"
