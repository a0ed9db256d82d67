"""Online ensemble KD: the page's numbers, what is constant in them, and a naive step."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill import engine
from potstill.errors import MethodError
from potstill.method import Batch, Outputs, Progress
from potstill.methods.ensemble_kd import EnsembleKD
from potstill.net import Captured
from potstill.optim import sgd
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

ONE, TWO = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 2.0, 0.0]])


def ensemble_kd(count: int = 2, **arguments: Any) -> EnsembleKD:
    return EnsembleKD([toy_net(k) for k in range(count)], [], ToyImages().spec(0), **arguments)


def outputs(*logits: Tensor, label: Sequence[int] | None = None) -> Outputs:
    """Of networks with these logits; labels 0 unless given."""
    y = torch.zeros(len(logits[0]), dtype=torch.int64) if label is None else torch.tensor(label)
    batch = Batch(torch.zeros(len(y), 1), y, y, y)
    return Outputs(batch, Progress(0, 0, 1, 1), [Captured(z, {}) for z in logits], [])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_two_networks_by_hand():
    """z_e = (0.5, 1, -0.5). At T = 3, KL(p_e || p_1) = 0.024246 and KL(p_e || p_2) = 0.022907, nine
    times that beside cross-entropies ln 4.086161 - 1 = 0.407606 and ln 9.389056 = 2.239545.
    """
    method, out = ensemble_kd(), outputs(ONE, TWO)
    for k, (ce, kl, loss) in enumerate(
        [(0.407606, 0.024246, 0.625818), (2.239545, 0.022907, 2.445711)]
    ):
        found = method.loss_of(k, out)
        assert list(found) == ["ce", "kd"]
        close(found["ce"].item(), ce, atol=1e-6, rtol=0)
        close(found["kd"].item() / 9, kl, atol=1e-6, rtol=0)
        close(sum(term.item() for term in found.values()), loss, atol=1e-6, rtol=0)


def test_logits_are_averaged_not_probabilities():
    """Logits ln 9 and 0 have the mean ln 3: 3/4 and 1/4 of two classes, where probabilities 9/10
    and 1/2 would have 7/10. KL to (9/10, 1/10) and to (1/2, 1/2).
    """
    out = outputs(torch.tensor([[math.log(9.0), 0.0]]), torch.zeros(1, 2))
    first, second = (ensemble_kd(temperature=1.0).loss_of(k, out)["kd"].item() for k in (0, 1))
    close(first, 0.75 * math.log(5 / 6) + 0.25 * math.log(2.5), atol=1e-6, rtol=0)
    close(second, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), atol=1e-6, rtol=0)


def test_the_mean_is_of_all_networks():
    """Logits 3 ln 3, 0 and 0: again ln 3."""
    out = outputs(torch.tensor([[math.log(27.0), 0.0]]), torch.zeros(1, 2), torch.zeros(1, 2))
    found = ensemble_kd(3, temperature=1.0).loss_of(2, out)["kd"].item()
    close(found, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), atol=1e-6, rtol=0)


def test_the_loss_is_a_mean_over_images():
    once = ensemble_kd().loss_of(0, outputs(ONE, TWO))
    thrice = ensemble_kd().loss_of(0, outputs(ONE.repeat(3, 1), TWO.repeat(3, 1)))
    for name, term in once.items():
        close(thrice[name], term)


def test_labels_are_each_images_own():
    """ln 4.086161 minus the label's logit: 1, and -1."""
    found = ensemble_kd().loss_of(0, outputs(ONE.repeat(2, 1), TWO.repeat(2, 1), label=[0, 2]))
    close(found["ce"].item(), 1.407606, atol=1e-6, rtol=0)


def test_weights_and_temperature():
    """Published lengths 300; logits in proportion to T have T^2 times the KL."""
    method = ensemble_kd()
    assert (method.temperature, method.alpha, method.lengths) == (3.0, 1.0, {"distill": 300})
    plain = ensemble_kd(temperature=1.0).loss_of(0, outputs(ONE, TWO))["kd"]
    for T in (3.0, 100.0):
        found = ensemble_kd(temperature=T, alpha=0.5).loss_of(0, outputs(T * ONE, T * TWO))["kd"]
        close(found, 0.5 * T**2 * plain)
    assert list(ensemble_kd(alpha=0.0).loss_of(0, outputs(ONE, TWO))) == ["ce"]


