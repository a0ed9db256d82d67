"""Scores, by hand on predictors whose logits are known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.batchnorm import batch_statistics
from potstill.evaluate import (
    Ensemble,
    NearestClassMean,
    Predictions,
    Scores,
    agreement,
    class_means,
    evaluate,
    predict,
    reliability,
    scores,
)
from potstill.method import Batch
from potstill.net import Net
from potstill.stochastic_depth import stochastic
from tests.toys import ToyImages, toy_net


class Known:
    """Images that are their own logits. (n, K), n labels"""

    def __init__(self, logits: list[list[float]], label: list[int]) -> None:
        self.logits, self.label = torch.tensor(logits), torch.tensor(label)

    def clean(self, batch_size: int, sharded: bool = False) -> Iterator[Batch]:
        for index in torch.arange(len(self.label)).split(batch_size):
            yield Batch(self.logits[index], self.label[index], index, torch.zeros_like(index))


def six(*best: int) -> list[float]:
    """Logits of six classes, highest first as listed."""
    values = [0.0] * 6
    for place, k in enumerate(best):
        values[k] = 6.0 - place
    return values


def test_scores_by_hand():
    """Logits ln 3 and 0: softmax 3/4 and 1/4. Labels 0, 0, 1: two right of three, mean loss
    (2 ln 4/3 + ln 4) / 3.
    """
    images = Known([[math.log(3.0), 0.0]] * 3, [0, 0, 1])
    scores = evaluate({"known": nn.Identity()}, images)["known"]
    assert scores.top1 == pytest.approx(200 / 3)
    assert scores.loss == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3)
    assert scores.images == 3


def test_top5_by_hand():
    """The label is first, fifth and sixth of six."""
    rows = [six(0, 1, 2, 3, 4), six(1, 2, 3, 4, 0), six(1, 2, 3, 4, 5)]
    scores = evaluate({"known": nn.Identity()}, Known(rows, [0, 0, 0]))["known"]
    assert scores.top1 == pytest.approx(100 / 3)
    assert scores.top5 == pytest.approx(200 / 3)


def test_fewer_than_five_classes_are_all_among_the_best_five():
    scores = evaluate({"known": nn.Identity()}, Known([[0.0, 1.0, 2.0]] * 4, [0, 0, 1, 2]))["known"]
    assert (scores.top1, scores.top5) == (25.0, 100.0)


def test_every_predictor_has_its_own_scores():
    """One says class 0 of (1, 0), the other negates it."""

    class Negated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    images = Known([[1.0, 0.0]] * 4, [0, 0, 0, 1])
    scores = evaluate({"one": nn.Identity(), "other": Negated()}, images, batch_size=3)
    assert list(scores) == ["one", "other"]
    assert scores["one"].top1 == 75.0
    assert scores["other"].top1 == 25.0


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_the_batch_size_does_not_matter(batch_size: int):
    """Not for BatchNorm either: the predictors are in eval mode, the last batch counts by size."""
    predictors, images = {"student": toy_net().predictor()}, ToyImages(20)
    expected = evaluate(predictors, images, batch_size=20)["student"]
    found = evaluate(predictors, images, batch_size)["student"]
    assert found[:2] == expected[:2]
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.images == 20
    assert found.ece == pytest.approx(expected.ece, rel=1e-5)


def test_modes_and_buffers_are_put_back():
    net = toy_net()
    net.module.bn1.eval()
    modes = [m.training for m in net.modules()]
    buffers = [b.clone() for b in net.buffers()]
    evaluate({"student": net.predictor()}, ToyImages(8))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))


def test_modes_are_put_back_on_an_error():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            raise RuntimeError("out of memory")

    fails, other = Fails(), toy_net().predictor()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate({"other": other, "fails": fails}, ToyImages(8))
    assert fails.training
    assert other.training


def test_a_network_can_be_trained_after_it_was_evaluated():
    """Inference mode must leave no tensor that autograd refuses."""
    net = toy_net()
    evaluate({"student": net.predictor()}, ToyImages(8))
    net(ToyImages(8).image).logits.sum().backward()
    assert net.module.conv1.weight.grad is not None


def test_extreme_logits_have_a_finite_loss():
    """1e4 on the wrong class costs 1e4 nats; a half-precision predictor's too, without overflow."""
    images = Known([[1e4, 0.0]] * 2, [1, 1])
    assert evaluate({"known": nn.Identity()}, images)["known"].loss == pytest.approx(1e4)


