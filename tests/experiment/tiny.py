"""The smallest experiment, and children forked from a server that has imported torch already."""

import multiprocessing

from deme_lib.experiment import parameters

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["deme_lib.__main__", "deme_lib.experiment.graph"])
SIZES = {"train_images": 1200, "search_images": 16, "test_images": 16, "loss_images": 16}
SIZES |= {"model_channels": [8], "pretrain_steps": 8, "total_steps": 16, "batch_size": 4}
SIZES |= {"n_ranges": 2, "search_trials": 3, "search_samples": 8, "samples": 8, "loss_bins": 4}
SIZES |= {"sampling_steps": 2, "is_splits": 2, "kid_subset_size": 4, "kid_subsets": 2}
SIZES |= {"checkpoint_every": 2, "device": "cpu", "seeds": [0]}


def experiment(runs, **changes):
    places = {"runs_dir": str(runs), "figures_dir": f"{runs}-figures"}
    return parameters.load("params/smoke.yaml", **SIZES | places | changes)
