"""Networks of stochastic depth in every method: what runs is the sub-network that the run draws.

What a ResNet-8 is with some of its blocks is written anew here, from the page.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import engine, models
from potstill.depth import Depth
from potstill.files import load_tensors
from potstill.method import Batch, Method, Outputs, Terms
from potstill.methods import METHODS
from potstill.net import Net, Predictor
from potstill.optim import Constant, OptimizerPlan, sgd
from potstill.seeds import seed_of
from potstill.stochastic_depth import stochastic
from tests.methods.test_contract import CASES, assert_same, pace_of, state_of, trained_teacher
from tests.ranks_worker import stochastic_networks
from tests.test_ranks import fork_ranks
from tests.toys import SHAPE, ToyImages, channels_last, pace, toy_net

close = torch.testing.assert_close
TAUGHT = [name for name in METHODS if CASES[name].teachers]
ONLINE = [name for name in METHODS if name not in TAUGHT]
every_draw = pytest.mark.parametrize("draw", ["batch", "image"])


# --- from the page


def survival(blocks: int, p_end: float) -> list[float]:
    """p_l = 1 - (l / L) (1 - p_end) of blocks l = 1..L."""
    return [1 - number / blocks * (1 - p_end) for number in range(1, blocks + 1)]


def drawn(
    chances: Sequence[float],
    counters: tuple[int, str, int, str],
    images: int | None = None,
    part: int = 0,
) -> Tensor:
    """b_l of a network in a step, from (seed, phase, step, name). (L,) or (images, L) bool

    `part` is which of the networks it was made of, in the one case that there are several.
    """
    seed, *rest = counters
    generator = torch.Generator().manual_seed(seed_of(seed_of(seed, "sub-network", *rest), part))
    size = (len(chances),) if images is None else (images, len(chances))
    return torch.rand(size, generator=generator) < torch.tensor(chances)


def features(module: Any, image: Tensor, b: Any) -> dict[str, Tensor]:
    """Stages and logits of a ResNet: h_l = relu(b_l f_l(h_{l-1}) + s_l(h_{l-1})).

    b has a number for each block; or bools (images, L), then f_l is computed of its images alone.
    """
    x, numbers, found = module.relu(module.bn1(module.conv1(image))), itertools.count(), {}
    for stage in (1, 2, 3):
        for block in getattr(module, f"layer{stage}"):
            number, total = next(numbers), x
            if block.downsample is not None:
                total = block.downsample(x)
            each = isinstance(b, Tensor) and b.ndim == 2
            rows = b[:, number].nonzero().flatten() if each else torch.arange(len(x))
            factor = 1.0 if each else float(b[number])
            if factor and len(rows):
                branch = block.relu1(block.bn1(block.conv1(x[rows])))
                branch = block.bn2(block.conv2(branch))
                total = total.index_add(0, rows, factor * branch)
            x = F.relu(total)
        found[f"stage{stage}"] = x
    found["logits"] = module.fc(x.mean((2, 3)))
    return found


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student at temperature T), mean over images."""
    p, q = (z.div(temperature).softmax(1) for z in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


# --- a training that is watched


class OneStep(ToyImages):
    """Epochs of one step each, so that a moment's terms are those of a step; keeps the batches."""

    def __init__(self) -> None:
        super().__init__(16, torch.float64)
        self.seen: list[Batch] = []

    def batches(self, *given: Any, **named: Any) -> Any:
        for batch in super().batches(*given, **named):
            self.seen.append(batch)
            yield batch


def made(
    name: str,
    *,
    teachers: Mapping[str, Any] | None = None,
    students: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Method:
    """A method of the contract's cases whose teachers or students have a stochastic depth."""
    case = CASES[name]
    own = [toy_net(i) for i in range(case.students)]
    taught = [copy.deepcopy(trained_teacher("batch")) for _ in range(case.teachers)]
    if students is not None:
        own = [stochastic(net, **students) for net in own]
    if teachers is not None:
        taught = [stochastic(net, **teachers) for net in taught]
    torch.manual_seed(5)
    spec = ToyImages().spec(case.teachers)
    return channels_last(METHODS[name](own, taught, spec, **{**case.arguments, **arguments}))


def watched(net: Net) -> list[int]:
    """How many images each block's branch is run for, added up here from now on."""
    rows = [0] * len(net.blocks)

    def count(number: int) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor]) -> None:
            rows[number] += len(given[0])

        return hook

    for number, path in enumerate(net.blocks):
        net.module.get_submodule(path).conv1.register_forward_pre_hook(count(number))
    return rows


