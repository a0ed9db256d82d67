"""Online AFD: pair and ring by hand, who learns from whom, its layers, and one step by the page."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import potstill
from potstill import engine
from potstill.errors import MethodError, TapError
from potstill.method import Batch, DataSpec, Progress
from potstill.methods.afd_online import AFDOnline, Judged, discriminator
from potstill.models import build
from potstill.net import Captured, Net
from potstill.recipe import resolve
from tests.toys import CLASSES, SHAPE, ToyImages, pace, plan, toy_net

close = torch.testing.assert_close

LN3 = math.log(3.0)
START = Progress(0, 0, 100, 300)


def afd(*nets: Net, data: DataSpec | None = None, **arguments: Any) -> AFDOnline:
    """Of the networks given, or of two toys; the same layers each time."""
    students = nets or (toy_net(0), toy_net(1))
    torch.manual_seed(9)
    return AFDOnline(students, [], data or ToyImages().spec(0), **arguments)


def toys(*widths: int) -> list[Net]:
    return [toy_net(seed, width=width) for seed, width in enumerate(widths)]


def body(seed: int, widths: Sequence[int], size: Sequence[int] = SHAPE, stride: Any = 1) -> Net:
    """Convolutions with a tap "last" after them, a ReLU each; then the mean and the classifier."""
    torch.manual_seed(seed)
    channels, parts = size[0], []
    for width in widths:
        parts += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.ReLU()]
        channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return Net(nn.Sequential(*parts, *head), {"last": str(len(parts) - 1)}, size)


def outputs(
    logits: Sequence[Any],
    label: int = 0,
    own: Sequence[Any] = (),
    fake: Sequence[Any] = (),
    real: Sequence[Any] = (),
) -> Judged:
    """One image unless there are more; numbers by network, what the discriminators say too."""
    students = [Captured(torch.as_tensor(z, dtype=torch.float32).view(1, -1), {}) for z in logits]
    y = torch.tensor([label])
    said = [[torch.tensor(s).float().view(-1) for s in values] for values in (own, fake, real)]
    return Judged(Batch(torch.zeros(1, 1), y, y, y), START, students, [], [], *said)


def values(terms: Mapping[str, Tensor]) -> list[float]:
    return [term.item() for term in terms.values()]


def gradients(term: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    return list(torch.autograd.grad(term, parameters, allow_unused=True, retain_graph=True))


def updates_of(method: AFDOnline) -> dict[str, Any]:
    ((turn,),) = (phase.turns for phase in method.phases())
    return {update.name: update for update in turn.updates}


def batch_of(n: int = 16, dtype: torch.dtype = torch.float32) -> Batch:
    return next(ToyImages(n, dtype).clean(n))


def close_to(found: Sequence[float], expected: Sequence[float]) -> None:
    close(torch.tensor(found), torch.tensor(expected), atol=2e-6, rtol=0)


def test_the_adversarial_losses_by_hand():
    """D_1(a_2) = 0.8 and D_1(a_1) = 0.3: L_D1 = 0.2^2 + 0.3^2 = 0.13, L_G1 = 0.7^2 = 0.49. And
    D_2(a_1) = 0.1, D_2(a_2) = 0.6: L_D2 = 0.9^2 + 0.6^2 = 1.17, L_G2 = 0.4^2 = 0.16.
    """
    out = outputs([[0.0], [0.0]], own=[0.3, 0.6], fake=[0.3, 0.6], real=[0.8, 0.1])
    judged, drawn = afd().discriminator_loss(out), afd().feature_loss(out)
    assert list(judged) == list(drawn) == ["student0", "student1"]
    close_to(values(judged), [0.13, 1.17])
    close_to(values(drawn), [0.49, 0.16])


def test_three_in_a_ring_by_hand():
    """D_k(a_k) = 0.2, 0.5, 0.9 and of the sources' maps 0.7, 0.6, 0.4: L_D = 0.09 + 0.04,
    0.16 + 0.25, 0.36 + 0.81; L_G = 0.64, 0.25, 0.01.
    """
    own, real = [0.2, 0.5, 0.9], [0.7, 0.6, 0.4]
    method, out = afd(*toys(4, 4, 4)), outputs([[0.0]] * 3, own=own, fake=own, real=real)
    close_to(values(method.discriminator_loss(out)), [0.13, 0.41, 1.17])
    close_to(values(method.feature_loss(out)), [0.64, 0.25, 0.01])
    assert list(method.feature_loss(out)) == ["student0", "student1", "student2"]


def test_squares_are_averaged_over_images():
    """own 0 and 1/2: (1 + 1/4) / 2; real 1 and 0: 1/2; fake 1/2 and 1: (1/4 + 1) / 2. The square
    of a mean would give 9/16, 1/4 and 9/16.
    """
    two = outputs([[0.0]] * 2, own=[[0.0, 0.5]] * 2, fake=[[0.5, 1.0]] * 2, real=[[1.0, 0.0]] * 2)
    close_to(values(afd().feature_loss(two)), [0.625, 0.625])
    close_to(values(afd().discriminator_loss(two)), [1.125, 1.125])


def test_the_logits_losses_by_hand():
    """T = 3: p_1 = softmax(1/3, 0, -1/3) = (0.448441, 0.321322, 0.230237), p_2 = softmax(0, 2/3, 0)
    = (0.253310, 0.493380, 0.253310). KL(p_2 || p_1) = 0.091090, KL(p_1 || p_2) = 0.096350; CE is
    ln(e + 1 + 1/e) - 1 = 0.407606 and ln(2 + e^2) = 2.239545. L = CE + 9 KL.
    """
    out, method = outputs([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]), afd()
    first, second = method.loss_of(0, out), method.loss_of(1, out)
    assert list(first) == list(second) == ["ce", "kd"]
    close_to(values(first), [0.407606, 9 * 0.0910902])
    close_to(values(second), [2.239545, 9 * 0.0963499])
    close_to([sum(values(first)), sum(values(second))], [1.227418, 3.106694])


def ring_of_logits() -> Judged:
    """At T = 1 the softmaxes are (3/4, 1/4), (1/2, 1/2) and (1/4, 3/4)."""
    return outputs([[LN3, 0.0], [0.0, 0.0], [0.0, LN3]])


def test_logits_follow_the_ring():
    """1 learns from 3: KL = 3/4 ln 3 + 1/4 ln 1/3; 2 from 1: 3/4 ln 3/2 + 1/4 ln 1/2; 3 from 2:
    1/2 ln 2 + 1/2 ln 2/3.
    """
    method = afd(*toys(4, 4, 4), temperature=1.0)
    found = [method.loss_of(k, ring_of_logits())["kd"].item() for k in range(3)]
    two_from_one = 0.75 * math.log(1.5) - 0.25 * math.log(2)
    close_to(found, [0.5 * LN3, two_from_one, 0.5 * math.log(4 / 3)])


def test_or_come_from_all_others():
    """The mean of two KLs each: 1 from 2 has 1/2 ln 2/3 + 1/2 ln 2 = 1/2 ln 4/3, and from 3
    1/2 ln 3; 2 from either 3/4 ln 3/2 + 1/4 ln 1/2; 3 as 1. Times alpha = 5.
    """
    method = afd(*toys(4, 4, 4), temperature=1.0, alpha=5.0, logit_peers="all")
    found = [method.loss_of(k, ring_of_logits())["kd"].item() / 5 for k in range(3)]
    outer, inner = 0.25 * math.log(4), 0.75 * math.log(1.5) - 0.25 * math.log(2)
    close_to(found, [outer, inner, outer])


@pytest.mark.parametrize("logit_peers", ["ring", "all"])
def test_t_squared_and_alpha_weigh_the_kl_alone(logit_peers: Any):
    """Logits times 5 at T = 5 have the probabilities of T = 1; 0.3 * 25 = 7.5 times its KL."""
    logits = [[5 * LN3, 0.0], [0.0, 0.0]]
    method = afd(temperature=5.0, alpha=0.3, logit_peers=logit_peers)
    found = method.loss_of(0, outputs(logits))
    close_to(values(found), [math.log(1 + 3**-5), 7.5 * 0.5 * math.log(4 / 3)])


def test_without_alpha_only_labels_teach_the_logits():
    for logit_peers in ("ring", "all"):
        method = afd(*toys(4, 4, 4), alpha=0.0, logit_peers=logit_peers)
        assert [list(method.loss_of(k, ring_of_logits())) for k in range(3)] == [["ce"]] * 3


@pytest.mark.parametrize("logit_peers", ["ring", "all"])
def test_the_source_of_logits_is_constant(logit_peers: Any):
    out = ring_of_logits()
    for student in out.students:
        student.logits.requires_grad_()
    method = afd(*toys(4, 4, 4), logit_peers=logit_peers)
    logits = [student.logits for student in out.students]
    for k in range(3):
        found = torch.autograd.grad(sum(method.loss_of(k, out).values()), logits, allow_unused=True)
        assert [i for i, g in enumerate(found) if g is not None] == [k]


def test_a_networks_logits_teach_the_next_one_and_no_other():
    """With "all" they teach every other one."""
    for logit_peers, taught in (("ring", [True, True, False]), ("all", [True, True, True])):
        method = afd(*toys(4, 4, 4), logit_peers=logit_peers)
        changed = outputs([[7.0, 0.0], [0.0, 0.0], [0.0, LN3]])
        before, after = (
            [sum(method.loss_of(k, out).values()) for k in range(3)]
            for out in (ring_of_logits(), changed)
        )
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == taught


def test_a_networks_map_is_real_to_the_next_ones_discriminator_and_no_other():
    """Bit for bit, with weights of network 1 changed after the first forward."""
    method, batch = afd(*toys(4, 4, 4)), batch_of()
    before = method(batch, START)
    with torch.no_grad():
        for p in method.nets[0].parameters():
            p.mul_(1.5)
    after = method(batch, START)
    for name, changed in (("own", [0]), ("fake", [0]), ("real", [1]), ("mapped", [0])):
        pairs = zip(getattr(before, name), getattr(after, name), strict=True)
        assert [k for k, (a, b) in enumerate(pairs) if not torch.equal(a, b)] == changed, name


def test_each_discriminator_judges_its_own_networks_map_and_the_sources():
    method = afd(*toys(4, 6, 8))
    out = method(batch_of(), START)
    for k, judge in enumerate(method.discriminators):
        close(out.own[k], judge(out.mapped[k]))
        assert torch.equal(out.own[k], out.fake[k])
        close(out.real[k], judge(out.mapped[(k - 1) % 3]))
        for said in (out.own[k], out.fake[k], out.real[k]):
            assert said.shape == (16,) and said.min() > 0 and said.max() < 1


def test_of_maps_alike_in_everything_the_discriminators_differ():
    """Each its own, from weights of its own."""
    first, second = afd().discriminators
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert p is not q
        assert name.startswith("bn") or not torch.equal(p, q)


def exchanged(method: AFDOnline) -> AFDOnline:
    """The same pair in the other order, with everything that belongs to each."""
    other = afd(*(copy.deepcopy(net) for net in reversed(method.nets)))
    for name in ("discriminators", "transfers"):
        for own, given in zip(getattr(other, name), reversed(getattr(method, name)), strict=True):
            own.load_state_dict(given.state_dict())
    return other


@pytest.mark.parametrize("widths", [(4, 4), (4, 6)])
def test_exchanging_the_networks_exchanges_every_loss(widths: tuple[int, int]):
    """Bit for bit."""
    method = afd(*toys(*widths))
    other, batch = exchanged(method), batch_of()
    out, swapped = method(batch, START), other(batch, START)
    for k in (0, 1):
        for name, term in method.loss_of(k, out).items():
            assert torch.equal(term, other.loss_of(1 - k, swapped)[name])
    for loss in ("feature_loss", "discriminator_loss"):
        one, two = getattr(method, loss)(out), getattr(other, loss)(swapped)
        assert torch.equal(one["student0"], two["student1"])
        assert torch.equal(one["student1"], two["student0"])
        assert not torch.equal(one["student0"], one["student1"])


@pytest.mark.parametrize("widths", [(4, 4), (4, 6, 8)])
def test_discriminators_learn_without_moving_a_network(widths: tuple[int, ...]):
    """L_D has no gradient on any network or transfer layer, and on no other discriminator."""
    method = afd(*toys(*widths))
    others = [p for name, p in method.named_parameters() if "discriminators" not in name]
    for k, term in enumerate(method.discriminator_loss(method(batch_of(), START)).values()):
        assert gradients(term, others) == [None] * len(others)
        for i, judge in enumerate(method.discriminators):
            found = gradients(term, list(judge.parameters()))
            assert all((g is not None) == (i == k) for g in found)


@pytest.mark.parametrize("widths", [(4, 4), (4, 6)])
def test_a_map_is_drawn_by_its_own_discriminator_alone(widths: tuple[int, int]):
    """Frozen, the other network gives constant maps: L_G1 and its gradient are the same bits."""
    method = afd(*toys(*widths))
    own = list(method.nets[0].parameters_before("last"))
    theirs = [*method.nets[1].parameters(), *method.transfers[1].parameters()]
    term = method.feature_loss(method(batch_of(), START))["student0"]
    assert gradients(term, theirs) == [None] * len(theirs)
    before = torch.autograd.grad(term, own)
    method.nets[1].requires_grad_(False)
    alone = method.feature_loss(method(batch_of(), START))["student0"]
    assert torch.equal(alone, term)
    after = torch.autograd.grad(alone, own)
    assert all(map(torch.equal, before, after)) and sum(g.abs().sum() for g in after) > 0


def test_who_moves_what():
    """SGD a whole network; "features" what the maps depend on and the transfer layers, no
    classifier; "discriminators" these.
    """
    method = afd(*toys(4, 6, 8))
    moved = {name: {id(p) for p in u.parameters} for name, u in updates_of(method).items()}
    assert list(moved) == ["student0", "student1", "student2", "features", "discriminators"]
    extractors = set()
    for k, net in enumerate(method.nets):
        assert moved[f"student{k}"] == {id(p) for p in net.parameters()}
        extractors |= {id(p) for p in net.backbone_parameters()}
    assert moved["features"] == extractors | {id(p) for p in method.transfers.parameters()}
    assert moved["discriminators"] == {id(p) for p in method.discriminators.parameters()}


def test_what_lies_behind_the_tap_is_no_extractor():
    """WRN's last norm comes before its map; of a tap in the middle, only what is below learns."""
    wide = [build("wrn_16_1", CLASSES, (3, 16, 16)) for _ in range(2)]
    names = {f"{k}.{n}": p for k, net in enumerate(wide) for n, p in net.module.named_parameters()}
    moved = {id(p) for p in updates_of(afd(*wide))["features"].parameters}
    assert {n for n, p in names.items() if id(p) not in moved} == {
        f"{k}.fc.{part}" for k in (0, 1) for part in ("weight", "bias")
    }
    moved = {id(p) for p in updates_of(afd(*wide, taps=["stage2"]))["features"].parameters}
    left = {n.split(".")[1] for n, p in names.items() if id(p) not in moved}
    assert left == {"layer3", "bn1", "fc"}