def test_equal_predictions_teach_nothing():
    found = ensemble_kd(3).loss_of(1, outputs(ONE, ONE, ONE))
    close(found["kd"].item(), 0.0, atol=1e-6, rtol=0)
    close(found["ce"].item(), 0.407606, atol=1e-6, rtol=0)


def test_the_ensemble_is_constant():
    """d / d z_1 of the second term is T (p_1 - p_e) / B: none of it through its own share in z_e,
    and none on the others.
    """
    z = [x.clone().requires_grad_() for x in normal(3, 5, 4)]
    ensemble_kd(3).loss_of(0, outputs(*z))["kd"].backward()
    mean = torch.stack([x.detach() for x in z]).mean(0)
    close(z[0].grad, 3 * ((z[0] / 3).softmax(1) - (mean / 3).softmax(1)).detach() / 5)
    assert z[1].grad is None and z[2].grad is None


def test_the_order_and_the_offsets_of_logits_do_not_matter():
    """Swapped networks swap losses; a constant added to all logits of one network is nothing."""
    a, b, c = normal(3, 5, 4)
    expected = ensemble_kd(3).loss_of(0, outputs(a, b, c))["kd"]
    close(ensemble_kd(3).loss_of(2, outputs(c, b, a))["kd"], expected)
    close(ensemble_kd(3).loss_of(0, outputs(a, b + 7, c))["kd"], expected)


def test_extreme_logits_by_hand():
    """Sure of different classes, together undecided: KL((1/2, 1/2) || one-hot) = 1e4 / 6 - ln 2 at
    T = 3, times 9.
    """
    sure = torch.tensor([[1e4, 0.0]])
    z = [sure.clone().requires_grad_(), sure.flip(1).requires_grad_()]
    for k in (0, 1):
        found = ensemble_kd().loss_of(k, outputs(*z))
        close(found["kd"].item(), 9 * (1e4 / 6 - math.log(2.0)), rtol=1e-6, atol=0)
        sum(found.values()).backward()
        assert z[k].grad.isfinite().all()


def test_no_loss_reaches_another_network():
    method = ensemble_kd(3)
    out = method(next(ToyImages().clean(16)), Progress(0, 0, 1, 1))
    for k, other in itertools.permutations(range(3), 2):
        loss = torch.stack([*method.loss_of(k, out).values()]).sum()
        parameters = list(method.nets[other].parameters())
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        assert found == (None,) * len(parameters)


def test_two_steps_equal_a_loop_written_from_the_page():
    """One forward of each network, both losses from it, then both steps."""
    method = ensemble_kd(2).double().train()
    modules = [copy.deepcopy(net) for net in method.nets]
    batches = list(ToyImages(16, torch.float64).clean(8))
    (phase,) = method.phases()
    (turn,) = phase.turns
    assert [u.name for u in turn.updates] == ["student0", "student1"]
    optimizers = {u.name: sgd(u.parameters, 0.1) for u in turn.updates}
    for i, batch in enumerate(batches):
        engine.train_step(phase, optimizers, batch, Progress(0, i, 2, 300), seed=0)

    for batch in batches:
        z = [m(batch.image).logits for m in modules]
        ensemble = ((z[0] + z[1]) / 2).detach()
        gradients = []
        for own, module in zip(z, modules, strict=True):
            loss = torch.zeros((), dtype=torch.float64)
            for b in range(8):
                p, q = (ensemble[b] / 3).softmax(0), (own[b] / 3).softmax(0)
                loss = loss - own[b].softmax(0)[batch.label[b]].log() / 8
                loss = loss + 9 * (p * (p / q).log()).sum() / 8
            gradients.append(torch.autograd.grad(loss, list(module.parameters())))
        with torch.no_grad():
            for module, found in zip(modules, gradients, strict=True):
                for p, g in zip(module.parameters(), found, strict=True):
                    p.sub_(0.1 * g)

    for net, module in zip(method.nets, modules, strict=True):
        for key, tensor in module.state_dict().items():
            close(net.state_dict()[key], tensor, rtol=1e-9, atol=1e-11, msg=key)


def test_one_network_or_a_teacher_is_refused():
    with pytest.raises(MethodError) as error:
        ensemble_kd(1)
    assert str(error.value) == "EnsembleKD: takes 2 or more students, 1 given"
    with pytest.raises(MethodError) as error:
        EnsembleKD([toy_net(0), toy_net(1)], [toy_net(2)], ToyImages().spec(1))
    assert str(error.value) == "EnsembleKD: takes no teacher, 1 given; remove it"
