"""The empty model, and the one place that knows transformers' private names.

Used of transformers (5.14 to 5.23): ``PreTrainedModel._from_config``, ``_get_dtype_plan``,
``_keys_to_ignore_on_load_unexpected``, ``_can_set_experts_implementation``, ``initialize_weights``,
``named_non_persistent_buffers``, ``tie_weights(missing_keys=)``, ``all_tied_weights_keys``,
``conversion_mapping.get_model_conversion_mapping``,
``core_model_loading.WeightRenaming.rename_source_key`` and ``core_model_loading.revert_weight_conversion``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, mismatch
from .reader import read_json
from .scheme import without_quantization

logger = logging.getLogger("fx_nvfp4.checkpoint")

# Implementations of experts that trace to one graph, the first by choice: it gathers each row once, whatever top-k is.
TRACEABLE_EXPERTS = ("grouped_mm", "batched_mm")

# Experts that multiply x @ weight but carry no is_transposed attribute.
_TRANSPOSED_EXPERTS = ("Llama4TextExperts", "GptOssExperts")
_INTERLEAVED_EXPERTS = ("GptOssExperts",)
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # as configs call the number of them


@dataclass(frozen=True)
class Layout:
    """How a module stores a weight: transposed, [.., K, N], and gate and up rows interleaved."""

    transposed: bool = False
    interleaved: bool = False


def build(config: Mapping[str, Any], dtype: torch.dtype | None, where: Path) -> Any:
    """The model that config.json describes, without weights (on the meta device).

    Args:
        config: config.json.
        dtype: of all that is not packed; None takes config.json's, or bfloat16.
        where: the config's file, for messages.

    Raises:
        CheckpointError: this transformers does not know the model.
        ImportError: transformers is not installed.
    """
    transformers = _transformers()
    plain = without_quantization(config)
    model_type = plain.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise mismatch(
            where,
            f"model_type {model_type!r}",
            f"one that transformers {transformers.__version__} knows",
            "install a newer transformers",
        )
    with _refusals(where, model_type):
        model_config = transformers.CONFIG_MAPPING[model_type].from_dict(plain)
    model_class = _model_class(transformers, plain, model_config, where)
    _set_dtype(model_config, dtype or _floating(model_config.dtype) or torch.bfloat16)
    with _refusals(where, model_type), torch.device("meta"):
        model = model_class._from_config(model_config, dtype=model_config.dtype)
    use_traceable_experts(model)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _refusals(where: Path, model_type: str) -> Iterator[None]:
    """Whatever transformers raises: it differs between versions, in types and in what is checked."""
    try:
        yield
    except Exception as error:
        found = f"what transformers refuses ({type(error).__name__}: {error})"
        raise mismatch(where, found, f"a config of {model_type}", "correct it") from error


def check_layers(config: Any, tensors: int, where: Path) -> None:
    """Refuse a config, or one nested in it, of more layers than there are tensors: they are built one by one.

    Raises:
        CheckpointError: it announces more.
    """
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        if key in _LAYERS and isinstance(value, int) and value > tensors:
            raise mismatch(
                f"{where}: {key}", value, f"{tensors} at most, as so many tensors are stored", "correct config.json"
            )
        check_layers(value, tensors, where)


def _model_class(transformers: Any, config: Mapping[str, Any], model_config: Any, where: Path) -> Any:
    names = config.get("architectures") or []
    if names:
        name = names[0] if isinstance(names, list) else names
        model_class = getattr(transformers, str(name), None)
    else:
        model_class = transformers.AutoModelForCausalLM._model_mapping.get(type(model_config), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        known = f"a model class of transformers {transformers.__version__}"
        raise mismatch(f"{where}: architectures", names, known, "correct it, or install a newer transformers")
    return model_class


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Set dtype in a config and those nested in it; models build their parts from the nested ones."""
    config.dtype = dtype
    for name in getattr(config, "sub_configs", {}):
        nested = getattr(config, name, None)
        if nested is not None:
            _set_dtype(nested, dtype)


def _floating(dtype: Any) -> torch.dtype | None:
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def use_traceable_experts(model: Any) -> list[str]:
    """Switch transformers' experts to an implementation that traces, in place; both are served by our ops.

    The others do not: eager loops over the experts hit, which depend on data; the rest call kernels of their own.

    Returns:
        For each model that was switched, what was done.
    """
    switched = []
    for module in model.modules():
        if not getattr(module, "_can_set_experts_implementation", lambda: False)():
            continue
        before = module.config._experts_implementation
        if before not in TRACEABLE_EXPERTS and any(hasattr(m, "_apply_gate") for m in module.modules()):
            module.set_experts_implementation(TRACEABLE_EXPERTS[0])
            switched.append(f"{type(module).__name__}: {TRACEABLE_EXPERTS[0]}, was {before}")
    for text in switched:
        logger.info("experts of %s: it traces to one graph", text)
    return switched


