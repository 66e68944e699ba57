"""Profiles and resources, and a real Slurm of two nodes of which one dies."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from deme_lib import ROOT

NEEDS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
PROFILES = sorted((ROOT / "params" / "profiles").glob("*/config.yaml"))
EXECUTORS = "snakemake_executor_plugin_slurm", "snakemake_executor_plugin_cluster_generic"


def snakemake(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A function: the rules of a dry run of a file, by name, as Snakemake prints them."""

    def plan(preset, *config, **changes):
        folder = tmp_path_factory.mktemp("plan")
        values = yaml.safe_load((ROOT / "params" / f"{preset}.yaml").read_text())
        values |= {"runs_dir": str(folder), **changes}
        (folder / "p.yaml").write_text(yaml.safe_dump(values))
        done = snakemake("-n", "--config", f"params={folder / 'p.yaml'}", *config)
        assert done.returncode == 0, done.stderr
        found = re.findall(r"^rule (\w+):\n((?: +.*\n)+)", done.stdout + done.stderr, re.M)
        return {name: dict(re.findall(r"(\w+)=(\d+)", told)) for name, told in found}

    return plan


def test_every_job_says_what_it_needs(planned):
    rules = {name: needs for name, needs in planned("smoke").items() if name != "all"}
    assert {"make_data", "make_deme_0", "make_evaluate_1", "notebook_06"} <= set(rules)
    assert all(int(r["mem_mb"]) >= 1000 and int(r["runtime"]) >= 30 for r in rules.values())
    assert {r["gpu"] for r in rules.values()} == {"0"}


def test_of_a_recorded_experiment_the_last_notebooks_are_left(planned):
    assert set(planned("fashion8", "figures=figures")) == {"all", "notebook_05", "notebook_06"}


def test_needs_grow_with_the_work_and_with_what_the_config_says(planned):
    usual, more = planned("smoke"), planned("smoke", "time=2", "memory=3")
    for name in ("make_deme_0", "make_evaluate_0"):
        assert int(more[name]["runtime"]) == pytest.approx(2 * int(usual[name]["runtime"]), abs=2)
        assert int(more[name]["mem_mb"]) == pytest.approx(3 * int(usual[name]["mem_mb"]), abs=3)
    longer = planned("smoke", finetune_steps=10_000, device="cuda", train_images=1000)
    assert longer["make_deme_0"]["gpu"] == "1"
    assert int(longer["make_deme_0"]["runtime"]) > int(usual["make_deme_0"]["runtime"])


def test_large_work_is_a_job_of_its_own(planned):
    rules = planned("smoke", finetune_steps=20_000)
    alone = [name for name in rules if name.startswith("make_deme_0_deme_")]
    assert len(alone) == 2 and "make_deme_0" not in rules


def test_a_worker_of_another_environment_is_told():
    done = snakemake("-n", "--config", "params=params/smoke.yaml", DEME_VERSIONS='{"torch": "1.0"}')
    assert done.returncode and "give both one environment" in done.stdout + done.stderr


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_profiles_keep_what_a_stopped_job_made(path):
    profile = yaml.safe_load(path.read_text())
    assert profile["keep-incomplete"] and profile["rerun-incomplete"]
    assert profile["rerun-triggers"] == ["mtime"]


@pytest.fixture
def slurm(tmp_path):
    """A function: the hashes of all that a run on a fresh Slurm stored, and what it printed."""
    if missing := [name for name in NEEDS if not shutil.which(name)]:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurm-wlm munge")
    for module in EXECUTORS:
        pytest.importorskip(module, reason="pip install -e '.[cluster]'")

    def run(name, *arguments):
        done = subprocess.run(
            [ROOT / "tests/cluster/slurm.sh", tmp_path / name, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return (tmp_path / name / "hashes.txt").read_text(), done.stdout

    return run


@pytest.mark.stress
def test_a_run_whose_node_died_ends_with_the_same_results(slurm):
    smoke = "--config", "params=params/smoke.yaml"
    whole, _ = slurm("whole", *smoke)
    killed, told = slurm("killed", "kill", *smoke)
    assert "Restarts=1" in told and killed == whole
