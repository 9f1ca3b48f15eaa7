"""Images of a run that nearly repeat earlier ones of any prompt, as a list of names to drop."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from kspec_guidance.evaluation.semantic import load_faiss, semantic_duplicates
from kspec_guidance.synthesis.errors import SynthesisError, disk_errors
from kspec_guidance.synthesis.records import unpack_tensors
from kspec_guidance.synthesis.store import Store
from kspec_guidance.utils.atomic_io import replacing

__all__ = ["SEMANTIC", "check_cosine", "write_semantic_duplicates"]

SEMANTIC = "semantic-duplicates.txt"


def check_cosine(at_least: Any) -> None:
    """Check the cosine from which images repeat others, and that the index is installed.

    Raises:
        SynthesisError: for a value out of range, or a missing package.
    """
    if at_least is None:
        return
    try:
        load_faiss(at_least)
    except (ValueError, ImportError) as error:
        raise SynthesisError(str(error)) from error


def write_semantic_duplicates(store: Store, epochs: Sequence[int], at_least: float) -> int:
    """Write the names of images whose features nearly repeat those of an image that was finished earlier; their number.

    Records are read one at a time, and twice: their features are not all in memory.

    Args:
        store: of the run.
        epochs: whose features can be compared.
        at_least: cosine of features.
    """
    names = [row["file_name"] for record in store.records(list(epochs)) for row in record.rows]

    def blocks() -> Iterator[Tensor]:
        for record in store.records(list(epochs), tensors=True):
            if record.rows:
                yield unpack_tensors(record.tensors).features

    found = semantic_duplicates(blocks(), len(names), at_least) if names else []
    with disk_errors(store.out), replacing(store.out / SEMANTIC) as fresh:
        fresh.write_text("".join(f"{names[i]}\n" for i, _, _ in found), encoding="utf-8")
    return len(found)
