"""Language models and classifiers from a folder on this machine, in the layout of Hugging Face.

Folders come from strangers: nothing is downloaded, no code of theirs is run, and nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open

from robust_if.formats.parts import require
from robust_if.gradients import reason
from robust_if.layers import some
from robust_if.token_losses import Kind

logger = logging.getLogger(__name__)

_TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")
_TASKS = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}
_INSTALL = "'robust-if[hf]'"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT, and not a whole model."""
    return (folder / "adapter_config.json").is_file()


def load(
    folder: str | Path, kind: Kind = "causal-lm", *, base: str | Path | None = None, dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The model in a folder, in evaluation mode, and its tokenizer.

    A tokenizer without a padding token gets its token for the end of a text as one, and the log says so; so does a model that does not know of it.

    Args:
        folder: with ``config.json``, weights as safetensors and the tokenizer's files; or with an adapter of PEFT, ``adapter_config.json`` and
            ``adapter_model.safetensors``.
        kind: ``"causal-lm"`` or ``"classification"``.
        base: the folder of the model that an adapter belongs to; by default the one that the adapter names.
        dtype: ``"float32"``, ``"bfloat16"``, …; ``"auto"``, as saved, by default. The parameters of an adapter are never in half precision.
        device: the CPU by default.

    Raises:
        ValueError: if there is no such folder, or it holds no model of ``kind`` that can be read: parameters or the tokenizer are missing, weights
            are pickled or quantised, or the model needs code of its own.
        ImportError: if transformers is not installed, or peft for an adapter.
    """
    folder = _folder("folder", folder)
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected 'causal-lm' or 'classification', got {kind!r}")
    wanted = _TYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and wanted not in _TYPES.values():
        raise ValueError(f"dtype: expected 'auto' or one of {', '.join(_TYPES)}, got {dtype!r}")
    transformers = require("transformers", "loading a language model", _INSTALL)
    peft: Any = None
    brought: dict[str, list[int]] = {}
    body = folder
    if is_adapter(folder):
        peft = require("peft", "loading an adapter", _INSTALL)
        body = _base(folder, kind, base)
        brought = _brought(folder / "adapter_model.safetensors")
    elif base is not None:
        raise ValueError(f"base: {folder} holds no adapter (adapter_config.json), so it has no base model")
    config = _check_model(body, kind, transformers)
    tokenizer = _tokenizer(folder if _has_tokenizer(folder) else body, transformers)
    own = {name.removeprefix("base_model.model."): shape for name, shape in brought.items()}
    heads = [shape[0] for name, shape in own.items() if kind == "classification" and name in _HEADS]
    auto = transformers.AutoModelForCausalLM if kind == "causal-lm" else transformers.AutoModelForSequenceClassification
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    with torch.random.fork_rng():  # what an adapter brings is drawn at random first
        try:
            model, found = auto.from_pretrained(str(body), dtype=wanted or "auto", **({"num_labels": heads[0]} if heads else {}), **options)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"folder: {body} cannot be loaded as {kind!r}, it holds {config.get('model_type')!r} ({reason(error)})") from error
        lacking = sorted(name for name in found["missing_keys"] if name not in own)
        if lacking:
            raise ValueError(
                f"folder: {body} lacks {lacking[0]!r} and {len(lacking) - 1} more parameters of {type(model).__name__}, which would be random; "
                f"expected a model that was trained for {kind!r}"
            )
        if found["unexpected_keys"]:
            logger.warning("%s: entries that are not the model's are left out: %s", body, some(sorted(found["unexpected_keys"])))
        if peft is not None:
            try:
                model = peft.PeftModel.from_pretrained(model, str(folder), local_files_only=True)
            except (ValueError, KeyError, RuntimeError, TypeError) as error:
                raise ValueError(f"base: the adapter in {folder} does not fit the model in {body} ({reason(error)})") from error
            absent = sorted(peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys() - brought.keys())
            if absent:
                raise ValueError(f"folder: the adapter in {folder} lacks {absent[0]!r} and {len(absent) - 1} more of its parameters")
            if wanted in (torch.float32, torch.float64):
                model = model.to(wanted)
    _pad(model, tokenizer)
    return model.to(device or "cpu").eval(), tokenizer


#: Names of the last layer of a classifier, whose rows are the classes, in the models of transformers.
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def _folder(argument: str, path: str | Path) -> Path:
    found = Path(path)
    if not found.is_dir():
        raise ValueError(
            f"{argument}: expected a local folder, {str(path)!r} is none. Nothing is downloaded here; get a model first, for example with "
            "huggingface-cli download NAME --local-dir FOLDER"
        )
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"folder: {path} is damaged ({reason(error)})") from error


def _check_model(folder: Path, kind: Kind, transformers: Any) -> dict[str, Any]:
    """The configuration of the model in ``folder``, whose files are all there and safe to read."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder: {folder} has no config.json; expected a model as save_pretrained of transformers writes it")
    config = _json(folder / "config.json")
    if config.get("auto_map") and config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ValueError(f"folder: {folder} needs code of its own (auto_map in config.json), which is never run; expected a model of transformers")
    if "/" in f"{config.get('attn_implementation')}{config.get('_attn_implementation')}":
        raise ValueError(f"folder: {folder} asks for an attention kernel from elsewhere, which would be downloaded; remove it from config.json")
    if config.get("quantization_config"):
        raise ValueError(
            f"folder: {folder} holds quantised weights, and gradients through them are not those of the model; expected the checkpoint in bfloat16"
        )
    if kind == "causal-lm" and any("ForSequenceClassification" in str(name) for name in config.get("architectures") or ()):
        raise ValueError(f"folder: {folder} holds a classifier ({config['architectures'][0]}); expected kind='classification'")
    index = folder / "model.safetensors.index.json"
    shards = sorted({str(name) for name in _json(index).get("weight_map", {}).values()}) if index.is_file() else ["model.safetensors"]
    gone = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if not gone and shards:
        return config
    pickled = [path.name for path in sorted(folder.glob("*.bin")) if path.name.startswith("pytorch_model")]
    if pickled and not index.is_file():
        raise ValueError(
            f"folder: {folder} holds its weights in {pickled[0]} only, and pickled files can run code when they are opened; convert one that you "
            "trust: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other, safe_serialization=True)"
        )
    raise ValueError(f"folder: {folder} lacks {(gone or ['its weights'])[0]}, and has {len(shards) - len(gone)} of {len(shards)} files of weights")


