"""Denoisers of diffusers as tasks: the loss against its formula, every gradient against single backward passes, and what is refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from oracles import matrix, sample_gradients
from robust_if import DataInf, FlatMinima, InnerProduct, Plain, Recipe, Samples, Store, Task, Tuning, Utility, fit, pairwise, score
from robust_if.denoising import RandomTimesteps, generate
from robust_if.gradients import directional, per_sample
from robust_if.layers import LayerGradients

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

CLASSES, STEPS, TRAIN = 3, 100, 6
#: Where every parameter would only take longer.
SOME = ("*attentions*", "conv_*", "class_embedding*")
DDPM = diffusers.DDPMScheduler(STEPS)
SMALL = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2}


def unet(**options: Any) -> Any:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**SMALL, **blocks, "block_out_channels": (4, 8), **options}).double().eval()


def by_class(**options: Any) -> Any:
    return unet(num_class_embeds=CLASSES, **options)


def by_text() -> Any:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**{**SMALL, **blocks, "block_out_channels": (4, 8), "cross_attention_dim": 6}).double().eval()


def lora() -> Any:
    return peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


def injected() -> Any:
    model = by_text()
    model.add_adapter(lora())
    return model.double().eval()


MODELS: dict[str, Callable[[], Any]] = {
    "plain": unet, "class": by_class,
    "scale and shift": lambda: by_class(resnet_time_scale_shift="scale_shift", mid_block_type="UNetMidBlock2D", add_attention=False),
    "resnet sampling": lambda: by_class(downsample_type="resnet", upsample_type="resnet"),
    "learned time": lambda: by_class(time_embedding_type="learned", num_train_timesteps=STEPS),
    "text": by_text, "text, adapter": injected, "class, adapter": lambda: peft.get_peft_model(by_class(), lora()).double().eval(),
}  # fmt: skip


def samples(name: str = "class", count: int = 7) -> Samples:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(count, 3, 6, generator=generator, dtype=torch.float64)
    return Samples((images, text if "text" in name else torch.arange(count) % CLASSES))


def task(name: str = "class", **options: Any) -> Task:
    return Task.from_diffusers(MODELS[name](), DDPM, **{"timesteps": (3, 40, 90), **options})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_the_mean_error_over_the_timesteps(kind: str) -> None:
    scheduler = diffusers.DDPMScheduler(STEPS, prediction_type=kind)
    model, (x, y) = by_class(), samples().batch(slice(None))
    asked = Task.from_diffusers(model, scheduler, timesteps=(3, 40, 90), seed=5)
    expected = []
    for t in (3, 40, 90):
        noise = torch.from_numpy(np.random.default_rng((5, t)).standard_normal((2, 4, 4)))
        kept = scheduler.alphas_cumprod[t].double()
        targets = {"epsilon": noise.expand_as(x), "sample": x, "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * x}
        with torch.no_grad():
            predicted = model(kept.sqrt() * x + (1 - kept).sqrt() * noise, t, class_labels=y).sample
        expected.append(((predicted - targets[kind]) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(asked.losses(asked.params(), (x, y)), torch.stack(expected).mean(0))


@given(rows=st.permutations(range(7)), cut=st.integers(1, 6))
def test_the_loss_of_a_sample_depends_on_neither_batch_nor_order(rows: list[int], cut: int) -> None:
    asked, data = task(), samples()
    whole = asked.losses(asked.params(), data.batch(slice(None)))
    parts = [asked.losses(asked.params(), data.take(some).batch(slice(None))) for some in (rows[:cut], rows[cut:])]
    torch.testing.assert_close(torch.cat(parts), whole[rows], rtol=1e-12, atol=0)


def test_default_timesteps_are_in_proportion_and_the_noise_of_one_depends_on_no_other() -> None:
    found = [Task.from_diffusers(by_class(), diffusers.DDPMScheduler(steps)).forward.noise.timesteps for steps in (1000, STEPS, 4)]  # type: ignore[attr-defined]
    assert found == [(25, 225, 425, 525, 725, 925), (2, 22, 42, 52, 72, 92), (0, 1, 2, 3)]
    data = samples().batch(slice(None))
    each = [(asked := task(timesteps=(t,))).losses(asked.params(), data) for t in (3, 40)]
    both = task(timesteps=(40, 3))
    torch.testing.assert_close(both.losses(both.params(), data), (each[0] + each[1]) / 2)
    other = task(seed=1)
    assert not torch.allclose(other.losses(other.params(), data), task().losses(task().params(), data))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_layer_rule_and_all_ways_give_single_gradients(name: str) -> None:
    asked, data = task(name, timesteps=(3, 90)), samples(name, 5)
    params, batch, exact = asked.params(), data.batch(slice(None)), sample_gradients(asked, data)
    layers = LayerGradients(asked, params, batch)
    assert not layers.uncovered
    assert all("lora" in each for each in params) == ("adapter" in name)
    largest = max(float(value.abs().max()) for value in exact.values())
    assert largest > 1e-3
    for found in (dict(layers.dense(batch)), per_sample(asked, params, batch)):
        for each, value in exact.items():
            torch.testing.assert_close(found[each], value, rtol=1e-9, atol=1e-12)
    direction = {each: torch.randn(value.shape, dtype=torch.float64) for each, value in params.items()}
    products = torch.stack([exact[each].flatten(1) @ direction[each].flatten() for each in params]).sum(0)
    torch.testing.assert_close(directional(asked, params, batch, direction), products)


def test_scores_and_pairs_are_products_of_gradients_with_a_store_as_without(tmp_path: Any) -> None:
    asked, train, queries = task(timesteps=(3, 90), parameters=SOME), samples(count=TRAIN), samples(count=4)
    a, b = matrix(sample_gradients(asked, train)), matrix(sample_gradients(asked, queries))
    products = -a @ b.T / TRAIN
    np.testing.assert_allclose(pairwise(asked, train, queries), products, rtol=1e-9)
    store = Store.build(asked, train, tmp_path / "store")
    np.testing.assert_allclose(pairwise(asked, train, queries, index=store), products, rtol=1e-9)
    cosines = -a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(pairwise(asked, train, queries, normalise="cosine", index=store), cosines, rtol=1e-9)
    scores = score(asked, train, target=Utility(queries), estimator=InnerProduct())
    np.testing.assert_allclose(scores.values, products.mean(1), rtol=1e-9)
    with pytest.raises(ValueError, match="another model"):
        pairwise(task(timesteps=(3, 90), parameters=SOME, seed=1), train, queries, index=store)


def test_other_estimators_run_on_it_in_single_precision_too() -> None:
    train, queries = samples(count=TRAIN), samples(count=4)
    double = task(timesteps=(3, 90), parameters="*to_[qv]*")
    single = Task.from_diffusers(by_class().float(), DDPM, timesteps=(3, 90), parameters="*to_[qv]*")
    found = [pairwise(each, train, queries, preconditioner=DataInf()) for each in (double, single)]
    assert found[1].dtype == np.float32
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-6 * float(np.abs(found[0]).max()))
    minima = FlatMinima(Tuning(steps=2, lr=1e-3, flatness=Plain()), damping=1e-4)
    assert (minima.pairs(double, train, target=Utility(queries), queries=queries) >= 0).all()


def test_training_takes_timesteps_and_noise_of_its_own_for_every_sample() -> None:
    asked, data = task(), samples(count=6)
    (x, y), objective = data.batch(slice(None)), RandomTimesteps()
    found = objective(asked, asked.model, (x, y), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    noise, steps = torch.randn(x.shape, generator=generator).double(), torch.randint(STEPS, (6,), generator=generator)
    with torch.no_grad():
        predicted = asked.model(DDPM.add_noise(x, noise, steps), steps, class_labels=y).sample
    torch.testing.assert_close(found, ((predicted - noise) ** 2).mean((1, 2, 3)))
    recipe = Recipe(optimizer="adamw", lr=2e-2, epochs=15, batch_size=3, objective=objective)
    trained = fit(asked, data, recipe)
    before, after = (each.losses(each.params(), (x, y)).mean() for each in (asked, trained))
    assert after < 0.9 * before
    with pytest.raises(TypeError, match="from_diffusers"):
        objective(replace(asked, forward=lambda model, batch: model(batch[0])), asked.model, (x, y), generator)


def test_generated_images_repeat_follow_their_label_and_leave_the_scheduler_alone() -> None:
    model, sampler = by_class(), diffusers.DDIMScheduler.from_config(DDPM.config)
    before = copy.deepcopy(vars(sampler))
    images = generate(model, sampler, [0, 1, 1], steps=4, seed=2)
    assert images.shape == (3, 2, 4, 4) and images.dtype == torch.float64
    torch.testing.assert_close(images, generate(model, sampler, [0, 1, 1], steps=4, seed=2), rtol=0, atol=0)
    other = generate(model, sampler, [1, 1, 1], steps=4, seed=2)
    assert not torch.allclose(images[0], other[0]) and torch.allclose(images[1], other[1])
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(value)) for name, value in vars(sampler).items() if name == "timesteps")
    assert sampler.num_inference_steps is None
    assert generate(model, DDPM, [2], steps=3, seed=1).isfinite().all()
    for wrong, labels, message in ((unet(), [0], "class-conditional"), (model, [0, 3], "0 to 2; got 3"), (by_class().train(), [0], "evaluation")):
        with pytest.raises(ValueError, match=message):
            generate(wrong, sampler, labels)


class NoNoise:
    config = DDPM.config


@pytest.mark.parametrize(("options", "message"), [
    ({"timesteps": (3, 100)}, r"timesteps: expected whole numbers from 0 to 99.*\(3, 100\)"),
    ({"timesteps": (-1,)}, "timesteps: expected whole numbers"),
    ({"timesteps": ()}, "timesteps: expected whole numbers"),
    ({"timesteps": (3.5,)}, "timesteps: expected whole numbers"),
    ({"timesteps": (3, 3)}, "timesteps: expected each of them once"),
    ({"seed": -1}, "seed: expected a whole number"),
    ({"scheduler": NoNoise()}, "scheduler: expected one of diffusers with add_noise.*NoNoise"),
    ({"scheduler": diffusers.EulerDiscreteScheduler()}, "by sigmas.*DDPMScheduler.from_config"),
    ({"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}, "scheduler: expected one of diffusers with add_noise"),
    ({"scheduler": diffusers.DDPMScheduler(STEPS, prediction_type="score")}, "prediction type 'epsilon', 'v_prediction', 'sample', got 'score'"),
    ({"model": by_class().train()}, "evaluation mode"),
    ({"model": nn.Linear(2, 2).eval()}, "model: expected UNet2DModel.*got Linear"),
    ({"model": by_class(out_channels=4)}, "takes 2 channels and predicts 4"),
    ({"parameters": "nothing*"}, "parameters: the pattern"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_when_the_task_is_made(options: dict[str, Any], message: str) -> None:
    whole = {"model": by_class(), "scheduler": DDPM, **options}
    with pytest.raises(ValueError, match=message):
        Task.from_diffusers(whole.pop("model"), whole.pop("scheduler"), **whole)


@pytest.mark.parametrize(("name", "batch", "message"), [
    ("class", (torch.zeros(2, 2, 4, 4),), "conditional, so a batch is .* class labels"),
    ("text", (torch.zeros(2, 2, 4, 4),), "text embeddings"),
    ("class", (torch.zeros(2, 32), torch.tensor([0, 1])), r"images: expected floating-point numbers of shape \(B, C, H, W\)"),
    ("class", (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])), "images: expected floating-point"),
    ("class", (torch.zeros(2, 2, 4, 4), torch.tensor([0, 3])), "labels: the model has 3 classes, 0 to 2; got 3"),
    ("class", (torch.zeros(2, 2, 4, 4), torch.tensor([-1, 1])), "got -1"),
    ("class", (torch.zeros(2, 2, 4, 4), torch.zeros(2)), "labels: expected class numbers"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_when_a_batch_comes(name: str, batch: tuple[Tensor, ...], message: str) -> None:
    asked = task(name)
    with pytest.raises(ValueError, match=message):
        asked.losses(asked.params(), batch)
