"""What the page of ``robust-if tradeoffs`` says in sentences: whether objectives conflict, and what each choice did to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robust_if.evaluations.report import words

#: Rank correlations from which targets are said to rank samples alike, and below whose negative they are opposed.
ALIKE, SOMEWHAT = 0.5, 0.15

Json = Mapping[str, Any]


def verdict(result: Json) -> str:
    """The sharpest conflict that retraining confirmed; without one the best choice that clearly cost nothing; else that nothing is clear."""
    tried = [each for each in result["choices"] if each["predicted"] is not None]
    if all(seen(each, objective)["low"] is None for each in tried for objective in result["objectives"]):
        return f"{_counted(result, tried)} tried with one training each, which cannot tell an effect from chance."
    found = [(each, *_clear(result, each)) for each in tried]
    torn = [(each, better, worse) for each, better, worse in found if better and worse]
    if torn:
        each, better, worse = max(torn, key=lambda one: _strength(one[0], one[1]) * _strength(one[0], one[2]))
        gain, loss = (max(side, key=lambda objective: _strength(each, [objective])) for side in (better, worse))
        return f"{_removing(result, each)} {_did(each, gain)} and {_did(each, loss)}."
    free = _free(result)
    if free is not None:
        each, better = free
        return f"{_removing(result, each)} {' and '.join(_did(each, objective) for objective in better)}, and clearly cost nothing."
    harmed = [(each, worse) for each, _, worse in found if worse]
    if harmed:
        each, worse = max(harmed, key=lambda one: _strength(*one))
        return f"No choice clearly helped; {_removing(result, each).lower()} {_did(each, max(worse, key=lambda one: _strength(each, [one])))}."
    return f"{_counted(result, tried)} retrained; none clearly changed an objective on test data."


def findings(result: Json) -> list[str]:
    """The sentences below the headline."""
    said = []
    called = {each["name"]: each["words"] for each in result["objectives"]}
    known = sorted((each for each in result["pairs"] if each["correlation"] is not None), key=lambda each: float(each["correlation"]))
    for pair in known if len(known) < 3 else [known[0], known[-1]]:
        one, other = (called[name] for name in pair["pair"])
        rho = pair["correlation"]
        how = "alike" if rho >= ALIKE else "somewhat alike" if rho >= SOMEWHAT else "independently" if rho > -SOMEWHAT else "against each other"
        said.append(
            f"{one.capitalize()} and {other} rank samples {how} (rank correlation {words.number(round(rho, 2))}); "
            f"{words.percent(sum(pair['against']), 0)} of the samples harm one and help the other."
        )
    free = _free(result)
    if free is not None and "clearly cost nothing" not in verdict(result):
        each, better = free
        said.append(f"{_removing(result, each)} {' and '.join(_did(each, objective) for objective in better)}, and clearly cost nothing.")
    random = next(each for each in result["choices"] if each["name"] == "random")
    better, worse = _clear(result, random)
    if better or worse:
        said.append(f"Removing as many at random {' and '.join(_did(random, objective) for objective in [*better, *worse])}.")
    return said


def label(result: Json, name: str) -> str:
    """A choice in words."""
    if name in ("none", "random"):
        return {"none": "No removal", "random": "Random removal"}[name]
    called = {each["name"]: each["words"] for each in result["objectives"]}
    said: dict[str, list[str]] = {}
    for each in name.split(", "):
        target, _, how = each.partition(" ")
        said.setdefault(called.get(target, target), []).append(how)
    kinds = {"alone": "worst for {}", "at no harm": "most for {} at no predicted harm", "mix": "worst for the even mix"}
    merged = "worst for {}, at no predicted harm"
    text = "; ".join((merged if len(hows) > 1 else kinds[hows[0]]).format(target) for target, hows in said.items())
    return text[:1].upper() + text[1:]


def _counted(result: Json, tried: Sequence[Json]) -> str:
    return f"{words.count(len(tried), 'removal')} of up to {words.count(result['k'], 'sample')} {'was' if len(tried) == 1 else 'were'}"


def _removing(result: Json, choice: Json) -> str:
    """The choice as the subject of a sentence."""
    called = {each["name"]: each["words"] for each in result["objectives"]}
    if choice["predicted"] is None:
        return "Removing as many at random"
    what = f"the {round(choice['removed']):,} samples" if choice["removed"] >= 1.5 else "the sample"
    target, _, how = choice["name"].split(", ")[0].partition(" ")
    if how == "alone":
        return f"Removing {what} worst for {called[target]}"
    if how == "at no harm":
        return f"Removing {what} that promised most for {called[target]} and no harm"
    return f"Removing {what} worst for the even mix"


def seen(choice: Json, objective: Json) -> dict[str, Any]:
    """What is shown of an objective: the metric of decisions where there is one, else the target itself."""
    found = choice["verified"][objective["name"]]
    return {"up": not objective["is_gap"], "share": True, "name": objective["metric"], **found["hard"]} if "hard" in found else {
        "up": False, "share": False, "name": objective["value"], **found["soft"]
    }  # fmt: skip


def side(found: Json) -> int:
    """1 where it clearly got better, −1 where it clearly got worse: the interval of the gain is on one side of 0."""
    if found["low"] is None or found["high"] is None:
        return 0
    return 1 if found["low"] > 0 else -1 if found["high"] < 0 else 0


def _clear(result: Json, choice: Json) -> tuple[list[Json], list[Json]]:
    """The objectives that clearly got better, and those that clearly got worse."""
    sides = [(side(seen(choice, objective)), objective) for objective in result["objectives"]]
    return [each for side, each in sides if side > 0], [each for side, each in sides if side < 0]


def _free(result: Json) -> tuple[Json, list[Json]] | None:
    """The choice that clearly helped most and clearly cost nothing, and what it helped."""
    found = [(each, *_clear(result, each)) for each in result["choices"] if each["predicted"] is not None]
    free = [(each, better) for each, better, worse in found if better and not worse]
    return max(free, key=lambda one: (len(one[1]), _strength(*one)), default=None)


def _strength(choice: Json, objectives: Sequence[Json]) -> float:
    """The largest change among objectives, as a share of what the objective is, so that losses and shares can be compared."""
    sizes = [(seen(choice, each), each) for each in objectives]
    return max(float(abs(found["gain"])) / (1.0 if found["share"] else max(abs(each["validation"]), 1e-12)) for found, each in sizes)


def _did(choice: Json, objective: Json) -> str:
    """What a choice did to an objective: ``raised accuracy by 1.2 points``."""
    found = seen(choice, objective)
    rose = (found["gain"] > 0) == found["up"]
    verb = ("raised" if rose else "lowered") if not objective["is_gap"] else ("widened" if rose else "cut")
    name = found["name"] if found["up"] else f"the {found['name']}"
    size = f"{100 * abs(found['gain']):.1f}{words.SPACE}points" if found["share"] else words.number(float(f"{abs(found['gain']):.2g}"))
    return f"{verb} {name} by {size}"


def number(result: Json, choice: Json) -> str:
    """What a choice is marked with in charts."""
    tried = [each["name"] for each in result["choices"] if each["predicted"] is not None]
    return {"none": "0", "random": "r"}.get(choice["name"]) or str(tried.index(choice["name"]) + 1)
