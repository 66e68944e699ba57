"""What Snakemake plans, and a real Slurm of two nodes of which one dies."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from deme_lib import ROOT
from deme_lib.experiment import graph, parameters
from deme_lib.experiment.store import make

PLUGIN = importlib.util.find_spec("snakemake_executor_plugin_slurm")
PROFILE = ["--profile", "params/profiles/slurm"] if PLUGIN else []
NEEDS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")


def snakemake(*arguments, **config):
    """What it prints, run from the repository."""
    command = [sys.executable, "-m", "snakemake", *arguments, "--config"]
    command += [f"{name}={value}" for name, value in config.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def planned(preset):
    """A function: (rule, what Snakemake prints of it) of each job in a dry run of smoke."""

    def plan(*arguments, config=(), **changes):
        path = preset(**changes)
        given = {"params": path, "figures": path.parent / "figures", **dict(config)}
        told = snakemake("-n", "-p", "--cores", "2", *arguments, **given)
        return re.findall(r"^rule (\w+):\n((?: +.*\n)+(?:Shell command:.*)?)", told, re.M)

    return plan


def test_fine_plans_a_job_per_expert_and_arm_and_spaces_are_quoted(planned, tmp_path):
    runs = tmp_path / "a space" / "runs"
    jobs = planned(*PROFILE, "--attempt=3", config={"fine": 1}, seeds=[0], runs_dir=str(runs))
    names = [name for name, _ in jobs if name != "all"]
    assert sum(name.startswith("make_deme_") for name in names) == 4
    assert sum(name.startswith("make_scores_") for name in names) == 9
    assert names.count("notebook") == 6
    for name, told in jobs:
        if name != "all":
            assert "mem_mb=24000" in told and "runtime=720" in told and "gpu=0" in told
        if name == "notebook":
            words = shlex.split(told.split("Shell command: ")[1])
            assert any(word.startswith(f"{runs}/smoke/0") for word in words)


def test_what_several_seeds_share_is_made_by_one_job(planned):
    jobs = [(name, told) for name, told in planned(device="cuda") if name != "all"]
    made = [path for _, told in jobs for path in re.search("output: (.*)", told)[1].split(", ")]
    assert len(made) == len(set(made))
    assert {"make_prepare", "make_baseline_0", "make_baseline_1"} <= {name for name, _ in jobs}
    assert all("mem_mb=8000" in told and "gpu=1" in told for _, told in jobs)


@pytest.mark.parametrize(
    ("seeds", "made"), [("0", {"0"}), ("0 1", {"0", "1"}), ("", set())], ids=["one", "two", "none"]
)
def test_reproduce_makes_the_seeds_again_that_it_names(tmp_path, seeds, made):
    """Committed records hold them all: without their names nothing is made."""
    of_fashion8 = {"params": "params/fashion8.yaml", "figures": tmp_path, "seeds": seeds}
    told = snakemake("-n", "--cores", "2", **of_fashion8)
    each = {s: parameters.load("params/fashion8.yaml", seeds=[int(s)]) for s in made}
    stored = {s for s, p in each.items() if graph.baseline(p).record.is_file()}
    assert {*re.findall(r"rule make_baseline_(\d+)", told)} == made - stored


def test_a_job_goes_on_from_what_a_stopped_one_made(preset):
    path = preset(seeds=[0])
    made = make(graph.data(parameters.load(path)))  # the first of the job's artefacts
    local = ("--profile", "params/profiles/local", "--cores=1")
    told = snakemake(*local, "make_prepare", params=path, figures=path.parent)
    assert f"making {made.name}" not in told and "making floor" in told


@pytest.mark.parametrize(
    "path", (ROOT / "params/profiles").glob("*/*"), ids=lambda p: p.parent.name
)
def test_profiles_keep_what_a_stopped_job_made(path):
    profile = yaml.safe_load(path.read_text())
    assert profile["keep-incomplete"] and profile["rerun-incomplete"]
    assert profile["rerun-triggers"] == ["mtime"]


@pytest.mark.stress
def test_a_run_whose_node_died_ends_with_the_same_artefacts(preset, tmp_path):
    if missing := [name for name in NEEDS if not shutil.which(name)]:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurm-wlm munge")
    if not PLUGIN:
        pytest.skip("needs pip install -e '.[cluster]'")
    config = "--config", f"params={preset(seeds=[0], runs_dir='runs')}"

    def run(name, *arguments):
        command = [ROOT / "tests/cluster/slurm.sh", tmp_path / name, *arguments, *config]
        environment = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return (tmp_path / name).read_text(), done.stdout

    whole, _ = run("whole", "jobs")
    killed, told = run("killed", "kill")
    assert "Restarts=1" in told and killed == whole
