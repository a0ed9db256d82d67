"""What a student is worth beside a teacher of other classes: measures of a finished run.

Ye, Lu, Zhan, Generalized Knowledge Distillation via Relationship Matching, TPAMI 2022,
arXiv:2205.01915, and its supplement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill import files
from potstill import training as trainings
from potstill.data import Data, Split
from potstill.errors import PotstillError
from potstill.evaluate import NearestClassMean, evaluate
from potstill.losses import Weighting, instance_weights, soft_kl
from potstill.models import weights as model_weights
from potstill.net import Net
from potstill.recipe import Network
from potstill.run import Run
from potstill.seeds import seed_of

BINS = 20


class Joint(NamedTuple):
    """Accuracy over the classes of both tasks, in percent."""

    teacher_classes: float
    """Of the test images of the teacher's classes; likewise the student's."""
    student_classes: float

    @property
    def harmonic_mean(self) -> float:
        """Of the two, which a model that knows one task alone does not reach."""
        return harmonic_mean(self.teacher_classes, self.student_classes)


class Weighed(NamedTuple):
    """Instance weights of a set of images, in index order."""

    weights: Tensor
    """(n,) see `potstill.losses.instance_weights`."""
    seen: Tensor | None
    """(n,) bool, whether an image's class is one of the teacher's; None where nobody knows."""

    @property
    def auc(self) -> float | None:
        """Chance that a seen image has the larger weight of two; None without both kinds.

        P(seen > unseen) + P(equal) / 2.
        """
        from sklearn.metrics import roc_auc_score

        if self.seen is None or self.seen.all() or not self.seen.any():
            return None
        return float(roc_auc_score(self.seen.numpy(), self.weights.double().numpy()))


def harmonic_mean(a: float, b: float) -> float:
    """2 a b / (a + b); 0 where both are 0.

    >>> round(harmonic_mean(0.6, 0.2), 12)
    0.3
    """
    return 2 * a * b / (a + b) if a + b else 0.0


def weigh(
    logits: Tensor,
    images: Split,
    teacher_classes: Sequence[int] | None,
    batch_size: int = 256,
    weighting: Weighting = "minmax",
) -> Weighed:
    """Instance weights from a teacher's logits of all images of a split, in index order. (n, K')

    In shuffled batches, as a training has them: with "minmax" a weight depends on the others of its
    batch. The shuffle is always the same.
    """
    fixed = torch.Generator().manual_seed(seed_of("instance weights"))
    logits, weights = logits.cpu(), torch.empty(len(logits))
    for part in torch.split(torch.randperm(len(logits), generator=fixed), batch_size):
        weights[part] = instance_weights(logits[part], weighting).float()
    if teacher_classes is None:
        return Weighed(weights, None)
    known = set(teacher_classes)
    of_class = torch.tensor([c in known for c in images.classes])
    return Weighed(weights, of_class[images.labels.cpu()])


@torch.no_grad()
def logits_of(net: Net, images: Split) -> Tensor:
    """Of every image, clean, in index order. (n, K)"""
    batches = images.clean(trainings.evaluation_batch(images))
    return torch.cat([net.logits(batch.image) for batch in batches])


def fit_head(vectors: Tensor, target: Tensor, temperature: float = 4.0) -> nn.Linear:
    """A linear layer whose softened predictions are nearest a teacher's. (n, D), (n, K) -> D -> K

    From zeros to the least KL(teacher || layer at the temperature), a convex problem, by L-BFGS in
    float64, to gradients below 1e-7 or for 1,000 iterations.
    """
    head = nn.Linear(vectors.shape[1], target.shape[1]).to(vectors.device, torch.float64)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    wide, aim = vectors.double(), target.double()
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=1000,
        tolerance_grad=1e-7,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = soft_kl(head(wide), aim, temperature)
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return head.requires_grad_(False).to(vectors.dtype)


def union_logits(
    own: Tensor, classes: Sequence[int], second: Tensor, teacher_classes: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Logits of the classes of both heads, and their ids, ascending. (B, K), (B, K') -> (B, U)

    A class of both has the larger of its two logits.
    """
    union = sorted({*classes, *teacher_classes})
    place = {c: i for i, c in enumerate(union)}
    joined = own.new_full((len(own), len(union)), -torch.inf)
    for logits, ids in ((own, classes), (second, teacher_classes)):
        at = [place[c] for c in ids]
        joined[:, at] = torch.maximum(joined[:, at], logits)
    return joined, union


