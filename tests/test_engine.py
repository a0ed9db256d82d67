"""The loop: what it refuses, in which order it differentiates and steps, and what it keeps."""

from __future__ import annotations

import copy
import gc
import itertools
import re
import resource
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import engine
from potstill.engine import Moment, Pace, Training, check, train_step
from potstill.errors import DataError, MethodError
from potstill.method import Batch, Method, Outputs, Phase, Progress, Terms, Turn, Update
from potstill.methods import METHODS
from potstill.net import Captured, Net
from potstill.optim import Constant, OptimizerPlan, Steps, adam, sgd
from potstill.stochastic_depth import stochastic
from tests.toys import CLASSES, SHAPE, ToyImages, channels_last, pace, toy_net

close = torch.testing.assert_close
BATCH = next(ToyImages(4).clean(4))


def scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


def progress(epoch: int = 0, step: int = 0) -> Progress:
    return Progress(epoch, step, 100, 10)


def one_turn(*updates: Update[Any]) -> Phase:
    return Phase("only", [Turn(lambda batch, progress, out: None, updates)], 10)


def sgd_plan(lr: float = 0.1, schedule: Any = None, fresh: bool = False, **more: Any) -> Any:
    return OptimizerPlan(
        lambda p: sgd(p, lr, **more), schedule or Constant(), fresh_at_milestones=fresh
    )


class Weight(Method):
    """One weight w, starting at 1, whose loss is 3 w; the student stands by, frozen."""

    teachers_needed = (0, 1)

    def __init__(
        self, arrange: Callable[[Weight], Sequence[Phase]] | None = None, n: int = 16, **spec: Any
    ) -> None:
        super().__init__([toy_net()], [], ToyImages(n).spec(0, **spec))
        self.student.requires_grad_(False)
        self.w = scalar(1.0)
        self.arrange = arrange

    def watch(self, batch: Batch, progress: Progress, previous: Any) -> Outputs:
        return Outputs(batch, progress, [], [])

    def linear(self, out: Any) -> Terms:
        return {"linear": 3 * self.w}

    def update(self, name: str = "w") -> Update[Any]:
        return Update(name, self.linear, [self.w])

    def turn(self, *names: str) -> Turn[Any]:
        return Turn(self.watch, [self.update(n) for n in names or ("w",)])

    def phases(self) -> Sequence[Phase]:
        return self.arrange(self) if self.arrange else [Phase("only", [self.turn()], 10)]


def follow(method: Weight, epochs: int | Mapping[str, int], **plans: Any) -> list[float]:
    """w after every step."""
    names = [p.name for p in method.phases()]
    lengths = dict.fromkeys(names, epochs) if isinstance(epochs, int) else epochs
    images = ToyImages(len(method.data.indices))
    training = Training(method, images, Pace(lengths, lengths, plans))
    return [method.w.item() for _ in training.run()]


# --- one step, by hand --------------------------------------------------------------------------


def test_all_gradients_are_taken_before_any_step():
    """w = 1, losses 3 w and w^2, both SGD at 0.1: 1 - 0.1 * 3 - 0.1 * 2 = 0.5.

    Stepping the first before differentiating the second would give 0.7 - 0.1 * 1.4 = 0.56.
    """
    w = scalar(1.0)
    phase = one_turn(
        Update("a", lambda out: {"linear": 3 * w}, [w]),
        Update("b", lambda out: {"square": w.square()}, [w]),
    )
    optimizers = {name: sgd([w], 0.1) for name in "ab"}
    terms = train_step(phase, optimizers, BATCH, progress(), 0)
    close(w.item(), 0.5)
    assert {k: v.item() for k, v in terms.items()} == {"a.linear": 3.0, "b.square": 1.0}


