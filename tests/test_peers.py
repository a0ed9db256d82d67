"""What methods without a teacher share: the ensemble, names, updates, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import potstill
from potstill.errors import MethodError, TapError
from potstill.evaluate import Ensemble
from potstill.method import Method, Outputs, Progress, Terms
from potstill.methods.dml import DML
from potstill.methods.ensemble_kd import EnsembleKD
from potstill.methods.l1 import L1
from potstill.net import Net
from potstill.peers import Peers, last_maps
from tests.test_notebook import SHAPE, go, images, network
from tests.toys import ToyImages, toy_net

close = torch.testing.assert_close

EQUAL = (
    "{}: students {} and {} start from equal weights and see the same images, so neither has "
    "anything to teach; initialise each anew"
)


class Alone(Peers):
    """Peers that do not heed each other, and each has a layer of its own."""

    def __init__(self, *networks: Any) -> None:
        super().__init__(*networks)
        self.layers = nn.ModuleList(nn.Linear(8, 4) for _ in self.students)

    def loss_of(self, k: int, out: Outputs) -> Terms:
        return {"ce": F.cross_entropy(out.students[k].logits, out.batch.label)}

    def trained_with(self, k: int) -> list[nn.Module]:
        return [*super().trained_with(k), self.layers[k]]


class Single(Alone):
    """The same, where one network is enough."""

    students_needed = (1, None)


class Times(nn.Module):
    """Its input, multiplied."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def peers(count: int, kind: type[Peers] = Alone) -> Peers:
    return kind([toy_net(k) for k in range(count)], [], ToyImages().spec(0))


# --- the ensemble


def test_an_ensemble_by_hand():
    """(1, 2), twice and six times that: three times on average, not three-halves of a pair."""
    ensemble, x = Ensemble([Times(1.0), Times(2.0), Times(6.0)]), torch.tensor([[1.0, 2.0]])
    close(ensemble(x), torch.tensor([[3.0, 6.0]]))
    close(Ensemble([Times(2.0)])(x), 2 * x)


def test_an_ensemble_shares_its_members():
    """It takes any iterable; a member that is trained on is trained in the ensemble too."""
    members = [nn.Linear(2, 3), nn.Linear(2, 3)]
    ensemble = Ensemble(m for m in members)
    assert [id(p) for p in ensemble.parameters()] == [
        id(p) for m in members for p in m.parameters()
    ]
    x = torch.ones(1, 2)
    before = ensemble(x)
    with torch.no_grad():
        members[1].bias += 4
    close(ensemble(x), before + 2)


# --- names and updates


@pytest.mark.parametrize("count", [2, 3])
def test_every_network_and_the_ensemble_predict(count: int):
    method = peers(count).eval()
    predictors, x = method.predictors(), ToyImages(8).image
    names = [f"student{k}" for k in range(count)]
    assert list(predictors) == [*names, "ensemble"]
    logits = [net.logits(x) for net in method.nets]
    for name, z in zip(names, logits, strict=True):
        close(predictors[name](x), z)
    close(predictors["ensemble"](x), torch.stack(logits).mean(0))


def test_the_ensembles_members_are_the_predictors():
    """The very objects, so that an evaluation runs each once."""
    *each, ensemble = peers(3).predictors().values()
    assert list(ensemble.members) == each


def test_one_network_is_called_the_student():
    method = peers(1, Single)
    assert list(method.predictors()) == ["student", "ensemble"]
    assert [u.name for turn in method.phases()[0].turns for u in turn.updates] == ["student"]


