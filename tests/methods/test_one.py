"""ONE: gate, ensemble and losses by hand, what branches share, students that stay whole."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import potstill
from potstill import engine
from potstill.errors import MethodError, NetworkError, TapError
from potstill.evaluate import evaluate
from potstill.method import Batch, DataSpec, Outputs, Progress
from potstill.methods.one import ONE, Branches, gate, ramp
from potstill.models import build
from potstill.net import Captured, Net
from tests.toys import CLASSES, SHAPE, ToyImages, pace, plan, toy_net

close = torch.testing.assert_close

LATE = Progress(80, 80, 300, 300)
"""The ramp's end."""


def one(*nets: Net, data: DataSpec | None = None, **arguments: Any) -> ONE:
    """Of the networks given, or of two toys; the same gate each time."""
    students = nets or (toy_net(0), toy_net(1))
    torch.manual_seed(9)
    return ONE(students, [], data or ToyImages().spec(0), **arguments)


def toys(count: int, **arguments: Any) -> list[Net]:
    return [toy_net(seed, **arguments) for seed in range(count)]


def pair_of(name: str, size: int, count: int = 2, classes: int = 10) -> list[Net]:
    torch.manual_seed(0)
    return [build(name, classes, (3, size, size)) for _ in range(count)]


def batch_of(n: int = 16, dtype: torch.dtype = torch.float32) -> Batch:
    return next(ToyImages(n, dtype).clean(n))


def outputs(
    branches: Sequence[Sequence[float]],
    ensemble: Sequence[float],
    label: int = 0,
    progress: Progress = LATE,
) -> Outputs:
    """One image."""
    features = {f"branch{k}": torch.tensor([z]) for k, z in enumerate(branches)}
    y = torch.tensor([label])
    found = Captured(torch.tensor([ensemble]), features)
    return Outputs(Batch(torch.zeros(1, 1), y, y, y), progress, [found], [])


def fixed_gate(scores: Sequence[float]) -> nn.Sequential:
    """In eval mode, scores before the ReLU as given, for every image of one channel."""
    made = gate(1, len(scores))
    with torch.no_grad():
        made.fc.weight.zero_()
        made.fc.bias.copy_(torch.tensor(scores))
        made.bn.running_var.fill_(1 - made.bn.eps)
    return made.eval()


def answering(logits: Sequence[float]) -> nn.Sequential:
    """A branch that gives these to every image of one channel."""
    made = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, len(logits)))
    with torch.no_grad():
        made[2].weight.zero_()
        made[2].bias.copy_(torch.tensor(logits))
    return made


def branched(scores: Sequence[float], *logits: Sequence[float]) -> Branches:
    return Branches(nn.Identity(), map(answering, logits), fixed_gate(scores))


Z1, Z2 = (1.0, 0.0, -1.0), (0.0, 2.0, 0.0)
ZE = (0.6224593, 0.7550813, -0.6224593)


def test_gate_and_ensemble_by_hand():
    """ReLU makes the scores (1/2, -3) into (1/2, 0): g = (sigmoid(1/2), sigmoid(-1/2)) =
    (0.622459, 0.377541). z_e = 0.622459 (1, 0, -1) + 0.377541 (0, 2, 0).
    """
    module, image = branched([0.5, -3.0], Z1, Z2), torch.ones(2, 1, 2, 2)
    weights = module.gate(torch.ones(2, 1))
    close(weights, torch.tensor([[0.6224593, 0.3775407]] * 2), atol=1e-6, rtol=0)
    close(module(image), torch.tensor([ZE] * 2), atol=1e-6, rtol=0)


def test_the_loss_by_hand():
    """T = 3, y = 0, w = 1: CE_1 = 0.407606, CE_2 = ln(2 + e^2) = 2.239545, CE_e = 0.887802.
    p_e = softmax(z_e / 3) = (0.369610, 0.386316, 0.244075) against p_1 = (0.448441, 0.321322,
    0.230237) and p_2 = (0.253310, 0.493380, 0.253310): KL 0.013953 and 0.036084, times 9.
    """
    found = one().loss(outputs([Z1, Z2], ZE))
    assert list(found) == ["ce0", "ce1", "ce_ensemble", "kd0", "kd1"]
    expected = [0.4076060, 2.2395448, 0.8878018, 9 * 0.01395253, 9 * 0.03608370]
    close(torch.stack(list(found.values())), torch.tensor(expected), atol=2e-6, rtol=0)
    close(sum(found.values()).item(), 3.985278, atol=1e-5, rtol=0)