def test_optimizers_step_in_order_so_coupled_decay_reads_the_moved_weight():
    """w = 1. SGD at 0.1 on w^2: 0.8. Adam's first step is lr g / (|g| + eps), with eps = 1,
    decay 1.25 and loss 3 w: g = 3 + 1.25 * 0.8 = 4, so 0.8 - 0.1 * 4 / 5 = 0.72.

    Decay of the weight before SGD's step would give g = 4.25 and 0.71905.
    """
    w = scalar(1.0)
    phase = one_turn(
        Update("sgd", lambda out: {"square": w.square()}, [w]),
        Update("adam", lambda out: {"linear": 3 * w}, [w]),
    )
    optimizers = {"sgd": sgd([w], 0.1), "adam": adam([w], 0.1, eps=1.0, weight_decay=1.25)}
    train_step(phase, optimizers, BATCH, progress(), 0)
    close(w.item(), 0.72)


def test_a_parameter_that_the_loss_does_not_reach_still_decays():
    """Gradient zero, decay 0.5, lr 0.1: 1 - 0.1 * 0.5 = 0.95, as a compiled network has it."""
    w, idle = scalar(1.0), scalar(1.0)
    phase = one_turn(Update("u", lambda out: {"linear": 3 * w}, [w, idle]))
    train_step(phase, {"u": sgd([w, idle], 0.1, weight_decay=0.5)}, BATCH, progress(), 0)
    close(idle.item(), 0.95)
    close(w.item(), 1 - 0.1 * 3.5)


def test_networks_of_one_architecture_with_other_taps_compile_apart():
    """What was compiled for the first must not serve the others, which capture or compute more."""
    torch.manual_seed(0)
    images = next(ToyImages().clean(16)).image
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    nets = [Net(copy.deepcopy(layers), {"stage1": "1"}, SHAPE) for _ in range(3)]
    nets[1].add_taps({"early": "0"})
    nets[2].insert("stage1", nn.Hardtanh(0.0, 0.01))
    expected = [net(images) for net in nets]
    for net, eager in zip(nets, expected, strict=True):
        engine.compile_networks(METHODS["vanilla"]([net], [], ToyImages().spec(0)))
        compiled = net(images)
        assert compiled.features.keys() == eager.features.keys()
        close(compiled.logits, eager.logits, atol=1e-5, rtol=1e-5)
    assert (expected[2].logits - expected[0].logits).abs().max() > 1e-3


