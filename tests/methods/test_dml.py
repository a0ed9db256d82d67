"""DML: both pages' numbers, the order of its steps and refreshes, and a loop written from them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill import engine
from potstill.errors import MethodError
from potstill.method import Batch, Outputs, Progress
from potstill.methods.dml import DML
from potstill.net import Captured, Net
from potstill.optim import sgd
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close
both_modes = pytest.mark.parametrize("mode", ["alternating", "synchronous"])
both_norms = pytest.mark.parametrize("norm", ["batch", "group"])

ONE, TWO, THREE = (torch.tensor([z]) for z in ((1.0, 0.0, -1.0), (0.0, 2.0, 0.0), (0.0, 0.0, 1.0)))


def dml(*seeds: int, norm: str = "batch", **arguments: Any) -> DML:
    """Toy networks, by their seeds; two of them unless told otherwise."""
    nets = [toy_net(seed, norm) for seed in seeds or (0, 1)]
    return DML(nets, [], ToyImages().spec(0), **arguments)


def outputs(*logits: Tensor, label: list[int] | None = None) -> Outputs:
    """Of networks with these logits; labels 0 unless given."""
    y = torch.zeros(len(logits[0]), dtype=torch.int64) if label is None else torch.tensor(label)
    batch = Batch(torch.zeros(len(y), 1), y, y, y)
    return Outputs(batch, Progress(0, 0, 1, 1), [Captured(z, {}) for z in logits], [])


def total(method: DML, k: int, out: Outputs) -> float:
    return sum(term.item() for term in method.loss_of(k, out).values())


def images(n: int = 16, dtype: torch.dtype = torch.float32) -> Batch:
    return next(ToyImages(n, dtype).clean(n))


def one_step(
    method: DML, lr: float = 0.05, batch: Batch | None = None, optimizers: Any = None
) -> tuple[dict[str, Tensor], list[Outputs]]:
    """The engine's terms of one step, and what each turn's updates were given."""
    seen: list[Outputs] = []

    def recorded(forward: Any) -> Any:
        def run(*given: Any) -> Outputs:
            seen.append(forward(*given))
            return seen[-1]

        return run

    (phase,) = method.phases()
    turns = [dataclasses.replace(turn, forward=recorded(turn.forward)) for turn in phase.turns]
    phase = dataclasses.replace(phase, turns=turns)
    updates = [u for turn in turns for u in turn.updates]
    optimizers = optimizers or {u.name: sgd(u.parameters, lr, 0.9, 5e-4) for u in updates}
    progress = Progress(0, 0, 1, 1)
    batch = images() if batch is None else batch
    return engine.train_step(phase, optimizers, batch, progress, seed=0), seen


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


# --- the losses


def test_three_networks_by_hand():
    """p_1 = (e, 1, 1/e) / 4.086161, p_2 = (1, e^2, 1) / 9.389056, p_3 = (1, 1, e) / 4.718282; the
    label's are 0.665241, 0.106507, 0.211942, and their -ln 0.407606, 2.239545, 1.551445. The
    means of both KLs: (0.742033 + 0.796453) / 2 = 0.769243; 0.879013; 0.704192.
    """
    method, out = dml(0, 1, 2), outputs(ONE, TWO, THREE)
    first = method.loss_of(0, out)
    assert list(first) == ["ce", "kd"]
    close(first["ce"].item(), 0.407606, atol=1e-6, rtol=0)
    close(first["kd"].item(), 0.769243, atol=1e-6, rtol=0)
    for k, loss in enumerate((1.176849, 3.118558, 2.255637)):
        close(total(method, k, out), loss, atol=2e-6, rtol=0)
    for other, kl in ((TWO, 0.742033), (THREE, 0.796453)):
        close(dml().loss_of(0, outputs(ONE, other))["kd"].item(), kl, atol=1e-6, rtol=0)


def test_each_network_learns_from_the_other():
    """Means over two images: KL(p_2 || p_1) = 0.975670 is network 1's, KL(p_1 || p_2) = 1.065812
    network 2's. Sums over images would be twice, means over classes a third of that.
    """
    out = outputs(
        torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, -1.0]]),
    )
    close(dml().loss_of(0, out)["kd"].item(), 0.975670, atol=1e-6, rtol=0)
    close(dml().loss_of(1, out)["kd"].item(), 1.065812, atol=1e-6, rtol=0)


def test_the_direction_by_hand():
    """p_1 uniform, p_2 = (3/4, 1/4): network 1's KL is 3/4 ln 3/2 + 1/4 ln 1/2, network 2's is
    1/2 ln 2/3 + 1/2 ln 2.
    """
    out = outputs(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]))
    kd = [dml().loss_of(k, out)["kd"].item() for k in (0, 1)]
    close(kd[0], 0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    close(kd[1], 0.5 * math.log(2 / 3) + 0.5 * math.log(2.0))


def test_the_papers_weights_and_lengths_are_the_defaults():
    method = dml()
    assert (method.mode, method.temperature, method.alpha) == ("alternating", 1.0, 1.0)
    assert DML.lengths == {"distill": 200}


def test_alpha_weighs_the_kl_alone():
    found = dml(alpha=0.25).loss_of(0, outputs(ONE, TWO))
    close(found["ce"].item(), 0.407606, atol=1e-6, rtol=0)
    close(found["kd"].item(), 0.25 * 0.742033, atol=1e-6, rtol=0)
    assert list(dml(alpha=0.0).loss_of(0, outputs(ONE, TWO))) == ["ce"]


def test_temperature_three_has_its_square():
    """Logits three times as large, at T = 3, are those above: 9 times the KL at T = 1."""
    found = dml(temperature=3.0).loss_of(0, outputs(3 * ONE, 3 * TWO))
    close(found["kd"].item(), 9 * 0.742033, atol=1e-5, rtol=0)


def test_equal_predictions_teach_nothing():
    method = dml(0, 1, 2, temperature=3.0)
    for k in range(3):
        found = method.loss_of(k, outputs(ONE, ONE + 5, ONE - 2))
        close(found["kd"].item(), 0.0, atol=1e-6, rtol=0)
        close(found["ce"].item(), 0.407606, atol=1e-6, rtol=0)


def test_two_equal_peers_teach_what_one_does():
    pair, trio = outputs(ONE, TWO), outputs(ONE, TWO, TWO)
    assert torch.equal(dml(0, 1, 2).loss_of(0, trio)["kd"], dml().loss_of(0, pair)["kd"])


def test_the_gradient_by_hand():
    """d KL(p_2 || p_1) / d z_1 = (p_1 - p_2) / B, times T at temperature T; none on the peer."""
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64).unbind()
    for T in (1.0, 3.0):
        own, peer = z1.clone().requires_grad_(), z2.clone().requires_grad_()
        dml(temperature=T).loss_of(0, outputs(own, peer))["kd"].backward()
        close(own.grad, T * ((z1 / T).softmax(1) - (z2 / T).softmax(1)) / 5)
        assert peer.grad is None


def test_no_loss_reaches_another_network():
    method = dml(0, 1, 2)
    out = method(images(), Progress(0, 0, 1, 1))
    for k, other in itertools.permutations(range(3), 2):
        loss = torch.stack([*method.loss_of(k, out).values()]).sum()
        parameters = list(method.nets[other].parameters())
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        assert found == (None,) * len(parameters)


@pytest.mark.parametrize("T", [1.0, 3.0, 100.0])
def test_extreme_logits_by_hand(T: float):
    """Sure of different classes: KL = 1e4 / T, times T^2. The second network is wrong by 1e4."""
    sure = torch.tensor([[1e4, 0.0]])
    z = [sure.clone().requires_grad_(), sure.flip(1).requires_grad_()]
    method = dml(temperature=T)
    for k in (0, 1):
        found = method.loss_of(k, outputs(*z))
        close(found["kd"].item(), 1e4 * T)
        close(found["ce"].item(), 1e4 * k)
        sum(found.values()).backward()
        assert z[k].grad.isfinite().all()


def test_the_order_of_the_peers_does_not_matter_to_a_loss():
    one, other = (dml(0, 1, 2).loss_of(0, outputs(ONE, *p)) for p in ((TWO, THREE), (THREE, TWO)))
    assert torch.equal(one["kd"], other["kd"])


# --- the steps


def test_a_turn_a_network_or_one_for_all():
    def updates(method: DML) -> list[list[str]]:
        (phase,) = method.phases()
        assert (phase.name, phase.epochs) == ("distill", 200)
        return [[u.name for u in turn.updates] for turn in phase.turns]

    assert updates(dml(0, 1, 2)) == [["student0"], ["student1"], ["student2"]]
    assert updates(dml(0, 1, 2, mode="synchronous")) == [["student0", "student1", "student2"]]


@both_norms
@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2)], ids=len)
def test_steps_that_move_nothing_are_synchronous(norm: str, seeds: tuple[int, ...]):
    """At rate 0: every term, gradient (the momentum of a first step) and buffer, bit for bit."""
    found = []
    for mode in ("alternating", "synchronous"):
        method = dml(*seeds, norm=norm, mode=mode)
        before = [weights(net) for net in method.nets]
        optimizers = {
            f"student{k}": sgd(n.parameters(), 0.0, 0.9) for k, n in enumerate(method.nets)
        }
        terms, _ = one_step(method, optimizers=optimizers)
        assert all(equal(w, weights(n)) for w, n in zip(before, method.nets, strict=True))
        momenta = [o.state[p]["momentum_buffer"] for o in optimizers.values() for p in o.state]
        assert len(momenta) == len(list(method.parameters()))
        found.append((terms, momenta, list(method.buffers())))
    (terms, momenta, buffers), (other_terms, other_momenta, other_buffers) = found
    assert terms.keys() == other_terms.keys()
    assert equal(list(terms.values()), list(other_terms.values()))
    assert equal(momenta, other_momenta) and equal(buffers, other_buffers)


@both_norms
def test_the_next_network_learns_from_what_the_last_one_is_now(norm: str):
    """A copy of each network after the step, in train mode, gives the very targets."""
    method = dml(0, 1, 2, norm=norm)
    batch = images()
    terms, seen = one_step(method, batch=batch)
    label = batch.label
    after = [copy.deepcopy(net)(batch.image).logits.detach() for net in method.nets]
    at_first = [s.logits.detach() for s in seen[0].students]

    def kl(target: Tensor, own: Tensor) -> Tensor:
        p, q = target.softmax(1), own.softmax(1)
        return (p * (p / q).log()).sum(1).mean()

    assert (after[0] - at_first[0]).abs().max() > 1e-2  # the step was not for nothing
    for k in range(3):
        peers = [after[i] if i < k else at_first[i] for i in range(3) if i != k]
        expected = torch.stack([kl(z, at_first[k]) for z in peers]).mean()
        close(terms[f"student{k}.kd"], expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(terms[f"student{k}.ce"], nn.functional.cross_entropy(at_first[k], label))
        for i in range(3):
            now = seen[k].students[i].logits
            assert torch.equal(now, after[i] if i < k else at_first[i])
            assert now.requires_grad == (i >= k)


def test_synchronous_networks_learn_from_what_the_others_were():
    method = dml(0, 1, 2, mode="synchronous")
    expected = method.loss_of(2, method.train()(images(), Progress(0, 0, 1, 1)))
    terms, seen = one_step(dml(0, 1, 2, mode="synchronous"))
    assert len(seen) == 1
    assert torch.equal(terms["student2.kd"], expected["kd"].detach())


def test_a_network_keeps_its_first_forward_until_its_turn():
    """And the batch and the progress are the step's."""
    method = dml(0, 1, 2)
    _, (first, second, third) = one_step(method)
    assert second.students[1] is first.students[1] and third.students[2] is first.students[2]
    assert third.students[0] is second.students[0]
    assert third.batch is first.batch and third.progress is first.progress


