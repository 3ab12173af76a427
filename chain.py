"""Run stages one after another in one process, as pipeline.sh does with those of a grid point: Python and the
libraries are loaded once, and so is the teacher where two stages sample with it.

    python chain.py NAME SCRIPT key=value ... [-- NAME SCRIPT key=value ...]
    python chain.py traces gentraces.py exp_dir=runs/x ... -- student distill.py exp_dir=runs/x ...

A stage that is done by now is left as it is; one that fails ends the chain, with its exit code.
"""

import gc
import importlib
import shlex
import sys
import time
from pathlib import Path

import utils
from ads.stage.errors import UserError
from ads.stage.world import print0

SCRIPTS = ("gentraces.py", "save_grad.py", "attack.py", "distill.py")


def main(arguments):
    stages = stages_of(arguments)
    for number, (name, script, *settings) in enumerate(stages, 1):
        print0(f"run     {name} ({time.strftime('%F %T')}): {shlex.join([script, *settings])}")
        run_stage(Path(script), settings)
        is_followed = number < len(stages) and Path(stages[number][1]).stem == "gentraces"
        free_memory(keep_models=is_followed)


def stages_of(arguments):
    """[[name, script, key=value, ...], ...] of the words between two dashes; ValueError for no such stage."""
    stages = [[]]
    for word in arguments:
        if word == "--":
            stages.append([])
        else:
            stages[-1].append(word)
    for stage in stages:
        if len(stage) < 2 or Path(stage[1]).name not in SCRIPTS:
            raise UserError(f"{' '.join(stage)!r} is not NAME SCRIPT key=value ... of {', '.join(SCRIPTS)}")
    return stages


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
