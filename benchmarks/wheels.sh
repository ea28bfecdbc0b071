#!/usr/bin/env bash
# Fetch, for a machine with a GPU and no internet, the rivals' wheels: pure Python, none brings another torch.
#
#   benchmarks/wheels.sh            into ./wheels, from where benchmarks/on_gpu.sh installs them
#
# WHEELS   the folder (wheels)
# PYTHON   the interpreter (python3)
set -euo pipefail
cd "$(dirname "$0")/.."
${PYTHON:-python3} -m pip download --quiet --no-deps --only-binary :all: --dest "${WHEELS:-wheels}" \
  liger-kernel cut-cross-entropy quack-kernels peft
ls -l "${WHEELS:-wheels}"