def test_one_turn_with_an_update_a_network():
    """Each moves the network, and layers of its own; frozen parameters are left out."""
    method = peers(3)
    frozen = method.nets[1].module.conv1.weight.requires_grad_(False)
    (phase,) = method.phases()
    assert (phase.name, phase.epochs) == ("distill", 300)
    (turn,) = phase.turns
    assert [u.name for u in turn.updates] == ["student0", "student1", "student2"]
    out = turn.forward(next(ToyImages(8).clean(8)), Progress(0, 0, 1, 1), None)
    for k, update in enumerate(turn.updates):
        own = [*method.nets[k].parameters(), *method.layers[k].parameters()]
        expected = [p for p in own if p is not frozen]
        assert len(update.parameters) == len(expected)
        assert all(p is q for p, q in zip(update.parameters, expected, strict=True))
        close(update.loss(out)["ce"], F.cross_entropy(out.students[k].logits, out.batch.label))


def test_a_method_without_losses_says_what_is_missing():
    with pytest.raises(NotImplementedError) as error:
        peers(2, Peers).loss_of(0, None)
    assert str(error.value) == "Peers must define loss_of(k, out)"


def test_two_or_more_students_and_no_teacher_are_taken():
    with pytest.raises(MethodError) as error:
        peers(1)
    assert str(error.value) == "Alone: takes 2 or more students, 1 given"
    with pytest.raises(MethodError) as error:
        Alone([toy_net(0), toy_net(1)], [toy_net(2)], ToyImages().spec())
    assert str(error.value) == "Alone: takes no teacher, 1 given; remove it"


# --- equal weights


@pytest.mark.parametrize("kind", [DML, EnsembleKD, L1])
def test_equal_weights_are_refused(kind: type[Method]):
    net = toy_net(0)
    with pytest.raises(MethodError) as error:
        kind([net, copy.deepcopy(net)], [], ToyImages().spec(0))
    assert str(error.value) == EQUAL.format(kind.__name__, 0, 1)


@pytest.mark.parametrize(
    ("seeds", "which"), [((0, 1, 1), (1, 2)), ((0, 1, 0), (0, 2)), ((0, 0, 1), (0, 1))]
)
def test_any_two_of_equal_weights_are_named(seeds: tuple[int, ...], which: tuple[int, int]):
    with pytest.raises(MethodError) as error:
        DML([toy_net(seed) for seed in seeds], [], ToyImages().spec(0))
    assert str(error.value) == EQUAL.format("DML", *which)


def test_one_weight_that_differs_is_enough():
    """The last of all, by a little: it grows."""
    net = toy_net(0)
    other = copy.deepcopy(net)
    with torch.no_grad():
        list(other.parameters())[-1][0] += 1e-3
    DML([net, other], [], ToyImages().spec(0))


def test_equal_weights_in_another_network_are_accepted():
    """A Tanh in place of a ReLU predicts otherwise."""
    one = toy_net(0)
    module = copy.deepcopy(one.module)
    module.relu = nn.Tanh()
    Alone([one, Net(module, {}, one.input_shape)], [], ToyImages().spec(0))


@pytest.mark.parametrize("kind", [DML, EnsembleKD, L1])
def test_other_numbers_of_outputs_are_refused(kind: type[Method]):
    with pytest.raises(MethodError) as error:
        kind([toy_net(0), toy_net(1, classes=7)], [], ToyImages().spec(0))
    assert str(error.value) == (
        f"{kind.__name__}: the students have 4, 7 outputs, and all predict the same classes; give "
        "each as many"
    )


