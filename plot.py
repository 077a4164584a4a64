"""
Pictures of what runs leave on disk; needs matplotlib.

    python plot.py loss out/lora out/full -o loss.png         # training and validation loss
    python plot.py spectra out/lora -o spectra.png            # singular values of each layer's change
    python plot.py memory a.json b.json -o memory.png         # what `python memory.py ... --json` printed
    python plot.py codebooks [MODEL.safetensors] -o a.svg     # levels of codes over a histogram of weights
    python plot.py results results/e2e.jsonl -o results.png   # scores over trained parameters
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

from lib.checks import Parser, check, parse_json, shown, typed
from lib.config import run_main


def parse(args):
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("loss", "spectra", "memory", "codebooks", "results"))
    parser.add_argument("files", nargs="*")
    parser.add_argument("-o", "--output", default="plot.png")
    parsed = parser.parse_args(args)
    output = Path(parsed.output)
    check(output.suffix in (".png", ".svg", ".pdf"), f"{output}: a picture is .png, .svg or .pdf")
    check(output.is_file() or not output.exists(), f"{output}: something else than a file is there")
    known = parsed.files or parsed.kind == "codebooks"
    check(known, f"nothing to draw: python plot.py {parsed.kind} FILE_OR_FOLDER -o {output}")
    return parsed


if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    ARGS = run_main(parse, sys.argv[1:])

import numpy as np
import torch

import peft
import quant
from lib import results as kept_results
from lib.files import read_bytes, read_json_lines, read_tensors

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e",
          "#9498a0")        # told apart in print
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "axes.axisbelow": True, "font.size": 10, "svg.fonttype": "none"}


def figure(rows=1, columns=1, width=7.0, height=4.2, **kwargs):
    """(figure, axes) with thin, quiet frames; width and height in inches."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plot.py needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **kwargs)


# -----------------------------------------------------------------------------
# loss


def read_log(folder):
    """([steps, losses], [steps, validation losses]) of a run's log.jsonl."""
    path = Path(folder, "log.jsonl")
    check(path.is_file(), f"{path}: no such file; is {folder} the folder of a run?")
    lines = read_json_lines(path)
    check(lines, f"{path}: empty")
    return curve(lines, "loss", path), curve(lines, "val_loss", path)


def curve(lines, key, path):
    """[steps, values] of the lines of a log that have the key."""
    where = f"{path}: not a log of train.py, "
    found = [line for line in lines if key in line]
    steps = [typed("step", line.get("step"), int, where) for line in found]
    return steps, [typed(key, line[key], float, where) for line in found]


def loss(folders):
    """Training loss, thin and smoothed over 20 steps, and validation loss, thick with dots: a color a run."""
    fig, ax = figure()
    for folder, color in zip(folders, COLORS * len(folders)):
        (steps, losses), validation = read_log(folder)
        smooth = [fmean(losses[max(0, end - 20):end]) for end in range(1, len(losses) + 1)]
        ax.plot(steps, smooth, lw=0.9, alpha=0.55, color=color)
        ax.plot(*validation, "o-", lw=2, ms=4.5, color=color, label=Path(folder).name)
    ax.set(xlabel="optimizer step", ylabel="loss (nats a token)",
           title="Loss: validation (dots) and training (thin, mean of 20 steps)")
    ax.legend(frameon=False)
    return fig


# -----------------------------------------------------------------------------
# spectra


def spectra(folders):
    """Singular values of B A of every LoRA layer, largest first; a panel a run, a color a kind of layer."""
    width = 3.6 * max(len(folders), 2)
    fig, axes = figure(1, len(folders), width, squeeze=False, sharey=True)
    for ax, folder in zip(axes[0], folders):
        path = Path(folder, "adapter.pt") if Path(folder).is_dir() else Path(folder)
        tensors = peft.check_alone(peft.read_adapter(path), path)["tensors"]
        layers = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
        check(layers, f"{path}: no LoRA in it, so no spectrum to draw")
        kinds = sorted({layer.split(".")[-1] for layer in layers})
        for kind, color in zip(kinds, COLORS):
            ax.plot([], [], color=color, label=kind)
            for layer in layers:
                if layer.endswith(f".{kind}"):
                    values = spectrum(tensors[f"{layer}.A"].float(), tensors[f"{layer}.B"].float())
                    ax.plot(range(1, len(values) + 1), values, ".-", lw=1, alpha=0.7, color=color)
        ax.set(xlabel="index", title=f"{Path(folder).name}: {len(layers)} layers", yscale="log")
        ax.locator_params(axis="x", integer=True)
        ax.legend(frameon=False, title="layer", bbox_to_anchor=(1, 1), loc="upper left")
    axes[0, 0].set_ylabel("singular value of B A")
    return fig


def spectrum(A, B):
    """
    Singular values (r,) of B A, from A (r, in) and B (out, r): those of the r x r product of the triangles in
    their QR decompositions.
    """
    left, right = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    return torch.linalg.svdvals(left @ right.T)


# -----------------------------------------------------------------------------
# memory

WIDE, NARROW = "weights, 16 or 32 bits", "weights, 4 or 8 bits"
KIND_OF_PART = {"weights float32": WIDE, "weights bfloat16": WIDE,
                "attention": "activations", "ffn": "activations", "norms": "activations",
                "residuals": "activations", "adapters": "activations", "embedding": "activations",
                "cuBLAS workspaces": "CUDA", "CUDA context": "CUDA"}
KINDS = (WIDE, NARROW, "adapter", "gradients", "optimizer states", "activations", "logits and loss",
         "temporaries", "CUDA")         # as they lie upon each other, from below


