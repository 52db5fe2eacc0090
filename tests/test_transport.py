"""Minibatch optimal transport: the assignment, its law, what it refuses and what it straightens."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from known_laws import pfgmpp
from scipy import stats
from test_configs import load

import methods
from experiment import Experiment
from library.trained import Trained
from methods.transport import transport
from samplers.consistency import ConsistencySampler
from samplers.ode import ODESampler
from samplers.pc import PCSampler
from solvers.fixed_steps import Churn
from sources.batch import Batch, Conditions
from sources.codec import EightBitImages

CODEC = EightBitImages((1, 2, 2))


def coupled(sde="flow", D=math.inf, **changes):
    numbers = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "coupling": "transport"}
    numbers |= {} if sde == "edm_vp" else {"P_mean": -1.2, "P_std": 1.2}
    numbers |= changes
    return methods.METHODS[sde](D=D, **numbers)


def test_the_assignment_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 6, 1, 2, 2, generator=generator)

    def cost(order, scale=1.0):
        return (images - scale * noise[list(order)]).square().sum().item()

    order = transport(images, noise).tolist()
    best = min(itertools.permutations(range(6)), key=cost)
    assert tuple(order) == best
    assert best == min(itertools.permutations(range(6)), key=lambda p: cost(p, 7.0))


def test_noise_is_exchanged_within_classes():
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 60, 1, 2, 2, generator=generator)
    labels = torch.arange(60) % 3 - 1  # one of the classes is none
    order = transport(images, noise, labels)
    assert order.sort().values.tolist() == list(range(60))
    assert torch.equal(labels[order], labels)
    for label in (-1, 0, 1):
        rows = (labels == label).nonzero().flatten()
        assert torch.equal(order[rows], rows[transport(images[rows], noise[rows])])


@pytest.mark.parametrize("D", [math.inf, 4.0])
@pytest.mark.parametrize("sde", ["flow", "trigflow", "pfgmpp", "edm_vp"])
def test_examples_are_those_of_drawn_noise_in_another_order(sde, D):
    y = torch.rand(64, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double() - 0.5
    plain, paired = (
        coupled(sde, D, coupling=name).draw(Batch(y), torch.Generator().manual_seed(1))
        for name in ("independent", "transport")
    )
    assert torch.equal(plain.t, paired.t)
    order = transport(y, plain.noise)
    assert torch.equal(paired.noise, plain.noise[order])
    assert (order != torch.arange(64)).any()
    again = coupled(sde, D).perturb_at(y, plain.t, torch.Generator().manual_seed(1))
    assert torch.isfinite(again).all()  # the kernel itself stays as it is


def test_noise_keeps_its_law():
    method = coupled("edm_vp", 4.0)
    y = torch.rand(400, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    noise = method.draw(Batch(y), torch.Generator().manual_seed(1)).noise.flatten()
    assert stats.kstest(noise.numpy(), stats.t(4).cdf).pvalue > 1e-3
    assert stats.spearmanr(noise.numpy(), y.flatten().numpy()).statistic == pytest.approx(1)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda m: ODESampler(method=m, codec=CODEC, solver="heun", churn=Churn(1.0)),
            "the noise of sampling.S_churn",
        ),
        (lambda m: PCSampler(method=m, codec=CODEC), "it has no SDE"),
        (
            lambda m: ODESampler(method=m, codec=CODEC, measurement=object(), restorer="dps"),
            "a restorer",
        ),
        (
            lambda m: ODESampler(method=m, codec=CODEC, measurement=object(), restorer="pigdm"),
            "a restorer",
        ),
        (lambda m: ODESampler(method=m, codec=CODEC, measurement=object()), "a restorer"),
        (
            lambda m: ConsistencySampler(method=m, codec=CODEC, n=2, levels=(0.8,)),
            "the noise of sampling.N=2",
        ),
    ],
)
@pytest.mark.parametrize("sde", ["flow", "pfgmpp"])
def test_what_needs_the_kernel_is_refused_in_one_line(sde, build, reason):
    with pytest.raises(ValueError, match=reason) as error:
        build(coupled(sde))
    assert "\n" not in str(error.value)
    if "pc" not in reason and "SDE" not in reason:
        assert "model.coupling='transport'" in str(error.value)


def test_what_a_coupled_network_can_do_is_not_refused():
    method = coupled()
    ODESampler(method=method, codec=CODEC, solver="heun")
    ConsistencySampler(method=method, codec=CODEC, n=1)
    method.check_likelihood()


def test_coupling_needs_images_as_targets_and_no_conditions_but_classes():
    with pytest.raises(ValueError, match="needs training.target='image'"):
        coupled(target_kind="posterior_mean")
    with pytest.raises(ValueError, match="unknown model.coupling='pairs'"):
        coupled(coupling="pairs")
    batch = Batch(torch.zeros(4, 1, 2, 2), Conditions(vector=torch.zeros(4, 2)))
    with pytest.raises(ValueError, match="a condition 'vector'"):
        coupled().draw(batch)


@pytest.mark.parametrize(
    ("values", "condition"),
    [
        ({"data.conditions": "vector"}, "vector"),
        ({"training.augment": 0.1, "model.augment_dim": 9}, "augment_labels"),
    ],
)
def test_conditions_of_each_image_are_refused_before_any_work(values, condition):
    config = load("flow/digits_ddpmpp.py")
    config.update_from_flattened_dict(values | {"model.coupling": "transport"})
    with pytest.raises(ValueError, match=f"a condition '{condition}' of each image") as error:
        Experiment.build(config)
    assert "\n" not in str(error.value)


def test_a_coupled_network_gives_no_posterior_mean():
    """Of an image with noise that is independent of it, as the library's denoise is given."""
    config = load("flow/digits_ddpmpp.py")
    config.model.update(coupling="transport", nf=8, ch_mult=(1,), attn_resolutions=())
    trained = Trained(Experiment.build(config), Path(), 0)
    with pytest.raises(ValueError, match="denoise needs noise that is independent of the images"):
        trained.denoise(torch.zeros(1, 1, 8, 8), 0.1)
    assert trained.sample([1]).isfinite().all()