def seen_of(rows: list[int]) -> tuple[int, ...]:
    """What was added up, which then begins anew."""
    found = tuple(rows)
    rows[:] = [0] * len(rows)
    return found


def expected_rows(
    draw: str, chances: Sequence[float], counters: tuple[int, str, int, str], images: int = 16
) -> tuple[int, ...]:
    if draw == "image":
        return tuple(drawn(chances, counters, images).sum(0).tolist())
    return tuple((images * drawn(chances, counters)).tolist())


HALF = survival(3, 0.5)
WITHOUT_TEACHER = {("fsp", "distill"), ("ab", "distill")}
"""Phases whose losses read no teacher."""
PREPARED = {("refilled", "distill")}
"""Phases that begin with the whole teacher on all 64 images."""


@every_draw
@pytest.mark.parametrize("name", TAUGHT)
def test_a_stochastic_teacher_teaches_in_every_method(name: str, draw: str):
    """Half an epoch is enough for it to be another network: each step runs the blocks that are
    drawn from its counters, and no others; the teacher stays as it was.
    """
    method = made(name, teachers={"p_end": 0.5, "draw": draw})
    (teacher,) = method.teachers
    before, rows, different = state_of(teacher), watched(teacher), set()
    for moment in engine.Training(method, ToyImages(), pace_of(method, 1)).run():
        assert all(term.isfinite() for term in moment.terms.values()), moment.terms
        ran = seen_of(rows)
        if (name, moment.phase) in WITHOUT_TEACHER:
            assert ran == (0, 0, 0)
            assert not moment.subnetworks
            continue
        if (name, moment.phase) in PREPARED and moment.step == 1:
            ran = tuple(count - 64 for count in ran)
        counters = (0, moment.phase, moment.step - 1, "teacher0")
        assert ran == expected_rows(draw, HALF, counters)
        different.add(ran)
        assert bool(moment.subnetworks) == moment.epoch_done
    assert len(different) > 1
    assert_same(before, state_of(teacher))
    assert not any(module.training for module in teacher.module.modules())
    assert all(value.isfinite().all() for value in state_of(method).values())


@every_draw
@pytest.mark.parametrize("name", list(METHODS))
def test_stochastic_students_learn_in_every_method(name: str, draw: str):
    """What predicts is at the expected depth: p_l f_l + s_l of every block, the same every time."""
    method = made(name, students={"p_end": 0.5, "draw": draw})
    for moment in engine.Training(method, ToyImages(), pace_of(method, 1)).run():
        assert all(term.isfinite() for term in moment.terms.values()), moment.terms
    assert set(moment.subnetworks) == {n for n in method.by_name if n.startswith("student")}
    assert all(value.isfinite().all() for value in state_of(method).values())
    image = next(ToyImages().clean(16)).image
    plain = 0
    for predictor in method.predictors().values():
        predictor.eval()
        with torch.no_grad():
            logits = predictor(image)
            assert logits.isfinite().all()
            assert torch.equal(logits, predictor(image))
            if isinstance(predictor, Predictor) and hasattr(predictor.module.module, "layer1"):
                plain += 1
                close(logits, features(predictor.module.module, image, HALF)["logits"])
    assert plain == (0 if name in ("simkd", "norm") else CASES[name].students)


