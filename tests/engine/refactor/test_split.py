from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from engine.errors import ConfigError
from engine.refactor.plan import SplitSettings
from engine.refactor.source import open_source
from engine.refactor.split import _assign_equally, balanced_clusters, contributions, split_neurons
from tests.engine.refactor.conftest import MakeLlama

SETTINGS = SplitSettings(num_experts=4, shared_size=8, num_active=3)


def grouped_activity(num_tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Contributions [N, 40] of 8 neurons that are always large and 4 groups of 8 that fire together, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    firing = (torch.rand(num_tokens, 4, generator=generator) < 0.3).float()
    groups = firing.repeat_interleave(8, dim=1)
    activity = torch.cat((torch.full((num_tokens, 8), 3.0), groups), dim=1)
    activity += 0.1 * torch.rand(activity.shape, generator=generator)
    order = torch.randperm(40, generator=generator)
    return activity[:, order], order


def test_neurons_that_always_contribute_are_shared_and_those_that_fire_together_form_an_expert() -> None:
    activity, order = grouped_activity()
    permutation = split_neurons(activity, SETTINGS)
    planted = order[permutation]  # neuron number before shuffling: 0-7 always on, then groups of 8
    assert set(planted[:8].tolist()) == set(range(8))
    for expert in planted[8:].view(4, 8):
        assert len(set(((expert - 8) // 8).tolist())) == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_permutation_is_a_permutation_with_equal_ascending_experts(seed: int) -> None:
    activity = torch.rand(50, 40, generator=torch.Generator().manual_seed(seed))
    permutation = split_neurons(activity, SETTINGS)
    assert torch.equal(permutation.sort().values, torch.arange(40))
    for part in permutation.split(8):
        assert torch.equal(part, part.sort().values)
    assert torch.equal(permutation, split_neurons(activity, SETTINGS))


@pytest.mark.parametrize(("num_points", "num_clusters"), [(40, 1), (40, 4), (40, 40), (96, 3)])
def test_clusters_are_equal_even_where_points_are_all_the_same(num_points: int, num_clusters: int) -> None:
    for points in (torch.zeros(num_points, 5), torch.rand(num_points, 5, generator=torch.Generator().manual_seed(0))):
        labels = balanced_clusters(points, num_clusters)
        assert labels.bincount(minlength=num_clusters).tolist() == [num_points // num_clusters] * num_clusters


@pytest.mark.parametrize("seed", range(5))
def test_the_equal_assignment_is_close_to_the_exact_one(seed: int) -> None:
    costs = torch.rand(120, 6, generator=torch.Generator().manual_seed(seed))
    labels = _assign_equally(costs)
    rows, columns = linear_sum_assignment(costs.repeat_interleave(20, dim=1).double().numpy())
    exact = costs[torch.tensor(rows), torch.tensor(columns) // 20].sum()
    found = costs[torch.arange(120), labels].sum()
    anyhow = costs.mean() * 120
    assert found - exact < 0.05 * (anyhow - exact)


def test_a_contribution_is_the_norm_of_what_a_neuron_adds_times_the_tokens_scale() -> None:
    neurons = torch.tensor([[2.0, -1.0]])
    down = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    assert contributions(neurons, down, torch.tensor([0.5])).tolist() == [[5.0, 1.0]]


@pytest.mark.parametrize(
    "settings",
    [
        SplitSettings(num_experts=7, shared_size=8, num_active=1),
        SplitSettings(num_experts=4, shared_size=0, num_active=1),
        SplitSettings(num_experts=4, shared_size=40, num_active=1),
        SplitSettings(num_experts=4, shared_size=8, num_active=5),
        SplitSettings(num_experts=4, shared_size=8, num_active=0),
    ],
)
def test_a_cut_that_does_not_come_out_even_is_refused(settings: SplitSettings) -> None:
    with pytest.raises(ConfigError):
        settings.expert_size(40)


def test_the_active_share_counts_shared_and_chosen_neurons_and_dense_layers(make_llama: MakeLlama) -> None:
    config = open_source(make_llama(intermediate_size=1536)[0]).config  # three layers
    assert SplitSettings().active_share(config) == pytest.approx((512 + 12 * 64) / 1536)
    assert SplitSettings(dense_layers=(0,)).active_share(config) == pytest.approx((1536 + 2 * (512 + 12 * 64)) / 4608)


@pytest.mark.parametrize("dense_layers", [(0, 1, 2), (3,), (-1,)])
def test_dense_layers_must_exist_and_leave_some_to_split(dense_layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"must leave some of the layers 0\.\.2"):
        SplitSettings(dense_layers=dense_layers).split_layers(3)
