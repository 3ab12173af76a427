#!/usr/bin/env bash
# The experiment on MATH; same settings and options as pipeline.sh.
export DATASET=hendrycks_math
export EXP_DIR="${EXP_DIR-runs/math}"
export GEN_ARGS="max_samples=2880 max_length=2048 max_prompt_length=1024 ${GEN_ARGS:-}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/pipeline.sh" "$@"
