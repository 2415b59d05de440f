"""Arithmetic on sizes ahead of a launch; Triton's functions of these names take microseconds on the host."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, which is positive."""
    return 1 << (n - 1).bit_length()
