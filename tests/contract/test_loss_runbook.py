"""The Python of the page about the loss runs as it stands."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "runbooks" / "60-the-loss-by-itself.md"


def test_the_page_runs():
    torch.manual_seed(0)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3
    assert names["hidden"].grad.abs().sum() > 0
    assert names["head"].weight.grad.abs().sum() > 0
