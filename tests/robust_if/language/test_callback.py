"""language/callback.py: real runs of the Trainer, against weights by hand and a loop of torch's own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from cases import relative
from robust_if import LESS, InnerProduct, Samples, Task, Utility, load_checkpoint, score

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from robust_if.language.callback import KeepCheckpoints, checkpoints  # noqa: E402

TOKENS, ROWS = 20, 11


class Words:
    pad_token_id = 0

    def __len__(self) -> int:
        return TOKENS


def samples(n: int = ROWS, seed: int = 3) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 7, (n, 1), generator=generator)
    drawn = torch.randint(1, TOKENS, (n, 6), generator=generator)
    there = torch.arange(6) < lengths
    learnt = there & (torch.arange(6) > 0)  # nothing predicts the first
    return Samples((torch.where(there, drawn, -1), torch.where(learnt, drawn, -100)))


class Items(Dataset[Any]):
    def __init__(self, data: Samples) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens, labels = (value[0] for value in self.data.batch(slice(i, i + 1)))
        return {"input_ids": tokens.clamp(min=0), "attention_mask": (tokens >= 0).long(), "labels": labels}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        items = Items(samples())
        while True:
            yield from (items[i] for i in range(ROWS))


def model(lora: bool = False, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=TOKENS, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0, pad_token_id=0,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
        made = transformers.GPT2LMHeadModel(config)
        if not lora:
            return made
        return peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True))


def trainer(made: Any, folder: Path, *callbacks: Any, data: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "num_train_epochs": 3, "learning_rate": 0.01, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "logging_strategy": "no", "save_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder / "out"), **(settings | options))
    return transformers.Trainer(made, arguments, train_dataset=data or Items(samples()), callbacks=list(callbacks))


def rate(step: int, steps: int, peak: float = 0.01) -> float:
    """The Trainer's linear schedule at a step counted from 0."""
    return peak * (1 - step / steps)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_states_weights_and_moments_of_a_run(lora: bool, tmp_path: Path) -> None:
    run = trainer(model(lora), tmp_path, KeepCheckpoints(tmp_path / "kept"))
    run.train()
    task = Task.from_transformers(run.model.eval(), Words())
    kept = checkpoints(tmp_path / "kept", task)
    steps = 6  # of an epoch: eleven samples, two at a time
    by_hand = [sum(rate(step, 18) for step in range(steps * epoch, steps * (epoch + 1))) / steps for epoch in range(3)]
    assert np.allclose([each.weight for each in kept], by_hand, rtol=1e-12)
    assert [each.moments and each.moments.steps for each in kept] == [6, 12, 18]
    own = task.params()
    assert lora == all("lora_" in name for name in own)
    for each in kept:
        assert each.moments is not None
        assert each.state.keys() == each.moments.first.keys() == each.moments.second.keys() == own.keys()
    assert all(torch.equal(kept[-1].state[name], value) for name, value in own.items())
    assert any(not torch.equal(kept[0].state[name], value) for name, value in own.items())
    slots = run.optimizer.state
    assert all(torch.equal(kept[-1].moments.second[n], slots[p]["exp_avg_sq"]) for n, p in run.model.named_parameters() if n in own)  # type: ignore[union-attr]


