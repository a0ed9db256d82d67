"""Runs as a training would leave them, with figures that are made up."""

from potstill import recipe
from potstill.run import Run

ENVIRONMENT = {
    "potstill": "0.1.0",
    "torch": "2.13.0",
    "threads": 1,
    "device": "cpu",
    "cpu": "abacus",
    "precision": "float32",
    "compile": False,
    "world_size": 1,
    "command": ["__main__.py", "train", "digits/kd"],
}
BINS = [[0, None, None]] * 7 + [[100, 0.5 + i / 18, 0.45 + i / 18] for i in range(8)]


def make(
    place,
    top1,
    *overrides,
    name="digits/kd",
    seed=0,
    split="test",
    environment=(),
    newer=True,
    done=None,
    predictors=("student",),
    best=None,
    drawn=False,
    teacher=90.0,
):
    """A run whose last epoch has `top1`, a number or one for each predictor.

    `newer`: with what later versions record beside it. `done`: unfinished after so many epochs.
    """
    taught = ["teachers.0.weights=t.pth"] if name != "digits/vanilla" else []
    settings = recipe.load(name, ["epochs=4", f"seed={seed}", *taught, *overrides])
    epochs = settings.epochs if isinstance(settings.epochs, int) else 4
    run = Run.create(place, settings.to_yaml(), {**ENVIRONMENT, **dict(environment)})
    last = dict(zip(predictors, top1, strict=True)) if isinstance(top1, tuple | list) else None
    last = last or dict.fromkeys(predictors, top1)
    for epoch in range(1, (epochs if done is None else done) + 1):
        part = epoch / epochs
        run.append(
            {
                "phase": "distill",
                "epoch": epoch,
                "step": 10 * epoch,
                "lr": {"student": 0.1},
                "terms": {"ce": 1 / epoch, "kd": 3 / epoch + 0.1 * seed},
                "split": split,
                "scores": {n: score(v * part**0.5, newer) for n, v in last.items()},
                **({"subnetworks": {"teacher0": drawing(epoch)}} if drawn else {}),
                "time": {"seconds": 2.0, "images": 1000},
            }
        )
    if done is not None:
        return run
    result = {
        "scores": {n: score(v, newer) for n, v in last.items()},
        "best_epoch": {
            n: {"top1": best or v, "phase": "distill", "epoch": epochs, "split": split}
            for n, v in last.items()
        },
        "teachers": {"teacher0": score(teacher)} if taught else {},
        "parameters": dict.fromkeys(last, 960 + 10 * len(settings.method.name)),
        "epochs": epochs,
        "steps": 10 * epochs,
        "seconds": 2.0 * epochs,
        "images_per_second": 500.0 + seed,
    }
    if newer:
        result["calibration"] = dict.fromkeys(last, BINS)
        result["agreement"] = {n: {"teacher0": 80.0 + seed} for n in last} if taught else {}
        result["cost"] = {
            n: {"flops": 1000000, "latency_ms": 1.5 + 0.1 * seed, "latency_n": 50} for n in last
        }
    run.finish(result)
    return run


def score(top1, newer=True):
    found = {"top1": top1, "top5": min(100.0, top1 + 20), "loss": 1.0, "images": 898}
    return found | ({"ece": 5.0} if newer else {})


def drawing(epoch):
    return {"distinct": 5 + epoch, "live": 8.5, "blocks": 9}


def outcome(shortened="1 of 240 epochs"):
    """What potstill.reproduce.outcome says of a folder."""
    row = {
        "table": "Table 2",
        "dataset": "cifar100",
        "teacher": "resnet56",
        "student": "resnet20",
        "method": "kd",
        "metric": "top-1",
        "conditions": {},
        "published": 70.66,
        "published_runs": 5,
        "published_rule": "last epoch, test",
        "doubt": "",
        "ours": {"mean": 70.5, "std": 0.1, "n": 3, "half_width": 0.25},
        "ours_best": {"mean": 70.9, "std": 0.1, "n": 3, "half_width": 0.25},
        "difference": -0.16,
        "verdict": "matches",
        "why": "0.16 below, within 0.5",
        "runs": [],
        "seeds": [0, 1, 2],
        "waiting": 0,
    }
    crd = {
        "method": "crd",
        "published": 71.16,
        "verdict": "below",
        "difference": -1.2,
        "ours": {"mean": 69.96, "std": 0.2, "n": 3, "half_width": 0.5},
        "why": "1.20 below, beyond 0.5",
        "doubt": "the table and the text differ",
    }
    none = {"ours": None, "ours_best": None, "difference": None, "verdict": "waiting"}
    fitnet = {"method": "fitnet", "published": 69.21, **none, "why": "no run yet", "waiting": 3}
    methods = [
        {"method": "kd", "ours": 70.5, "published": 70.66, "our_rank": 1.0, "published_rank": 2.0},
        {"method": "crd", "ours": 69.96, "published": 71.16, "our_rank": 2.0, "published_rank": 1},
    ]
    pair = {"title": "Table 2", "method": "crd", "against": "kd", "mean": -0.54, "n": 3}
    return {
        "paper": "crd",
        "title": "Contrastive Representation Distillation",
        "command": "potstill reproduce crd",
        "tolerance": 0.5,
        "confidence": 0.95,
        "shortened": shortened,
        "changed": ["data.subset 1000"],
        "rows": [row, row | crd, row | fitnet],
        "ranks": [
            {
                "title": "Table 2",
                "metric": "top-1",
                "methods": methods,
                "tau": -1.0,
                "p": 1.0,
                "n": 2,
            }
        ],
        "paired": [pair | {"half_width": 0.4, "p": 0.03, "seeds": [0, 1, 2]}],
        "left_out": [{"what": "vgg13 -> MobileNetV2", "because": "not asked for"}],
    }
