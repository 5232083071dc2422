"""The architectures that run: one small file each, which declares keys and tensors and records the equations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fomoe_io.errors import FormatError
from fomoe_io.models import deepseek2, glm4moe, gpt_oss, minimax_m2, qwen3moe, qwen3next, qwen35moe
from fomoe_io.models.architecture import Architecture, Model
from fomoe_io.models.keys import Keys
from fomoe_io.models.tensors import check_drafts, check_experts, check_tensors

if TYPE_CHECKING:
    from fomoe_io.storage.store import Store

__all__ = ["ARCHITECTURES", "Architecture", "Model", "check_model"]

_MODULES = (qwen3moe, qwen3next, qwen35moe, minimax_m2, glm4moe, gpt_oss, deepseek2)
ARCHITECTURES = {module.ARCHITECTURE.name: module.ARCHITECTURE for module in _MODULES}


def check_model(store: Store) -> Model:
    """Whether a store or GGUF is a model that can be run, from its metadata and tensors alone: no weight is read.

    Raises
    ------
    FormatError
        Its architecture is not supported, a key or tensor is missing or absurd, or one would change what the model
        computes and is not computed with here.
    """
    architecture = ARCHITECTURES.get(store.architecture)
    if architecture is None:
        raise FormatError(
            f"architecture {store.architecture[:60]!r} is not supported; this version runs "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    keys = Keys(store.metadata)
    architecture.check_keys(keys)
    shape = architecture.shape_of(keys, store.resident)
    shape.check()
    check_drafts(shape, store.resident, store.experts)
    declared = architecture.tensors(shape, store.resident)
    resident = check_tensors(declared, store.resident, shape, architecture.name)
    return Model(architecture, shape, resident, check_experts(store.experts, shape))