def _base(folder: Path, kind: Kind, base: str | Path | None) -> Path:
    """The folder of the model that the adapter in ``folder`` belongs to."""
    settings = _json(folder / "adapter_config.json")
    if settings.get("task_type") not in (None, _TASKS[kind]):
        raise ValueError(f"kind: the adapter in {folder} is one for {settings['task_type']}, expected {_TASKS[kind]} for {kind!r}")
    if settings.get("megatron_config"):  # it names a module that peft would import
        raise ValueError(f"folder: the adapter in {folder} is one for Megatron, which is not read")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"folder: {folder} has no adapter_model.safetensors; pickled adapters can run code when they are opened and are not read; "
            "save it again with save_pretrained of peft"
        )
    named = settings.get("base_model_name_or_path")
    if base is None and not (named and Path(str(named)).is_dir()):
        raise ValueError(f"base: the adapter in {folder} belongs to {named!r}, which is no folder here, and nothing is downloaded; pass base=FOLDER")
    found = _folder("base", base if base is not None else str(named))
    if is_adapter(found):
        raise ValueError(f"base: {found} holds an adapter itself; merge it into its model first, with merge_and_unload() of peft")
    return found


def _brought(path: Path) -> dict[str, list[int]]:
    """The parameters in an adapter's file with their shapes; those that are the model's own, such as a classifier's head, go by its names."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"folder: {path} is not a safetensors file ({error})") from None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENS)


def _tokenizer(folder: Path, transformers: Any) -> Any:
    if not _has_tokenizer(folder):
        raise ValueError(f"folder: {folder} has no tokenizer (such as {_TOKENS[0]}); write it there with tokenizer.save_pretrained(folder)")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizers of many models raise on a damaged file
        raise ValueError(f"folder: the tokenizer in {folder} cannot be read ({reason(error)})") from error


def _pad(model: Any, tokenizer: Any) -> None:
    """A padding token for a tokenizer that has none, and the same for a model that knows of none."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("the tokenizer has no padding token: the one for the end of a text, %r, stands for it", tokenizer.eos_token)
    if model.config.pad_token_id is None and tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
        logger.info("the model knows of no padding token: set to the tokenizer's, %d", tokenizer.pad_token_id)
