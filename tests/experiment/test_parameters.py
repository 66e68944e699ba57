"""The schema of parameters, and the ways in: files, overrides, notebooks."""

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from papermill.translators import PythonTranslator

from deme_lib.experiment.parameters import (
    EXECUTION,
    PRESETS,
    ParameterError,
    Parameters,
    check,
    from_notebook,
    load,
)

FIELDS = Parameters.model_fields
DEFAULTS = load("params/digits.yaml")
PRESET_FILES = sorted(PRESETS.glob("*.yaml"))


def of_type(kind):
    return sorted(name for name, field in FIELDS.items() if field.annotation is kind)


def rejected(name, value):
    with pytest.raises(ParameterError) as caught:
        check({name: value}, "here")
    assert name in str(caught.value) and "here" in str(caught.value)
    return str(caught.value)


# names


@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_a_misspelt_name_suggests_the_right_one(name, data):
    i = data.draw(st.integers(0, len(name) - 1))
    typo = name[:i] + name[i] + name[i:]
    assume(typo not in FIELDS)
    with pytest.raises(ParameterError, match=f"unknown parameter '{typo}'.*mean '{name}'"):
        check({typo: 1}, "here")


def test_a_name_like_no_other_points_to_the_list():
    assert "params/digits.yaml" in rejected("xyzzy", 1)


# types and ranges


@given(st.sampled_from(of_type(int)), st.sampled_from([True, 4.0, 4.5, "4", None, [4], "x"]))
def test_integers_are_integers(name, value):
    rejected(name, value)


@given(
    st.sampled_from(of_type(float)),
    st.sampled_from([True, "0.5", None, [0.5], float("nan"), float("inf"), -float("inf")]),
)
def test_floats_are_finite_numbers(name, value):
    rejected(name, value)


@given(st.sampled_from(of_type(bool)), st.sampled_from([0, 1, "true", None]))
def test_booleans_are_booleans(name, value):
    rejected(name, value)


@given(st.sampled_from(of_type(str)), st.sampled_from([0, 1.5, False, None, ["x"]]))
def test_text_is_text(name, value):
    rejected(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_ranges", 0),
        ("probability", -0.1),
        ("probability", 1.1),
        ("finetune_lr", 0.0),
        ("ema_decay", 1.0),
        ("confidence", 1.0),
        ("sampling_seeds", [0]),
        ("sampling_seeds", [0, "1"]),
        ("sampling_seeds", [-1, 0]),
        ("precision", False),  # YAML's bare `no`
        ("precision", "fp8"),
        ("experiment", "../up"),
        ("model_channels", []),
        ("merge_weights", [0.1, 0.2, 0.3, float("nan")]),
    ],
)
def test_values_out_of_range(name, value):
    rejected(name, value)


def test_an_integer_serves_as_a_float():
    assert check({"clip_norm": 2}, "here").clip_norm == 2.0


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "5e5"])
def test_numbers_that_yaml_reads_as_text_get_a_hint(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(f"finetune_lr: {text}\n")
    with pytest.raises(ParameterError, match=f"YAML reads {text} as text, write {float(text)!r}"):
        load(tmp_path / "mine.yaml")


def test_every_problem_is_named_at_once():
    with pytest.raises(ParameterError, match=r"(?s)probability.*seeds|seeds.*probability"):
        check({"probability": 2.0, "seeds": [-1, "a"]}, "here")


def test_parameters_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        DEFAULTS.seeds = [1]


# parameters that must fit together


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"n_ranges": 11, "num_train_timesteps": 10}, "n_ranges"),
        ({"merge_weights": "median"}, "merge_weights"),
        ({"merge_weights": [0.5, 0.5]}, "merge_weights"),
        ({"merge_weights": "[0.1, 0.2]"}, "merge_weights"),
        ({"merge_weights": "[0.1, 0.2"}, "merge_weights"),
        ({"search_low": 2.0, "search_high": 1.0}, "search_low"),
        ({"sampling_seeds": [0, 1, 0]}, "sampling_seeds"),
        ({"kid_subset_size": 301}, "kid_subset_size"),
        ({"is_splits": 10, "samples": 8, "kid_subset_size": 4}, "is_splits"),
        ({"model_channels": [16, 20]}, "model_channels"),
        ({"sampling_steps": 11, "num_train_timesteps": 10}, "sampling_steps"),
    ],
)
def test_parameters_must_fit_together(values, named):
    with pytest.raises(ParameterError, match=named):
        check(values, "here")


def test_merge_weights_are_read_from_papermills_text():
    assert check({"merge_weights": "[0.1, 0, 1, 2.5]"}, "-p").merge_weights == [0.1, 0, 1, 2.5]
    assert check({"merge_weights": "uniform"}, "-p").merge_weights == "uniform"