# --- calibration and agreement


def said(logits: list[list[float]], label: list[int]) -> Predictions:
    return predict({"known": nn.Identity()}, Known(logits, label), batch_size=3)["known"]


def sure(*confidence: float, right: bool = True) -> Predictions:
    """Predictions of class 0 with these confidences, all right or all wrong."""
    zeros = torch.zeros(len(confidence))
    label = torch.full((len(confidence),), 0 if right else 1)
    return Predictions(label, zeros.long(), torch.tensor(confidence), zeros == 0, zeros)


def test_calibration_error_by_hand():
    """Two images at ln 3, so softmax 3/4, of which one is right: a gap of 1/4 on half of the
    images. Two at ln 9, so 9/10, both right: a gap of 1/10 on the other half. 1/8 + 1/20 = 0.175.

    3/4 is in the bin from 11/15 to 12/15, 9/10 in that from 13/15 to 14/15.
    """
    three, nine = [math.log(3.0), 0.0], [math.log(9.0), 0.0]
    found = said([three, nine, three, nine], [0, 0, 1, 0])
    assert scores(found).ece == pytest.approx(17.5, rel=1e-6)
    bins = reliability(found)
    assert len(bins) == 15
    assert bins[11] == pytest.approx((2, 0.75, 0.5))
    assert bins[13] == pytest.approx((2, 0.9, 1.0))
    assert {tuple(b) for i, b in enumerate(bins) if i not in (11, 13)} == {(0, None, None)}


def test_right_as_often_as_sure_is_no_error():
    """At 3/4 three of four are right."""
    found = said([[math.log(3.0), 0.0]] * 4, [0, 0, 0, 1])
    assert scores(found).ece == pytest.approx(0, abs=1e-5)


def test_gaps_of_one_bin_cancel_out_and_those_of_two_do_not():
    """0.95 and 0.97 share a bin; one right, one wrong: 0.96 for 1/2. 0.45 and 0.97 do not."""
    together, apart = (
        Predictions(*map(torch.cat, zip(sure(low), sure(0.97, right=False), strict=True)))
        for low in (0.95, 0.45)
    )
    assert scores(together).ece == pytest.approx(46.0)
    assert scores(apart).ece == pytest.approx(100 * (0.55 + 0.97) / 2)


def test_always_sure_and_always_wrong_is_all_error():
    assert scores(said([[1e4, 0.0]] * 5, [1] * 5)).ece == 100.0


@pytest.mark.parametrize("k", range(15))
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(k: int):
    """(k/15, (k+1)/15], up to exactly 1; the next float above the edge is in the next bin."""
    edge = (k + 1) / 15
    above = torch.tensor(edge).nextafter(torch.tensor(2.0)).item()
    bins = reliability(sure(edge, above) if k < 14 else sure(edge))
    assert [i for i, b in enumerate(bins) if b.images] == [k, k + 1][: 1 + (k < 14)]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_confidence_is_float32_also_of_a_predictor_in_half_precision(kind: torch.dtype):
    """Equal logits of three: 1/3 is the edge of the fifth bin, and in bfloat16 above it."""

    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(kind)

    found = predict({"cast": Cast()}, Known([[0.0] * 3], [0]))["cast"]
    assert found.confidence.dtype == torch.float32
    assert reliability(found)[4].images == 1


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_predictors_compute_in_the_precision_that_is_asked_for(precision: torch.dtype | None):
    """Their logits are scored in float32 all the same."""
    net, kinds = toy_net(), set()
    net.module[-1].register_forward_hook(lambda m, args, output: kinds.add(output.dtype))
    found = predict({"student": net.predictor()}, ToyImages(), 16, precision=precision)["student"]
    assert kinds == {precision or torch.float32}
    assert found.loss.dtype == found.confidence.dtype == torch.float32
    exact = predict({"student": net.predictor()}, ToyImages(), 16)["student"]
    torch.testing.assert_close(found.loss, exact.loss, atol=0.05, rtol=0.05)
    assert torch.equal(found.loss, exact.loss) == (precision is None)


