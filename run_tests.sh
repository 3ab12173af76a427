#!/usr/bin/env bash
# Set up the environment and run the tests, two files at a time: bash run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh test
python -m pytest -n 2 --dist loadfile "$@"
