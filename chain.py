"""Run stages one after another in one process, as pipeline.sh does with those of a grid point: Python and the
libraries are loaded once, and so is the teacher where two stages sample with it.

    python chain.py NAME SCRIPT key=value ... [-- NAME SCRIPT key=value ...]
    python chain.py traces gentraces.py exp_dir=runs/x ... -- student distill.py exp_dir=runs/x ...
    python chain.py --check traces gentraces.py ...     # what is to be done, a line `CODE NAME note` a stage

A stage that is done by now is left as it is; one that fails ends the chain, with its exit code. --check asks
each stage with its own --check, and ends at the first that is refused, with its exit code; --check-all goes
on. CODE is what the stage's --check leaves with. Where == stands for -- a group of stages ends: in a group
what follows a stage that leaves no rows has that stage's code, and is not asked.
"""

import contextlib
import gc
import importlib
import io
import shlex
import sys
import time
from pathlib import Path

import utils
from ads.stage.errors import NoRowsError, UserError
from ads.stage.world import print0

SCRIPTS = ("gentraces.py", "save_grad.py", "attack.py", "distill.py")


def main(arguments):
    utils.show_help(arguments)
    if arguments[:1] in (["--check"], ["--check-all"]):
        sys.exit(check_stages(arguments[1:], is_whole=arguments[0] == "--check-all"))
    stages = [stage for group in groups_of(arguments) for stage in group]
    for number, (name, script, *settings) in enumerate(stages, 1):
        print0(f"run     {name} ({time.strftime('%F %T')}): {shlex.join([script, *settings])}")
        run_stage(Path(script), settings)
        is_followed = number < len(stages) and Path(stages[number][1]).stem == "gentraces"
        free_memory(keep_models=is_followed)


def groups_of(arguments):
    """[[[NAME, SCRIPT, key=value, ...], ...], ...]: groups of stages; UserError for no such stage."""
    groups = [[[]]]
    for word in arguments:
        if word == "==":
            groups.append([[]])
        elif word == "--":
            groups[-1].append([])
        else:
            groups[-1][-1].append(word)
    for stage in [stage for group in groups for stage in group]:
        if len(stage) < 2 or Path(stage[1]).name not in SCRIPTS:
            raise UserError(f"{' '.join(stage)!r} is not NAME SCRIPT key=value ... of {', '.join(SCRIPTS)}")
    return groups


def check_stages(arguments, is_whole):
    """Print what each stage's --check says; the exit code of the first that is refused, else 0."""
    refused = 0
    for group in groups_of(arguments):
        code = 0
        for name, script, *settings in group:
            if code != utils.NO_ROWS:
                code, note = check_stage(Path(script), settings)
            print(f"{code} {name} {note}".rstrip(), flush=True)
            if code not in (0, utils.NOT_DONE, utils.NO_ROWS):
                refused = refused or code
                if not is_whole:
                    return refused
    return refused


def check_stage(script, settings):
    """(exit code, what is said) of the script's --check."""
    said, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(said):
            importlib.import_module(script.stem).main([*settings, "--check"])
    except NoRowsError as error:
        code, said = utils.NO_ROWS, io.StringIO(str(error))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except SystemExit as left:
        code = left.code or 0
    return code, " ".join(said.getvalue().split())


def run_stage(script, settings):
    """The script's main() as if the script had been started."""
    sys.argv = [str(script), *settings]  # a sidecar records its command
    try:
        importlib.import_module(script.stem).main(settings)
    except SystemExit as left:  # a stage that is done leaves with 0
        if left.code:
            raise


def free_memory(keep_models):
    """Give back what a stage held; keep_models: but not what gentraces.py may sample with again."""
    if "gentraces" in sys.modules and not keep_models:
        sys.modules["gentraces"].LOADED.clear()
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    utils.run_script(main)