@every_draw
@pytest.mark.parametrize("name", ["simkd", "norm"])
def test_what_predicts_with_more_than_the_student_is_at_the_expected_depth(name: str, draw: str):
    """SimKD: W mean(P(map)) + b with the teacher's W, b. NORM: its transform, then the classifier;
    merged into the classifier, the same.
    """
    method = made(name, students={"p_end": 0.5, "draw": draw})
    training = engine.Training(method, ToyImages(), pace_of(method, 1))
    for _ in training.run():
        pass
    image, module = next(ToyImages().clean(16)).image, method.student.module.eval()
    predictor = method.predictors()["student"].eval()
    with torch.no_grad():
        last = features(module, image, HALF)["stage3"]
        if name == "simkd":
            pooled = method.projector.eval()(last).mean((2, 3))
            close(predictor(image), method.teachers[0].classifier(pooled))
            return
        close(predictor(image), module.fc(method.transform(last).mean((2, 3))))
        method.merge, method.into_classifier = True, True
        close(method.predictors()["student"].eval()(image), predictor(image), atol=1e-4, rtol=1e-4)


# --- what is dropped in the loss


def taught_by_part(name: str, draw: str) -> tuple[Method, Any, OneStep]:
    """A method with a stochastic teacher, float64; the plain teacher's module; the images."""
    images, teacher = OneStep(), copy.deepcopy(trained_teacher("batch"))
    part = stochastic(teacher, 0.5, draw=draw)
    method = METHODS[name]([toy_net(0)], [part], images.spec(batch_size=16))
    return method.double(), teacher.module.double().eval(), images


def one_by_one(module: Any, image: Tensor, alive: Tensor) -> dict[str, Tensor]:
    """What sub-networks make of images, of each alone: no other image of its batch is at fault."""
    b = alive.expand(len(image), alive.shape[-1]).double().tolist()
    with torch.no_grad():
        each = [features(module, image[i : i + 1], b[i]) for i in range(len(image))]
    return {name: torch.cat([found[name] for found in each]) for name in each[0]}


def followed(method: Method, images: OneStep, steps: int = 3) -> Any:
    """(step, student before it, batch, terms) of a training's steps."""
    running = engine.Training(method, images, pace(method, steps)).run()
    for step in range(steps):
        student = copy.deepcopy(method.student.module).train()
        moment = next(running)
        yield step, student, images.seen[step], moment.terms


@every_draw
def test_kds_teacher_is_the_sub_network_of_the_step(draw: str):
    """0.1 CE + 0.9 T^2 KL(sub-network || student); the counters say which blocks that has."""
    method, plain, images = taught_by_part("kd", draw)
    (teacher,), different = method.teachers, set()
    for step, student, batch, terms in followed(method, images):
        alive = drawn(HALF, (0, "distill", step, "teacher0"), 16 if draw == "image" else None)
        teacher.seed(seed_of(0, "sub-network", "distill", step, "teacher0"))
        assert torch.equal(teacher.drawn(16), alive)
        teacher.seed(None)
        own = features(student, batch.image, [1.0] * 3)["logits"].detach()
        theirs = one_by_one(plain, batch.image, alive)["logits"]
        close(terms["ce"], 0.1 * F.cross_entropy(own, batch.label))
        close(terms["kd"], 0.9 * soft_divergence(own, theirs, 4.0))
        different.add(str(alive.tolist()))
    assert len(different) > 1


@every_draw
def test_ats_maps_are_those_of_the_sub_network(draw: str):
    """A dropped block leaves its shortcut: 1000 sum over stages of mean((Q_s - Q_t)^2), where Q is
    the mean over channels of squares, scaled to unit length.
    """
    method, plain, images = taught_by_part("at", draw)
    for step, student, batch, terms in followed(method, images):
        alive = drawn(HALF, (0, "distill", step, "teacher0"), 16 if draw == "image" else None)
        own = features(student, batch.image, [1.0] * 3)
        theirs, total = one_by_one(plain, batch.image, alive), 0.0
        for stage in ("stage1", "stage2", "stage3"):
            q, p = (F.normalize(x.square().mean(1).flatten(1)) for x in (own[stage], theirs[stage]))
            total += (q - p).square().mean().item()
        close(terms["at"].item(), 1000 * total)
        close(terms["ce"].item(), F.cross_entropy(own["logits"], batch.label).item())


