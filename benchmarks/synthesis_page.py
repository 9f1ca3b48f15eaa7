"""Write the tables of docs/synthesis.md from the results of memory.py and synthesis.py.

python benchmarks/synthesis_page.py
"""

import json
from pathlib import Path

from pages import fill, table

ROOT = Path(__file__).parents[1]
NAMES = {
    "modes": ("modes found", 2), "vendi": ("Vendi", 2), "conditional_rke": ("conditional RKE", 2), "scendi": ("Scendi", 2),
    "coverage": ("coverage of the art", 3), "agreement": ("agreement", 3), "distance": ("distance to art", 3),
}  # fmt: skip


def bounds(found, name):
    digits = NAMES[name][1]
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*found[name], d=digits)


def sets(part):
    return {k: v for k, v in part.items() if k != "settings"}


def exchange():
    """Arithmetic: four bytes a number, 64 images of each process between two exchanges, 5% of them sent."""
    rows = []
    for width in (4096, 16_384, 65_536):
        for world in (8, 1000):
            sent = 4 * 0.05 * 64 * width
            rows.append([f"{width:,} numbers", f"{world:,}", f"{sent / 1e6:.2f} MB", f"{sent * world / 1e6:,.1f} MB"])
    return table(["rows of", "processes", "sent by each", "received by each"], rows, "   ")


def scale(memory):
    rows = [
        [
            f"10^{len(str(r['samples'])) - 1}", f"{r['processes']:,}",
            f"{r['rows_held_by_each']:,.0f} ({r['gb_held_by_each']:.1f} GB)", f"{r['rows_read_at_a_step']:,.0f}",
            f"{r['ms_of_a_step']:.0f} ms", f"{r['ms_of_a_step_if_all_rows_were_read'] / 1e3:,.1f} s",
            f"{r['share_of_images_told']:.1%}", f"{r['mb_told_for_each_1000_images']:.1f} MB",
        ]
        for r in memory["scale"]
    ]  # fmt: skip
    head = ["samples", "processes", "rows held by each", "read at a step", "a step", "a step that read all rows",
            "images sent to others", "sent per 1,000 images"]  # fmt: skip
    return table(head, rows)


def steps(memory):
    rows, step, whole = [], memory["step"], memory["whole"]
    for batch, product in (("1", "`M @ x`"), ("8", "`M @ X`")):
        r = step[f"batch {batch}"]
        rows.append([f"10^4 rows, batch {batch}", f"{product}: {r['floor_ms']:.0f} ms", f"{r['first_ms']:.0f} ms",
                     f"{r['gradient_ms']:.0f} ms", f"{r['ratio']:.2f}", "-"])  # fmt: skip
    half = step["float16"]
    rows.append(["the same in float16, batch 1", "the float32 product", "-", f"{half['gradient_ms']:.0f} ms",
                 f"{half['ratio_to_float32_floor']:.2f}", "-"])  # fmt: skip
    for name, r in memory["prompts"].items():
        if isinstance(r, dict):
            _, order, batch = name.split(", ")
            rows.append([
                f"{r['rows']:,} of 10^5 rows, {order}, {batch}", f"the same over these: {r['floor_ms']:.1f} ms",
                f"{r['first_ms']:.1f} ms", f"{r['later_ms']:.1f} ms", f"{r['ratio_later']:.2f}", f"{r['ratio']:.2f}",
            ])  # fmt: skip
    head = ["gradient over rows of 16,384 float32", "floor", "an image's first step", "a later one",
            "later over floor", "mean of 12 over floor"]  # fmt: skip
    published, profile = memory["published"], step["profile_ms"]
    read, summed = profile["products with x"], profile["sum of rows"]
    constant = [
        [name, f"{min(r['ms'].values()):.2f} to {max(r['ms'].values()):.2f} ms", f"{r['largest_over_smallest']:.2f}"]
        for name, r in memory["compressed"].items()
    ]
    shares = ", ".join(f"{k} {v:.1%}" for k, v in whole["shares"].items() if k != "pipeline and guidance")
    return "\n\n".join([
        table(head, rows),
        f"Overhead is {step['bytes_beside']:.1%} of the bytes of the rows ({memory['prompts']['bytes_beside']:.1%} where a "
        f"run copies its rows), and another {step['bytes_reserved']:.1%} is reserved for further rows. Of a step over "
        f"10^4 rows, products with x, which read all rows once, take {read:.0f} ms; the sum, over the same rows in the "
        f"cache, {summed:.0f} ms; everything else {sum(profile.values()) - read - summed:.0f} ms.",
        f"The published algorithm, full kernel matrices by autograd, takes {published['full_ms'] / 1e3:.1f} s at 4,000 "
        f"rows; the closed form {published['ours_all_rows_ms']:.0f} ms over all rows, {published['faster']:.0f} times as "
        f"fast, and {published['ours_ms']:.1f} ms over those that matter.",
        "Memories of constant size, eight samples, 10^3 to 10^6 entries:",
        table(["memory", "a gradient", "largest over smallest"], constant),
        f"A whole synthesis, 2,000 images of the embedded pipeline on two processes of one thread each: "
        f"{whole['synthesis_images_per_s']:.2f} images/s, {whole['efficiency_to_twice_one']:.0%} of twice one plain loop "
        f"that writes nothing ({whole['plain_one_process_images_per_s']:.2f}/s), "
        f"{whole['efficiency_to_two_at_once']:.0%} of two such loops at once "
        f"({whole['plain_two_at_once_images_per_s']:.2f}/s). Guidance takes "
        f"{whole['guidance_share']:.1%} of the time; {shares}. {whole['bytes_sent_per_image'] / 1e3:.1f} KB are sent for "
        "each image.",
    ])  # fmt: skip


def direction(memory):
    found = {k: v for k, v in memory["direction"].items() if isinstance(v, dict)}
    names = list(next(iter(found.values())))
    rows = [[k, *(f"{r[n][0]:.2f}, {r[n][1]:.2f}" if n in r else "-" for n in names)] for k, r in found.items()]
    middle, low, high = next(v for v in memory["direction"].values() if isinstance(v, list))
    return table(["entries, bandwidth", *names], rows) + (
        "\n\nAn open bandwidth is set from 128 of the rows that matter. Relative to the bandwidth from all rows it is "
        f"{middle:.3f} (deciles {low:.3f} and {high:.3f})."
    )


def effect(found):
    rows = [[k, *(bounds(v, n) for n in NAMES)] for k, v in sets(found["memory"]).items()]
    return table(["", *(head for head, _ in NAMES.values())], rows)


def phrases(found):
    columns = ("modes", "vendi", "agreement", "distance")
    rows = []
    for name, v in sets(found["phrases"]).items():
        weights = (
            [f"{v['weight_of_phrases']:.2f}", f"{v['weight_of_others']:.4f}"] if "weight_of_others" in v else ["-", "-"]
        )
        rows.append([name, *(bounds(v, n) for n in columns), *weights])
    return table(["", *(NAMES[n][0] for n in columns), "weight of other phrasings", "of other subjects"], rows)


def main():
    results = ROOT / "benchmarks" / "results"
    memory, found = (json.loads((results / f"{name}.json").read_text()) for name in ("memory", "synthesis"))
    fill(ROOT / "docs" / "synthesis.md", {
        "exchange": exchange(), "scale": scale(memory), "steps": steps(memory), "direction": direction(memory),
        "effect": effect(found), "phrases": phrases(found),
    })  # fmt: skip


if __name__ == "__main__":
    main()
