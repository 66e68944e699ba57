"""Wrong inputs, one of a kind: refused with culprit and remedy.

Those of a file are here; of models, images and records beside what reads them.
"""

import pytest

from deme_lib.experiment.parameters import ParameterError, load

FILES = {
    "an integer as text": ("samples: 1e3", "samples=1000.0", "valid integer"),
    "an octal": ("samples: 0100", "YAML reads 0100 as 64", "write it in digits"),
    "a bare no": ("precision: no", "precision", "'no', 'bf16' or 'fp16'", "needs quotes"),
    "a path for a name": ("experiment: ../up", "experiment", "match pattern"),
    "a long name": (f"experiment: {'x' * 300}", "experiment", "at most 60 characters"),
    "a huge number": (f"batch_size: {10**30}", "batch_size", "less than or equal to"),
    "weights beyond reason": ("merge_weights: [1.0e+30, 1, 1, 1]", "merge_weights", "equal to 100"),
    "too few weights": ("merge_weights: [0.5]", "1 weights for n_ranges=4", "one each"),
    "too few for KID": ("kid_subset_size: 6000", "as many samples (5000)", "lower it"),
    "too few for IS": ("is_splits: 2501", "is_splits=2501", "lower it"),
    "unknown features": ("features: digits-z", "features='digits-z'", "'digits-a'", "inception"),
    "no comparison": ("primary_merging: [merged]", "'merged'", "write 'a - b'"),
    "a comparison twice": (
        "primary_merging: [averaged - deme_merged, deme_merged - averaged]",
        "named twice",
        "name it once",
    ),
    "an EMA too long": ("ema_fraction: 0.5", "ema_fraction", "less than or equal to 0.25"),
    "an unknown sampler": ("sampler: euler", "sampler", "'dpm-solver', 'ddim'"),
    "steps that N does not divide": ("n_ranges: 3", "total_steps=4000", "give a multiple"),
    "an unknown arm": ("arms: [deme_merge]", "unknown arm", "did you mean 'deme_merged'?"),
    "a cell's typo": ("cells: [{cell: a, n_rangs: 2}]", "cell 'a'", "did you mean 'n_ranges'?"),
    "a cell that trains longer": (
        "cells: [{cell: a, total_steps: 8}]",
        "unknown parameter",
        "cell",
    ),
    "a cell without a name": ("cells: [{n_ranges: 2}]", "needs a name"),
    "two cells of one name": ("cells: [{cell: a}, {cell: a}]", "give a name twice"),
    "a cell that does not fit": (
        "cells: [{cell: a, n_ranges: 3}]",
        "a cell does not fit",
        "multiple",
    ),
    "another arm's number": ("cells: [{cell: a, paper: {ties: 3.5}}]", "paper of cell 'a'"),
    "an unknown base": ("base: plain", "unknown row in base 'plain'", "'all_plain'"),
    "too few for curves": ("loss_images: 20000", "as many search_images (10000)", "lower it"),
    "a list": ("- 1", "bad.yaml", "list of `name: value` lines"),
    "twice": ("n_ranges: 2\nn_ranges: 4", "'n_ranges' twice", "delete one"),
    "an octal in a list": ("seeds: [1, 010]", "seeds: YAML reads 010 as 8", "write it in digits"),
    "no text": (b"\xff\xfe", "bad.yaml", "not valid YAML"),
    "code": ("experiment: !!python/object/apply:os.getcwd []", "bad.yaml", "not valid YAML"),
    "none": ("", "no parameter file", "there are params/"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_named_with_its_remedy(name, tmp_path):
    text, *words = FILES[name]
    (tmp_path / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ParameterError) as caught:
        load(tmp_path / "bad.yaml" if text else "")
    message = " ".join(str(caught.value).split())
    assert not [word for word in words if word not in message], message