def test_the_temperature_and_its_square():
    """At T = 2, logits of ln 9 have softmax(ln 3, 0) = (3/4, 1/4): KL(1/2, 1/2 || 3/4, 1/4) =
    1/2 ln 4/3, times 4.
    """
    out = outputs([[math.log(9.0), 0.0], [0.0, 0.0]], [0.0, 0.0])
    found = one(temperature=2.0).loss(out)
    close(found["kd0"].item(), 2 * math.log(4 / 3), atol=1e-6, rtol=0)
    close(found["kd1"].item(), 0.0)


def test_three_branches_have_three_terms_of_each_kind():
    """Terms are summed, not averaged: each branch's is what it would be among two."""
    found = one(*toys(3)).loss(outputs([Z1, Z2, Z2], ZE))
    assert list(found) == ["ce0", "ce1", "ce2", "ce_ensemble", "kd0", "kd1", "kd2"]
    two = one().loss(outputs([Z1, Z2], ZE))
    assert all(torch.equal(found[name], term) for name, term in two.items())
    assert torch.equal(found["kd2"], found["kd1"]) and torch.equal(found["ce2"], found["ce1"])


@pytest.mark.parametrize(
    ("epoch", "weight"),
    [(0, 0.006738), (20, 0.060055), (40, 0.286505), (60, 0.731616), (80, 1.0), (300, 1.0)],
)
def test_the_ramp_by_hand(epoch: int, weight: float):
    """exp(-5 (1 - e / 80)^2): e^-5, e^-2.8125, e^-1.25, e^-0.3125, 1."""
    close(ramp(epoch, 80), weight, atol=1e-6, rtol=0)
    found = one().loss(outputs([Z1, Z2], ZE, progress=Progress(epoch, epoch, 300, 300)))
    close(found["kd1"].item(), weight * 9 * 0.0360837, atol=1e-6, rtol=0)
    close(found["ce1"].item(), 2.2395448, atol=1e-6, rtol=0)
    close(found["ce_ensemble"].item(), 0.8878018, atol=1e-6, rtol=0)


def test_the_ramp_counts_whole_epochs():
    assert ramp(20.99, 80) == ramp(20, 80) < ramp(21, 80)
    assert ramp(79.99, 80) == ramp(79, 80) < 1


@pytest.mark.parametrize(("length", "weight"), [(0.0, 1.0), (10.0, math.exp(-5 * 0.25))])
def test_the_ramp_may_be_of_another_length_or_none(length: float, weight: float):
    """At epoch 5; of none, there is nothing to divide by at epoch 0 either."""
    assert ramp(0, 0) == 1
    out = outputs([Z1, Z2], ZE, progress=Progress(5, 5, 300, 300))
    found = one(ramp_epochs=length).loss(out)
    close(found["kd0"].item(), weight * 9 * 0.01395253, atol=1e-6, rtol=0)


def test_a_shorter_training_has_a_shorter_ramp():
    """Of 30 epochs of 10 steps, 4 are 40 of the published 300."""
    found = one().loss(outputs([Z1, Z2], ZE, progress=Progress(4, 40, 300, 300)))
    close(found["kd1"].item(), math.exp(-1.25) * 9 * 0.0360837, atol=1e-6, rtol=0)
    assert one().phases()[0].epochs == 300


def test_defaults_are_those_of_the_page():
    method = one()
    assert (method.temperature, method.ramp_epochs, method.tap) == (3.0, 80.0, "stage2")


@pytest.mark.parametrize("training", [True, False])
def test_weights_sum_to_one_for_each_image_by_itself(training: bool):
    """In train mode they are a gate's of normalised scores; images differ in them."""
    method = one(*toys(3)).train(training)
    with torch.no_grad():
        method.student.module.gate.fc.weight.mul_(30)
    found = method(batch_of(), LATE).students[0]
    weights = found["gate"]
    assert weights.shape == (16, 3) and weights.min() > 0
    close(weights.sum(1), torch.ones(16))
    assert len(weights[:, 0].unique()) > 4
    for i in range(16):
        own = sum(weights[i, k] * found[f"branch{k}"][i] for k in range(3))
        close(found.logits[i], own)


