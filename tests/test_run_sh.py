"""run.sh: which Python it takes, what it installs, and what it starts, in a folder with a program that prints that."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

REQUIREMENTS = 'torch==2.13.0\nnumpy>=2\ntomli; python_version < "3.11"\ntriton>=3.5; sys_platform == "linux"\n'
COMPLETE = {"torch": "2.11.0+cpu", "numpy": "2.1.0", "tomli": "2.0", "triton": "3.10.1"}


@pytest.fixture
def clone(tmp_path):
    """A checkout whose program prints the Python that runs it, and its arguments; beside it `bin`, first in PATH.

    In `bin` are Pythons none of which works.
    """
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(10, 15))):
        write_script(tmp_path / "bin" / name, "exit 1")
    folder = tmp_path / "a clone"
    for name in ("run.sh", "configs/packages.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "requirements.txt").write_text(REQUIREMENTS)
    (folder / "train_gpt_medium.py").write_text("import sys\nprint(sys.executable, *sys.argv[1:])\n")
    return folder


def write_script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make_python(folder, versions={}, **modules):
    """A Python with packages of these versions and modules of this text; its pip says what it is asked to install."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    for name, version in versions.items():
        (packages / f"{name}-{version}.dist-info").mkdir()
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    for name, text in {"pip": "print('pip', *sys.argv[1:])", **modules}.items():
        (packages / f"{name}.py").write_text(f"import os, sys\nif __name__ == '__main__':\n    {text}")
    return folder / "bin" / "python"


def make_active_python(clone, versions={}):
    python = make_python(clone.parent / "active", versions)
    write_script(clone.parent / "bin" / "python3", f'exec "{python}" "$@"')
    return python


def run(clone, *arguments, command=None):
    """The exit status and what was printed."""
    environment = {**os.environ, "PATH": f"{clone.parent}/bin:/usr/bin:/bin", "PIP_NO_INDEX": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run([*(command or [clone / "run.sh"]), *arguments], cwd=clone if command else None, text=True,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.returncode, result.stdout.splitlines()


def test_an_active_python_with_the_packages_is_used_unless_venv_is_complete(clone):
    active = make_active_python(clone, COMPLETE)
    assert run(clone, "a b.toml", "-n", "2") == (0, [f"{active} --queue a b.toml -n 2"])
    venv = make_python(clone / ".venv", COMPLETE)
    assert run(clone) == (0, [f"{venv} --queue"])


@pytest.mark.parametrize("changes, lacking", [
    (dict(torch="2.5.1"), "it has PyTorch 2.5.1, and 2.11 to 2.13 is needed"),
    (dict(torch="2.14.0"), "it has PyTorch 2.14.0, and 2.11 to 2.13 is needed"),
    (dict(numpy="1.26.4"), "it has numpy 1.26.4, and numpy>=2 is needed"),
    (dict(torch=None), "torch is missing"),
])
def test_what_an_active_python_lacks_is_said_before_installing(clone, changes, lacking):
    make_active_python(clone, {name: version for name, version in (COMPLETE | changes).items() if version})
    venv = make_python(clone / ".venv")
    assert run(clone) == (0, [
        f"run.sh: {clone.parent}/bin/python3 is passed over for .venv: {lacking}",
        f"run.sh: installing requirements.txt in {clone}/.venv",
        f"pip install --quiet --requirement={clone}/requirements.txt",
        f"{venv} --queue",
    ])


def test_venv_is_made_by_the_newest_python(clone, tmp_path):
    make_python(tmp_path / "template")
    for name in ("python3", "python3.10", "python3.13"):
        write_script(tmp_path / "bin" / name, f'case "$1" in -m) cp -R "{tmp_path}/template" "$4";; -c) ;;'
                                              f'--version) echo "{name} of the test";; *) exit 1;; esac')
    status, lines = run(clone)
    assert status == 0 and f"run.sh: making {clone}/.venv with python3.13 of the test" in lines
    assert lines[-1] == f"{clone}/.venv/bin/python --queue"


def test_without_a_python_the_error_names_the_command_that_installs_one(clone):
    status, lines = run(clone)
    assert status == 2 and "sudo apt install python3 python3-venv" in lines[-1]
    assert not (clone / ".venv").exists()


def test_help_installs_nothing(clone):
    status, lines = run(clone, "--help")
    assert status == 0 and all(any(word in line for line in lines) for word in ("-n RUNS", "status", "test", "notify"))
    assert not (clone / ".venv").exists()


def test_a_failed_installation_starts_nothing(clone):
    make_python(clone / ".venv", pip="raise SystemExit('no network')")
    status, lines = run(clone)
    assert status == 2 and lines[-2:] == ["no network", "run.sh: could not install them, as the lines above say"]


def test_sh_and_a_link_to_run_sh_work(clone, tmp_path):
    python = make_python(clone / ".venv", COMPLETE)
    (tmp_path / "link").symlink_to(clone / "run.sh")
    for command in ([tmp_path / "link"], ["sh", "run.sh"], ["bash", "--posix", "run.sh"]):
        assert run(clone, "x", command=command) == (0, [f"{python} --queue x"])


def test_status_needs_no_packages(clone):
    make_active_python(clone)
    (clone / "logs").mkdir()
    (clone / "logs" / "status.py").write_text("import sys; print('status', *sys.argv[1:])")
    assert run(clone, "status", "a folder") == (0, ["status a folder"])


def test_tests_run_two_at_a_time(clone):
    for name in ("tests", "logs"):
        (clone / name).mkdir()
        (clone / name / "requirements.txt").write_text("pytest>=8\n-r requirements.txt\n")
    program = "print(*sys.argv[1:], os.environ['OMP_NUM_THREADS'])"
    make_python(clone / ".venv", COMPLETE | {"pytest": "8.1"}, pytest=program)
    assert run(clone, "test", "-m", "not slow") == (0, ["--numprocesses 2 --dist worksteal -m not slow 1"])
