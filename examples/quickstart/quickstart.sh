#!/usr/bin/env bash
# Self-play from scratch on this machine, CPU or one GPU: data, a model, SFT, two iterations of SPIN, a table, a plot.
# The same command resumes: what is done is skipped. `make quickstart` calls it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: examples/quickstart/quickstart.sh [DATA=FILE [EVAL=FILE]] [OUT=DIR] [ENGINE=vllm|hf] [SEED=N]

Without DATA: word problems, a Llama of 90 thousand parameters; at most 12 minutes on two cores.
With DATA:    your own SFT file (JSONL, JSON or Parquet; prompt/response, instruction/input/output, question/answer or
              messages), a byte-level BPE of 4,096 tokens and a Llama of 1.4 million parameters; at most 20 minutes on
              two cores.

  DATA=FILE     SFT data of your own
  EVAL=FILE     held-out data in the same format (default: 10% of DATA, by prompt)
  OUT=DIR       where everything goes (default: runs/quickstart, or runs/quickstart-NAME for DATA=NAME.jsonl)
  ENGINE=NAME   what generates: vllm (default), or hf for transformers
  SEED=N        seed of the problems and of the untrained model (default: 7)

environment: PYTHON (interpreter, default .venv/bin/python of this repository), OMP_NUM_THREADS (threads per process)
TEXT
}

# ---- arguments

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
script=examples/quickstart/quickstart.sh
# shellcheck source=examples/arguments.sh
source "$here/../arguments.sh"

DATA='' EVAL='' OUT='' ENGINE='' SEED=''
for argument in "$@"; do take_argument "$argument" DATA EVAL OUT ENGINE SEED; done
ENGINE=${ENGINE:-vllm} SEED=${SEED:-7}
[[ $ENGINE == vllm || $ENGINE == hf ]] || die "ENGINE=$ENGINE is unknown: use vllm or hf"
check_seed
[[ -z $EVAL || -n $DATA ]] || die "EVAL=$EVAL goes together with DATA=FILE: the word problems bring their own test"
check_files 'give a JSONL, JSON or Parquet file of SFT data' "$DATA" "$EVAL"
if [[ -z $OUT ]]; then
  OUT=runs/quickstart
  [[ -z $DATA ]] || { name=$(basename -- "$DATA") && OUT=runs/quickstart-${name%.*}; }
fi

find_python
began=$SECONDS

# ---- stages

stage() { # NUMBER TITLE
  printf '\n== %s. %s (%d:%02d since the start)\n' "$1" "$2" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
}

spin() { # CONFIG RUN_DIR [ARGUMENT...]
  local config=$1 run_dir=$2
  shift 2
  "$repository/tools/spin.sh" "$here/$config" --run-dir "$run_dir" "$@"
}

# One GPU holds the whole model. On a CPU two processes share each layer's matrices (tensor parallel size 2), to show
# how a model is split.
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  machine='one GPU' size=1
else
  machine="$(nproc) CPU cores" size=2
fi
cat <<TEXT
Megatron-SPIN quickstart on $machine, everything into $OUT

A model is fine-tuned on SFT data. Then it plays against itself: its own answers are paired with the real ones, and it
learns to prefer the real ones more than its opponent does, which is the model that gave those answers. No new labels
are needed.
TEXT

sft_settings=() spin_settings=("parallel.tensor_model_parallel_size=$size")
if [[ -z $DATA ]]; then
  stage 1 'word problems, some answered carefully, some by a guess'
  if [[ -f $OUT/data/preferences.jsonl ]]; then # the last of the files
    echo "$OUT/data is already there"
  else
    "$python" "$here/make_problems.py" --out "$OUT/data" --seed "$SEED"
  fi
  model_data=$OUT/data/sft_pool.jsonl configs=(sft.yaml spin.yaml) tokenizer=()
  sft_settings+=("data.path=$OUT/data/sft_pool.jsonl")
  spin_settings+=("data.path=$OUT/data/spin.jsonl" "evaluation.path=$OUT/data/test.jsonl"
    "evaluation.likelihood.mix=$OUT/data/mix.jsonl")
else
  stage 1 "your data: $DATA, held out: ${EVAL:-10% of its prompts}"
  model_data=$DATA configs=(data_sft.yaml data_spin.yaml) tokenizer=(--bpe 4096)
  sft_settings+=("data.path=$DATA")
  spin_settings+=("data.path=$DATA")
  if [[ -n $EVAL ]]; then
    sft_settings+=('evaluation.held_out_fraction=0')
    spin_settings+=('evaluation.held_out_fraction=0' "evaluation.path=$EVAL")
  fi
fi

stage 2 'a tokenizer and an untrained Llama'
"$python" "$here/make_model.py" --data "$model_data" --out "$OUT/model" --seed "$SEED" "${tokenizer[@]}"

stage 3 'SFT, by the same trainer (objective: sft)'
spin "${configs[0]}" "$OUT/sft" --until export:0 "model.hf=$OUT/model" "parallel.nproc_per_node=1" "${sft_settings[@]}"

stage 4 'self-play: the SFT model is the first opponent, each policy the next one'
[[ $size == 2 ]] || spin_settings+=('parallel.nproc_per_node=1')
spin "${configs[1]}" "$OUT/spin" "model.hf=$OUT/sft/iteration_0/hf" "generation.engine=$ENGINE" "${spin_settings[@]}"

stage 5 'results'
"$python" "$repository/tools/report.py" "$OUT/spin"
printf '\ntotal time %d:%02d\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
