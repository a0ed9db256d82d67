"""Recipes: YAML and overrides into a checked `Recipe`, every fault at once.

    text -> plain mappings -> shorthand expanded -> overrides -> checked -> Recipe

Reading a recipe builds no network, reads no data and runs no code. Whether taps exist and class
counts fit is found out when the networks are built.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializeAsAny,
    Strict,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from potstill import strict_yaml
from potstill.errors import RecipeError, StorageError, did_you_mean

if TYPE_CHECKING:
    from potstill.method import Method  # loads torch

SHARED = "shared"
"""The key of an epochs mapping whose number all phases share before the named ones replace it."""

ELSEWHERE = ("device", "data.root", "data.workers", "store.root", "store.gb")
"""Keys that say where a training is carried out; it is the same one there."""

_FOLDER = Path(__file__).parent / "recipes"
_SUFFIXES = (".yaml", ".yml")
_OWN_CODE = "py:"  # begins the name of a network that a function of one's own makes
PRETRAINED = "pretrained"
"""In place of a checkpoint's path: the weights that another library publishes."""
_PLAIN = "plain"  # the type of a validation error whose message is already ours

Count = Annotated[int, Ge(1)]
Epochs = Count | dict[str, Count]


def _plain(message: str) -> PydanticCustomError:
    return PydanticCustomError(_PLAIN, message)


class Part(BaseModel):
    """A mapping of a recipe: strict types, no unknown keys, faults in plain words."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    @model_validator(mode="wrap")
    @classmethod
    def _in_plain_words(cls, value: Any, handler: ModelWrapValidatorHandler[Part]) -> Part:
        try:
            return handler(value)
        except ValidationError as error:
            faults = [_reworded(cls, e["type"], e["loc"], e["msg"], value) for e in error.errors()]
            raise ValidationError.from_exception_data(cls.__name__, faults) from None


class Normalization(Part):
    """Statistics of the images that a network was trained on, in units of pixel / 255."""

    mean: list[float]
    std: list[Annotated[float, Gt(0)]]

    @model_validator(mode="after")
    def _one_per_channel(self) -> Normalization:
        _same_channels(self.mean, self.std)
        return self


def _network_name(name: str, info: ValidationInfo) -> str:
    from potstill.models import MODELS, is_name

    if name.startswith(_OWN_CODE) and not (info.context or {}).get("allow_code"):
        raise _plain(
            f"is {_show(name)}, which runs Python code of your own; add --allow-code if you trust "
            "it (in Python, allow_code=True)"
        )
    run = name.rpartition(":")[0]  # of RUN:student1
    finished = (info.context or {}).get("finished")  # its files may have been moved since
    if is_name(name) or os.path.exists(name) or os.path.isdir(run) or finished:
        return name
    raise _plain(
        f"is {_show(name)}, which is no model and no file{did_you_mean(name, MODELS) or ';'} "
        "allowed: what `potstill list models` shows, timm:NAME, tv:NAME, hub:OWNER/REPO, "
        "py:module:function, or a path"
    )


class Stochastic(Part):
    """Stochastic depth: blocks of a network that are dropped at random, other ones every time."""

    p_end: Annotated[float, Gt(0), Le(1)]
    """Probability that the last block survives; those before it fall to it linearly from 1."""
    scope: Literal["full", "identity_only", "last_half"] = "full"
    """Which blocks may be dropped: all, those that keep their input's shape, or the last half."""
    draw: Literal["batch", "image", "never"] = "batch"
    """A sub-network for every batch, for every image, or the expected depth throughout."""


def _distinct(classes: list[int]) -> list[int]:
    if twice := sorted({c for c in classes if classes.count(c) > 1}):
        raise _plain(f"names class {twice[0]} more than once")
    if not classes:
        raise _plain("is empty; name at least one class, or write null for all")
    return classes


class Network(Part):
    """A student or a teacher. A bare string is short for its name."""

    name: Annotated[str, AfterValidator(_network_name)]
    """An architecture (resnet20), timm:NAME, tv:NAME or hub:OWNER/REPO of other libraries,
    py:module:function of your own, or a checkpoint's path."""
    weights: str | None = None
    """Path of a checkpoint, or `pretrained` for the published weights of a timm:, tv: or hub:
    network, which a teacher of that kind has anyway; null starts from random weights."""
    normalize: Normalization | None = None
    """Only where the network was trained on other statistics than the data's mean and std."""
    classes: Annotated[list[Annotated[int, Ge(0)]], AfterValidator(_distinct)] | None = None
    """Original ids of its classes, in label order, where the weights do not say them."""
    stochastic: Stochastic | None = None
    """Null: all blocks are always there, but for weights of a network that was trained so."""

    @model_validator(mode="after")
    def _published_somewhere(self) -> Network:
        from potstill.models.outside import PREFIXES

        if self.weights == PRETRAINED and not self.name.startswith(PREFIXES):
            raise _plain(
                f"has weights={PRETRAINED}, but {_show(self.name)} is not published with weights; "
                "give the path of a checkpoint, or a timm:, tv: or hub: network"
            )
        return self


