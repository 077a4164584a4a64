"""
Pictures of what runs leave on disk; needs matplotlib.

    python plot.py loss out/lora out/full -o loss.png         # training and validation loss
    python plot.py spectra out/lora -o spectra.png            # singular values of each layer's change
    python plot.py memory a.json b.json -o memory.png         # what `python memory.py ... --json` printed
    python plot.py codebooks [MODEL.safetensors] -o codes.svg # levels over a histogram of weights, with the error of each code
"""

import argparse
import json
import sys
from pathlib import Path

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")   # told apart in print


def figure(rows=1, columns=1, width=7.0, height=4.2, **kwargs):
    """(figure, axes) with thin, quiet frames."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plot.py needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": .25, "axes.axisbelow": True,
                         "font.size": 10, "axes.prop_cycle": plt.cycler(color=COLORS), "svg.fonttype": "none"})
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **kwargs)


def read_log(folder):
    """(steps, losses, steps, validation losses) from a run's log.jsonl."""
    path = Path(folder, "log.jsonl")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps, checks = [l for l in lines if "loss" in l], [l for l in lines if "val_loss" in l]
        return [l["step"] for l in steps], [l["loss"] for l in steps], [l["step"] for l in checks], [l["val_loss"] for l in checks]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is {folder} the folder of a run?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a log of train.py ({error})") from None


def loss(folders):
    """Training loss, thin and smoothed over 20 steps, and validation loss, thick with dots: one color a run."""
    fig, ax = figure()
    for folder, color in zip(folders, COLORS * len(folders)):
        steps, losses, checks, val = read_log(folder)
        smooth = [sum(losses[max(0, i - 19):i + 1]) / len(losses[max(0, i - 19):i + 1]) for i in range(len(losses))]
        ax.plot(steps, smooth, lw=.9, alpha=.55, color=color)
        ax.plot(checks, val, "o-", lw=2, ms=4.5, color=color, label=Path(folder).name)
    ax.set(xlabel="optimizer step", ylabel="loss (nats a token)", title="Loss: validation (dots) and training (thin, mean of 20 steps)")
    ax.legend(frameon=False)
    return fig


def spectra(folders):
    """Singular values of s B A of every LoRA layer, largest first; one panel a run."""
    import torch
    from lib.files import read_file
    fig, axes = figure(1, len(folders), 3.6 * max(len(folders), 2), 4.2, squeeze=False, sharey=True)
    for ax, folder in zip(axes[0], folders):
        path = Path(folder, "adapter.pt") if Path(folder).is_dir() else Path(folder)
        tensors = read_file(path)["tensors"]
        layers = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
        if not layers:
            raise ValueError(f"{path}: no LoRA in it, so no spectrum to draw")
        kinds = sorted({layer.split(".")[-1] for layer in layers})
        for layer in layers:
            A, B = (tensors[f"{layer}.{half}"].float() for half in "AB")
            values = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T)
            kind = kinds.index(layer.split(".")[-1])
            ax.plot(range(1, len(values) + 1), values, ".-", lw=1, alpha=.7, color=COLORS[kind])
        for kind, name in enumerate(kinds):
            ax.plot([], [], color=COLORS[kind], label=name)
        ax.set(xlabel="index", title=f"{Path(folder).name}: {len(layers)} layers", yscale="log")
        ax.legend(frameon=False, title="layer")
    axes[0, 0].set_ylabel("singular value of B A")
    return fig


def memory_files(files):
    """The reports in files that memory.py --json has printed, as one picture."""
    reports = []
    for path in files:
        try:
            report = json.loads(Path(path).read_text())
            reports += report if isinstance(report, list) else [report]
            assert all(isinstance(r["parts"], dict) for r in reports)
        except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
            raise ValueError(f"{path}: not what memory.py --json prints ({error})") from None
    return memory(reports)


