#!/usr/bin/env bash
# The experiment on small real models (docs/small.md): on a GPU of 24 GB GSM8K with models of 0.4 to 1.5 billion
# parameters, about a day; on a CPU, or with DATASET=word_problems, word problems in ordinary language with a model of
# 0.1 billion. A teacher that cannot do the task is trained first, on reference solutions of other problems. Then
# pipeline.sh runs the grid, search.py finds points of equal teacher accuracy, and pipeline.sh runs the attackers there.
#
#   bash pipeline_small.sh                                       models of the hub
#   TEACHER=my/teacher STUDENT=my/student bash pipeline_small.sh     folders: no hub is asked
#   bash pipeline_small.sh --dry-run                             print every stage and whether it is done
#   MACHINE=gpu bash pipeline_small.sh --dry-run                 what a machine with a GPU would run
#
# Settings, besides those of pipeline.sh, all of the environment (defaults: below):
#   MACHINE         gpu or cpu; empty: gpu where there is one
#   NUM_PROBLEMS    of training, holdout and test each; of GSM8K at most
#   TEACHER_LEAST   share of holdout problems that a teacher has to get right; 0: any will do, none is trained
#   TEACHER_PROBLEMS, TEACHER_ARGS, TEACHER_DIR   problems it is asked, settings of distill.py, where it is kept
#   MATCH, SEARCH_ARGS   teacher accuracy at which ATTACKS are compared (empty: nowhere), settings of search.py
#   ATTACK_POINTS   words for grid.py: compare them at these points, and search for none
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

fail() {
  echo "pipeline_small.sh: $1" >&2
  exit 2
}

has_gpu() {
  [[ -n "${CUDA_VISIBLE_DEVICES-all}" && ! "${ACCELERATE_USE_CPU:-}" =~ ^(1|true|yes)$ ]] &&
    [[ "$(nvidia-smi -L 2>/dev/null)" == GPU* || -e /dev/nvidia0 ]]
}

choose_settings() {
  MACHINE="${MACHINE:-$(if has_gpu; then echo gpu; else echo cpu; fi)}"
  case "$MACHINE" in
    gpu) export DATASET="${DATASET:-gsm8k}" ;;
    cpu) export DATASET="${DATASET:-word_problems}" NPROC="${NPROC:-1}" ACCELERATE_USE_CPU=true ;;
    *) fail "MACHINE='$MACHINE': must be gpu or cpu" ;;
  esac
  if [[ "$MACHINE" == cpu || "$DATASET" == word_problems ]]; then settings_of_tiny_models; else settings_of_24_gb; fi
  EXP_DIR="${EXP_DIR-runs/small}"
  [[ -n "$EXP_DIR" ]] || fail "EXP_DIR is empty: give a folder, or unset it for the default one"
  export EXP_DIR="${EXP_DIR/#\~\//$HOME/}" SEED="${SEED:-1}"
  ATTACK_POINTS="${ATTACK_POINTS:-}" # such as --file EXP_DIR_OF_ANOTHER_SEED/matched.txt
  TEACHER_PROBLEMS="${TEACHER_PROBLEMS:-200}"
  TEACHER_DIR="${TEACHER_DIR:-$EXP_DIR/teacher}" # experiments of other seeds may share it
  TEACHER_ARGS="max_samples=10000 lora=false lr=5e-4 num_epochs=1 ${TEACHER_ARGS:-}"
  export GEN_ARGS="max_samples=$NUM_PROBLEMS $GEN_ARGS"
}