@pytest.mark.parametrize(
    ("mode", "times"), [("alternating", [2, 2, 1]), ("synchronous", [1, 1, 1])]
)
def test_forwards_of_a_step(mode: str, times: list[int]):
    """What the last network predicts anew nobody would read."""
    method, calls = dml(0, 1, 2, mode=mode), [0, 0, 0]

    def count(k: int) -> Any:
        def hook(*_: Any) -> None:
            calls[k] += 1

        return hook

    for k, net in enumerate(method.nets):
        net.module.register_forward_hook(count(k))
    one_step(method)
    assert calls == times


@both_modes
def test_a_step_moves_averages_once(mode: str):
    """The buffers of each network are those after one forward at its first weights."""
    method = dml(0, 1, 2, mode=mode).train()
    expected = [copy.deepcopy(net) for net in method.nets]
    for net in expected:
        net(images().image)
    one_step(method)
    for net, other in zip(method.nets, expected, strict=True):
        assert equal(list(net.buffers()), list(other.buffers()))
        counts = [b for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
        assert counts and all(c == 1 for c in counts)
        assert all(m.training for m in net.modules())
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(m.track_running_stats for m in norms)


def test_each_step_moves_its_own_network():
    method = dml(0, 1, 2)
    turns = [turn.updates for turn in method.phases()[0].turns]
    for (update,), net in zip(turns, method.nets, strict=True):
        assert [id(p) for p in update.parameters] == [id(p) for p in net.parameters()]


@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (0, 2, 1)])
@both_modes
def test_the_order_of_the_networks_matters_to_alternating_steps_only(
    mode: str, order: tuple[int, ...]
):
    """After one step of each order; in double precision, where no sum's order shows."""
    straight, permuted = dml(*sorted(order), mode=mode).double(), dml(*order, mode=mode).double()
    for method in (straight, permuted):
        one_step(method, batch=images(16, torch.float64))
    differences = [
        max((a - b).abs().max().item() for a, b in zip(weights(one), weights(other), strict=True))
        for one, other in zip(permuted.nets, (straight.nets[i] for i in order), strict=True)
    ]
    if mode == "synchronous":
        assert max(differences) < 1e-14
    else:
        assert max(differences) > 1e-5