def test_one_class_is_known_for_sure():
    found = said([[-3.0]] * 4, [0] * 4)
    assert reliability(found)[14] == (4, 1.0, 1.0)
    assert scores(found)[:2] == (100.0, 100.0) and scores(found).ece == 0.0


def test_the_bins_make_up_the_scores():
    found = predict({"student": toy_net().predictor()}, ToyImages(50), batch_size=7)["student"]
    bins = [b for b in reliability(found) if b.images]
    assert len(bins) > 1
    assert sum(b.images for b in bins) == 50
    gaps = sum(b.images * abs(b.accuracy - b.confidence) for b in bins)
    assert 100 * gaps / 50 == pytest.approx(scores(found).ece)
    assert 2 * sum(b.images * b.accuracy for b in bins) == pytest.approx(scores(found).top1)


def test_predictions_are_in_the_order_of_the_images():
    found = said([six(i) for i in (4, 0, 2, 5)], [4, 1, 2, 3])
    assert found.label.tolist() == [4, 1, 2, 3]
    assert found.best.tolist() == [4, 0, 2, 5]


def test_agreement_by_hand():
    """The best classes are 0, 0, 1, 1 and 0, 1, 2, 0: the same once, whatever the labels are."""
    a, b = (said([six(k) for k in best], [0, 0, 0, 3]) for best in ([0, 0, 1, 1], [0, 1, 2, 0]))
    assert agreement(a, b) == agreement(b, a) == 25.0
    assert agreement(a, a) == 100.0
    never = said([six(k) for k in (1, 1, 0, 0)], [0, 0, 0, 3])
    assert agreement(a, never) == 0.0


@pytest.mark.parametrize("label", [[0, 1], [0, 0, 0, 1], [0]])
def test_agreement_on_other_images_is_refused(label: list[int]):
    first = said([[1.0, 0.0]] * 4, [0] * 4)
    with pytest.raises(ValueError, match="different images"):
        agreement(first, said([[1.0, 0.0]] * len(label), label))


# --- ensembles and their members


