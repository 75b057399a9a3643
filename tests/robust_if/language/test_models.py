"""language/models.py: folders as save_pretrained writes them, and what is refused of them."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from robust_if import Task
from robust_if.language import small
from robust_if.language.models import load

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXTS = ["a cat sat on a mat", "two dogs ran", "a bird sang to two cats"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody may ask the network for anything, nor hide that it did."""
    asked = []

    def refuse(*where: Any, **_: Any) -> None:
        asked.append(where)
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


def qwen(words: Any, **settings: Any) -> Any:
    return transformers.Qwen2Config(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=20,
        max_position_embeddings=16, pad_token_id=words.pad_token_id, bos_token_id=None, eos_token_id=words.eos_token_id, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model in bfloat16, a classifier, and an adapter for each."""
    root = tmp_path_factory.mktemp("folders")
    words = small.tokenizer(TEXTS, vocabulary=300, positions=16)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        whole = transformers.Qwen2ForCausalLM(qwen(words)).to(torch.bfloat16)
        whole.save_pretrained(root / "whole")
        transformers.Qwen2ForSequenceClassification(qwen(words, num_labels=3)).save_pretrained(root / "classifier")
        for name, base, kind in (("adapter", whole, "CAUSAL_LM"), ("judge", None, "SEQ_CLS")):
            base = base or transformers.AutoModelForSequenceClassification.from_pretrained(root / "whole", num_labels=4)
            made = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=kind))
            for parameter, value in made.named_parameters():
                if "lora_B" in parameter or "score" in parameter:
                    torch.nn.init.normal_(value)
            made.save_pretrained(root / name, save_embedding_layers=False)
            change(root / name / "adapter_config.json", base_model_name_or_path="somebody/else")
    for name in ("whole", "classifier"):
        words.save_pretrained(root / name)
    return root


@pytest.fixture
def copied(folders: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders / name, tmp_path / name))

    return copy


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_a_language_model_comes_back_as_it_was_saved(folders: Path) -> None:
    before = torch.random.get_rng_state()
    model, tokenizer = load(folders / "whole", dtype="auto")
    saved = load_file(folders / "whole" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) and value.dtype == torch.bfloat16 for name, value in model.named_parameters())
    assert not any(module.training for module in model.modules())
    assert tokenizer.decode(tokenizer("two dogs")["input_ids"]) == "two dogs"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert Task.from_transformers(model, tokenizer).params().keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("dtype", ["float32", torch.float64])
def test_another_type_may_be_asked_for(folders: Path, dtype: Any) -> None:
    model, _ = load(str(folders / "whole"), dtype=dtype, device="cpu")
    assert {value.dtype for value in model.parameters()} == {getattr(torch, dtype) if isinstance(dtype, str) else dtype}


def test_weights_in_several_files(folders: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folders / "whole")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    again, _ = load(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    next(iter(tmp_path.glob("model-*.safetensors"))).unlink()
    with pytest.raises(ValueError, match=r"lacks model-0000\d-of-\d+.safetensors, and has \d+ of \d+ files of weights"):
        load(tmp_path)


def test_a_classifier(folders: Path) -> None:
    model, tokenizer = load(folders / "classifier", "classification")
    assert model.num_labels == 3 and Task.from_transformers(model, tokenizer, "classification")


@pytest.mark.parametrize(("name", "kind"), [("adapter", "causal-lm"), ("judge", "classification")])
def test_an_adapter_with_its_base(folders: Path, name: str, kind: Any) -> None:
    before = torch.random.get_rng_state()
    model, tokenizer = load(folders / name, kind, base=folders / "whole")
    assert torch.equal(torch.random.get_rng_state(), before)
    task = Task.from_transformers(model, tokenizer, kind)
    saved = load_file(folders / name / "adapter_model.safetensors")
    own = {key.replace(".default", ""): value for key, value in task.params().items()}
    assert {key.replace(".modules_to_save", "") for key in own} == {key.replace(".modules_to_save", "") for key in saved}
    for key, value in own.items():
        kept = saved.get(key, saved.get(key.replace(".modules_to_save", "")))
        assert kept is not None and torch.equal(value, kept.to(value.dtype)), key
    assert {value.dtype for key, value in own.items() if "lora_" in key} == {torch.float32}
    assert model.base_model.model.model.embed_tokens.weight.dtype == torch.bfloat16
    if kind == "classification":
        assert model.config.num_labels == 4
    logits = model(input_ids=torch.tensor([tokenizer("two dogs")["input_ids"]])).logits
    assert torch.isfinite(logits).all()


def test_an_adapter_that_names_a_folder(copied: Callable[[str], Path], folders: Path) -> None:
    folder = copied("adapter")
    change(folder / "adapter_config.json", base_model_name_or_path=str(folders / "whole"))
    model, _ = load(folder, dtype="float64")
    assert {value.dtype for value in model.parameters()} == {torch.float64}


def test_a_missing_padding_token_is_the_one_of_the_end_and_said(copied: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = copied("whole")
    load(folder)
    assert "padding" not in caplog.text
    change(folder / "tokenizer_config.json", pad_token=None)
    change(folder / "config.json", pad_token_id=None)
    with caplog.at_level(logging.INFO, "robust_if.language.models"):
        model, tokenizer = load(folder)
    assert tokenizer.pad_token == small.END and model.config.pad_token_id == tokenizer.eos_token_id
    assert "the tokenizer has no padding token: the one for the end of a text, '<end>', stands for it" in caplog.text
    assert "the model knows of no padding token" in caplog.text


def pickled(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def without(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        (folder / name).unlink()

    return remove


def entry(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **settings)


def fewer(path: str, part: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        state = {name: value for name, value in load_file(folder / path).items() if part not in name}
        save_file(state, folder / path, metadata={"format": "pt"})

    return drop


REFUSED: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "pickle": ("whole", "causal-lm", pickled, "holds its weights in pytorch_model.bin only, and pickled files can run code .* convert one that you"),
    "no weights": ("whole", "causal-lm", without("model.safetensors"), "lacks model.safetensors, and has 0 of 1 files"),
    "no settings": ("whole", "causal-lm", without("config.json"), "has no config.json"),
    "broken settings": ("whole", "causal-lm", lambda folder: (folder / "config.json").write_text("{") and None, "config.json is damaged"),
    "broken weights": ("whole", "causal-lm", lambda f: (f / "model.safetensors").write_bytes(b"x") and None, "cannot be loaded as 'causal-lm'"),
    "no tokenizer": ("whole", "causal-lm", without("tokenizer.json"), "has no tokenizer .*tokenizer.save_pretrained"),
    "broken tokenizer": ("whole", "causal-lm", lambda f: (f / "tokenizer.json").write_text("{") and None, "the tokenizer in .* cannot be read"),
    "code": (
        "whole",
        "causal-lm",
        entry(auto_map={"AutoModel": "x.Y"}, model_type="odd"),
        "needs code of its own .auto_map in config.json., which is",
    ),
    "kernel": ("whole", "causal-lm", entry(attn_implementation="a/b"), "asks for an attention kernel from elsewhere, which would be downloaded"),
    "quantised": ("whole", "causal-lm", entry(quantization_config={"quant_method": "gptq"}), "holds quantised weights, .*expected the checkpoint in"),
    "unknown": ("whole", "causal-lm", entry(model_type="odd"), "cannot be loaded as 'causal-lm', it holds 'odd'"),
    "another kind of model": ("whole", "causal-lm", entry(model_type="t5"), "cannot be loaded as 'causal-lm', it holds 't5'"),
    "another shape": ("whole", "causal-lm", entry(vocab_size=7), "cannot be loaded as 'causal-lm'"),
    "no head": (
        "whole",
        "classification",
        lambda _: None,
        "lacks 'score.weight' and 0 more parameters of Qwen2ForSequenceClassification, which would",
    ),
    "a classifier": (
        "classifier",
        "causal-lm",
        lambda _: None,
        r"holds a classifier \(Qwen2ForSequenceClassification\); expected kind='classification'",
    ),
    "a parameter": ("whole", "causal-lm", fewer("model.safetensors", "k_proj"), "lacks 'model.layers.0.self_attn.k_proj.bias' and 1 more"),
    "adapter without base": (
        "adapter",
        "causal-lm",
        lambda _: None,
        "belongs to 'somebody/else', which is no folder here, and nothing is downloaded",
    ),
    "adapter of another kind": ("judge", "causal-lm", lambda _: None, "is one for SEQ_CLS, expected CAUSAL_LM for 'causal-lm'"),
    "pickled adapter": ("adapter", "causal-lm", without("adapter_model.safetensors"), "has no adapter_model.safetensors; pickled adapters"),
    "kind": ("whole", "regression", lambda _: None, "kind: expected 'causal-lm' or 'classification', got 'regression'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused(what: str, copied: Callable[[str], Path]) -> None:
    name, kind, spoil, message = REFUSED[what]
    folder = copied(name)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load(folder, kind)  # type: ignore[arg-type]


def test_code_that_is_not_needed_is_not_run(copied: Callable[[str], Path]) -> None:
    folder = copied("whole")
    (folder / "mine.py").write_text("raise AssertionError('somebody elses code ran')")
    change(folder / "config.json", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Words", None]})
    assert type(load(folder)[0]).__name__ == "Qwen2ForCausalLM"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_pickled_file_is_never_opened(name: str, copied: Callable[[str], Path], folders: Path, tmp_path: Path) -> None:
    folder = copied("whole" if "pytorch" in name else "adapter")
    next(folder.glob("*.safetensors")).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match="pickled"):
        load(folder, base=None if "pytorch" in name else folders / "whole")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("path", ["gpt2", "meta-llama/Llama-3.2-1B", "missing"])
def test_a_name_is_no_folder_and_nothing_is_downloaded(path: str, folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"folder: expected a local folder, '{path}' is none. Nothing is downloaded here; .*huggingface-cli download"
    ):
        load(path)
    with pytest.raises(ValueError, match=f"base: expected a local folder, '{path}' is none"):
        load(folders / "adapter", base=path)


def test_a_base_that_does_not_fit(folders: Path, copied: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"base: .*whole holds no adapter \(adapter_config.json\), so it has no base model"):
        load(folders / "whole", base=folders / "whole")
    with pytest.raises(ValueError, match="base: .*adapter holds an adapter itself; merge it"):
        load(folders / "adapter", base=folders / "adapter")
    folder = copied("adapter")
    fewer("adapter_model.safetensors", "lora_B")(folder)
    with pytest.raises(ValueError, match="the adapter in .* lacks 'base_model.*lora_B.weight' and 0 more of its parameters"):
        load(folder, base=folders / "whole")
    change(folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="antigravity")
    with pytest.raises(ValueError, match="is one for Megatron, which is not read"):
        load(folder, base=folders / "whole")


def test_an_adapter_of_another_model(folders: Path, copied: Callable[[str], Path], tmp_path: Path) -> None:
    change(copied("adapter") / "adapter_config.json", target_modules=["elsewhere"])
    with pytest.raises(ValueError, match="base: the adapter in .*adapter does not fit the model in .*whole .Target modules .*elsewhere"):
        load(tmp_path / "adapter", base=folders / "whole")
    words = transformers.AutoTokenizer.from_pretrained(folders / "whole")
    settings = qwen(words)
    settings.hidden_size = 20
    transformers.Qwen2ForCausalLM(settings).save_pretrained(tmp_path / "wider")
    words.save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="base: the adapter in .*adapter does not fit the model in .*wider"):
        load(folders / "adapter", base=tmp_path / "wider")


@pytest.mark.parametrize("dtype", ["int8", "", torch.int8])
def test_other_types_are_refused(folders: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype: expected 'auto' or one of float64, float32, bfloat16, float16, got"):
        load(folders / "whole", dtype=dtype)


def test_entries_that_are_not_the_models_are_said(copied: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = copied("whole")
    state = load_file(folder / "model.safetensors")
    save_file({**state, "odd.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder)
    assert "entries that are not the model's are left out: odd.weight" in caplog.text