def steps(
    method: AFDOnline,
    batches: Sequence[Batch],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> list[dict[str, Tensor]]:
    (phase,) = method.phases()
    method.train()
    return [
        engine.train_step(phase, optimizers, batch, Progress(0, i, len(batches), 300), seed=0)
        for i, batch in enumerate(batches)
    ]


def test_decay_of_the_features_leaves_the_classifier_alone():
    """The logits' optimisers at rest, Adam with weight decay 0.1 moves all but it."""
    method = afd(*toys(4, 6))
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    chosen: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.SGD(update.parameters, 0.0, weight_decay=0.1)
        for name, update in updates_of(method).items()
    }
    chosen["features"] = torch.optim.Adam(chosen["features"].param_groups[0]["params"], 1e-2,
                                          weight_decay=0.1)  # fmt: skip
    steps(method, [batch_of()], chosen)
    still = {name for name, p in method.named_parameters() if torch.equal(p, before[name])}
    judges = {f"discriminators.{n}" for n, _ in method.discriminators.named_parameters()}
    heads = {f"students.{k}.module.fc.{part}" for k in (0, 1) for part in ("weight", "bias")}
    assert still == judges | heads


def page_discriminator(channels: int, rest: int) -> nn.Sequential:
    """As the page writes it; `rest` is the size after the first convolution."""
    return nn.Sequential(
        nn.Conv2d(channels, channels // 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(channels // 2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels // 2, 1, rest),
        nn.Sigmoid(),
    )


def page_transfer(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


def with_weights_of(module: nn.Module, given: nn.Module) -> nn.Module:
    """A module of one's own with the parameters of another, in their order."""
    with torch.no_grad():
        for own, other in zip(module.double().parameters(), given.parameters(), strict=True):
            assert own.shape == other.shape
            own.copy_(other)
    return module


def by_the_page(
    networks: list[nn.Module],
    transfers: list[nn.Module],
    judges: list[nn.Module],
    batches: Sequence[Batch],
) -> None:
    """One iteration a batch, network k from k - 1: three gradients, then three kinds of step."""
    count = len(networks)
    bodies = [nn.Sequential(*list(n.children())[:-3]) for n in networks]
    heads = [nn.Sequential(*list(n.children())[-3:]) for n in networks]
    judging = [p for d in judges for p in d.parameters()]
    feature = [p for g in bodies for p in g.parameters()]
    feature += [p for t in transfers for p in t.parameters()]
    whole = [p for n in networks for p in n.parameters()]
    sgd = torch.optim.SGD(whole, 0.1, momentum=0.9, weight_decay=1e-4)
    adam = torch.optim.Adam(feature, 1e-2, weight_decay=0.1)
    judge_adam = torch.optim.Adam(judging, 1e-2, weight_decay=0.1)
    for batch in batches:
        f = [g(batch.image) for g in bodies]
        z = [h(x) for h, x in zip(heads, f, strict=True)]
        a = [t(x) for t, x in zip(transfers, f, strict=True)]
        n = len(batch.label)
        logit = drawn = judged = torch.zeros((), dtype=torch.float64)
        for k in range(count):
            for i in range(n):
                p = (z[k - 1][i].detach() / 3).softmax(0)
                q = (z[k][i] / 3).softmax(0)
                ce = -z[k][i].log_softmax(0)[batch.label[i]]
                logit = logit + (ce + 9 * (p * (p.log() - q.log())).sum()) / n
            drawn = drawn + (1 - judges[k](a[k])).pow(2).sum() / n
            judged = judged + (1 - judges[k](a[k - 1].detach())).pow(2).sum() / n
            judged = judged + judges[k](a[k].detach()).pow(2).sum() / n
        found = [
            (sgd, whole, torch.autograd.grad(logit, whole, retain_graph=True)),
            (adam, feature, torch.autograd.grad(drawn, feature, retain_graph=True)),
            (judge_adam, judging, torch.autograd.grad(judged, judging)),
        ]
        for optimizer, parameters, gradient in found:
            for p, g in zip(parameters, gradient, strict=True):
                p.grad = g
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("widths", [(4, 4), (4, 6), (4, 8, 6)])
def test_two_steps_are_those_of_the_page(widths: tuple[int, ...]):
    """In float64, to twelve digits: all gradients first, then SGD, then Adam, whose decay reads the
    weights that SGD has moved, then the discriminators.
    """
    method = afd(*toys(*widths)).double()
    width = 2 * max(widths)
    networks = [copy.deepcopy(net.module) for net in method.nets]
    unequal = len(set(widths)) > 1
    transfers = [
        with_weights_of(page_transfer(2 * w, width) if unequal else nn.Identity(), given)
        for w, given in zip(widths, method.transfers, strict=True)
    ]
    judges = [with_weights_of(page_discriminator(width, 1), d) for d in method.discriminators]
    batches = [batch_of(n, torch.float64) for n in (16, 12)]
    before = [p.detach().clone() for p in method.parameters()]

    chosen: dict[str, torch.optim.Optimizer] = {}
    for name, update in updates_of(method).items():
        if name.startswith("student"):
            chosen[name] = torch.optim.SGD(update.parameters, 0.1, 0.9, weight_decay=1e-4)
        else:
            chosen[name] = torch.optim.Adam(update.parameters, 1e-2, weight_decay=0.1)
    steps(method, batches, chosen)
    by_the_page(networks, transfers, judges, batches)

    assert not any(map(torch.equal, before, method.parameters()))
    for own, expected in (
        *zip((net.module for net in method.nets), networks, strict=True),
        *zip(method.transfers, transfers, strict=True),
    ):
        for (name, found), wanted in zip(
            own.state_dict().items(), expected.state_dict().values(), strict=True
        ):
            close(found, wanted, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for own, expected in zip(method.discriminators, judges, strict=True):
        for found, wanted in zip(own.parameters(), expected.parameters(), strict=True):
            close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_ring_of_two_is_the_pair():
    """Bit for bit a pair written out, with each network the other's source."""
    method = afd(*toys(4, 6))
    out = method(batch_of(), START)
    (z1, z2), (a1, a2) = (s.logits for s in out.students), out.mapped
    d1, d2 = method.discriminators
    y = out.batch.label

    def kl(target: Tensor, z: Tensor) -> Tensor:
        target, z = (target.detach() / 3).log_softmax(1), (z / 3).log_softmax(1)
        return F.kl_div(z, target, reduction="batchmean", log_target=True)

    expected = [
        *(F.cross_entropy(z1, y), 9 * kl(z2, z1), F.cross_entropy(z2, y), 9 * kl(z1, z2)),
        *((1 - d1(a1)).pow(2).mean(), (1 - d2(a2)).pow(2).mean()),
        *((1 - d1(a2)).pow(2).mean() + d1(a1).pow(2).mean(),
          (1 - d2(a1)).pow(2).mean() + d2(a2).pow(2).mean()),
    ]  # fmt: skip
    found = [term for u in updates_of(method).values() for term in u.loss(out).values()]
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def counting(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> None:
    """Call `see` with a module's name and input at each of its forwards."""
    for name, module in modules.items():
        module.register_forward_hook(lambda m, args, y, name=name: see(name, args[0]))


@pytest.mark.parametrize("count", [2, 3])
def test_what_runs_in_a_step(count: int):
    """Each network once; each discriminator three times, one map of the batch a time; K terms of
    each kind.
    """
    method, calls = afd(*toys(*[4] * count)), Counter()

    def see(name: str, x: Tensor) -> None:
        assert len(x) == 16
        calls[name] += 1

    (phase,) = method.phases()  # which runs the networks, too
    chosen = {n: torch.optim.SGD(u.parameters, 0.0) for n, u in updates_of(method).items()}
    nets = {f"net{k}": net.module for k, net in enumerate(method.nets)}
    counting({**nets, **{f"d{k}": d for k, d in enumerate(method.discriminators)}}, see)
    terms = engine.train_step(phase, chosen, batch_of(16), START, seed=0)
    assert calls == {f"{n}{k}": c for k in range(count) for n, c in (("net", 1), ("d", 3))}
    for kind in (".ce", ".kd"):
        assert sum(name.endswith(kind) for name in terms) == count
    for kind in ("features.", "discriminators."):
        assert sum(name.startswith(kind) for name in terms) == count
    for judge in method.discriminators:
        assert judge.bn.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("size", "rest"),
    [((8, 8), (4, 4)), ((7, 7), (4, 4)), ((4, 4), (2, 2)), ((2, 2), (1, 1)), ((1, 1), (1, 1)),
     ((5, 3), (3, 2)), ((6, 9), (3, 5))],
)  # fmt: skip
def test_a_discriminator_takes_any_size(size: tuple[int, int], rest: tuple[int, int]):
    judge = discriminator(6, size)
    assert judge.conv2.kernel_size == rest
    x = torch.randn(5, 6, *size, generator=torch.Generator().manual_seed(0))
    assert judge[:1](x).shape == (5, 3, *rest)
    said = judge(x)
    assert said.shape == (5,) and said.min() > 0 and said.max() < 1
    assert len(said.unique()) > 1


@pytest.mark.parametrize(
    ("channels", "size", "parameters"), [(64, 8, 19_041), (128, 8, 74_945), (512, 7, 1_184_513)]
)
def test_parameters_of_a_discriminator_by_hand(channels: int, size: int, parameters: int):
    """C/2 (9 C + 1), twice C/2, and 16 C/2 + 1: for 64, 18,464 + 64 + 513 = 19,041."""
    judge = discriminator(channels, (size, size))
    assert sum(p.numel() for p in judge.parameters()) == parameters


def test_a_discriminator_is_the_pages_layers_from_their_own_initialisation():
    torch.manual_seed(3)
    found = discriminator(8, (7, 7))
    torch.manual_seed(3)
    expected = page_discriminator(8, 4)
    x = torch.randn(6, 8, 7, 7)
    assert [type(m) for m in found] == [*(type(m) for m in expected), nn.Flatten]
    assert torch.equal(found(x), expected(x).flatten())


def test_one_channel_is_enough():
    """Half of it is one."""
    method = afd(body(0, [1]), body(1, [1]))
    assert method.discriminators[0].conv1.weight.shape == (1, 1, 3, 3)
    out = method(batch_of(), START)
    assert all(term.isfinite() for term in method.discriminator_loss(out).values())


@pytest.mark.parametrize(
    ("names", "size", "shape"),
    [
        (("resnet20", "resnet32"), 32, (64, 8, 8)),
        (("resnet56", "resnet20"), 32, (64, 8, 8)),
        (("wrn_16_2", "wrn_16_2"), 32, (128, 8, 8)),
        (("resnet18_imagenet", "resnet34_imagenet"), 64, (512, 2, 2)),
    ],
)
def test_the_map_that_is_pooled_is_compared(names: Any, size: int, shape: tuple[int, ...]):
    """Of equal widths there is no transfer layer, and no map is changed on its way."""
    method = afd(*(build(name, 100, (3, size, size)) for name in names))
    for net, tap in zip(method.nets, method.taps, strict=True):
        assert net.shape_of(tap) == shape
        assert net.pools(tap)
    assert all(isinstance(layer, nn.Identity) for layer in method.transfers)
    index = torch.arange(2)
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    out = method(Batch(image, index, index, index), START)
    for student, tap, mapped in zip(out.students, method.taps, out.mapped, strict=True):
        assert torch.equal(mapped, student[tap]) and mapped.min() == 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("wrn_16_2", 703_284), ("wrn_28_4", 5_872_180), ("resnet32", 472_756)],
)
def test_parameters_of_the_papers_networks(name: str, parameters: int):
    assert sum(p.numel() for p in build(name, 100).parameters()) == parameters


def test_where_widths_differ_all_maps_go_to_the_widest():
    """A layer for the widest one too: 1x1 convolution without bias, BatchNorm, ReLU, from their
    own initialisation.
    """
    method = afd(*toys(4, 8, 4))
    for layer, channels in zip(method.transfers, (8, 16, 8), strict=True):
        assert [type(part) for part in layer] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
        assert layer.conv.weight.shape == (16, channels, 1, 1) and layer.conv.bias is None
        assert layer.conv.weight.abs().max() <= 1 / math.sqrt(channels)
    assert len({id(p) for p in method.transfers.parameters()}) == 9
    out = method(batch_of(), START)
    for k, mapped in enumerate(out.mapped):
        assert mapped.shape == (16, 16, 2, 2) and mapped.min() == 0
        close(mapped, method.transfers[k](out.students[k]["last"]))


def test_a_transfer_layer_learns_from_its_own_discriminator():
    method = afd(*toys(4, 8))
    terms = method.feature_loss(method(batch_of(), START))
    for k in (0, 1):
        for i in (0, 1):
            found = gradients(terms[f"student{k}"], list(method.transfers[i].parameters()))
            assert all((g is not None) == (i == k) for g in found)


def test_larger_maps_are_averaged_down_to_the_smallest():
    """8x8 and 4x4 meet at 4x4: the mean of each 2x2, before the transfer layer."""
    method = afd(body(0, [4]), body(1, [6], stride=2))
    assert method.discriminators[0].conv2.kernel_size == (2, 2)
    out = method(batch_of(), START)
    large, small = (student["last"] for student in out.students)
    assert large.shape == (16, 4, 8, 8) and small.shape == (16, 6, 4, 4)
    down = large.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    close(out.mapped[0], method.transfers[0](down))
    close(out.mapped[1], method.transfers[1](small))
    assert all(judge.shape == (16,) for judge in (*out.own, *out.real))


def test_height_and_width_are_averaged_each_by_itself():
    """8x6 and 4x12 meet at 4x6."""
    size = (3, 8, 12)
    method = afd(body(0, [4], size, stride=(1, 2)), body(1, [4], size, stride=(2, 1)))
    index = torch.arange(2)
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    out = method(Batch(image, index, index, index), START)
    tall, wide = (student["last"] for student in out.students)
    assert tall.shape[2:] == (8, 6) and wide.shape[2:] == (4, 12)
    close(out.mapped[0], tall.unflatten(2, (4, 2)).mean(3))
    close(out.mapped[1], wide.unflatten(3, (6, 2)).mean(4))
    assert method.discriminators[0].conv2.kernel_size == (2, 3)


def test_taps_are_one_a_network_or_one_for_all():
    assert afd().taps == ["last", "last"]
    assert afd(taps=["stage2"]).taps == ["stage2", "stage2"]
    method = afd(taps=["stage3", "stage2"])
    assert method.taps == ["stage3", "stage2"] and method.size == (2, 2)
    out = method(batch_of(), START)
    close(out.mapped[1], F.avg_pool2d(out.students[1]["stage2"], 2))


def test_without_the_adversary_only_the_logits_learn():
    """No discriminator, no transfer layer, no Adam; a network without maps will do."""
    method = afd(*toys(4, 6), adversarial=False)
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"students"}
    assert list(updates_of(method)) == ["student0", "student1"]
    out = method(batch_of(), START)
    assert not isinstance(out, Judged)
    whole = afd(*(copy.deepcopy(net) for net in method.nets))
    judged = whole(batch_of(), START)
    for k in (0, 1):
        assert values(method.loss_of(k, out)) == values(whole.loss_of(k, judged))
    assert afd(*flat_networks(), adversarial=False).alpha == 1


