"""The README's example, tables, figures and links are what the repository does and holds."""

import re
import subprocess

import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from safetensors.torch import save_file

from deme_lib import ROOT
from deme_lib.diffusion.models import load_pipeline, new_scheduler, new_unet, save_pipeline
from deme_lib.experiment import parameters
from deme_lib.method.projection import ProjectedUNet2DModel

README = (ROOT / "README.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A tiny pipeline folder and image tensor, where the example expects a user's own."""
    monkeypatch.chdir(tmp_path)
    save_pipeline(new_unet((3, 8, 8), [8, 8], 1, seed=0), new_scheduler(100), "my-model")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator)
    save_file({"images": images}, "my-images.safetensors")
    return tmp_path


def test_the_example_runs_as_it_stands(own_model):
    scope = {}
    exec(EXAMPLE, scope)
    assert len(scope["experts"]) == 4
    before, after = load_pipeline("my-model").unet, load_pipeline("my-merged-model").unet
    assert isinstance(after, ProjectedUNet2DModel)
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(before(x, 5).sample, after(x, 5).sample)
    unet = ProjectedUNet2DModel.from_pretrained("my-merged-model/unet")
    pipeline = DDPMPipeline.from_pretrained("my-merged-model", unet=unet)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


def test_without_projections_diffusers_needs_no_help(own_model):
    exec(EXAMPLE.replace("steps=50", "steps=1, channel_projection=False"), {})
    pipeline = DDPMPipeline.from_pretrained("my-merged-model")
    assert type(pipeline.unet).__name__ == "UNet2DModel"
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("name", ["verdicts", "ablation1", "ablation2"])
def test_tables_are_the_generated_ones(name):
    """Against the committed file: a run on another machine moves the one in the working tree."""
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL).group(1)
    git = ["git", "-C", ROOT, "show", f"HEAD:figures/digits/{name}.md"]
    committed = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    assert shown == committed.strip()


def test_the_parameter_file_for_ones_own_model_is_valid():
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1)
    p = parameters.check(yaml.safe_load(block), "README")
    assert (p.pretrained, p.features) == ("my-model", "inception")


def test_links_and_figures_exist():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


def test_makefile_has_the_targets_named():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^)make ([a-z]+)", README, flags=re.MULTILINE))
    assert {"reproduce", "sweep", "check", "test"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile
    files = set(re.findall(r"(?:PARAMS|SWEEP)=(params/\S+\.yaml)", README)) - {"params/mine.yaml"}
    assert len(files) > 5 and all((ROOT / file).is_file() for file in files)
