# The one environment step: `source setup.sh [EXTRAS]` (EXTRAS of pyproject.toml, such as test or flash,test).
# Uses the active virtual environment, else .venv, else makes .venv; installs the project with constraints.txt;
# does nothing when that has been done for these very files. SKIP_SETUP=1 takes the environment as it is.

setup_environment() {
  local root extras="${1:-}" python="${PYTHON:-python3}" wanted stamp prefix
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
  [[ "${SKIP_SETUP:-0}" == 1 ]] && return 0

  prefix="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
  if [[ -z "$prefix" ]]; then
    prefix="$root/.venv"
    if [[ ! -x "$prefix/bin/python" ]]; then
      if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
        echo "setup.sh: $python is missing or not Python 3.10-3.13; set PYTHON=/path/to/python3.11" >&2
        return 2
      fi
      echo "setup.sh: making $prefix" >&2
      "$python" -m venv "$prefix" || { rm -rf "$prefix"; return 2; }
    fi
    # shellcheck disable=SC1091
    source "$prefix/bin/activate"
  fi

  wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
  stamp="$prefix/.ads_setup_${extras:-base}"
  [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && return 0
  echo "setup.sh: installing into $prefix" >&2
  "$prefix/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/constraints.txt" --editable "$root${extras:+[$extras]}" >&2 || return 2
  printf '%s' "$wanted" >"$prefix/.ads_setup_base"
  printf '%s' "$wanted" >"$stamp"
}

setup_environment "$@" || { echo "setup.sh: the environment could not be made" >&2; return 2 2>/dev/null || exit 2; }
