"""The core runs on machines that have no TensorFlow wheel: nothing but `data/seqio_tasks.py` may import it."""

import ast
import subprocess
import sys
from pathlib import Path

import rest_jax

PACKAGE = Path(rest_jax.__file__).parent
HEAVY = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "t5x", "torch", "transformers")
BRIDGE = PACKAGE / "data" / "seqio_tasks.py"


def _imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def test_only_the_bridge_imports_tensorflow_or_seqio() -> None:
    importing = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path != BRIDGE and _imported(path) & set(HEAVY)
    }
    assert not importing
    assert {"seqio", "tensorflow"} <= _imported(BRIDGE)  # the search itself works


def test_every_core_module_loads_without_tensorflow() -> None:
    modules = sorted(
        ".".join(("rest_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if path != BRIDGE and path.name != "__main__.py"
    )
    # A finder that refuses them, so that they are missing here as they are there.
    program = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"there is no {{name}} on this machine", name=name)
sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module)
assert not [name for name in sys.modules if name.partition(".")[0] in {HEAVY!r}]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
