"""Wrong inputs, one of a kind: refused with culprit and remedy.

Those of a file are here; of models, images, sweeps and records beside what reads them.
"""

import pytest

from deme_lib.__main__ import main
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
    "too few for IS": ("is_splits: 6000", "is_splits=6000", "lower it"),
    "unknown features": ("features: digits-z", "features='digits-z'", "'digits-a'", "inception"),
    "no comparison": ("primary_merging: [merged]", "'merged'", "write 'a - b'"),
    "a comparison twice": (
        "primary_merging: [averaged - deme_merged, deme_merged - averaged]",
        "named twice",
        "name it once",
    ),
    "an EMA too long": ("finetune_steps: 40\nema_decay: 0.95", "ema_decay=0.95", "at most 0.9"),
    "too few for curves": ("loss_images: 20000", "as many search_images (10000)", "lower it"),
    "a list": ("- 1", "bad.yaml", "flat list of `name: value` lines"),
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


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sweep -f params/smoke.yaml", ("smoke.yaml is no sweep", "params/sweeps")),
        ("make expert-9of2 -f params/smoke.yaml", ("expert-9of2", "jobs are")),
    ],
)
def test_a_wrong_command_is_explained_with_an_exit_code(command, words, capsys):
    assert main(command.split()) == 1
    said = capsys.readouterr().err
    assert not [word for word in words if word not in said]
