"""Committed records changed, and records of several cells made from them."""

import json
import shutil

import pandas as pd
import pytest

from deme_lib import ROOT

COMMITTED = ROOT / "figures" / "fashion8" / "records"


@pytest.fixture
def folder(tmp_path):
    """A copy of the committed records: all trainings of nine arms."""
    return shutil.copytree(COMMITTED, tmp_path / "records")


@pytest.fixture
def change():
    """A function: apply another to CSVs of a folder, or to what run.json holds."""

    def change(folder, names, how):
        for path in (folder / name for name in names.split()):
            if path.suffix == ".json":
                found = json.loads(path.read_text())
                how(found)
                path.write_text(json.dumps(found))
            else:
                how(pd.read_csv(path, dtype={"weights": str})).to_csv(path, index=False)

    return change


@pytest.fixture
def cells(folder, change):
    """Records of two cells: "N = 2" holds the rows of one arm again, FID higher by 1."""

    def again(frame):
        mine = frame[frame["arm"] == "deme_merged"].assign(cell="N = 2")
        mine = mine.assign(fid=mine["fid"] + 1) if "fid" in mine else mine
        return pd.concat([frame[frame["arm"].isin(["pretrained", "all_plain"])], mine])

    def parameters(run):
        paper = [{"cell": "default"}, {"cell": "N = 2", "paper": {"deme_merged": 3.51}}]
        run["parameters"] |= {"base": "all_plain", "cells": paper}
        run["parameters"]["exploratory"] = ["N = 2 / deme_merged - pretrained"]

    change(folder, "metrics.csv arms.csv losses.csv", again)
    change(folder, "run.json", parameters)
    return folder
