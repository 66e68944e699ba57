"""Imports go down the house: report and experiment to diffusion to method, never up."""

import ast
import subprocess
import sys

import pytest

from deme_lib import ROOT

ALLOWED = {
    "method": {"method"},
    "diffusion": {"ROOT", "errors", "diffusion", "method"},
    "experiment": {"ROOT", "errors", "experiment", "diffusion", "method"},
    "report": {"ROOT", "errors", "report"},
}
"""Folder -> what its modules may import of the project; files beside the folders: anything."""
MODULES = sorted(p for f in ALLOWED for p in (ROOT / "deme_lib" / f).rglob("*.py"))


def imports(path):
    """Modules of deme_lib that a module imports, also inside functions, without "deme_lib."."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not told apart here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "deme_lib":
                yield rest


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_goes_up(path):
    folder = path.relative_to(ROOT / "deme_lib").parts[0]
    odd = [
        name
        for name in imports(path)
        if not any(f"{name}.".startswith(f"{allowed}.") for allowed in ALLOWED[folder])
    ]
    assert not odd


def test_every_folder_of_code_has_its_place():
    assert {path.parent.name for path in (ROOT / "deme_lib").glob("*/*.py")} <= set(ALLOWED)


def test_the_report_needs_no_torch():
    """Neither itself nor through what it imports."""
    code = "import sys, deme_lib.report.render, deme_lib.report.reproduced"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
