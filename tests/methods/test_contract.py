"""What every method must hold: each in METHODS, and the odd ones of odd.py, through one engine.

A method that is added to METHODS gets all of these tests. One that needs other networks or
arguments than `Case()` names them in CASES.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill import engine
from potstill.errors import MethodError
from potstill.evaluate import evaluate
from potstill.method import Method, Progress
from potstill.methods import METHODS
from potstill.net import Net
from potstill.run import Run
from tests.methods.odd import ODD
from tests.toys import ToyImages, channels_last, pace, plan, toy_net

ALL = {**METHODS, **ODD}


@dataclass(frozen=True)
class Case:
    """How the contract tests build a method."""

    students: int = 1
    teachers: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 25
    """Enough to overfit 64 images."""


CASES: dict[str, Case] = {
    "vanilla": Case(teachers=0),
    "kd": Case(),
    "fitnet": Case(),
    "at": Case(arguments={"alpha": 0.5, "teacher_taps": ["stage1", "stage2", "stage3:pre"]}),
    "ofd": Case(),
    "rkd": Case(),
    "crd": Case(arguments={"negatives": 16}),
    "reviewkd": Case(arguments={"warmup_epochs": 0}),  # or the first step moves no bias
    "srrl": Case(),
    "afd_attention": Case(),
    "semckd": Case(arguments={"beta": 4.0}),
    "simkd": Case(epochs=60),
    "mgd": Case(),
    "norm": Case(),
    "sakd": Case(),
    "fsp": Case(),
    "ab": Case(),
    "kdsvd": Case(),
    "kdsvdf": Case(),
    "mhgd": Case(),
    "dml": Case(students=3, teachers=0),
    "one": Case(students=3, teachers=0, arguments={"ramp_epochs": 0}),
    "l1": Case(students=2, teachers=0),
    "l1_kd": Case(),
    "ensemble_kd": Case(students=2, teachers=0),
    "afd_online": Case(students=3, teachers=0, epochs=60),
    "refilled": Case(),
    "aml": Case(),
    "jacobian": Case(),
    "two_optimizers": Case(),
    "alternating": Case(students=2, teachers=0),
    "pre_phase": Case(),
    "bank": Case(),
    "other_predictor": Case(epochs=60),
    "relation": Case(),
}
every_case = pytest.mark.parametrize("name", list(ALL))
PLANS = {name: plan("adam", 1e-3) for name in ("features", "critic", "discriminators")}


@functools.cache
def trained_teacher(norm: str) -> Net:
    """A teacher that knows the toy images, trained by vanilla."""
    method = METHODS["vanilla"]([toy_net(99, norm, width=6)], [], ToyImages().spec(0))
    train(method, epochs=25)
    return method.student


def build(
    name: str,
    norm: str = "batch",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    drop_last: bool = False,
) -> Method:
    case = CASES[name]
    students = [toy_net(i, norm) for i in range(case.students)]
    teachers = [copy.deepcopy(trained_teacher(norm)) for _ in range(case.teachers)]
    torch.manual_seed(5)
    spec = ToyImages().spec(case.teachers, batch_size, drop_last)
    method = ALL[name](students, teachers, spec, **case.arguments)
    if norm == "group":
        group_norms(method)
    return channels_last(method.to(dtype))


def group_norms(module: nn.Module) -> None:
    """GroupNorm, one group, for a method's own BatchNorms: what several ranks compute alike."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, nn.GroupNorm(1, child.num_features))


def pace_of(method: Method, epochs: int) -> engine.Pace:
    names = {u.name for p in method.phases() for t in p.turns for u in t.updates}
    return pace(method, epochs, **{k: v for k, v in PLANS.items() if k in names})


def train(method: Method, epochs: int, dtype: torch.dtype = torch.float32) -> engine.Training:
    training = engine.Training(method, ToyImages(dtype=dtype), pace_of(method, epochs))
    for _ in training.run():
        pass
    return training


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    changed = [k for k in one if not torch.equal(one[k], other[k])]
    assert not changed


def forwards(method: Method) -> Any:
    """(phase, turn, outputs) of each turn, half way through each phase."""
    batch = next(ToyImages().clean(16))
    for phase in method.phases():
        if phase.prepare is not None:
            with torch.no_grad():
                phase.prepare(ToyImages().clean(16))
        out = None
        for turn in phase.turns:
            out = turn.forward(batch, Progress(5, 50, 100, phase.epochs), out)
            yield phase, turn, out


def test_every_method_has_a_case() -> None:
    assert CASES.keys() == ALL.keys(), "add a Case for the new method"


@every_case
def test_loss_is_pure(name: str) -> None:
    """The same outputs give the same terms twice, and no parameter or buffer moves."""
    method = build(name)
    for _, turn, out in forwards(method):
        before, random = state_of(method), torch.random.get_rng_state()
        for update in turn.updates:
            first, second = update.loss(out), update.loss(out)
            assert first.keys() == second.keys() and first
            for key, term in first.items():
                assert term.shape == () and term.isfinite()
                assert torch.equal(term, second[key])
        assert_same(before, state_of(method))
        assert torch.equal(random, torch.random.get_rng_state())


@every_case
def test_gradient_reaches_every_module(name: str) -> None:
    """At mid-schedule, because ramps start at zero: every module that an update owns learns."""
    method = build(name)
    owner = {id(p): m for m in method.modules() for p in m.parameters(recurse=False)}
    for phase, turn, out in forwards(method):
        for update in turn.updates:
            progress = Progress(5, 50, 100, phase.epochs)
            found = update.gradients(update.loss(out), update.parameters, progress)
            reached = {
                id(owner[id(p)])
                for p, g in zip(update.parameters, found, strict=True)
                if g.abs().sum() > 0
            }
            idle = [m for p in update.parameters if id(m := owner[id(p)]) not in reached]
            assert not idle, f"{update.name} moves modules that its loss does not reach: {idle}"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@every_case
