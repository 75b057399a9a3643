"""A suite: which data, attacks, defences and metrics are put together, as a TOML file says."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as resources
from itertools import product
from pathlib import Path
from typing import Any

from robust_if.evaluations.suites.roles import ROLES, Part, Role, named
from robust_if.evaluations.suites.rows import Row
from robust_if.evaluations.suites.signatures import Plain, completed, files, source

#: Roles whose labels a table may name, so that it goes with these only.
_WITH: dict[Role, tuple[Role, ...]] = {"data": (), "attack": ("data",), "defence": ("data", "attack"), "metric": ()}


def suites() -> dict[str, Path]:
    """The shipped suites by name."""
    folder = Path(str(resources("robust_if.evaluations.suites"))) / "shipped"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


@dataclass(frozen=True)
class Suite:
    """Every combination of data, attack, defence and seed, judged by all metrics.

    Args:
        name: of a shipped suite, or the path of its file.
        title: in a few words.
        about: what the suite shows, and what it cannot.
        seeds: one row each.
        parts: by role, in the order of the file.
        text: of the file.
    """

    name: str
    title: str
    about: str
    seeds: tuple[int, ...]
    parts: Mapping[Role, tuple[Part, ...]]
    text: str = field(repr=False)

    @classmethod
    def read(cls, suite: str | Path, seeds: Iterable[int] | None = None) -> Suite:
        """A shipped suite by name, or one of your own from a TOML file.

        Args:
            suite: the name, or the path of a file that ends in ``.toml``.
            seeds: in place of those in the file.

        Raises:
            ValueError: if there is no such suite, or its file asks for what cannot be: the message names the table and what was expected.
        """
        path = Path(suite) if str(suite).endswith(".toml") else suites().get(str(suite))
        if path is None:
            raise ValueError(f"suite: unknown name {str(suite)!r}; expected one of {', '.join(suites())}, or the path of a .toml file")
        if not path.is_file():
            raise ValueError(f"suite: there is no file {path}")
        text = path.read_text(encoding="utf-8")
        try:
            return cls._parse(str(suite), text, seeds)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    @classmethod
    def _parse(cls, name: str, text: str, seeds: Iterable[int] | None) -> Suite:
        content = tomllib.loads(text)
        known = ("title", "about", "seeds", *ROLES)
        if unknown := [key for key in content if key not in known]:
            raise ValueError(f"unknown key {unknown[0]!r}; expected some of {', '.join(known)}")
        for key in ("title", "about"):
            if not isinstance(content.get(key, ""), str):
                raise ValueError(f"{key}: expected a string, got {content[key]!r}")
        asked = content.get("seeds", [0]) if seeds is None else list(seeds)
        if (
            not isinstance(asked, list)
            or not all(type(each) is int and 0 <= each < 2**32 for each in asked)
            or len(set(asked)) != (len(asked) or None)
        ):
            raise ValueError(f"seeds: expected a list of different whole numbers from 0, got {asked!r}")
        parts = {role: _parts(role, content.get(role, [])) for role in ROLES}
        suite = cls(name, content.get("title") or Path(name).stem, content.get("about", "").strip(), tuple(asked), parts, text)
        suite._check()
        return suite

    def _check(self) -> None:
        labels = {role: {name for part in parts for name in (part.label, part.family)} for role, parts in self.parts.items()}
        for part in (part for parts in self.parts.values() for part in parts):
            for role, wanted in part.only.items():
                if unknown := [each for each in wanted if each not in labels[role]]:
                    raise ValueError(f"{part.role} {part.label!r}: {role}: unknown label {unknown[0]!r}; expected some of {sorted(labels[role])}")
        rows = self.rows()
        for role in ("data", "attack", "defence"):
            used = {getattr(row, role).label for row in rows}
            if idle := [part.label for part in self.parts[role] if part.label not in used]:
                raise ValueError(f"{role} {idle[0]!r}: it is in no row; check what the tables say about the parts that they go with")
        twice = [each for each, count in Counter(row.id for row in rows).items() if count > 1]
        if twice:
            first, second = [row for row in rows if row.id == twice[0]][:2]
            raise ValueError(f"{first.said()} and {second.said()} are the same under two labels")

    def rows(self) -> list[Row]:
        """All rows; those that share data, attack and seed can share the work before the defence."""
        combinations = product(self.parts["data"], self.parts["attack"], self.parts["defence"], self.seeds)
        return [
            Row(data, attack, defence, self.parts["metric"], seed)
            for data, attack, defence, seed in combinations
            if attack.goes_with(data) and defence.goes_with(data, attack)
        ]


def _parts(role: Role, tables: object) -> tuple[Part, ...]:
    """The parts of one role, each grid spread out."""
    if not isinstance(tables, list) or not tables or not all(isinstance(each, dict) for each in tables):
        raise ValueError(f"{role}: expected at least one table [[{role}]], got {tables!r}")
    parts = [part for position, table in enumerate(tables, 1) for part in _spread(role, table, f"[[{role}]] number {position}")]
    twice = [label for label, count in Counter(part.label for part in parts).items() if count > 1]
    if twice:
        raise ValueError(f"{role}: two are labelled {twice[0]!r}; give one of them a 'label' of its own")
    return tuple(parts)


def _spread(role: Role, table: Mapping[str, Any], where: str) -> list[Part]:
    options = dict(table)
    name, label = options.pop("name", None), options.pop("label", None)
    if not isinstance(name, str) or not isinstance(label, str | None) or label == "":
        raise ValueError(f"{where}: expected a 'name', and perhaps a 'label', that are strings, got {name!r} and {label!r}")
    family, where = label or name, f"{role} {label or name!r}"
    only: dict[Role, Sequence[str]] = {}
    for other in _WITH[role]:
        if other in options:
            wanted = options.pop(other)
            only[other] = [wanted] if isinstance(wanted, str) else wanted
            if not isinstance(only[other], list) or not all(isinstance(each, str) for each in only[other]) or not only[other]:
                raise ValueError(f"{where}: {other}: expected labels of [[{other}]] tables, got {wanted!r}")
    function = named(role, name)
    grid = {key: value for key, value in options.items() if isinstance(value, list)}
    for key, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, Plain):
                raise ValueError(f"{where}: {key}: expected a number, a string, true or false, or a list of these for a grid, got {each!r}")
        if value == []:
            raise ValueError(f"{where}: {key}: expected at least one value, got an empty list")
    parts = []
    for values in product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        given = {key: point.get(key, value) for key, value in options.items()}
        full = completed(function, given, ROLES[role][2], where)
        steps = " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in point.items())
        suffix = " ".join(filter(None, (label, steps))) if role == "metric" else ""
        settings = {"name": name, "options": full, "files": files(full), "source": source(function) if ":" in name else None}
        parts.append(Part(role, name, " ".join(filter(None, (family, steps))), full, family, suffix, given, only, settings))
    return parts
