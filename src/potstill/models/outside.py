"""Networks of other libraries by name: timm's, torchvision's, and classifiers of the hub.

    timm:NAME[.tag]    timm's; the tag says which of its weights        pip install 'potstill[timm]'
    tv:NAME            torchvision's classifiers                      pip install 'potstill[vision]'
    hub:OWNER/REPO     a classifier of timm or transformers on the       pip install 'potstill[hub]'
                       Hugging Face hub, or a local folder like one

No code is taken from the hub: of a repository only JSON and safetensors are read.
"""

from __future__ import annotations

import json
import socket
import ssl
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from potstill.errors import NetworkError, PotstillError, StorageError, did_you_mean, first_line
from potstill.optional import require

PREFIXES = ("timm:", "tv:", "hub:")
TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer."""


@dataclass(frozen=True, eq=False)
class Outside:
    """A network from outside, and what its publishers say of it; None is not known.

    With random weights nothing but the module is known.
    """

    module: nn.Module
    mean: tuple[float, ...] | None = None
    """Of its images, in units of pixel / 255; likewise the standard deviation."""
    std: tuple[float, ...] | None = None
    input_shape: tuple[int, int, int] | None = None
    """(channels, height, width) that it was published for."""
    note: str | None = None
    """What of the published network is not kept, to be told to whoever trains it."""


def make(
    name: str, num_classes: int | None, in_channels: int = 3, pretrained: bool = False
) -> Outside:
    """A network of another library.

    `num_classes=None` keeps the published head, as a teacher must. With another number than the
    published one a pretrained network keeps all but its head, and `note` says so.

    Raises MissingExtra without the library, NetworkError for what does not exist or cannot be
    built so, StorageError for weights that cannot be fetched.
    """
    prefix, _, rest = name.partition(":")
    if f"{prefix}:" not in PREFIXES or not rest:
        raise NetworkError(f"'{name}' is none of timm:NAME, tv:NAME and hub:OWNER/REPO")
    build = {"timm": _timm, "tv": _torchvision, "hub": _hub}[prefix]
    try:
        return build(name, rest, num_classes, in_channels, pretrained)
    except PotstillError:
        raise
    except Exception as error:  # whatever another library raises
        raise _failure(name, error) from error


_WITHOUT = "give a file of them (weights=PATH), or start a student from random ones (weights=null)"


def _failure(name: str, error: Exception) -> PotstillError:
    """StorageError where a connection or a file failed, else a network that cannot be."""
    failed = _system_failure(error)
    if failed is None:
        said = textwrap.shorten(str(error), 240) or type(error).__name__
        return NetworkError(f"{name} cannot be built: {said}")
    what, instead = f"the weights of {name}", _WITHOUT
    if name.startswith("hub:"):  # without its settings there is no network either
        what, instead = name, "or give a local copy of the repository (hub:FOLDER)"
    said = failed.strerror or first_line(error)
    return StorageError(f"{what} cannot be fetched: {said}; check the connection, {instead}")


def _system_failure(error: Exception) -> OSError | None:
    """The failed connection that another library wraps in errors of its own, or a failed file."""
    found = error if isinstance(error, OSError) else None
    seen: list[BaseException] = []
    cause: Any = error
    while isinstance(cause, BaseException) and cause not in seen:
        if isinstance(cause, socket.gaierror | ConnectionError | TimeoutError | ssl.SSLError):
            found = cause
        seen.append(cause)
        reason = getattr(cause, "reason", None)  # urllib's name for a cause
        cause = cause.__cause__ or reason or cause.__context__
    return found


# --- timm -----------------------------------------------------------------------------------------


def _timm(
    name: str, rest: str, num_classes: int | None, in_channels: int, pretrained: bool
) -> Outside:
    timm: Any = require("timm", "timm", name)
    architecture = rest.partition(".")[0]
    if not timm.is_model(architecture):
        raise _no_such("timm", architecture, timm.list_models(), "timm.list_models() gives all")
    tags = timm.list_models(architecture, include_tags=True)
    if rest != architecture and rest not in tags:
        raise _no_such("timm", rest, tags, f"there are {', '.join(tags)}")
    if pretrained:
        if not timm.is_model_pretrained(rest):
            raise NetworkError(f"timm publishes no weights of {rest}; {_WITHOUT}")
        _reach(timm.get_pretrained_cfg(rest))
    return _of_timm(timm, name, rest, num_classes, in_channels, pretrained)


def _no_such(library: str, given: str, names: Iterable[str], more: str) -> NetworkError:
    return NetworkError(f"{library} has no network '{given}'{did_you_mean(given, names)}; {more}")


def _reach(published: Any) -> None:
    """Raises at once where timm, without a connection, would try again for a minute."""
    import huggingface_hub as hub

    repo = published.hf_hub_id
    try:
        if repo is not None:
            hub.snapshot_download(repo, local_files_only=True)
    except FileNotFoundError:  # not cached
        hub.HfApi().model_info(repo, timeout=TIMEOUT)


def _of_timm(
    timm: Any, name: str, source: str, num_classes: int | None, in_channels: int, pretrained: bool
) -> Outside:
    random_head = {} if pretrained or num_classes is None else {"num_classes": num_classes}
    module = timm.create_model(source, pretrained=pretrained, in_chans=in_channels, **random_head)
    said = module.pretrained_cfg
    published = said["num_classes"]
    if num_classes is None and not published:
        raise NetworkError(
            f"{name} is published without a classifier, for its features alone; as a student it "
            "can have a new one"
        )
    if not pretrained:
        return Outside(module)
    channels, *size = said["input_size"]
    shape, notes = (in_channels, size[0], size[1]), []
    if num_classes is not None and num_classes != published:
        module.reset_classifier(num_classes)  # create_model would forgive any missing weights
        notes.append(_new_head(num_classes, published))
    if channels != in_channels:
        notes.append(f"the first layer is adapted from {channels} channels to {in_channels}")
    note = f"{name}: {'; '.join(notes)}" if notes else None
    if channels != in_channels:  # timm folds or repeats weights; statistics have no such rule
        return Outside(module, None, None, shape, note)
    return Outside(module, tuple(said["mean"]), tuple(said["std"]), shape, note)


def _new_head(num_classes: int, published: int) -> str:
    theirs = f"the published one has {published}" if published else "none is published"
    return f"the head is new, with {num_classes} classes ({theirs})"


# --- torchvision ----------------------------------------------------------------------------------


def _torchvision(
    name: str, rest: str, num_classes: int | None, in_channels: int, pretrained: bool
) -> Outside:
    models: Any = require("torchvision", "vision", name).models
    known = models.list_models(module=models)
    if rest not in known:
        if rest in models.list_models():
            raise NetworkError(f"{name} does not classify images; Potstill takes those that do")
        raise _no_such("torchvision", rest, known, "torchvision.models.list_models() gives all")
    _require_channels(name, 3, in_channels)
    if not pretrained:
        arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        if rest in ("googlenet", "inception_v3"):  # no method reads their auxiliary heads
            arguments |= {"aux_logits": False, "init_weights": True}
        return Outside(models.get_model(rest, weights=None, **arguments))
    weights = models.get_model_weights(rest).DEFAULT
    module = models.get_model(rest, weights=weights)
    if rest == "inception_v3":  # torchvision drops googlenet's by itself
        module.aux_logits, module.AuxLogits = False, None
    images, published = weights.transforms(), len(weights.meta["categories"])
    note = None
    if num_classes is not None and num_classes != published:
        _replace_head(module, name, published, num_classes)
        note = f"{name}: {_new_head(num_classes, published)}"
    height, width = images.crop_size[0], images.crop_size[-1]
    return Outside(
        module, tuple(images.mean), tuple(images.std), (in_channels, height, width), note
    )


def _require_channels(name: str, own: int, given: int) -> None:
    if own != given:
        raise NetworkError(
            f"{name} takes images of {own} channels, and these have {given}; timm's networks take "
            "any number"
        )


def _head_of(module: nn.Module, classes: int) -> str | None:
    """Path of the last linear layer to so many classes."""
    found = [
        path
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == classes
    ]
    return found[-1] if found else None


def _replace_head(module: nn.Module, name: str, published: int, num_classes: int) -> None:
    path = _head_of(module, published)
    if path is None:
        raise NetworkError(
            f"{name} has no final linear layer to replace by one of {num_classes} classes; choose "
            "another network, or start from random weights (weights=null)"
        )
    old: Any = module.get_submodule(path)
    parent, _, child = path.rpartition(".")
    new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    setattr(module.get_submodule(parent), child, new)


# --- the hub --------------------------------------------------------------------------------------


def _hub(
    name: str, rest: str, num_classes: int | None, in_channels: int, pretrained: bool
) -> Outside:
    folder = Path(rest).expanduser()
    if not (folder / "config.json").is_file():
        folder = _snapshot(name, rest, pretrained)
    if not (folder / "config.json").is_file():
        raise NetworkError(f"{name} is no classifier of timm or transformers: no config.json")
    if not _complete(folder, pretrained):
        raise NetworkError(
            f"{name} has no model.safetensors, and other files of weights can run code; {_WITHOUT}"
        )
    said = _read_json(folder / "config.json")
    if "model_type" in said:
        return _of_transformers(name, folder, num_classes, in_channels, pretrained)
    if "architecture" not in said:
        raise NetworkError(
            f"{name} is no classifier of timm or transformers: its config.json names neither an "
            "architecture nor a model_type"
        )
    timm: Any = require("timm", "timm", name)
    # by folder, so that timm reads what is here and asks the hub for nothing more
    return _of_timm(timm, name, f"local-dir:{folder}", num_classes, in_channels, pretrained)


def _snapshot(name: str, repo: str, pretrained: bool) -> Path:
    """Folder with a repository's settings and weights: the local copy, or else a download."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    files = ["config.json", "preprocessor_config.json"]
    if pretrained:
        files += ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]

    def fetch(local: bool) -> Path:
        return Path(hub.snapshot_download(repo, allow_patterns=files, local_files_only=local))

    try:
        if _complete(folder := fetch(local=True), pretrained):
            return folder
    except errors.LocalEntryNotFoundError:
        pass
    try:
        hub.HfApi().model_info(repo, timeout=TIMEOUT)  # as in _reach
        return fetch(local=False)
    except errors.GatedRepoError:
        raise NetworkError(
            f"{name} is gated: ask for access on its page, then log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NetworkError(
            f"{name}: the Hugging Face hub has no model '{repo}', or it is private: log in with "
            "`hf auth login`"
        ) from None


