"""setup.sh on a project of a few bytes, without a network: the environment it makes, fills and puts first."""

import functools
import importlib.metadata
import importlib.util
import inspect
import os
import shutil
import signal
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from helpers_pipeline import places_of_packages, wait_until

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "tiny"
version = "1.0"
requires-python = ">=3.10"
dependencies = ["needed"]
"""
BACKEND = """
import zipfile
from pathlib import Path

{write_wheel}

def build_editable(folder, config_settings=None, metadata_directory=None):
    return write_wheel(folder, "tiny", "1.0", "Requires-Dist: needed")
"""


with_ensurepip = pytest.mark.skipif(
    importlib.util.find_spec("ensurepip") is None, reason="this Python makes no environment with pip"
)


def write_wheel(folder, name, version, *headers):
    """An installable package of no code; returns its file's name."""
    info, path = f"{name}-{version}.dist-info", Path(folder) / f"{name}-{version}-py3-none-any.whl"
    metadata = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *headers])
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", metadata)
        wheel = ["Wheel-Version: 1.0", "Generator: x", "Root-Is-Purelib: true", "Tag: py3-none-any", ""]
        file.writestr(f"{info}/WHEEL", "\n".join(wheel))
        file.writestr(f"{info}/RECORD", "")
    return path.name


@pytest.fixture
def project(tmp_path):
    """A project with setup.sh; its dependency is there in two versions, constraints.txt names the older."""
    folder = tmp_path / "a project"
    folder.mkdir()
    shutil.copy(ROOT / "setup.sh", folder)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND.format(write_wheel=inspect.getsource(write_wheel)))
    (folder / "constraints.txt").write_text("needed==1.0\n")
    (tmp_path / "wheels").mkdir()
    for version in ("1.0", "2.0"):
        write_wheel(tmp_path / "wheels", "needed", version)
    return folder


