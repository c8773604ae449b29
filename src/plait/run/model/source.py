"""Where a base model lies: its name, its files, its config."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from plait.run.config import ModelConfig

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def source_of(model: ModelConfig) -> str:
    """Return what transformers loads: the absolute path of a folder, or a hub id."""
    if model.name == "builtin:tiny":
        from plait.assets import tiny_model_dir

        return str(tiny_model_dir())
    if model.name.startswith("builtin:"):
        raise ValueError(f"model.name is {model.name!r}. The only built-in model is builtin:tiny.")
    path = Path(model.name).expanduser()
    if path.is_dir():
        return str(path.absolute())
    if path.is_absolute() or model.name.startswith((".", "~")) or path.exists():
        raise FileNotFoundError(
            f"model.name: {model.name} is no folder here. Correct the path, or give a hub id."
        )
    return model.name


def base_name(model: ModelConfig) -> str:
    """Return what adapter_config.json calls the base: a built-in's name, else as `source_of`."""
    return model.name if model.name.startswith("builtin:") else source_of(model)


def _check_files(folder: Path, name: str) -> None:
    """Check a local model folder: weights there, as safetensors, each file whole."""
    if not folder.is_dir():
        return
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"model.name: {name} holds its weights as a pickle ({pickles[0]}), which can run "
                "any code when it is read. Convert it to safetensors."
            )
        raise FileNotFoundError(
            f"model.name: {name} has no weights (no .safetensors file). "
            "Give a folder written by save_pretrained."
        )
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or cut off ({error}). Copy it again.") from None


def config_of(model: ModelConfig) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            source_of(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except OSError as error:
        raise FileNotFoundError(not_there(model, "config", error)) from error


def not_there(model: ModelConfig, what: str, error: OSError) -> str:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return (
        f"model.name: the {what} of {model.name} cannot be loaded ({reason}). "
        "Correct the path or the hub id."
    )
