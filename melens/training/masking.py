"""A mask on a model in training: on fixed dims, on those with the largest gains at each step, or behind the ME layer.

A model that is trained from scratch has no ME layer yet, and gains that are all alike: the mask that one would put on
the trained model does not exist. So the dims follow the gains from step to step (`WeMask.install(refresh=True)`), and a
start counted from the ME layer follows it: the mask comes on when there is one, and moves where it moves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from melens.masks.dims import BY_GAIN
from melens.masks.hooks import InstalledMask
from melens.masks.mask import WeMask

__all__ = ["GrowingMask"]


@dataclass
class GrowingMask:
    """A mask for a model that is trained from scratch.

    Attributes:
        mask: not settled on a model.
        moves: a row each time it came on or moved: `step`, `me_layer` and `start`.
    """

    mask: WeMask
    moves: list[dict[str, Any]] = field(default_factory=list)
    _model: Any = None
    _looked: int = -1
    _installed: InstalledMask | None = None

    @property
    def follows(self) -> bool:
        """Whether it begins behind the ME layer, rather than at a block."""
        return isinstance(self.mask.start, str)

    def to_dict(self) -> dict[str, Any]:
        """Return the mask's arguments."""
        return self.mask.to_dict()

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Mask a model for as long as the context lasts, from now on or as soon as `look` finds an ME layer."""
        self._model = model
        if not self.follows:
            self._put_on(self.mask, 0, None)
        try:
            yield
        finally:
            if self._installed is not None:
                self._installed.remove()
            self._model = self._installed = None

    def look(self, step: int, me_layer: int | None) -> None:
        """Move the mask behind the ME layer of this step; where there is none, it stays where it was.

        A step before one that was looked at already changes nothing: a training that resumes looks at all of them.
        """
        is_new, self._looked = step > self._looked, max(step, self._looked)
        if not is_new or not self.follows or self._model is None or me_layer is None:
            return
        mask = self.mask.at(me_layer)
        if self.moves and mask.start == self.moves[-1]["start"]:
            return
        if self._installed is not None:
            self._installed.remove()
            self._installed = None
        self._put_on(mask, step, me_layer)

    def _put_on(self, mask: WeMask, step: int, me_layer: int | None) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The gains of ln1 .* are all alike")  # before the first step
            self._installed = mask.install(self._model, refresh=mask.select in BY_GAIN)
        self.moves.append({"step": step, "me_layer": me_layer, "start": mask.start})

    def end(self, step: int) -> None:
        """Forget a move at the last step: nothing was trained under it."""
        if self.follows and self.moves and self.moves[-1]["step"] == step:
            self.moves.pop()

    def moved_to(self, model: Any) -> WeMask | None:
        """Return the mask as it is now, on the dims that a model with the same weights has; None if it is not on."""
        if not self.moves:
            return None
        return (self.mask.at(self.moves[-1]["me_layer"]) if self.follows else self.mask).on(model)

    def table(self) -> pd.DataFrame:
        """Return `moves` as a table."""
        return pd.DataFrame(self.moves, columns=["step", "me_layer", "start"]).astype("Int64")
