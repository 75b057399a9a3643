"""The attacks of the torchattacks package, behind the same protocol as our own.

torchattacks searches in [0, 1], takes images, and writes to the global random state, the modes of the model and the flags of its parameters. Here it
meets a small module instead of the model, which maps the bounds of the threat to [0, 1], so it reaches nothing that is the user's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from robust_if.attacks.evasion.ascent import step_length
from robust_if.attacks.evasion.attack import Attack
from robust_if.attacks.evasion.ball import Norm, fit, per_sample
from robust_if.attacks.evasion.search import Search
from robust_if.data import to
from robust_if.formats.parts import require
from robust_if.predictions import class_logits
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True)
class Wrapped:
    """What there is to know about an attack of torchattacks.

    Args:
        norms: of the balls that it searches.
        steps: how many it takes by default; 100 where the reference, AutoAttack of Croce and Hein 2020 (arXiv 2003.01690), takes as many.
        batched: whether it is run on whole batches. All others draw random numbers, or look at the whole batch, and are run sample by sample.
        inputs: ``"any"``, ``"square"`` images ``(B, C, H, H)``, or ``"colour"``, square images of three channels.
        classes: how many the model has to tell apart at least.
    """

    norms: tuple[Norm, ...] = ("linf",)
    steps: int = 10
    batched: bool = False
    inputs: Literal["any", "square", "colour"] = "any"
    classes: int = 2


#: Without its dependencies, because they would replace torch and put an old requests in the place of the present one.
_INSTALL = "--no-deps torchattacks (or 'robust-if[torchattacks]', which brings torchvision and an old requests)"

#: The attacks of torchattacks 3.5.1 that can be kept to a ball, by their names there.
WRAPPED: dict[str, Wrapped] = {
    "APGD": Wrapped(("linf", "l2"), 100),
    "APGDT": Wrapped(("linf", "l2"), 100, classes=4),
    "AutoAttack": Wrapped(("linf", "l2"), 100, classes=4),
    "BIM": Wrapped(batched=True),
    "CW": Wrapped(("l2",), 50),
    "DIFGSM": Wrapped(inputs="square"),
    "DeepFool": Wrapped(("l2",), 50),
    "EOTPGD": Wrapped(),
    "FAB": Wrapped(("linf", "l2"), 100),
    "FFGSM": Wrapped(steps=1),
    "FGSM": Wrapped(steps=1, batched=True),
    "Jitter": Wrapped(),
    "MIFGSM": Wrapped(batched=True),
    "NIFGSM": Wrapped(batched=True),
    "PGD": Wrapped(),
    "PGDL2": Wrapped(("l2",)),
    "PGDRS": Wrapped(),
    "PGDRSL2": Wrapped(("l2",)),
    "PIFGSM": Wrapped(batched=True, inputs="colour"),
    "PIFGSMPP": Wrapped(batched=True, inputs="colour"),
    "RFGSM": Wrapped(),
    "SINIFGSM": Wrapped(batched=True),
    "SPSA": Wrapped(),
    "Square": Wrapped(("linf", "l2")),
    "TIFGSM": Wrapped(inputs="colour"),
    "TPGD": Wrapped(),
    "UPGD": Wrapped(batched=True),
    "VMIFGSM": Wrapped(),
    "VNIFGSM": Wrapped(),
}

#: The others, and why they are left out.
LEFT_OUT: dict[str, str] = {
    "EADEN": "it minimises the elastic-net distance, and its result is in no L∞ or L2 ball but by chance",
    "EADL1": "it minimises the L1 distance, and its result is in no L∞ or L2 ball but by chance",
    "GN": "it adds Gaussian noise of no bounded size and does not look at the model",
    "JSMA": "it changes few features by as much as it likes (L0)",
    "LGV": "it trains the model on, to collect surrogates",
    "MultiAttack": "it chains attacks that are built already; chain ours",
    "OnePixel": "it changes few features by as much as it likes (L0)",
    "Pixle": "it changes few features by as much as it likes (L0)",
    "SparseFool": "it changes few features by as much as it likes (L0)",
    "VANILA": "it returns its input",
}

#: The parts of AutoAttack.
_AUTO = ("APGD", "APGDT", "FAB", "Square")

#: What an attack is given by other means than options.
_SET = {"model", "eps", "max_epsilon", "norm", "seed", "verbose", "n_classes"}


def wrapped_names(norm: Norm | None = None) -> tuple[str, ...]:
    """The names that :class:`TorchAttacks` takes, in the given norm or in any."""
    return tuple(name for name, known in WRAPPED.items() if norm is None or norm in known.norms)


@dataclass(frozen=True)
class TorchAttacks(Attack):
    """An attack of torchattacks; of every sample the clean input and what was found, the one of larger margin.

    The margin counts, not the loss that the attack raised, because it decides whether a sample is wrong; so
    :func:`~robust_if.attacks.evasion.margin` is never lower than before. The result is projected to the ball and the bounds. Attacks for the least
    distance, ``"CW"``, ``"DeepFool"`` and ``"FAB"``, succeed where that is within the ball; what they find outside is projected and then rarely
    wrong. A sample for which an attack finds no number, as those that divide by the size of the gradient do where it is zero, stays clean. The search
    is in single precision, whatever the type of the inputs.

    Random attacks are run sample by sample, every time from ``seed``, since torchattacks draws for a batch as a whole: B samples cost B runs at batch
    size one. :data:`WRAPPED` tells which are run on whole batches, and what each asks of the inputs. Inputs other than ``(B, C, H, W)`` are laid out
    as images ``(B, 1, 1, D)``.

    Args:
        threat: its bounds have to be finite; ``eps`` has to be the same fraction of their range in every feature that may move. ``project`` has no
            counterpart in torchattacks.
        attack: its name in torchattacks, see :func:`wrapped_names`. ``"AutoAttack"`` has the parts and budgets of the reference: APGD, targeted
            APGD and targeted FAB with 100 steps and the 9 nearest other classes at most, and Square with 5000 queries.
        options: further arguments by the names that the attack gives them, such as ``{"steps": 20}``. Lengths are fractions of the range of the
            bounds. The length of a step is 2.5 ``eps`` / steps by default, as in our PGD; for ``"FFGSM"`` 1.25 ``eps``.
        seed: of everything that is random.

    Raises:
        ImportError: if torchattacks is not installed.
        ValueError: if the attack is unknown, left out, or not one for this norm; an option is unknown or set by other means; or the threat has no
            finite bounds, or a projection. When called also if ``eps`` is not the same fraction everywhere, or the attack does not suit the shape of
            the inputs or the number of classes, and as :func:`robust_if.attacks.evasion.pgd` does.

    Source: torchattacks (Kim 2020, arXiv 2010.01950).
    """

    attack: str = "PGD"
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        name, threat = self.attack, self.threat
        if name in LEFT_OUT:
            raise ValueError(f"attack: {name} of torchattacks is left out: {LEFT_OUT[name]}")
        if name not in WRAPPED:
            raise ValueError(f"attack: expected one of {', '.join(WRAPPED)}, got {name!r}")
        if threat.norm not in WRAPPED[name].norms:
            raise ValueError(
                f"attack: {name} of torchattacks searches no {threat.norm} ball, those that do are {', '.join(wrapped_names(threat.norm))}"
            )
        if threat.project:
            raise ValueError("project: torchattacks cannot keep to the inputs that a projection allows; use our own attacks")
        if threat.bounds is None or not all(torch.as_tensor(bound).isfinite().all() for bound in threat.bounds):
            raise ValueError(f"bounds: torchattacks searches between finite bounds, the smallest and the largest valid input, got {threat.bounds}")
        taken = {"n_queries", "steps"} if name == "AutoAttack" else _arguments(name) - _SET
        if unknown := set(self.options) - taken:
            raise ValueError(f"options: {name} takes {', '.join(sorted(taken))}, got {', '.join(sorted(unknown))}")
        step_length(None, threat.eps, _steps(name, self.options))

    @property
    def name(self) -> str:
        return f"torchattacks-{self.attack.lower()}"

    def __call__(self, task: Task, params: Params, batch: Batch) -> Tensor:
        t, known = self.threat, WRAPPED[self.attack]
        search, x = Search.begin(task, params, batch, t, "margin")
        _check_inputs(self.attack, t.norm, x)
        assert t.bounds is not None
        low, high = (fit("bounds", bound, x) for bound in t.bounds)
        moving = (search.ball.radius > 0) & (high > low)
        eps = _fraction(search.ball.radius[moving], (high - low)[moving])
        search.visit(x, search.slope, last=True)
        if eps == 0:
            return search.best
        batch, fixed = to(batch, x), {name: value.detach() for name, value in task.model.named_parameters()}
        fixed |= {name: value.detach() for name, value in params.items()}
        whole = known.batched and not self.options.get("random_start")
        pieces = [batch] if whole else [_row(batch, i) for i in range(len(x))]
        with torch.random.fork_rng(range(torch.cuda.device_count())), torch.enable_grad():
            units = (_Unit(task, fixed, piece, low, high - low, moving) for piece in pieces)
            point = x + torch.cat([self._change(unit, eps) for unit in units])
        found = per_sample(point.isfinite().flatten(1).all(1), x)
        search.visit(search.ball.clip(torch.where(found, point, x)), search.slope, last=True)
        return search.best

    def _change(self, unit: _Unit, eps: float) -> Tensor:
        """By how much the attack moves the clean inputs of ``unit``, in the unit of the inputs."""
        torch.manual_seed(self.seed)
        library, images = _library(), unit.images
        classes, least = unit(images).shape[1], 3 if self.options.get("loss") == "dlr" else WRAPPED[self.attack].classes
        if classes < least:
            raise ValueError(f"attack: {self.name} needs at least {least} classes, the model tells {classes} apart")

        def build(name: str) -> Any:
            steps = _steps(name, self.options)
            length = 1.25 * eps if name == "FFGSM" else 2.5 * eps / steps
            given = {"eps": eps, "norm": self.threat.norm.capitalize(), "seed": self.seed, "steps": steps, "alpha": length, "n_queries": 5000}
            given |= {"n_classes": min(classes, 10), "multi_targeted": self.attack == "AutoAttack", "verbose": False}
            given |= {"nb_iter": steps, "lr": length} if name == "SPSA" else {"max_epsilon": eps, "num_iter_set": steps}
            return getattr(library, name)(unit, **{key: value for key, value in (given | dict(self.options)).items() if key in _arguments(name)})

        # the class AutoAttack has 10 steps, takes no other number, and draws its seed from the clock if it is given none
        attack = library.MultiAttack([build(part) for part in _AUTO]) if self.attack == "AutoAttack" else build(self.attack)
        return unit.change(attack(images, unit.labels))


class _Unit(nn.Module):
    """The model as torchattacks expects it: logits ``(B, K)`` of images ``(B, C, H, W)`` from 0 to 1.

    Args:
        task: attacked at ``params``, which hold all parameters, so that none of the model's own is reached.
        batch: clean; the rows of an image that is asked for in several variants at once are those of the first.
        low: what 0 stands for, with the shape of one sample; ``low`` + ``span`` is what 1 stands for.
        moving: false where a feature stays clean, whatever the image says.
    """

    def __init__(self, task: Task, params: Params, batch: Batch, low: Tensor, span: Tensor, moving: Tensor) -> None:
        super().__init__()
        self.low = nn.Parameter(low, requires_grad=False)  # torchattacks asks a parameter for the device
        self.task, self.params, self.batch, self.span, self.moving = task, params, batch, span, moving
        x = batch[0].detach()
        scaled = torch.where(moving, (x - low) / span, 0).clamp(0, 1)
        self.images = (scaled if x.ndim == 4 else scaled.reshape(len(x), 1, 1, -1)).to(torch.get_default_dtype())
        self.labels = batch[1].reshape(-1).long()

    def forward(self, images: Tensor) -> Tensor:
        x = self.low + self.span * images.to(self.low).reshape(-1, *self.low.shape)
        clean, *rest = self.batch if len(x) == len(self.images) else _repeat(self.batch, len(x))
        outputs = self.task.outputs(self.params, (torch.where(self.moving, x, clean), *rest))
        return class_logits(outputs).to(images.dtype)

    def change(self, images: Tensor) -> Tensor:
        """``images`` less the clean ones, in the unit of the inputs."""
        return self.span * (images - self.images).detach().to(self.low).reshape(-1, *self.low.shape)


def _library() -> Any:
    return require("torchattacks", "attack: TorchAttacks", _INSTALL)


def _arguments(name: str) -> set[str]:
    """What the class of torchattacks takes, by name."""
    return set(inspect.signature(getattr(_library(), name)).parameters)


def _steps(name: str, options: Mapping[str, Any]) -> int:
    """The number of steps, which goes by three names in torchattacks."""
    return next((options[key] for key in ("steps", "nb_iter", "num_iter_set") if key in options), WRAPPED[name].steps)


def _fraction(radius: Tensor, span: Tensor) -> float:
    """The radius in [0, 1], from those of the features that move and the ranges of their bounds; 0 if none moves."""
    shares = radius / span
    if not len(shares):
        return 0.0
    least, most = float(shares.min()), float(shares.max())
    if most - least > 1e-3 * most:
        expected = "the same fraction of the range of the bounds in every feature that may move, since torchattacks searches in [0, 1]"
        raise ValueError(f"eps: expected {expected}, got {least:g} to {most:g}")
    return least


def _check_inputs(name: str, norm: Norm, x: Tensor) -> None:
    """Raise a ``ValueError`` if the attack crashes on inputs of this shape."""
    inputs, shape = WRAPPED[name].inputs, tuple(x.shape[1:])
    square = len(shape) == 3 and shape[1] == shape[2]
    if inputs != "any" and not (square and (inputs == "square" or shape[0] == 3)):
        expected = "square images (C, H, H)" if inputs == "square" else "square images of three channels (3, H, H)"
        raise ValueError(f"attack: {name} of torchattacks expects {expected}, got samples of shape {shape}")
    if norm == "l2" and name in ("AutoAttack", "Square"):
        # in L2 Square begins with tiles of a fifth of the height, and crashes if the last one is cut by the edge
        side = shape[-1]
        tile = side // 5
        if not (square and tile and (tile == 1 or (side - 5 * tile) // 2 + side // tile * tile <= side)):
            raise ValueError(
                f"attack: {name} of torchattacks in L2 expects square images whose side its tiles fill, such as 8, 28, 32 or 224, got {shape}"
            )


def _row(batch: Batch, i: int) -> Batch:
    return tree_map(lambda leaf: leaf[i : i + 1] if isinstance(leaf, Tensor) else leaf, batch)


def _repeat(batch: Batch, rows: int) -> Batch:
    return tree_map(lambda leaf: leaf.expand(rows, *leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf, batch)
