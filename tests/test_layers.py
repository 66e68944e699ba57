"""Imports go down the house: report and experiment to diffusion to method, never up."""

import ast
import subprocess
import sys

from deme_lib import ROOT

BELOW = {
    "method": (),
    "diffusion": ("method",),
    "experiment": ("diffusion", "method"),
    "report": (),
}
"""Folder -> the folders that its modules may import from."""


def imports(path):
    """What a module imports of deme_lib, also inside functions: "method.merging.merge"."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not told apart here"
            names = [f"{node.module}.{name}" for name in names]
        yield from (name.partition(".")[2] for name in names if name.startswith("deme_lib"))


def test_no_import_goes_up():
    for path in (ROOT / "deme_lib").glob("*/**/*.py"):
        folder = path.relative_to(ROOT / "deme_lib").parts[0]
        allowed = {folder, *BELOW[folder], "errors", "ROOT"}
        odd = [name for name in imports(path) if name.partition(".")[0] not in allowed]
        assert not odd, path


def test_the_report_needs_no_torch():
    """Neither itself nor through what it imports."""
    code = "import sys, deme_lib.report.render, deme_lib.report.reproduced"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
