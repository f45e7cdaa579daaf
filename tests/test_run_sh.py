"""run.sh: the Python it takes, what it installs and what it starts, in a checkout whose programs print that."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["torch", "tqdm", "numpy", "huggingface_hub"]
REQUIREMENTS = {"": ["torch==2.13.0", *MODULES[1:]], "logs/": ["numpy", "scipy", "matplotlib"],
                "tests/": ["pytest", "xdist", "ruff"]}
HELP = ("-n RUNS", "--notify COMMAND", "status [FOLDER]", "compare PATH", "test [PYTEST OPTION ...]", "$PYTHON")
PROGRAM = ("import os, sys; words = [word.rpartition('/')[2] for word in sys.argv]\n"
           "launcher = [name for name in os.environ if name.startswith(('PET_', 'TORCHELASTIC_'))]\n"
           "print(sys.executable, *words, *launcher, os.environ.get('OMP_NUM_THREADS', ''))")
# Says what it should install, and makes modules that cannot be imported, but for pytest.
PIP = f"""import sys, sysconfig
names = sys.stdin.read().split() if __name__ == "__main__" else []
if names: print("pip", *sys.argv[1:-1], *names)
for name in names:
    with open(sysconfig.get_path("purelib") + f"/{{name.partition('==')[0]}}.py", "w") as file:
        file.write({PROGRAM!r} if name == "pytest" else "1 / 0")
"""


@pytest.fixture
def clone(tmp_path):
    """A checkout. Beside it is `bin`, first in PATH, with a python3 that does not work."""
    folder = tmp_path / "a clone"
    for name in ("configs/run_queue.py", "logs/status.py", "logs/compare.py"):
        write(folder / name, PROGRAM)
    for name, requirements in REQUIREMENTS.items():
        write(folder / name / "requirements.txt", "\n".join(requirements))
    shutil.copy(ROOT / "run.sh", folder)
    write(tmp_path / "bin" / "python3", "#!/bin/sh\nexit 1")
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make_python(folder, modules=(), torch="2.11.0+cpu", pip=PIP):
    """Make a Python with these modules, none of which can be imported, and with this module `pip`, if any."""
    base, packages = Path(sys.executable).resolve(), folder / f"lib/python3.{sys.version_info[1]}/site-packages"
    write(folder / "pyvenv.cfg", f"home = {base.parent}\ninclude-system-site-packages = false\n")
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to(base)
    write(packages / f"torch-{torch}.dist-info" / "METADATA", f"Name: torch\nVersion: {torch}\n")
    for name, text in (dict.fromkeys(modules, "1 / 0") | {"pip": pip}).items():
        write(packages / f"{name}.py", text) if text else None
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


def installs(clone, *folders, without=()):
    """Return the lines of installing these folders' requirements."""
    lines = [[f"run.sh: installing {name}requirements.txt in {clone}/.venv",
              " ".join(["pip install --quiet --requirement", *(r for r in REQUIREMENTS[name] if r not in without)])]
             for name in folders]
    return sum(lines, [])


def test_it_takes_PYTHON_or_else_venv_or_else_python3(clone, tmp_path):
    active = make_active_python(clone, modules=MODULES)
    assert run(clone, "a b.toml", "-n", "2") == (0, [f"{active} run_queue.py a b.toml -n 2"])
    venv, other = make_python(clone / ".venv"), make_python(tmp_path / "other", [*MODULES, "tomli"])
    write(next((tmp_path / "other").rglob("torch.py")).with_name("sitecustomize.py"),
          "import sys; sys.modules['tomllib'] = None")  # as in Python 3.10
    assert run(clone, PYTHON=str(other)) == (0, [f"{other} run_queue.py"])
    assert run(clone, PYTHON=str(venv)) == (2, [f"run.sh: {venv} lacks torch; correct or unset PYTHON"])
    assert run(clone)[1][-1] == f"{venv} run_queue.py"


@pytest.mark.parametrize("options, lacking", [
    (dict(modules=MODULES, torch="2.5.1"), "PyTorch 2.11 to 2.13"), (dict(modules=MODULES[:1]), "numpy"),
    pytest.param(dict(modules=MODULES, torch="2.14.0"), "PyTorch 2.11 to 2.13", marks=pytest.mark.slow),
    pytest.param(dict(), "torch", marks=pytest.mark.slow),
])
def test_if_python3_lacks_something_that_is_said_and_venv_is_made(clone, options, lacking):
    active = make_active_python(clone, **options)
    assert run(clone) == (0, [f"run.sh: {active} lacks {lacking}", *installs(clone, ""),
                              f"{clone}/.venv/bin/python run_queue.py"])


def test_a_requirements_file_is_installed_once_until_it_changes_and_venv_is_never_cleared(clone):
    """PyTorch stays once a suitable version is there."""
    venv = make_python(clone / ".venv")
    (clone / ".venv" / "mine").touch()
    assert run(clone)[1] == [*installs(clone, ""), f"{venv} run_queue.py"] and len(run(clone)[1]) == 1
    with open(clone / "requirements.txt", "a") as file:
        file.write("\n")
    assert run(clone)[1][:-1] == installs(clone, "", without=["torch==2.13.0"]) and (clone / ".venv" / "mine").exists()


