"""The presets against published counts of parameters, and against what the counts do not show."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from model import GPT, PRESETS

# Parameters, the tied head once. Those of the Hugging Face hub's pages (and of keras-hub's presets for Gemma and Qwen3), as
# transformers 5.23 counts them in its own models of these sizes. Gemma's are of the text part; gpt2-medium's is the lecture's table.
PARAMETERS = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "opt-1.3b": 1_315_758_080, "tinyllama-1.1b": 1_100_048_384,
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952, "gemma-3-4b": 3_880_263_168, "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-3-mini": 3_821_079_552, "phi-4-mini": 3_836_021_760, "phi-4": 14_659_507_200,
    "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320,
}
# The shapes of BERT as decoders are nobody's models: V d + 512 d + L (12 d^2 + 13 d) + 2 d.
PARAMETERS |= {name: (30522 + 512) * d + L * (12 * d**2 + 13 * d) + 2 * d
               for name, L, d in (("bert-base", 12, 768), ("bert-large", 24, 1024))}


def test_every_preset_is_counted():
    assert PARAMETERS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):
        assert GPT(PRESETS[name]).num_params() == PARAMETERS[name]
