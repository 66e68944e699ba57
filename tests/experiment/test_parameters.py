"""Parameters and the ways in: the schema's types and ranges, files, notebooks."""

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from papermill.translators import PythonTranslator

from deme_lib.__main__ import main
from deme_lib.experiment import parameters
from deme_lib.experiment.parameters import FIELDS, ParameterError, check, from_notebook, load

DEFAULTS = check({}, "nothing")
PRESET_FILES = sorted(parameters.PRESETS.glob("*.yaml"))


def of_type(kind):
    return st.sampled_from(sorted(n for n, field in FIELDS.items() if field.annotation is kind))


def rejected(values, source="here"):
    with pytest.raises(ParameterError) as caught:
        check(values, source)
    assert source in str(caught.value)
    return str(caught.value)


# names, types, ranges


@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_a_misspelt_name_suggests_the_right_one(name, data):
    i = data.draw(st.integers(0, len(name) - 1))
    typo = name[:i] + name[i] + name[i:]
    assume(typo not in FIELDS)
    assert f"unknown parameter {typo!r}; did you mean {name!r}?" in rejected({typo: 1})


def test_a_name_like_no_other_points_to_the_list():
    assert "there are adam_beta1, adam_beta2, again" in rejected({"xyzzy": 1})


WRONG = {
    int: [True, 4.0, 4.5, "1e3", None, [4], "x"],
    float: [True, "fast", None, [0.5], float("nan"), float("inf"), -float("inf")],
    bool: [0, 1, "yes", None],
    str: [0, 1.5, False, None, ["x"]],
}


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_no_other_type_is_taken(kind):
    @given(of_type(kind), st.sampled_from(WRONG[kind]))
    def test(name, value):
        assert name in rejected({name: value})

    test()


def test_every_problem_is_named_at_once():
    message = rejected({"probability": 2.0, "seeds": [-1, "a"]})
    assert "probability" in message and "seeds" in message


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("merge_weights", "[0.1, 0, 1, 2.5]", [0.1, 0, 1, 2.5]),
        ("merge_weights", "uniform", "uniform"),
        ("finetune_lr", "1e-5", 1e-5),
        ("dataset", "5", "5"),
    ],
)
def test_text_is_read_where_a_list_or_a_number_is_wanted(name, text, value):
    """papermill's -p hands lists over as text, and YAML 1.1 reads 1e-5 as text."""
    assert getattr(check({name: text}, "-p"), name) == value


def test_another_data_set_is_pretrained_on_unless_a_model_is_named():
    """The shipped pretrained model is of the default data set alone."""
    assert check({"dataset": "mine"}, "here").pretrained == ""
    assert check({"dataset": "mine", "pretrained": DEFAULTS.pretrained}, "here").pretrained == ""
    assert check({"dataset": "mine", "pretrained": "model"}, "here").pretrained == "model"


def test_a_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert check({"runs_dir": "~/runs"}, "here").runs_dir == "/home/somebody/runs"


# files


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda p: p.stem)
def test_every_preset_loads_and_is_itself(path):
    preset = load(path)
    assert preset.experiment == path.stem == parameters.folder_name(preset)
    assert load(f"params/{path.name}") == preset
    changed = load(path, margin=0.1)
    assert parameters.folder_name(changed) == f"{path.stem}-{changed.digest()}"
    assert parameters.folder_name(load(path, runs_dir="elsewhere", seeds=[9])) == path.stem


def test_the_listing_is_a_parameter_file(tmp_path):
    (tmp_path / "all.yaml").write_text(parameters.listing())
    assert yaml.safe_load(parameters.listing()).keys() == FIELDS.keys()
    assert load(tmp_path / "all.yaml") == DEFAULTS
    kind = "{maximum: 10000000, minimum: 4, type: integer}"
    assert f"samples: 5000  # {kind}: images per row" in parameters.listing()
    assert "device: auto  # {enum: [auto, cpu, cuda], type: string}: where" in parameters.listing()


