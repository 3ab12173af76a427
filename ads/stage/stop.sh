# shellcheck shell=bash
# Sourced by the pipelines. At a signal they stop with all that they started; a stage that was interrupted is no failed
# grid point, and the next run goes on there. Exit codes are those of the scripts (ads/stage/signals.py).

trap_signals() {
  trap 'stop 130' INT
  trap 'stop 143' TERM USR1 # by USR1, schedulers warn
  trap 'stop 129' HUP
}

# attend COMMAND...: run it as a child that a signal stops. A trap waits for what runs in the foreground, and a signal
# to this script alone, as of a scheduler, does not reach that.
attend() {
  "$@" &
  wait "$!"
}

# stop CODE: end what runs in the background, which the terminal's Ctrl-C does not reach, and leave.
# shellcheck disable=SC2329 # the traps call it
stop() {
  trap '' INT TERM USR1 HUP
  exec 8>&- # pipeline.sh's pipe to a log: `wait` waits for its reader too, which ends when nobody holds it open
  local running
  for _ in 1 2 3 4 5; do # one that has just been started may miss the first
    running="$(jobs -pr)"
    [[ -n "$running" ]] || break
    # shellcheck disable=SC2086 # one word per process
    kill $running 2>/dev/null || true
    sleep 0.2
  done
  wait
  exit "$1"
}

trap_signals
