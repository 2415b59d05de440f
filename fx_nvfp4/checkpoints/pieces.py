"""One packed weight as the tensors of a file: the inverse of what :mod:`.formats` reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensor import NVFP4Weight
from .errors import mismatch
from .formats import Convention
from .sources import Source


@dataclass(frozen=True)
class Piece:
    """What is stored as one packed weight.

    Attributes:
        name: of the module, or (fused) of the parameter.
        weight: canonical, [N, K] or (fused) [E, N, K].
        transposed: codes and block scales are stored [E, K/2, N] and [E, K/16, N].
    """

    name: str
    weight: NVFP4Weight
    fused: bool = False
    transposed: bool = False

    def tensors(self, convention: Convention) -> dict[str, Tensor]:
        """Codes and scales by their names in the file.

        Raises:
            CheckpointError: rows that share a global scale in this form have different ones.
        """
        scale = self._global_scale()
        parts = {
            "codes": self._turned(self.weight.qdata),
            "block_scale": self._turned(self.weight.block_scale.view(torch.uint8)).view(torch.float8_e4m3fn),
            "global_scale": reciprocal(scale).reshape(-1) if convention.reciprocal else scale,
        }
        if self.weight.act_scale is not None:
            scale = _as_one(self.weight.act_scale)
            parts["input_scale"] = (1.0 / scale).float().reshape(-1) if convention.reciprocal else scale.float()
        source = Source(self.name, self.fused)
        return {source.part_name(part, convention): tensor for part, tensor in parts.items()}

    def moves(self, convention: Convention) -> bool:
        """Whether the fp32 reciprocal that is stored leads back to a neighbour of the global scale."""
        scale = self.weight.global_scale[..., 0]
        return convention.reciprocal and not torch.equal(1.0 / reciprocal(scale), scale)

    def _turned(self, part: Tensor) -> Tensor:
        return part.mT.contiguous() if self.transposed else part

    def _global_scale(self) -> Tensor:
        """fp32 [], or [E] of experts that differ."""
        scale = self.weight.global_scale
        if not torch.equal(scale, scale[..., :1].expand(scale.shape)):
            raise mismatch(
                self.name,
                "rows with different global scales",
                "one for each weight, or each expert of a fused one, in a file",
                'NVFP4Config(global_scale="fused") gives gate and up of an expert one in common; '
                'producer="compressed-tensors" stores them apart',
            )
        return _as_one(scale[..., 0])


def _as_one(scale: Tensor) -> Tensor:
    """[] where all experts have the same scale."""
    first = scale.reshape(-1)[0]
    return first if bool((scale == first).all()) else scale


def reciprocal(scale: Tensor) -> Tensor:
    """The fp32 number whose reciprocal is scale; of several the roundest, as producers compute theirs in bfloat16."""
    near = 1.0 / scale
    candidates = torch.stack([near, *(torch.nextafter(near, torch.full_like(near, to)) for to in (0.0, torch.inf))])
    bits = candidates.view(torch.int32)
    trailing_zeros = (bits & -bits).double().log2()
    fitness = torch.where(1.0 / candidates == scale, trailing_zeros, -1.0)
    return candidates.gather(0, fitness.argmax(0, keepdim=True)).squeeze(0)
