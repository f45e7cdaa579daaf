"""run.sh: which Python it takes, what it installs, and what it starts, in a folder with a program that prints that."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

REQUIREMENTS = 'torch==2.13.0\nnumpy>=2\ntomli; python_version < "3.11"\ntriton>=3.5; sys_platform == "linux"\n'
COMPLETE = {"torch": "2.11.0+cpu", "numpy": "2.1.0", "tomli": "2.0", "triton": "3.10.1"}
PYTHONS = ["python", "python3", *(f"python3.{minor}" for minor in range(10, 15))]


@pytest.fixture
def clone(tmp_path):
    """A checkout whose program prints the Python that runs it, and its arguments."""
    folder = tmp_path / "a clone"
    for name in ("run.sh", "configs/packages.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "requirements.txt").write_text(REQUIREMENTS)
    (folder / "train_gpt_medium.py").write_text("import sys\nprint(sys.executable, *sys.argv[1:])\n")
    return folder


@pytest.fixture
def bin_folder(tmp_path):
    """The first folder of PATH, with Pythons none of which works."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in PYTHONS:
        write_script(folder / name, "exit 1")
    return folder


def write_script(path, *lines):
    path.unlink(missing_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)


def site_packages(venv):
    return next((venv / "lib").glob("python*")) / "site-packages"


def make_python(folder, **versions):
    """A Python that says it has packages of these versions, and whose pip says what it is asked to install."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = site_packages(folder)
    for name, version in versions.items():
        (packages / f"{name}-{version}.dist-info").mkdir()
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (packages / "pip.py").write_text("import sys\nif __name__ == '__main__':\n    print('pip', *sys.argv[1:])")
    return folder / "bin" / "python"


def run(command, bin_folder, *arguments, cwd=None):
    """The exit status and what was printed."""
    environment = os.environ | {"PATH": f"{bin_folder}:/usr/bin:/bin", "PIP_NO_INDEX": "1"}
    result = subprocess.run([*command, *arguments], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)
    return result.returncode, result.stdout.splitlines()


def activate(python, bin_folder):
    write_script(bin_folder / "python3", f'exec "{python}" "$@"')


def test_an_active_python_with_the_packages_is_used_unless_venv_is_complete(clone, bin_folder, tmp_path):
    active = make_python(tmp_path / "active", **COMPLETE)
    activate(active, bin_folder)
    assert run([clone / "run.sh"], bin_folder, "a b.toml", "-n", "2") == (0, [f"{active} --queue a b.toml -n 2"])
    venv = make_python(clone / ".venv", **COMPLETE)
    assert run([clone / "run.sh"], bin_folder) == (0, [f"{venv} --queue"])


@pytest.mark.parametrize("changes, lacking", [
    (dict(torch="2.5.1"), "it has PyTorch 2.5.1, and 2.11 to 2.13 is needed"),
    (dict(torch="2.14.0"), "it has PyTorch 2.14.0, and 2.11 to 2.13 is needed"),
    (dict(numpy="1.26.4"), "it has numpy 1.26.4, and numpy>=2 is needed"),
    (dict(torch=None), "torch is missing"),
])
def test_what_an_active_python_lacks_is_said_before_installing(clone, bin_folder, tmp_path, changes, lacking):
    versions = {name: version for name, version in (COMPLETE | changes).items() if version}
    activate(make_python(tmp_path / "active", **versions), bin_folder)
    venv = make_python(clone / ".venv")
    status, lines = run([clone / "run.sh"], bin_folder)
    assert status == 0 and lines == [
        f"run.sh: {bin_folder}/python3 is passed over for .venv: {lacking}",
        f"run.sh: installing requirements.txt in {clone}/.venv",
        f"pip install --quiet --requirement={clone}/requirements.txt",
        f"{venv} --queue",
    ]


def test_venv_is_made_by_the_newest_python(clone, bin_folder, tmp_path):
    template = make_python(tmp_path / "template")
    for name in ("python3", "python3.10", "python3.13"):
        write_script(bin_folder / name, f'case "$1" in -m) cp -R "{tmp_path}/template" "$4";; -c) ;;',
                     f'--version) echo "{name} of the test";; *) exit 1;; esac')
    status, lines = run([clone / "run.sh"], bin_folder)
    assert status == 0 and f"run.sh: making {clone}/.venv with python3.13 of the test" in lines
    assert template.exists() and lines[-1] == f"{clone}/.venv/bin/python --queue"


def test_without_a_python_the_error_names_the_command_that_installs_one(clone, bin_folder):
    status, lines = run([clone / "run.sh"], bin_folder)
    assert status == 2 and "sudo apt install python3 python3-venv" in lines[-1]
    assert not (clone / ".venv").exists()


def test_a_failed_installation_starts_nothing(clone, bin_folder):
    make_python(clone / ".venv")
    program = "if __name__ == '__main__':\n    raise SystemExit('no network')"
    (site_packages(clone / ".venv") / "pip.py").write_text(program)
    status, lines = run([clone / "run.sh"], bin_folder)
    assert status == 2 and lines[-2:] == ["no network", "run.sh: could not install them, as the lines above say"]


def test_sh_and_a_link_to_run_sh_work(clone, bin_folder, tmp_path):
    python = make_python(clone / ".venv", **COMPLETE)
    (tmp_path / "link").symlink_to(clone / "run.sh")
    for command in ([tmp_path / "link"], ["sh", "run.sh"], ["bash", "--posix", "run.sh"]):
        assert run(command, bin_folder, "x", cwd=clone) == (0, [f"{python} --queue x"])


def test_help_installs_nothing(clone, bin_folder):
    status, lines = run([clone / "run.sh"], bin_folder, "--help")
    assert status == 0 and all(any(word in line for line in lines) for word in ("-n RUNS", "status", "test", "notify"))
    assert not (clone / ".venv").exists()


def test_status_needs_no_packages(clone, bin_folder, tmp_path):
    activate(make_python(tmp_path / "active"), bin_folder)
    (clone / "logs").mkdir()
    (clone / "logs" / "status.py").write_text("import sys; print('status', *sys.argv[1:])")
    assert run([clone / "run.sh"], bin_folder, "status", "a folder") == (0, ["status a folder"])


def test_tests_run_two_at_a_time(clone, bin_folder):
    (clone / "tests").mkdir()
    (clone / "logs").mkdir()
    for name in ("tests", "logs"):
        (clone / name / "requirements.txt").write_text("pytest>=8\n-r requirements.txt\n")
    make_python(clone / ".venv", pytest="8.1", **COMPLETE)
    program = "import os, sys; print(*sys.argv[1:], os.environ['OMP_NUM_THREADS'])"
    (site_packages(clone / ".venv") / "pytest.py").write_text(program)
    status, lines = run([clone / "run.sh"], bin_folder, "test", "-m", "not slow")
    assert (status, lines) == (0, ["--numprocesses 2 --dist worksteal -m not slow 1"])