@torch.no_grad()
def joint_accuracy(
    student: Net, target: Tensor, data: Data, teacher_classes: Sequence[int]
) -> Joint:
    """Accuracy over the union of both tasks' classes, of a student with a second head.

    Our own construction, as none is published: the student's head for its classes, and for the
    teacher's `fit_head` on the student's vectors of its own training images, of which `target` are
    the teacher's logits, in index order; none of the teacher's images are needed. See
    `union_logits`.
    """
    size = trainings.evaluation_batch(data.test)
    vectors = [student.capture(b.image)["embed"].flatten(1) for b in data.train.clean(size)]
    head = fit_head(torch.cat(vectors), target)
    classes = data.train.classes
    union = data.whole_test.window(sorted({*classes, *teacher_classes}))
    found = []
    for batch in union.clean(size):
        captured = student.capture(batch.image)
        second = head(captured["embed"].flatten(1))
        logits, _ = union_logits(captured.logits, classes, second, teacher_classes)
        found.append(logits.argmax(dim=1) == batch.label)
    right, shares = torch.cat(found).cpu(), []
    for task in (set(teacher_classes), set(classes)):
        of_task = torch.tensor([c in task for c in union.classes])[union.labels.cpu()]
        shares.append(100 * int(right[of_task].sum()) / int(of_task.sum()))
    return Joint(*shares)


def examine(
    run_source: str,
    teacher_source: str | None = None,
    root: Path | None = None,
    batch_size: int = 256,
    weighting: Weighting = "minmax",
    allow_code: bool = False,
) -> dict[str, Any]:
    """Every measure of a run's student, and of its teacher or another one; see `describe`.

    Written into the run as cross_task.json, and each training image's weight as
    instance_weights.csv. `run_source` is RUN, or RUN:student1 where a run has several, whose files
    are then cross_task.student1.json and instance_weights.student1.csv. A teacher is measured whole
    where it is a stochastic one.
    """
    folder, student_name = model_weights.place_of(run_source)
    run, recipe, _ = trainings.finished(folder, root, allow_code)
    which = int(number) if (number := student_name.removeprefix("student")).isdecimal() else 0
    own = recipe.students[which].name if which < len(recipe.students) else None
    data = trainings.load_data(recipe, trainings.choose_device("auto"))
    device = data.train.labels.device
    student, _ = trainings.build_network(_trained(run_source, own), data, "students.0")
    student.to(device).eval()
    scores = evaluate(
        {"accuracy": student.predictor(), "ncm": NearestClassMean(student, len(data.class_names))},
        data.test,
        trainings.evaluation_batch(data.test),
        data.train,
    )
    found: dict[str, Any] = {
        "run": run_source,
        "data": recipe.data.name,
        "classes": list(data.train.classes),
        **{name: score._asdict() for name, score in scores.items()},
    }
    if teacher_source is None and len(recipe.teachers) > 1:
        raise PotstillError(
            f"{folder} has {len(recipe.teachers)} teachers; name one with --teacher"
        )
    if teacher_source is not None:
        network = _trained(teacher_source)
    elif recipe.teachers:
        (network,) = recipe.teachers
    else:
        return _kept(run, student_name, found, None, data)
    teacher, classes = trainings.build_network(network, data, "teachers.0")
    teacher.to(device).eval()
    test = trainings.test_images(data, classes)
    classes = None if test is None else classes
    found["teacher"] = {
        "source": teacher_source or network.weights or network.name,
        "classes": None if classes is None else list(classes),
    }
    of_train = logits_of(teacher, data.train)
    if test is not None and classes is not None:
        shared = set(classes) & set(data.train.classes)
        theirs = evaluate({"accuracy": teacher.predictor()}, test, trainings.evaluation_batch(test))
        joint = joint_accuracy(student, of_train, data, classes)
        found["teacher"] |= {"shared": len(shared), "accuracy": theirs["accuracy"]._asdict()}
        found["joint"] = {**joint._asdict(), "harmonic_mean": joint.harmonic_mean}
    train, tested = (
        weigh(logits, split, classes, batch_size, weighting)
        for logits, split in ((of_train, data.train), (logits_of(teacher, data.test), data.test))
    )
    found["weights"] = {
        "weighting": weighting,
        "batch_size": batch_size,
        "auc": train.auc,
        "test_auc": tested.auc,
        **_histogram(train),
    }
    return _kept(run, student_name, found, train, data)