def _dataset_name(name: str, info: ValidationInfo) -> str:
    from potstill.data import DATASETS

    own = name.startswith(_OWN_CODE) and (info.context or {}).get(
        "allow_code"
    )  # of potstill.distill
    if name not in DATASETS and not own:
        raise _plain(_unknown(name, "data set", DATASETS))
    return name


class Data(Part):
    """What is trained on. Null everywhere means the data set's own default."""

    name: Annotated[str, AfterValidator(_dataset_name)]
    root: str | None = None
    """Folder of the files."""
    batch_size: Count = 64
    """Images per step, over all ranks."""
    views: Count | None = None
    """Augmentations in each image's pool; null draws afresh in every epoch."""
    validation: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the training images that is held out and evaluated in place of the test set."""
    classes: Annotated[list[Annotated[int, Ge(0)]], AfterValidator(_distinct)] | None = None
    """Original ids; null: all."""
    overlap: Annotated[float, Ge(0), Le(1)] | None = None
    """In place of classes: half of them, of which this share is in the half that 1.0 stands for."""
    subset: Count | None = None
    """Training images to use; null: all."""
    padding: Annotated[int, Ge(0)] | None = None
    """Pixels on each side before the random crop."""
    pad_mode: Literal["zero", "reflect"] | None = None
    flip: bool | None = None
    mean: list[float] | None = None
    """Per channel, in units of pixel / 255; likewise std."""
    std: list[Annotated[float, Gt(0)]] | None = None
    image_size: Count | None = None
    """Pixels on each side."""
    workers: Annotated[int, Ge(0)] | None = None
    drop_last: bool = False
    """Leave out an epoch's last batch where it is smaller than the others."""

    @model_validator(mode="after")
    def _one_per_channel(self) -> Data:
        if (self.mean is None) != (self.std is None):
            given, missing = ("mean", "std") if self.std is None else ("std", "mean")
            raise _plain(f"sets {given} but not {missing}; give both or neither")
        _same_channels(self.mean or [], self.std or [])
        return self

    @model_validator(mode="after")
    def _one_choice_of_classes(self) -> Data:
        if self.classes is not None and self.overlap is not None:
            raise _plain("sets both classes and overlap, which choose the classes; give one")
        return self