def _complete(folder: Path, pretrained: bool) -> bool:
    """Whether the settings, and weights where they are wanted, are there."""
    weights = [folder / "model.safetensors", folder / "model.safetensors.index.json"]
    found = not pretrained or any(path.is_file() for path in weights)
    return found and (folder / "config.json").is_file()


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StorageError(f"{path} is damaged: not JSON: {first_line(error)}") from None
    if not isinstance(said, dict):
        raise StorageError(f"{path} is damaged: not a mapping")
    return said


def _of_transformers(
    name: str, folder: Path, num_classes: int | None, in_channels: int, pretrained: bool
) -> Outside:
    require("transformers.modeling_utils", "hub", name)  # the package itself imports nothing yet
    transformers: Any = require("transformers", "hub", name)
    classifiers = transformers.AutoModelForImageClassification
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not pretrained:
        if hasattr(config, "num_channels"):
            config.num_channels = in_channels
        else:
            _require_channels(name, 3, in_channels)
        if num_classes is not None:
            config.num_labels = num_classes
        return Outside(classifiers.from_config(config, trust_remote_code=False).float())
    _require_channels(name, getattr(config, "num_channels", 3), in_channels)
    module, report = classifiers.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    module.float()  # published in half precision, some of them
    published = config.num_labels
    lacking = sorted(report["missing_keys"])  # transformers draws these at random
    head = _head_of(module, published)
    if lacking and (num_classes is None or not all(k.startswith(f"{head}.") for k in lacking)):
        raise NetworkError(
            f"{name} has no weights for {', '.join(lacking[:4])}; a teacher needs all of them, a "
            "student all but its head's"
        )
    note = None
    if num_classes is not None and (lacking or num_classes != published):
        _replace_head(module, name, published, num_classes)
        module.config.num_labels = num_classes
        note = f"{name}: {_new_head(num_classes, 0 if lacking else published)}"
    mean, std, size = _preprocessing(name, folder, in_channels)
    return Outside(module, mean, std, (in_channels, *size) if size else None, note)


def _preprocessing(
    name: str, folder: Path, channels: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, tuple[int, int] | None]:
    """(mean, std) in units of pixel / 255 and (height, width), from preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None, None, None
    said = _read_json(path)
    if said.get("do_flip_channel_order"):
        raise NetworkError(f"{name} takes its colours as blue, green, red, which is not supported")
    cropped = said.get("crop_size") if said.get("do_center_crop", True) else None
    size = _height_and_width(cropped or said.get("size"))
    means, stds = said.get("image_mean"), said.get("image_std")
    if not said.get("do_normalize", True):
        means, stds = [0.0] * channels, [1.0] * channels
    if not isinstance(means, list) or not isinstance(stds, list):
        return None, None, size
    # what it normalises are pixels times this factor
    factor = 255 * said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 255
    return tuple(m / factor for m in means), tuple(s / factor for s in stds), size


def _height_and_width(size: Any) -> tuple[int, int] | None:
    """ "size" as transformers writes it: a side, {"shortest_edge"}, or {"height", "width"}."""
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        height, width = size.get("height", side), size.get("width", side)
    else:
        height = width = size
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None
