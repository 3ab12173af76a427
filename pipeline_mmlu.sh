#!/usr/bin/env bash
# The experiment on MMLU; same settings and options as pipeline.sh.
export DATASET=mmlu
export EXP_DIR="${EXP_DIR-runs/mmlu}"
export GEN_ARGS="max_samples=2880 max_length=2048 max_prompt_length=512 ${GEN_ARGS:-}"
export HOLDOUT_ARGS="max_samples=5120 max_length=1024 ${HOLDOUT_ARGS:-}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/pipeline.sh" "$@"
