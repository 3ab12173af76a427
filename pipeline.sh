#!/usr/bin/env bash
# The whole experiment: holdout traces, proxy gradient, then for each grid point training traces, for each attack a
# distilled student, and the evaluation of student and teacher. Run it again after any interruption: what is done is
# skipped.
#
#   bash pipeline.sh                                 run (the paper's models need GPUs)
#   bash pipeline.sh --dry-run                       print every stage, its command and whether it is done, to do or refused
#   bash pipeline.sh --help                          this text, and every setting with its value and meaning
#   ATTACKS="naive correct mix25" bash pipeline.sh   a student for each of these attacks (attacks/, docs/attackers.md)
#
# Settings are variables of the environment, as ATTACKS is there. docs/reference.md says more of them.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

fail() {
  echo "pipeline.sh: $1" >&2
  exit 2
}

[[ -n "${EXP_DIR-unset}" ]] || fail "EXP_DIR is empty: give a folder, or unset it for the default one"
EXP_DIR="${EXP_DIR:-runs/gsm8k}" # all that is made goes to this folder
# shellcheck disable=SC2088 # a tilde that the shell has not expanded
case "$EXP_DIR" in
  -*) EXP_DIR="./$EXP_DIR" ;; # no option of some command
  \~ | \~/*) EXP_DIR="$HOME${EXP_DIR#\~}" ;;
  \~*) fail "EXP_DIR='$EXP_DIR': write that home folder out, or ./$EXP_DIR for what is named so" ;;
esac
DATASET="${DATASET:-gsm8k}" # gsm8k, hendrycks_math, mmlu, arithmetic (the demo's), or a folder of your own
SEED="${SEED:-42}"          # of the random numbers
TEACHER="${TEACHER:-deepseek-ai/DeepSeek-R1-Distill-Qwen-7B}" # a folder, or of the hub: OWNER/NAME or OWNER/NAME@COMMIT
PROXY_STUDENT="${PROXY_STUDENT:-Qwen/Qwen2.5-3B}"             # of the teacher's tokenizer
# The base model has no chat template of its own.
[[ -n "${STUDENT:-}" ]] || STUDENT_TOKENIZER="${STUDENT_TOKENIZER:-meta-llama/Llama-3.2-3B-Instruct}"
STUDENT="${STUDENT:-meta-llama/Llama-3.2-3B}"       # what an attacker trains
STUDENT_TOKENIZER="${STUDENT_TOKENIZER:-$STUDENT}" # with a chat template
DATA_DIR="${DATA_DIR:-}"             # folder of local copies of the datasets; empty: the hub
NPROC="${NPROC:-}"                   # processes; empty: one per GPU
JOBS="${JOBS:-1}"                    # grid points at once, each with NPROC processes (small models)
KEEP_STUDENTS="${KEEP_STUDENTS:-1}"  # 0: a student is deleted once it has been evaluated
LAUNCH="${LAUNCH:-}"                 # words of another launcher, such as a multi-node accelerate launch
GEN_ARGS="${GEN_ARGS:-}"             # key=value words for every gentraces.py
HOLDOUT_ARGS="${HOLDOUT_ARGS:-}"     # more of them, for the holdout traces alone
TRACE_ARGS="${TRACE_ARGS:-num_contrasts=8}" # more of them, for the training traces alone (one_step=0.1 ...)
BASE_ARGS="${BASE_ARGS:-}"           # more of them, for the undistilled student alone (few_shot=4 ...)
FEW_SHOT_ARGS="${FEW_SHOT_ARGS:-}"   # the undistilled student again, with few_shot=4 ...
PREFILL="${PREFILL:-}"               # the undistilled student again, made to begin with these words
GRAD_ARGS="${GRAD_ARGS:-}"           # key=value words for save_grad.py
TRAIN_ARGS="${TRAIN_ARGS:-}"         # key=value words for distill.py
ATTACKS="${ATTACKS:-naive}"          # recipes of attacks/, or paths of one's own: each grid point gets a student of each
ATTACK_ARGS="${ATTACK_ARGS:-}"       # key=value words for attack.py
CLEAN_ARGS="${CLEAN_ARGS:-tau=0}"    # more of them, for the clean training traces that some attacks hold
SOLO_ARGS="${SOLO_ARGS:-tau=1 num_samples=4}" # more of them, for the undistilled student's own answers, of the attack solo
GRID_ARGS="${GRID_ARGS:-}"           # for grid.py: --shard i/n, --points tau,lam,eps ..., --file PATH

# What a scheduler or an outer launcher left: a stage would wait for processes that never come. LAUNCH may need it.
[[ -n "$LAUNCH" ]] || unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT \
  "${!TORCHELASTIC_@}" "${!PET_@}"

# shellcheck source=ads/stage/stop.sh
source "$here/ads/stage/stop.sh"

main() {
  parse_arguments "$@"
  choose_processes
  # shellcheck source=setup.sh
  source "$here/setup.sh" "" # no extras; without an argument it would see those of this function
  count_gpus
  choose_launcher
  split_words
  [[ "$dry_run" == 1 ]] || mkdir -p "$EXP_DIR/logs" || fail "EXP_DIR='$EXP_DIR' is not writable"
  choose_commits
  run_experiment
}

parse_arguments() {
  dry_run=0
  for argument in "$@"; do
    case "$argument" in
      --dry-run) dry_run=1 ;;
      -h | --help) print_help && exit ;;
      *) fail "unknown argument '$argument': known are --dry-run and --help; settings are environment variables" ;;
    esac
  done
}

# The text above, and each setting with the value that it has now.
print_help() {
  local name meaning
  sed -n '2,/^set /s/^# \{0,1\}//p' "$here/pipeline.sh"
  printf '\nSettings, as they are now:\n\n'
  sed -n 's/^\([A-Z_]*\)="\${\1:-[^#]*}" *# *\(.*\)/\1 \2/p' "$here/pipeline.sh" |
    while read -r name meaning; do printf '%s\n    %s\n' "$name=${!name}" "$meaning"; done
  printf '\nSKIP_SETUP=1 takes the environment as it is; PYTHON is the one that makes it, where there is none.\n'
}

# Before the environment is set up: a machine without a GPU is better told before gigabytes are installed.
choose_processes() {
  may_have_gpus=0
  if [[ -n "${CUDA_VISIBLE_DEVICES-all}" ]]; then
    [[ "$(nvidia-smi -L 2>/dev/null)" != GPU* && ! -e /dev/nvidia0 ]] || may_have_gpus=1
  fi
  [[ "$may_have_gpus" == 1 ]] || require_processes
  [[ -z "$NPROC" || "$NPROC" =~ ^[1-9][0-9]*$ ]] || fail "NPROC='$NPROC': must be a whole number from 1"
  [[ "$JOBS" =~ ^[1-9][0-9]*$ ]] || fail "JOBS='$JOBS': must be a whole number from 1"
  [[ "$KEEP_STUDENTS" =~ ^[01]$ ]] || fail "KEEP_STUDENTS='$KEEP_STUDENTS': must be 1 or 0 (delete them)"
}

# In the environment: torch knows which GPUs it can use, and how many of those that CUDA_VISIBLE_DEVICES names.
count_gpus() {
  num_gpus=0
  if [[ "$may_have_gpus" == 1 || "${NPROC:-1}" != 1 ]]; then
    num_gpus="$(in_python machine.num_gpus)" || exit 2
  fi
  [[ "$num_gpus" != 0 ]] || require_processes
  NPROC="${NPROC:-$((num_gpus > 0 ? num_gpus : 1))}"
  if [[ -z "$LAUNCH" && "$num_gpus" != 0 && "$NPROC" -gt "$num_gpus" ]]; then
    fail "NPROC=$NPROC: torch can use $num_gpus of the GPUs here, and each process takes one; unset NPROC, or set ACCELERATE_USE_CPU=true for small models on the CPU"
  fi
  if [[ "$num_gpus" != 0 && "$JOBS" -gt 1 && "${GEN_ARGS##*batch_size=}" != [0-9]* ]]; then # the last word wins
    fail "JOBS=$JOBS: jobs share the GPU, and batch_size=auto takes all memory that one of them finds free; set GEN_ARGS=\"batch_size=N\" so that $JOBS have room (docs/memory.md), or JOBS=1"
  fi
}

require_processes() {
  [[ -n "$NPROC" || "$dry_run" == 1 ]] ||
    fail "no CUDA device: the experiment samples with 7B and 3B models; run pipeline_demo.sh (tiny models, minutes on a CPU), or set NPROC=1 for small models of your own"
}

choose_launcher() {
  if [[ -n "$LAUNCH" ]]; then
    read -r -d '' -a launch <<<"$LAUNCH" || true
  elif [[ "$NPROC" == 1 ]]; then
    launch=(python)
  elif [[ "$num_gpus" == 0 ]]; then # accelerate's launcher starts one process only on a CPU
    launch=(env ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node "$NPROC")
  else
    launch=(accelerate launch --config_file "$here/acc_config.yaml" --num_processes "$NPROC" --main_process_port 0)
  fi
}

# All stages, of this run and of later ones, take what is of the hub at the commits that this file records
# (ads/stage/hub.py); those of a dry run record theirs in a copy.
choose_commits() {
  export HUB_RECORD="$EXP_DIR/hub.yaml"
  if [[ "$dry_run" == 1 ]]; then
    local copy
    copy="$(mktemp -d)"
    # shellcheck disable=SC2064 # the name as it is now
    trap "$(printf 'rm -rf %q' "$copy")" EXIT
    [[ ! -f "$HUB_RECORD" ]] || cp "$HUB_RECORD" "$copy"
    HUB_RECORD="$copy/hub.yaml"
  elif [[ -f "$HUB_RECORD" ]]; then
    in_python hub.print_moved "$EXP_DIR"
  fi
}

# in_python FUNCTION WORDS...: one of ads/stage/; what it gives is printed.
in_python() {
  PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" python -c "import utils; from ads.attacks import recipes; from ads.stage import hub, inputs, machine
utils.run_script(lambda words: (found := $1(*words)) is None or print(found))" "${@:2}"
}

split_words() {
  read -r -d '' -a gen_args <<<"$GEN_ARGS" || true
  read -r -d '' -a holdout_args <<<"$HOLDOUT_ARGS" || true
  read -r -d '' -a trace_args <<<"$TRACE_ARGS" || true
  read -r -d '' -a base_args <<<"$BASE_ARGS" || true
  read -r -d '' -a few_shot_args <<<"$FEW_SHOT_ARGS" || true
  read -r -d '' -a grad_args <<<"$GRAD_ARGS" || true
  read -r -d '' -a train_args <<<"$TRAIN_ARGS" || true
  read -r -d '' -a attacks <<<"$ATTACKS" || true
  read -r -d '' -a attack_args <<<"$ATTACK_ARGS" || true
  read -r -d '' -a clean_args <<<"$CLEAN_ARGS" || true
  read -r -d '' -a solo_args <<<"$SOLO_ARGS" || true
  read -r -d '' -a grid_args <<<"$GRID_ARGS" || true
}

run_experiment() {
  asked=()
  grid="$(python "$here/grid.py" ${grid_args[@]+"${grid_args[@]}"})" || exit 2
  num_points="$(grep -c . <<<"$grid" || true)"
  holdout="$EXP_DIR/traces/holdout.parquet"
  gradient="$EXP_DIR/student_grads.safetensors"
  common=("exp_dir=$EXP_DIR" "seed=$SEED")
  same_problems=(${trace_args[@]+"${trace_args[@]}"} num_contrasts=0 one_step=0) # as the training traces, without diagnostics
  problems=("${common[@]}" ${DATA_DIR:+"data_dir=$DATA_DIR"} ${gen_args[@]+"${gen_args[@]}"})
  read_recipes

  check_settings
  run_shared_stages
  run_grid
  finish_experiment
}

# The recipes of ATTACKS, as lines NAME, what, value parted by tabs: what it asks of attack.py, distill.py and
# gentraces.py, and what it needs besides the published traces. An attack that needs no such traces is `own`.
read_recipes() {
  local attack what value
  recipes="$(in_python recipes.print_recipe ${attacks[@]+"${attacks[@]}"})" || exit 2
  on_traces=() own=()
  [[ "$dry_run" == 1 ]] || mkdir -p "$EXP_DIR/attacks"
  while IFS=$'\t' read -r attack what value; do
    [[ "$what" == file ]] || continue
    if has_need own "$attack"; then own+=("$attack"); else on_traces+=("$attack"); fi
    [[ "$dry_run" == 0 ]] || continue
    cp "$value" "$EXP_DIR/attacks/.$attack.$$.tmp" # for the report; whole at any time, as shards may share the folder
    mv "$EXP_DIR/attacks/.$attack.$$.tmp" "$EXP_DIR/attacks/$attack.yaml"
  done <<<"$recipes"
}

# words_of ATTACK STAGE: into `words`, what the attack asks of a stage.
words_of() {
  local attack stage word
  words=()
  [[ "$2" != gentraces || "$1" == naive ]] || words=("attacker=$1" "few_shot_traces=$holdout")
  while IFS=$'\t' read -r attack stage word; do
    [[ "$attack" != "$1" || "$stage" != "$2" ]] || words+=("$word")
  done <<<"$recipes"
}

# has_need WHAT [ATTACK]: whether the attack, or any, needs it.
has_need() {
  grep -q -x "${2:-[^	]*}	needs	$1" <<<"$recipes"
}

# JOBS workers take grid points, the next one each, until none is left. A point is taken by making its folder,
# which then says what became of it.
run_grid() {
  local workers=()
  taken="$EXP_DIR/locks/sweep.$$" started=$SECONDS
  if [[ "$dry_run" == 0 ]]; then
    rm -rf "$taken" && mkdir -p "$taken"
    trap 'rm -rf "$taken"' EXIT
    if [[ "$JOBS" -gt 1 && -z "${OMP_NUM_THREADS:-}" ]]; then # threads beyond the CPUs wait for one another
      local num_cpus
      num_cpus="$(cd "$here" && python -c 'from ads.stage.machine import num_cpus; print(num_cpus())')"
      export OMP_NUM_THREADS=$((num_cpus > JOBS ? num_cpus / JOBS : 1))
    fi
    while [[ ${#workers[@]} -lt $((JOBS - 1)) ]]; do
      run_points &
      workers+=("$!")
    done
  fi
  run_points
  [[ ${#workers[@]} == 0 ]] || wait "${workers[@]}"
}

run_points() {
  trap_signals # a worker in the background starts without
  point_number=0
  while read_point; do
    point_number=$((point_number + 1))
    ran=0
    [[ "$dry_run" == 1 ]] || mkdir "$taken/$point_number" 2>/dev/null || continue
    if ! run_point; then
      [[ "$dry_run" == 1 ]] || echo "$point" >"$taken/$point_number/failed"
    fi
    [[ "$dry_run" == 1 ]] || report_progress
  done <<<"$grid"
}

# read_point: the next line of the grid, and the name that its stages are given.
read_point() {
  local word
  more=()
  read -r tau lam eps word || return
  [[ -z "$word" ]] || read -r -a more <<<"$word"
  point="tau${tau}_lam${lam}_eps${eps}"
  for word in ${more[@]+"${more[@]}"}; do
    word="${word#defence=}"
    point+="_${word#direction_seed=}"
  done
}

# A mistake in the settings of a late stage is better found before the hours of the early ones: each stage is asked
# whether it is done, which refuses wrong settings. A point of the grid that is wrong in itself does not stop the
# others: the settings of training traces are checked at a point that is right.
check_settings() {
  [[ "$dry_run" == 0 ]] || return 0
  local dry_run=1 checking=1 tau lam eps more point
  {
    read_point <<<"$grid" && want_shared_stages && want_students ${own[@]+"${own[@]}"} \
      ${on_traces[@]+"${on_traces[@]}"} && tau=0 lam=0 eps=0 more=() point=settings && sample_training_traces &&
      ask_stages
  } >/dev/null || exit 2
}

# Stage 1: clean holdout traces. Stage 2: the proxy's gradient on them. Then the student before distillation, and what
# attacks need that hangs on no grid point.
run_shared_stages() {
  want_shared_stages
  run_wanted shared || return
  [[ ${#own[@]} == 0 ]] || make_students shared "${own[@]}"
}

want_shared_stages() {
  want_stage holdout gentraces.py "${problems[@]}" "teacher=$TEACHER" "data_split=${DATASET}_holdout" tau=0 \
    trace_name=holdout ${holdout_args[@]+"${holdout_args[@]}"}
  want_stage student_grads save_grad.py "${common[@]}" "proxy_student=$PROXY_STUDENT" "holdout_traces=$holdout" \
    ${grad_args[@]+"${grad_args[@]}"}
  sample_base student_base
  [[ -z "$FEW_SHOT_ARGS" ]] || sample_base student_base_few_shot "${few_shot_args[@]}"
  [[ -z "$PREFILL" ]] || sample_base student_base_prefill "prefill=$PREFILL"
  ! has_need clean_traces ||
    want_stage train_clean gentraces.py "${problems[@]}" "teacher=$TEACHER" "data_split=${DATASET}_train" \
      trace_name=train_clean "${same_problems[@]}" ${clean_args[@]+"${clean_args[@]}"}
  [[ ${#own[@]} == 0 ]] ||
    sample_base train_own "data_split=${DATASET}_train" "${same_problems[@]}" ${solo_args[@]+"${solo_args[@]}"}
}

# sample_base NAME key=value...: the student before distillation.
sample_base() {
  want_stage "$1" gentraces.py "${problems[@]}" is_teacher=false "teacher=$STUDENT" \
    "tokenizer=$STUDENT_TOKENIZER" "data_split=${DATASET}_test" tau=0 "trace_name=$1" \
    "few_shot_traces=$holdout" ${base_args[@]+"${base_args[@]}"} "${@:2}"
}

# What is left is reckoned from the points that ran, not from those that were done before.
report_progress() {
  local num_ended num_ran left="?"
  touch "$taken/$point_number/ended"
  [[ "$ran" == 0 ]] || touch "$taken/$point_number/ran"
  # a line for each, whatever its name is
  num_ended="$(find "$taken" -name ended -exec echo \; | wc -l)"
  num_ran="$(find "$taken" -name ran -exec echo \; | wc -l)"
  if [[ "$num_ran" -gt 0 ]]; then
    left="$(duration $(((SECONDS - started) * (num_points - num_ended) / num_ran)))"
  fi
  echo "--- $((num_ended)) of $num_points points ($point), $(duration "$SECONDS") so far, at most $left left"
}

# Stage 3: training traces. Stage 6, with the same models: the teacher on the test problems. Then a student for each
# attack.
run_point() {
  sample_training_traces
  want_stage "eval_teacher_$point" gentraces.py "${problems[@]}" "${teacher[@]}" "data_split=${DATASET}_test" \
    "trace_name=eval_teacher_$point"
  make_students "$point" ${on_traces[@]+"${on_traces[@]}"}
}

# With the samples of a problem that some attack asks for, where one does.
sample_training_traces() {
  local most there
  teacher=("teacher=$TEACHER" "tau=$tau" "lam=$lam" "eps=$eps"
    ${more[@]+"${more[@]}"} "proxy_student=$PROXY_STUDENT" "grad_path=$gradient")
  want_stage "train_$point" gentraces.py "${problems[@]}" "${teacher[@]}" "data_split=${DATASET}_train" \
    "trace_name=train_$point" "holdout_traces=$holdout" ${trace_args[@]+"${trace_args[@]}"}
  most="$(sed -n 's/^[^	]*	needs	samples //p' <<<"$recipes" | sort -n | tail -n 1)"
  # of an earlier run with other attacks; more of them than are wanted do as well
  there="$(sed -n 's/^  num_samples: //p' "$EXP_DIR/traces/samples_$point.yaml" 2>/dev/null || true)"
  [[ -z "$most" || "${there:-0}" -le "$most" ]] || most="$there"
  [[ -z "$most" ]] || is_greedy ||
    want_stage "samples_$point" gentraces.py "${problems[@]}" "${teacher[@]}" "data_split=${DATASET}_train" \
      "trace_name=samples_$point" "${same_problems[@]}" "num_samples=$most"
}

is_greedy() { [[ "$tau" =~ ^0*\.?0*$ ]]; }

# make_students LOG ATTACK...: run what is wanted, and for each attack what it trains on, its student, and that on the
# test problems. An attack that fails leaves the others to be made; one that finds nothing to train on is no failure.
make_students() {
  local log="$1" left=("${@:2}") kept=() attack broken stage result=0 status
  while :; do
    want_students ${left[@]+"${left[@]}"}
    status=0
    run_wanted "$log" || status=$?
    [[ "$status" != 0 ]] || break
    stage="$(sed -n 's/^run     \([^ ]*\) .*/\1/p' "$EXP_DIR/logs/$log.log" 2>/dev/null | tail -n 1)" broken="" kept=()
    for attack in ${left[@]+"${left[@]}"}; do
      case "$stage" in
        "attack_$(name_of "$attack")" | "student_$(student_of "$attack")" | "eval_student_$(name_of "$attack")") broken=1 ;;
        *) kept+=("$attack") ;;
      esac
    done
    [[ -n "$broken" && "$began" == 1 ]] || return "$status" # a stage that all need; or one was refused
    left=(${kept[@]+"${kept[@]}"})
    [[ "$status" == 4 ]] || result="$status"
  done
  [[ "$result" == 0 ]] || return "$result"
  [[ "$KEEP_STUDENTS" == 1 || "$dry_run" == 1 ]] || delete_students ${left[@]+"${left[@]}"}
}

