"""A few numbers of published networks' outputs, so that ours stay equal to them where there are no checkouts.

Weights and inputs are those of tests/model_pairs.py, without a random generator; float64. golden_models.json is written
by the published code:

    python -m tests.golden_models DIR     DIR: the folder with checkouts, see benches/peer_models.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benches.peer_models import tensors_in
from benches.peers import find_checkout
from tests.model_pairs import PAIRS, Pair, hashed, hashed_state

FILE = Path(__file__).with_suffix(".json")
SAMPLES = 6


def summary(outputs: list[Tensor]) -> list[list[float]]:
    """Of each output: its shape, its mean, its deviation, and some of its values."""
    return [
        [*output.shape, output.mean().item(), output.std().item(), *output.flatten()[_positions(output)].tolist()]
        for output in outputs
    ]


def _positions(output: Tensor) -> Tensor:
    share = (hashed("positions", SAMPLES) + 1) / 2
    return (share * output.numel()).long()


def of_published(pair: Pair, folder: Path) -> list[list[float]]:
    """From the checkout in ``folder``."""
    checkout = find_checkout(pair.repository, folder)
    assert checkout is not None, pair.repository
    assert pair.golden_size is not None
    inputs = pair.published_inputs(pair.inputs(pair.golden_size, 1))
    with pair.running(torch.zeros(())):
        network = with_hashed_weights(pair.published(checkout, pair.golden_size))
    with torch.no_grad(), pair.running(inputs[0]):
        return summary(tensors_in(network(*inputs)))


def of_ours(pair: Pair) -> list[list[float]]:
    """The same of our network."""
    assert pair.golden_size is not None
    with torch.no_grad():
        return summary(tensors_in(with_hashed_weights(pair.ours())(*pair.inputs(pair.golden_size, 1))))


def with_hashed_weights(network: nn.Module) -> Any:
    """The network in float64, for evaluation."""
    network = network.double().eval()
    network.load_state_dict(hashed_state(network.state_dict()))
    return network


def golden_pairs() -> list[Pair]:
    """Pairs with committed values."""
    return [pair for pair in PAIRS if pair.golden_size is not None]


def main() -> None:
    """Write the file."""
    values = {pair.name: of_published(pair, Path(sys.argv[1])) for pair in golden_pairs()}
    FILE.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
