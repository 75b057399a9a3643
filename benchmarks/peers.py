"""What influence libraries cost on the same work, beside robust-if: CPU seconds, forward passes over the training set (F), memory, agreement.

    python benchmarks/peers.py --threads 1                    every peer in turn; cases with a result are not run again (--again does)
    python benchmarks/peers.py --only captum ours:kfac        some peers, or single cases
    python benchmarks/peers.py --table                        the table of what has been run, in Markdown

5,000 training and 500 held-out images 1 x 28 x 28, CNN with 206,922 parameters trained for two epochs, float32, batches of 250.
Every peer gets a virtual environment in ``.peers/``, with the torch of ``constraints.txt`` and without torchvision, and every case its own process.
How a peer is called stands in ``peers/<name>.py``. Best of five runs, a single one where it takes more than 20 s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# This process imports nothing heavy: on Linux the peak memory of a child starts at that of the process that started it.
HERE = Path(__file__).resolve().parent
CACHE, RESULTS = HERE.parent / ".peers", HERE / "results" / "peers.jsonl"
WORK = CACHE / "work"

AGGREGATE = "One score per training sample, for the whole held-out set"
PAIRWISE = "Every training sample with every held-out sample, 5,000 x 500"
CURVATURE = "With inverse curvature"
REUSE = "Self-influence, several targets, stores"


@dataclass(frozen=True)
class Case:
    """``function`` of ``peers/<peer>.py``, under a heading of the table."""

    function: str
    section: str
    label: str


@dataclass(frozen=True)
class Peer:
    """What to install for a peer.

    Args:
        package: the distribution with its version; None for robust-if, which runs in the environment of this script.
        needs: what else to install when the package's own requirements cannot be followed (they ask for torchvision, or for much that is not used).
        pins: the packages whose versions are those of ``constraints.txt``.
    """

    package: str | None
    cases: tuple[Case, ...]
    needs: tuple[str, ...] | None = None
    pins: tuple[str, ...] = ("torch", "numpy", "safetensors")


PEERS = {
    "ours": Peer(None, (
        Case("aggregate", AGGREGATE, "inner product"),
        Case("aggregate_default", AGGREGATE, "inner product, batches of 128 (the default)"),
        Case("aggregate_bf16", AGGREGATE, "inner product in bfloat16"),
        Case("forward_channels_last", AGGREGATE, "*the forward pass alone, kernels in channels-last*"),
        Case("target", AGGREGATE, "*the gradient of the target alone*"),
        Case("plain_per_sample", AGGREGATE, "no library: `vmap(grad)`, then products"),
        Case("pairwise", PAIRWISE, "inner product"),
        Case("pairwise_default", PAIRWISE, "inner product, batches of 128 (the default)"),
        Case("trak", PAIRWISE, "two-sided random projection (TRAK-like), 512"),
        Case("datainf", CURVATURE, "DataInf"),
        Case("kfac", CURVATURE, "K-FAC"),
        Case("ekfac", CURVATURE, "EK-FAC"),
        Case("kfac_1500", CURVATURE, "K-FAC, factors from 1,500 samples (the default)"),
        Case("ekfac_1500", CURVATURE, "EK-FAC, factors from 1,500 samples (the default)"),
        Case("self_influence", REUSE, "self-influence"),
        Case("eight_targets", REUSE, "eight targets at once"),
        Case("store_build", REUSE, "build the store"),
        Case("store_build_default", REUSE, "build the store, batches of 128 (the default)"),
        Case("store_target", REUSE, "one further target from the store"),
        Case("store_self_influence", REUSE, "self-influence from the store"),
    )),
    "captum": Peer("captum==0.9.0", (
        Case("aggregate", AGGREGATE, "TracInCP, summed-loss trick"),
        Case("pairwise", PAIRWISE, "TracInCP, summed-loss trick"),
        Case("arnoldi", CURVATURE, "Arnoldi 40/30 on 1,000 samples, pairwise"),
        Case("self_influence", REUSE, "self-influence"),
    )),
    "kronfluence": Peer("kronfluence==1.0.1", (
        Case("aggregate", AGGREGATE, "identity"),
        Case("pairwise", PAIRWISE, "identity"),
        Case("kfac", CURVATURE, "K-FAC, eigenvectors in float32"),
        Case("ekfac", CURVATURE, "EK-FAC"),
        Case("ekfac_1500", CURVATURE, "EK-FAC, eigenvectors in float32, factors from 1,500 samples"),
        Case("ekfac_float32", CURVATURE, "EK-FAC, eigenvectors in float32"),
        Case("ekfac_pairwise", CURVATURE, "EK-FAC, eigenvectors in float32, pairwise"),
        Case("self_influence", REUSE, "self-influence"),
    ), needs=("accelerate", "einops", "einconv", "opt-einsum", "tqdm")),
    "dattri": Peer("dattri==0.3.0", (
        Case("aggregate", AGGREGATE, "TracIn, one composite sample"),
        Case("trak", PAIRWISE, "TRAK, 512 projections"),
        Case("datainf", CURVATURE, "DataInf from a fifth of the gradients, one composite sample"),
    ), needs=("scipy", "pyyaml", "tqdm")),
    "traker": Peer("traker==0.3.2", (
        Case("trak", PAIRWISE, "TRAK, 512 projections"),
    )),
    "pydvl": Peer("pyDVL[influence]==0.10.0", (
        Case("aggregate", AGGREGATE, "influences from the target's gradient"),
        Case("datainf_pairwise", CURVATURE, "inverse harmonic mean (DataInf) on 1,000 samples, pairwise"),
    ), pins=("torch", "safetensors")),
    "curvlinops": Peer("curvlinops-for-pytorch==3.0.1", (
        Case("kfac", CURVATURE, "K-FAC inverse, then JVP"),
        Case("ekfac", CURVATURE, "EK-FAC inverse, then JVP"),
        Case("cg", CURVATURE, "CG with 10 GGN products, then JVP"),
    ), needs=("backpack-for-pytorch==1.7.1", "einops", "einconv", "unfoldNd", "linear_operator", "jaxtyping", "mpmath", "opt-einsum", "scipy",
              "scikit-learn", "tqdm")),
    "backpack": Peer("backpack-for-pytorch==1.7.1", (
        Case("aggregate", AGGREGATE, "BatchGrad, then products"),
    ), needs=("einops", "unfoldNd")),
    "opacus": Peer("opacus==1.6.0", (
        Case("aggregate", AGGREGATE, "GradSampleModule, then products"),
    )),
}  # fmt: skip


def install(name: str, peer: Peer) -> Path:
    """The Python of the peer's environment, made on first use.

    Raises:
        subprocess.CalledProcessError: if pip fails; its output is in ``stdout``.
    """
    if peer.package is None:
        return Path(sys.executable)
    python = CACHE / name / "bin" / "python"
    pinned = dict(line.split("==") for line in (HERE.parent / "constraints.txt").read_text().split() if "==" in line)
    wanted = [f"{pin}=={pinned[pin]}" for pin in peer.pins]
    bare = [peer.package] if peer.needs is not None else []
    # what a requirement asks for must not bring torchvision in, so those packages come without their requirements
    bare += [need for need in peer.needs or () if need.startswith("backpack")]
    wanted += [need for need in peer.needs or (peer.package,) if need not in bare]
    mark, text = CACHE / name / "installed", "\n".join([*wanted, *bare])
    if not (mark.exists() and mark.read_text() == text):
        _call(sys.executable, "-m", "venv", "--clear", str(CACHE / name))
        pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _call(*pip, *wanted)
        if bare:
            _call(*pip, "--no-deps", *bare)
        mark.write_text(text)
    return python


def _call(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603


def environment(threads: int) -> dict[str, str]:
    paths = os.pathsep.join((str(HERE), str(HERE.parent)))
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, **counts, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"}


def prepare() -> str:
    """Make the work folder unless it is there; its fingerprint, so that results for another model are never put into one table."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    if not (WORK / "reference.npz").exists():
        subprocess.run([sys.executable, "-P", "-m", "peers.prepare", str(WORK)], check=True, env=environment(1))  # noqa: S603
    return hashlib.sha256((WORK / "model.safetensors").read_bytes()).hexdigest()[:12]