FILES = {
    "an octal": ("samples: 0100", "YAML reads 0100 as 64", "write it in digits"),
    "a bare no": ("precision: no", "precision", "'no', 'bf16' or 'fp16'", "needs quotes"),
    "a path for a name": ("experiment: ../up", "experiment", "match pattern"),
    "too few weights": ("merge_weights: [0.5]", "1 weights for n_ranges=4", "one each"),
    "too few for KID": ("kid_subset_size: 6000", "as many samples (5000)", "lower it"),
    "too few for IS": ("is_splits: 2501", "is_splits=2501", "lower it"),
    "unknown features": ("features: digits-z", "features='digits-z'", "'digits-a'", "inception"),
    "no comparison": ("primary_merging: [merged]", "'merged'", "write 'a - b'"),
    "a pair twice": ("exploratory: [soup - averaged, averaged - soup]", "named twice", "it once"),
    "an EMA too long": ("ema_fraction: 0.5", "ema_fraction", "less than or equal to 0.25"),
    "an unknown sampler": ("sampler: euler", "sampler", "'dpm-solver', 'ddim'"),
    "steps that N does not divide": ("n_ranges: 3", "total_steps=4000", "give a multiple"),
    "an unknown arm": ("arms: [deme_merge]", "unknown arm", "did you mean 'deme_merged'?"),
    "a cell's typo": ("cells: [{cell: a, n_rangs: 2}]", "cell 'a'", "did you mean 'n_ranges'?"),
    "a longer cell": ("cells: [{cell: a, total_steps: 8}]", "unknown parameter of cell 'a'"),
    "a cell without a name": ("cells: [{n_ranges: 2}]", "needs a name"),
    "two cells of one name": ("cells: [{cell: a}, {cell: a}]", "give a name twice"),
    "an odd cell": ("cells: [{cell: a, n_ranges: 3}]", "a cell does not fit", "give a multiple"),
    "another arm's number": ("cells: [{cell: a, paper: {ties: 3.5}}]", "paper of cell 'a'"),
    "an unknown base": ("base: plain", "unknown row in base 'plain'", "'all_plain'"),
    "a shared row's number": ("cells: [{cell: a, paper: {pretrained: 4}}]", "paper of cell 'a'"),
    "too few draws": ("loss_images: 3", "n_ranges=4 needs as many loss_images (3)"),
    "too many bins": ("test_images: 800\nloss_bins: 900", "as many test_images (800)"),
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


# notebooks

CELL = "n_ranges: int = 4  # N of Eq. 3\nprobability: float = 0.3\npretrained: str = 'fashion8'\n"


def notebook(*cells):
    """The namespace of a notebook that ran these cells, as IPython leaves it."""
    namespace = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, namespace)
    return namespace


def injected(values):
    return PythonTranslator.codify(values)  # papermill's own, with its "# Parameters"


EDITED = CELL.replace("4", "2")
OTHERS = ["width = 4", "samples = [x for x in range(3)]", "def seed(): pass", "a, b = 1, 2"]


@pytest.mark.parametrize(
    ("cells", "changed"),
    [
        ([], {}),
        (["import os", CELL], {}),
        ([CELL, EDITED], {"n_ranges": 2}),
        ([CELL, "seeds = [3]"], {"seeds": [3]}),
        ([CELL, *OTHERS, "helper: int = 1"], {}),  # nobody's business
        ([EDITED + "samples = 2 * 3000\n"], {"n_ranges": 2, "samples": 6000}),  # not ignored
        ([EDITED + "import os\nsamples = 6000\n"], {"n_ranges": 2, "samples": 6000}),
    ],
)
def test_a_notebook_s_own_cells_count(cells, changed):
    assert from_notebook(notebook(*cells)) == check(changed, "here")


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda p: p.stem)
def test_papermill_with_a_preset_equals_loading_it(path):
    cell = injected(yaml.safe_load(path.read_text()))
    assert from_notebook(notebook(CELL, cell)) == load(path)


def test_unknown_parameters_of_papermill_or_a_cell_are_errors():
    """Without a traceback in the notebook."""
    wrong = [injected({"n_rangs": 8}), injected({"n_ranges": 8, "n_rangs": 8})]
    for cell in (*wrong, CELL.replace("n_ranges", "n_rangs")):
        with pytest.raises(ParameterError, match=r"'n_rangs'.*'n_ranges'") as caught:
            from_notebook(notebook(CELL, cell, "seeds = [3]"))
    assert caught.value._render_traceback_() == [f"ParameterError: {caught.value}"]


def test_papermills_non_finite_numbers_are_errors():
    """papermill writes float('nan'), which is no literal; the cell still counts."""
    with pytest.raises(ParameterError, match="finetune_lr"):
        from_notebook(notebook(CELL, injected({"finetune_lr": float("nan"), "n_ranges": 3})))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("search_trials", "write name=value"),
        ("search_trials=0100", "YAML reads 0100 as 64"),
        ("arms=[a", "arms is not valid YAML"),
    ],
)
def test_a_parameter_on_the_command_line_is_read_as_one_of_a_file(written, words, capsys):
    with pytest.raises(SystemExit):
        main(["make", "data", "-p", written])
    assert words in capsys.readouterr().err