class Counted(nn.Module):
    """A linear layer of two that counts how often it runs."""

    def __init__(self, seed: int = 0, size: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.calls = nn.Linear(size, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


def points(n: int = 12) -> Known:
    """Images (n, 2) of two classes."""
    generator = torch.Generator().manual_seed(3)
    return Known(torch.randn(n, 2, generator=generator).tolist(), [i % 2 for i in range(n)])


def separately(predictors: dict[str, nn.Module], images: Any, **more: Any) -> dict[str, Scores]:
    return {name: evaluate({name: p}, images, **more)[name] for name, p in predictors.items()}


@pytest.mark.parametrize("ensemble_first", [False, True])
def test_an_ensemble_and_its_members_run_each_member_once_a_batch(ensemble_first: bool):
    """12 images are 3 batches of 5 at most; the scores are those of each alone, bit for bit."""
    members = [Counted(k) for k in range(3)]
    predictors = {"ensemble": Ensemble(members), **{f"m{k}": m for k, m in enumerate(members)}}
    if not ensemble_first:
        predictors = dict(reversed(predictors.items()))
    expected = separately(predictors, points(), batch_size=5)
    assert [m.calls for m in members] == [6, 6, 6]
    assert len({score.loss for score in expected.values()}) == 4
    found = evaluate(predictors, points(), batch_size=5)
    assert found == expected and list(found) == list(predictors)
    assert [m.calls for m in members] == [9, 9, 9]


def test_networks_and_their_ensemble_score_as_each_alone():
    """As a method's predictors are, BatchNorm and all."""
    each = {f"student{k}": toy_net(k).predictor() for k in range(2)}
    predictors = {**each, "ensemble": Ensemble(each.values())}
    expected = separately(predictors, ToyImages(20), batch_size=8)
    assert evaluate(predictors, ToyImages(20), batch_size=8) == expected


def test_a_module_under_two_names_runs_once_and_scores_twice():
    module = Counted()
    found = evaluate({"one": module, "other": module}, points(), batch_size=12)
    assert found["one"] == found["other"] and module.calls == 1


def test_a_member_that_writes_into_the_images_scores_as_alone():
    """Its answer to the images as they were is what the ensemble is given as well."""

    class Shifts(Counted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.5))

    shifts = Shifts()
    predictors = {"shifts": shifts, "ensemble": Ensemble([shifts])}
    expected = separately(predictors, points())
    assert expected["shifts"] == expected["ensemble"]
    assert evaluate(predictors, points()) == expected


def test_weights_that_have_changed_are_seen():
    """Nothing is remembered from one evaluation to the next, of the very same images either."""

    class Same(Known):
        """One batch, always the same tensor."""

        def clean(self, batch_size: int, sharded: bool = False) -> Iterator[Batch]:
            index = torch.arange(len(self.label))
            yield Batch(self.logits, self.label, index, index)

    images = Same(points().logits.tolist(), points().label.tolist())
    members = [Counted(0), Counted(1)]
    predictors = {"one": members[0], "ensemble": Ensemble(members)}
    before = evaluate(predictors, images)
    with torch.no_grad():
        members[0].layer.weight.mul_(-2)
    after = evaluate(predictors, images)
    assert after == separately(predictors, images)
    assert all(after[name] != before[name] for name in predictors)


def test_hooks_still_run_on_what_is_run_once():
    """A hook that changes the answer changes it for each predictor that asks."""
    module = Counted()
    module.register_forward_hook(lambda m, args, output: -output)
    predictors = {"one": module, "ensemble": Ensemble([module])}
    expected = separately(predictors, points())
    calls = module.calls
    assert evaluate(predictors, points()) == expected
    assert expected["one"] == expected["ensemble"] and module.calls == calls + 1


def test_students_are_evaluated_while_they_learn():
    """Afterwards they are trained on: gradients reach them, and modes are those of training."""
    nets = [toy_net(0), toy_net(1)]
    each = [net.predictor() for net in nets]
    evaluate({"a": each[0], "b": each[1], "ensemble": Ensemble(each)}, ToyImages(8))
    loss = sum(net(ToyImages(8).image).logits.square().mean() for net in nets)
    loss.backward()
    for net in nets:
        assert net.module.conv1.weight.grad is not None
        assert all(m.training for m in net.modules())


def test_an_ensemble_of_ones_own_decides_itself():
    """A weighted one is not the mean of its members."""

    class Weighted(Ensemble):
        def forward(self, image: Tensor) -> Tensor:
            one, other = self.members
            return one(image) - 2 * other(image)

    members = [Counted(0), Counted(1)]
    predictors = {"one": members[0], "weighted": Weighted(members), "mean": Ensemble(members)}
    expected = separately(predictors, points())
    assert len({score.loss for score in expected.values()}) == 3
    assert evaluate(predictors, points()) == expected


def test_ensembles_of_ensembles():
    """((a + b) / 2 + c) / 2, and a, b, c run once."""
    a, b, c = members = [Counted(k) for k in range(3)]
    inner = Ensemble([a, b])
    found = evaluate({"inner": inner, "outer": Ensemble([inner, c])}, points())
    assert [m.calls for m in members] == [1, 1, 1]
    x = points().logits
    logits = ((a.layer(x) + b.layer(x)) / 2 + c.layer(x)) / 2
    loss = nn.functional.cross_entropy(logits, points().label)
    assert found["outer"].loss == pytest.approx(loss.item(), rel=1e-6)


def test_predictors_that_run_one_network_in_different_ways_score_as_each_alone():
    """By running averages and by those of the batch: only an ensemble's members are shared."""

    class ByBatch(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, image: Tensor) -> Tensor:
            with batch_statistics(self.net):
                return self.net(image)

    net = toy_net(0).predictor()
    predictors = {"running": net, "batch": ByBatch(net)}
    expected = separately(predictors, ToyImages(16))
    assert expected["running"] != expected["batch"]
    assert evaluate(predictors, ToyImages(16)) == expected


# --- the nearest class mean


class Vectors(Known):
    """Vectors as images of one pixel, so that a network can be their identity. (n, D), n labels"""

    def __init__(self, vectors: Any, label: list[int]) -> None:
        self.logits, self.label = torch.as_tensor(vectors)[:, :, None, None], torch.tensor(label)
        self.asked: list[tuple[int, bool]] = []

    def clean(self, batch_size: int, sharded: bool = False) -> Iterator[Batch]:
        self.asked.append((batch_size, sharded))
        return super().clean(batch_size)


def identity(size: int = 2, classes: int = 2) -> Net:
    """Its "embed" is the image."""
    return Net(nn.Sequential(nn.Flatten(), nn.Linear(size, classes)), {}, (size, 1, 1))


def test_class_means_by_hand():
    """(10, 0) and (0, 1): the mean (5, .5) has the direction (10, 1) / sqrt 101 = (.9950, .0995).
    Unit vectors would have their mean at (.7071, .7071).
    """
    vectors = torch.tensor([[10.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 2.0]])
    found = class_means([(vectors, torch.tensor([0, 0, 1, 1]))], 2)
    expected = torch.tensor([[0.9950, 0.0995], [0.0, 1.0]])
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_the_nearest_class_mean_by_hand():
    """(1, 1.5): inner products 1.144 and 1.5, class 1; with means of unit vectors 1.768, class 0.
    (3, 2): 3.184 and 2, softmax loss ln(1 + exp(-1.184)).
    """
    training = Vectors([[10.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 2.0]], [0, 0, 1, 1])
    images = Vectors([[1.0, 1.5], [3.0, 2.0]], [1, 0])
    ncm = NearestClassMean(identity(), 2)
    found = evaluate({"ncm": ncm}, images, training=training)["ncm"]
    assert (found.top1, found.images) == (100.0, 2)
    root = math.sqrt(101)
    gaps = [1.5 - 11.5 / root, 32 / root - 2]
    assert found.loss == pytest.approx(sum(math.log1p(math.exp(-g)) for g in gaps) / 2, rel=1e-5)
    products = torch.tensor([[11.5 / root, 1.5], [32 / root, 2.0]])
    torch.testing.assert_close(ncm(images.logits), products)


def test_the_nearest_means_are_of_the_training_images():
    """Which have other labels than the evaluated ones: all are wrong, where means of the latter
    would make all right.
    """
    training = Vectors([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], [0, 0, 1])
    images = Vectors([[0.0, 3.0], [0.0, 1.0], [4.0, 0.0]], [0, 0, 1])
    ncm = NearestClassMean(identity(), 2)
    assert evaluate({"ncm": ncm}, images, training=training)["ncm"].top1 == 0
    assert torch.equal(ncm.means, torch.eye(2))
    assert evaluate({"ncm": ncm}, images, training=images)["ncm"].top1 == 100


def test_the_training_images_are_read_once_by_each_that_needs_them():
    """Every rank reads its share of them, in batches like those it is evaluated on."""
    training, images = (Vectors([[1.0, 0.0], [0.0, 1.0]], [0, 1]) for _ in range(2))
    predictors = {"ncm": NearestClassMean(identity(), 2), "student": identity().predictor()}
    scores = evaluate(predictors, images, batch_size=7, training=training)
    assert list(scores) == ["ncm", "student"] and scores["ncm"].top1 == 100
    assert training.asked == images.asked == [(7, True)]
    evaluate({"student": predictors["student"]}, images, training=training)
    assert training.asked == [(7, True)]


def test_means_are_found_anew_at_every_evaluation():
    """Those of a network that has changed in between; without training images they stay."""
    layer = nn.Linear(2, 2, bias=False)
    net = Net(nn.Sequential(nn.Flatten(), layer, nn.Linear(2, 2)), {}, (2, 1, 1))
    images, ncm = Vectors([[1.0, 0.0], [0.0, 1.0]], [0, 1]), NearestClassMean(net, 2)
    for weight in (torch.eye(2), torch.tensor([[0.0, 1.0], [2.0, 0.0]])):
        with torch.no_grad():
            layer.weight.copy_(weight)
        evaluate({"ncm": ncm}, images, training=images)
        assert torch.equal(ncm.means, nn.functional.normalize(weight.mT))
    evaluate({"ncm": ncm}, images)
    assert torch.equal(ncm.means, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_means_that_were_never_found_are_missed():
    ncm, images = NearestClassMean(identity(), 2), Vectors([[1.0, 0.0]], [0])
    with pytest.raises(AssertionError, match=r"fit\(\) finds the means first"):
        evaluate({"ncm": ncm}, images)


def test_a_class_without_a_mean_scores_zero():
    """No image, or images that cancel; nothing is NaN, and classes after it keep their place."""
    label = torch.tensor([0, 0, 3])
    found = class_means([(torch.tensor([[1.0, 2.0], [-1.0, -2.0], [0.0, 5.0]]), label)], 5)
    assert torch.equal(found, torch.tensor([[0.0, 0.0]] * 3 + [[0.0, 1.0], [0.0, 0.0]]))
    images = Vectors([[1.0, 0.0], [-1.0, 0.0]], [0, 1])
    ncm = NearestClassMean(identity(), 3)
    evaluate({"ncm": ncm}, images, training=Vectors([[3.0, 0.0]], [2]))
    assert torch.equal(ncm(images.logits), torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]))