def read_reports(files):
    """The reports of memory.simulate in files that memory.py --json has printed."""
    reports = []
    for path in files:
        where = f"{path}: not what memory.py --json prints, "
        for report in parse_json(read_bytes(path), path, list):
            report = typed("a report", report, dict, where)
            typed("method", report.get("method"), str, where)
            for part, n in typed("parts", report.get("parts"), dict, where).items():
                check(0 <= typed(part, n, int, where) < 2**63, f"{where}{part} is {shown(n)}")
            reports.append(report)
    check(reports, "no report in any of the files")
    return reports


def gigabytes(report):
    """{kind: GB} of a report's parts."""
    kinds = Counter()
    for part, n in report["parts"].items():
        kind = NARROW if part.startswith("weights") else part
        kinds[KIND_OF_PART.get(part, kind)] += n / 1e9
    return kinds


def memory(files):
    """Stacked bars, one a report of memory.simulate; parts of a kind are put together."""
    reports = read_reports(files)
    fig, ax = figure(width=2 + 1.2 * max(len(reports), 3))
    columns, totals = range(len(reports)), np.zeros(len(reports))
    kinds = list(map(gigabytes, reports))
    for kind, color in zip(KINDS, COLORS):
        heights = np.array([of_report[kind] for of_report in kinds])
        if heights.any():
            bars = ax.bar(columns, heights, 0.65, totals, color=color, label=kind)
            totals += heights
    check(totals.any(), f"{', '.join(map(str, files))}: no bytes in any part of a report; memory.py --json prints some")
    ax.bar_label(bars, [f"{total:.3g}" for total in totals])
    ax.set_xticks(columns, [report["method"] for report in reports])
    ax.set(ylabel="GB at the peak", title="What the peak consists of")
    ax.margins(y=0.08)
    ax.grid(axis="x", visible=False)
    ax.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", reverse=True)
    return fig


# -----------------------------------------------------------------------------
# codebooks


def codebooks(files):
    """The levels of each code over a histogram of weights over their block's absmax; each code's error."""
    source = "drawn from N(0, 1)"
    weights = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    if files:
        matrices = [tensor.float().flatten() for _, tensor in read_tensors(files[0]) if tensor.dim() == 2]
        weights, source = torch.cat(matrices), Path(files[0]).name
    blocks = weights[:len(weights) // 64 * 64].view(-1, 64)
    scaled = blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    # The levels of a code of 8 bits would be a solid block.
    codes = {name: code.levels for name, code in quant.CODES.items() if code.bits <= 4}
    fig, axes = figure(len(codes), 1, 7, 1.9 * len(codes), sharex=True)
    for ax, (name, levels) in zip(axes, codes.items()):
        difference = quant.quantize(blocks, name).dequantize() - blocks
        error = difference.abs().mean() / blocks.std()
        ax.hist(scaled.flatten().numpy(), 201, range=(-1, 1), density=True, color="#97bbf5")
        ax.vlines(levels, 0, ax.get_ylim()[1], color="#ff725c", lw=1.2)
        ax.set(title=f"{name}: mean error {error:.4f} of the deviation", ylabel="density")
        ax.grid(visible=False)
    axes[-1].set_xlabel(f"weight / largest magnitude of its block of 64 ({source})")
    return fig


# -----------------------------------------------------------------------------
# results


def results(files):
    """BLEU and validation loss over the trained parameters: a point a method, its deviation over the seeds as a bar."""
    rows = [row for path in files for row in kept_results.read(path)]
    fig, axes = figure(1, 2, 11, 4.6)
    panels = {"BLEU": ("BLEU", 100), "val_loss": ("validation loss (nats a token)", 1)}
    for ax, (key, (title, factor)) in zip(axes, panels.items()):
        points = []
        for group, color in zip(kept_results.by_settings(rows), COLORS * len(rows)):
            values = [row[key] * factor for row in group if row[key] is not None]
            if not values:
                continue
            trained, mean = group[0]["trainable"], fmean(values)
            deviation = stdev(values) if len(values) > 1 else 0
            ax.errorbar(trained, mean, deviation, fmt="o", ms=6, capsize=3, color=color)
            points.append((mean, trained, kept_results.name_of(group[0]), color))
        ax.set(xscale="log", xlabel="trained parameters", ylabel=title)
        ax.margins(x=0.15, y=0.1)
        name_points(ax, points)
    return fig


def name_points(ax, points):
    """
    Writes the name of each (y, x, name, color) beside its point; higher, with a line to the point, where
    another name or point is there already.
    """
    ax.figure.canvas.draw()                                      # Now it is known where a point comes to lie.
    height, letter, beside = 9.5, 5, 7                           # of a name, and from its point; in points
    places = [ax.transData.transform((x, y)) * 72 / ax.figure.dpi for y, x, _, _ in points]
    taken = [(x - beside / 2, x + beside / 2, y) for x, y in places]
    for (value, trained, name, color), (x, y) in sorted(zip(points, places)):
        left, right, place = x + beside, x + beside + letter * len(name), y
        while any(left < r and l < right and abs(place - p) < height for l, r, p in taken):
            place += 1
        taken.append((left, right, place))
        line = dict(arrowstyle="-", color=color, lw=0.6, shrinkA=0, relpos=(0, 0.5))
        ax.annotate(name, (trained, value), (beside, place - y), textcoords="offset points", va="center",
                    fontsize=8, color=color, arrowprops=line if place - y > height else None)


def main(args):
    """Draws the picture from the files, writes it, and prints where."""
    draw = {"loss": loss, "spectra": spectra, "memory": memory, "codebooks": codebooks,
            "results": results}[args.kind]
    draw(args.files).savefig(args.output, dpi=160)
    print(args.output)


if __name__ == "__main__":
    run_main(main, ARGS)
