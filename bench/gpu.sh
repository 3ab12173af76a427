#!/usr/bin/env bash
# What this GPU does with the experiment, in 30 minutes at most: random weights of the paper's sizes, no download.
#
#   bash bench/gpu.sh          one GPU of 80 GB; a table, and one line of JSON to send to whoever asks
#   bash bench/gpu.sh --tiny   the same on a CPU with tiny models: that all of it runs
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../setup.sh
source "$here/../setup.sh" ""
exec python "$here/gpu.py" "$@"