@pytest.mark.parametrize("has_uv", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_venv_without_pip_stays_and_gets_what_it_lacks_from_uv_or_ensurepip(clone, has_uv):
    """As `uv venv` makes it, or an interrupted `python3 -m venv`: here with the user's PyTorch and modules."""
    active, venv = make_active_python(clone), make_python(clone / ".venv", ["torch", "mine"], "2.12.0+cu126", pip="")
    before = {path: path.read_bytes() for path in (clone / ".venv").rglob("*") if path.is_file()}
    write(clone.parent / "pip.py", PIP)
    if has_uv:
        pip = clone.parent / "pip.py"
        write(clone.parent / "bin" / "uv", f'#!/bin/sh\nshift; exec "$VIRTUAL_ENV/bin/python" "{pip}" "$@"')
    else:
        venv.unlink()
        write(venv, f'#!/bin/sh\n[ "$2" != ensurepip ] || exec cp "{clone.parent}/pip.py" "{clone}"/.venv/lib/python*/'
                    f'site-packages\nexec -a "$0" "{active.resolve()}" "$@"'.replace("/bin/sh", "/bin/bash"))
        before.pop(venv)
    assert run(clone) == (0, [*installs(clone, "", without=["torch==2.13.0"]), f"{venv} run_queue.py"])
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("break_it, end", [
    (lambda venv: (venv.unlink(), venv.symlink_to("/nowhere")), "/.venv/bin/python: No such file or directory"),
    (lambda venv: next(venv.parent.parent.rglob("tqdm.py")).unlink(), "/.venv/bin/python lacks tqdm")])
def test_a_venv_that_was_broken_later_is_named_in_one_line(clone, break_it, end):
    """Its base Python was removed, or a package."""
    venv = make_python(clone / ".venv")
    run(clone)
    break_it(venv)
    status, lines = run(clone)
    assert status == 2 and lines == [lines[0]] and f"{end}; install it there, or move {clone}/.venv away" in lines[0]


def test_venv_is_kept_free_of_the_packages_that_PYTHONPATH_names(clone, tmp_path):
    """As after a cluster's `module load`. Another Python may need them."""
    write(tmp_path / "old" / "sitecustomize.py", "print('of another Python')")
    active, old = make_active_python(clone, modules=MODULES), str(tmp_path / "old")
    assert run(clone, "status", PYTHONPATH=old)[1] == ["of another Python", f"{active} status.py"]
    venv = make_python(clone / ".venv")
    run(clone)
    for command, program in (("status", "status.py"), ("a.toml", "run_queue.py a.toml")):
        assert run(clone, command, PYTHONPATH=old, PYTHONHOME="/x") == (0, [f"{venv} {program}"])


def test_without_a_python_the_error_names_the_command_that_installs_one_and_help_works(clone):
    status, lines = run(clone)
    assert status == 2 and "sudo apt install python3 python3-venv" in lines[-1]
    status, lines = run(clone, "--help")
    assert status == 0 and all(text in "\n".join(lines) for text in HELP) and not (clone / ".venv").exists()
    active = make_active_python(clone, modules=MODULES)  # which can list the keys, too
    assert run(clone, "--help")[1][-1] == f"{active} run_queue.py --help"


def test_a_failed_installation_starts_nothing_and_is_tried_again(clone):
    venv = make_python(clone / ".venv", pip="import sys; sys.exit('no network' if 'install' in sys.argv else 0)")
    assert run(clone) == run(clone) == (2, [*installs(clone, "")[:1], "no network", f"run.sh: {venv} lacks torch",
                                            "run.sh: cannot install requirements.txt; see the lines above"])


def test_sh_a_link_a_cdpath_and_a_launchers_settings_work(clone, tmp_path):
    """Kubernetes sets torchrun's options as PET_*."""
    python = make_active_python(clone, modules=MODULES)
    (tmp_path / "link").symlink_to(clone / "run.sh")
    for command in ([tmp_path / "link"], ["sh", "run.sh"], ["bash", "--posix", "run.sh"]):
        assert run(clone, "x", command=command, CDPATH=f"{tmp_path}:/", PET_NNODES="2",
                   TORCHELASTIC_RUN_ID="x") == (0, [f"{python} run_queue.py x"])


def test_status_needs_no_packages_and_compare_and_test_their_own(clone):
    """Tests run two at a time unless there is a GPU."""
    active = make_active_python(clone, modules=["numpy", "scipy", "matplotlib"])
    assert run(clone, "status", "a folder") == (0, [f"{active} status.py a folder"])
    assert run(clone, "compare", "a folder") == (0, [f"{active} compare.py a folder"])
    venv = make_python(clone / ".venv")
    assert run(clone, "status") == (0, [f"{venv} status.py"])
    assert run(clone, "compare")[1] == [*installs(clone, "logs/"), f"{venv} compare.py"]
    assert run(clone, "test", "-m", "not slow")[1] == [
        *installs(clone, "", "tests/"), f"{venv} pytest.py --numprocesses 2 --dist worksteal -m not slow 1"]
    write(clone.parent / "bin" / "nvidia-smi", "")
    assert run(clone, "test")[1] == [f"{venv} pytest.py --numprocesses 0 --dist worksteal"]


@pytest.mark.parametrize("folder", REQUIREMENTS)
def test_requirements_name_packages_only_because_pip_reads_them_from_stdin(folder):
    assert all(line[0].isalpha() for line in (ROOT / folder / "requirements.txt").read_text().splitlines())