# files


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda p: p.stem)
def test_every_preset_loads_and_is_itself(path):
    preset = load(path)
    assert preset.experiment == path.stem
    assert preset.is_preset()
    changed = load(path, seeds=[preset.seed + 1])
    assert changed.seed == preset.seed + 1 and not changed.is_preset()
    assert not load(path, experiment="mine").is_preset()
    assert load(f"params/{path.name}") == preset


def test_digits_is_the_one_place_of_defaults():
    assert yaml.safe_load((PRESETS / "digits.yaml").read_text()).keys() == FIELDS.keys()
    assert FIELDS.keys() > EXECUTION
    assert check({}, "here") == DEFAULTS


def test_a_file_names_only_what_differs(tmp_path):
    (tmp_path / "mine.yaml").write_text("experiment: mine\nn_ranges: 8\nsearch_candidates: 20\n")
    mine = load(tmp_path / "mine.yaml")
    different = {n for n in FIELDS if getattr(mine, n) != getattr(DEFAULTS, n)}
    assert different == {"experiment", "n_ranges", "search_candidates"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- n_ranges\n- 4\n",
        "just text",
        "finetuning:\n  n_ranges: 4\n",
        "n_ranges:\n  value: 4\n",
        "4: 4\n",
        "n_ranges: [4\n",
        "seeds: 2024-13-45\n",
        "\xff\xfe",
    ],
)
def test_files_that_are_no_flat_yaml(tmp_path, text):
    (tmp_path / "mine.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ParameterError):
        load(tmp_path / "mine.yaml")


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir"])
def test_yaml_is_data_and_never_code(tmp_path, tag):
    mark = tmp_path / "made-by-yaml"
    (tmp_path / "mine.yaml").write_text(f"experiment: !!python/{tag} ['{mark}']\n")
    with pytest.raises(ParameterError, match="not valid YAML"):
        load(tmp_path / "mine.yaml")
    assert not mark.exists()


def test_a_missing_file_names_the_presets():
    with pytest.raises(ParameterError) as caught:
        load("params/nothing.yaml")
    assert all(f"params/{p.name}" in str(caught.value) for p in PRESET_FILES)


# notebooks

CELL = "n_ranges: int = 4  # N of Eq. 3\nprobability: float = 0.3\n"


def notebook(*cells):
    """The namespace of a notebook that ran these cells, as IPython leaves it."""
    namespace = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, namespace)
    return namespace


def injected(values):
    return PythonTranslator.codify(values)  # papermill's own, with its "# Parameters"


def test_a_notebooks_own_cell():
    assert from_notebook(notebook("import os", CELL)) == DEFAULTS
    assert from_notebook({}) == DEFAULTS


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda p: p.stem)
def test_papermill_with_a_preset_equals_loading_it(path):
    cell = injected(yaml.safe_load(path.read_text()))
    assert from_notebook(notebook(CELL, cell)) == load(path)


def test_papermills_unknown_parameters_are_errors():
    for values in ({"n_rangs": 8}, {"n_ranges": 8, "n_rangs": 8}):
        with pytest.raises(ParameterError, match=r"'n_rangs'.*'n_ranges'"):
            from_notebook(notebook(CELL, injected(values)))
        with pytest.raises(ParameterError, match="'n_rangs'"):
            from_notebook(notebook(CELL, injected(values), "seeds = [3]"))


def test_papermills_non_finite_numbers_are_errors():
    """papermill writes float('nan'), which is no literal; the cell still counts."""
    with pytest.raises(ParameterError, match="finetune_lr"):
        from_notebook(notebook(CELL, injected({"finetune_lr": float("nan"), "n_ranges": 8})))


def test_a_cell_edited_and_run_again_counts_as_edited():
    assert from_notebook(notebook(CELL, CELL.replace("4", "2"))).n_ranges == 2


def test_a_misspelling_in_an_edited_cell_is_an_error_until_it_is_corrected():
    misspelt = CELL.replace("n_ranges", "n_rangs")
    with pytest.raises(ParameterError, match=r"'n_rangs'.*'n_ranges'"):
        from_notebook(notebook(misspelt))
    assert from_notebook(notebook(misspelt, CELL)) == DEFAULTS


@pytest.mark.parametrize(
    "line",
    [
        "finetune_steps = 2 * 150",
        "finetune_steps = 300\nprint()",
        "import os\nfinetune_steps = 300",
    ],
)
def test_a_parameters_cell_with_more_than_literals_is_not_ignored(line):
    """Falling back to the defaults without a word would run another experiment."""
    namespace = notebook(CELL.replace("4", "2") + line + "\n")
    try:
        found = from_notebook(namespace)
    except ParameterError:
        return
    assert (found.n_ranges, found.finetune_steps) == (2, 300)


def test_other_cells_are_nobodys_business():
    cells = [
        "figure_width = 4",
        "samples = [x for x in range(3)]",
        "def seed(): pass",
        "a, b = 1, 2",
    ]
    assert from_notebook(notebook(CELL, *cells)) == DEFAULTS
