#!/usr/bin/env bash
# What a GPU shows, in parts, each within its own time; a part that fails stops no other. One table at the end.
#
#     tests/on_gpu.sh bench     # speed and memory beside peft + bitsandbytes; wants the card alone; 170 s
#     tests/on_gpu.sh profile   # what a step of QLoRA is made of; 40 s
#     tests/on_gpu.sh tests     # tests/test_gpu.py, then the whole suite; 300 s
#     tests/on_gpu.sh           # all of these
#
# Logs lie under $OUT, else out/gpu. PYTHON runs it all. bitsandbytes may lie in .carry/site, where it is not installed.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONUNBUFFERED=1
if [ -d .carry/site ]; then peers_path=$PWD/.carry/site; else peers_path=; fi
if [ -d shared/data ]; then export NANOPEFT_DATA=${NANOPEFT_DATA:-$PWD/shared/data}; fi
parts=${*:-bench profile tests}

# limited SECONDS NAME COMMAND: the command within that time, its output in NAME.log; it is asked to end before it is killed.
limited() {
  local seconds=$1 name=$2 start=$SECONDS
  shift 2
  timeout -k 8 -s INT "$seconds" env --default-signal=INT "$@" >"$out/$name.log" 2>&1
  echo "$name: status $? after $((SECONDS - start)) s" | tee -a "$out/parts.txt"
}

bench() {
  limited 165 bench env NANOPEFT_PEERS="${NANOPEFT_PEERS:-$python}" PYTHONPATH="$peers_path" "$python" bench.py gpu --peer --device cuda --dtype bfloat16 --steps 6
}

profile() {
  limited 40 profile "$python" tests/profile_gpu.py
}

tests() {
  workers=
  # pytest-benchmark warns where it meets xdist, and warnings are errors.
  if "$python" -c "import xdist" 2>"$out/xdist.log"; then workers="-n 6 -p no:benchmark"; fi
  # shellcheck disable=SC2086
  limited 110 test_gpu "$python" -m pytest -q -rfE $workers --durations=10 -p no:cacheprovider tests/test_gpu.py
  # shellcheck disable=SC2086
  limited 180 suite "$python" -m pytest -q -rfE --durations=10 -p no:cacheprovider $workers --ignore tests/test_gpu.py tests
}

: >"$out/parts.txt"
for part in $parts; do
  case $part in
    bench | profile | tests) $part ;;
    *) echo "no part $part; there are bench, profile and tests" >&2 ;;
  esac
done

echo
echo "== $("$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")')"
cat "$out/parts.txt"
for name in test_gpu suite; do
  if [ -f "$out/$name.log" ]; then
    echo "$name: $(grep -E '[0-9]+ (passed|failed|error|skipped)' "$out/$name.log" | tail -n 1)"
    grep -E '^(FAILED|ERROR)' "$out/$name.log" | cut -c1-150 | head -n 40
  fi
done
if [ -f "$out/test_gpu.log" ]; then grep -E '^memory ' "$out/test_gpu.log"; fi
if [ -f "$out/profile.log" ]; then head -n 40 "$out/profile.log" | cut -c1-150; fi
if [ -f "$out/bench.log" ]; then
  grep -E '"failed"' "$out/bench.log" | cut -c1-400
  grep -vE '^[{]|^[0-9.]+ seconds$' "$out/bench.log" | tail -n 60 | cut -c1-200
fi
