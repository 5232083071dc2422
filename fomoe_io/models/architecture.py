"""What an architecture declares: the keys and tensors that it computes with, and its equations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fomoe_io.models import keys, rope, tensors
from fomoe_io.models.recorder import Matrix, Recorder, Rows, Vector, WeightSource
from fomoe_io.models.shape import Shape

if TYPE_CHECKING:
    from fomoe_io.storage.expert_layers import ExpertLayer
    from fomoe_io.storage.gguf import TensorInfo


class Build(Protocol):
    """What records an architecture's equations, for any backend."""

    def __call__(self, p: Recorder[Matrix, Vector, Rows], w: WeightSource[Matrix, Vector], s: Shape, /) -> None:
        """Tell `p` the ops of a model of these sizes, with the weights `w`."""
        ...


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of the architectures that run.

    Attributes
    ----------
    name : str
        general.architecture
    shape_of : callable
        (keys, resident tensors) -> Shape; FormatError when a key is missing or absurd.
    tensors : callable
        (shape, names of the tensors there are) -> each Tensor that is computed with.
    build : callable
        Records the equations.
    computed : frozenset of str
        Its keys beside those of every architecture.
    ignored : frozenset of str
        Keys without a part in its equations, whatever they say.
    fixed : mapping of str to tuple
        Keys that change the equations, with the values that do not: over those of every architecture.
    """

    name: str
    shape_of: Callable[[keys.Keys, Mapping[str, TensorInfo]], Shape]
    tensors: Callable[[Shape, Iterable[str]], Iterator[tensors.Tensor]]
    build: Build
    computed: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def check_keys(self, m: keys.Keys) -> None:
        """FormatError for a key that may change what the model computes and is not computed with."""
        m.check_known(
            keys.COMPUTED | rope.KEYS | self.computed | self.ignored, {**keys.FIXED, **rope.FIXED, **self.fixed}
        )


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be run, as `check_model` found it: its sizes, and what of its files is computed with."""

    architecture: Architecture
    shape: Shape
    resident: dict[str, TensorInfo]
    experts: dict[int, ExpertLayer]