def test_networks_of_other_shapes_are_accepted():
    """Wider, or with a layer more behind equal ones."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 4))
    more = nn.Sequential(*copy.deepcopy(first), nn.Linear(4, 4))
    short, deep = (Net(module, {}, (3, 8, 8)) for module in (first, more))
    for nets in ([toy_net(0), toy_net(0, width=6)], [short, deep], [deep, short]):
        DML(nets, [], ToyImages().spec(0))


def test_one_student_has_nobody_to_be_equal_to():
    peers(1, Single)
    L1([toy_net(0)], [toy_net(0)], ToyImages().spec())


def test_modules_of_equal_weights_are_refused_before_training():
    """Through `distill`, with the modules as they were: no hooks, nothing trained or frozen."""
    one = network(0)
    other, before = copy.deepcopy(one), copy.deepcopy(one.state_dict())
    with pytest.raises(MethodError) as error:
        go(None, [one, other], images(), images(seed=1), "dml")
    assert str(error.value) == EQUAL.format("DML", 0, 1)
    for module in (one, other):
        assert all(torch.equal(v, before[key]) for key, v in module.state_dict().items())
        assert all(p.requires_grad for p in module.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("method", ["dml", "ensemble_kd", "l1_kd"])
def test_modules_teach_each_other(method: str):
    """The modules given are trained, and the ensemble is a module of its own."""
    modules = [network(0), network(1)]
    arguments = {"taps": ["stage1"]} if method == "l1_kd" else {}
    run = go(None, modules, images(), images(seed=1), method, epochs=8, **arguments)
    assert run.students[:2] == modules
    assert list(run.result["scores"]) == ["student0", "student1", "ensemble"]
    assert all(score["top1"] > 90 for score in run.result["scores"].values())
    x = torch.rand(4, *SHAPE)
    first, second = (module.eval()(x) for module in modules)
    close(run.students[2].eval()(x), (first + second) / 2)


def test_architectures_by_name_start_from_weights_of_their_own():
    nets = ["resnet8", "resnet8"]
    run = potstill.distill(
        None, nets, images(), images(seed=1), "dml", epochs=1, batch_size=16, quiet=True
    )
    first, second = (dict(module.named_parameters()) for module in run.students[:2])
    assert not any(torch.equal(first[k], second[k]) for k in first if k.endswith("conv1.weight"))


# --- one map of each network


def test_maps_of_many_networks():
    """The tap given to each, one for all, or the map that is pooled."""
    method, roles = peers(3), [0, 1, 2]
    assert last_maps(method, roles, None) == [("last", (8, 2, 2))] * 3
    assert last_maps(method, roles, ["stage2"]) == [("stage2", (8, 4, 4))] * 3
    assert last_maps(method, roles, ["stem", "stage2", "last"]) == [
        ("stem", (4, 8, 8)),
        ("stage2", (8, 4, 4)),
        ("last", (8, 2, 2)),
    ]


def test_the_last_stage_is_the_map_where_no_pooling_is_known():
    module = toy_net(1).module
    stages = Net(module, {"stage1": "layer1", "stage2": "layer2"}, (3, 8, 8))
    method = Alone([toy_net(0), stages], [], ToyImages().spec(0))
    assert last_maps(method, [0, 1], None) == [("last", (8, 2, 2)), ("stage2", (8, 4, 4))]


def test_maps_that_cannot_be_had():
    method, roles = peers(3), [0, 1, 2]
    for taps in ([], ["stem", "last"], ["stem"] * 4):
        with pytest.raises(MethodError) as error:
            last_maps(method, roles, taps)
        assert str(error.value) == (
            f"Alone reads one map of each of 3 networks, but taps has {len(taps)} names; give one "
            "a network, or one for all"
        )
    with pytest.raises(TapError) as error:
        last_maps(method, roles, ["stem", "last", "lost"])
    assert str(error.value) == (
        "student 2: no feature 'lost'; this network has ['embed', 'last', 'stage1', 'stage1:pre', "
        "'stage2', 'stage2:pre', 'stage3', 'stage3:pre', 'stem']; did you mean \"last\"?; choose "
        "taps=[...]"
    )
    with pytest.raises(MethodError) as error:
        last_maps(method, roles, ["stem", "embed", "last"])
    assert str(error.value) == (
        "Alone needs feature maps (C, H, W), but 'embed' of student 1 is (8,); choose taps=[...] "
        "before the pooling"
    )


def test_a_student_that_cannot_learn_is_refused():
    frozen = toy_net(1)
    frozen.requires_grad_(False)
    method = DML([toy_net(0), frozen], [], ToyImages().spec(0))
    with pytest.raises(MethodError) as error:
        method.phases()
    assert str(error.value) == "DML: student1 is frozen, and every student learns here"