# Nothing of it is gated. Qwen2.5-0.5B shares the teacher's tokenizer; the student's instruct sibling has a chat template.
settings_of_24_gb() {
  export TEACHER="${TEACHER:-Qwen/Qwen2.5-1.5B-Instruct}"
  export PROXY_STUDENT="${PROXY_STUDENT:-Qwen/Qwen2.5-0.5B}"
  if [[ -z "${STUDENT:-}" ]]; then
    export STUDENT=HuggingFaceTB/SmolLM2-360M
    export STUDENT_TOKENIZER="${STUDENT_TOKENIZER:-HuggingFaceTB/SmolLM2-360M-Instruct}"
  fi
  NUM_PROBLEMS="${NUM_PROBLEMS:-5231}" TEACHER_LEAST="${TEACHER_LEAST:-0.6}" MATCH="${MATCH-0.55}"
  export GEN_ARGS="max_length=768 max_prompt_length=384 ${GEN_ARGS:-}"
  export FEW_SHOT_ARGS="${FEW_SHOT_ARGS-few_shot=4 max_prompt_length=1664 max_length=2048}"
  export GRID_ARGS="${GRID_ARGS:---points
    0.6,0,0 1.0,0,0 1.4,0,0 1.8,0,0 2.2,0,0
    0.6,0.005,0 0.6,0.01,0 0.6,0.02,0 0.6,0.03,0 0.6,0.045,0 0.6,0.06,0
    0.6,0.2,0,poe 0.6,0.5,0,poe 0.6,1.0,0,poe
    0.6,-0.01,0 0.6,-0.02,0 0.6,-0.04,0
    0.6,0.2,0,corrupt 0.6,0.4,0,corrupt 0.6,0.7,0,corrupt}"
  ATTACKS="${ATTACKS-naive correct mix25 repair}"
  SEARCH_ARGS="rule=raw max_evaluations=12 arms=ads,poe,temperature ${SEARCH_ARGS:-}"
}

# One model in all roles is the default, since other small ones are gated or have another chat format (docs/small.md).
settings_of_tiny_models() {
  export TEACHER="${TEACHER:-HuggingFaceTB/SmolLM2-135M-Instruct}"
  export PROXY_STUDENT="${PROXY_STUDENT:-$TEACHER}" STUDENT="${STUDENT:-$TEACHER}"
  NUM_PROBLEMS="${NUM_PROBLEMS:-300}" TEACHER_LEAST="${TEACHER_LEAST:-0.8}" MATCH="${MATCH-0.7}"
  # No forced answers: a teacher trained on solutions has never seen the words that force one.
  export GEN_ARGS="max_length=320 max_prompt_length=192 answer_force=false ${GEN_ARGS:-}"
  export FEW_SHOT_ARGS="${FEW_SHOT_ARGS-few_shot=3 max_prompt_length=704 max_length=832}" PREFILL="${PREFILL-auto}"
  export TRAIN_ARGS="num_epochs=4 lr=2e-3 batch_size=8 do_eval=false lora_r=32 lora_alpha=32 ${TRAIN_ARGS:-}"
  export GRID_ARGS="${GRID_ARGS:---points
    0.6,0,0 2.0,0,0 2.4,0,0
    0.6,0.04,0 0.6,0.052,0
    0.6,2,0,poe 0.6,3,0,poe
    0.6,-0.06,0 0.6,-0.085,0
    0.6,0.07,0,corrupt 0.6,0.15,0,corrupt}"
  ATTACKS="${ATTACKS-naive correct mix25 repair}"
  SEARCH_ARGS="rule=raw max_samples=150 tolerance=0.03 max_evaluations=10 arms=ads,poe,temperature ${SEARCH_ARGS:-}"
}

# The settings that no later stage checks before hours have passed.
check_settings() {
  [[ "$NUM_PROBLEMS" =~ ^[1-9][0-9]*$ ]] || fail "NUM_PROBLEMS='$NUM_PROBLEMS': must be a whole number from 1"
  [[ "$TEACHER_PROBLEMS" =~ ^[1-9][0-9]*$ ]] || fail "TEACHER_PROBLEMS='$TEACHER_PROBLEMS': must be a whole number from 1"
  is_share "$TEACHER_LEAST" || fail "TEACHER_LEAST='$TEACHER_LEAST': must be a share from 0 to 1"
  [[ -z "$MATCH" ]] || is_share "$MATCH" || fail "MATCH='$MATCH': must be a share from 0 to 1, or empty"
  [[ "$MACHINE" != gpu || "$dry_run" == 1 || -n "${NPROC:-}${LAUNCH:-}" ]] || has_gpu ||
    fail "MACHINE=gpu: there is none here (or CUDA_VISIBLE_DEVICES or ACCELERATE_USE_CPU hides it); unset MACHINE, or add --dry-run"
  read -r -d '' -a attacks <<<"$ATTACKS" || true
  in_python recipes.print_recipe ${attacks[@]+"${attacks[@]}"} >/dev/null || exit 2
  [[ -z "$MATCH" ]] || in_python "(lambda *words: search.parse(words))" "targets=$MATCH" ${search_args[@]+"${search_args[@]}"} >/dev/null || exit 2
  check_points "$GRID_ARGS"
  check_points "$ATTACK_POINTS"
}