def test_without_the_adversary_optimizers_of_the_whole_method_may_stay():
    method = afd(adversarial=False)
    plans = {"features": plan("adam"), "discriminators": plan("adam")}
    training = engine.Training(method, ToyImages(), pace(method, 1, **plans))
    names = {name for moment in training.run() for name in moment.terms}
    assert names == {f"student{k}.{term}" for k in (0, 1) for term in ("ce", "kd")}


def test_the_published_optimizers_are_the_default():
    """Adam of 2e-5 and coupled decay 0.1 for both, a tenth at 75 and 150 of 300 epochs."""
    recipe = resolve(
        {
            "students": ["resnet8", "resnet8"],
            "method": {"name": "afd_online"},
            "data": {"name": "cifar100", "batch_size": 128},
            "optimizers": {"default": {"name": "sgd", "lr": 0.1}},
        },
        source="test",
    )
    method = afd()
    assert (method.temperature, method.alpha, method.logit_peers) == (3.0, 1.0, "ring")
    assert method.phases()[0].epochs == 300
    for name in ("features", "discriminators"):
        optimizer = recipe.optimizers[name]
        found = optimizer.model_dump(exclude_unset=True)
        assert (found["name"], found["lr"], found["weight_decay"]) == ("adam", 2e-5, 0.1)
        assert found["schedule"]["milestones"] == [75, 150] and found["schedule"]["factor"] == 0.1


