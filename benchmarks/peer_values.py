"""Values that the authors' code prints, for benchmarks/peers.py.

    python -m benchmarks.peer_values --peers FOLDER

FOLDER holds git checkouts of aziksh-ospanov/FKEA, aziksh-ospanov/scendi-score, aziksh-ospanov/truncated-vendi,
buyeah1109/KEN, mjalali/conditional-vendi, mjalali/renyi-kernel-entropy, vertaix/Vendi-Score, toshas/torch-fidelity and
clovaai/generative-evaluation-prdc. Inputs go to tests/data/peers/inputs.safetensors; values, commits and the rounding of
the printed values to tests/data/peers/values.json.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import subprocess
import sys
import types
from pathlib import Path

import torch
import torchmetrics
from safetensors.torch import save_file

from benchmarks.peers import INSTALLABLE

DATA = Path(__file__).parents[1] / "tests" / "data" / "peers"


def inputs() -> dict[str, torch.Tensor]:
    """Two sets of images, the prompts of the first, and the frequencies of random features, in float64."""
    g = torch.Generator().manual_seed(0)

    def rows(n: int, d: int) -> torch.Tensor:
        centres = torch.randn(7, d, generator=g, dtype=torch.float64)
        return centres[torch.randint(7, (n,), generator=g)] + 0.3 * torch.randn(n, d, generator=g, dtype=torch.float64)

    return {"x": rows(60, 8), "y": rows(45, 8), "prompt_features": rows(60, 8), "frequencies": rows(8, 24)}


REPOSITORIES = {  # of the packages in benchmarks/peers.py
    "vendi-score": "vertaix/Vendi-Score",
    "rke-score": "mjalali/renyi-kernel-entropy",
    "prdc": "clovaai/generative-evaluation-prdc",
    "torch-fidelity": "toshas/torch-fidelity",
}


def load(path: Path) -> types.ModuleType:
    """A module of another package, executed from its file."""
    spec = importlib.util.spec_from_file_location(path.parents[1].name, path)
    module = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(io.StringIO()):
        spec.loader.exec_module(module)
    return module


def commit(folder: Path) -> str:
    """The commit of a checkout."""
    return subprocess.run(
        ["git", "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    """Run the authors' functions on the inputs, and write what they return or log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    peers = parser.parse_args().peers
    torch.set_default_dtype(torch.float64)  # their accumulators have the default type
    z, values = inputs(), {}

    fkea = load(peers / "FKEA" / "FKEA" / "metric" / "algorithm_utils.py")
    cov, _ = fkea.cov_rff2(z["x"], z["frequencies"].shape[1], 1.0, 16, z["frequencies"])
    printed = fkea.calculate_stats(torch.linalg.eigh(cov)[0], [1, 1.5, 2, "inf"])
    values["FKEA"] = {
        "repository": "aziksh-ospanov/FKEA", "commit": commit(peers / "FKEA"), "rounding": 5e-3,
        "printed": {key: float(value) for key, value in printed.items()},
    }  # fmt: skip

    lines: list[str] = []
    logger = types.SimpleNamespace(info=lines.append)
    ken = load(peers / "KEN" / "KEN" / "metric" / "algorithm_utils.py")
    printed = {}
    for eta in (1.0, 3.0):
        settings = types.SimpleNamespace(sigma=1.5, batchsize=16, eta=eta, logger=logger)
        ken.KEN_by_eigendecomposition(z["x"], z["y"], settings)
        printed[f"eta={eta:g}"] = float(lines[-1].split()[-1])
    values["KEN"] = {
        "repository": "buyeah1109/KEN", "commit": commit(peers / "KEN"), "rounding": 5e-5, "printed": printed,
    }  # fmt: skip

    scendi = load(peers / "scendi-score" / "scendi" / "metric" / "algorithm_utils.py")
    logging.disable()
    settings = types.SimpleNamespace(kernel="cosine", sigma=1.0, batchsize=16, rff_dim=24, logger=logger)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        images, prompts = scendi.rff_sce_from_feats(z["prompt_features"], z["x"], settings)
    values["Scendi"] = {
        "repository": "aziksh-ospanov/scendi-score", "commit": commit(peers / "scendi-score"), "rounding": 1e-7,
        "printed": {"images": images, "prompts": prompts},
    }  # fmt: skip

    sys.modules["log"] = types.SimpleNamespace(make_logger=lambda *args: logger)  # a file that its repository lacks
    conditional = load(peers / "conditional-vendi" / "conditional_evaluation.py").ConditionalEvaluation(sigma=1.5)
    h, information, *_ = conditional.conditional_entropy(z["x"], z["prompt_features"], order=1)
    printed = {"conditional": h.exp().item(), "information": information.exp().item()}
    h, *_ = conditional.conditional_entropy(z["x"], z["prompt_features"], order=2)
    values["Conditional-Vendi"] = {
        "repository": "mjalali/conditional-vendi", "commit": commit(peers / "conditional-vendi"), "rounding": 0,
        "printed": printed | {"conditional, q=2": h.exp().item()},
    }  # fmt: skip

    truncated = load(peers / "truncated-vendi" / "truncated_vendi.py").TruncatedVendi(z["x"])
    printed = {"t=10": float(truncated.compute_score(1, truncation=10, kernel="gaussian", sigma=1.5))}
    values["truncated-vendi"] = {
        "repository": "aziksh-ospanov/truncated-vendi", "commit": commit(peers / "truncated-vendi"), "rounding": 0,
        "printed": printed,
    }  # fmt: skip

    for name, run in INSTALLABLE.items():
        at, version = {"repository": None, "commit": None}, torchmetrics.__version__
        if name in REPOSITORIES:
            folder = peers / REPOSITORIES[name].split("/")[1]
            sys.path.insert(0, str(folder))
            at, version = {"repository": REPOSITORIES[name], "commit": commit(folder)}, None
        with contextlib.redirect_stdout(io.StringIO()):
            found = run(z["x"], z["y"], z["prompt_features"])
        rounding = 1e-7 if name == "torch-fidelity" else 0  # its precision and recall are means in float32
        values[name] = {**at, "version": version, "rounding": rounding, "printed": found}

    DATA.mkdir(parents=True, exist_ok=True)
    save_file(z, DATA / "inputs.safetensors")
    (DATA / "values.json").write_text(json.dumps(values, indent=2) + "\n")
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