def _trained(source: str, own: str | None = None) -> Network:
    """The network whose weights these are, also where a model has the name of their folder.

    `own` is what the run's recipe calls it, which alone may name code of one's own.
    """
    found = model_weights.read(source)
    name = found.model
    if name is None and own is not None and found.about.get("model") == own:
        name = own
    if name is None and found.about.get("model", "") is None:
        raise PotstillError(
            f"{source} is an ensemble, or a network with a layer of its method, whose vectors "
            "cannot be compared; name a plain network (RUN:student1, if there is one)"
        )
    name = name or model_weights.require_architecture(found, "give the weights of a run")
    return Network.model_validate(
        {"name": name, "weights": source}, context={"allow_code": True, "finished": True}
    )


def _histogram(weighed: Weighed) -> dict[str, Any]:
    """Images by weight in `BINS` equal parts from the least weight that there is to 1."""
    low = min(float(weighed.weights.min()), 0.5)
    edges = torch.linspace(low, 1.0, BINS + 1)
    if weighed.seen is None:
        parts = {"all": weighed.weights}
    else:
        parts = {"seen": weighed.weights[weighed.seen], "unseen": weighed.weights[~weighed.seen]}
    counts = {k: torch.histc(x, BINS, low, 1.0).int().tolist() for k, x in parts.items()}
    return {"edges": edges.tolist(), "images": counts}


def _kept(
    run: Run, student: str, found: dict[str, Any], weighed: Weighed | None, data: Data
) -> dict[str, Any]:
    assert run.directory is not None
    dot = f".{student}" if student else ""
    files.write_json(run.directory / f"cross_task{dot}.json", found)
    place = run.directory / f"instance_weights{dot}.csv"
    if weighed is None:
        place.unlink(missing_ok=True)  # of another teacher
        return found
    ids = [data.train.classes[label] for label in data.train.labels.tolist()]
    seen = [""] * len(ids) if weighed.seen is None else weighed.seen.int().tolist()
    rows = zip(data.train.indices.tolist(), ids, seen, weighed.weights.tolist(), strict=True)
    lines = [f"{index},{c},{known},{weight:.6f}\n" for index, c, known, weight in rows]
    files.write_bytes(place, "".join(["index,class,seen,weight\n", *lines]).encode())
    return found


def describe(found: Mapping[str, Any]) -> list[str]:
    """The measures for a person, a line each, and the weights' histogram."""
    lines = [
        f"accuracy: {found['accuracy']['top1']:.2f} % of {found['accuracy']['images']:,} test "
        f"images, {len(found['classes'])} classes of {found['data']}",
        f"nearest class mean: {found['ncm']['top1']:.2f} %",
    ]
    teacher = found.get("teacher")
    if teacher is None:
        return [*lines, "no teacher: --teacher WEIGHTS for joint accuracy and instance weights"]
    if teacher["classes"] is None:
        lines.append(f"teacher {teacher['source']}: which classes it knows is not known")
    else:
        joint = found["joint"]
        lines += [
            f"teacher {teacher['source']}: {teacher['accuracy']['top1']:.2f} % of its own "
            f"{len(teacher['classes'])} classes, of which the student has {teacher['shared']}",
            f"joint accuracy (our construction): {joint['teacher_classes']:.2f} % of the teacher's "
            f"classes, {joint['student_classes']:.2f} % of the student's, harmonic mean "
            f"{joint['harmonic_mean']:.2f} %",
        ]
    weights = found["weights"]
    if weights["auc"] is not None:
        auc = (
            f"AUC of the classes seen by the teacher {weights['auc']:.3f} (test images "
            f"{weights['test_auc']:.3f})"
        )
    elif teacher["classes"] is None:
        auc = "no AUC, as nobody knows which classes are the teacher's"
    else:
        auc = "no AUC, as all or none of the classes are the teacher's"
    lines.append(
        f"instance weights of {sum(map(sum, weights['images'].values())):,} training images "
        f"({weights['weighting']}, batches of {weights['batch_size']}): {auc}"
    )
    return lines + _bars(weights)


def _bars(weights: Mapping[str, Any], width: int = 24) -> list[str]:
    """Histograms side by side, each in shares of its own images."""
    counts = {k: v for k, v in weights["images"].items() if sum(v)}
    shares = {k: [n / sum(v) for n in v] for k, v in counts.items()}
    tallest = max(max(v) for v in shares.values())
    lines = ["  weight       " + " ".join(f"{k:<{width + 7}}" for k in shares).rstrip()]
    for i, (low, high) in enumerate(pairwise(weights["edges"])):
        cells = [
            f"{100 * v[i]:4.1f} % {'█' * round(width * v[i] / tallest):<{width}}"
            for v in shares.values()
        ]
        lines.append(f"  {low:.3f}-{high:.3f}  {' '.join(cells)}".rstrip())
    return lines
