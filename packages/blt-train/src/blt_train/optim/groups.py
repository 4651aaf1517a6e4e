"""Which parameters are treated alike: how much they decay, and which of them Muon takes.

Embeddings (of bytes, and the hash tables) are matrices by shape only: a row is learnt from the few positions that look
it up. The head is a matrix, but its output is no hidden state, so Muon leaves it to AdamW, as is customary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn

from blt_model.cross_attention import CrossAttention
from blt_model.hash_embedding import HashEmbedding
from blt_model.layers import SelfAttention, SwiGLU
from blt_train.config import OptimizerConfig


class Role(StrEnum):
    """What a parameter is to the optimizer."""

    MATRIX = "matrix"
    """Weight of a linear map between hidden states."""
    HEAD = "head"
    """Weight of the linear map to the logits."""
    EMBEDDING = "embedding"
    """Table whose rows are looked up."""
    VECTOR = "vector"
    """Scale of a norm, or a bias."""


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter with what the optimizer needs to know of it."""

    name: str
    """In the model."""
    parameter: nn.Parameter
    """Plain or sharded."""
    role: Role
    """What it is."""
    sections: tuple[int, ...]
    """Rows of the matrices that lie in it one below the other; a single number for one matrix."""


def members(model: nn.Module) -> list[Member]:
    """Return all parameters of a model, in its order.

    Args:
        model: without wrappers.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, HashEmbedding))}
    stacked: dict[int, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, SelfAttention):
            heads = (module.num_heads, module.kv_heads, module.kv_heads)
            stacked[id(module.query_key_value.weight)] = tuple(count * module.head_dim for count in heads)
        elif isinstance(module, SwiGLU):
            stacked[id(module.gate_value.weight)] = (module.gate_value.out_features // 2,) * 2
        elif isinstance(module, CrossAttention):
            stacked[id(module.key_value.weight)] = (module.key_value.out_features // 2,) * 2
    return [
        Member(name, parameter, _role(name, parameter, tables), stacked.get(id(parameter), (parameter.shape[0],)))
        for name, parameter in model.named_parameters()
    ]


def _role(name: str, parameter: Tensor, tables: set[int]) -> Role:
    if id(parameter) in tables:
        return Role.EMBEDDING
    if parameter.ndim < 2:
        return Role.VECTOR
    return Role.HEAD if "head" in name.split(".") else Role.MATRIX


def weight_decay_of(role: Role, config: OptimizerConfig) -> float:
    """Return the decoupled weight decay of a kind of parameter.

    Args:
        role: the kind.
        config: of the optimizer.
    """
    if role is Role.VECTOR:
        return 0.0
    return config.embedding_weight_decay if role is Role.EMBEDDING else config.weight_decay


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """Return the parameters that share a role, each group with its weight decay and, for matrices, their sections.

    Args:
        model: without wrappers.
        config: decays are read.

    Returns:
        For each role that occurs `params` in the model's order, `role`, `weight_decay` and `sections` (of each
        parameter).
    """
    groups: list[dict[str, object]] = []
    everything = members(model)
    for role in Role:
        chosen = [member for member in everything if member.role is role]
        if chosen:
            groups.append(
                {
                    "params": [member.parameter for member in chosen],
                    "role": role,
                    "weight_decay": weight_decay_of(role, config),
                    "sections": [member.sections for member in chosen],
                }
            )
    return groups
