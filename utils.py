"""What every script needs: beginning and running its stage, exit codes and one-line errors, its result."""

import contextlib
import errno
import io
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ads.stage import errors, files, hub, layout, signals
from ads.stage.config import ignored_keys, load_config, native_setting, to_dict
from ads.stage.errors import UserError
from ads.stage.inputs import check_not_deleted
from ads.stage.sidecar import (
    Record,
    is_finished,
    made_at_unknown_commits,
    made_by_other_code,
    open_parts,
    read_sidecar,
    write_sidecar,
)
from ads.stage.world import (
    World,
    check_launcher,
    exit_at_once,
    has_joined,
    is_main_process,
    leave_world,
    print0,
    start_world,
    world_size,
)

ROOT = Path(__file__).resolve().parent
FAILED = 1  # exit code of a fault of the machine
REFUSED = 2  # exit code of what a user can mend
NOT_DONE = 3  # exit code of --check for a stage that is still to be done
NO_ROWS = 4  # exit code of a stage that is done and has made no row for others to read


def begin_stage(
    config_class: type[Any],
    default_yaml: str,
    fingerprint_inputs: Callable[[Any], Record],
    arguments: list[str],
) -> tuple[Any, Record]:
    """(config, input fingerprints) of a stage that is still to be done, its folder made.

    Exits with 0 when the stage is done already, NoRowsError where it made no row; with --check among the
    arguments, with NOT_DONE when it is not (its inputs need not be there yet).
    """
    show_help(arguments, default_yaml)
    only_check, arguments = "--check" in arguments, [a for a in arguments if a != "--check"]
    cfg = load_config(config_class, ROOT / default_yaml, arguments)
    native_setting()
    hub.read_commits(cfg.exp_dir)
    try:
        inputs = fingerprint_inputs(cfg)
    except errors.NotMadeError as error:
        if not only_check:
            raise
        print0(f"waits: {error}")
        sys.exit(NOT_DONE)
    finally:  # by itself --check writes nothing
        if os.environ.get("HUB_RECORD") and is_main_process():
            hub.record_commits(cfg.exp_dir)
    # Of several processes one might see the stage done and leave while another waits: they look once joined.
    if (only_check or world_size() == 1) and is_stage_finished(cfg, inputs, only_check):
        if reason := why_no_rows(cfg):
            raise errors.NoRowsError(reason)
        sys.exit(0)
    if only_check:
        sys.exit(NOT_DONE)
    check_launcher()
    prepare_exp_dir(cfg.exp_dir)
    if is_main_process():
        hub.record_commits(cfg.exp_dir)
    return cfg, inputs


def show_help(arguments: list[str], default_yaml: str | None = None) -> None:
    """Where --help is all that is asked: print the script's docstring and its keys, and leave."""
    if arguments in (["--help"], ["-h"]):
        text = [sys.modules["__main__"].__doc__ or ""]
        if default_yaml:
            text += [
                f"Keys, as {default_yaml} has them:\n",
                (ROOT / default_yaml).read_text(encoding="utf-8"),
            ]
        print("\n".join(text).strip())
        sys.exit(0)


def is_stage_finished(cfg: Any, inputs: Record, only_check: bool = False) -> bool:
    """Whether the stage is done with these settings and inputs, which is said; clears away what a kill left.

    only_check: the exit code tells that, and nothing is said but what there is to know besides.
    """
    if not is_finished(cfg.sidecar_path, to_dict(cfg), inputs, ignored_keys(cfg)):
        check_not_deleted(inputs)
        return False
    notes = made_at_unknown_commits(cfg.sidecar_path, inputs) + made_by_other_code(cfg.sidecar_path)
    if notes or not only_check:
        print0(notes.strip() if only_check else f"{cfg.sidecar_path} is there: nothing to do{notes}")
    if is_main_process():
        for path in cfg.leftovers:
            shutil.rmtree(path, ignore_errors=True)
    return True


def run_stage(cfg: Any, inputs: Record, make: Callable[[Any, Record, World], None]) -> None:
    """make(cfg, inputs, world) with all processes joined and the stage's lock held by the main one.

    Where another run held the lock, the stage may be done by now.
    """
    world = start_world()
    world.check_same(inputs)
    name = "-".join(cfg.sidecar_path.with_suffix("").relative_to(cfg.exp_dir).parts)
    with files.stage_lock(cfg.exp_dir, name) if world.is_main else contextlib.nullcontext():
        world.barrier()
        # one verdict for all: another machine may see a file that has just been written late
        if not world.ask_main(is_stage_finished, cfg, inputs):
            make(cfg, inputs, world)
        world.barrier()
    if reason := world.ask_main(why_no_rows, cfg):
        raise errors.NoRowsError(reason)


