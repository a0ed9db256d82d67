"""A report's plots, as the data and layouts that plotly.js draws.

Plain mappings: what is shown is here, how it looks (fonts, light and dark) is in page.js.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

from potstill.report.groups import Collected, Group, Training
from potstill.report.tables import Line, of_predictors

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#808080")
"""Okabe and Ito's, which colour-blind readers tell apart, without the yellow that white hides."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
AT_FIRST = 8
"""Groups that are shown before a reader chooses."""

Trace = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One view of a plot: traces and a layout, in plotly.js's terms."""

    label: str
    data: Sequence[Trace]
    layout: Mapping[str, Any]


@dataclass(frozen=True)
class Plot:
    """A plot, whose variants a reader switches between."""

    key: str
    title: str
    caption: str
    variants: Sequence[Variant]
    log: bool = False
    """Whether the vertical axis can be logarithmic."""

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return {"log": self.log, "variants": [asdict(v) for v in self.variants]}


@dataclass(frozen=True)
class Look:
    """How a group is drawn, the same in every plot."""

    name: str
    index: int

    def trace(self, kind: str = "", entry: str = "", **settings: Any) -> Trace:
        """A trace; `entry` is what the legend calls it, `kind` is added to its own name."""
        entry = arrow(entry or self.name)
        return {
            "name": html.escape(f"{entry}{kind}", quote=False),  # plotly.js reads tags in it
            "legendgroup": entry,
            "meta": self.colour,
            **settings,
        }

    @property
    def colour(self) -> str:
        return COLOURS[self.index % len(COLOURS)]

    @property
    def dash(self) -> str:
        """Told apart where the colours begin anew; likewise the symbol."""
        return DASHES[self.index // len(COLOURS) % len(DASHES)]

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "dash": self.dash, "width": 2}

    @property
    def band(self) -> str:
        """The colour, of which little is left."""
        return f"{self.colour}33"

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.index // len(COLOURS) % len(SYMBOLS)]


def arrow(text: str) -> str:
    """Text with its arrows in one piece, so that no line ends within one."""
    return text.replace("->", "\N{RIGHTWARDS ARROW}")


def plots(collected: Collected) -> list[Plot]:
    """Every plot that there are figures for."""
    looks = [(g, Look(g.name, i)) for i, g in enumerate(collected.groups)]
    made = [
        curves(looks),
        terms(looks),
        reliability(looks),
        agreement(looks),
        cost(looks),
        weights(collected),
        subnetworks(looks),
    ]
    return [plot for plot in made if plot is not None and plot.variants]


Looks = Sequence[tuple[Group, Look]]


def curves(looks: Looks) -> Plot | None:
    """Accuracy by epoch, mean and range over seeds; beside it, hidden at first, each predictor's.

    The students' mean where there are several; what another phase predicts with is no student.
    """
    means: list[Trace] = []
    each: list[Trace] = []
    marks: dict[int, str] = {}
    splits: set[str] = set()
    for group, look in looks:
        runs, entry = _shown(group)
        marks |= _phases(runs) if look.index < AT_FIRST else {}
        splits |= {split for run in runs for split in run.splits}
        names = list(dict.fromkeys(n for run in runs for r in run.metrics for n in r["scores"]))
        own = [name for name in names if name.startswith("student")] or names
        means += _curve(runs, look, entry, own)
        for name in names if len(own) > 1 else [n for n in names if n not in own]:
            each += _curve(runs, look, f"{entry}: {name}", [name])
    if not means:
        return None
    few = f" At first {AT_FIRST} of {len(looks)} are shown." if len(looks) > AT_FIRST else ""
    caption = (
        f"Top-1 on the {' or '.join(sorted(splits))} set after each epoch. Lines are means over "
        f"seeds, bands reach from the least to the greatest; n = 1 is a line alone.{few}"
    )
    data = [*_at_first(means), *({**trace, "visible": False} for trace in each)]
    layout = _layout("epoch", "top-1 %", marks, data)
    return Plot("curves", "Accuracy by epoch", caption, [Variant("", data, layout)])