def environment_of(project, *on_path, **more):
    """What a shell has in which no environment is active; PATH: the given folders, then the system's."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "CONDA"))
    }
    for name in ("VIRTUAL_ENV", "SKIP_SETUP", "PYTHONPATH"):
        kept.pop(name, None)
    wheels = str(project.parent / "wheels")
    installers = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels, "UV_NO_INDEX": "1", "UV_FIND_LINKS": wheels}
    installers |= {"PIP_CONFIG_FILE": os.devnull, "UV_OFFLINE": "1", "UV_CACHE_DIR": str(project / "cache")}
    path = os.pathsep.join([*map(str, on_path), *without_uv(kept["PATH"].split(os.pathsep))])
    return kept | installers | {"PATH": path, "PYTHON": sys.executable} | more


def without_uv(folders):
    return [folder for folder in folders if not (Path(folder) / "uv").exists()]


WHAT_THERE_IS = "import sys; print(sys.prefix)"


def set_up(project, *on_path, check=True, **more):
    """Source setup.sh and say where python is; returns the finished process."""
    command = ["bash", "-c", f'source ./setup.sh && python -c "{WHAT_THERE_IS}"']
    environment = environment_of(project, *on_path, **more)
    result = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=600
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def installed(prefix):
    """(package, what installed it) of the project and its dependency, in the versions that are wanted."""
    (site,) = Path(prefix).glob("lib/python3*/site-packages")
    folders = [site / f"{name}-1.0.dist-info" for name in ("needed", "tiny")]
    found = map(importlib.metadata.PathDistribution, folders)
    return [(each.name, each.read_text("INSTALLER").strip()) for each in found]


def by(installer):
    return [("needed", installer), ("tiny", installer)]


@pytest.fixture(scope="session")
def uv(tmp_path_factory):
    """A folder for PATH with uv in it."""
    here = Path(sys.executable).parent / "uv"
    found = str(here) if here.exists() else shutil.which("uv")
    if found is None:
        pytest.skip("uv is not installed (extra test)")
    folder = tmp_path_factory.mktemp("uv")
    (folder / "uv").symlink_to(found)
    return folder


@with_ensurepip
def test_an_environment_left_half_made_by_ctrl_c_is_made_anew_and_filled_by_pip(project):
    """It once had a python without pip, which every later run took for an environment."""
    making = subprocess.Popen(
        ["bash", "-c", "source ./setup.sh"], cwd=project, env=environment_of(project),
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    wait_until((project / ".venv" / "bin" / "python").exists)
    os.killpg(making.pid, signal.SIGINT)
    assert making.wait(timeout=60) and not (project / ".venv" / ".ads_setup_base").exists()
    result = set_up(project)
    assert "is not complete: making it anew" in result.stderr
    assert result.stdout.strip() == str(project / ".venv") and installed(project / ".venv") == by("pip")
    again = set_up(project)
    assert again.stdout == result.stdout and again.stderr == "", "nothing to do"


def test_where_uv_is_on_path_it_makes_the_environment(project, uv):
    result = set_up(project, uv)
    assert result.stdout.strip() == str(project / ".venv") and installed(project / ".venv") == by("uv")


def test_an_environment_made_by_uv_is_filled_by_uv(project, uv, tmp_path):
    """It has no pip: set-up once failed in it. Nor need it be first on PATH for its python to be the one."""
    subprocess.run([uv / "uv", "venv", "--quiet", "--python", sys.executable, tmp_path / "mine"], check=True)
    result = set_up(project, uv, VIRTUAL_ENV=str(tmp_path / "mine"))
    assert result.stdout.strip() == str(tmp_path / "mine") and installed(tmp_path / "mine") == by("uv")
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("with_uv", (True, pytest.param(False, marks=[pytest.mark.slow, with_ensurepip])))
def test_an_environment_without_pip_is_filled_by_uv_or_gets_pip(project, tmp_path, request, with_uv):
    on_path = [request.getfixturevalue("uv")] if with_uv else []
    venv.create(tmp_path / "bare", symlinks=True)
    set_up(project, *on_path, VIRTUAL_ENV=str(tmp_path / "bare"))
    assert installed(tmp_path / "bare") == by("uv" if with_uv else "pip")


@pytest.mark.slow
@with_ensurepip
def test_an_environment_with_pip_is_filled_by_pip_whatever_is_on_path(project, uv, tmp_path):
    """pip may be set up for indexes of which uv knows nothing."""
    venv.create(tmp_path / "mine", symlinks=True, with_pip=True)
    set_up(project, uv, VIRTUAL_ENV=str(tmp_path / "mine"))
    assert installed(tmp_path / "mine") == by("pip")


NO_PIP = '#!/bin/sh\ncase "$*" in *pip*) exit 1;; esac\nexec {python} "$@"\n'
OLD = "#!/bin/sh\nexit 1\n"


@pytest.mark.parametrize(
    "python,words",
    (
        (None, "has no Python 3.10-3.13: activate another environment"),
        (OLD, "has no Python 3.10-3.13: activate another environment"),
        (NO_PIP, "has no pip, and uv is not on PATH: install uv, or make another environment"),
    ),
)
def test_an_environment_that_cannot_be_used_is_one_line(project, tmp_path, python, words):
    if python:
        (tmp_path / "mine" / "bin").mkdir(parents=True)
        (tmp_path / "mine" / "bin" / "python").write_text(python.format(python=sys.executable))
        (tmp_path / "mine" / "bin" / "python").chmod(0o755)
    result = set_up(project, VIRTUAL_ENV=str(tmp_path / "mine"), check=False)
    first, last = result.stderr.splitlines()
    assert words in first and str(tmp_path / "mine") in first and result.returncode == 2
    assert last == "setup.sh: the environment could not be made"


def test_an_environment_of_another_python_is_not_taken_away(project):
    """Only what cannot run is made anew."""
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "activate").touch()
    (project / ".venv" / "pyvenv.cfg").touch()
    (project / ".venv" / "bin" / "python").write_text('#!/bin/sh\n[ "$2" = "" ]\n')
    (project / ".venv" / "bin" / "python").chmod(0o755)
    result = set_up(project, check=False)
    assert result.returncode == 2 and "has no Python 3.10-3.13" in result.stderr
    assert (project / ".venv" / "bin" / "activate").exists()


@pytest.mark.slow
def test_uv_sets_up_this_project_with_the_versions_of_constraints_txt(uv, tmp_path):
    """Needs a package index, or what pip is told to use instead."""
    for pattern in ("*.py", "*.sh", "*.yaml", "*.toml", "*.txt", "README.md"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "ads", tmp_path / "ads", ignore=shutil.ignore_patterns("__pycache__"))
    environment = environment_of(tmp_path, uv) | places_of_packages()
    for name in ("UV_NO_INDEX", "UV_OFFLINE", "UV_CACHE_DIR"):
        del environment[name]
    code = "import torch, transformers, gentraces; print(torch.__version__, transformers.__version__)"
    command = ["bash", "-c", f'source ./setup.sh && python -c "{code}"']
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
    )
    if "Failed to fetch" in result.stderr:
        pytest.skip(f"no package index can be reached: {result.stderr[:200]}")
    assert result.returncode == 0, result.stderr
    pinned = (ROOT / "constraints.txt").read_text()
    torch_version, transformers_version = result.stdout.split()
    assert f"\ntorch=={torch_version.split('+')[0]}\n" in pinned
    assert f"\ntransformers=={transformers_version}" in pinned
    assert "uv = " in (tmp_path / ".venv" / "pyvenv.cfg").read_text()


def test_two_set_ups_at_once_make_one_environment(project, uv):
    """Jobs of an array start together and share the checkout."""
    start = functools.partial(
        subprocess.Popen, ["bash", "-c", "source ./setup.sh"], cwd=project, env=environment_of(project, uv),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    both = [start(), start()]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "".join(said).count("setup.sh: making") == 1 and "".join(said).count("setup.sh: installing") == 1
    assert installed(project / ".venv") == by("uv")
