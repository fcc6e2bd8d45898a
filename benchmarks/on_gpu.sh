#!/usr/bin/env bash
# All that needs a GPU, in the active environment: its tests, the bars of a step, and the rest of the
# figures. Tells at the end what failed or missed a bar.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

failed=()
run() {
    echo "==> $*"
    "$@" || failed+=("$*")
}

run python -m pytest tests/curvature/test_triton.py tests/optim/test_on_cuda.py
run python benchmarks/step.py --device cuda
run python benchmarks/step.py --device cuda --autocast --channels-last
run python benchmarks/step.py --device cuda --autocast --channels-last --compile
run python benchmarks/profile_step.py --device cuda --batch 128 --size 256
run python benchmarks/kfac_step.py --device cuda
run python benchmarks/factors.py --device cuda
run python benchmarks/operations.py --device cuda
run python examples/digits.py --structures all --device cuda

((${#failed[@]} == 0)) || printf 'failed: %s\n' "${failed[@]}"
exit ${#failed[@]}
