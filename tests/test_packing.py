"""Sequences side by side in one row: the same losses and gradients as one by one, whatever the method, the storage and the family."""

import pytest
import torch

import peft
import quant
from conftest import FAMILIES, tiny
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method, options", CASES)
def test_every_method(family, method, options):
    if method == "bitfit" and not has_biases(family):
        pytest.skip("no biases")
    assert_same(family, method, options, None, torch.float64, 1e-12)
    if len(method.split("+")) == 1:
        assert_same(family, method, options, None, torch.float32, 1e-6)


@pytest.mark.parametrize("scheme", quant.CODES)
def test_every_storage(scheme):
    assert_same("gemma3", "lora+prefix+prompt", {}, quant.Storage(scheme, None if scheme == "int8" else 16), torch.float32, 1e-5)