class Small(nn.Sequential):
    """A convolution, BatchNorm and a classifier: what is compiled for it takes a second."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, CLASSES))
        super().__init__(*parts)


def small_net(seed: int, **taps: str) -> Net:
    return Net(Small(seed), taps, SHAPE)


def test_a_compiled_teacher_says_the_same_and_a_student_keeps_up_with_its_weights():
    """A teacher's weights become constants; a student's must not, even without gradients."""
    image = next(ToyImages().clean(16)).image
    teacher, student = small_net(0), small_net(1)
    for norm in (teacher.module[1], student.module[1]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    method = METHODS["kd"]([student], [teacher], ToyImages().spec())
    method.eval()
    with torch.no_grad():
        expected = teacher(image).logits
        engine.compile_networks(method)
        close(teacher(image).logits, expected, atol=1e-5, rtol=1e-5)
        student(image)
        for p in (*teacher.parameters(), *student.parameters()):
            p.mul_(0.5)
        close(student(image).logits, student.logits(image), atol=1e-5, rtol=1e-5)
        # which shows that they are constants: nothing else would say the same now
        close(teacher(image).logits, expected, atol=1e-5, rtol=1e-5)
        assert (teacher.logits(image) - expected).abs().max() > 1e-2


def test_more_networks_than_the_compiler_keeps_by_itself_are_all_compiled():
    """It keeps 8 versions of one function, which all networks share, and runs the rest as it is."""
    image = next(ToyImages().clean(16)).image
    nets = [small_net(k, **{f"tap{k}": "0"}) for k in range(10)]
    torch._dynamo.utils.counters.clear()
    engine.compile_networks(METHODS["dml"](nets, [], ToyImages().spec(0)))
    for k, net in enumerate(nets):
        assert f"tap{k}" in net(image).features
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(nets)


def test_an_update_without_a_term_is_refused():
    """Where every weight of a loss is 0."""
    w = scalar(1.0)
    phase = one_turn(Update("u", lambda out: {}, [w]))
    with pytest.raises(MethodError) as error:
        train_step(phase, {"u": sgd([w], 0.1)}, BATCH, progress(), 0)
    assert str(error.value) == ("update 'u' has no term; give one of its weights a value above 0")


def test_a_loss_that_reaches_nothing_still_decays():
    w = scalar(1.0)
    phase = one_turn(Update("u", lambda out: {"constant": torch.tensor(2.0)}, [w]))
    train_step(phase, {"u": sgd([w], 0.1, weight_decay=0.5)}, BATCH, progress(), 0)
    close(w.item(), 0.95)


def test_a_turn_sees_the_steps_of_the_one_before_and_its_outputs():
    """w = 1, loss w^2 in both turns, SGD at 0.1: 0.8, then 0.8 - 0.1 * 1.6 = 0.64."""
    w, seen = scalar(1.0), []

    def forward(batch: Batch, progress: Progress, previous: Any) -> Tensor:
        seen.append(None if previous is None else previous.item())
        return w.square()

    phase = Phase(
        "only",
        [Turn(forward, [Update(name, lambda out: {"square": out}, [w])]) for name in "ab"],
        10,
    )
    terms = train_step(phase, {n: sgd([w], 0.1) for n in "ab"}, BATCH, progress(), 0)
    close(w.item(), 0.64)
    assert seen == [None, 1.0]
    close(terms["b.square"].item(), 0.64)


def test_after_step_comes_after_the_steps_without_gradient():
    w, seen = scalar(1.0), []

    def note(out: Any) -> None:
        seen.append((w.item(), torch.is_grad_enabled(), out))

    update = Update("u", lambda out: {"linear": 3 * w}, [w])
    phase = Phase("only", [Turn(lambda b, p, out: "out", [update], note)], 10)
    train_step(phase, {"u": sgd([w], 0.1)}, BATCH, progress(), 0)
    ((after, grad, out),) = seen
    close(after, 0.7)
    assert not grad
    assert out == "out"


def test_terms_add_up_and_own_gradients_may_replace_the_sum():
    """Terms w and 2 w sum to gradient 3; an update that takes the second alone has 2."""
    w = scalar(1.0)
    terms: Callable[[Any], Terms] = lambda out: {"one": w * 1, "two": 2 * w}  # noqa: E731

    def second(terms: Terms, parameters: Any, progress: Progress) -> list[Tensor]:
        return engine.distributed.gradient(terms["two"], parameters)

    train_step(one_turn(Update("u", terms, [w])), {"u": sgd([w], 0.1)}, BATCH, progress(), 0)
    close(w.item(), 0.7)
    phase = one_turn(Update("u", terms, [w], second))
    found = train_step(phase, {"u": sgd([w], 0.1)}, BATCH, progress(), 0)
    close(w.item(), 0.5)
    assert list(found) == ["one", "two"]  # a single update's terms have no prefix


@pytest.mark.parametrize("last", [False, True])
def test_what_an_update_read_is_freed_where_it_is_the_last_to_read_it(last: bool):
    """y = w^2 keeps w for its gradient: another update may go back through it, or none can."""
    w = scalar(1.0)
    phase = Phase("only", [Turn(lambda batch, progress, out: w.square(), [
        Update("a", lambda y: {"y": y * 1}, [w], last=last),
        Update("b", lambda y: {"y": y * 2}, [w]),
    ])], 10)  # fmt: skip
    optimizers = {name: sgd([w], 0.1) for name in "ab"}
    if last:
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            train_step(phase, optimizers, BATCH, progress(), 0)
    else:
        train_step(phase, optimizers, BATCH, progress(), 0)
        close(w.item(), 0.4)  # 1 - 0.1 * 2 - 0.1 * 4


def test_no_gradient_is_left_on_a_parameter():
    w = scalar(1.0)
    phase = one_turn(Update("u", lambda out: {"linear": 3 * w}, [w]))
    terms = train_step(phase, {"u": sgd([w], 0.1)}, BATCH, progress(), 0)
    assert w.grad is None
    assert not terms["linear"].requires_grad


# --- random numbers -----------------------------------------------------------------------------


def draws(name: str = "only", epoch: int = 0, step: int = 0, seed: int = 0) -> list[list[float]]:
    """What each of two turns draws in its forward."""
    seen: list[list[float]] = []
    turns = [Turn(lambda b, p, out: seen.append(torch.rand(3).tolist()), []) for _ in range(2)]
    torch.rand(5)  # whatever happened before does not matter
    train_step(Phase(name, turns, 10), {}, BATCH, progress(epoch, step), seed)
    return seen


def test_a_step_that_is_entered_again_draws_the_same():
    assert draws() == draws()


def test_every_seed_phase_epoch_step_and_turn_draws_its_own():
    seen = [
        *draws(),
        *draws(name="other"),
        *draws(epoch=1),
        *draws(step=1),
        *draws(seed=1),
    ]
    assert len({tuple(d) for d in seen}) == 10


# --- phases, rates, momentum --------------------------------------------------------------------


def test_every_phase_starts_with_fresh_momentum():
    """lr 0.1, momentum 0.9, gradient 3: steps 0.3, 0.57 (buffer 5.7); the next phase's, 0.3."""

    def arrange(m: Weight) -> list[Phase]:
        return [Phase("one", [m.turn()], 10), Phase("two", [m.turn()], 10)]

    seen = follow(Weight(arrange), {"one": 2, "two": 1}, default=sgd_plan(momentum=0.9))
    close(seen, [0.7, 0.13, -0.17])