def _same_channels(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != len(std):
        raise _plain(
            f"gives {len(mean)} numbers for mean and {len(std)} for std; one per channel in both"
        )


class Choice(Part):
    """A named method, optimiser or schedule; the arguments of what is named are its other keys."""

    name: str


def _choose(kind: str, value: Any) -> Any:
    """The value, checked against the signature of what its name stands for."""
    if isinstance(value, Choice):
        return value
    if not isinstance(value, dict):
        raise _plain(f"must be a name or a mapping such as {{name: ...}}, not {_show(value)}")
    allowed = _choices(kind)
    name = value.get("name")
    if name not in [*allowed]:
        message = (
            _unknown(name, kind, allowed)
            if isinstance(name, str)
            else f"is missing; allowed: {', '.join(allowed)}"
            if name is None
            else f"must be text, not {_show(name)}"
        )
        fault = InitErrorDetails(type=_plain(message), loc=("name",), input=value)
        raise ValidationError.from_exception_data(kind, [fault])
    return _choice_model(kind, name).model_validate(value)


class Optimizer(Choice):
    """How one update's parameters are moved; its other keys are the optimiser's arguments."""

    warmup: Annotated[float, Ge(0)] = 0.0
    """Epochs of linear rise to the schedule's rate."""
    fresh_at_milestones: bool = False
    """Drop the optimiser's state at each milestone."""
    schedule: Annotated[SerializeAsAny[Choice], BeforeValidator(partial(_choose, "schedule"))] = (
        Choice(name="constant")
    )

    @model_validator(mode="after")
    def _consistent(self) -> Optimizer:
        if self.fresh_at_milestones and self.schedule.name != "steps":
            raise _plain(
                f"sets fresh_at_milestones, but schedule {self.schedule.name} has no milestones; "
                "use schedule steps"
            )
        if getattr(self, "nesterov", False) and not getattr(self, "momentum", 1):
            raise _plain("sets nesterov, which needs a momentum above 0")
        return self


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise _plain(f"must be auto, cpu, cuda or cuda:N (cuda:0, cuda:1 ...), not {_show(name)}")
    return name


def _some(optimizers: dict[str, Optimizer]) -> dict[str, Optimizer]:
    if not optimizers:
        raise _plain("is empty; give at least one, such as optimizers.default={name: sgd, lr: 0.1}")
    return optimizers


class Store(Part):
    """Teachers' outputs, kept on the disk and read by every later run that needs the same ones."""

    root: str | None = None
    """Folder; null: the folder teachers below POTSTILL_CACHE."""
    top_k: Count | None = None
    """Logits kept of each image, with the mass of the others; null: all."""
    bits: Literal[16, 32] = 16
    """Of each number. What was computed in half precision is kept as it is by 16."""
    gb: Annotated[float, Gt(0)] = 20.0
    """What the outputs that a training needs may take on the disk."""


class Recipe(Part):
    """Everything that determines a training."""

    students: list[Network]
    teachers: list[Network] = []
    method: Annotated[SerializeAsAny[Choice], BeforeValidator(partial(_choose, "method"))]
    """The method's name and the arguments of its constructor."""
    data: Data
    optimizers: Annotated[
        dict[
            str,
            Annotated[SerializeAsAny[Optimizer], BeforeValidator(partial(_choose, "optimizer"))],
        ],
        AfterValidator(_some),
    ]
    """By the update they carry out: its name, or phase.update, or default for all others."""
    epochs: Epochs | None = None
    """A number that all phases share, or a number by phase; null: the method's published lengths.
    """
    schedule_epochs: Epochs | None = None
    """The epochs that milestones and warm-ups are counted in; null: this file's epochs, whatever
    an override makes of them."""
    seed: Annotated[int, Ge(0)] = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the device has it, unless the method differentiates images."""
    store: Store | None = None
    """Whether teachers' outputs are kept and read: true, false, or a mapping."""
    compile: bool | Literal["teachers"] = False
    """Whether networks are compiled: true, false, or the teachers alone."""
    channels_last: bool = True
    evaluate_every: Count = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto, cpu, cuda or cuda:N."""

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What resolving the recipe decided that a reader may not expect; not part of the YAML."""
        return self._notes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_yaml() == other.to_yaml()

    def to_yaml(self) -> str:
        """Text that loads to an equal recipe."""
        return yaml.dump(
            self.model_dump(mode="json"),
            Dumper=strict_yaml.Dumper,
            sort_keys=False,
            default_flow_style=None,
            allow_unicode=True,
            width=100,
        )


def load(recipe: str | Path, overrides: Sequence[str] = (), *, allow_code: bool = False) -> Recipe:
    """A shipped recipe by name, or one in a .yaml file, with `key.sub=value` overrides.

    Raises RecipeError with every fault, StorageError for a file that cannot be read.
    """
    return loads(text_of(recipe), overrides, source=str(recipe), allow_code=allow_code)


def loads(
    text: str,
    overrides: Sequence[str] = (),
    *,
    source: str = "recipe",
    allow_code: bool = False,
    finished: bool = False,
) -> Recipe:
    """A recipe from YAML text; `source` is what errors call it. Raises RecipeError.

    `finished`: of a run that is done, so that the files it names need not be there any more.
    """
    raw, faults = strict_yaml.parse(text)
    if raw is None and not faults:
        faults = ["the recipe is empty; 'potstill list recipes' names some to start from"]
    elif not isinstance(raw, dict) and not faults:
        faults = [f"the recipe must be a mapping of keys to values, not {_show(raw)}"]
    if not isinstance(raw, dict):
        raise RecipeError(faults, source)
    context = {"allow_code": allow_code, "finished": finished}
    return _resolve(raw, overrides, source, context, faults)


def resolve(
    raw: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    source: str = "recipe",
    allow_code: bool = False,
) -> Recipe:
    """A recipe from mappings, lists and scalars, as YAML would hold them. Raises RecipeError.

    >>> resolve({"students": ["resnet8"], "method": "vanilla", "data": "digits",
    ...          "optimizers": {"default": {"name": "sgd", "lr": 0.1}}}, ["epochs=3"]).epochs
    3
    """
    try:
        text = yaml.dump(dict(raw), Dumper=strict_yaml.Dumper, sort_keys=False)
    except yaml.representer.RepresenterError as error:
        raise RecipeError(
            [
                f"{error.args[1]!r} cannot be in a recipe; allowed: text, numbers, true, false, "
                "null, lists and mappings"
            ],
            source,
        ) from None
    return loads(text, overrides, source=source, allow_code=allow_code)


def shipped() -> dict[str, str]:
    """Every recipe that comes with Potstill: its name, and its first line's description."""
    files = {f.relative_to(_FOLDER).with_suffix("").as_posix(): f for f in _FOLDER.rglob("*.yaml")}
    return {
        name: files[name].read_text("utf-8").partition("\n")[0].lstrip("# ")
        for name in sorted(files)
    }


def phase_epochs(
    published: Mapping[str, int],
    epochs: int | Mapping[str, int] | None,
    key: str = "epochs",
) -> dict[str, int]:
    """Epochs of each phase, from their published lengths and a recipe's `epochs` (`key` in errors).

    A number is shared in proportion to the published lengths, the largest remainders rounded up,
    so that the total is exact and no phase is left without an epoch. A mapping sets the phases it
    names; the others keep their published length, or their share of its number under "shared".
    Raises RecipeError for a phase that does not exist and for fewer epochs than phases.

    >>> phase_epochs({"init": 40, "distill": 240}, 10)
    {'init': 1, 'distill': 9}
    """
    if epochs is None:
        return dict(published)
    named = {SHARED: epochs} if isinstance(epochs, int) else dict(epochs)
    total = named.pop(SHARED, None)
    phases = ", ".join(published)
    faults = [
        f"{key}.{phase} is no phase of this method{_allowed(phase, published)}"
        for phase in named
        if phase not in published
    ]
    if total is not None and total < len(published):
        faults.append(
            f"{key} is {total}, but the method has {len(published)} phases ({phases}) and each "
            f"needs an epoch; give {len(published)} or more"
        )
    if faults:
        raise RecipeError(faults)
    return (dict(published) if total is None else _share(published, total)) | named


def _share(published: Mapping[str, int], total: int) -> dict[str, int]:
    whole = sum(published.values())
    parts = {phase: divmod(total * length, whole) for phase, length in published.items()}
    epochs = {phase: quotient for phase, (quotient, _) in parts.items()}
    by_remainder = sorted(parts, key=lambda phase: -parts[phase][1])
    for phase in by_remainder[: total - sum(epochs.values())]:
        epochs[phase] += 1
    for phase in [p for p in epochs if epochs[p] == 0]:
        epochs[max(epochs, key=epochs.__getitem__)] -= 1
        epochs[phase] = 1
    return epochs


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, with every method's, optimiser's and schedule's arguments."""

    def any_of(kind: str, **fields: Any) -> Any:
        models = []
        for name in _choices(kind):
            fields["name"] = (Literal[name], ...)
            base = _choice_model(kind, name)
            models.append(
                create_model(f"{kind}_{name}", __base__=base, __doc__=base.__doc__, **fields)
            )
        union: Any = Union[tuple(models)]  # noqa: UP007  # of a number known at run time only
        return str | Annotated[union, Field(discriminator="name")]

    schedule = any_of("schedule")
    optimizer = any_of("optimizer", schedule=(schedule, "constant"))
    fields: dict[str, Any] = {
        "students": (list[str | Network], ...),
        "teachers": (list[str | Network], []),
        "data": (str | Data, ...),
        "method": (any_of("method"), ...),
        "optimizers": (types.GenericAlias(dict, (str, optimizer)), ...),
    }
    return create_model("Recipe", __base__=Recipe, **fields).model_json_schema()


# --- what a name stands for


def _choices(kind: str) -> Mapping[str, Callable[..., Any]]:
    """The registry of a kind of choice; here, so that importing recipes does not import torch."""
    if kind == "method":
        from potstill.methods import METHODS

        return METHODS
    from potstill.optim import OPTIMIZERS, SCHEDULES

    return OPTIMIZERS if kind == "optimizer" else SCHEDULES


def _ascending(milestones: list[float]) -> list[float]:
    if any(b <= a for a, b in pairwise(milestones)):
        raise _plain(f"must be in ascending order, each once, not {_show(milestones)}")
    return milestones


_BELOW_ONE = (Ge(0), Lt(1))
_LIMITS: Mapping[str, Mapping[str, Sequence[Any]]] = {  # what a signature's types do not say
    "method": {"temperature": (Gt(0),), "bandwidth": (Gt(0),), "margin": (Gt(0),)},
    "optimizer": {
        "lr": (Gt(0),),
        "momentum": _BELOW_ONE,
        "betas": _BELOW_ONE,
        "eps": (Gt(0),),
        "weight_decay": (Ge(0),),
    },
    "schedule": {
        "milestones": (Gt(0),),
        "factor": (Gt(0),),
        "rise": _BELOW_ONE,
        "start": (Ge(0),),
        "final": (Ge(0),),
    },
}


def _choice_model(kind: str, name: str) -> type[Choice]:
    return _signature_model(kind, name, _choices(kind)[name])


@cache
def _signature_model(kind: str, name: str, target: Callable[..., Any]) -> type[Choice]:
    """A model of the arguments that a recipe may give to a method, optimiser or schedule."""
    function = target.__init__ if inspect.isclass(target) else target
    hints = get_type_hints(function, include_extras=True)
    given_elsewhere = ("self", "students", "teachers", "data", "parameters")
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        key, default = parameter.name, parameter.default
        if key in given_elsewhere or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        hint = _as_yaml(hints[key], _LIMITS[kind].get(key, ()))
        if key == "milestones":
            hint = Annotated[hint, AfterValidator(_ascending)]
        if get_origin(_bare(hint)) is not tuple and isinstance(default, tuple):
            default = list(default)
        fields[key] = (hint, ... if default is parameter.empty else default)
    base = Optimizer if kind == "optimizer" else Choice
    return create_model(name, __base__=base, __doc__=inspect.getdoc(target), **fields)


def _as_yaml(hint: Any, limits: Sequence[Any]) -> Any:
    """A Python type as YAML writes it: sequences are lists, numbers are within limits."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[(_as_yaml(inner[0], limits), *inner[1:])]
    parts = tuple(_as_yaml(a, limits) for a in inner if a is not Ellipsis)
    if origin in (Union, types.UnionType):
        return Union[parts]  # noqa: UP007
    if origin in (list, Sequence) or (origin is tuple and inner[-1] is Ellipsis):
        return list[parts]  # type: ignore[valid-type]
    if origin is tuple:
        return Annotated[tuple[parts], Strict(False)]  # type: ignore[valid-type]
    return Annotated[(hint, *limits)] if hint in (int, float) and limits else hint


# --- faults in plain words


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown(name: str, kind: str, allowed: Iterable[str]) -> str:
    return f"is {_show(name)}, which is no {kind}{_allowed(name, allowed)}"


def _allowed(given: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{did_you_mean(given, names) or ';'} allowed: {', '.join(names)}"


def _reworded(
    model: type[Part], kind: str, loc: tuple[int | str, ...], message: str, value: Any
) -> InitErrorDetails:
    """A pydantic error in words that name what was given and what is allowed."""
    if kind != _PLAIN:
        loc, message = _in_words(model, kind, loc, value)
    return InitErrorDetails(type=_plain(message), loc=loc, input=value)


def _in_words(
    model: type[Part], kind: str, loc: tuple[int | str, ...], value: Any
) -> tuple[tuple[int | str, ...], str]:
    fields = model.model_fields
    if not loc:
        return loc, f"must be {_describe(model)}, not {_show(value)}"
    key = str(loc[0])
    if kind == "extra_forbidden":
        return loc, f"is unknown{_allowed(key, fields)}"
    field = fields[key]
    hint: Any = (
        Annotated[(field.annotation, *field.metadata)] if field.metadata else (field.annotation)
    )
    if kind == "missing" and len(loc) == 1:
        return loc, f"is missing; give {_describe(hint)}"
    if kind == "missing":
        loc = loc[:-1]  # a list that is too short
    depth, given = 1, value[key]
    for step in loc[1:]:
        options = [o for o in _options(hint) if o is not type(None)]
        origin, inner = get_origin(_bare(options[0])), get_args(_bare(options[0]))
        if len(options) > 1 or origin not in (list, dict, tuple):
            break  # which of several types was meant cannot be told: describe them all
        hint = inner[int(step)] if origin is tuple else inner[-1]
        depth, given = depth + 1, given[step]
    return loc[:depth], f"must be {_describe(hint)}, not {_show(given)}"


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _options(hint: Any) -> tuple[Any, ...]:
    hint = _bare(hint)
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _describe(hint: Any) -> str:
    """A type for a person: "a number (above 0), or null"."""
    limits = [*get_args(hint)[1:]] if get_origin(hint) is Annotated else []
    options = _options(hint)
    if len(options) > 1:
        *first, last = [_describe(o) for o in options]
        return f"{', '.join(first)}, or {last}"
    (bare,) = options
    origin, inner = get_origin(bare), get_args(bare)
    if get_origin(bare) is Annotated:
        return _describe(bare)
    if origin is Literal:
        *first, last = map(str, inner)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is list:
        return f"a list whose entries are each {_describe(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)} entries that are each {_describe(inner[0])}"
    if origin is dict:
        return f"a mapping whose values are each {_describe(inner[1])}"
    if inspect.isclass(bare) and issubclass(bare, Part):
        if "name" in bare.model_fields:
            return "a name or a mapping such as {name: ...}"
        return f"a mapping such as {{{', '.join(f'{k}: ...' for k in bare.model_fields)}}}"
    words = [
        f"{word} {getattr(limit, attribute)}"
        for limit in limits
        for attribute, word in _LIMIT_WORDS
        if hasattr(limit, attribute)
    ]
    noun = _NOUNS.get(bare, str(bare))
    return f"{noun} ({', '.join(words)})" if words else noun


_LIMIT_WORDS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))
_NOUNS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def text_of(recipe: str | Path) -> str:
    """The text of a shipped recipe or of a file."""
    name, known = str(recipe), shipped()
    path = Path(recipe)
    if name in known and not isinstance(recipe, Path):
        path = _FOLDER / f"{name}.yaml"
    elif not os.path.isfile(recipe):  # which does not raise for a name that is too long
        hint = did_you_mean(name.removesuffix(".yaml").removesuffix(".yml"), known)
        if os.path.isdir(recipe) and not hint:
            raise StorageError(f"recipe {name} is a folder; give a .yaml file, such as recipe.yaml")
        if isinstance(recipe, Path) or name.endswith(_SUFFIXES) or name.startswith((".", "/", "~")):
            raise StorageError(
                f"recipe {name}: no such file{hint or ';'} check the path, or give a name that "
                "'potstill list recipes' shows"
            )
        raise RecipeError(
            [
                f"no recipe is named {_show(name)}{_allowed(name, known)}, or the path of a .yaml "
                "file"
            ]
        )
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise StorageError(f"recipe {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise RecipeError(["the file is not UTF-8 text"], name) from None


# --- from plain mappings to a recipe


def _resolve(
    raw: dict[str, Any],
    overrides: Sequence[str],
    source: str,
    context: Mapping[str, bool],
    faults: list[str],
) -> Recipe:
    raw = _expanded(raw)
    original = copy.deepcopy(raw)
    given = []
    for override in overrides:
        if path := _override(raw, override, faults):
            given.append(path)
            raw = _expanded(raw)  # the next override may reach into this one's value
    notes = [*_replaced(raw, original, given), *_drop_what_no_longer_fits(raw, original, given)]
    notes += _drop_optimizers(raw, original, given)
    derived = raw.get("schedule_epochs") is None
    if derived:
        # {} is "the published lengths", said so that a second loading does not take them anew
        # from an `epochs` that was overridden.
        epochs = original.get("epochs")
        raw["schedule_epochs"] = {} if epochs is None else epochs
    try:
        recipe = Recipe.model_validate(raw, context=dict(context))
    except ValidationError as error:
        for e in error.errors():
            loc = e["loc"]
            if derived and loc[:1] == ("schedule_epochs",):
                loc = ("epochs", *loc[1:])
            faults.append(f"{'.'.join(map(str, loc)) or 'the recipe'} {e['msg']}")
    faults.extend(_network_faults(raw))
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)), source)
    if faults := _phase_faults(recipe):
        raise RecipeError(faults, source)
    recipe, added = _with_published_optimizers(recipe)
    recipe.notes.extend([*notes, *added, *_never_reached(recipe)])
    return recipe


def _with_published_optimizers(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with the optimisers that its method was published with and it does not name."""
    wanted = _method(recipe.method.name).published_optimizers
    there = {key.rpartition(".")[2] for key in recipe.optimizers}
    missing = [update for update in wanted if update not in there]
    if not missing:
        return recipe, []
    (*_, published), (*_, length) = (
        phase_epochs(lengths(recipe), epochs).values() for epochs in (None, recipe.schedule_epochs)
    )
    made, notes = {}, []
    for update in missing:
        plan = dict(wanted[update])
        if "milestones" in (schedule := plan.get("schedule", {})):
            milestones = [m * length / published for m in schedule["milestones"]]
            plan["schedule"] = {**schedule, "milestones": milestones}
        made[update] = _choose("optimizer", plan)
        notes.append(
            f"optimizers.{update} is not given: {recipe.method.name}'s published {plan['name']}, "
            f"lr {plan['lr']:g}"
        )
    return recipe.model_copy(update={"optimizers": {**recipe.optimizers, **made}}), notes


def _expanded(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe with {name: x} for each bare x that names something."""

    def named(value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def optimizer(value: Any) -> Any:
        value = named(value)
        if isinstance(value, dict) and "schedule" in value:
            return {**value, "schedule": named(value["schedule"])}
        return value

    raw = dict(raw)
    for key in ("method", "data"):
        if key in raw:
            raw[key] = named(raw[key])
    for key in ("students", "teachers"):
        if isinstance(raw.get(key), list):
            raw[key] = [named(v) for v in raw[key]]
    if isinstance(raw.get("store"), bool):
        raw["store"] = {} if raw["store"] else None
    if isinstance(raw.get("optimizers"), dict):
        raw["optimizers"] = {k: optimizer(v) for k, v in raw["optimizers"].items()}
    return raw


_Path = tuple[str | int, ...]


def _override(raw: dict[str, Any], override: str, faults: list[str]) -> _Path | None:
    """Carry out `key.sub=value`; the path it set, None where it cannot be carried out."""
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals:
        faults.append(f"override {_show(override)} has no =; write key=value, such as epochs=10")
        return None
    if not all(parts):
        what = "an empty part in its key" if key else "no key"
        faults.append(f"override {_show(override)} has {what}; write key=value, such as epochs=10")
        return None
    value, wrong = strict_yaml.parse(text)
    if wrong:
        faults.extend(f"override {key}={text}: {w}" for w in wrong)
        return None
    try:
        return _set(raw, parts, value)
    except LookupError as error:
        faults.append(f"override {key}: {error.args[0]}")
        return None


def _set(root: dict[str, Any], parts: list[str], value: Any) -> _Path:
    """Set the value at a dotted key; mappings that are null or absent are made on the way."""
    node: Any = root
    path: _Path = ()
    while True:
        here = ".".join(map(str, path))
        head: str | int
        if isinstance(node, list):
            head, parts = _entry(node, here, parts[0]), parts[1:]
        elif isinstance(node, dict):
            # The key of an optimiser may itself have a dot: "phase.update".
            size = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node), 1)
            head, parts = ".".join(parts[:size]), parts[size:]
        else:
            raise LookupError(f"{here} is {_show(node)}, which has no keys below it")
        path = (*path, head)
        if not parts:
            node[head] = value
            return path
        if isinstance(node, dict) and node.get(head) is None:
            node[head] = {}
        if path in (("epochs",), ("schedule_epochs",)) and type(node[head]) is int:
            node[head] = {SHARED: node[head]}
        node = node[head]


def _entry(node: list[Any], here: str, part: str) -> int:
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    count = len(node)
    if count == 0:
        raise LookupError(f"{here} is empty, so there is no {here}.{part}; set {here}=[...] whole")
    entries = f"entries 0 to {count - 1}" if count > 1 else "only entry 0"
    raise LookupError(f"{here} has no entry {part}; it has {entries}")


def _drop_what_no_longer_fits(
    raw: dict[str, Any], original: dict[str, Any], given: Sequence[_Path]
) -> list[str]:
    """Drop the file's arguments of what an override replaced by another; notes that say so.

    An argument that an override gave stays, and is a fault where it does not fit.
    """
    places: list[tuple[str, _Path]] = [("method", ("method",))]
    for update in raw["optimizers"] if isinstance(raw.get("optimizers"), dict) else ():
        places.append(("optimizer", ("optimizers", update)))
        places.append(("schedule", ("optimizers", update, "schedule")))
    notes = []
    for kind, path in places:
        new, old = _at(raw, path), _at(original, path)
        if (
            not isinstance(new, dict)
            or not isinstance(old, dict)
            or any(path[: len(g)] == g for g in given)
        ):
            continue
        name = new.get("name")
        if name == old.get("name") or name not in [*_choices(kind)]:
            continue
        fields = _choice_model(kind, name).model_fields
        overridden = {g[len(path)] for g in given if g[: len(path)] == path}
        kept = [k for k in new if k in old and k not in overridden]
        base = Optimizer if kind == "optimizer" else Choice
        known = old.get("name") in [*_choices(kind)]
        before = _choice_model(kind, old["name"]).model_fields if known else kept
        dropped = [k for k in kept if k not in fields and k in before]  # not the file's typos
        stays = [k for k in kept if k in fields and k not in base.model_fields]
        for k in dropped:
            del new[k]
        said = f"{'.'.join(map(str, path))}.name={name}"
        if dropped:
            notes.append(f"{said} drops {', '.join(dropped)}, which {name} does not take")
        kept_words = [
            f"{k} {_show(new[k])}"
            + ("" if fields[k].is_required() else f" (default of {name}: {fields[k].default})")
            for k in stays
            if new[k] != fields[k].default
        ]
        if kept_words:
            notes.append(f"{said} keeps the recipe's {', '.join(kept_words)}")
    return notes


def _drop_optimizers(
    raw: dict[str, Any], original: dict[str, Any], given: Sequence[_Path]
) -> list[str]:
    """Drop the file's optimisers for updates of a method that an override replaced; the notes."""
    old, new = (_at(r, ("method", "name")) for r in (original, raw))
    if old == new or not all(isinstance(n, str) and n in _choices("method") for n in (old, new)):
        return []
    there = _at(raw, ("optimizers",))
    gone = _method(old).published_optimizers.keys() - _method(new).published_optimizers
    stale = [
        key
        for key in (there if isinstance(there, dict) else ())
        if key.rpartition(".")[2] in gone  # "update", or "phase.update"
        and not any(path[:2] == ("optimizers", key) for path in given)
    ]
    for key in stale:
        del there[key]
    return [f"method.name={new} drops optimizers.{k}, which it has no use for" for k in stale]


def _replaced(raw: dict[str, Any], original: dict[str, Any], given: Sequence[_Path]) -> list[str]:
    """Notes on what the file said in mappings that an override replaced as a whole."""
    notes = []
    for path in given:
        new, old = _at(raw, path), _at(original, path)
        if isinstance(new, dict) and isinstance(old, dict):
            key = ".".join(map(str, path))
            if gone := [f"{k} {_show(v)}" for k, v in old.items() if k not in new]:
                notes.append(
                    f"{key}=... replaces all of {key}, with the recipe's {', '.join(gone)}"
                )
    return notes


def _never_reached(recipe: Recipe) -> list[str]:
    """Notes on milestones beyond the phases that they are counted in, where these share a number.

    A length that is named by phase was meant.
    """
    if not isinstance(recipe.schedule_epochs, int):
        return []
    length = max(phase_epochs(lengths(recipe), recipe.schedule_epochs).values())
    return [
        f"optimizers.{update}.schedule.milestones: {', '.join(f'{m:g}' for m in beyond)} of "
        f"{length} epochs is never reached"
        for update, optimizer in recipe.optimizers.items()
        if (beyond := [m for m in getattr(optimizer.schedule, "milestones", []) if m >= length])
    ]


def _phase_faults(recipe: Recipe) -> list[str]:
    for key, epochs in (("epochs", recipe.epochs), ("schedule_epochs", recipe.schedule_epochs)):
        try:
            phase_epochs(lengths(recipe), epochs, key)
        except RecipeError as error:
            return list(error.faults)  # the second is made of the first unless it is given
    return []


def lengths(recipe: Recipe) -> Mapping[str, int]:
    """Published length of each phase of a recipe's method, in epochs."""
    return _method(recipe.method.name).lengths


def _method(name: str) -> type[Method]:
    from potstill.methods import METHODS

    return METHODS[name]


def _at(root: Any, path: _Path) -> Any:
    for part in path:
        root = root.get(part) if isinstance(root, dict) else None
    return root


def _network_faults(raw: Mapping[str, Any]) -> list[str]:
    """How many students and teachers the method wants, and teachers without weights.

    On plain mappings, so that these are reported together with whatever else is wrong.
    """
    from potstill.method import wrong_count
    from potstill.methods import METHODS
    from potstill.models import MODELS

    faults = []
    name = _at(raw, ("method", "name"))
    method = METHODS.get(name) if isinstance(name, str) else None
    teachers = raw.get("teachers", [])
    if method is not None:
        for role, (low, high) in (
            ("student", method.students_needed),
            ("teacher", method.teachers_needed),
        ):
            key = f"{role}s"
            networks = raw.get(key, [] if key == "teachers" else None)
            if isinstance(networks, list) and (
                fault := wrong_count(role, len(networks), low, high)
            ):
                instead = f" ({key}=[])" if high == 0 else ""
                faults.append(f"{key}: method {name} {fault}{instead}")
        if method.teachers_needed[1] == 0:
            return faults
    for i, teacher in enumerate(teachers if isinstance(teachers, list) else ()):
        if (
            isinstance(teacher, dict)
            and teacher.get("weights") is None
            and teacher.get("name") in [*MODELS]
        ):
            key = f"teachers.{i}.weights"
            faults.append(f"{key} is null: give the teacher's weights, {key}=PATH")
    return faults