# name_of ATTACK: what its stages at this point are called; naive is the point's own.
name_of() {
  if has_need own "$1"; then echo "$1"; elif [[ "$1" == naive ]]; then echo "$point"; else echo "${point}_$1"; fi
}

# student_of ATTACK: as name_of, of its student: that of naive where it is neither trained on other rows nor otherwise.
student_of() {
  if [[ "$recipes" =~ (^|$'\n')"$1"$'\t'(attack|distill)$'\t' ]]; then name_of "$1"; else name_of naive; fi
}

# Stages 4 and 5 of each attack: what it trains on, its student, and the student on the test problems.
want_students() {
  local attack
  for attack in "$@"; do
    between="=="
    want_student "$attack"
  done
}

want_student() {
  local attack="$1" name student published words
  name="$(name_of "$attack")" student="$(student_of "$attack")"
  published="$EXP_DIR/traces/train_${point:-own}.parquet"
  ! has_need own "$attack" || published="$EXP_DIR/traces/train_own.parquet"
  words_of "$attack" attack
  if has_need "samples [0-9]*" "$attack" && is_greedy; then
    echo "empty   attack_$name: greedy traces have no second sample"
    return 0
  elif [[ ${#words[@]} -gt 0 ]]; then
    want_stage "attack_$name" attack.py "${common[@]}" "traces=$published" "trace_name=attack_$name" \
      "samples=$EXP_DIR/traces/samples_${point:-}.parquet" "clean_traces=$EXP_DIR/traces/train_clean.parquet" \
      "holdout_traces=$holdout" "student=$STUDENT" "tokenizer=$STUDENT_TOKENIZER" \
      ${attack_args[@]+"${attack_args[@]}"} "${words[@]}"
    published="$EXP_DIR/traces/attack_$name.parquet"
  fi
  words_of "$attack" distill
  want_stage "student_$student" distill.py "${common[@]}" "student=$STUDENT" "tokenizer=$STUDENT_TOKENIZER" \
    "train_traces=$published" "holdout_traces=$holdout" "model_name=student_$student" \
    ${train_args[@]+"${train_args[@]}"} ${words[@]+"${words[@]}"}
  words_of "$attack" gentraces
  want_stage "eval_student_$name" gentraces.py "${problems[@]}" is_teacher=false \
    "teacher=$EXP_DIR/models/student_$student/final" "data_split=${DATASET}_test" tau=0 \
    "trace_name=eval_student_$name" ${words[@]+"${words[@]}"}
}

delete_students() {
  local attack folder
  for attack in "$@"; do
    folder="$EXP_DIR/models/student_$(student_of "$attack")/final"
    # a launcher may leave with 0 although a stage failed
    if [[ -d "$folder" && -f "$EXP_DIR/traces/eval_student_$(name_of "$attack").yaml" ]]; then
      in_python inputs.delete_student "$folder" || return
    fi
  done
}

# want_stage NAME SCRIPT key=value...: put a stage among those that run_wanted asks whether they are to be run.
want_stage() {
  asked+=(${asked[@]+"$between"} "$1" "$here/$2" "${@:3}")
  between="--"
}

# ask_stages: of what is asked for, a stage is skipped if its sidecar says that it is done with these settings, refused
# if it was done with others, else put among the wanted. chain.py --check tells that of all in one process, by a code
# each, and what else there is to know: that code has changed since, or what a stage waits for.
ask_stages() {
  local way=--check status=0 word stage=() number=0 codes=() notes=() code note answers
  [[ ${#asked[@]} -gt 0 ]] || return 0
  [[ "$dry_run" == 0 || -n "${checking:-}" ]] || way=--check-all
  answers="$(RANK=0 WORLD_SIZE="$NPROC" python "$here/chain.py" "$way" "${asked[@]}")" || status=$?
  while read -r code word note; do
    codes+=("$code") notes+=("$note")
  done <<<"$answers"
  for word in "${asked[@]}" --; do
    if [[ "$word" == -- || "$word" == == ]]; then
      tell_stage "${codes[$number]:-}" "${notes[$number]:-}" "${stage[@]}"
      stage=() number=$((number + 1))
    else
      stage+=("$word")
    fi
  done
  asked=()
  [[ "$status" == 0 || "$way" == --check-all ]] || return "$status"
}

# tell_stage CODE NOTE NAME SCRIPT key=value...: of one of those.
tell_stage() {
  local code="$1" note="$2" name="$3"
  local command=("${launch[@]}" "${@:4}")
  case "$code" in
    0) echo "done    $name${note:+ $note}" ;;
    3)
      if [[ "$dry_run" == 1 ]]; then
        echo "to do   $name: $(printf '%q ' "${command[@]}")${note:+ # $note}"
      else
        wanted+=(${wanted[@]+--} "${@:3}")
      fi
      ;;
    4) [[ -z "$note" ]] || echo "empty   $name: $note" ;; # what comes after it in its group is not spoken of
    "") ;; # not asked, after one that was refused
    *)
      echo "refused $name: see the error"
      [[ "$dry_run" == 0 ]] || refused=1
      ;;
  esac
}

# run_wanted LOG: ask, then run the stages that are to be run, one after another in one process; what they say goes to
# EXP_DIR/logs/LOG.log, and with one job to the terminal too.
run_wanted() {
  local log="$EXP_DIR/logs/$1.log" size=0 status=0 command
  wanted=() began=0
  ask_stages || return
  [[ ${#wanted[@]} -gt 0 ]] || return 0
  began=1
  command=("${launch[@]}" "$here/chain.py" "${wanted[@]}")
  ran=1
  [[ ! -f "$log" ]] || size="$(wc -c <"$log")"
  # in the background, as a trap waits for what runs in the foreground
  exec 8> >(tee -a "$log" | if [[ "$JOBS" == 1 ]]; then cat; else grep -a --line-buffered '^run '; fi)
  local writer="$!"
  "${command[@]}" </dev/null >&8 2>&1 8>&- &
  exec 8>&-
  wait "$!" || status=$?
  wait "$writer" 2>/dev/null || true
  [[ "$status" != 0 ]] || return 0
  show_failure "$log" "$size"
  return "$status"
}

# show_failure LOG SIZE: of what a stage wrote beyond SIZE bytes, the line that says why it failed comes last on the
# terminal. A launcher of several processes writes a report below it, and leaves with 1 whatever the stage's exit code.
show_failure() {
  local error code
  error="$(tail -c "+$(($2 + 1))" "$1" | find_reason)"
  if [[ -z "$error" ]]; then
    error="error: the processes of $1 ended with $status and no word why"
    [[ "$status" -le 128 ]] || error+=", by signal $((status - 128)) (9: often of a machine out of memory)"
  fi
  [[ "$JOBS" == 1 && "$(tail -n 1 "$1")" == "$error" ]] || echo "$error" >&2
  code="$(tail -c "+$(($2 + 1))" "$1" | sed -n 's/^ *exitcode *: *\(-\{0,1\}[0-9]\{1,\}\) .*/\1/p' | tail -n 1)"
  code="${code:-$status}"
  status=$((code < 0 ? 128 - code : code)) # the launcher writes signal 9 as -9
}

# Of the last stage in a log: the signal by which the process ended that the launcher reports, last, as root cause;
# else the first error line; else the end of the first traceback, of the process that failed first, and of those that
# follow from it. Lines of one of several processes may begin with [rank1]:, the launcher's own traceback does not;
# they may stand beside another's progress bar.
find_reason() {
  tr '\r' '\n' | LC_ALL=C awk '
    /^run     / { error = last = signal = ""; seen = inside = linked = 0 }
    { sub(/^.*\]error: /, "error: ") }
    /^(error|no row left): / && error == "" { error = $0 }
    / traceback : / { signal = /: Signal / ? substr($0, index($0, "Signal")) : "" }
    {
      rank = match($0, /^\[rank[0-9]+\]: ?/) ? substr($0, 1, RLENGTH) : ""
      line = substr($0, length(rank) + 1)
    }
    line ~ /^Traceback \(most recent call last\):/ {
      if (!seen || (linked && rank == first)) { seen = inside = 1; linked = 0; first = rank }
      next
    }
    seen && rank == first {
      if (inside && line ~ /^[^ ]/) { inside = 0; if (line !~ /(ChildFailed|CalledProcess)Error: /) last = line }
      if (line ~ /^(During handling of the above|The above exception was the direct cause)/) linked = 1
    }
    END {
      if (signal != "") print "error: " signal " (9: often of a machine out of memory)"
      else if (error != "") print error
      else if (last != "") print "error: " last " (unexpected: its traceback is above, and in the log)"
    }'
}

duration() {
  printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 % 3600 / 60)) $(($1 % 60))
}

finish_experiment() {
  local status=0 failed=()
  [[ -z "${refused:-}" ]] || status=2 # a dry run goes on, to show all of it
  if [[ "$dry_run" == 0 ]]; then
    python "$here/report.py" "$EXP_DIR" || status=1
    echo "total time $(duration "$SECONDS")"
    while read -r point; do failed+=("$point"); done < <(cat "$taken"/*/failed 2>/dev/null)
  fi
  if [[ ${#failed[@]} -gt 0 ]]; then
    echo "FAILED (${#failed[@]} of $num_points points; see $EXP_DIR/logs): ${failed[*]}" >&2
    status=1
  fi
  exit "$status"
}

main "$@" # which exits: bash has read the whole file by now, and it may be edited while this runs
