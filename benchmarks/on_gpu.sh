#!/usr/bin/env bash
# One command for a borrowed GPU without internet: install what is here, run the GPU tests, then the benchmarks.
#
#   benchmarks/on_gpu.sh            writes $OUT/gpu-{summary,tests,loss,step}.txt and $OUT/gpu-DATE-{loss,step}.json
#
# All legs end within ten minutes: each has a limit, and the figures it has by then are in its JSON file.
#
# OUT      where the results go (benchmarks/results)
# WHEELS   pure-Python wheels of rivals, liger-kernel, cut-cross-entropy and quack-kernels, and of peft (./wheels, if it exists;
#          benchmarks/wheels.sh fetches them)
# SHAPES   of the loss leg, one a line; all, as far as they come
# PYTHON   the interpreter with torch, triton, numpy and transformers (python3)
# LEGS     which legs to run: "tests bench step" (all); alone, a leg may take the time of the others:
# LIMITS   their seconds: "140 170 180" (with 60 for the installation and some for wheels, under ten minutes)
#
# A leg that fails leaves the others their turn; the exit status is the worst of them. EFFACE_ON_GPU_SMOKE=1 runs every
# leg on the CPU with tiny shapes, which is how a machine without a GPU tests this script.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
WHEELS=${WHEELS:-wheels}
LEGS=${LEGS:-tests bench step}
read -r TESTS_LIMIT BENCH_LIMIT STEP_LIMIT <<<"${LIMITS:-140 170 180}"
SMOKE=${EFFACE_ON_GPU_SMOKE:-0}
DATE=$(date -u +%F)
mkdir -p "$OUT"
SUMMARY=$OUT/gpu-summary.txt
: >"$SUMMARY"
worst=0

note() { echo "$*" | tee -a "$SUMMARY"; }

# leg NAME SECONDS LOG COMMAND...: run it, its output in LOG too; note how it ended.
leg() {
  local name=$1 limit=$2 log=$3 begin=$SECONDS status
  shift 3
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  note "$name: exit $status after $((SECONDS - begin)) s (limit $limit s)"
  if [ "$status" -gt "$worst" ]; then worst=$status; fi
  return "$status"
}

note "$(date -u +%Y-%m-%dT%H:%MZ) commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
note "command: LEGS='$LEGS' SMOKE=$SMOKE $0"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv,noheader 2>/dev/null |
  tee -a "$SUMMARY"

export PYTHONPATH="$PWD/engine:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
if [ "$SMOKE" != 1 ]; then
  # The extension is for CPU tensors; where it cannot be built, Python finds the sources, and here its name and version.
  if ! leg install 60 "$OUT/gpu-install.txt" "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index -e .; then
    stub=$(mktemp -d)
    mkdir "$stub/efface-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: efface\nVersion: 0\n' >"$stub/efface-0.dist-info/METADATA"
    export PYTHONPATH="$PYTHONPATH:$stub"
    note "install: not possible here; the kernels run from the sources, the step leg, which packs, does not"
    LEGS=${LEGS//step/}
    worst=1
  fi
  for wheel in "$WHEELS"/*.whl; do
    [ -e "$wheel" ] || continue
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$wheel" || note "install: $wheel refused"
  done
fi
"$PYTHON" - <<'PY' 2>&1 | tee -a "$SUMMARY"
import platform, torch
names = ["triton", "transformers", "peft", "liger_kernel", "cut_cross_entropy", "quack"]
found = {}
for name in names:
    try:
        found[name] = getattr(__import__(name), "__version__", "present")
    except Exception as error:
        found[name] = f"{type(error).__name__}"
device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
print(f"python {platform.python_version()}, torch {torch.__version__}, cuda {torch.version.cuda}, {found}, {device}")
PY

# Warnings of that machine's other versions are not errors, and its pytest may lack our plugins: hence the two -o.
pytest=("$PYTHON" -m pytest -p no:cacheprovider -o addopts= -o filterwarnings=default --strict-markers -q -rfE
  --continue-on-collection-errors)
# Most of the time of these tests is Triton's compiler, on one core each.
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8) || parallel=()
kernels=(tests/kernels/test_{on_gpu,sequence_loss,row_pass,distribution_pass,linear_loss_rule}.py)
if [[ " $LEGS " == *" tests "* ]]; then
  if [ "$SMOKE" = 1 ]; then
    leg tests 900 "$OUT/gpu-tests.txt" "${pytest[@]}" -m gpu tests/kernels/test_on_gpu.py
  else
    leg tests "$TESTS_LIMIT" "$OUT/gpu-tests.txt" "${pytest[@]}" -s -m gpu --durations=10 "${parallel[@]}" "${kernels[@]}"
  fi
  grep -E 'passed|failed|skipped|error|FAILED|ERROR|GiB' "$OUT/gpu-tests.txt" | tail -n 60 >>"$SUMMARY"
fi

if [[ " $LEGS " == *" bench "* ]]; then
  bench=("$PYTHON" -m benchmarks loss --json "$OUT/gpu-$DATE-loss.json")
  if [ "$SMOKE" = 1 ]; then
    leg bench 900 "$OUT/gpu-loss.txt" "${bench[@]}" --shape smoke --rounds 1
  else
    while read -r shape; do
      [ -n "$shape" ] && bench+=(--shape "$shape")
    done <<<"${SHAPES:-}"
    leg bench "$BENCH_LIMIT" "$OUT/gpu-loss.txt" "${bench[@]}" --device cuda --rounds 15
  fi
fi

if [[ " $LEGS " == *" step "* ]]; then
  step=("$PYTHON" -m benchmarks step --json "$OUT/gpu-$DATE-step.json")
  if [ "$SMOKE" = 1 ]; then
    leg step 900 "$OUT/gpu-step.txt" "${step[@]}" --shape smoke --rounds 2 --blocks
  else
    leg step "$STEP_LIMIT" "$OUT/gpu-step.txt" "${step[@]}" --device cuda
  fi
fi

nvidia-smi --query-gpu=clocks.sm,temperature.gpu,power.draw --format=csv,noheader 2>/dev/null | tee -a "$SUMMARY"
note "worst exit status: $worst"
exit "$worst"
