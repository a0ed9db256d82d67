"""The contract: counts, frozen teachers, progress, and the one place where teachers run."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from potstill.errors import MethodError
from potstill.method import Batch, Method, Outputs, Progress, of_sum, wrong_count
from potstill.methods import METHODS
from tests.methods.odd import Alternating
from tests.toys import SHAPE, ToyImages, toy_net

close = torch.testing.assert_close


def method(kind: type[Method] = Method) -> Method:
    return kind([toy_net(0)], [toy_net(1)], ToyImages().spec())


def batch(n: int = 4) -> Batch:
    return next(ToyImages(n).clean(n))


# --- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "low", "high", "said"),
    [
        (1, 1, 1, ""),
        (3, 2, None, ""),
        (0, 0, 0, ""),
        (2, 1, 3, ""),
        (0, 1, 1, "takes 1 teacher, 0 given"),
        (3, 2, 2, "takes 2 teachers, 3 given"),
        (1, 2, None, "takes 2 or more teachers, 1 given"),
        (0, 1, None, "takes 1 or more teachers, 0 given"),
        (4, 1, 3, "takes 1 to 3 teachers, 4 given"),
        (2, 0, 1, "takes 0 to 1 teachers, 2 given"),
        (1, 0, 0, "takes no teacher, 1 given; remove it"),
    ],
)
def test_a_wrong_count_in_words(given: int, low: int, high: int | None, said: str):
    assert wrong_count("teacher", given, low, high) == said


@pytest.mark.parametrize(
    ("name", "students", "teachers", "said"),
    [
        ("kd", 1, 0, "KD: takes 1 teacher, 0 given"),
        ("kd", 1, 2, "KD: takes 1 teacher, 2 given"),
        ("kd", 2, 1, "KD: takes 1 student, 2 given"),
        ("kd", 0, 1, "KD: takes 1 student, 0 given"),
        ("vanilla", 1, 1, "Vanilla: takes no teacher, 1 given; remove it"),
    ],
)
def test_a_method_refuses_a_wrong_count(name: str, students: int, teachers: int, said: str):
    with pytest.raises(MethodError) as error:
        METHODS[name](
            [toy_net() for _ in range(students)],
            [toy_net() for _ in range(teachers)],
            ToyImages().spec(teachers),
        )
    assert str(error.value) == said


def test_shared_weights_are_refused():
    net = toy_net()
    said = "Method: teacher 0 shares weights with student 0, and a teacher is frozen; pass "
    with pytest.raises(MethodError) as error:
        Method([net], [net], ToyImages().spec())
    assert str(error.value) == said + "copy.deepcopy(...) of one of them"
    tied = toy_net(1)
    tied.module.fc.weight = net.module.fc.weight
    with pytest.raises(MethodError, match="shares weights with student 0"):
        Method([net], [tied], ToyImages().spec())
    Method([net], [copy.deepcopy(net)], ToyImages().spec())
    assert net.module.fc.weight.requires_grad


# --- teachers -----------------------------------------------------------------------------------


def test_teachers_are_frozen_and_stay_in_eval_mode():
    made = method()
    made.train()
    (teacher,) = made.teachers
    assert made.student.training
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    made.requires_grad_(True)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_teachers_are_neither_parameters_nor_state():
    made = method()
    teacher = {id(p) for p in made.teachers[0].parameters()}
    assert not teacher & {id(p) for p in made.parameters()}
    assert not teacher & {id(p) for p in made.trainable()}
    assert all(key.startswith("students.0.") for key in made.state_dict())
    assert len(made.state_dict()) == len(made.student.state_dict())


def test_teachers_move_with_the_method():
    made = method().double()
    assert {p.dtype for p in made.teachers[0].parameters()} == {torch.float64}
    made.to(torch.float32, memory_format=torch.channels_last)
    weight = made.teachers[0].module.conv1.weight
    assert weight.dtype == torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last)
    made.to("meta")
    assert {b.device.type for b in made.teachers[0].buffers()} == {"meta"}


def test_a_copied_method_has_its_own_teacher():
    made = method()
    twin = copy.deepcopy(made)
    assert twin.teachers[0].module.fc.weight is not made.teachers[0].module.fc.weight
    assert not any(p.requires_grad for p in twin.teachers[0].parameters())
    close(twin.teach(batch())[0].logits, made.teach(batch())[0].logits)


def test_teach_gives_no_gradient():
    made, images = method(), batch()
    image = images.image.clone().requires_grad_()
    (out,) = made.teach(images._replace(image=image))
    assert not out.logits.requires_grad
    assert not any(f.requires_grad for f in out.features.values())
    assert torch.is_grad_enabled()


def test_a_method_can_differentiate_the_teacher_with_respect_to_the_image():
    """The gradient of the first logit, against a finite difference in float64."""

    class Jacobian(Method):
        needs_input_gradient: ClassVar[bool] = True

    made = method(Jacobian).double()
    image = ToyImages(2, torch.float64).image.requires_grad_()
    images = batch(2)._replace(image=image)
    with torch.no_grad():  # wherever it is called
        (out,) = made.teach(images)
    (found,) = torch.autograd.grad(out.logits[0, 0], image)
    moved = image.detach().clone()
    moved[0, 1, 2, 3] += 1e-6
    with torch.no_grad():
        after = made.teachers[0](moved).logits[0, 0]
    close(found[0, 1, 2, 3], (after - out.logits[0, 0]) / 1e-6, atol=1e-5, rtol=1e-4)
    assert not found[1].any()  # eval mode: images do not mix
    made.teach(images)[0].logits.sum().backward()
    assert all(p.grad is None for p in made.teachers[0].parameters())


def test_teachers_can_normalise_by_the_batch():
    """Images three times as large are no difference to batch statistics."""
    made, images = method(), batch(8)
    (teacher,) = made.teachers
    before = [b.clone() for b in teacher.buffers()]
    running = made.teach(images)[0]["stem"]
    made.teacher_statistics = "batch"
    by_batch = made.teach(images)[0]["stem"]
    scaled = made.teach(images._replace(image=3 * images.image))[0]["stem"]
    close(scaled, by_batch, atol=1e-3, rtol=0)
    assert (running - by_batch).abs().max() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.buffers(), strict=True))
    assert not any(m.training for m in teacher.modules())
    made.teacher_statistics = "running"
    assert torch.equal(made.teach(images)[0]["stem"], running)


# --- progress -----------------------------------------------------------------------------------


def test_progress_by_hand():
    """Step 300 of 1200, a phase published with 240 epochs: a quarter, 60 epochs."""
    progress = Progress(epoch=3, step=300, steps=1200, default_epochs=240)
    assert progress.fraction == 0.25
    assert progress.published_epoch == 60.0


@given(st.integers(1, 500), st.integers(1, 10_000), st.data())
def test_whole_published_epochs_are_exact(epochs: int, per_epoch: int, data: st.DataObject):
    """A phase of its published length: after e epochs exactly e, though fractions round."""
    e = data.draw(st.integers(0, epochs))
    progress = Progress(e, e * per_epoch, epochs * per_epoch, epochs)
    assert progress.published_epoch == e
    assert progress.fraction == float(Fraction(e, epochs))


@given(st.integers(1, 50), st.integers(1, 300))
def test_a_shortened_phase_passes_whole_published_epochs_exactly(factor: int, epochs: int):
    progress = Progress(1, 7, 7 * epochs, factor * epochs)
    assert progress.published_epoch == factor


# --- defaults -----------------------------------------------------------------------------------


def test_the_default_training_is_one_phase_with_one_update_of_everything():
    made = METHODS["kd"]([toy_net(0)], [toy_net(1)], ToyImages().spec())
    (phase,) = made.phases()
    (turn,) = phase.turns
    (update,) = turn.updates
    assert (phase.name, phase.epochs, update.name) == ("distill", 240, "student")
    assert [id(p) for p in update.parameters] == [id(p) for p in made.student.parameters()]
    out = turn.forward(batch(), Progress(0, 0, 1, 1), None)
    assert isinstance(out, Outputs)
    assert (len(out.students), len(out.teachers)) == (1, 1)
    close(out.teachers[0].logits, made.teachers[0](batch().image).logits)


def test_trainable_leaves_frozen_parameters_out():
    made = method()
    made.student.classifier.requires_grad_(False)
    assert len(made.trainable()) == len(list(made.student.parameters())) - 2


def test_predictors_are_named_after_their_students():
    class Two(Method):
        students_needed = (2, None)
        teachers_needed = (0, 0)

    two = Two([toy_net(0), toy_net(1)], [], ToyImages().spec(0)).eval()
    assert list(method().predictors()) == ["student"]
    assert list(two.predictors()) == ["student0", "student1"]
    x = torch.zeros(1, *SHAPE)
    close(two.predictors()["student1"](x), two.nets[1](x).logits)


def test_reads_is_what_teachers_give():
    class Alone(Method):
        teachers_needed = (0, 0)

    assert method().reads == {"logits"}
    assert Alone([toy_net()], [], ToyImages().spec(0)).reads == frozenset()


def test_a_method_without_a_loss_says_so():
    with pytest.raises(NotImplementedError, match=r"Method must define loss\(out\) or phases\(\)"):
        method().loss(None)


def test_of_sum_is_the_gradient_of_the_sum_with_zeros_for_the_rest():
    """d (w^2 + 3 w) / dw = 2 * 2 + 3 = 7 at w = 2."""
    w, idle = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))
    terms = {"square": w.square(), "linear": 3 * w}
    for _ in range(2):  # the graph is kept for another update's gradient
        found = of_sum(terms, [w, idle], Progress(0, 0, 1, 1))
        assert [g.tolist() for g in found] == [7.0, [0.0, 0.0, 0.0]]


def test_students_that_share_weights_are_refused():
    same = toy_net()
    with pytest.raises(MethodError, match="students 0 and 1 share weights"):
        Alternating([same, same], [], ToyImages().spec(0))