def test_the_states_are_those_of_a_loop_of_ones_own(tmp_path: Path) -> None:
    class Order(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Items(samples()))

    settings = trainer(model(), tmp_path, num_train_epochs=2, optim="sgd", learning_rate=0.5).args
    Order(model(), settings, train_dataset=Items(samples()), callbacks=[KeepCheckpoints(tmp_path / "kept", every=4)]).train()
    own, data = model().eval(), samples()
    optimizer = torch.optim.SGD(own.parameters())
    found = checkpoints(tmp_path / "kept")
    for step in range(12):
        optimizer.param_groups[0]["lr"] = rate(step, 12, 0.5)
        rows = range(2 * (step % 6), min(2 * (step % 6) + 2, ROWS))
        task = Task.from_transformers(own, Words())
        batch = data.take(rows).batch(slice(None))
        learnt = (batch[1][:, 1:] != -100).sum()
        optimizer.zero_grad()
        (task.losses(dict(own.named_parameters()), batch).sum() / learnt).backward()
        torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 4 == 0:
            state = found[step // 4].state
            assert all(torch.allclose(state[name], value, atol=1e-5) for name, value in own.named_parameters())


def test_tracin_sums_the_states_by_their_weights_and_less_takes_the_moments(tmp_path: Path) -> None:
    run = trainer(model(lora=True), tmp_path, KeepCheckpoints(tmp_path / "kept", keep=2), gradient_checkpointing=True)
    run.train()
    kept = checkpoints(tmp_path / "kept")
    assert [each.moments and each.moments.steps for each in kept] == [12, 18]
    task, data, target = Task.from_transformers(run.model.eval(), Words()), samples(), Utility(samples(4, seed=5))
    single = [InnerProduct().score(task.at(each.state), data, target=target).values for each in kept]
    total = score(task, data, target=target, checkpoints=kept)
    assert relative(total.values, sum(each.weight * values for each, values in zip(kept, single, strict=True))) <= 1e-5
    assert total.values.any() and len(set(LESS().score(task, data, target=target, checkpoints=kept).values)) == ROWS


@pytest.mark.parametrize(
    ("every", "keep", "options", "expected"),
    [
        ("epoch", None, {"gradient_accumulation_steps": 4}, [2, 4, 6]),  # six batches, four and two
        ("epoch", None, {"num_train_epochs": 1.5}, [6, 9]),
        (4, None, {"max_steps": 7}, [4, 7]),
        (100, None, {"max_steps": 3}, [3]),
        ("epoch", 2, {"num_train_epochs": 5}, [12, 30]),  # as the recipe: after epochs 2 and 5
        ("epoch", 9, {}, [6, 12, 18]),
    ],
)
def test_when_states_are_kept(every: Any, keep: int | None, options: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    run = trainer(model(), tmp_path, KeepCheckpoints(tmp_path, every, keep), **options)
    run.train()
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [f"step-{step:08d}.safetensors" for step in expected]
    # nothing is lost of the path: all weights together are the rates of all steps
    accumulated = options.get("gradient_accumulation_steps", 1)
    total = sum(rate(step, expected[-1]) for step in range(expected[-1])) / -(-6 // accumulated)
    assert np.isclose(sum(each.weight for each in checkpoints(tmp_path)), total, rtol=1e-12)


def test_a_stream_without_a_length_is_one_epoch(tmp_path: Path) -> None:
    trainer(model(), tmp_path, KeepCheckpoints(tmp_path / "kept"), data=Stream(), max_steps=5).train()
    (only,) = checkpoints(tmp_path / "kept")
    assert np.isclose(only.weight, sum(rate(step, 5) for step in range(5)) / 5)


class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Stops the training after some steps, as patience or a person does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.after


def test_a_run_that_stops_before_its_time_keeps_its_last_state(tmp_path: Path) -> None:
    run = trainer(model(), tmp_path, KeepCheckpoints(tmp_path / "kept"), Stop(8))
    run.train()
    kept = checkpoints(tmp_path / "kept")
    assert np.allclose([each.weight for each in kept], [sum(rate(k, 18) for k in range(6)) / 6, (rate(6, 18) + rate(7, 18)) / 6])
    assert all(torch.equal(kept[-1].state[name], value) for name, value in run.model.named_parameters())


def test_a_resumed_run_ends_with_the_states_of_one_that_was_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "seed": 1}
    trainer(model(), tmp_path / "whole", KeepCheckpoints(tmp_path / "whole" / "kept", every=5), **options).train()
    trainer(model(), tmp_path, KeepCheckpoints(tmp_path / "kept", every=5), Stop(11), **options).train()
    assert len(checkpoints(tmp_path / "kept")) == 3  # after 5, 10, and 11, where it stopped
    # the Trainer's last checkpoint is after step 8
    with caplog.at_level(logging.WARNING, "robust_if.language.callback"):
        trainer(model(seed=9), tmp_path, KeepCheckpoints(tmp_path / "kept", every=5), **options).train(resume_from_checkpoint=True)
    again = [record.getMessage() for record in caplog.records if "is made anew" in record.getMessage()]
    assert len(again) == 2 and "step-00000010.safetensors is of a step after 8" in again[0]
    names = [sorted(path.name for path in folder.glob("step-*")) for folder in (tmp_path / "kept", tmp_path / "whole" / "kept")]
    assert names[0] == names[1] and len(names[0]) == 4
    for got, expected in zip(checkpoints(tmp_path / "kept"), checkpoints(tmp_path / "whole" / "kept"), strict=True):
        assert np.isclose(got.weight, expected.weight, rtol=1e-12)
        assert all(torch.equal(got.state[name], value) for name, value in expected.state.items())


def test_another_runs_directory_is_refused_before_training(tmp_path: Path) -> None:
    trainer(model(), tmp_path, KeepCheckpoints(tmp_path / "kept"), max_steps=1).train()
    before = (tmp_path / "kept" / "step-00000001.safetensors").read_bytes()
    with pytest.raises(ValueError, match="kept holds 1 checkpoints of another run; choose another, or delete them"):
        trainer(model(), tmp_path, KeepCheckpoints(tmp_path / "kept"), max_steps=1).train()
    assert (tmp_path / "kept" / "step-00000001.safetensors").read_bytes() == before
    trainer(model(), tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="does not say what the learning rates were up to step 2, where the training resumes"):
        trainer(model(), tmp_path, KeepCheckpoints(tmp_path / "none"), max_steps=4).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="none holds no checkpoints"):
        checkpoints(tmp_path / "none")


def test_frozen_parameters_are_left_out_and_other_optimisers_have_no_moments(tmp_path: Path) -> None:
    made = model()
    for name, value in made.named_parameters():
        value.requires_grad_("ln_f" in name)
    trainer(made, tmp_path, KeepCheckpoints(tmp_path / "kept"), max_steps=1, optim="sgd").train()
    (only,) = checkpoints(tmp_path / "kept")
    assert only.moments is None and only.state.keys() == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    task = Task.from_transformers(made.eval(), Words())
    assert torch.equal(task.at(only.state).params()["transformer.ln_f.bias"], only.state["transformer.ln_f.bias"])
    with pytest.raises(ValueError, match="lacks 'transformer.wte.weight'"):
        checkpoints(tmp_path / "kept", task)


def test_rates_that_differ_are_averaged_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = model()
    groups = [{"params": list(made.transformer.h.parameters()), "lr": 0.03}, {"params": list(made.transformer.ln_f.parameters()), "lr": 0.01}]
    run = trainer(made, tmp_path, KeepCheckpoints(tmp_path / "kept"), max_steps=1)
    run.optimizer = torch.optim.SGD(groups)
    run.train()
    assert np.isclose(checkpoints(tmp_path / "kept")[0].weight, 0.02 / 6)
    assert "the parameters have different learning rates (0.01, 0.03); the mean stands for them" in caplog.text


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    run = trainer(model(), tmp_path, KeepCheckpoints(tmp_path / "kept"), max_steps=2, save_strategy="steps", save_steps=1)
    run.state.is_world_process_zero = False
    run.is_world_process_zero = lambda: False
    run.train()
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("every", [0, -1, 1.5, "step", True])
def test_how_often_is_checked(every: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every: expected 'epoch' or a number of steps of at least 1, got"):
        KeepCheckpoints(tmp_path, every)


@pytest.mark.parametrize("keep", [0, 1.5, False])
def test_how_many_is_checked(keep: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep: expected a whole number of at least 1, got"):
        KeepCheckpoints(tmp_path, keep=keep)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    callback = KeepCheckpoints(tmp_path / "kept")
    trainer(model(), tmp_path, callback, max_steps=2, save_strategy="steps", save_steps=2).train()
    run = trainer(model(), tmp_path, callback, max_steps=4)
    for content in ("[1]", "{", '{"x": 1}'):
        (tmp_path / "kept" / "rates.json").write_text(content)
        with pytest.raises(ValueError, match="rates.json is damaged"):
            run.train(resume_from_checkpoint=True)
    (tmp_path / "kept" / "step-00000002.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        checkpoints(tmp_path / "kept")


def test_the_files_are_those_of_any_checkpoint(tmp_path: Path) -> None:
    trainer(model(), tmp_path, KeepCheckpoints(tmp_path / "kept"), max_steps=1).train()
    read = load_checkpoint(tmp_path / "kept" / "step-00000001.safetensors", model())
    assert np.isclose(read.weight, 0.01 / 6) and read.moments is not None
