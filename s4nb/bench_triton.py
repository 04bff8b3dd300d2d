"""A program that does nothing but multiply and add: its rate is the ceiling of a GPU's float32 arithmetic."""
import triton
import triton.language as tl

__all__ = ["chains"]


@triton.jit
def chains(x_ptr, a, b, steps, BLOCK: tl.constexpr):
    "x -> a x + b, sixteen times in each of `steps`; a thread has BLOCK / 128 chains, which hide each other's latency."
    at = x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(at)
    for _ in range(steps):
        for _ in tl.static_range(16): x = x * a + b
    tl.store(at, x)
