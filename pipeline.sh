#!/usr/bin/env bash
# The whole experiment: holdout traces, proxy gradient, then for each grid point training traces, a distilled
# student, and the evaluation of student and teacher. Run it again after any interruption: what is done is skipped.
#
#   bash pipeline.sh              run (the paper's models need GPUs)
#   bash pipeline.sh --dry-run    print every stage, its command and whether it is done
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

EXP_DIR="${EXP_DIR:-runs/gsm8k}"
DATASET="${DATASET:-gsm8k}"
SEED="${SEED:-42}"
TEACHER="${TEACHER:-deepseek-ai/DeepSeek-R1-Distill-Qwen-7B}"
PROXY_STUDENT="${PROXY_STUDENT:-Qwen/Qwen2.5-3B}"
if [[ -z "${STUDENT:-}" ]]; then # the base model has no chat template of its own
  STUDENT="meta-llama/Llama-3.2-3B"
  STUDENT_TOKENIZER="${STUDENT_TOKENIZER:-meta-llama/Llama-3.2-3B-Instruct}"
fi
STUDENT_TOKENIZER="${STUDENT_TOKENIZER:-$STUDENT}"
DATA_DIR="${DATA_DIR:-}"             # folder of local copies of the datasets; empty: the hub
NPROC="${NPROC:-}"                   # processes; empty: one per GPU
LAUNCH="${LAUNCH:-}"                 # words of another launcher, such as a multi-node accelerate launch
GEN_ARGS="${GEN_ARGS:-}"             # key=value words for every gentraces.py
HOLDOUT_ARGS="${HOLDOUT_ARGS:-}"     # more of them, for the holdout traces alone
BASE_ARGS="${BASE_ARGS:-}"           # more of them, for the undistilled student alone (few_shot=4 ...)
GRAD_ARGS="${GRAD_ARGS:-}"           # for save_grad.py
TRAIN_ARGS="${TRAIN_ARGS:-}"         # for distill.py
GRID_ARGS="${GRID_ARGS:-}"           # for grid.py: --shard i/n, --points tau,lam,eps ...

trap 'exit 130' INT # a stage that was interrupted is no failed grid point: stop, the next run goes on there
trap 'exit 143' TERM

main() {
  parse_arguments "$@"
  choose_processes
  # shellcheck source=setup.sh
  source "$here/setup.sh" "" # no extras; without an argument it would see those of this function
  choose_launcher
  split_words
  [[ "$dry_run" == 1 ]] || mkdir -p "$EXP_DIR/logs" || fail "EXP_DIR='$EXP_DIR' is not writable"
  run_experiment
}

parse_arguments() {
  dry_run=0
  for argument in "$@"; do
    case "$argument" in
      --dry-run) dry_run=1 ;;
      *) fail "unknown argument '$argument': known is --dry-run; settings are environment variables (README)" ;;
    esac
  done
}

fail() {
  echo "pipeline.sh: $1" >&2
  exit 2
}