@every_draw
@pytest.mark.parametrize("name", ["ofd", "reviewkd", "sakd"])
def test_a_sub_network_of_batch_statistics_normalises_by_the_images_it_has(name: str, draw: str):
    """The published runs of these have the teacher's BatchNorm so; no average moves for it."""
    method = made(name, teachers={"p_end": 0.5, "draw": draw})
    (teacher,), batch = method.teachers, next(ToyImages().clean(16))
    before = state_of(teacher)
    plain = copy.deepcopy(trained_teacher("batch")).module.train()
    assert method.teacher_statistics == "batch"
    for seed in range(4):
        teacher.seed(seed)
        alive = teacher.drawn(16)
        (found,) = method.teach(batch)
        with torch.no_grad():
            naive = features(plain, batch.image, alive)
        for stage in ("stage1", "stage2", "stage3"):
            close(found[stage], naive[stage], atol=1e-5, rtol=1e-4)
        close(found.logits, naive["logits"], atol=1e-5, rtol=1e-4)
    assert_same(before, state_of(teacher))


# --- p_end = 1


def finished(
    name: str,
    architecture: str,
    precision: torch.dtype | None,
    depth: Mapping[str, Any] | None,
    **arguments: Any,
) -> tuple[dict[str, Tensor], list[dict[str, float]], list[Any]]:
    """Final state, terms of every step and what was drawn, after an epoch of four steps."""
    torch.manual_seed(3)
    nets = [models.build(architecture, 4, SHAPE) for _ in range(2)]
    if depth is not None:
        nets = [stochastic(net, **depth) for net in nets]
    images, offline = ToyImages(), name != "dml"
    own, taught = (nets[:1], nets[1:]) if offline else (nets, [])
    method = channels_last(METHODS[name](own, taught, images.spec(len(taught)), **arguments))
    settings = dataclasses.replace(pace(method, 1), precision=precision)
    moments = list(engine.Training(method, images, settings).run())
    records = [{k: v.item() for k, v in m.terms.items()} for m in moments]
    return state_of(method), records, [m.subnetworks for m in moments]


plain_run = functools.cache(finished)
METHOD_AND_MODE = pytest.mark.parametrize(
    ("name", "mode"), [("kd", None), ("at", None), ("dml", "alternating"), ("dml", "synchronous")]
)
both_families = pytest.mark.parametrize("architecture", ["resnet8", "wrn_16_1"])


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bf16"])
@both_families
@METHOD_AND_MODE
def test_p_end_1_is_the_plain_method_bit_for_bit(
    name: str, mode: str | None, architecture: str, precision: torch.dtype | None
):
    arguments = {} if mode is None else {"mode": mode}
    plain = plain_run(name, architecture, precision, None, **arguments)
    found = finished(name, architecture, precision, {"p_end": 1}, **arguments)
    assert_same(plain[0], found[0])
    assert plain[1:] == found[1:]
    assert found[2] == [{}] * 4


@every_draw
@both_families
@METHOD_AND_MODE
def test_a_network_of_which_nothing_happens_to_be_dropped_is_the_plain_one_bit_for_bit(
    name: str, mode: str | None, architecture: str, draw: str
):
    """With p_end = 1 - 1e-7 the 4 to 64 draws of each block are all below p_l: it is multiplied by
    nothing, and no image is picked.
    """
    arguments = {} if mode is None else {"mode": mode}
    plain = plain_run(name, architecture, None, None, **arguments)
    depth = {"p_end": 0.9999999, "draw": draw}
    found = finished(name, architecture, None, depth, **arguments)
    for drew in found[2][-1].values():
        assert drew.distinct == 1 and drew.live == drew.blocks > 0
    assert len(found[2][-1]) == 2
    assert_same(plain[0], found[0])
    assert plain[1] == found[1]


# --- networks that teach each other