def test_in_half_precision_the_discriminators_see_and_say_float32():
    """As do the transfer layers; the networks' own maps are bf16."""
    method, seen = afd(*toys(4, 6)), []
    for net in method.nets:
        net.precision = torch.bfloat16
    layers = {f"d{k}": d for k, d in enumerate(method.discriminators)}
    layers |= {f"t{k}": t for k, t in enumerate(method.transfers)}
    counting(layers, lambda name, x: seen.append(x.dtype))
    out = method(batch_of(), START)
    assert out.students[0].features["last"].dtype == torch.bfloat16
    assert seen == [torch.float32] * 8
    assert {x.dtype for x in (*out.mapped, *out.own, *out.fake, *out.real)} == {torch.float32}


def test_resuming_with_transfer_layers_goes_on_bit_for_bit():
    def training() -> engine.Training:
        method = afd(*toys(4, 8, 6))
        adam = {name: plan("adam", 1e-3) for name in ("features", "discriminators")}
        return engine.Training(method, ToyImages(), pace(method, 1, **adam))

    whole, first, second = training(), training(), training()
    for moment in first.run():
        if moment.step == 2:
            break
    state = copy.deepcopy(first.state())
    second.restore(*state)
    for one in (whole, second):
        assert list(one.run())
    a, b = whole.state()[0], second.state()[0]
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any("transfers.1" in k for k in a)