@pytest.mark.parametrize(("fresh", "expected"), [(True, 0.4), (False, 0.13)])
def test_momentum_is_dropped_at_a_milestone_if_asked(fresh: bool, expected: float):
    """Gradient 3, lr 0.1, momentum 0.9, a milestone after epoch 1 that keeps the rate: the second
    step is 0.3 from an empty buffer and 0.57 from a kept one.
    """
    plan = sgd_plan(schedule=Steps([1], factor=1.0), fresh=fresh, momentum=0.9)
    close(follow(Weight(), 2, default=plan), [0.7, expected])


def moments(method: Method, epochs: int, n: int, **plans: Any) -> list[Moment]:
    lengths = {p.name: epochs for p in method.phases()}
    return list(Training(method, ToyImages(n), Pace(lengths, lengths, plans)).run())


def test_every_moment_says_where_the_training_stands():
    """20 images in batches of 8: 8, 8, 4; the rate drops tenfold after the first epoch."""
    seen = moments(Weight(n=20, batch_size=8), 2, 20, default=sgd_plan(schedule=Steps([1])))
    assert [m.step for m in seen] == [1, 2, 3, 4, 5, 6]
    assert [m.images for m in seen] == [8, 8, 4, 8, 8, 4]
    assert [m.epoch for m in seen] == [0, 0, 1, 1, 1, 2]
    assert [m.epoch_done for m in seen] == [False, False, True] * 2
    assert {(m.phase, m.epochs, m.steps) for m in seen} == {("only", 2, 6)}
    close([m.lr["w"] for m in seen], [0.1] * 3 + [0.01] * 3)


def test_terms_are_means_over_the_epoch_so_far():
    """w = 1, 0.7, 0.4, 0.1 before each step, the loss is 3 w; the mean starts again with epoch 2.

    3, (3 + 2.1) / 2 = 2.55, then 1.2, (1.2 + 0.3) / 2 = 0.75.
    """
    seen = moments(Weight(n=16, batch_size=8), 2, 16, default=sgd_plan())
    means = torch.stack([m.terms["linear"] for m in seen])
    close(means, torch.tensor([3.0, 2.55, 1.2, 0.75]).double(), atol=1e-6, rtol=0)


def test_a_last_incomplete_batch_can_be_dropped():
    method = Weight(n=20, batch_size=8, drop_last=True)
    seen = moments(method, 1, 20, default=sgd_plan())
    assert [m.images for m in seen] == [8, 8]