@pytest.mark.parametrize("score", [2.0, 0.0, -1.0])
def test_equal_scores_and_a_dead_gate_give_the_plain_mean(score: float):
    """The ReLU makes all scores below zero equal, too."""
    module = branched([score, score - (score < 0), score], Z1, Z2, ZE)
    mean = torch.tensor([Z1, Z2, ZE]).mean(0)
    close(module(torch.ones(2, 1, 2, 2)), torch.stack([mean, mean]))


def test_the_gate_reads_the_mean_of_the_shared_map():
    """Linear, BatchNorm, ReLU, softmax; of a map of 4x4, its 16 pixels' mean."""
    method = one().eval()
    module = method.student.module
    found = method(batch_of(), LATE).students[0]
    assert found["shared"].shape == (16, 8, 4, 4)
    layers = [type(part) for part in module.gate]
    assert layers == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Softmax]
    scores = module.gate.bn(module.gate.fc(found["shared"].flatten(2).mean(2)))
    close(found["gate"], scores.clamp(min=0).softmax(1))


def gradient_of(term: Tensor, module: nn.Module) -> float:
    parameters = list(module.parameters())
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return sum(g.abs().sum().item() for g in found if g is not None)


def test_only_the_ensembles_cross_entropy_trains_the_gate():
    """In the KL the ensemble is constant: it trains each branch, by its own term."""
    method = one(*toys(3))
    with torch.no_grad():
        method.student.module.gate.bn.bias.fill_(1.0)
    terms, module = method.loss(method(batch_of(), LATE)), method.student.module
    for name, term in terms.items():
        assert (gradient_of(term, module.gate) > 0) == (name == "ce_ensemble"), name
        trained = [gradient_of(term, branch) > 0 for branch in module.branches]
        assert trained == [name == "ce_ensemble" or name.endswith(str(k)) for k in range(3)], name
        assert gradient_of(term, module.trunk) > 0


def test_low_layers_are_shared_and_the_others_are_each_students_own():
    """The very parameters and buffers of the first student, in every student, under its names."""
    nets = toys(3)
    low = dict(nets[0].module.named_parameters())
    method = one(*nets)
    own = [net.module.state_dict(keep_vars=True) for net in method.whole]
    for name in own[0]:
        same = len({id(state[name]) for state in own}) == 1
        assert same == (not name.startswith(("layer3", "fc"))), name
    assert all(low[name] is own[1][name] for name in low if not name.startswith(("layer3", "fc")))
    moved = {id(p) for p in method.trainable()}
    assert moved == {
        *(id(p) for net in method.whole for p in net.parameters()),
        *(id(p) for p in method.student.module.gate.parameters()),
    }


def test_one_optimizer_trains_everything():
    ((turn,),) = (phase.turns for phase in one().phases())
    assert [update.name for update in turn.updates] == ["student"]


def by_the_page(
    low: nn.Module, tails: list[nn.Module], gating: nn.Sequential, batches: Sequence[Batch]
) -> None:
    """An SGD step a batch at epoch 40, w = exp(-5 / 4)."""
    parameters = [p for m in (low, *tails, gating) for p in m.parameters()]
    sgd = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4)
    for batch in batches:
        shared = low(batch.image)
        z = [tail(shared) for tail in tails]
        weights = gating(shared.flatten(2).mean(2)).clamp(min=0).softmax(1)
        loss = torch.zeros((), dtype=torch.float64)
        for n, y in enumerate(batch.label):
            ensemble = sum(weights[n, i] * z[i][n] for i in range(len(z)))
            p = (ensemble.detach() / 3).softmax(0)
            loss = loss - ensemble.log_softmax(0)[y]
            for own in (branch[n] for branch in z):
                kl = (p * (p.log() - (own / 3).softmax(0).log())).sum()
                loss = loss - own.log_softmax(0)[y] + math.exp(-1.25) * 9 * kl
        sgd.zero_grad()
        (loss / len(batch.label)).backward()
        sgd.step()


