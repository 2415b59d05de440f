"""``prepare``: make a model's experts traceable and fast, in place, before it is compiled."""

from __future__ import annotations

import logging
import warnings

from torch import nn

from .checkpoints.skeleton import use_traceable_experts
from .preparation.candidates import check_list, count_owners, find_lists
from .preparation.convert import convert_torchao
from .preparation.fuse import Memo, fuse
from .preparation.record import LeftAlone, Preparation, Unsuited
from .report import NVFP4Warning
from .state_dict import keep_state_dicts_canonical
from .tensor import NVFP4Weight

log = logging.getLogger("fx_nvfp4")


def prepare(model: nn.Module) -> nn.Module:
    """Prepare a model with packed NVFP4 weights for ``torch.compile(model, backend="nvfp4_emu")``, in place.

    - transformers models run their experts as a grouped product, which traces, instead of as a loop, which does not.
    - torchao's NVFP4Tensor parameters become :class:`fx_nvfp4.NVFP4Weight`; codes are shared.
    - Lists of packed experts (ModuleList or ModuleDict, whatever the module around them is called and however it
      loops over them) become one :class:`fx_nvfp4.fused.FusedExperts` of 3-D weights, called once. The rest of that
      module, routing, shared experts and what it returns, stays. Weights are moved, one projection of one layer
      at a time, never copied as a whole.

    A list is fused only where the new forward gives what the old one gave, for random inputs of several sizes, with
    made-up experts and with the real ones; else it stays as it is, and a warning says why. Names of parameters
    change; ``model.nvfp4_preparation`` (a :class:`Preparation`) has the new and the old ones, and prints what
    was done. Call it after ``.to(device, dtype)``, in the mode (train or eval) that the model will run in, and before
    an optimiser takes its parameters. Calling it again changes nothing.

    Args:
        model: any module; the list's owner, or a module close around it, takes hidden states alone.

    Returns:
        The same model.
    """
    record = Preparation()
    record.converted = convert_torchao(model)
    if any(isinstance(p.data, NVFP4Weight) for p in model.parameters()):
        record.switched = use_traceable_experts(model)
    memo, owners = Memo(), count_owners(model)
    for path, container in find_lists(model):
        try:
            record.fused.append(fuse(model, check_list(path, container, owners), memo))
        except Unsuited as unsuited:
            record.left_alone.append(LeftAlone(path, unsuited.reason, unsuited.advice))
    keep_state_dicts_canonical(model)
    model.nvfp4_preparation = record  # type: ignore[assignment]
    log.info("%s", record)
    if record.left_alone:
        warnings.warn("\n".join(map(str, record.left_alone)), NVFP4Warning, stacklevel=2)
    return model
