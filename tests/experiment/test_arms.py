"""An arm of one's own, in full: TIES merging (Yadav et al. 2023) on DeMe's experts."""

import copy

import pandas as pd
import torch
from tiny import experiment

from deme_lib.diffusion.merged import Merger
from deme_lib.experiment import collect
from deme_lib.experiment.arms import ARMS, DEME, Arm


def ties(base, members, ranges, kept=0.2):
    """Keep the largest 20 % of each task vector, elect signs, average what agrees with them."""
    merger = Merger(base, members)
    unet = copy.deepcopy(merger.base)
    state = unet.state_dict()
    for name, theta in merger.start.items():
        tau = torch.stack([vector[name] for vector in merger.vectors])  # [N, ...]
        flat = tau.abs().flatten(1)
        least = flat.kthvalue(flat.shape[1] - int(kept * flat.shape[1]), dim=1).values
        tau = tau * (tau.abs() >= least.view(-1, *[1] * (tau.dim() - 1)))
        agrees = (tau.sign() == tau.sum(0).sign()) & (tau != 0)
        state[name] = theta + (tau * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    unet.load_state_dict(state)
    return unet


def test_a_new_arm_is_one_function_and_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(ARMS, "ties", Arm("ties", "DeMe experts, TIES", DEME, ties))
    p = experiment(
        tmp_path / "runs", arms=["deme_merged", "ties"], exploratory=["ties - deme_merged"]
    )
    metrics = pd.read_csv(collect.collect(p) / "records" / "metrics.csv").set_index("arm")
    assert list(metrics.index) == ["pretrained", "deme_merged", "ties"]
    assert metrics["fid"].nunique() == 3
