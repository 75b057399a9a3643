"""The four kinds of parts that a suite puts together, and one of them as a suite uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from robust_if.evaluations.suites.signatures import Plain
from robust_if.importing import imported

Role = Literal["data", "attack", "defence", "metric"]
#: Of every role: the module and the dictionary in which its shipped parts are, and the arguments that a part takes before its options.
ROLES: dict[Role, tuple[str, str, int]] = {
    "data": ("data", "DATA", 0), "attack": ("attacks", "ATTACKS", 1), "defence": ("defences", "DEFENCES", 1), "metric": ("metrics", "METRICS", 2),
}  # fmt: skip


def shipped(role: Role) -> Mapping[str, Callable[..., Any]]:
    """The shipped parts of a role by name; their modules, which import much of the toolkit, are loaded when a suite is read and not before."""
    module, name, _ = ROLES[role]
    found: Mapping[str, Callable[..., Any]] = getattr(import_module(f"robust_if.evaluations.suites.{module}"), name)
    return found


def named(role: Role, name: str) -> Callable[..., Any]:
    """A shipped part, or somebody's own by ``module:function``.

    Raises:
        ValueError: if there is no such function.
    """
    if ":" in name:
        return imported(name, role)
    known = shipped(role)
    return known[name] if name in known else imported(name, role, known)


@dataclass(frozen=True)
class Part:
    """One element of a suite.

    Args:
        role: what it is.
        name: a shipped name, or ``module:function``.
        label: what it is called in tables; unique in its role.
        options: every one that its function takes, given or by default.
        family: the label of its table, which the elements of a grid share.
        suffix: what is put behind the names of a metric's values, to tell two uses of the metric apart.
        given: the options that the suite file sets.
        only: labels of the parts of other roles that it goes with; all where a role is not named.
        settings: what determines its work: name, options, and digests of the user's source file and of files that options name.
    """

    role: Role
    name: str
    label: str
    options: Mapping[str, Any]
    family: str
    suffix: str = ""
    given: Mapping[str, Plain] = field(default_factory=dict)
    only: Mapping[Role, Sequence[str]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def function(self) -> Callable[..., Any]:
        """What it stands for.

        Raises:
            ValueError: if there is no such function.
        """
        return named(self.role, self.name)

    def goes_with(self, *others: Part) -> bool:
        """Whether a row may have this part and ``others``."""
        return all(each.role not in self.only or {each.label, each.family} & set(self.only[each.role]) for each in others)
