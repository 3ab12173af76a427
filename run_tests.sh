#!/usr/bin/env bash
# Set up the environment and run the tests: bash run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh test
python -m pytest "$@"