def test_plans_are_found_by_the_most_special_key():
    """Rates 1 (phase.update), 2 (update), 3 (default)."""

    def arrange(m: Weight) -> list[Phase]:
        return [Phase("one", [m.turn("a", "b")], 10), Phase("two", [m.turn("a", "c")], 10)]

    plans = {"two.a": sgd_plan(1.0), "a": sgd_plan(2.0), "default": sgd_plan(3.0)}
    first, second = moments(Weight(arrange), 1, 16, **plans)
    assert first.lr == {"a": 2.0, "b": 3.0}
    assert second.lr == {"a": 1.0, "c": 3.0}


def test_steps_are_counted_over_phases_of_different_orders():
    def arrange(m: Weight) -> list[Phase]:
        half = lambda data, epoch, generator: torch.arange(8)  # noqa: E731
        return [Phase("one", [m.turn()], 10, order=half), Phase("two", [m.turn()], 10)]

    method = Weight(arrange, n=16, batch_size=4)
    lengths = {"one": 3, "two": 1}
    training = Training(method, ToyImages(16), Pace(lengths, lengths, {"default": sgd_plan()}))
    assert training.total_steps == 3 * 2 + 1 * 4
    for done, _ in enumerate(training.run(), 1):
        assert training.done_steps == done
        assert training.finished == (done == 10)


def test_prepare_sees_clean_images_in_order_once_before_the_first_step():
    seen: list[tuple[float, list[int], bool]] = []

    def arrange(m: Weight) -> list[Phase]:
        def prepare(images: Any) -> None:
            index = torch.cat([b.index for b in images]).tolist()
            seen.append((m.w.item(), index, torch.is_grad_enabled()))

        return [Phase("one", [m.turn()], 10), Phase("two", [m.turn()], 10, prepare=prepare)]

    follow(Weight(arrange), 2, default=sgd_plan())
    ((w, index, grad),) = seen
    close(w, 0.4)
    assert index == list(range(16))
    assert not grad


def test_order_and_views_are_drawn_from_the_seed_and_the_epoch():
    """Every image once an epoch; another seed or epoch, another order."""

    def orders(seed: int) -> list[list[int]]:
        method, seen = Weight(n=16, batch_size=8), []
        watch = method.watch
        method.watch = lambda b, p, out: (seen.append(b.index.tolist()), watch(b, p, out))[1]
        lengths = {"only": 2}
        for _ in Training(
            method, ToyImages(16), Pace(lengths, lengths, {"default": sgd_plan()}, seed)
        ).run():
            torch.rand(3)
        return [seen[0] + seen[1], seen[2] + seen[3]]

    one, again, other = orders(0), orders(0), orders(1)
    assert one == again
    assert all(sorted(epoch) == list(range(16)) for epoch in one + other)
    assert len({tuple(epoch) for epoch in one + other}) == 4


def lengths_of(*sizes: int) -> Callable[[Any, int, Any], Tensor]:
    calls: list[int] = []

    def order(data: Any, epoch: int, generator: Any) -> Tensor:
        calls.append(epoch)
        assert len(calls) < 50, "the loop never ends"
        return torch.arange(sizes[min(epoch, len(sizes) - 1)])

    return order


class NoEmptyBatch(ToyImages):
    def batches(self, *arguments: Any, **named: Any) -> Iterator[Batch]:
        return (b for b in super().batches(*arguments, **named) if len(b.label))


@pytest.mark.parametrize("second", [8, 12, 15, 20, 0, 32])
def test_an_order_that_changes_its_length_is_refused(second: int):
    """16 images in batches of 4, then fewer, more, none (for ever), or twice as many: rates and
    epochs are counted for 16 each time.
    """

    def arrange(m: Weight) -> list[Phase]:
        return [Phase("only", [m.turn()], 10, order=lengths_of(16, second))]

    lengths = {"only": 3}
    training = Training(
        Weight(arrange, n=32, batch_size=4),
        NoEmptyBatch(32),
        Pace(lengths, lengths, {"default": sgd_plan()}),
    )
    with pytest.raises(MethodError, match=re.escape("order must give the same number every")):
        for _ in training.run():
            pass