@pytest.mark.parametrize("count", [2, 3])
def test_two_steps_are_those_of_the_page(count: int):
    """In float64, to twelve digits, buffers of BatchNorm included."""
    nets = toys(count)
    whole = [copy.deepcopy(net.module).double() for net in nets]
    method = one(*nets).double()
    low = nn.Sequential(*list(whole[0].children())[:5])
    tails: list[nn.Module] = [nn.Sequential(*list(net.children())[5:]) for net in whole]
    gating = nn.Sequential(nn.Linear(8, count), nn.BatchNorm1d(count)).double()
    given = method.student.module.gate
    gating[0].load_state_dict(given.fc.state_dict())
    gating[1].load_state_dict(given.bn.state_dict())
    batches = [batch_of(n, torch.float64) for n in (16, 12)]

    (phase,) = method.phases()
    (update,) = phase.turns[0].updates
    sgd = torch.optim.SGD(update.parameters, 0.1, 0.9, weight_decay=1e-4)
    method.train()
    for batch in batches:
        engine.train_step(phase, {"student": sgd}, batch, Progress(40, 40, 300, 300), seed=0)
    by_the_page(low, tails, gating, batches)

    expected = [*low.state_dict().values()]
    expected += [v for tail in tails for v in tail.state_dict().values()]
    expected += [*gating.state_dict().values()]
    for (name, found), wanted in zip(method.state_dict().items(), expected, strict=True):
        close(found, wanted, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("count", "parameters"), [(2, 832_990), (3, 1_193_189)])
def test_parameters_of_a_resnet32_by_hand(count: int, parameters: int):
    """Trunk: stem 464, stage 1 5 * 4,672, stage 2 14,528 + 4 * 18,560: 112,592. A branch: stage 3
    57,728 + 4 * 73,984 and 65 * 100: 360,164. The gate: 33 m + 2 m, 70 or 105.
    """
    method = one(*pair_of("resnet32", 32, count, classes=100))
    module = method.student.module
    sizes = [
        sum(p.numel() for p in m.parameters())
        for m in (module.trunk, *module.branches, module.gate)
    ]
    assert sizes == [112_592, *[360_164] * count, 35 * count]
    assert sum(p.numel() for p in method.trainable()) == parameters == sum(sizes)


@pytest.mark.parametrize(
    ("name", "size", "tap", "shape"),
    [
        ("resnet20", 32, "stage2", (32, 16, 16)),
        ("resnet56", 32, "stage2", (32, 16, 16)),
        ("wrn_16_2", 32, "stage2", (64, 16, 16)),
        ("wrn_28_2", 32, "stage2", (64, 16, 16)),
        ("resnet18_imagenet", 64, "stage3", (256, 4, 4)),
        ("vgg8", 32, "stage3", (512, 4, 4)),
        ("mobilenetv2", 32, "stage3", (48, 4, 4)),
    ],
)
def test_every_branch_is_the_end_of_a_whole_student(
    name: str, size: int, tap: str, shape: tuple[int, ...]
):
    """Cut before the last stage, at its raw sum in a WRN; branches give each student's logits."""
    nets = pair_of(name, size)
    before = copy.deepcopy(nets[0]).double().eval()
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).double()
    expected = before.logits(image)
    method = one(*nets).double().eval()
    assert method.tap == tap
    index = torch.arange(2)
    found = method(Batch(image, index, index, index), LATE).students[0]
    assert found["shared"].shape == (2, *shape)
    predictors = method.predictors()
    for k in (0, 1):
        close(found[f"branch{k}"], predictors[f"student{k}"](image), rtol=1e-12, atol=1e-12)
    close(found["branch0"], expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found["branch1"], expected)
    close(predictors["ensemble"](image), found.logits)


def test_where_to_branch_may_be_chosen():
    """After the stem's ReLU, all three stages are each branch's own; at the end only the head."""
    method = one(tap="stem")
    assert [n for n, _ in method.student.module.trunk.named_children()] == ["conv1", "bn1", "relu"]
    assert [n for n, _ in one(tap="stage1").student.module.trunk.named_children()][-1] == "layer1"
    assert one(tap="last").student.module.branches[0](torch.ones(2, 8, 2, 2)).shape == (2, CLASSES)


def train_a_little(method: ONE, epochs: int = 1) -> None:
    plans = {"default": plan(lr=0.05)}
    for _ in engine.Training(method, ToyImages(), pace(method, epochs, **plans)).run():
        pass


def test_students_remain_complete_networks():
    """After training: the architecture's own keys and shapes, and a fresh one gives the logits."""
    method = one()
    train_a_little(method)
    predictors = method.predictors()
    assert list(predictors) == ["student0", "student1", "ensemble"]
    image = batch_of().image
    for k in (0, 1):
        fresh = toy_net(7 + k)
        state = predictors[f"student{k}"].state_dict()
        assert {name: v.shape for name, v in state.items()} == {
            name: v.shape for name, v in fresh.state_dict().items()
        }
        fresh.load_state_dict(state)
        own = predictors[f"student{k}"].eval()(image)
        assert torch.equal(fresh.eval().logits(image), own)
    assert not torch.equal(*(predictors[f"student{k}"](image) for k in (0, 1)))