def test_parameters_outside_an_update_do_not_move(
    name: str, compiled: bool, request: pytest.FixtureRequest
) -> None:
    """In each phase's first step, with weight decay; compiled, gradients are 0 where eager's are
    None.
    """
    if compiled:
        request.getfixturevalue("ready_kernels")
    method = build(name)
    if compiled and method.needs_input_gradient:
        with pytest.raises(MethodError, match=r"cannot be differentiated twice; set compile=false"):
            engine.compile_networks(method)
        return
    if compiled:
        engine.compile_networks(method)
    before = state_of(method)
    training = engine.Training(method, ToyImages(), pace_of(method, 1))
    for moment in training.run():
        if moment.step == 1:
            turns = training.phase.turns
            moved = {id(p) for turn in turns for u in turn.updates for p in u.parameters}
            for key, p in method.state_dict(keep_vars=True).items():
                if isinstance(p, nn.Parameter):
                    assert torch.equal(p, before[key]) == (id(p) not in moved), key
            if training.phase is training.phases[-1]:
                return
        before = state_of(method)
    raise AssertionError("the last phase never began")


@every_case
def test_teacher_is_untouched(name: str) -> None:
    """Parameters and buffers bit for bit, and eval mode, after an epoch."""
    method = build(name)
    before = [state_of(t) for t in method.teachers]
    train(method, epochs=1)
    for teacher, was in zip(method.teachers, before, strict=True):
        assert_same(was, state_of(teacher))
        assert not any(m.training for m in teacher.modules())
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@every_case
def test_teacher_is_not_saved(name: str) -> None:
    """No tensor of a teacher is in the state, by identity or by size."""
    method = build(name)
    teachers = {t.data_ptr() for net in method.teachers for t in net.state_dict().values()}
    assert not teachers & {t.data_ptr() for t in method.state_dict().values() if t.numel()}


@pytest.mark.parametrize("eighths", [1, 3, 4, 7], ids="after{}of8".format)
@every_case
def test_resume_equals_straight_through(name: str, eighths: int, tmp_path: Any) -> None:
    """2 epochs = some steps, saved to disk, and the rest in new objects: every bit of the state.

    4/8 is the end of an epoch, or of the first phase of two.
    """
    straight = build(name)
    whole = engine.Training(straight, ToyImages(), pace_of(straight, 2))
    records = [{k: v.item() for k, v in m.terms.items()} for m in whole.run()]

    first = build(name)
    training = engine.Training(first, ToyImages(), pace_of(first, 2))
    moments = itertools.islice(training.run(), training.total_steps * eighths // 8)
    seen = [{k: v.item() for k, v in m.terms.items()} for m in moments]
    run = Run.create(tmp_path / "run", "", {})
    run.save_checkpoint(training.done_steps, *training.state())

    second = build(name)
    resumed = engine.Training(second, ToyImages(), pace_of(second, 2))
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    resumed.restore(checkpoint.tensors, checkpoint.state)
    rest = [{k: v.item() for k, v in m.terms.items()} for m in resumed.run()]

    assert records == seen + rest
    (tensors, plain), (resumed_tensors, resumed_plain) = whole.state(), resumed.state()
    assert_same(tensors, resumed_tensors)
    assert plain == resumed_plain
    for key, tensor in tensors.items():
        assert tensor.stride() == resumed_tensors[key].stride(), key


@every_case
def test_trains_in_bf16(name: str) -> None:
    """Networks in bf16; terms, weights and what a method computes itself stay float32, finite."""
    method = build(name)
    half = dataclasses.replace(pace_of(method, 1), precision=torch.bfloat16)
    moments = list(engine.Training(method, ToyImages(), half).run())
    assert all(net.precision is torch.bfloat16 for net in (*method.nets, *method.teachers))
    for _, _, out in forwards(method):
        tensors = [v for v in vars(out).values() if isinstance(v, Tensor) and v.is_floating_point()]
        assert all(t.dtype == torch.float32 for t in tensors)
        for captured in (*out.students, *out.teachers):
            assert captured.logits.dtype == torch.float32
    assert all(term.isfinite() for m in moments for term in m.terms.values())
    assert all(v.isfinite().all() for v in state_of(method).values() if v.is_floating_point())


@every_case
def test_overfits_a_tiny_problem(name: str) -> None:
    """64 noisy images of 4 classes: every predictor reaches 95 % on them."""
    method = build(name)
    train(method, CASES[name].epochs)
    for predictor, scores in evaluate(method.predictors(), ToyImages()).items():
        assert scores.top1 >= 95, (predictor, scores)


@pytest.mark.parametrize("name", list(METHODS))
def test_docstring_names_the_paper(name: str) -> None:
    text = METHODS[name].__doc__ or ""
    assert re.search(
        r"arXiv:\d{4}\.\d{4,5}|(ICLR|CVPR|ICCV|NeurIPS|BMVC|ECCV|AAAI|ICML) \d{4}", text
    )


@pytest.mark.parametrize("name", list(METHODS))
def test_the_class_states_the_lengths_of_its_phases(name: str) -> None:
    """Recipes are checked against them before there is a network."""
    method = build(name)
    stated = list(METHODS[name].lengths.items())
    assert stated == [(phase.name, phase.epochs) for phase in method.phases()]


@every_case
def test_same_seed_same_weights(name: str) -> None:
    one, other = build(name), build(name)
    train(one, 1), train(other, 1)
    assert_same(state_of(one), state_of(other))