def terms(looks: Looks) -> Plot | None:
    """Loss terms by epoch, a view for each group."""
    variants = []
    for group, _ in looks:
        runs, entry = _shown(group)
        names = list(
            dict.fromkeys(name for run in runs for r in run.metrics for name in r["terms"])
        )
        data = []
        for i, name in enumerate(names):
            points = _by_epoch(runs, _term(name))
            mode = "lines" if len(points) > 1 else "lines+markers"  # one point makes no line
            data.append(Look(name, i).trace(**_means(points), mode=mode, line=Look(name, i).line))
        if data:
            variants.append(
                Variant(entry, data, _layout("epoch", "loss term", _phases(runs), data))
            )
    caption = "Each term as it enters the loss, the mean over an epoch's steps and over seeds."
    return Plot("terms", "Loss terms by epoch", caption, variants, log=True)


def reliability(looks: Looks) -> Plot | None:
    """Accuracy of test images by confidence, over all seeds together."""
    ends = {"color": "#808080", "dash": "dot", "width": 1}
    ideal = {
        "x": [0, 1],
        "y": [0, 1],
        "mode": "lines",
        "line": ends,
        "hoverinfo": "skip",
        "showlegend": False,
    }
    data = []
    for group, look in looks:
        found = [(run.result or {}).get("calibration", {}) for run in group.runs]
        for i, name in enumerate(dict.fromkeys(n for c in found for n in c)):
            bins = [
                _pooled(rows) for rows in zip(*(c[name] for c in found if name in c), strict=True)
            ]
            filled = [b for b in bins if b[0]]
            several = f": {name}" if len(found[0]) > 1 else ""
            data.append(
                look.trace(
                    entry=f"{group.name}{several}",
                    x=[b[1] for b in filled],
                    y=[b[2] for b in filled],
                    customdata=[b[0] for b in filled],
                    hovertemplate="confidence %{x:.3f}, accuracy %{y:.3f}, %{customdata:,} images",
                    mode="lines+markers",
                    line=look.line,
                    marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 6},
                )
            )
    if not data:
        return None
    layout = _layout("confidence", "accuracy")
    layout["xaxis"]["range"] = layout["yaxis"]["range"] = [0, 1.02]
    caption = (
        "Test images in 15 bins by the confidence of the last epoch's prediction. Below the "
        "dotted line a student is surer than it is right."
    )
    return Plot(
        "reliability", "Calibration", caption, [Variant("", [ideal, *_at_first(data)], layout)]
    )


def agreement(looks: Looks) -> Plot | None:
    """How often a student predicts what its teacher or peer does."""
    data = []
    for group, look in looks:
        found: dict[str, list[float]] = {}
        for run in group.runs:
            for name, others in (run.result or {}).get("agreement", {}).items():
                for other, percent in others.items():
                    found.setdefault(f"{name}, {other}", []).append(percent)
        if found:
            means = [statistics.fmean(v) for v in found.values()]
            errors = [[max(v) - m for v, m in zip(found.values(), means, strict=True)]]
            errors += [[m - min(v) for v, m in zip(found.values(), means, strict=True)]]
            bars = {"type": "data", "array": errors[0], "arrayminus": errors[1], "symmetric": False}
            data.append(
                look.trace(
                    type="bar",
                    x=[*found],
                    y=means,
                    error_y=bars | {"color": "#808080", "visible": len(group.runs) > 1},
                    marker={"color": look.colour},
                    hovertemplate="%{x}: %{y:.2f} %",
                )
            )
    if not data:
        return None
    caption = "Test images whose first choice is the same; whiskers reach over the seeds."
    layout = _layout("", "agreement %") | {"barmode": "group", "bargap": 0.5}
    return Plot("agreement", "Agreement", caption, [Variant("", data, layout)])