choose_processes() {
  num_gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
  if [[ "$num_gpus" != 0 && -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES/#-1*/}"
    num_gpus=${#visible[@]}
  fi
  if [[ -z "$NPROC" && "$num_gpus" == 0 && "$dry_run" == 0 ]]; then
    fail "no CUDA device: the experiment samples with 7B and 3B models; for small local models on the CPU set NPROC=1 (README, Without a GPU)"
  fi
  NPROC="${NPROC:-$((num_gpus > 0 ? num_gpus : 1))}"
  [[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || fail "NPROC='$NPROC': must be a whole number from 1"
}

choose_launcher() {
  if [[ -n "$LAUNCH" ]]; then
    read -ra launch <<<"$LAUNCH"
  elif [[ "$NPROC" == 1 ]]; then
    launch=(python)
  elif [[ "$num_gpus" == 0 ]]; then # accelerate's launcher starts one process only on a CPU
    launch=(env ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node "$NPROC")
  else
    launch=(accelerate launch --config_file "$here/acc_config.yaml" --num_processes "$NPROC" --main_process_port 0)
  fi
}

split_words() {
  read -r -d '' -a gen_args <<<"$GEN_ARGS" || true
  read -r -d '' -a holdout_args <<<"$HOLDOUT_ARGS" || true
  read -r -d '' -a base_args <<<"$BASE_ARGS" || true
  read -r -d '' -a grad_args <<<"$GRAD_ARGS" || true
  read -r -d '' -a train_args <<<"$TRAIN_ARGS" || true
  read -r -d '' -a grid_args <<<"$GRID_ARGS" || true
}

run_experiment() {
  grid="$(python "$here/grid.py" ${grid_args[@]+"${grid_args[@]}"})" || exit 2
  num_points="$(grep -c . <<<"$grid" || true)"
  holdout="$EXP_DIR/traces/holdout.parquet"
  gradient="$EXP_DIR/student_grads.safetensors"
  common=("exp_dir=$EXP_DIR" "seed=$SEED")
  problems=("${common[@]}" ${DATA_DIR:+"data_dir=$DATA_DIR"} ${gen_args[@]+"${gen_args[@]}"})

  check_settings
  run_shared_stages
  failed=()
  point_number=0 num_timed=0 seconds_timed=0
  while read -r tau lam eps; do
    [[ -n "$tau" ]] || continue
    point_number=$((point_number + 1))
    point="tau${tau}_lam${lam}_eps${eps}"
    ran=0 started=$SECONDS
    run_point || failed+=("$point")
    [[ "$dry_run" == 1 ]] || report_progress
  done <<<"$grid"
  finish_experiment
}

# A mistake in the settings of a late stage is better found before the hours of the early ones.
check_settings() {
  [[ "$dry_run" == 1 ]] || (
    dry_run=1
    read -r tau lam eps <<<"$grid"
    point="tau${tau}_lam${lam}_eps${eps}"
    run_shared_stages && distil_student
  ) >/dev/null || exit 2
}

# Stage 1: clean holdout traces. Stage 2: the proxy's gradient on them. Then the student before distillation.
run_shared_stages() {
  run_stage holdout gentraces.py "${problems[@]}" "teacher=$TEACHER" "data_split=${DATASET}_holdout" tau=0 \
    trace_name=holdout ${holdout_args[@]+"${holdout_args[@]}"} || return
  run_stage student_grads save_grad.py "${common[@]}" "proxy_student=$PROXY_STUDENT" "holdout_traces=$holdout" \
    ${grad_args[@]+"${grad_args[@]}"} || return
  run_stage student_base gentraces.py "${problems[@]}" is_teacher=false "teacher=$STUDENT" \
    "tokenizer=$STUDENT_TOKENIZER" "data_split=${DATASET}_test" tau=0 trace_name=student_base \
    "few_shot_traces=$holdout" ${base_args[@]+"${base_args[@]}"} || return
}

# What is left is reckoned from the points that ran, not from those that were done before.
report_progress() {
  if [[ "$ran" == 1 ]]; then
    num_timed=$((num_timed + 1)) seconds_timed=$((seconds_timed + SECONDS - started))
  fi
  local left="?"
  [[ "$num_timed" == 0 ]] || left="$(duration $((seconds_timed * (num_points - point_number) / num_timed)))"
  echo "--- point $point_number/$num_points ($point), $(duration "$SECONDS") so far, at most $left left"
}

run_point() {
  local student="$EXP_DIR/models/student_$point/final"
  local teacher=("teacher=$TEACHER" "tau=$tau" "lam=$lam" "eps=$eps" "proxy_student=$PROXY_STUDENT"
    "grad_path=$gradient")
  # Stage 3: training traces. Stage 4: the student. Stages 5 and 6: both on the test problems.
  run_stage "train_$point" gentraces.py "${problems[@]}" "${teacher[@]}" "data_split=${DATASET}_train" \
    "trace_name=train_$point" || return
  distil_student || return
  run_stage "eval_student_$point" gentraces.py "${problems[@]}" is_teacher=false "teacher=$student" \
    "data_split=${DATASET}_test" tau=0 "trace_name=eval_student_$point" || return
  run_stage "eval_teacher_$point" gentraces.py "${problems[@]}" "${teacher[@]}" "data_split=${DATASET}_test" \
    "trace_name=eval_teacher_$point" || return
}

distil_student() {
  run_stage "student_$point" distill.py "${common[@]}" "student=$STUDENT" "tokenizer=$STUDENT_TOKENIZER" \
    "train_traces=$EXP_DIR/traces/train_$point.parquet" "holdout_traces=$holdout" "model_name=student_$point" \
    ${train_args[@]+"${train_args[@]}"}
}

# run_stage NAME SCRIPT key=value...: skip the stage if its sidecar says that it is done with these settings,
# refuse if it was done with others, else run it; its output also goes to EXP_DIR/logs/NAME.log.
run_stage() {
  local name="$1" script="$2" status=0
  shift 2
  local command=("${launch[@]}" "$here/$script" "$@")
  check="$(WORLD_SIZE="$NPROC" python "$here/$script" "$@" --check)" || status=$?
  if [[ "$status" == 0 ]]; then
    echo "done    $name"
    return 0
  elif [[ "$status" != 3 ]]; then # bad settings, or done with others
    return "$status"
  fi
  if [[ "$dry_run" == 1 ]]; then
    echo "to do   $name: $(printf '%q ' "${command[@]}")${check:+ # $check}"
    return 0
  fi
  ran=1
  echo "run     $name ($(date '+%F %T')): $(printf '%q ' "${command[@]}")"
  "${command[@]}" </dev/null 2>&1 | tee -a "$EXP_DIR/logs/$name.log"
}

duration() {
  printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 % 3600 / 60)) $(($1 % 60))
}

finish_experiment() {
  local status=0
  [[ "$dry_run" == 1 ]] || python "$here/report.py" "$EXP_DIR" || status=1
  [[ "$dry_run" == 1 ]] || echo "total time $(duration "$SECONDS")"
  if [[ ${#failed[@]} -gt 0 ]]; then
    echo "FAILED (${#failed[@]} of $num_points points; see $EXP_DIR/logs): ${failed[*]}" >&2
    status=1
  fi
  exit "$status"
}

main "$@"; exit # on one line: bash has then read the whole file, which may be edited while this runs
