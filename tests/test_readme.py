"""What the pages say is what the repository does and holds."""

import re

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from PIL import Image

from deme_lib import ROOT
from deme_lib.diffusion.models import new_scheduler, new_unet, save_pipeline
from deme_lib.experiment import parameters
from deme_lib.method.projection import ProjectedUNet2DModel
from deme_lib.report import tables

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
FINDINGS = {
    "What the trainings say": ["fashion8"],
    "The paper's tables": ["techniques", "ranges", "probability", "reweighting"],
    "A larger model": ["wider", "fashion8"],
}
"""Sections of figures/README.md, and the experiments that their tables' numbers are of."""
FASHION8S = "experiment dataset pretrained image_size train_images search_images test_images "
FASHION8S += "num_train_timesteps total_steps finetune_lr batch_size sampling_steps "
FASHION8S += "samples features second_features seeds"
"""Parameters whose defaults are of fashion8 and no other experiment."""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A tiny pipeline and images, where the example expects a user's own."""
    monkeypatch.chdir(tmp_path)
    save_pipeline(new_unet((1, 8, 8), [8, 16], 1, seed=0), new_scheduler(1000), "my-model")
    (tmp_path / "my-images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (80, 8, 8), np.uint8)):
        Image.fromarray(image).save(f"my-images/{i}.png")


def test_the_example_runs_as_it_stands_but_for_sizes(own, capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    smaller = {"size=32": "size=8", "n=5000": "n=80", "inception": "fashion8-a"}
    for written, small in smaller.items():
        assert written in example
        example = example.replace(written, small)
    scope = {}
    exec(example, scope)
    assert len(scope["experts"]) == 4
    assert len(re.findall(r"FID \d.*KID.*IS.*n = 80", capsys.readouterr().out)) == 2
    x, after = torch.randn(2, 1, 8, 8), ProjectedUNet2DModel.from_pretrained("my-merged-model/unet")
    before = DDPMPipeline.from_pretrained("my-model").unet
    assert not torch.equal(before(x, 5).sample, after(x, 5).sample)


def test_the_table_is_that_of_the_committed_records(known):
    table = re.search(r"<!-- table -->\n(.*)\n<!-- /table -->", README, re.DOTALL)[1]
    assert table.strip() == tables.readme(known).strip()


def test_numbers_of_the_findings_stand_in_a_committed_table():
    page = (ROOT / "figures" / "README.md").read_text()
    for heading, names in FINDINGS.items():
        part = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        said = [row for row in part.splitlines() if row.startswith("| ")]
        if names == ["fashion8"]:  # without the old answer, and with what the README says
            said = [row.rsplit("|", 2)[0] for row in said]
            said.append(README.split("<!-- /table -->")[1].split("\n## ")[0])
        files = [ROOT / "figures" / n / f"{k}.md" for n in names for k in ("table", "comparisons")]
        printed = "".join(file.read_text() for file in files)
        numbers = re.findall(r"[−+]?\d[\d,]*\.\d+(?: ± \d+\.\d+)?", "\n".join(said))
        assert len(numbers) > 24
        for number in numbers:
            assert re.search(rf"(?<![\d.−]){re.escape(number)}(?![\d.])", printed), number


def test_the_readme_is_short():
    assert len(README.encode()) <= 8 * 1024


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_targets_and_parameter_files_are_there(page):
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    links = re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", text)
    assert not [link for link in links if not (page.parent / link).exists()]
    anchors = re.findall(r"\]\(([^)#]*)#([^)]*)\)", text)
    for link, anchor in anchors:
        heads = re.findall(r"^#+ (.*)", (page.parent / link if link else page).read_text(), re.M)
        assert anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
    for target in re.findall(r"(?:`|^)make ([a-z]+)", text, re.M):
        assert f"\n{target}:" in makefile, target
    files = set(re.findall(r"params/[\w-]+\.yaml", text)) - {"params/mine.yaml"}
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_the_parameter_file_for_ones_own_model_names_what_is_fashion8s():
    text = (ROOT / "params" / "README.md").read_text()
    values = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    p = parameters.check(values, "params/README.md")
    assert (p.pretrained, p.features) == ("my-model", "inception")
    assert not set(FASHION8S.split()) - values.keys()