def cost(looks: Looks) -> Plot | None:
    """Accuracy by what a predictor costs, with t-intervals."""
    axes = {"parameters": "parameters", "FLOPs": "flops", "latency": "latency"}
    titles = {"latency": "latency, ms an image", "FLOPs": "FLOPs of an image"}
    lines = [(look, line) for g, look in looks if g.runs for line in of_predictors(g)]
    variants = []
    for label, key in axes.items():
        data = [_point(look, line, key) for look, line in lines if key in (line.measures or {})]
        if data:
            layout = _layout(titles.get(label, label), "top-1 %")
            layout["xaxis"] |= {"exponentformat": "SI"}
            variants.append(Variant(label, data, layout))
    caption = "Test top-1 after the last epoch; bars are 95 % t-intervals, which n = 1 has not."
    return Plot("cost", "Accuracy by cost", caption, variants)


def _point(look: Look, line: Line, key: str) -> Trace:
    half = line.top1.half_width
    own = "" if line.predictor == "student" else f": {line.predictor}"
    return look.trace(
        own,
        x=[(line.measures or {})[key]],
        y=[line.top1.mean],
        mode="markers",
        marker={
            "color": look.colour,
            "size": 11,
            "symbol": "star" if line.predictor == "ensemble" else look.symbol,
        },
        error_y={"type": "data", "array": [half or 0], "visible": half is not None},
        hovertemplate=f"%{{x:.4s}} {key}, %{{y:.2f}} %",
    )


def weights(collected: Collected) -> Plot | None:
    """How REFILLED's lambda, or any method's instance weight, is spread, a view for each run."""
    called = {"seen": "classes the teacher knows", "unseen": "other classes", "all": "all classes"}
    variants = []
    for group in collected.groups:
        for run in group.every:
            for student, found in run.cross_task.items():
                if "weights" not in found:
                    continue
                edges, images = found["weights"]["edges"], found["weights"]["images"]
                counts = [
                    (Look(name, i), images[kind])
                    for i, (kind, name) in enumerate(called.items())
                    if sum(images.get(kind, []))
                ]
                data = [
                    look.trace(
                        type="bar",
                        x=[(a + b) / 2 for a, b in pairwise(edges)],
                        y=[100 * n / sum(numbers) for n in numbers],
                        customdata=numbers,
                        hovertemplate="lambda %{x:.3f}: %{y:.1f} %, %{customdata:,} images",
                        marker={"color": look.colour},
                        opacity=0.7,
                    )
                    for look, numbers in counts
                ]
                layout = _layout("lambda", "images %") | {"barmode": "overlay", "bargap": 0.02}
                label = arrow(f"{group.name}, seed {run.seed} {student}".strip())
                variants.append(Variant(label, data, layout))
    caption = (
        "Instance weights of the training images, each kind in shares of its own images: the "
        "teacher is to say more where it knows the class."
    )
    return Plot("weights", "Lambda, the weight of the teacher's word", caption, variants)


def subnetworks(looks: Looks) -> Plot | None:
    """Which sub-networks of a stochastic network taught or learnt."""
    variants = []
    for label, key, title in (
        ("live blocks", "live", "blocks alive, mean over steps"),
        ("distinct sub-networks", "distinct", "distinct sub-networks"),
    ):
        data = []
        for group, look in looks:
            runs, entry = _shown(group)
            names = dict.fromkeys(
                n for run in runs for r in run.metrics for n in r.get("subnetworks", {})
            )
            for name in names:
                points = _means(_by_epoch(runs, _drawn(name, key)))
                data.append(
                    look.trace(
                        entry=f"{entry}: {name}",
                        **points,
                        mode="lines+markers",
                        line=look.line,
                    )
                )
        if data:
            layout = _layout("epoch", title, data=data)
            layout["yaxis"]["rangemode"] = "tozero"
            variants.append(Variant(label, _at_first(data), layout))
    caption = "A stochastic network is another sub-network at every draw; means over seeds."
    return Plot("subnetworks", "Sub-networks that were drawn", caption, variants)


# --- from metrics.jsonl


def _shown(group: Group) -> tuple[Sequence[Training], str]:
    """The runs to draw, and what to call them: the finished ones, or else those under way."""
    if group.runs:
        return group.runs, arrow(f"{group.name} (n = {len(group.runs)})")
    return group.unfinished, arrow(f"{group.name} (unfinished)")


