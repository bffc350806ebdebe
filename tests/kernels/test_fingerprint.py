"""Whether tensors have changed, by their bits."""

import pytest
import torch

from ear_kernels.runtime.fingerprint import WORDS, Fingerprint
from tests.kernels.generator_fixtures import DEVICE


def tensors() -> list[torch.Tensor]:
    shapes = [(3,), (WORDS + 5,), (0,), (7, 9), (2 * WORDS,)]
    return [torch.randn(shape, device=DEVICE) for shape in shapes] + [torch.randn(6, 4, device=DEVICE).half().t()]


def test_a_change_of_any_bit_is_seen() -> None:
    values = tensors()
    fingerprint = Fingerprint(values)
    before = fingerprint()
    assert fingerprint() == before
    for tensor in values:
        if not tensor.numel():
            continue
        place = int(torch.randint(tensor.numel(), ()))
        words = tensor.data.t().reshape(-1) if not tensor.is_contiguous() else tensor.data.view(-1)
        bits = words.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        kept = bits[place].clone()
        bits[place] ^= 1 << int(torch.randint(15, ()))
        assert fingerprint() != before
        bits[place] = kept
        assert fingerprint() == before


def test_an_exchange_is_seen() -> None:
    values = torch.arange(10.0, device=DEVICE)
    fingerprint = Fingerprint([values])
    before = fingerprint()
    values.data[:2] = values[:2].flip(0)
    assert fingerprint() != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_sizes_that_no_word_of_32_bits_divides(dtype) -> None:
    values = [torch.randint(5, (size,), device=DEVICE).to(dtype) for size in (7, 1, 64)]
    fingerprint = Fingerprint(values)
    before = fingerprint()
    for tensor in values:
        tensor.data[-1] += 1
        assert fingerprint() != before
        tensor.data[-1] -= 1
        assert fingerprint() == before


def test_elements_with_gaps_and_none() -> None:
    gapped = torch.randn(4, 6, device=DEVICE)[:, ::2]
    fingerprint = Fingerprint([gapped, gapped.t()[:2], torch.zeros(0, device=DEVICE)])
    before = fingerprint()
    gapped.data[3, 2] += 1
    assert fingerprint() != before
    assert Fingerprint([])() == 0
