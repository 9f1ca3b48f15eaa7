"""The result of a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kspec_guidance.synthesis.deduplication import SEMANTIC

__all__ = ["Synthesis"]


@dataclass
class Synthesis:
    """The result of a run.

    Attributes:
        out: the folder.
        images: in the whole set.
        rejected: dropped images of the whole set, by reason.
        stopped: prompts of all processes, by the reason why they ended.
        attributes: images of the whole set, by attribute.
        targets: prompts of all processes, by what the guide's target has come to.
        made: images that this process made in this call.
        total_made: images that all processes made in this call.
        seconds: that this call took to make them.
        guidance_seconds: of these, the time of guidance.
        exchanges: between the processes.
        bytes_sent: by this process in this call.
        arms: of a run with arms: images, shares, costs and scores of each; see :func:`arm_summary`.
        arm_differences: of a run with arms: where the two with most images differ; see :func:`arm_differences`.
        report: path of ``report.html``; None if none was written, and in all processes but the first.
        semantic_duplicates: images that nearly repeat others of any prompt; None if they were not looked for.
        url: of the page of the set on the hub; None if it was not uploaded.
        first: whether this is the first process, which prints and writes for all.
        reproduced: of :func:`reproduce`: files of images that have the bytes, or the pixels, of those of the earlier set.
    """

    out: Path
    images: int
    rejected: dict[str, int] = field(default_factory=dict)
    stopped: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    made: int = 0
    total_made: int = 0
    seconds: float = 0.0
    guidance_seconds: float = 0.0
    targets: dict[str, int] = field(default_factory=dict)
    exchanges: int = 0
    bytes_sent: int = 0
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    arm_differences: list[dict[str, Any]] = field(default_factory=list)
    report: Path | None = None
    semantic_duplicates: int | None = None
    url: str | None = None
    first: bool = True
    reproduced: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.images} images in {self.out}"]
        if self.total_made != self.images:
            lines[0] += f", {self.total_made} of them made now"
        for name in ("rejected", "stopped", "attributes", "targets"):
            counts = getattr(self, name)
            if counts:
                lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in sorted(counts.items())))
        if self.arms:
            lines.append("arms: " + ", ".join(f"{name} {100 * a['share']:.0f}%" for name, a in self.arms.items()))
        if self.semantic_duplicates is not None:
            lines.append(f"{self.semantic_duplicates} images nearly repeat others: {self.out / SEMANTIC}")
        if self.url is not None:
            lines.append(f"uploaded to {self.url}")
        if self.reproduced:
            lines.append("as before: " + ", ".join(f"{k} {v}" for k, v in self.reproduced.items() if v))
        if self.seconds:
            lines.append(f"{self.seconds:.1f} s, of which guidance {self.guidance_seconds:.1f} s")
        return "\n".join(lines)