@pytest.mark.parametrize("channels_last", [True, False])
def test_every_predictor_lays_images_out_as_the_training_does(channels_last: bool):
    """A recipe's channels_last reaches the network that is trained; the students follow it."""
    method, seen = one(), []
    method.student.channels_last = channels_last
    method.student.module.trunk.conv1.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous())
    )
    for predictor in method.predictors().values():
        predictor(batch_of().image)
    assert seen == [not channels_last] * 3


def test_the_ensemble_in_eval_mode_uses_what_the_gate_has_averaged():
    """One image alone has its own weights, the same as among others."""
    method = one()
    train_a_little(method)
    assert method.student.module.gate.bn.num_batches_tracked == 4
    ensemble, image = method.predictors()["ensemble"].eval(), batch_of().image
    close(ensemble(image[3:4]), ensemble(image)[3:4], atol=1e-5, rtol=1e-5)


class Counted(nn.Conv2d):
    """Counts its real forwards, which a hook would not."""

    calls: ClassVar[Counter[str]] = Counter()

    def __init__(self, part: str, *given: int) -> None:
        super().__init__(*given, padding=1)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        self.calls[self.part] += 1
        return super().forward(x)


def counted(seed: int) -> Net:
    torch.manual_seed(seed)
    module = nn.Sequential(
        Counted("low", 3, 4, 3), nn.ReLU(), Counted("high", 4, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES),
    )  # fmt: skip
    return Net(module, {"stage1": "1", "stage2": "3"}, SHAPE)


def test_shared_layers_and_every_branch_run_once_a_step():
    method = one(counted(0), counted(1))
    Counted.calls.clear()
    (phase,) = method.phases()
    chosen = {"student": torch.optim.SGD(method.trainable(), 0.1)}
    engine.train_step(phase, chosen, batch_of(), LATE, seed=0)
    assert Counted.calls == {"low": 1, "high": 2}


def test_modules_given_to_distill_are_trained_and_stay_separate_networks():
    """With the low layers that were shared, each in a copy of its own: it can be done again."""
    x = ToyImages(32)
    data = list(zip(x.image, x.label.tolist(), strict=True))
    nets = [toy_net(seed) for seed in (0, 1)]
    modules = [net.module for net in nets]
    for net in nets:
        net.close()
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    run = potstill.distill(None, modules, data, data, "one", epochs=1, batch_size=16, quiet=True)
    scores = run.result["scores"]
    assert scores.keys() == {"student0", "student1", "ensemble"}
    low = [name for name in before[0] if not name.startswith(("layer3", "fc"))]
    states = [module.state_dict() for module in modules]
    assert all(torch.equal(states[0][name], states[1][name]) for name in low)
    assert not {p.data_ptr() for p in modules[0].parameters()} & {
        p.data_ptr() for p in modules[1].parameters()
    }
    for k, module in enumerate(modules):
        assert run.students[k] is module
        weights = [name for name, _ in module.named_parameters()]
        state = module.state_dict()
        assert not [name for name in weights if torch.equal(state[name], before[k][name])]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    image = x.image[:4]
    with torch.no_grad():
        modules[1].eval()
        mean = (modules[0].eval()(image) + modules[1](image)) / 2
    assert mean.shape == (4, CLASSES)
    assert run.result["scores"]["student1"] == evaluate({"it": modules[1]}, x)["it"]._asdict()
    potstill.distill(None, modules, data, data, "one", epochs=1, batch_size=16, quiet=True)


def test_modules_are_left_alone_where_the_training_is_refused_later():
    """By an optimiser that fits no update, when the method has been built."""
    data = list(zip(ToyImages(8).image, ToyImages(8).label.tolist(), strict=True))
    modules = [toy_net(seed).module for seed in (0, 1)]
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    wrong = {"default": {"name": "sgd", "lr": 0.1}, "studnt": {"name": "sgd", "lr": 0.1}}
    with pytest.raises(MethodError, match="studnt fits no update"):
        potstill.distill(None, modules, data, data, "one", optimizers=wrong, quiet=True)
    for module, state in zip(modules, before, strict=True):
        now = module.state_dict()
        assert all(torch.equal(now[name], state[name]) for name in state)
    assert modules[0].layer1 is not modules[1].layer1


