# shellcheck shell=bash disable=SC2154  # the driver sets python
# How the driver starts a command on N ranks; tools/spin.sh sources this file. It expects $python, and SPIN_STDOUT and
# SPIN_STDERR in the environment: where rank 0 writes. Each launcher replaces the calling (sub)shell.

# Ranks on this machine: by torchrun, or without a launcher if there is one rank. RANKS_LOG takes what torchrun and the
# other ranks write: their complaints are mostly consequences.
# Whatever is started dies with its parent: after a kill -9 of the driver nothing keeps writing into the run directory.
launch_local() { # RANKS RANKS_LOG COMMAND...
  local ranks=$1 ranks_log=$2
  shift 2
  if ((ranks == 1)); then
    unset WORLD_SIZE RANK LOCAL_RANK
    exec setsid setpriv --pdeathsig KILL "$python" "$@" >"$SPIN_STDOUT" 2>"$SPIN_STDERR"
  fi
  local threads=$(($(nproc) / ranks))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  # shellcheck disable=SC2016  # expanded by the rank
  local rank='[[ $LOCAL_RANK != 0 ]] || exec >"$SPIN_STDOUT" 2>"$SPIN_STDERR"; exec setpriv --pdeathsig KILL "$@"'
  exec setsid setpriv --pdeathsig KILL "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    --no-python bash -c "$rank" rank "$python" "$@" >>"$ranks_log" 2>&1
}
