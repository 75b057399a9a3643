"""Does the cost grow with the number of samples, and the memory not? CPU seconds and peak memory of a few estimators for 5,000 to 80,000 samples.

    python benchmarks/growth.py --threads 1

Every number comes from a process of its own. The samples are scikit-learn's digits, enlarged to 28 x 28 and repeated; the model is the CNN of
``peers.py``. Writes ``benchmarks/results/growth.jsonl`` and the figure ``docs/growth.svg``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import robust_if as rif
from robust_if import models
from robust_if.data import batches

BATCH = 250
SIZES = (5_000, 10_000, 20_000, 40_000, 80_000)
CASES = ("forward pass", "IP", "EK-FAC", "self-influence")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "growth.jsonl"


def data(n: int, held_out: int) -> tuple[rif.Samples, rif.Samples]:
    images, labels = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).integers(0, len(labels), size=n + held_out)
    x = torch.nn.functional.interpolate(torch.from_numpy(images / 16).float().view(-1, 1, 8, 8), size=28, mode="bilinear")
    y = torch.from_numpy(labels).long()[rows]
    x = x[rows]
    return rif.Samples((x[:n], y[:n])), rif.Samples((x[n:], y[n:]))


def memory(field: str) -> float:
    """``VmRSS``, the memory of this process, or ``VmHWM``, its peak since the last reset, in MB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(case: str, n: int, threads: int) -> dict[str, object]:
    """CPU seconds of the case (best of three), and the peak of its memory beyond what the process held before, in MB."""
    torch.set_num_threads(threads)
    train, valid = data(n, 500)
    task = rif.Task(models.build("cnn", (1, 28, 28), 10))
    target, sweep = rif.Utility(valid, batch_size=BATCH), rif.Sweep(BATCH)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches(train, BATCH, task.params()["0.weight"]):
                task.losses(task.params(), batch)

    estimators = {"IP": rif.InnerProduct(), "EK-FAC": rif.InnerProduct(rif.EKFAC()), "self-influence": rif.SelfInfluence()}
    times: list[float] = []
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(3):
        begin = time.process_time()
        if case == "forward pass":
            forward()
        else:
            estimators[case].score(task, train, target=target, sweep=sweep)
        times.append(time.process_time() - begin)
    return {"case": case, "n": n, "seconds": min(times), "mb": memory("VmHWM") - before}


def table(records: list[dict[str, object]]) -> str:
    found = {(record["case"], record["n"]): record for record in records}
    lines = ["| samples | " + " | ".join(f"{case}: s, MB" for case in CASES) + " |", "|---" * (1 + len(CASES)) + "|"]
    for n in SIZES:
        cells = [f"{found[case, n]['seconds']:.2f}, {found[case, n]['mb']:.0f}" for case in CASES]
        lines.append(f"| {n:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(records: list[dict[str, object]]) -> str:
    """Seconds against n (left) and megabytes beyond the data against n (right), drawn by hand: two panels of straight lines."""
    colours = {"forward pass": "#888888", "IP": "#1b6ac9", "EK-FAC": "#c9541b", "self-influence": "#2a8f4f"}
    panels = {
        "CPU seconds": {case: [(r["n"], r["seconds"]) for r in records if r["case"] == case] for case in colours},
        "peak MB beyond the data": {case: [(r["n"], r["mb"]) for r in records if r["case"] == case] for case in colours},
    }
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" font-family="sans-serif" font-size="12" role="img">']
    out.append("<title>Cost grows linearly with the number of samples, memory does not</title>")
    for k, (title, lines) in enumerate(panels.items()):
        left, width, top, height = 60 + 380 * k, 280, 40, 200
        most = max(y for points in lines.values() for _, y in points) or 1.0  # type: ignore[type-var]
        out.append(f'<text x="{left}" y="24" fill="#777777">{title}</text>')
        out.append(f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#888888"/>')
        for n in (20_000, 40_000, 80_000):
            out.append(f'<text x="{left + width * n / 80_000:.0f}" y="{top + height + 18}" text-anchor="middle" fill="#777777">{n:,}</text>')
        for share in (0.5, 1.0):
            out.append(
                f'<text x="{left - 6}" y="{top + height * (1 - share) + 4:.0f}" text-anchor="end" fill="#777777">{share * most:.3g}</text>'  # type: ignore[operator]
            )
        for case, points in lines.items():
            path = " ".join(f"{left + width * n / 80_000:.1f},{top + height * (1 - y / most):.1f}" for n, y in sorted(points))  # type: ignore[operator]
            out.append(f'<polyline points="{path}" fill="none" stroke="{colours[case]}" stroke-width="2"/>')
    for k, (case, colour) in enumerate(colours.items()):
        out.append(f'<path d="M{60 + 160 * k} 284h20" stroke="{colour}" stroke-width="3"/>')
        out.append(f'<text x="{86 + 160 * k}" y="288" fill="#777777">{case}</text>')
    return "\n".join([*out, "</svg>\n"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    found = []
    for size in SIZES:
        for each in CASES:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(measure, (each, size, args.threads)))
            print(found[-1], flush=True)
    RESULTS.write_text("".join(json.dumps(record) + "\n" for record in found))
    (ROOT / "docs" / "growth.svg").write_text(figure(found))
    print(table(found))