def tells_layout(module: torch.nn.Module) -> bool:
    """Whether :func:`experts_layout` knows how a module stores its weights, and does not assume it."""
    return hasattr(module, "is_transposed") or type(module).__name__ in _TRANSPOSED_EXPERTS


def experts_layout(module: torch.nn.Module) -> Layout:
    """How an experts module stores its 3-D weights."""
    name = type(module).__name__
    return Layout(
        getattr(module, "is_transposed", name in _TRANSPOSED_EXPERTS),
        not getattr(module, "is_concatenated", name not in _INTERLEAVED_EXPERTS),
    )


def renaming(model: Any) -> Callable[[str], str]:
    """transformers' own renaming of checkpoint names to the model's parameter names.

    Raises:
        CheckpointError: this transformers has no such mapping.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError as error:
        raise CheckpointError(
            f"transformers {_transformers().__version__} has no conversion_mapping.get_model_conversion_mapping, "
            "which names the model's parameters; use transformers 5.14 to 5.23"
        ) from error
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]

    def rename(name: str) -> str:
        for transform in renamings:
            name = transform.rename_source_key(name)[0]
        return name

    return rename


def original_form(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state dict under the names, and in the pieces, of its family's checkpoints; meta tensors will do."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))


def without_tied(model: Any) -> dict[str, torch.Tensor]:
    """A model's state dict, without copies; each tensor that is tied has one name, the one that checkpoints hold."""
    state = {name: getattr(value, "data", value) for name, value in model.state_dict(keep_vars=True).items()}
    tied = {target for target, source in model.all_tied_weights_keys.items() if source in state}
    return {name: tensor for name, tensor in state.items() if name not in tied}


def is_pretrained(model: Any) -> bool:
    """Whether it is a model of transformers."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return False
    return isinstance(model, PreTrainedModel)


def written_config(model: Any) -> dict[str, Any]:
    """A model's config.json, without what it says of quantisation."""
    config = without_quantization(json.loads(model.config.to_json_string()))
    return {**config, "architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}


def ignored_names(model: Any) -> Callable[[str], bool]:
    """Whether the model's class says that it has no use for a checkpoint tensor (rotary tables, extra layers)."""
    patterns = [re.compile(p) for p in (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq")]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def wanted_dtypes(model: Any) -> Callable[[str, torch.dtype], torch.dtype]:
    """The dtype for a parameter, given the one it was built in: some models keep a few of them in fp32."""
    plan = {re.compile(p.replace("*", ".*")): t for p, t in model._get_dtype_plan(model.config.dtype).items()}
    return lambda name, built: next((t for pattern, t in plan.items() if pattern.search(name)), built)


def initialize_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies.

    To be called while all parameters are still on meta, where initialising them is free.

    Raises:
        CheckpointError: the model's class left one of them without a value.
    """
    buffers = list(model.named_non_persistent_buffers())
    for name, buffer in buffers:
        # Computed on the CPU, so that every device gets the same bits.
        unset = torch.empty_like(buffer, device="cpu")
        set_tensor(model, name, unset.fill_(float("nan")) if _has_nan(unset) else unset.zero_())
    model.initialize_weights()
    for name, _ in buffers:
        value = model.get_buffer(name)
        if _has_nan(value) and torch.isnan(value).any():
            raise CheckpointError(
                f"{name}: {type(model).__name__} does not compute this buffer in _init_weights; "
                "this transformers version cannot build the model without weights, use another (5.14 to 5.23)"
            )
        set_tensor(model, name, value.to(device))


def _has_nan(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def set_tensor(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a parameter or buffer into its place."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def read_generation_config(model: Any, folder: Path) -> Any:
    """generation_config.json as transformers' GenerationConfig; None where there is none, or no use for it.

    Raises:
        CheckpointError: the file is no JSON object, or transformers refuses its values.
    """
    file = folder / "generation_config.json"
    if not file.is_file() or not model.can_generate():
        return None
    content = read_json(file)
    try:
        return _transformers().GenerationConfig.from_dict(content)
    except (ValueError, TypeError, AttributeError) as error:
        fix = "correct or delete the file"
        raise mismatch(file, f"values that transformers refuses ({error})", "a generation config", fix) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("fx_nvfp4.load builds models with transformers: pip install transformers") from error
    return transformers
