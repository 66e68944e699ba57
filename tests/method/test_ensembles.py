"""Routed and averaged ensembles (paper Eq. 7 and its rival)."""

import pytest
import torch
from tiny_models import add_adapter, equal
from torch import nn

from deme_lib.method.ensembles import AveragedEnsemble, RoutedEnsemble, WithAdapter
from deme_lib.method.projection import ProjectedUNet2DModel
from deme_lib.method.timesteps import split_timesteps

RANGES = split_timesteps(4, 1000)
KINDS = {"routed": lambda experts: RoutedEnsemble(experts, RANGES), "averaged": AveragedEnsemble}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


class Denoiser(nn.Module):
    """eps(x, t) = t / 1000; remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, sample, timestep, **more):
        self.asked.append((sample, timestep, more))
        return (torch.zeros_like(sample) + timestep.view(-1, 1, 1, 1) / 1000, "kept")

    def to(self, device):
        self.asked.append(device)
        return self


@pytest.fixture
def experts(tiny_unet):
    return [tiny_unet(seed) for seed in range(4)]


@torch.no_grad()
def predict(denoiser, sample, timesteps):
    return denoiser(sample, timesteps).sample


def close(first, second):
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def by_hand(kind, experts, sample, t):
    """A prediction at one timestep."""
    if kind is KINDS["routed"]:
        return predict(experts[t * 4 // 1000], sample, t)
    return torch.stack([predict(expert, sample, t) for expert in experts]).mean(0)


@kinds
@pytest.mark.parametrize("timesteps", [None, 600, torch.tensor(600), torch.tensor([600])])
def test_every_sample_is_predicted_as_on_its_own(make, timesteps, experts, noisy_batch):
    samples, mixed = noisy_batch
    timesteps = mixed if timesteps is None else timesteps
    together = predict(make(experts), samples, timesteps)
    for i, t in enumerate(torch.as_tensor(timesteps).expand(len(samples)).tolist()):
        close(together[i : i + 1], by_hand(make, experts, samples[i : i + 1], t))


def test_a_batch_of_one_timestep_costs_one_model_and_no_copy(noisy_batch):
    samples, experts = noisy_batch[0], [Denoiser() for _ in range(4)]
    for timestep in (torch.tensor(600), torch.full((5,), 600)):
        RoutedEnsemble(experts, RANGES)(samples, timestep)
        assert experts[2].asked[-1][0] is samples
    assert [len(e.asked) for e in experts] == [0, 0, 2, 0]


def test_a_mixed_batch_is_cut_wherever_it_is(noisy_batch):
    """Every tensor of as many rows as timesteps, in tuples and dictionaries; all else is shared.
    Each sample goes to one expert, once."""
    samples, timesteps = noisy_batch
    experts = [Denoiser() for _ in range(4)]
    rows, ids = torch.arange(5), torch.arange(7)
    given = {"text": rows, "added": {"time": (rows, ids)}, "scale": 2.0, "flag": None}
    found, kept = RoutedEnsemble(experts, RANGES)(sample=samples, timestep=timesteps, **given)
    assert torch.equal(found[:, 0, 0, 0], timesteps / 1000) and kept == "kept"
    own = [[1, 4], [2], [3], [0]]
    for expert, mine in zip(experts, own, strict=True):
        ((sample, timestep, more),) = expert.asked
        assert torch.equal(sample, samples[mine]) and torch.equal(timestep, timesteps[mine])
        assert more["text"].tolist() == more["added"]["time"][0].tolist() == mine
        assert more["added"]["time"][1] is ids and more["scale"] == 2.0 and more["flag"] is None
    AveragedEnsemble(experts[:2])(samples, timestep=timesteps, **given)
    assert all(e.asked[-1][0] is samples and e.asked[-1][2] == given for e in experts[:2])


@pytest.mark.parametrize(("scale", "last"), [(1, 1000.0), (1000, 1.0)])
def test_floats_are_routed_by_t(scale, last, noisy_batch):
    """1000 is the first timestep of a flow; Flux is called with a thousandth of it."""
    experts, samples = [Denoiser() for _ in range(4)], noisy_batch[0]
    timesteps = torch.tensor([last, 749.9 / scale, 250.1 / scale, 0.5 / scale, 249.9 / scale])
    RoutedEnsemble(experts, RANGES, scale)(samples, timestep=timesteps)
    assert [e.asked[0][1].tolist() for e in experts] == [
        timesteps[mine].tolist() for mine in ([3, 4], [2], [1], [0])
    ]


def test_only_the_active_expert_is_on_the_device(noisy_batch):
    experts, samples = [Denoiser() for _ in range(4)], noisy_batch[0]
    ensemble = RoutedEnsemble(experts, RANGES, active_on="meta")
    assert ensemble.device == torch.device("meta") and ensemble.to("meta") is ensemble
    for t in (900, 800, 100):
        ensemble(samples, torch.tensor(t))
    moves = [[a for a in expert.asked if isinstance(a, str)] for expert in experts]
    assert moves == [["cpu", "meta"], ["cpu"], ["cpu"], ["cpu", "meta", "cpu"]]


@kinds
def test_what_is_saved_loads_the_same(make, experts, noisy_batch, tmp_path):
    experts[0] = ProjectedUNet2DModel.from_stock(experts[0])
    ensemble = make(experts)
    ensemble.save_pretrained(tmp_path)
    loaded = type(ensemble).from_pretrained(tmp_path)
    close(predict(loaded, *noisy_batch), predict(ensemble, *noisy_batch))
    assert equal(loaded, ensemble)
    assert [type(a) for a in loaded.members] == [type(a) for a in experts]
    assert getattr(loaded, "ranges", None) == getattr(ensemble, "ranges", None)
    narrow = type(ensemble).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and narrow.config == loaded.config
    other = {RoutedEnsemble: AveragedEnsemble, AveragedEnsemble: RoutedEnsemble}[type(ensemble)]
    with pytest.raises(ValueError, match=f"holds a {type(ensemble).__name__}: load it with"):
        other.from_pretrained(tmp_path)


def test_adapters_take_turns_and_are_not_saved(experts, noisy_batch, tmp_path):
    model, alone = experts[0], []
    for seed, name in enumerate("ab"):
        add_adapter(model, seed, name, target_modules=["conv1"])
        alone.append(predict(model, *noisy_batch))  # the last one added is active
    members = [WithAdapter(model, name) for name in "ab"]
    for member, expected in zip(members, alone, strict=True):
        assert torch.equal(predict(member, *noisy_batch), expected)
    assert not torch.equal(*alone)
    with pytest.raises(ValueError, match=r"'typo' is to be one of \['a', 'b'\]"):
        WithAdapter(model, "typo")
    with pytest.raises(ValueError, match="fuse and unload these first"):
        AveragedEnsemble(members).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("count", "ranges", "words"),
    [
        (2, [range(0, 400), range(500, 1000)], "must tile the timesteps in order"),
        (3, RANGES, "3 experts for 4 ranges"),
        (0, [], "at least one member"),
    ],
)
def test_members_and_ranges_must_fit(count, ranges, words, experts):
    with pytest.raises(ValueError, match=words):
        RoutedEnsemble(experts[:count], ranges)