def begin_parts(cfg: Any, folder: Path, inputs: Record, world: World) -> None:
    """Prepare the folder of unfinished work; UserError if what it holds was made in another way."""
    world.ask_main(open_parts, folder, to_dict(cfg), inputs, ignored_keys(cfg))


def rows_in_parts(parts_dir: Path, num_rows: int, world: World) -> set[str]:
    """The ids of the rows, of num_rows, that an earlier run has stored, as the main process finds them."""
    done = world.share(set(files.read_parts(parts_dir)) if world.is_main else None)
    if done:
        print0(f"{len(done)} of {num_rows} rows are there from an earlier run")
    return done


def finish_stage(
    cfg: Any, kind: str, made: Path, inputs: Record, stats: Record, start: float, *outputs: Path, **more: Any
) -> None:
    """Registry, sidecar (last), and only then away with what a finished stage no longer needs.

    kind: the registry, trace or model; made: what its line is about; start: when the stage began.
    """
    entry = {"name": made.name, "path": str(made), "config": to_dict(cfg), "stats": stats}
    files.append_jsonl(layout.path_of("registry", cfg.exp_dir, kind), entry)
    write_sidecar(cfg.sidecar_path, to_dict(cfg), inputs, stats, time.time() - start, outputs, **more)
    for path in cfg.leftovers:
        shutil.rmtree(path)


def why_no_rows(cfg: Any) -> str | None:
    """Why a finished stage made no row, as its sidecar says; None where it made some."""
    return read_sidecar(cfg.sidecar_path)["stats"].get("reason")


def prepare_exp_dir(exp_dir: str | Path) -> None:
    """Make the experiment's folder; UserError when it cannot be written to."""
    try:
        Path(exp_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"exp_dir={exp_dir}: cannot be made ({error.strerror}); choose another") from error
    if not os.access(exp_dir, os.W_OK):
        raise UserError(f"exp_dir={exp_dir}: not writable; choose another")


def run_script(main: Callable[[list[str]], object]) -> None:
    """Run a script's main() and leave with the right exit code.

    2 and one line: UserError. 4 and one line: NoRowsError. 1 and one line: a fault of the machine (see
    `explain_fault`). 130, 143, 129: stopped by SIGINT, by SIGTERM or SIGUSR1, by SIGHUP. All else keeps its
    traceback.
    """
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):  # models write what some terminals cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signals.handle_signals()
    try:
        main(sys.argv[1:])
        leave(0, is_done=True)
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        leave(REFUSED)
    except errors.NoRowsError as error:
        if is_main_process():
            print(f"no row left: {error}", file=sys.stderr, flush=True)
        leave(NO_ROWS, is_done=True)
    except Exception as error:
        if fault := explain_fault(error):
            print(f"error: {fault}", file=sys.stderr, flush=True)
            leave(FAILED)
        raise


def leave(code: int, is_done: bool = False) -> None:
    """End the process with an exit code; is_done: its stage is done, so it takes leave of the others."""
    if has_joined():
        if is_done:
            leave_world()
        exit_at_once(code)
    if code:
        sys.exit(code)


def explain_fault(error: Exception) -> str | None:
    """One line on a fault of the machine: no room, no permission, no memory. None for all else."""
    text = " ".join(str(error).split())[:300]
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return f"the disk is full ({text}): free space and run again, what is finished is kept"
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{text}: not allowed to read or write there; mend that or choose another place"
    if isinstance(error, MemoryError) or any(words in text for words in ("out of memory", *errors.NO_MEMORY)):
        return f"out of memory ({text}): lower batch_size or per_device_batch_size, or max_length"
    if "CUDA driver error" in text:
        return f"{text}: if this is a virtual GPU or WSL, set PYTORCH_ALLOC_CONF=expandable_segments:False"
    return None


def quiet_libraries() -> None:
    """Silence what libraries say about every load; their warnings about ours stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


def print_result(**values: Any) -> None:
    """The one JSON line that ends a script."""
    print0(json.dumps(values))
