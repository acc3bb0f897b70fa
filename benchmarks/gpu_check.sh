#!/usr/bin/env bash
# Builds the CUDA kernels for the GPU of this machine, compares every one of them with numpy, times
# them against cuBLAS and other rivals, and looks for bad memory accesses and races: tables, and
# benchmarks/results/gpu_check.json. What would end more than 150 s after the build is left out
# (--seconds N). Needs nvcc, a C++17 compiler, and a Python with torch (CUDA), numpy and onnx; no
# network. Arguments go to gpu_check.py: --models FOLDER adds sessions of the models that
# gpu_models.py wrote there (--model FILE: of one), which need onnxruntime-gpu and cmake, as does the
# decoder of 7B shape.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
build=${BUILD:-build/gpu}
nvcc=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}

if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "no GPU found: torch of $python sees none; run this on a machine with an NVIDIA GPU" >&2
  exit 6
fi
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
[ "$arch" != 90 ] || arch=90a  # with Hopper's own instructions
mkdir -p "$build"
if command -v cmake >/dev/null; then
  cmake -S . -B "$build" -DONNXCOMP_CUDA=ON "-DONNXCOMP_CUDA_ARCHITECTURES=$arch" \
    "-DCMAKE_CUDA_COMPILER=$nvcc" >"$build/log" 2>&1 \
    && cmake --build "$build" --target onnxcomp_ops --parallel >>"$build/log" 2>&1 \
    || { tail -40 "$build/log" >&2; exit 1; }
  library=$build/ops/libonnxcomp_ops.so
else
  # The kernels alone, without operators for ONNX Runtime.
  library=$build/libonnxcomp_kernels.so
  objects=() options=()
  sources=(gpu/call.cu hash/cuda.cu hyper/{cuda,decode,few_rows}.cu hyper/levels.cc)
  if [ "$arch" = 90a ]; then sources+=(hyper/hopper.cu) options+=(-DONNXCOMP_CUDA_HOPPER); fi
  for source in "${sources[@]}"; do
    objects+=("$build/${source//\//_}.o")
    "$nvcc" -O3 -std=c++17 "-arch=sm_$arch" "-DONNXCOMP_CUDA_ARCHITECTURES=\"$arch\"" "${options[@]}" -Iops \
      -Xcompiler -fPIC -c "ops/$source" -o "${objects[-1]}" &
  done
  wait
  "$nvcc" "-arch=sm_$arch" -shared "${objects[@]}" -o "$library"
fi
PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} exec "$python" benchmarks/gpu_check.py "$library" "$@"