def test_a_batch_larger_than_the_data_is_refused_if_it_would_be_dropped():
    method = Weight(n=16, batch_size=32, drop_last=True)
    with pytest.raises(DataError) as error:
        follow(method, 1, default=sgd_plan())
    assert str(error.value) == (
        "data.batch_size is 32 and an epoch of phase 'only' has 16 images, so with data.drop_last "
        "there is no step; make the batch smaller"
    )
    assert len(follow(Weight(n=16, batch_size=32), 1, default=sgd_plan())) == 1


def test_students_are_in_train_mode_even_if_the_caller_evaluated_in_between():
    method = METHODS["vanilla"]([toy_net()], [], ToyImages(32).spec(0))
    modes = []
    training = Training(method, ToyImages(32), pace(method, 2))
    method.student.module.fc.register_forward_hook(lambda m, a, y: modes.append(m.training))
    for _ in training.run():
        method.eval()
    assert modes == [True] * 4


# --- what check refuses -------------------------------------------------------------------------


def fault(method: Method, **plans: Any) -> str:
    lengths = {p.name: 1 for p in method.phases()}
    with pytest.raises(MethodError) as error:
        check(method, Pace(lengths, lengths, plans) if plans else None)
    return str(error.value)


def test_a_sound_method_is_accepted():
    method = Weight()
    check(method)
    check(method, Pace({"only": 1}, {"only": 1}, {"only.w": sgd_plan()}))


def test_a_parameter_that_no_update_trains_is_refused():
    method = Weight()
    method.extra = nn.Linear(2, 2)
    assert fault(method) == (
        "no update ever trains ['extra.weight', 'extra.bias']; add the module to an Update or "
        "freeze it"
    )
    method.extra.requires_grad_(False)
    check(method)


def test_many_unreached_parameters_are_counted():
    method = Weight()
    method.student.requires_grad_(True)
    count = len(list(method.student.parameters()))
    assert f"and {count - 4} more; add the module" in fault(method)
    assert "students.0.conv1.weight" in fault(method)


def test_a_parameter_that_another_phase_trains_is_accepted():
    method = Weight(lambda m: [Phase("one", [m.turn()], 1), Phase("two", [late(m)], 1)])

    def late(m: Weight) -> Turn[Any]:
        return Turn(m.watch, [Update("late", m.linear, [m.other])])

    method.other = scalar(0.0)
    check(method)


def with_update(*parameters: nn.Parameter) -> Weight:
    return Weight(
        lambda m: [Phase("p", [Turn(m.watch, [Update("u", m.linear, [m.w, *parameters])])], 1)]
    )


def test_a_frozen_parameter_in_an_update_is_refused():
    method = Weight()
    bias = method.student.classifier.bias
    method.arrange = lambda m: [
        Phase("p", [Turn(m.watch, [Update("u", m.linear, [m.w, bias])])], 1)
    ]
    assert fault(method) == (
        "update 'u' of phase 'p' lists 'students.0.fc.bias', which is frozen; leave it out"
    )


def test_a_parameter_listed_twice_is_refused():
    method = Weight()
    method.arrange = with_update(method.w).arrange
    assert fault(method) == (
        "update 'u' of phase 'p' lists a parameter twice; each would be stepped twice"
    )


def test_a_parameter_outside_the_method_is_refused():
    assert fault(with_update(nn.Parameter(torch.zeros(2, 3)))) == (
        "update 'u' of phase 'p' trains a parameter of shape (2, 3) that is not part of the "
        "method, so it would not be saved; make its module an attribute of the method"
    )


def test_a_teachers_parameter_in_an_update_is_refused():
    teacher = toy_net(1)
    method = METHODS["kd"]([toy_net()], [teacher], ToyImages().spec())
    method.trainable = lambda: [*method.student.parameters(), teacher.classifier.bias]
    assert "that is not part of the method" in fault(method)


def test_a_trainable_teacher_is_refused():
    method = METHODS["kd"]([toy_net()], [toy_net(1), toy_net(2)][:1], ToyImages().spec())
    method.teachers[0].classifier.requires_grad_(True)
    assert fault(method) == (
        "teacher 0 has trainable parameters ['module.fc.weight', 'module.fc.bias']; a teacher is "
        "frozen: leave requires_grad as Method.__init__ set it, or make the network a student"
    )


