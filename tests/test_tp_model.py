import pytest
import torch

from model import GPT, GPTConfig
from ranks import alone, run_ranks
from tp_model import TensorParallelGPT

SMALL = GPTConfig(block_size=16, vocab_size=131, n_layer=2, n_head=5, n_embd=20)


def test_tp1_is_the_reference_bit_for_bit() -> None:
    idx = torch.randint(131, (3, 16))
    model = TensorParallelGPT(SMALL, alone())
    logits, _ = GPT(SMALL)(idx)
    mine, _ = model(idx)
    assert torch.equal(mine, logits)


def _against_reference(world, config):
    torch.manual_seed(0)
    idx, targets = torch.randint(config.vocab_size, (2, 3, config.block_size))
    targets[0, :5] = -1
    model, reference = TensorParallelGPT(config, world.tp), GPT(config)
    _, loss = model(idx, targets)
    _, expected = reference(idx, targets)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    return loss.item()


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5])
def test_loss(tp: int) -> None:
    print(run_ranks(tp, _against_reference, SMALL))