check_points() {
  local words
  read -r -d '' -a words <<<"$1" || true
  python "$here/grid.py" ${words[@]+"${words[@]}"} >/dev/null || exit 2
}

is_share() { [[ "$1" =~ ^(0|1|1\.0*|0?\.[0-9]+|0\.)$ ]]; }

# in_python FUNCTION WORDS...: one of ads/; what it gives is printed.
in_python() {
  PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" python -c "import search, utils; from ads.attacks import recipes; from ads.stage import ability
utils.run_script(lambda words: (found := $1(*words)) is None or print(found))" "${@:2}"
}

# Measures the teacher on holdout problems; where it is not able, trains one and measures that. What this takes and
# finds is in TEACHER_DIR, an experiment's folder of its own, always with seed 1.
find_teacher() {
  [[ "$(in_python ability.is_any "$TEACHER_LEAST")" == False ]] || return 0
  local made="$TEACHER_DIR/models/teacher/final"
  record_commits
  measure_teacher given "$TEACHER"
  if [[ "$able" != yes ]]; then
    [[ "$DATASET" == word_problems || "$able" == unknown ]] ||
      fail "$told, where TEACHER_LEAST=$TEACHER_LEAST is wanted: give a better TEACHER, lower TEACHER_LEAST, or take DATASET=word_problems, for which one is trained"
    if [[ "$DATASET" == word_problems ]]; then
      [[ "$dry_run" == 1 || -f "$TEACHER_DIR/models/teacher.yaml" ]] || check_stages
      run_stage teacher distill.py "student=$TEACHER" solutions=word_problems_pretrain do_eval=false \
        model_name=teacher "${teacher_args[@]}"
      measure_teacher trained "$made"
      [[ "$able" != no ]] ||
        fail "$told after training, where TEACHER_LEAST=$TEACHER_LEAST is wanted: train it for longer (TEACHER_ARGS), give a better TEACHER, or lower TEACHER_LEAST"
      export TEACHER="$made"
    fi
  fi
  unset HUB_RECORD
}

# The settings of pipeline.sh, by a dry run in a new folder: a mistake is better found before the teacher's hour.
check_stages() {
  local status=0 said
  empty="$(mktemp -d)"
  trap 'rm -rf "$empty"' EXIT
  mkdir "$empty/x"
  [[ ! -f "$HUB_RECORD" ]] || cp "$HUB_RECORD" "$empty/x/hub.yaml" # at the same commits
  said="$(EXP_DIR="$empty/x" ATTACKS="$ATTACKS" GRID_ARGS="--points 0.6,0,0" bash "$here/pipeline.sh" --dry-run 2>&1 >/dev/null)" ||
    status=$?
  [[ "$status" != 0 ]] || return 0
  grep -m 1 -E '^(error|pipeline.sh): ' <<<"$said" >&2 || echo "$said" >&2 # of stages that share it, once
  exit "$status"
}

# The teacher is measured at the commits of the hub that the experiment then takes; a dry run records them in a copy.
record_commits() {
  export HUB_RECORD="$EXP_DIR/hub.yaml"
  if [[ "$dry_run" == 0 ]]; then
    mkdir -p -- "$EXP_DIR" || fail "EXP_DIR='$EXP_DIR' is not writable"
    return
  fi
  copy="$(mktemp -d)"
  trap 'rm -rf "$copy"' EXIT
  [[ ! -f "$HUB_RECORD" ]] || cp "$HUB_RECORD" "$copy"
  HUB_RECORD="$copy/hub.yaml"
}

# measure_teacher NAME MODEL: into `able` yes, no, or unknown in a dry run, into `told` how many it got right.
measure_teacher() {
  run_stage "$1" gentraces.py "teacher=$2" "data_split=${DATASET}_holdout" tau=0 "trace_name=$1" \
    ${DATA_DIR:+"data_dir=$DATA_DIR"} "${gen_args[@]}" "max_samples=$TEACHER_PROBLEMS"
  able=unknown told=""
  [[ -f "$TEACHER_DIR/traces/$1.yaml" ]] || return 0
  read -r able told <<<"$(in_python ability.judge "$TEACHER_DIR/traces/$1.yaml" "$TEACHER_LEAST")"
  echo "teacher $1: $told (TEACHER_LEAST=$TEACHER_LEAST)"
}