def test_class_means_are_summed_in_double_over_batches():
    """1e8 and 1 and -1e8 in three batches: in float32 the 1 would be lost."""
    rows = torch.tensor([[1e8, 0.0], [1.0, 1.0], [-1e8, 0.0]])
    zero = torch.zeros(1, dtype=torch.int64)
    found = class_means([(row[None], zero) for row in rows], 1)
    torch.testing.assert_close(found, torch.full((1, 2), math.sqrt(0.5)))
    assert found.dtype == torch.float32
    assert class_means([(rows.double(), zero.repeat(3))], 1).dtype == torch.float64


def test_class_means_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"^there are no vectors$"):
        class_means([], 3)


def by_hand(net: Net, images: ToyImages, training: ToyImages, tap: str) -> float:
    """Percent right: one image at a time, of a network in eval mode."""
    net.eval()
    with torch.no_grad():
        known, asked = (net.capture(x.image)[tap].flatten(1) for x in (training, images))
    means = [known[training.label == c].mean(0) for c in range(4)]
    means = [m / m.norm() for m in means]
    best = [max(range(4), key=lambda c, x=x: (x @ means[c]).item()) for x in asked]
    right = sum(b == y for b, y in zip(best, images.label.tolist(), strict=True))
    return 100 * right / len(best)


