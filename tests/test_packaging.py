"""The wheel, installed outside the checkout, holds everything; and what is declared is what is imported and tested."""

import ast
import email
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rest_jax

ROOT = Path(__file__).parent.parent
SOURCES = ("rest_jax", "tasks", "gin", "setup.py", "pyproject.toml", "LICENSE", "README.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves its own files behind."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(output), str(source)], check=True)
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an empty environment that the wheel alone is installed in.

    Its dependencies are looked up in the tests' own site-packages, whose editable rest_jax stays out of reach: its
    import hook is a .pth file, which works only in a folder that Python itself starts from.
    """
    root = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (site,) = (root / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return root / "bin"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Iterator:
    """Runs a program of that environment, in an empty folder, and returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def _run(program: str, *arguments: str) -> str:
        command = [str(installed / program), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    yield _run


def _gin_files() -> set[str]:
    return {str(path.relative_to(ROOT / "gin")) for path in (ROOT / "gin").rglob("*.gin")}


def test_wheel_holds_code_tasks_data_and_gin_files(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {f"rest_jax/{path.relative_to(ROOT / 'rest_jax')}" for path in (ROOT / "rest_jax").rglob("*.py")}
    tasks = {f"rest_jax/tasks/{path.relative_to(ROOT / 'tasks')}" for path in (ROOT / "tasks").rglob("*.py")}
    data = {
        f"rest_jax/tasks/{path.relative_to(ROOT / 'tasks')}"
        for folder in ("demo_data", "demo_policy")
        for path in (ROOT / "tasks" / folder).rglob("*")
        if path.is_file()
    }
    assert code | tasks | data | {f"rest_jax/gin/{name}" for name in _gin_files()} <= names
    assert "rest_jax/py.typed" in names
    # An importable `gin` would stand in the way of the gin library; tests and other folders are no part of the library.
    assert "rest_jax/gin/__init__.py" not in names
    assert {name.partition("/")[0] for name in names} == {"rest_jax", wheel.name.split("-py3")[0] + ".dist-info"}


def test_help_runs_outside_the_checkout(run) -> None:
    for text in (run("rest_jax", "--help"), run("python", "-m", "rest_jax", "--help")):
        assert "run" in text and "grow" in text and "improve" in text


def test_gin_files_are_found_outside_the_checkout(run, installed: Path) -> None:
    program = "import rest_jax.paths as p; print('\\n'.join(p.gin_search_paths()))"
    _, folder = run("python", "-c", program).split()
    assert Path(folder).is_relative_to(installed.parent)
    assert {str(path.relative_to(folder)) for path in Path(folder).rglob("*.gin")} == _gin_files()


def test_tasks_register_outside_the_checkout(run, installed: Path) -> None:
    program = """
import rest_jax, rest_jax.tasks.wmt, rest_jax.tasks.iwslt, rest_jax.tasks.demo, seqio
print(rest_jax.__file__)
print(rest_jax.tasks.demo.DATA_DIR)
print(*sorted(seqio.TaskRegistry.names()))
print(sum(1 for _ in seqio.TaskRegistry.get("demo_de_en").source.get_dataset("test", shuffle=False)))
"""
    package, data, names, count = run("python", "-c", program).splitlines()
    assert Path(package).is_relative_to(installed.parent)
    assert Path(data).is_relative_to(installed.parent)
    assert {"wmt14_de_en", "wmt20_zh_en", "iwslt14_en_de", "demo_de_en"} <= set(names.split())
    assert int(count) == 1005


# Imported where they are used, with a message that names the extra.
OF_EXTRAS = {"etils", "fsspec", "tokenizers"}


def test_core_imports_only_what_is_declared(wheel: Path) -> None:
    required = {_normal(requirement.name) for requirement in _requirements(wheel) if requirement.marker is None}
    distributions = metadata.packages_distributions()
    undeclared = {}
    for path in (ROOT / "rest_jax").rglob("*.py"):
        if path.name == "seqio_tasks.py":
            continue
        for name in _imported(path) - set(sys.stdlib_module_names) - OF_EXTRAS - {"rest_jax"}:
            # A few names (`jax`'s `jaxlib`, `orbax`'s parts) come from several distributions: one of them will do.
            if not {_normal(distribution) for distribution in distributions.get(name, [name])} & required:
                undeclared[name] = str(path.relative_to(ROOT))
    assert not undeclared


def test_extras_declare_what_the_core_may_import(wheel: Path) -> None:
    extras = {_normal(requirement.name) for requirement in _requirements(wheel) if requirement.marker is not None}
    assert extras >= OF_EXTRAS


def test_tested_versions_satisfy_what_is_declared(wheel: Path) -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[_normal(name)] = version
    for requirement in _requirements(wheel):
        extra = "" if requirement.marker is None else str(requirement.marker)
        if "tpu" in extra or "cuda" in extra:
            continue
        assert _normal(requirement.name) in pins, f"constraints.txt has no version of {requirement.name}"
        assert requirement.specifier.contains(pins[_normal(requirement.name)]), requirement


def test_editable_install_finds_tasks_and_gin_files() -> None:
    """What `make` sets up: tests run in it, with `tasks/` beside the package instead of in it."""
    from rest_jax import paths, tasks

    assert Path(rest_jax.__file__).parent == ROOT / "rest_jax"
    assert Path(tasks.__file__).parent == ROOT / "tasks"
    assert str(ROOT / "gin") in paths.gin_search_paths()
    assert paths.resolve("rest_jax://tasks/demo_data/test.tsv.gz").is_file()
    assert not (ROOT / "gin" / "__init__.py").exists()


def _requirements(wheel: Path) -> list[Requirement]:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    fields = email.message_from_bytes(archive.read(name))
    return [Requirement(text) for text in fields.get_all("Requires-Dist", [])]


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