class Small(nn.Sequential):
    """8 x 8 images of three channels to four classes; `drop` is the share of values dropped."""

    def __init__(self, seed: int, norm: str, drop: float = 0.0) -> None:
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.BatchNorm2d(4) if norm == "batch" else nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Flatten(),
            nn.Linear(36, 4),
        )


def by_the_page(
    modules: list[nn.Module], batches: list[Batch], alternating: bool, T: float, lr: float
) -> None:
    """Deep mutual learning as the pages write it, in loops, SGD with momentum 0.9 included."""
    K = len(modules)
    momenta = [[torch.zeros_like(p) for p in m.parameters()] for m in modules]

    def step(k: int, gradients: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, g, v in zip(modules[k].parameters(), gradients, momenta[k], strict=True):
                v.mul_(0.9).add_(g + 5e-4 * p)
                p.sub_(lr * v)

    for batch in batches:
        B = len(batch.label)
        z = [m(batch.image) for m in modules]
        p = [(x / T).softmax(1).detach() for x in z]
        waiting = []
        for k in range(K):
            loss = torch.zeros((), dtype=torch.float64)
            for b in range(B):
                loss = loss - z[k][b].softmax(0)[batch.label[b]].log() / B
                own = (z[k][b] / T).softmax(0)
                for j in range(K):
                    if j != k:
                        kl = sum(p[j][b, c] * (p[j][b, c] / own[c]).log() for c in range(4))
                        loss = loss + T * T * kl / (B * (K - 1))
            gradients = torch.autograd.grad(loss, list(modules[k].parameters()))
            if alternating:
                step(k, gradients)
                # of a copy, so that no buffer moves
                p[k] = (copy.deepcopy(modules[k])(batch.image) / T).softmax(1).detach()
            else:
                waiting.append(gradients)
        for k, gradients in enumerate(waiting):
            step(k, gradients)


@both_norms
@both_modes
@pytest.mark.parametrize(("count", "T"), [(2, 1.0), (3, 3.0)])
def test_three_steps_equal_a_loop_written_from_the_page(mode: str, norm: str, count: int, T: float):
    """Weights and buffers, in double precision."""
    modules = [Small(k, norm).double().train() for k in range(count)]
    nets = [Net(copy.deepcopy(m), {}, (3, 8, 8)) for m in modules]
    method = DML(nets, [], ToyImages().spec(0), mode, temperature=T).double().train()
    batches = list(ToyImages(24, torch.float64).clean(8))
    (phase,) = method.phases()
    updates = [u for turn in phase.turns for u in turn.updates]
    optimizers = {u.name: sgd(u.parameters, 0.2, 0.9, 5e-4) for u in updates}
    for i, batch in enumerate(batches):
        engine.train_step(phase, optimizers, batch, Progress(0, i, 3, 200), seed=0)
    by_the_page(modules, batches, mode == "alternating", T, lr=0.2)
    for net, module in zip(method.nets, modules, strict=True):
        for key, tensor in module.state_dict().items():
            close(net.state_dict()[key], tensor, rtol=1e-9, atol=1e-11, msg=key)


def test_dropout_is_drawn_anew_for_the_refreshed_prediction():
    """It is a train-mode forward like the first: at rate 0, other values dropped, same weights."""
    nets = [Net(Small(k, "batch", drop=0.5), {}, (3, 8, 8)) for k in range(2)]
    method = DML(nets, [], ToyImages().spec(0)).train()
    terms, (first, second) = one_step(method, lr=0.0)
    assert all(term.isfinite() for term in terms.values())
    assert not torch.equal(first.students[0].logits, second.students[0].logits)
    alone = copy.deepcopy(method.nets[0]).eval()
    for module in alone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    assert not torch.equal(alone(images().image).logits, second.students[0].logits)


def test_dropout_is_the_same_for_the_same_seed():
    found = []
    for _ in range(2):
        nets = [Net(Small(k, "batch", drop=0.5), {}, (3, 8, 8)) for k in range(2)]
        method = DML(nets, [], ToyImages().spec(0)).train()
        one_step(method)
        found.append([w for net in method.nets for w in weights(net)])
    assert equal(*found)


# --- what it takes


def test_one_network_or_a_teacher_is_refused():
    with pytest.raises(MethodError) as error:
        dml(0)
    assert str(error.value) == "DML: takes 2 or more students, 1 given"
    with pytest.raises(MethodError) as error:
        DML([toy_net(0), toy_net(1)], [toy_net(2)], ToyImages().spec(1))
    assert str(error.value) == "DML: takes no teacher, 1 given; remove it"


def test_a_mode_that_does_not_exist_is_refused():
    with pytest.raises(MethodError) as error:
        dml(0, 1, mode="asynchronous")
    assert str(error.value) == ("DML: mode is 'asynchronous'; give 'alternating' or 'synchronous'")


def test_without_the_kl_nothing_is_predicted_anew():
    (phase,) = dml(0, 1, alpha=0.0).phases()
    assert [len(turn.updates) for turn in phase.turns] == [2]


def test_nothing_is_learned_but_the_networks():
    method = dml(0, 1, 2)
    own = [id(p) for net in method.nets for p in net.parameters()]
    assert [id(p) for p in method.parameters()] == own
    assert method.reads == frozenset()
    assert list(method.predictors()) == ["student0", "student1", "student2", "ensemble"]