# run_stage NAME SCRIPT key=value...: of the teacher; a stage that is done says so by itself.
run_stage() {
  local command=(python "$here/$2" "exp_dir=$TEACHER_DIR" seed=1 "${@:3}") status=0
  if [[ "$dry_run" == 0 ]]; then
    echo "run     $1 ($(date '+%F %T')): $(printf '%q ' "${command[@]}")"
    attend "${command[@]}" || stop_at_stage "$?"
    return 0
  fi
  RANK=0 WORLD_SIZE=1 "${command[@]}" --check >/dev/null || status=$?
  case "$status" in
    0) echo "done    $1" ;;
    3) echo "to do   $1: $(printf '%q ' "${command[@]}")" ;;
    *) stop_at_stage "$status" ;;
  esac
}

stop_at_stage() {
  [[ "$1" != 2 || "$is_default" == 0 ]] ||
    echo "pipeline_small.sh: without a hub give folders of your own: TEACHER=path STUDENT=path, and PROXY_STUDENT=path with the teacher's tokenizer" >&2
  exit "$1"
}

# The grid with one attacker, then all of them at the points given, or at one accuracy of the teacher. Failed points
# leave the rest.
run_grid() {
  local status=0 result=0
  ATTACKS=naive attend bash "$here/pipeline.sh" "$@" || status=$?
  [[ "$status" -lt 2 && -n "$MATCH$ATTACK_POINTS" ]] || exit "$status"
  if [[ -z "$ATTACK_POINTS" ]]; then
    find_points
    ATTACK_POINTS="--file $EXP_DIR/matched.txt"
    if ! grep -qs '^[^#]' "$EXP_DIR/matched.txt"; then
      echo "then    the attackers $ATTACKS at the points of $EXP_DIR/matched.txt, when it is there"
      exit "$((result > status ? result : status))"
    fi
  fi
  ATTACKS="$ATTACKS" GRID_ARGS="$ATTACK_POINTS" attend bash "$here/pipeline.sh" "$@" || result=$?
  exit "$((result > status ? result : status))"
}

# Into EXP_DIR/matched.txt, and into `result` 1 if a target was not hit: the other points are there.
find_points() {
  local words=() word
  for word in "${gen_args[@]}"; do # the search sets it
    [[ "$word" == max_samples=* ]] || words+=("$word")
  done
  local command=(python "$here/search.py" "exp_dir=$EXP_DIR" "targets=$MATCH" "data_split=${DATASET}_train" "${search_args[@]}"
    -- "teacher=$TEACHER" "proxy_student=$PROXY_STUDENT" "grad_path=$EXP_DIR/student_grads.safetensors" "seed=$SEED"
    ${DATA_DIR:+"data_dir=$DATA_DIR"} "${words[@]}")
  echo "$([[ "$dry_run" == 1 ]] && echo 'then   ' || echo 'run    ') search: $(printf '%q ' "${command[@]}")"
  if [[ "$dry_run" == 0 ]]; then
    HUB_RECORD="$EXP_DIR/hub.yaml" attend "${command[@]}" || result=$?
    [[ "$result" -lt 2 ]] || exit "$result"
  fi
}

dry_run=0
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=1 ;;
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
    *) fail "unknown argument '$argument': known are --dry-run and --help; settings are environment variables" ;;
  esac
done
is_default=$([[ -n "${TEACHER:-}" && -n "${STUDENT:-}" ]] && echo 0 || echo 1)
choose_settings
# shellcheck source=ads/stage/stop.sh
source "$here/ads/stage/stop.sh"
# shellcheck source=setup.sh
source "$here/setup.sh" ""
read -r -d '' -a gen_args <<<"$GEN_ARGS" || true
read -r -d '' -a teacher_args <<<"$TEACHER_ARGS" || true
read -r -d '' -a search_args <<<"$SEARCH_ARGS" || true
check_settings
find_teacher
run_grid "$@"
