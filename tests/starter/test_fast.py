"""Training computes the same whatever the processor is fast in."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from pochade.starter import fast  # noqa: E402
from pochade.starter.muon import Muon, orthogonal  # noqa: E402

torch.set_num_threads(1)


def test_muon_takes_the_steps_of_pytorchs() -> None:
    torch.manual_seed(0)
    shapes = ((8, 24), (24, 8), (16, 16))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    mine = Muon(ours, 0.01, 0.02, torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_float32_orthogonalizes_as_bfloat16_does(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact, rounded = orthogonal(matrix, torch.float32), orthogonal(matrix, torch.bfloat16)
    assert exact.dtype is torch.float32 and exact.shape == matrix.shape
    assert torch.linalg.svdvals(exact).sub(1).abs().max() < 0.4
    assert (exact - rounded.float()).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("features", "expected"),
    [(["avx2", "fma"], "float32"), (["avx2", "avx512_bf16"], "bfloat16"), (["asimd", "bf16"], "bfloat16")],
)
def test_bfloat16_is_used_where_the_processor_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, features: list[str], expected: str
) -> None:
    monkeypatch.setattr(fast, "cpu_features", lambda: features)
    assert fast.fast_dtype() is getattr(torch, expected)
    with fast.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is getattr(torch, expected)
