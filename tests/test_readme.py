"""What the READMEs say is what the repository does and holds."""

import re

import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from safetensors.torch import save_file

from deme_lib import ROOT
from deme_lib.diffusion.models import load_pipeline, new_scheduler, new_unet, save_pipeline
from deme_lib.experiment import parameters
from deme_lib.method.projection import ProjectedUNet2DModel
from deme_lib.report import readme

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *ROOT.glob("figures/*/README.md")]
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


def test_without_projections_diffusers_needs_no_help(own_model):
    exec(EXAMPLE.replace("steps=50", "steps=1, channel_projection=False"), {})
    pipeline = DDPMPipeline.from_pretrained("my-merged-model")
    assert type(pipeline.unet).__name__ == "UNet2DModel"
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_numbers_and_verdicts_are_those_of_the_committed_records(page):
    assert readme.fill(page.read_text(), ROOT / "figures") == page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_readme_is_short():
    assert len(README.encode()) <= 8 * 1024


def test_the_parameter_file_for_ones_own_model_is_valid():
    text = (ROOT / "params" / "README.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1)
    p = parameters.check(yaml.safe_load(block), "params/README.md")
    assert (p.pretrained, p.features) == ("my-model", "inception")


def test_the_makefile_has_the_targets_and_files_named():
    makefile = (ROOT / "Makefile").read_text()
    text = "".join(page.read_text() for page in PAGES)
    targets = set(re.findall(r"(?:`|^)make ([a-z]+)", text, flags=re.MULTILINE))
    assert {"reproduce", "sweep", "check", "test", "figures"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile
    files = set(re.findall(r"(?:PARAMS|SWEEP|-f )=?(params/\S+?\.yaml)", text)) - {
        "params/mine.yaml"
    }
    assert files and all((ROOT / file).is_file() for file in files)