def test_in_half_precision_the_gate_sees_float32():
    method, seen = one(), []
    method.student.precision = torch.bfloat16
    module = method.student.module
    module.gate.fc.register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))
    found = method(batch_of(), LATE).students[0]
    assert found.features["shared"].dtype == torch.bfloat16
    assert seen == [(torch.float32, torch.float32)]
    assert found.logits.dtype == torch.float32


def test_extreme_logits_stay_finite():
    big = [[1e4, -1e4], [-1e4, 1e4]]
    out = outputs(big, big[0], label=1)
    z = out.students[0].features["branch0"].requires_grad_()
    terms = one().loss(out)
    (found,) = torch.autograd.grad(sum(terms.values()), z)
    assert all(term.isfinite() for term in terms.values()) and found.isfinite().all()


def refused(error: type[Exception], *nets: Net, **arguments: Any) -> str:
    with pytest.raises(error) as found:
        one(*nets, **arguments)
    return str(found.value)


def test_branches_that_write_into_the_shared_map_are_refused():
    def writing(seed: int) -> Net:
        torch.manual_seed(seed)
        body = [nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return Net(nn.Sequential(*body, nn.Linear(4, CLASSES)), {"map": "0"}, SHAPE)

    with pytest.raises(TapError) as error:
        one(writing(0), writing(1), tap="map")
    assert str(error.value) == (
        "feature 'map' ('0') is overwritten in place by a later module; build that module with "
        "inplace=False"
    )


def test_a_module_that_stands_in_the_line_twice_is_shared_at_every_place():
    """One ReLU for all: five of six parts before the last stage are low layers."""

    def reusing(seed: int) -> Net:
        torch.manual_seed(seed)
        relu = nn.ReLU()
        body = [nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3, 2), relu, nn.AdaptiveAvgPool2d(1)]
        module = nn.Sequential(*body, nn.Flatten(), nn.Linear(4, CLASSES))
        return Net(module, {"low": "1#1"}, SHAPE)

    method = one(reusing(0), reusing(1), tap="low").eval()
    assert list(method.student.module.trunk._modules) == ["0", "1", "2", "3"]
    image = batch_of(4).image
    for k, whole in enumerate(method.whole):
        close(method.student(image)[f"branch{k}"], whole.logits(image))


def test_what_is_given_stays_as_it_is():
    """The other students' low layers are left out of copies; taps of the networks go on reading."""
    nets = toys(2)
    image = batch_of(4).image
    before = [net.eval()(image) for net in nets]
    one(*nets)
    for net, was in zip(nets, before, strict=True):
        now = net.eval()(image)
        assert now.features.keys() == was.features.keys()
        assert all(torch.equal(now[tap], was[tap]) for tap in now.features)
        assert torch.equal(now.logits, was.logits)


def test_branches_of_equal_weights_are_refused():
    """Low layers that differ are left out."""
    nets = toys(2)
    for name in ("layer3", "fc"):
        other = getattr(nets[0].module, name).state_dict()
        getattr(nets[1].module, name).load_state_dict(other)
    assert refused(MethodError, *nets) == (
        "ONE: students 0 and 1 start from equal weights and see the same images, so neither has "
        "anything to teach; initialise each anew"
    )


def test_layers_without_weights_must_be_alike_too():
    nets = toys(2)
    nets[1].module.relu = nn.GELU()
    assert "student 1 is another network than student 0" in refused(MethodError, *nets)


def test_a_ramp_of_negative_length_is_refused():
    with pytest.raises(MethodError, match="ramp_epochs is -3; give 0 for no ramp, or more"):
        one(ramp_epochs=-3.0)


def test_the_gate_is_where_the_students_are_and_of_their_kind():
    method = one(*(net.double() for net in toys(2)))
    assert {p.dtype for p in method.parameters()} == {torch.float64}


