# shellcheck shell=bash
# The one environment step: `source setup.sh [EXTRAS]` (EXTRAS of pyproject.toml, such as test or flash,test).
# Uses the active virtual environment, else .venv, else makes .venv, and puts it first on PATH; installs the project
# with constraints.txt; does nothing when that has been done for these very files. An environment that uv made, or one
# without pip, is filled by uv, any other by pip. SKIP_SETUP=1 takes the environment as it is.

setup_environment() {
  local root extras="${1:-}" prefix wanted stamp
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
  [[ "${SKIP_SETUP:-0}" == 1 ]] && return 0

  prefix="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
  if [[ -z "$prefix" ]]; then
    prefix="$root/.venv"
    one_at_a_time make_environment || return 2
    export VIRTUAL_ENV="$prefix"
  fi
  if ! is_suitable "$prefix/bin/python"; then
    echo "setup.sh: $prefix has no Python 3.10-3.13: activate another environment or, for one of our own, none" >&2
    return 2
  fi
  [[ "$(command -v python)" == "$prefix/bin/python" ]] || export PATH="$prefix/bin:$PATH"
  unset PYTHONHOME
  hash -r

  wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
  stamp="$prefix/.ads_setup_${extras:-base}"
  one_at_a_time install_project || return 2
}

# Two runs at once, of a job array for one, share the checkout and its environment.
one_at_a_time() {
  (flock 9 2>/dev/null || true; "$@") 9<"$root/pyproject.toml"
}

make_environment() {
  # `python -m venv` writes bin/activate last, without which a Ctrl-C came between; without pyvenv.cfg its python
  # would install into the system's
  if [[ -e "$prefix" ]] && ! { [[ -f "$prefix/pyvenv.cfg" && -f "$prefix/bin/activate" ]] &&
    "$prefix/bin/python" -c ""; } 2>/dev/null; then
    echo "setup.sh: $prefix is not complete: making it anew" >&2
    rm -rf "$prefix"
  fi
  [[ ! -e "$prefix" ]] || return 0
  echo "setup.sh: making $prefix" >&2
  if command -v uv >/dev/null; then
    uv venv --quiet --project "$root" ${PYTHON:+--python "$PYTHON"} "$prefix" >&2
  elif is_suitable "${PYTHON:-python3}"; then
    "${PYTHON:-python3}" -m venv "$prefix" || { rm -rf "$prefix"; return 2; }
  else
    echo "setup.sh: ${PYTHON:-python3} is missing or not Python 3.10-3.13; set PYTHON=/path/to/python3.11" >&2
    return 2
  fi
}

is_suitable() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

install_project() {
  [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && return 0
  local install python="$prefix/bin/python"
  choose_installer || return 2
  echo "setup.sh: installing into $prefix" >&2
  "${install[@]}" --quiet --constraint "$root/constraints.txt" --editable "$root${extras:+[$extras]}" >&2 || return 2
  printf '%s' "$wanted" >"$prefix/.ads_setup_base"
  printf '%s' "$wanted" >"$stamp"
}

choose_installer() {
  local has_pip=0
  ! "$python" -c 'import pip' 2>/dev/null || has_pip=1
  install=("$python" -m pip install --disable-pip-version-check)
  if [[ "$has_pip" == 0 ]] || grep -q '^uv = ' "$prefix/pyvenv.cfg" 2>/dev/null; then
    if command -v uv >/dev/null; then
      install=(uv pip install --python "$python")
    elif [[ "$has_pip" == 0 ]] && ! "$python" -m ensurepip >/dev/null 2>&1; then
      echo "setup.sh: $prefix has no pip, and uv is not on PATH: install uv, or make another environment" >&2
      return 2
    fi
  fi
}

# The last command's exit code is that of `source`, and of `bash setup.sh`.
setup_environment "$@" || { echo "setup.sh: the environment could not be made" >&2; (exit 2); }
