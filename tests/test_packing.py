"""Sequences side by side in one row: the same losses and gradients as one by one, whatever the method, the storage and the family."""

import json

import pytest
import torch

import data
import peft
import quant
from conftest import FAMILIES, tiny
from lib import checkpoint
from model import GPT

LENGTHS = [3, 9, 9, 1, 12]
OPTIONS = dict(rank=3, adapter_size=4, prefix_length=3, prompt_length=2)
CASES = [(method, {}) for method in peft.METHODS] + [("prefix", dict(prefix_style="after")), ("prefix+prompt", dict(prefix_style="after")), ("lora+prefix+adapter+ia3+prompt", {})]


def gradients(family, method, options, storage, packed, dtype):
    """The loss over all targets and the gradients of what the method trains."""
    torch.manual_seed(0)
    model = GPT(tiny(family), dtype)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    if storage:
        quant.store(model, storage)
    peft.apply(model, method, **OPTIONS | options)
    for _, p, trained in peft.parameters_by_method(model):
        if trained:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    model.to(dtype)
    rows = [torch.randint(61, (2, n), generator=torch.Generator().manual_seed(n + i)) for i, n in enumerate(LENGTHS)]
    if packed:
        tokens, targets = torch.cat(rows, 1).unsqueeze(1)
        loss = model(tokens, targets, lengths=LENGTHS)[1]
    else:
        loss = sum(model(tokens[None], targets[None])[1] * len(tokens) / sum(LENGTHS) for tokens, targets in rows)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(family, method, options, storage, dtype, bound):
    (packed_loss, packed), (loss, apart) = (gradients(family, method, options, storage, packed, dtype) for packed in (True, False))
    assert (packed_loss - loss).abs() <= bound * loss
    assert (packed - apart).norm() <= bound * apart.norm()


def has_biases(family):
    return any(name.endswith("bias") for name, _ in GPT(tiny(family)).named_parameters())


@pytest.mark.parametrize("method, options, family", [(method, options, family) for i, (method, options) in enumerate(CASES)
                                                     for family in (list(FAMILIES) * 2)[i % len(FAMILIES):][:3]])
def test_every_method(family, method, options):
    if method == "bitfit" and not has_biases(family) or method == "head" and tiny(family).tied:
        pytest.skip("this base has no such tensors")
    assert_same(family, method, options, None, torch.float64, 1e-12)
    if len(method.split("+")) == 1:
        assert_same(family, method, options, None, torch.float32, 1e-5)
        packed, apart, exact = (gradients(family, method, options, None, packed, dtype)[1]
                                for packed, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)))
        error, rounding = ((found - exact).norm() / exact.norm() for found in (packed, apart))
        assert error <= 2 * rounding + 1e-6      # what float32 costs depends on the processor, packed or not


@pytest.mark.parametrize("scheme", quant.CODES)
def test_every_storage(scheme):
    assert_same("gemma3", "lora+prefix+prompt", {}, quant.Storage(scheme, None if scheme == "int8" else 16), torch.float32, 1e-5)


def test_a_packed_batch():
    encoded = data.Encoded.of([([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 10], [0, 1]), ([11, 12, 13], [0, 1, 1])], 16)
    tokens, targets, lengths = next(data.Batches(encoded, 3, seed=1, packing=True))
    assert lengths == [1, 2, 3, 10] and tokens.shape == targets.shape == (1, 16)      # by length, then what makes it a multiple
    assert tokens.tolist() == [[9, 11, 12, 5, 6, 7] + [0] * 10]
    assert targets.tolist() == [[10, 12, 13, -1, 7, 8] + [-1] * 10]


def test_the_same_sequences_whether_packed_or_padded():
    encoded = data.Encoded.of([(list(range(1, n + 2)), [1] * (n + 1)) for n in (3, 9, 9, 1, 12, 5, 30)], 32)
    packed, padded = data.Batches(encoded, 2, seed=3, packing=True), data.Batches(encoded, 2, seed=3)
    for _ in range(9):
        (tokens, _, lengths), rows = next(packed), next(padded)
        whole = sum(lengths) - lengths[-1] if len(lengths) == 3 else sum(lengths)
        assert tokens[0, :whole].tolist() == [t for row, target in zip(*rows) for t, y in zip(row.tolist(), target.tolist()) if y >= 0]


@pytest.mark.parametrize("method", ["qlora", "prompt+prefix"])
def test_a_run(script, tmp_path, method):
    """The losses of a run with packing are those of one without; memory is predicted to the byte."""
    checkpoint.save_base(GPT(tiny("llama", vocab_size=300, block_size=128)), tmp_path / "base")
    texts = ["The cat sat." * (1 + i % 5) for i in range(24)]
    data.Tokenizer.train(texts, 300).save(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "completion": text}) + "\n" for i, text in enumerate(texts)))
    losses = []
    for packing in ("true", "false"):
        done = script("train.py", "--base", "base", "--data", "data.jsonl", "--method", method, "--packing", packing, "--max_iters", 4, "--eval_interval", 4,
                      "--batch_size", 4, "--gradient_accumulation_steps", 2, "--dtype", "float32", "--sample_count", 0, "--out_dir", f"out{packing}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.rpartition("(ratio ")[2].startswith("1.00)")          # at the last step; Adam's states come with the first
        lines = [json.loads(line) for line in (tmp_path / f"out{packing}" / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "lr" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
