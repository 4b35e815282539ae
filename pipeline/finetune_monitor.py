"""What is looked at after every epoch of a finetuning: val as the towers see it now, and whether they collapse."""

from collections.abc import Mapping

import torch

from ..heads.model import BaseHead
from .finetune_set_up import Live
from .monitor import Monitor
from .progress import Progress
from .splits import Split

# Above this mean cosine of two images the directions say hardly anything; towers of the miniature begin at 0.36.
ALIKE = 0.95
# ... and so much of the first distance to 1 that is left is a collapse.
LEFT = 0.5


class LiveMonitor:
    """As :class:`~mmcli.pipeline.monitor.Monitor`, of towers that change; says once if they make everything alike."""

    def __init__(self, live: Live, inner: Monitor, progress: Progress) -> None:
        self._live, self._inner, self.prior = live, inner, inner.prior
        self._progress, self._told = progress, False
        self._alpha = live.config.loss.cosine_weight
        self._first = alikeness(live.store.splits["val"])

    def __call__(self, head: BaseHead) -> dict[str, float]:
        """``val_mAP`` and facts of the codes, from towers as they are now; of trained ones how alike directions are."""
        store, sides = self._live.store, self._live.towers.sides
        if sides:
            self._live.shards.gather()
            store.renew()
        if "image" in sides:
            store.embed_images(self._inner.rows, None)
        if "text" in sides:
            store.embed_captions(self._inner.rows, None)
        if not sides:
            return self._inner(head)
        self._live.shards.scatter()
        found = self._inner(head) | alikeness(store.splits["val"])
        self._warn(found)
        return found

    def _warn(self, found: Mapping[str, float]) -> None:
        for name, first in self._first.items():
            # Towers that begin with a high one are no worse for it.
            collapsed = found[name] > ALIKE and 1 - found[name] < LEFT * (1 - first)
            if collapsed and self._alpha and not self._told:
                self._told = True
                self._progress.say(
                    f"warning: the directions of any two of val have a mean cosine of {found[name]:.2f} ({name}), at"
                    f" first {first:.2f}: the cosine term has no negatives and draws all of them together; lower"
                    " --alpha, 0 leaves it out"
                )


def alikeness(split: Split) -> dict[str, float]:
    """Mean cosine of the directions of any two images of a split, and of their first captions: ``|mean_n d_n|^2``."""
    given = {"img": split.v_img[split.rows], "txt": split.v_txt[split.rows, 0]}
    return {
        f"alike_{name}": float(torch.nn.functional.normalize(v.float(), dim=-1).mean(0).square().sum())
        for name, v in given.items()
    }