@pytest.mark.parametrize("mode", ["alternating", "synchronous"])
@every_draw
def test_mutual_learning_of_sub_networks_step_by_step(mode: str, draw: str):
    """CE + KL at T = 1, one draw of each network a step. Alternating: network 0 steps, predicts
    anew as the same sub-network, with the batch's statistics and without moving an average, and
    network 1 learns from that. A dropped block has no gradient, and no average of it moves.
    """
    images, lr = OneStep(), 0.1
    nets = [toy_net(seed) for seed in (0, 1)]
    own = [copy.deepcopy(net.module).double().train() for net in nets]
    plain = OptimizerPlan(lambda p: sgd(p, lr, 0.0, 0.0), Constant())
    method = METHODS["dml"](
        [stochastic(net, 0.5, draw=draw) for net in nets], [], images.spec(0, 16), mode=mode
    ).double()
    moments = engine.Training(method, images, pace(method, 3, default=plain)).run()
    for step, moment in enumerate(moments):
        batch, each = images.seen[step], 16 if draw == "image" else None
        b = [drawn(HALF, (0, "distill", step, f"student{k}"), each) for k in (0, 1)]
        logits = [features(m, batch.image, b[k])["logits"] for k, m in enumerate(own)]
        peers, later = [z.detach() for z in logits[::-1]], []
        for k in (0, 1):
            if k == 1 and mode == "alternating":
                averages = {name: value.clone() for name, value in own[0].named_buffers()}
                with torch.no_grad():
                    peers[1] = features(own[0], batch.image, b[0])["logits"]
                own[0].load_state_dict(averages, strict=False)
            ce = F.cross_entropy(logits[k], batch.label)
            kl = soft_divergence(logits[k], peers[k], 1.0)
            close(moment.terms[f"student{k}.ce"], ce.detach(), rtol=1e-9, atol=1e-12)
            close(moment.terms[f"student{k}.kd"], kl.detach(), rtol=1e-9, atol=1e-12)
            weights = list(own[k].parameters())
            gradients = torch.autograd.grad(
                ce + kl, weights, allow_unused=True, materialize_grads=True
            )
            later += [(p, lr * g) for p, g in zip(weights, gradients, strict=True)]
            if mode == "alternating" or k == 1:
                for p, change in later:
                    p.data -= change
                later.clear()
    for k in (0, 1):
        for key, value in method.nets[k].module.state_dict().items():
            close(value, own[k].state_dict()[key], rtol=1e-9, atol=1e-12, msg=key)
        image = images.seen[0].image
        predictor = method.predictors()[f"student{k}"].eval()
        close(predictor(image), features(own[k].eval(), image, HALF)["logits"])


@every_draw
def test_a_network_that_predicts_anew_is_the_same_sub_network(
    draw: str, monkeypatch: pytest.MonkeyPatch
):
    """Of three networks the first two predict anew: five draws a step, of three sub-networks."""
    draws: list[Tensor] = []
    original = Depth.drawn

    def noted(depth: Depth, images: int) -> Tensor:
        draws.append(original(depth, images))
        return draws[-1]

    method = made("dml", students={"p_end": 0.5, "draw": draw})
    monkeypatch.setattr(Depth, "drawn", noted)
    running = engine.Training(method, ToyImages(), pace(method, 1)).run()
    steps = []
    for _ in range(3):  # the last step of an epoch counts, and draws once more
        draws.clear()
        next(running)
        first, second, third, again, anew = draws
        assert torch.equal(first, again) and torch.equal(second, anew)
        steps.append(torch.stack([first, second, third]))
    assert len({str(step.tolist()) for step in steps}) == 3
    assert len({str(one.tolist()) for step in steps for one in step}) > 3


# --- where draws come from


class TwoTeachers(Method):
    """Labels alone; both teachers run."""

    teachers_needed = (2, 2)

    def loss(self, out: Outputs) -> Terms:
        return {"ce": F.cross_entropy(out.students[0].logits, out.batch.label)}


def ran(seed: int, draw: str = "batch") -> list[tuple[tuple[int, ...], ...]]:
    """Rows of each block of two equal teachers, step by step, two epochs."""
    teachers = [stochastic(toy_net(9), 0.5, draw=draw) for _ in range(2)]
    method = TwoTeachers([toy_net(0)], teachers, ToyImages().spec(2))
    rows, found = [watched(net) for net in teachers], []
    for _ in engine.Training(method, ToyImages(), pace(method, 2, seed)).run():
        found.append(tuple(map(seen_of, rows)))
    return found


@every_draw
def test_seed_step_and_network_say_what_is_drawn(draw: str):
    """The same seed, the same sub-networks; another seed, other ones; of two teachers each its own.

    Steps are counted through epochs, so that the second is not the first again.
    """
    one = ran(1, draw)
    assert one == ran(1, draw)
    for step, both in enumerate(one):
        for t, found in enumerate(both):
            assert found == expected_rows(draw, HALF, (1, "distill", step, f"teacher{t}"))
    first, second = zip(*one, strict=True)
    assert first != second
    assert one[:4] != one[4:]
    assert one != ran(2, draw)