def measure(name: str, case: Case, python: Path, threads: int, limit: int) -> dict[str, object]:
    """What the case's process found, or ``{"failed": reason}``."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [str(python), "-P", "-m", "peers.measure", name, case.function, str(WORK), str(threads), str(limit), str(result)]
        try:
            done = subprocess.run(  # noqa: S603
                command, env=environment(threads), timeout=10 * limit, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"> {10 * limit} s by the clock"}
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return {"failed": f"> {limit} s"} if done.returncode == -signal.SIGXCPU else {"failed": "killed: more than the machine's memory?"}
        if done.returncode or not result.exists():
            return {"failed": _reason(done.stderr) or f"the process ended with {done.returncode}"}
        found: dict[str, object] = json.loads(result.read_text())
        return found


def _reason(output: str) -> str:
    lines = [line.strip().replace(str(HERE.parent), ".") for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or [""])[-1][:200]


def versions(python: Path, peer: Peer) -> dict[str, str]:
    names = ["torch", "numpy", "robust-if" if peer.package is None else peer.package.partition("==")[0].partition("[")[0]]
    script = (
        "import sys, json, platform\nfrom importlib.metadata import version, PackageNotFoundError as Missing\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n    try: found[name] = version(name)\n    except Missing: found[name] = '(source tree)'\nprint(json.dumps(found))"
    )
    done = subprocess.run([str(python), "-P", "-c", script, *names], check=True, capture_output=True, text=True)  # noqa: S603
    found: dict[str, str] = json.loads(done.stdout)
    return found


def chosen(only: list[str]) -> Iterator[tuple[str, Peer, list[Case]]]:
    """The peers and cases that ``--only`` names (``peer`` or ``peer:function``); all by default.

    Raises:
        ValueError: if a name is unknown.
    """
    known = {*PEERS, *(f"{name}:{case.function}" for name, peer in PEERS.items() for case in peer.cases)}
    if unknown := [each for each in only if each not in known]:
        raise ValueError(f"--only: unknown {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
    for name, peer in PEERS.items():
        cases = [case for case in peer.cases if not only or name in only or f"{name}:{case.function}" in only]
        if cases:
            yield name, peer, cases


def run(only: list[str], threads: int, limit: int, again: bool) -> None:
    workload = prepare()
    done = {key for key, record in records(workload).items() if "failed" not in record}
    for name, peer, cases in chosen(only):
        todo = [case for case in cases if again or (name, case.function, threads) not in done]
        if not todo:
            continue
        try:
            python = install(name, peer)
            found, failed = versions(python, peer), None
        except subprocess.CalledProcessError as error:
            found, failed = {}, f"did not install: {_reason(error.stdout or '')}"
        for case in todo:
            record = {"peer": name, "case": case.function, "threads": threads, "workload": workload, "versions": found}
            record |= {"failed": failed} if failed else measure(name, case, python, threads, limit)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            told = [f"{key} {value}" for key, value in record.items() if key not in ("peer", "case", "threads", "workload", "versions")]
            print(f"{name}:{case.function}", *told, flush=True)


def records(workload: str) -> dict[tuple[str, str, int], dict]:
    """The last record of every peer, case and number of threads."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    found = [record for record in map(json.loads, lines) if record["workload"] == workload]
    return {(record["peer"], record["case"], record["threads"]): record for record in found}