def test_it_shortens_paths_and_leaves_less_for_small_steps():
    """Eight Gaussians: distances of pairs, and the variance of the velocity given x.

    The variance of n - y given x is what bends trajectories: where it is 0 at all times, one step
    of Euler's is exact (Liu et al. 2023, theorem 3.3). It is measured over the nearest neighbours
    of x at one time.
    """
    angle = torch.arange(1024) % 8 * math.pi / 4
    centres = torch.stack([angle.cos(), angle.sin()], 1).double()
    blur = torch.randn(centres.shape, generator=torch.Generator().manual_seed(1))
    y = (centres + 0.03 * blur).view(1024, 2, 1, 1)
    results = {}
    for coupling in ("independent", "transport"):
        method = coupled(coupling=coupling)
        examples = method.draw(Batch(y), torch.Generator().manual_seed(0))
        velocity = (examples.noise - y).flatten(1)
        x = (0.5 * y + 0.5 * examples.noise).flatten(1)
        nearest = torch.cdist(x, x).topk(8, largest=False).indices
        results[coupling] = (
            velocity.norm(dim=1).mean().item(),
            velocity[nearest].var(1).sum(1).mean().item(),
        )
    plain, paired = results["independent"], results["transport"]
    assert paired[0] < 0.7 * plain[0]
    assert paired[1] < 0.1 * plain[1]


def test_uncoupled_methods_keep_their_text():
    """Cached results of earlier runs are told apart by this text."""
    assert repr(pfgmpp(4.0)) == (
        "PFGMPP(D=4.0, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, P_mean=-1.2, P_std=1.2, "
        "target_kind='image')"
    )
    assert coupled().name == "Rectified flow, optimal transport"