def test_a_block_that_no_image_of_a_batch_has_is_not_run():
    """p_3 = 0.01: of 16 images mostly none. Nothing is normalised over no image."""
    student = stochastic(toy_net(0), 0.01, draw="image")
    method = METHODS["vanilla"]([student], [], ToyImages().spec(0))
    calls: list[int] = []
    last = student.module.get_submodule(student.blocks[-1])
    last.conv1.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    for _ in engine.Training(method, ToyImages(), pace(method, 4)).run():
        pass
    chances = survival(3, 0.01)
    alive = [drawn(chances, (0, "distill", step, "student"), 16) for step in range(16)]
    expected = [int(b[:, 2].sum()) for b in alive]
    assert calls == [n for n in expected if n]
    assert 0 in expected
    assert all(value.isfinite().all() for value in state_of(method).values())


def test_a_draw_takes_nothing_from_torchs_generator():
    """So that whatever else a method draws is what it draws with the plain teacher."""
    states = []
    for depth in (None, {"p_end": 0.5}, {"p_end": 0.5, "draw": "image"}):
        method = made("kd", teachers=depth)
        training = engine.Training(method, ToyImages(), pace(method, 1))
        states.append([torch.random.get_rng_state() for _ in training.run()])
    for one, batch, image in zip(*states, strict=True):
        assert torch.equal(one, batch) and torch.equal(one, image)


class Fails(Method):
    """Its sixth step ends in the middle."""

    def loss(self, out: Outputs) -> Terms:
        if out.progress.step == 5:
            raise ZeroDivisionError
        return {"ce": F.cross_entropy(out.students[0].logits, out.batch.label)}


def test_between_steps_and_after_a_failure_draws_are_free_again():
    """Twenty draws of a network that still had the step's seed would be one."""
    teacher = stochastic(toy_net(9), 0.5)
    method = Fails([toy_net(0)], [teacher], ToyImages().spec())
    running = engine.Training(method, ToyImages(), pace(method, 2)).run()

    def different() -> int:
        return len({tuple(teacher.drawn(1).tolist()) for _ in range(20)})

    for _ in range(5):  # the fourth ends an epoch, whose draws are counted
        next(running)
        assert different() > 1
    with pytest.raises(ZeroDivisionError):
        next(running)
    assert different() > 1
    image = next(ToyImages().clean(16)).image
    with torch.no_grad():
        close(teacher.eval().logits(image), features(teacher.module, image, HALF)["logits"])


@every_draw
def test_what_an_epoch_drew_is_counted(draw: str):
    """40 images in batches of 16: the last step of each epoch has 8."""
    images = ToyImages(40)
    teacher = stochastic(toy_net(9), 0.5, draw=draw)
    method = METHODS["kd"]([toy_net(0)], [teacher], images.spec())
    training = engine.Training(method, images, pace(method, 2, 7))
    epochs = [m.subnetworks for m in training.run() if m.epoch_done]
    for epoch, found in enumerate(epochs):
        lines: list[Tensor] = []
        for step in range(3):
            b = 0 if draw == "batch" else 8 if step == 2 else 16
            alive = drawn(HALF, (7, "distill", 3 * epoch + step, "teacher0"), b or None)
            lines += [alive] if alive.ndim == 1 else list(alive)
        assert list(found) == ["teacher0"]
        assert found["teacher0"].distinct == len({tuple(line.tolist()) for line in lines})
        live = sum(int(line.sum()) for line in lines) / len(lines)
        assert found["teacher0"].live == pytest.approx(live, rel=1e-12)
        assert found["teacher0"].blocks == 3
    assert epochs[0] != epochs[1]


