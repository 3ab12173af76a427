#!/usr/bin/env bash
# The whole experiment on the tiny models in demo/models and generated word problems: minutes on a CPU, no GPU, no
# network beyond the package index. The same stages, scripts and files as pipeline.sh.
#
#   bash pipeline_demo.sh              one seed: 12 grid points, four of which with attackers
#   SEEDS=5 bash pipeline_demo.sh      five seeds, as published: fresh problems, fresh random numbers, 18 points each
#   FULL=1 bash pipeline_demo.sh       one seed with all of these points and attackers
#   bash pipeline_demo.sh --help       this text, and that of pipeline.sh with the settings of the demo
#
# Students of GRID_ARGS copy the traces as they are; then each point of MATRIX_ARGS gets a student of each of ATTACKS.
# Given GRID_ARGS alone, these are the points of ATTACKS, as in pipeline.sh.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

SEEDS="${SEEDS:-1}"
export DATASET=arithmetic
export TEACHER="$here/demo/models/teacher" PROXY_STUDENT="$here/demo/models/proxy" STUDENT="$here/demo/models/student"
export NPROC=1 OMP_NUM_THREADS=1 # at this size processes help and threads do not
# Results should not hang on having a GPU. ACCELERATE_USE_CPU=false JOBS=12 runs it on one all the same, in float32.
export ACCELERATE_USE_CPU="${ACCELERATE_USE_CPU:-true}"
float32="dtype=float32"
[[ "$ACCELERATE_USE_CPU" == false ]] || float32=""
# No forced answers: the models of the demo have never seen the words that force one, and answer them at random.
export GEN_ARGS="max_length=200 max_prompt_length=100 batch_size=300 top_k=0 top_p=1 answer_force=false $float32 ${float32:+proxy_$float32} ${GEN_ARGS:-}"
export TRACE_ARGS="${TRACE_ARGS:-num_contrasts=8 one_step=0.1}"
export GRAD_ARGS="batch_size=30 ${GRAD_ARGS:-}" ATTACK_ARGS="$float32 ${ATTACK_ARGS:-}"
export TRAIN_ARGS="lora=false lr=3e-3 num_epochs=3 per_device_batch_size=16 do_eval=false ${float32} ${TRAIN_ARGS:-}"
# What the undistilled student reaches when it is asked in other ways. Prompts with worked problems are longer.
export FEW_SHOT_ARGS="${FEW_SHOT_ARGS-few_shot=2 max_length=400 max_prompt_length=300}" PREFILL="${PREFILL-start with}"
[[ -n "${GRID_ARGS:-}" ]] || MATRIX_ARGS="${MATRIX_ARGS---points 0.4,6.2,0 0.4,7.4,0 1.3,0,0 1.4,0,0}"
matrix="${MATRIX_ARGS:-}" attacks="${ATTACKS:-}"
FULL="${FULL:-$([[ "$SEEDS" == 1 ]] && echo 0 || echo 1)}"
more_points="1.0,0,0 0.4,6.8,0 0.4,-8,0 0.4,80,0,random,2 0.4,80,0,random,3 0.4,0.4,0,corrupt"
more_attacks=mask10
[[ "$FULL" == 1 ]] || more_points="" more_attacks=""
if [[ -n "$matrix" ]]; then
  attacks="${ATTACKS:-naive correct mix25 repair $more_attacks prefill solo solo_repair}"
  ATTACKS=naive
fi
export ATTACKS="${ATTACKS:-naive}"
export GRID_ARGS="${GRID_ARGS:---points
  0.4,0,0 1.2,0,0 1.3,0,0 1.4,0,0
  0.4,4,0 0.4,5.5,0 0.4,6.2,0 0.4,7.4,0
  0.4,-7,0 0.4,-9,0 0.4,80,0,random,1 0.4,0.7,0,corrupt $more_points}"

# The first seed's experiment is the folder itself; its report/ shows all seeds.
case "${1:-}" in
  -h | --help)
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    EXP_DIR="${EXP_DIR-runs/demo}" SEED="${SEED:-1}" exec bash "$here/pipeline.sh" --help
    ;;
esac
demo_dir="${EXP_DIR-runs/demo}" first="${SEED:-1}" status=0
[[ "$SEEDS" =~ ^[1-9][0-9]*$ && "$first" =~ ^[0-9]+$ ]] || {
  echo "pipeline_demo.sh: SEEDS='$SEEDS', SEED='$first': must be whole numbers, SEEDS from 1" >&2
  exit 2
}
[[ "$FULL" =~ ^[01]$ ]] || {
  echo "pipeline_demo.sh: FULL='$FULL': must be 1 (all points and attackers) or 0" >&2
  exit 2
}
# shellcheck source=ads/stage/stop.sh
source "$here/ads/stage/stop.sh"
# shellcheck source=setup.sh
source "$here/setup.sh" ""
export JOBS="${JOBS:-$(cd "$here" && python -c 'from ads.stage.machine import num_cpus; print(num_cpus())')}"
folders=()
for ((seed = first; seed < first + SEEDS; seed++)); do
  folder="$demo_dir"
  [[ "$seed" == "$first" ]] || folder="$demo_dir/seed$seed"
  folders+=("$folder")
  echo "=== seed $seed: $((seed - first + 1)) of $SEEDS, about $((9 + 5 * FULL)) minutes each on 2 cores"
  EXP_DIR="$folder" SEED="$seed" attend bash "$here/pipeline.sh" "$@" || status=$?
  [[ "$status" -lt 2 ]] || exit "$status" # 1: some grid point failed
  [[ -n "$matrix" ]] || continue
  EXP_DIR="$folder" SEED="$seed" GRID_ARGS="$matrix" ATTACKS="$attacks" attend bash "$here/pipeline.sh" "$@" || status=$?
  [[ "$status" -lt 2 ]] || exit "$status"
done
if [[ "$SEEDS" -gt 1 && $# == 0 ]]; then
  python "$here/report.py" "${folders[@]}" || status=1
fi
exit "$status"