class Own(nn.Module):
    """A network with a forward of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.low, self.high = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.high(self.low(x).relu()).relu().mean((2, 3)))


def test_a_network_that_is_no_line_of_parts_is_refused():
    nets = [Net(Own(k), {"stage1": "low", "stage2": "high"}, SHAPE) for k in (0, 1)]
    assert refused(MethodError, *nets) == (
        "ONE cuts networks that are one line of parts (nn.Sequential), and student 0 is a Own with "
        "a forward of its own"
    )


def test_a_tap_within_a_part_is_refused():
    assert refused(NetworkError, tap="stage2:pre") == (
        "'stage2:pre' ('layer2.0.relu2:in') is not between two parts of a line of parts, so this "
        "ResNet cannot be cut there"
    )


def test_a_tap_that_does_not_exist_or_is_no_map_is_refused():
    assert refused(TapError, tap="stage9") == (
        "the student: no feature 'stage9'; this network has ['embed', 'last', 'stage1', "
        "'stage1:pre', 'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean "
        '"stage3"?; choose tap=...'
    )
    assert refused(MethodError, tap="embed") == (
        "ONE needs feature maps (C, H, W), but 'embed' of the student is (8,); choose tap=... "
        "before the pooling"
    )


def test_without_two_stages_a_tap_has_to_be_named():
    def plain(seed: int) -> Net:
        torch.manual_seed(seed)
        body = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return Net(nn.Sequential(*body, nn.Linear(4, CLASSES)), {"stage1": "1"}, SHAPE)

    assert refused(MethodError, plain(0), plain(1)) == (
        "ONE branches before the last stage, and of the student 1 stages are known; choose where "
        "with tap=... among ['embed', 'stage1']"
    )
    assert one(plain(0), plain(1), tap="stage1").tap == "stage1"


def other_taps() -> Net:
    net = toy_net(1)
    return Net(net.module, {"stage1": "layer1", "stage2": "layer2"}, SHAPE)


def other_type() -> Net:
    """The same parts in a plain line."""
    net = toy_net(1)
    return Net(nn.Sequential(OrderedDict(net.module.named_children())), net.taps, SHAPE)


@pytest.mark.parametrize(
    "other",
    [lambda: toy_net(1, width=6), lambda: toy_net(1, classes=5), other_taps, other_type],
    ids=["width", "classes", "taps", "type"],
)
def test_another_network_is_refused(other: Any):
    assert refused(MethodError, toy_net(0), toy_net(2), other()) == (
        "ONE: student 2 is another network than student 0, and students share their low layers; "
        "give the same architecture to each"
    )


@pytest.mark.parametrize("which", [0, 1])
def test_a_normalisation_of_its_own_is_refused(which: int):
    nets = [
        build("resnet8", CLASSES, SHAPE, ([2.0] * 3, [1.0] * 3) if k == which else None)
        for k in (0, 1)
    ]
    assert refused(MethodError, *nets) == (
        f"ONE: student {which} has a normalisation of its own, and students that share their low "
        "layers see the same images; leave normalize out"
    )


def test_equal_weights_are_refused():
    assert refused(MethodError, toy_net(0), toy_net(1), toy_net(1)) == (
        "ONE: students 1 and 2 start from equal weights and see the same images, so neither has "
        "anything to teach; initialise each anew"
    )


def test_one_student_and_a_teacher_are_refused():
    assert refused(MethodError, toy_net(0)) == "ONE: takes 2 or more students, 1 given"
    with pytest.raises(MethodError) as error:
        ONE(toys(2), [toy_net(2)], ToyImages().spec(1))
    assert str(error.value) == "ONE: takes no teacher, 1 given; remove it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 1}, "a batch gives each of 1 rank only one; make data.batch_size larger"),
        (
            {"batch_size": 21},
            "the last batch of an epoch gives each of 1 rank only one; set data.drop_last=true or "
            "another data.batch_size",
        ),
    ],
)
def test_a_batch_of_one_image_is_refused(arguments: Mapping[str, Any], message: str):
    """BatchNorm in the gate; 64 images are 3 times 21 and one."""
    assert refused(MethodError, data=ToyImages().spec(0, **arguments)) == (
        f"ONE normalises over the images of a rank, but {message}"
    )
    assert one(data=ToyImages().spec(0, 21, drop_last=True)).tap == "stage2"


def test_a_refused_network_is_left_as_it_was():
    """Nothing is shared before everything fits."""
    nets = [toy_net(0), toy_net(1), toy_net(2, width=6)]
    low = [net.module.layer1 for net in nets]
    with pytest.raises(MethodError):
        one(*nets)
    assert all(net.module.layer1 is part for net, part in zip(nets, low, strict=True))