@pytest.mark.parametrize("tap", ["embed", "stage2"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_nearest_class_mean_of_a_network(tap: str, batch_size: int):
    """BatchNorm uses its averages, in whatever batches; a map is flattened."""
    net, training, images = toy_net(), ToyImages(50, noise=4.0), ToyImages(30, noise=4.0)
    for _ in range(20):
        net(training.image)  # averages that are unlike those of a batch of one
    ncm = NearestClassMean(net, 4, tap)
    found = evaluate({"ncm": ncm}, images, batch_size, training)["ncm"]
    assert all(m.training for m in ncm.modules())
    expected = by_hand(net, images, training, tap)
    assert found.top1 == pytest.approx(expected) and 30 < expected < 100


def test_modes_and_flags_are_put_back_after_a_nearest_class_mean():
    """Gradients are on again and reach the network, frozen parts stay frozen."""
    net = toy_net()
    net.module.bn1.eval()
    net.module.conv1.requires_grad_(False)
    ncm = NearestClassMean(net, 4)
    modes = [m.training for m in ncm.modules()]
    flags = [p.requires_grad for p in ncm.parameters()]
    buffers = [b.clone() for b in net.buffers()]
    evaluate({"ncm": ncm}, ToyImages(8), training=ToyImages(16))
    assert [m.training for m in ncm.modules()] == modes
    assert [p.requires_grad for p in ncm.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
    assert torch.is_grad_enabled() and not ncm.means.requires_grad
    net(ToyImages(8).image).logits.sum().backward()
    assert net.module.layer1[0].conv1.weight.grad.abs().sum() > 0


def test_modes_are_put_back_where_means_cannot_be_found():
    """Images of another size fail while the means are being found."""
    net = toy_net()
    ncm = NearestClassMean(net, 4)
    with pytest.raises(RuntimeError):
        evaluate({"ncm": ncm}, ToyImages(8), training=Vectors([[1.0, 0.0]], [0]))
    assert all(m.training for m in ncm.modules())


@pytest.mark.parametrize("draw", ["batch", "image"])
def test_the_nearest_class_mean_of_a_stochastic_network_is_of_the_whole(draw: Any):
    """At its expected depth both for the means and for what is compared; nothing is drawn."""
    net, training, images = stochastic(toy_net(), 0.3, draw=draw), ToyImages(48), ToyImages(32)
    ncm, random = NearestClassMean(net, 4), torch.random.get_rng_state()
    found = evaluate({"ncm": ncm}, images, training=training)["ncm"]
    assert torch.equal(torch.random.get_rng_state(), random) and not net.sampled
    assert found == evaluate({"ncm": ncm}, images, training=training)["ncm"]
    assert found.top1 == pytest.approx(by_hand(net, images, training, "embed"))
    with torch.no_grad():
        vectors = net.capture(training.image)["embed"]
        drawn = net(training.image)["embed"]
    torch.testing.assert_close(ncm.means, class_means([(vectors, training.label)], 4))
    assert (ncm.means - class_means([(drawn, training.label)], 4)).abs().max() > 1e-3


def test_means_and_what_is_compared_are_in_float32():
    """Whatever the training is autocast to."""
    net, images = toy_net(), ToyImages(16)
    expected = evaluate({"ncm": (ncm := NearestClassMean(net, 4))}, images, training=images)
    means = ncm.means.clone()
    net.precision = torch.bfloat16
    assert evaluate({"ncm": ncm}, images, training=images) == expected
    assert torch.equal(ncm.means, means) and means.dtype == torch.float32


def test_a_share_without_images_is_not_run():
    """As of a rank when the last batch is short: a network may be unable to take none."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x), -1)

    class Short(Vectors):
        def clean(self, batch_size: int, sharded: bool = False) -> Iterator[Batch]:
            none = torch.zeros(0, dtype=torch.int64)
            yield from super().clean(batch_size)
            yield Batch(self.logits[:0], none, none, none)

    net = Net(nn.Sequential(Flat(), nn.Linear(2, 2)), {}, (2, 1, 1))
    images = Short([[1.0, 0.0], [0.0, 1.0]], [0, 1])
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        net(images.logits[:0])
    found = evaluate({"ncm": NearestClassMean(net, 2)}, images, training=images)["ncm"]
    assert (found.top1, found.images) == (100.0, 2)


def test_means_are_not_saved_with_the_network():
    ncm = NearestClassMean(toy_net(), 4)
    before = set(ncm.state_dict())
    evaluate({"ncm": ncm}, ToyImages(8), training=ToyImages(8))
    assert set(ncm.state_dict()) == before
    assert "means" not in before and "means" in dict(ncm.named_buffers())
