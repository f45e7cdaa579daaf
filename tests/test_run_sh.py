"""run.sh: the Python it takes, what it installs and what it starts, in a checkout whose programs print that."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["torch", "tqdm", "numpy", "huggingface_hub"]
HELP = ("-n RUNS", "--notify COMMAND", "status [FOLDER]", "compare PATH", "test [PYTEST OPTION ...]", "$PYTHON")


@pytest.fixture
def clone(tmp_path):
    """A checkout. Beside it is `bin`, first in PATH, with a python3 that does not work."""
    folder = tmp_path / "a clone"
    for name in ("configs/run_queue.py", "logs/status.py", "logs/compare.py", "tests/pytest.py"):
        write(folder / name, "import os, sys; words = [word.rpartition('/')[2] for word in sys.argv]\n"
                             "print(sys.executable, *words, os.environ.get('OMP_NUM_THREADS', ''))")
    for name in ("", "logs", "tests"):
        write(folder / name / "requirements.txt", name)
    shutil.copy(ROOT / "run.sh", folder)
    write(tmp_path / "bin" / "python3", "#!/bin/sh\nexit 1")
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make_python(folder, modules=(), torch="2.11.0+cpu", pip="print('pip', *sys.argv[1:])"):
    """Make a Python with these modules, none of which can be imported, and a pip that says what it should install."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    write(packages / f"torch-{torch}.dist-info" / "METADATA", f"Name: torch\nVersion: {torch}\n")
    for name in modules:
        write(packages / f"{name}.py", "1 / 0")
    write(packages / "pip.py", f"import sys\nif __name__ == '__main__': {pip}")
    return folder / "bin" / "python"


def make_active_python(clone, **options):
    """Make it python3 in PATH. Its `venv` copies ../template."""
    python, template = make_python(clone.parent / "active", **options), clone.parent / "template"
    make_python(template)
    write(clone.parent / "bin" / "python3",
          f'#!/bin/sh\n[ "$1 $2" != "-m venv" ] || exec cp -R "{template}/." "$3"\nexec "{python}" "$@"')
    return python


def run(clone, *arguments, command=None, **environment):
    """Return the exit status and the printed lines."""
    ours = {"PATH": f"{clone.parent}/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "", "PYTHON": ""}
    environment = os.environ | ours | environment
    result = subprocess.run([*(command or [clone / "run.sh"]), *arguments], text=True, env=environment,
                            cwd=clone if command else None, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.returncode, [line.strip() for line in result.stdout.splitlines()]


def test_it_takes_PYTHON_or_else_venv_or_else_python3(clone, tmp_path):
    active = make_active_python(clone, modules=MODULES)
    assert run(clone, "a b.toml", "-n", "2") == (0, [f"{active} run_queue.py a b.toml -n 2"])
    venv, other = make_python(clone / ".venv"), make_python(tmp_path / "other", MODULES)
    assert run(clone)[1][-1] == f"{venv} run_queue.py"
    assert run(clone, PYTHON=str(other)) == (0, [f"{other} run_queue.py"])
    status, lines = run(clone, PYTHON=str(venv))
    assert status == 2 and lines[-1:] == [f"run.sh: {venv} lacks torch; correct or unset PYTHON"]


@pytest.mark.parametrize("options, lacking", [
    (dict(modules=MODULES, torch="2.5.1"), "PyTorch 2.11 to 2.13"), (dict(modules=MODULES[:1]), "numpy"),
    (dict(modules=MODULES, torch="2.14.0"), "PyTorch 2.11 to 2.13"), (dict(), "torch"),
])
def test_if_python3_lacks_something_that_is_said_and_venv_is_made(clone, options, lacking):
    active = make_active_python(clone, **options)
    assert run(clone) == (0, [
        f"run.sh: {active} lacks {lacking}", f"run.sh: installing requirements.txt in {clone}/.venv",
        f"pip install --quiet --requirement {clone}/requirements.txt", f"{clone}/.venv/bin/python run_queue.py"])


def test_a_requirements_file_is_installed_once_until_it_changes_and_venv_is_never_cleared(clone):
    venv = make_python(clone / ".venv")
    (clone / ".venv" / "mine").touch()
    assert len(run(clone)[1]) == 3 and run(clone)[1] == [f"{venv} run_queue.py"]
    (clone / "requirements.txt").write_text("a new one")
    assert len(run(clone)[1]) == 3 and (clone / ".venv" / "mine").exists()


def test_without_a_python_the_error_names_the_command_that_installs_one_and_help_works(clone):
    status, lines = run(clone)
    assert status == 2 and "sudo apt install python3 python3-venv" in lines[-1]
    status, lines = run(clone, "--help")
    assert status == 0 and all(text in "\n".join(lines) for text in HELP) and not (clone / ".venv").exists()
    active = make_active_python(clone, modules=MODULES)  # which can list the keys, too
    assert run(clone, "--help")[1][-1] == f"{active} run_queue.py --help"


def test_a_failed_installation_starts_nothing_and_is_tried_again(clone):
    make_python(clone / ".venv", pip="raise SystemExit('no network')")
    assert run(clone) == run(clone) == (2, [f"run.sh: installing requirements.txt in {clone}/.venv", "no network",
                                            "run.sh: cannot install requirements.txt; see the lines above"])


def test_a_venv_whose_making_was_interrupted_is_completed(clone):
    make_active_python(clone)
    shutil.copytree(clone.parent / "template", clone / ".venv", symlinks=True)
    next((clone / ".venv").rglob("pip.py")).unlink()
    assert run(clone)[1][-1] == f"{clone}/.venv/bin/python run_queue.py"


def test_sh_a_link_and_a_cdpath_work(clone, tmp_path):
    python = make_active_python(clone, modules=MODULES)
    (tmp_path / "link").symlink_to(clone / "run.sh")
    for command in ([tmp_path / "link"], ["sh", "run.sh"], ["bash", "--posix", "run.sh"]):
        assert run(clone, "x", command=command, CDPATH=f"{tmp_path}:/") == (0, [f"{python} run_queue.py x"])


def test_status_needs_no_packages_and_compare_its_own(clone):
    active = make_active_python(clone, modules=["numpy", "scipy", "matplotlib"])
    assert run(clone, "status", "a folder") == (0, [f"{active} status.py a folder"])
    assert run(clone, "compare", "a folder") == (0, [f"{active} compare.py a folder"])
    venv = make_python(clone / ".venv")
    assert run(clone, "status") == (0, [f"{venv} status.py"])
    assert run(clone, "compare")[1][1:] == [
        f"pip install --quiet --requirement {clone}/logs/requirements.txt", f"{venv} compare.py"]


def test_tests_run_two_at_a_time_unless_there_is_a_gpu(clone):
    venv = make_python(clone / ".venv")
    lines = run(clone, "test", "-m", "not slow", PYTHONPATH=f"{clone}/tests")[1]
    assert [line.rpartition(" ")[2] for line in lines[1:6:2]] == [
        f"clone/{name}requirements.txt" for name in ("", "logs/", "tests/")]
    assert lines[-1] == f"{venv} pytest.py --numprocesses 2 --dist worksteal -m not slow 1"
    write(clone.parent / "bin" / "nvidia-smi", "")
    assert run(clone, "test", PYTHONPATH=f"{clone}/tests")[1] == [f"{venv} pytest.py --numprocesses 0 --dist worksteal"]