def test_what_predicts_has_no_layer_of_the_method():
    method = afd(*toys(4, 6))
    predictors = method.predictors()
    assert list(predictors) == ["student0", "student1", "ensemble"]
    for k, net in enumerate(method.nets):
        assert predictors[f"student{k}"].state_dict().keys() == net.module.state_dict().keys()
    own = {id(p) for p in (*method.transfers.parameters(), *method.discriminators.parameters())}
    assert not own & {id(p) for each in predictors.values() for p in each.parameters()}


def test_plain_modules_learn_from_each_other():
    """Through `potstill.distill`, without an optimiser named."""
    x = ToyImages(32)
    pairs = list(zip(x.image, x.label.tolist(), strict=True))
    nets = [toy_net(0).module, toy_net(1, width=6).module]
    before = [copy.deepcopy(net) for net in nets]
    run = potstill.distill(None, nets, pairs, pairs, "afd_online", epochs=1, quiet=True)
    assert run.result["scores"].keys() == {"student0", "student1", "ensemble"}
    for net, was in zip(nets, before, strict=True):
        assert not any(map(torch.equal, net.parameters(), was.parameters()))


def test_extreme_logits_stay_finite():
    out = outputs([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    for student in out.students:
        student.logits.requires_grad_()
    for k in (0, 1):
        terms = afd().loss_of(k, out)
        (found,) = torch.autograd.grad(sum(terms.values()), out.students[k].logits)
        assert all(term.isfinite() for term in terms.values()) and found.isfinite().all()


def flat_networks() -> list[Net]:
    """Without a map."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, CLASSES))
        found.append(Net(module, {"hidden": "1"}, SHAPE))
    return found


def refused(error: type[Exception], *nets: Net, **arguments: Any) -> str:
    with pytest.raises(error) as found:
        afd(*nets, **arguments)
    return str(found.value)


def test_taps_that_are_not_there_are_refused():
    assert refused(TapError, taps=["stage3", "stage9"]) == (
        "student 1: no feature 'stage9'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        '"stage3"?; choose taps=[...]'
    )


def test_taps_of_another_number_are_refused():
    assert refused(MethodError, taps=["stage3"] * 3) == (
        "AFDOnline reads one map of each of 2 networks, but taps has 3 names; give one a network, "
        "or one for all"
    )


def test_a_tap_that_is_no_map_is_refused():
    assert refused(MethodError, taps=["embed"]) == (
        "AFDOnline needs feature maps (C, H, W), but 'embed' of student 0 is (8,); choose "
        "taps=[...] before the pooling"
    )


def test_a_network_without_maps_is_refused():
    assert refused(MethodError, toy_net(0), flat_networks()[1]) == (
        "AFDOnline compares feature maps (C, H, W), and student 1 has none among its taps "
        "['embed', 'hidden']; name one with Net(..., taps=...), or use a method that needs none: "
        "dml"
    )


def test_one_network_and_a_teacher_are_refused():
    assert refused(MethodError, toy_net(0)) == "AFDOnline: takes 2 or more students, 1 given"
    with pytest.raises(MethodError) as error:
        AFDOnline(toys(4, 4), [toy_net(2)], ToyImages().spec(1))
    assert str(error.value) == "AFDOnline: takes no teacher, 1 given; remove it"


def test_equal_weights_are_refused():
    assert refused(MethodError, toy_net(0), toy_net(1), toy_net(0)) == (
        "AFDOnline: students 0 and 2 start from equal weights and see the same images, so neither "
        "has anything to teach; initialise each anew"
    )


def test_one_image_alone_is_refused_where_a_discriminator_sees_one_pixel():
    """64 images in batches of 21 leave one. Half of a toy's 2x2 is one pixel, of 8x8 it is 16."""
    data = ToyImages().spec(0, batch_size=21)
    with pytest.raises(MethodError) as error:
        afd(*toys(4, 4), data=data)
    assert str(error.value) == (
        "AFDOnline normalises over the images of a rank, but the last batch of an epoch gives each "
        "of 1 rank only one; set data.drop_last=true or another data.batch_size"
    )
    assert afd(body(0, (4,)), body(1, (4,)), data=data).size == (8, 8)


def test_other_logit_peers_are_refused():
    with pytest.raises(MethodError) as error:
        afd(logit_peers="both")
    assert str(error.value) == "AFDOnline: logit_peers is 'both'; give 'ring' or 'all'"