def test_phases_and_updates_have_their_own_names():
    twice = Weight(lambda m: [Phase("same", [m.turn()], 1)] * 2)
    assert fault(twice) == ("the method has several phases named ['same']; give each its own name")
    two_turns = Weight(lambda m: [Phase("p", [m.turn("u"), m.turn("u")], 1)])
    assert fault(two_turns) == ("phase 'p' has several updates named ['u']; give each its own name")
    check(Weight(lambda m: [Phase("p", [m.turn("u")], 1), Phase("q", [m.turn("u")], 1)]))


def test_an_empty_update_is_refused():
    method = Weight(lambda m: [Phase("p", [Turn(m.watch, [Update("u", m.linear, [])])], 1)])
    assert fault(method) == (
        "update 'u' of phase 'p' has no parameters; remove it, or list what it trains"
    )


def test_an_optimizer_for_no_update_is_refused_with_the_nearest_key():
    said = fault(Weight(), default=sgd_plan(), **{"only.v": sgd_plan()})
    assert said == (
        "optimizers.only.v fits no update of this method; its keys are "
        "['default', 'only.w', 'w']; did you mean \"only.w\"?"
    )


def test_an_update_without_an_optimizer_is_refused():
    method = Weight(lambda m: [Phase("only", [m.turn("w", "v")], 10)])
    assert fault(method, w=sgd_plan()) == (
        "no optimizer for update 'v' of phase 'only'; give optimizers.default, optimizers.v, or "
        "optimizers with the key 'only.v'"
    )


def test_a_phase_without_a_length_is_refused():
    with pytest.raises(MethodError, match=r"^no length for phase 'only'; give epochs\.only$"):
        check(Weight(), Pace({}, {}, {"default": sgd_plan()}))


def test_a_compiled_network_cannot_give_input_gradients():
    method = Weight()
    method.needs_input_gradient = True
    with pytest.raises(MethodError, match="set compile=false"):
        engine.compile_networks(method)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda method: setattr(method, "teachers", (stochastic(toy_net(), p_end=0.9),)),
            "the outputs of teacher 0 cannot be stored: it is another sub-network at every step, "
            "and a stored output would be one of them for ever; leave the store off, or set "
            "teachers.0.stochastic={p_end: 0.9, scope: full, draw: never}",
        ),
        (
            lambda method: setattr(method, "teacher_statistics", "batch"),
            "the outputs of KD's teachers cannot be stored: they depend on the other images of the "
            'batch; leave the store off, or set method.teacher_statistics="running"',
        ),
        (
            lambda method: setattr(method, "needs_input_gradient", True),
            "the outputs of KD's teachers cannot be stored: it differentiates them with respect to "
            "the image; leave the store off",
        ),
    ],
)
def test_outputs_that_are_not_always_the_same_cannot_be_stored(change, words):
    method = METHODS["kd"]([toy_net()], [toy_net(1)], ToyImages().spec())
    engine.require_storable(method)
    change(method)
    with pytest.raises(MethodError, match=f"^{re.escape(words)}$"):
        engine.require_storable(method)


@pytest.mark.parametrize("depth", [{"p_end": 0.9, "draw": "never"}, {"p_end": 1}])
def test_outputs_of_a_stochastic_teacher_that_draws_nothing_can_be_stored(depth):
    teacher = stochastic(toy_net(1), **depth)
    engine.require_storable(METHODS["kd"]([toy_net()], [teacher], ToyImages().spec()))


# --- memory -------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Activations of 256 KiB a batch: what leaks is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 2048), nn.Linear(2048, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x[:, :, :2, :2].flatten(1)).relu())


def wide(n: int = 64) -> tuple[Method, ToyImages]:
    method = METHODS["kd"](
        [Net(Wide(), {"up": "up"}, SHAPE)], [Net(Wide(), {}, SHAPE)], ToyImages(n).spec()
    )
    return method, ToyImages(n)