GROUPS = {"cuBLAS workspace": "CUDA", "CUDA context": "CUDA", "weights float32": "weights, 16 or 32 bits", "weights bfloat16": "weights, 16 or 32 bits",
          **{part: "activations" for part in ("attention", "ffn", "norms", "residuals", "adapters", "embedding")}}


def memory(reports):
    """Stacked bars, one a report of memory.simulate; parts of a kind are put together."""
    grouped = []
    for report in reports:
        parts = {}
        for part, n in report["parts"].items():
            kind = GROUPS.get(part, "weights, 4 or 8 bits" if part.startswith("weights") else part)
            parts[kind] = parts.get(kind, 0) + n
        grouped.append({"parts": parts, "method": report["method"]})
    reports, order = grouped, ("weights, 16 or 32 bits", "weights, 4 or 8 bits", "adapter", "gradients", "optimizer states", "activations", "logits and loss", "temporaries", "CUDA")
    kinds = [kind for kind in order if any(kind in report["parts"] for report in reports)]
    fig, ax = figure(width=2 + 1.2 * max(len(reports), 3))
    bottom = [0.0] * len(reports)
    for kind, color in zip(kinds, COLORS * len(kinds)):
        heights = [report["parts"].get(kind, 0) / 1e9 for report in reports]
        ax.bar(range(len(reports)), heights, .65, bottom, color=color, label=kind)
        bottom = [b + h for b, h in zip(bottom, heights)]
    for i, total in enumerate(bottom):
        ax.text(i, total, f"{total:.3g}", ha="center", va="bottom")
    ax.set_xticks(range(len(reports)), [report["method"] for report in reports])
    ax.set(ylabel="GB at the peak", title="What the peak consists of")
    ax.margins(y=.08)
    ax.grid(axis="x", visible=False)
    ax.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", reverse=True)
    return fig


def codebooks(files):
    """The levels of each code over a histogram of weights divided by their block's absmax, with the error that each makes."""
    import torch
    import quant
    if files:
        from lib.files import read_tensors
        weights = torch.cat([t.float().flatten() for _, t in read_tensors(files[0]) if t.dim() == 2])
    else:
        weights = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    weights = weights[:len(weights) // 64 * 64]
    scaled = (weights.view(-1, 64) / weights.view(-1, 64).abs().amax(1, keepdim=True).clamp(min=1e-30)).flatten()
    schemes = [scheme for scheme in quant.SCHEMES if scheme in quant.LEVELS]
    fig, axes = figure(len(schemes), 1, 7, 1.9 * len(schemes), sharex=True)
    for ax, scheme in zip(axes, schemes):
        error = (quant.quantize(weights, scheme).dequantize() - weights).abs().mean() / weights.std()
        ax.hist(scaled.numpy(), 201, range=(-1, 1), density=True, color="#97bbf5")
        ax.vlines(quant.LEVELS[scheme], 0, ax.get_ylim()[1], color="#ff725c", lw=1.2)
        ax.set(title=f"{scheme}: mean error {error:.4f} of the deviation", ylabel="density")
        ax.grid(visible=False)
    axes[-1].set_xlabel(f"weight / largest magnitude of its block of 64 ({Path(files[0]).name if files else 'drawn from N(0, 1)'})")
    return fig


def save(picture, path):
    """Writes a figure as .png, .svg or .pdf, and prints where."""
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: a picture is .png, .svg or .pdf")
    picture.savefig(path, dpi=160)
    print(path)


def main(args):
    """Draws the picture from the files."""
    picture = {"loss": loss, "spectra": spectra, "memory": memory_files, "codebooks": codebooks}[args.kind]
    if not args.files and args.kind != "codebooks":
        raise ValueError(f"nothing to draw: python plot.py {args.kind} FILE_OR_FOLDER ... -o {args.output}")
    save(picture(args.files), args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("loss", "spectra", "memory", "codebooks"))
    parser.add_argument("files", nargs="*")
    parser.add_argument("-o", "--output", default="plot.png")
    ARGS = parser.parse_args()
    try:
        main(ARGS)
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)
