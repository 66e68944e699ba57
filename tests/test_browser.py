"""JupyterLab in a real browser: minutes, where selenium, a Chromium and its driver are found."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import matplotlib
import pytest
import yaml
from papermill.iorw import load_notebook_node, write_ipynb
from papermill.parameterize import parameterize_notebook

from deme_lib import ROOT

selenium = pytest.importorskip("selenium.webdriver")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
FLAGS += "--disable-background-networking"
PANEL = "[...jupyterapp.shell.widgets('main')].find(w => w.content?.model?.cells?.length)"
OPENED = f"return window.jupyterapp && Boolean({PANEL})"
IDLE = f"return {PANEL}.sessionContext.session?.kernel?.status === 'idle'"
DONE = f"""{IDLE} && (cells => cells.every(c => c.execution_count)
    || cells.some(c => c.outputs.some(o => o.output_type === 'error')))(
    {PANEL}.content.model.toJSON().cells.filter(c => c.outputs))"""
RUN = f"jupyterapp.shell.activateById({PANEL}.id); "
RUN += "jupyterapp.commands.execute('notebook:run-all-cells')"
HELD = f"return JSON.stringify({PANEL}.content.model.toJSON())"
SHOWN = f"return {PANEL}.node.innerText"
PICTURES = f"return {PANEL}.node.querySelectorAll('img[src^=\"data:image/png\"]').length"

pytestmark = [
    pytest.mark.stress,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


@contextmanager
def opened(notebook, folder):
    """A browser with a notebook of ``folder`` open in JupyterLab, and its kernel idle."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --IdentityProvider.token="
    options += f" --ServerApp.root_dir={folder} --LabApp.expose_app_in_browser=True"
    options += " --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"
    settings = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "RUNTIME")}
    settings |= {"MPLCONFIGDIR": matplotlib.get_cachedir(), "HOME": str(folder)}
    log = folder / "lab.log"
    chrome = selenium.ChromeOptions()
    chrome.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={folder / 'profile'}"]:
        chrome.add_argument(flag)
    with log.open("w") as out:
        command = [sys.executable, "-m", "jupyterlab", *options.split()]
        server = subprocess.Popen(command, env=os.environ | settings, stdout=out, stderr=out)
    try:
        while "is running at" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        with selenium.Chrome(chrome, selenium.ChromeService(DRIVER)) as browser:
            browser.set_window_size(1400, 4000)
            browser.get(f"http://127.0.0.1:{port}/lab/tree/{notebook}?reset")
            wait = WebDriverWait(browser, 600)
            wait.until(lambda b: b.execute_script(OPENED))
            wait.until(lambda b: b.execute_script(IDLE))
            time.sleep(2)  # cells are drawn after the model is there
            yield browser, wait
            if kept := os.environ.get("DEME_SCREENSHOTS"):  # for a person to look at
                browser.save_screenshot(f"{kept}/{notebook}.png")
    finally:
        server.terminate()
        server.wait(30)


def test_a_notebook_shows_its_committed_outputs(tmp_path):
    shutil.copy(ROOT / "notebooks" / "05_evaluation.ipynb", tmp_path)
    with opened("05_evaluation.ipynb", tmp_path) as (browser, _):
        assert browser.execute_script(PICTURES) >= 1
        assert "DeMe merged" in browser.execute_script(SHOWN)


def test_06_runs_to_its_end(tmp_path):
    values = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text()) | {"seeds": [0]}
    values |= {"runs_dir": str(tmp_path / "runs"), "figures_dir": str(tmp_path / "figures")}
    notebook = load_notebook_node(str(ROOT / "notebooks" / "06_figures.ipynb"))
    write_ipynb(parameterize_notebook(notebook, values), str(tmp_path / "06.ipynb"))
    with opened("06.ipynb", tmp_path) as (browser, wait):
        browser.execute_script(RUN)
        wait.until(lambda b: b.execute_script(DONE))
        held, shown = json.loads(browser.execute_script(HELD)), browser.execute_script(SHOWN)
    outputs = [o for cell in held["cells"] for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert "making landscape" in json.dumps(outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 10
    assert "widget" not in json.dumps(outputs) and "%|" not in shown