def table(threads: int) -> None:
    known = records(prepare())
    for section in (AGGREGATE, PAIRWISE, CURVATURE, REUSE):
        print(f"\n**{section}**\n\n| peer | case | CPU seconds | forward passes (F) | peak MB | r |\n|---|---|---|---|---|---|")
        rows = [(name, case, known.get((name, case.function, threads))) for name, peer in PEERS.items() for case in peer.cases]
        for name, case, record in rows:
            if case.section == section:
                who = "plain torch" if case.function.startswith("plain") else "robust-if" if name == "ours" else name
                print(f"| {who} | {case.label} | {' | '.join(_cells(record, case))} |")
    each = [record["versions"] for record in known.values() if record["threads"] == threads]
    found = sorted({(key, value) for versions in each for key, value in versions.items()}, key=lambda pair: (pair[0].lower(), pair[1]))
    print(f"\n{', '.join(f'{key} {value}' for key, value in found)}; {threads} thread{'s' * (threads > 1)}. r in brackets: another method.")


def _cells(record: dict | None, case: Case) -> tuple[str, str, str, str]:
    if record is None:
        return "not run", "", "", ""
    if "failed" in record:
        reason = str(record["failed"]).replace("|", "\\|")
        return (reason, "", "", "") if reason.startswith(">") else (f"failed: {reason}", "", "", "")
    r = record.get("r_pairs", record.get("r"))
    agreement = "" if r is None else f"({r:.3f})" if case.section == CURVATURE or case.function == "trak" else f"{r:.6f}"
    if "finite" in record:
        agreement = "scores not finite"
    return f"{record['cpu']:.2f}", f"{record['ratio']:.2f}", f"{record['peak_mb']:.0f}", agreement


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="peers, or single cases as peer:case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=300, help="CPU seconds that one case may take")
    parser.add_argument("--again", action="store_true", help="run cases that have a result once more")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run, and run nothing")
    args = parser.parse_args()
    table(args.threads) if args.table else run(args.only, args.threads, args.limit, args.again)
