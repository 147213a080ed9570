#!/usr/bin/env bash
# One round on a machine with a CUDA GPU and without network, in under ten minutes: build, GPU tests,
# compute-sanitizer where it works, benchmark, record. A leg that fails or runs out of time does not
# stop the round; it is reported, and the exit code is 1.
#
#   bash benchmarks/gpu_round.sh [--dry-run] [--results DIR]
#
# The record goes to benchmarks/results/<gpu>.json (or DIR), and with the logs to $OUT if that is set.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=false
results=benchmarks/results
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry=true ;;
    --results)
      results=${2:?--results needs a folder}
      shift
      ;;
    *)
      echo "usage: gpu_round.sh [--dry-run] [--results DIR]" >&2
      exit 2
      ;;
  esac
  shift
done

readonly LIMIT=580 # seconds of the round
readonly RESERVE=15 # of them kept for the record
work=$(mktemp -d "${TMPDIR:-/tmp}/foveate-round.XXXXXX")
trap 'rm -rf "$work"' EXIT
failed=0
verdicts=()

note() { # name, verdict, seconds
  verdicts+=("$1=$2")
  printf '%-14s %4d s  %s\n' "$1" "$3" "$2" | tee -a "$work/legs.txt"
}

# Runs one leg within its budget and what the round has left; 0 if it passed.
leg() { # name, seconds, command
  local name=$1 budget=$2 command=$3
  if $dry; then
    printf '%-14s %4d s  %s\n' "$name" "$budget" "$command"
    return 0
  fi
  local left=$((LIMIT - RESERVE - SECONDS))
  [ "$name" = record ] && left=$((LIMIT - SECONDS))
  if [ "$budget" -gt "$left" ]; then budget=$left; fi
  if [ "$budget" -lt 5 ]; then
    failed=1
    note "$name" "no time left" 0
    return 1
  fi
  echo "=== $name: $command"
  local start=$SECONDS status
  timeout --kill-after=5 "$budget" bash -c "$command" >"$work/$name.log" 2>&1 </dev/null
  status=$?
  tail -n 25 "$work/$name.log"
  case $status in
    0) note "$name" ok $((SECONDS - start)) ;;
    124 | 137) note "$name" "out of time" $((SECONDS - start)) ;;
    *) note "$name" "failed ($status)" $((SECONDS - start)) ;;
  esac
  [ $status -eq 0 ] || failed=1
  return $status
}

# Like `leg`, but a failure only says that what follows cannot run.
probe() { # name, seconds, command
  local before=$failed
  leg "$@"
  local status=$?
  failed=$before
  return $status
}

cuda=ON
command -v nvcc >/dev/null || cuda=OFF
export FOVEATE_CUDA=$cuda
if ! leg build 200 "python -m pip install --no-build-isolation --no-deps -e ."; then
  export PYTHONPATH=$PWD/python # the Triton kernels run without the compiled modules
fi
leg doctor 30 "python -m foveate doctor"
# The quick rows of both backends come before the long legs: they are the record.
leg bench-triton 110 "python -m foveate bench --quick --backend triton --json $work/triton.json"
leg bench-cuda 60 "python -m foveate bench --quick --backend cuda --json $work/cuda.json"
leg tests 170 "python -m pytest -q -m gpu -p no:cacheprovider --maxfail=30"
subset="tests/test_ops.py -m gpu -k 'strides and (bits_encode or ncut)' -q -p no:cacheprovider"
tool="compute-sanitizer --error-exitcode 9 --target-processes all --tool"
touch_gpu="python -c 'import torch; print(torch.ones(4, device=\"cuda\").sum().item())'"
if probe sanitizer 40 "$tool memcheck $touch_gpu"; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else writes past a tensor stay inside the pool
  leg memcheck 70 "$tool memcheck python -m pytest $subset"
  leg racecheck 70 "$tool racecheck python -m pytest $subset"
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi
leg bench-all 120 "python -m foveate bench --backend triton --json $work/all.json"

quoted=""
for verdict in "${verdicts[@]}"; do quoted+=" --leg '$verdict'"; done
files="$work/triton.json $work/cuda.json $work/all.json"
leg record 30 "python -m foveate.bench.record --results $results$quoted $files"
$dry && exit 0

echo
cat "$work/legs.txt"
if [ -n "${OUT:-}" ]; then
  for log in "$work"/*.log; do
    echo "=== $(basename "$log" .log)"
    cat "$log"
  done >"$OUT/round.log"
  cp "$work/legs.txt" "$OUT/legs.txt"
  record=$(sed -n 's/^wrote //p' "$work/record.log" 2>/dev/null | tail -1)
  if [ -n "$record" ]; then cp "$record" "$OUT/"; fi
fi
echo "the round took $SECONDS s"
exit $failed