def test_a_last_batch_that_is_dropped_is_not_counted():
    """40 images in batches of 16, the last 8 left out: two draws of 16 an epoch, of whose 32 rows
    61 blocks are alive.
    """
    images = ToyImages(40)
    teacher = stochastic(toy_net(9), 0.5, draw="image")
    method = METHODS["kd"]([toy_net(0)], [teacher], images.spec(drop_last=True))
    *_, last = engine.Training(method, images, pace(method, 1, 1)).run()
    lines = torch.cat([drawn(HALF, (1, "distill", step, "teacher0"), 16) for step in (0, 1)])
    assert last.subnetworks["teacher0"].live == lines.sum() / 32 == 61 / 32


def test_the_branches_of_one_network_are_drawn_apart_and_its_low_layers_once():
    """ONE of three ResNet-8: two blocks that all share and three last ones, each of a draw of its
    own, of the whole depth that the student came with.
    """
    method = made("one", students={"p_end": 0.5})
    rows = [0] * 5
    trunk, branches = method.student.module.trunk, method.student.module.branches
    blocks = [trunk.layer1[0], trunk.layer2[0], *(branch.layer3[0] for branch in branches)]
    for place, block in enumerate(blocks):
        block.conv1.register_forward_pre_hook(
            lambda m, given, place=place: rows.__setitem__(place, rows[place] + len(given[0]))
        )
    seen = []
    for moment in engine.Training(method, ToyImages(), pace(method, 2)).run():
        counters = (0, "distill", moment.step - 1, "student")
        parts = [drawn(HALF, counters, part=part).tolist() for part in range(3)]
        alive = [parts[0][0], parts[0][1], *(part[2] for part in parts)]
        assert seen_of(rows) == tuple(16 * b for b in alive)
        seen.append(tuple(alive))
        if moment.epoch_done:
            (found,) = moment.subnetworks.values()
            assert found.blocks == 5
            assert found.distinct == len(set(seen[-4:]))
            assert found.live == sum(map(sum, seen[-4:])) / 4
    assert len({alive[2:] for alive in seen}) > 2


# --- compiled, and on several ranks


def test_the_plain_networks_of_a_run_are_compiled_and_the_stochastic_ones_are_not():
    terms = []
    for compiled in (False, True):
        method = made("kd", teachers={"p_end": 0.5})
        if compiled:
            engine.compile_networks(method)
            assert method.student._compiled_call_impl is not None
            assert method.teachers[0]._compiled_call_impl is None
        rows, different = watched(method.teachers[0]), set()
        moments = []
        for moment in engine.Training(method, ToyImages(), pace(method, 1)).run():
            moments.append(torch.stack([*moment.terms.values()]))
            different.add(seen_of(rows))
        assert len(different) > 1
        terms.append(torch.stack(moments))
    close(*terms, rtol=1e-4, atol=1e-5)


def test_a_network_that_draws_nothing_is_compiled():
    net = stochastic(toy_net(), 0.5, draw="never").eval()
    image = ToyImages(4).image
    expected = net(image).logits
    engine.compile_networks(METHODS["kd"]([toy_net(1)], [net], ToyImages().spec()))
    assert net._compiled_call_impl is not None
    close(net(image).logits, expected)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A folder for each world size, filled by `stochastic_networks` of ranks_worker.py."""
    folders = {world: tmp_path_factory.mktemp(f"world{world}") for world in (1, 2)}
    ranks = fork_ranks(2, stochastic_networks, folders[2])
    stochastic_networks(folders[1])
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
    return folders


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", ["kd-batch", "kd-image", "dml-batch", "dml-image"])
def test_two_ranks_equal_one(name: str, ranks: dict[int, Path]):
    """A draw is of the whole batch: each rank has its images' share of it. Every weight and term to
    1e-10, and what was drawn exactly, on both.
    """
    one, _ = load_tensors(ranks[1] / f"{name}.0.safetensors")
    (records, drew) = json.loads((ranks[1] / f"{name}.0.json").read_text())
    assert drew
    for rank in (0, 1):
        two, _ = load_tensors(ranks[2] / f"{name}.{rank}.safetensors")
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            close(two[key], tensor, rtol=0, atol=1e-10, msg=key)
        records2, drew2 = json.loads((ranks[2] / f"{name}.{rank}.json").read_text())
        for a, b in zip(records, records2, strict=True):
            assert a == pytest.approx(b, abs=1e-10, rel=0)
        assert drew == drew2