def alive() -> tuple[int, int]:
    """Tensors that Python knows, and those among them that hold a graph."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return len(tensors), sum(x.grad_fn is not None for x in tensors)


def test_memory_does_not_grow_with_the_steps():
    """500 steps of 2 networks whose captured activations would add up to over 100 MiB."""
    method, images = wide()
    run = Training(method, images, pace(method, 126)).run()
    for _ in range(4):
        next(run)
    tensors, graphs = alive()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in itertools.islice(run, 500)) == 500
    assert alive() == (tensors, graphs)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50 * 1024  # KiB


def test_no_output_outlives_its_step():
    """Without the garbage collector: a cycle would keep activations until it happens to run."""
    method, images = wide(32)
    seen: list[weakref.ref[Any]] = []
    forward = method.forward

    def noted(*args: Any) -> Outputs:
        out = forward(*args)
        seen.append(weakref.ref(out))
        return out

    method.forward = noted
    gc.collect()
    gc.disable()
    try:
        for moment in Training(method, images, pace(method, 2)).run():
            assert seen[-1]() is None
            assert all(term.grad_fn is None for term in moment.terms.values())
    finally:
        gc.enable()
    assert len(seen) == 4


# --- memory formats -----------------------------------------------------------------------------


def weights_after(fused: bool, last: bool, name: str) -> dict[str, Tensor]:
    """Of a convolutional student after 8 steps of KD, in float64, so that only layout differs."""
    method: Method = METHODS["kd"]([toy_net()], [toy_net(1)], ToyImages().spec())
    method = (channels_last(method) if last else method).double()
    make = {
        "sgd": lambda p: sgd(p, 0.1, 0.9, weight_decay=5e-4, nesterov=True, fused=fused),
        "adam": lambda p: adam(p, 0.01, weight_decay=5e-4, fused=fused),
    }[name]
    plan = OptimizerPlan(make, Constant())
    for _ in Training(method, ToyImages(dtype=torch.float64), pace(method, 2, default=plan)).run():
        pass
    return {k: v.contiguous() for k, v in method.state_dict().items()}


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_fused_step_in_channels_last_is_the_plain_one(name: str):
    expected = weights_after(fused=False, last=False, name=name)
    for fused, last in [(True, True), (True, False), (False, True)]:
        close(weights_after(fused, last, name), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_in_another_layout_than_its_parameter_is_stepped_right(fused: bool):
    """Each weight's gradient is the weight itself, given contiguous to a channels_last parameter:
    with lr 0.1 and momentum 0.9, w -> 0.9 w -> 0.9 w - 0.1 (0.9 w + 0.9 w) = 0.72 w.
    """
    start = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    w = nn.Parameter(start.clone().to(memory_format=torch.channels_last))

    def contiguous(terms: Terms, parameters: Any, progress: Progress) -> list[Tensor]:
        return [w.detach().clone(memory_format=torch.contiguous_format)]

    loss: Callable[[Any], Terms] = lambda out: {"half": w.square().sum() / 2}  # noqa: E731
    phase = one_turn(Update("u", loss, [w], contiguous))
    optimizer = sgd([w], 0.1, 0.9, fused=fused)
    for _ in range(2):
        train_step(phase, {"u": optimizer}, BATCH, progress(), 0)
    close(w.detach(), 0.72 * start)
    assert w.is_contiguous(memory_format=torch.channels_last)


def test_networks_are_autocast_and_a_methods_own_layers_and_losses_are_not():
    seen = {}

    def forward(batch: Batch, progress: Progress, previous: Any) -> Captured:
        seen["forward"] = torch.is_autocast_enabled("cpu")
        return net(batch.image)

    def loss(out: Captured) -> Terms:
        seen["loss"] = torch.is_autocast_enabled("cpu")
        seen["dtypes"] = out.features["stage1:pre"].dtype, out.logits.dtype
        return {"ce": F.cross_entropy(out.logits, BATCH.label)}

    net = toy_net()
    net.precision = torch.bfloat16
    parameters = list(net.parameters())
    phase = Phase("p", [Turn(forward, [Update("u", loss, parameters)])], 1)
    optimizers = {"u": sgd(parameters, 0.1)}
    train_step(phase, optimizers, BATCH, progress(), 0)
    assert seen == {
        "forward": False,
        "loss": False,
        "dtypes": (torch.bfloat16, torch.float32),
    }