Value = Callable[[Mapping[str, Any]], float | None]


def _by_epoch(runs: Iterable[Training], value: Value) -> dict[int, list[float]]:
    """Values of the runs by epoch, counted through the phases."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for epoch, record in enumerate(run.metrics, 1):
            if (x := value(record)) is not None:
                found.setdefault(epoch, []).append(x)
    return dict(sorted(found.items()))


def _term(name: str) -> Value:
    return lambda record: record["terms"].get(name)


def _drawn(name: str, key: str) -> Value:
    return lambda record: record.get("subnetworks", {}).get(name, {}).get(key)


def _means(points: Mapping[int, Sequence[float]]) -> Trace:
    return {"x": [*points], "y": [statistics.fmean(v) for v in points.values()]}


def _curve(
    runs: Sequence[Training],
    look: Look,
    entry: str,
    names: Sequence[str],
) -> list[Trace]:
    """The mean over seeds, above a band from the least to the greatest."""

    def top1(record: Mapping[str, Any]) -> float | None:
        found = [record["scores"][name]["top1"] for name in names if name in record["scores"]]
        return statistics.fmean(found) if found else None

    points = _by_epoch(runs, top1)
    if not points:
        return []
    mode = "lines+markers" if len(points) <= 30 else "lines"
    made = []
    if max(map(len, points.values())) > 1:
        x, low, high = [*points], [*map(min, points.values())], [*map(max, points.values())]
        made.append(
            look.trace(
                entry=entry,
                x=x + x[::-1],
                y=high + low[::-1],
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=look.band,
                hoverinfo="skip",
            )
        )
    hover = "epoch %{x}: %{y:.2f} %"
    line = look.trace(entry=entry, **_means(points), mode=mode, line=look.line, hovertemplate=hover)
    return [*made, line | {"marker": {"size": 5, "symbol": look.symbol}}]


def _phases(runs: Iterable[Training]) -> dict[int, str]:
    """The phases after the first, by the last epoch before they begin."""
    found: dict[int, str] = {}
    for run in runs:
        names = [*run.planned]
        ends = accumulate(run.planned.values())
        found |= dict(zip(ends, names[1:], strict=False))
    return found


def _pooled(rows: Sequence[Sequence[Any]]) -> tuple[int, float, float]:
    """One bin of several runs: images, and their mean confidence and accuracy (None of none)."""
    count = sum(int(n) for n, _, _ in rows)
    if not count:
        return 0, 0.0, 0.0
    confidence, accuracy = (sum(r[0] * r[i] for r in rows if r[0]) / count for i in (1, 2))
    return count, confidence, accuracy


def _at_first(data: Sequence[Trace]) -> list[Trace]:
    """The first few entries shown; lines of many groups hide each other."""
    shown = [*dict.fromkeys(trace["legendgroup"] for trace in data)][:AT_FIRST]
    return [{**trace, "visible": trace["legendgroup"] in shown} for trace in data]


def _layout(
    x: str, y: str, phases: Mapping[int, str] | None = None, data: Sequence[Trace] = ()
) -> dict[str, Any]:
    """Axes, with a tick for every epoch where these are few, and lines where phases begin."""
    line = {"color": "#808080", "dash": "dot", "width": 1}
    marks = phases or {}
    few = max((epoch for trace in data for epoch in trace["x"]), default=99) <= 15
    return {
        "xaxis": {"title": {"text": x}, **({"dtick": 1} if few else {})},
        "yaxis": {"title": {"text": y}},
        "shapes": [
            {
                "type": "line",
                "x0": end + 0.5,
                "x1": end + 0.5,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": line,
            }
            for end in marks
        ],
        "annotations": [
            {
                "x": end + 0.5,
                "y": 1,
                "yref": "paper",
                "yanchor": "bottom",
                "xanchor": "left",
                "showarrow": False,
                "text": html.escape(name),
            }
            for end, name in marks.items()
        ],
    }
