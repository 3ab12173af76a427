"""Python with the libraries loaded, which forks a process for each script that tests run.

Importing the libraries takes most of a run on tiny models, and conftest.run_script runs some 200. A forked
process has its own arguments, environment, folder, umask, exit code and output, imports what the script
imports, and leaves without taking the libraries apart.

One line of JSON on stdin: {"command": [script, argument, ...], "environment", "folder", "umask", "stdout",
"stderr"}, the last two of which are files; one line on stdout in return: the exit code (a signal: below 0).
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

LIBRARIES = """accelerate datasets jinja2 math_verify matplotlib.backends.backend_agg
    matplotlib.backends.backend_svg numpy peft pyarrow.parquet safetensors.torch scipy.stats
    sklearn.linear_model sklearn.metrics sklearn.pipeline sklearn.preprocessing torch tqdm
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
    transformers.models.llama.modeling_llama transformers.models.qwen2.modeling_qwen2 transformers.trainer"""


def load_libraries(root):
    sys.path.insert(0, str(root))
    import utils

    utils.quiet_libraries()  # some read at import what it sets
    for name in LIBRARIES.split():
        importlib.import_module(name)
    gc.freeze()


def become(request):
    """This process as if Python had been started with the command."""
    for number, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    sys.argv = request["command"]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(root):
    load_libraries(root)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[1])
