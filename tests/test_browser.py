"""The pages and JupyterLab itself in a real browser: minutes, and where a Chromium is found."""

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
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.wait import WebDriverWait
from test_notebooks import NOTEBOOKS, run

from deme_lib import ROOT
from deme_lib.report.gallery import gallery

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
FLAGS += "--disable-background-networking --disable-component-update --disable-sync"
OPENED = "return window.jupyterapp?.shell.currentWidget?.content?.model?.cells?.length > 0"
IDLE = "return jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
RUN = "jupyterapp.commands.execute('notebook:run-all-cells')"
DONE = (
    IDLE
    + """ && (cells => cells.every(c => c.execution_count)
    || cells.some(c => c.outputs.some(o => o.output_type === 'error')))(
    jupyterapp.shell.currentWidget.content.model.toJSON().cells.filter(c => c.outputs))"""
)
HELD = "return JSON.stringify(jupyterapp.shell.currentWidget.content.model.toJSON())"
SHOWN = "return jupyterapp.shell.currentWidget.node.innerText"

pytestmark = [
    pytest.mark.stress,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder with all six notebooks executed, and their pages."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "smoke").mkdir()
    for path in NOTEBOOKS:
        run(path, folder / "smoke" / path.name, folder)
    (figures,) = (folder / "figures").iterdir()
    gallery(folder / "smoke", figures, folder / "site")
    return folder


@pytest.fixture
def browser(tmp_path):
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options, ChromeService(DRIVER)) as browser:
        browser.set_window_size(1400, 1600)
        yield browser


def screenshot(browser, name):
    """Kept for a person to look at, where DEME_SCREENSHOTS names a folder."""
    if folder := os.environ.get("DEME_SCREENSHOTS"):
        browser.save_screenshot(f"{folder}/{name}.png")


def test_the_site_shows_every_notebook(runs, browser):
    (site,) = (runs / "site").iterdir()
    browser.get(f"file://{site}/index.html")
    links = [a.get_attribute("href") for a in browser.find_elements("tag name", "a")]
    assert len(links) == len(NOTEBOOKS)
    for link in links:
        browser.get(link)
        height = browser.execute_script("return document.body.scrollHeight")
        browser.set_window_size(1400, min(height, 12000))
        screenshot(browser, link.rsplit("/")[-1])
        text = browser.find_element("tag name", "body").text
        for odd in ("Traceback", "made now", "%|", str(runs)):  # %|: a progress bar
            assert odd not in text
        broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert browser.execute_script(broken) == 0
        severe = [log for log in browser.get_log("browser") if log["level"] == "SEVERE"]
        assert not severe


def test_jupyterlab_runs_all_cells_of_06(runs, browser, tmp_path):
    (figures,) = (runs / "figures").iterdir()
    shutil.rmtree(figures / "records" / "seed-0")  # so that there is something to make, with bars
    (plane,) = (runs / "store").glob("plane-*")
    shutil.rmtree(plane)
    values = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    values |= {"runs_dir": str(runs), "figures_dir": str(runs / "figures")}
    notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOKS[-1])), values)
    write_ipynb(notebook, str(tmp_path / "06_figures.ipynb"))
    with lab(tmp_path) as address:
        browser.get(f"{address}/lab/tree/06_figures.ipynb?reset")
        wait = WebDriverWait(browser, 600)
        wait.until(lambda b: b.execute_script(OPENED))
        wait.until(lambda b: b.execute_script(IDLE))
        browser.execute_script(RUN)
        wait.until(lambda b: b.execute_script(DONE))
        time.sleep(1)
        screenshot(browser, "lab")
        held, shown = json.loads(browser.execute_script(HELD)), browser.execute_script(SHOWN)
    outputs = [o for cell in held["cells"] for o in cell.get("outputs", [])]
    assert all(c["execution_count"] for c in held["cells"] if c["cell_type"] == "code")
    assert "made now: plane" in json.dumps(outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 10
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert "widget" not in json.dumps(outputs)
    assert "%|" not in shown, "a progress bar"


@contextmanager
def lab(folder):
    """JupyterLab on ``folder``, with settings of its own and no network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --IdentityProvider.token="
    options += f" --ServerApp.root_dir={folder} --LabApp.expose_app_in_browser=True"
    options += " --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"
    settings = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "RUNTIME")}
    settings["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # its fonts are known there
    command, log = [sys.executable, "-m", "jupyterlab", *options.split()], folder / "lab.log"
    environment = {**os.environ, **settings, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        for _ in range(240):
            if "is running at" in log.read_text():
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
