"""Finds the folder of a model and checks that it is whole, before anything heavy is imported."""

import atexit
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from data_prep.errors import DataError


def find_model_folder(name: str, *, revision: str | None = None, with_weights: bool = True) -> Path:
    """The local folder of a model named by path, hub name, or `package:NAME` (a folder inside a Python package).

    Raises DataError naming the missing file and how to get it.
    """
    if name.startswith("package:"):
        folder = package_folder(name)
    elif Path(name).exists() or name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise DataError(f"model folder not found: {name} - no such folder - give a Hugging Face model folder")
    else:
        folder = _hub_folder(name, revision, with_weights)
    config = read_model_config(folder)
    del config
    if with_weights:
        check_weights(folder)
    return folder


def keep_code_out_of_home() -> None:
    """Has transformers copy code that comes with models to a temporary folder, unless HF_HOME or the like names one.

    It would choose the home folder, which can be read-only. Call this before transformers is imported.
    """
    if not {"HF_HOME", "HF_MODULES_CACHE", "XDG_CACHE_HOME"} & os.environ.keys():
        folder = tempfile.mkdtemp(prefix="capgap-modules-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["HF_MODULES_CACHE"] = folder


def package_folder(name: str) -> Path:
    """The folder with a config.json inside the installed Python package of `package:NAME`."""
    package = name.removeprefix("package:")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"model not found: {name} - no such package - pip install {package.replace('_', '-')}")
    root = Path(next(iter(spec.submodule_search_locations)))
    configs = sorted(root.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        raise DataError(f"model not found: {name} - the package holds no config.json - name another package or folder")
    return configs[0].parent


def _hub_folder(name: str, revision: str | None, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.model", "*.txt", "*.py", *(["*.safetensors"] if with_weights else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # The hub client raises a dozen kinds for gated, missing, offline and refused.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"model not found: {name} - neither a local folder nor reachable on the hub ({reason}) - "
            f"run `hf download {name}` where there is a network, or give a local folder"
        ) from error


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"model file missing: {path} - a model folder needs its config - copy or download it again")
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}) - download it again") from error
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path}: holds no JSON object with content - download it again")
    return value


def check_weights(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; DataError names the first that is missing or cut short."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = _read_object(index).get("weight_map")
        if not isinstance(places, dict):
            raise DataError(f"{index}: has no weight_map - download it again")
        names = sorted(set(places.values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            other = "; its pytorch_model.bin is a pickle, which we do not open: convert it to safetensors"
            note = other if (folder / "pytorch_model.bin").is_file() else ""
            raise DataError(f"model file missing: {folder / name} - weights are needed - download it again{note}")
        _check_size(folder / name)
    return [folder / name for name in names]


def _check_size(path: Path) -> None:
    """A safetensors file says in its header how long it is; the loader would say so only after minutes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(header_size)) if header_size < size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise DataError(f"{path}: is no whole safetensors file ({size} bytes) - download it again")
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != 8 + header_size + end:
        raise DataError(f"{path}: has {size} bytes, its header says {8 + header_size + end} - download it again")
