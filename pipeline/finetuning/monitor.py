"""What is looked at after every epoch of a finetuning: val as the towers see it now, and whether they collapse."""

from collections.abc import Mapping

import torch

from ...heads.model import BaseHead
from ..core.progress import Progress
from ..training.data import Split
from ..training.monitor import Monitor
from .setup import Live

# Above this mean cosine of two images the directions say hardly anything; towers of the miniature begin at 0.36.
ALIKE = 0.95
# ... and so much of the first distance to 1 that is left is a collapse.
LEFT = 0.5


class LiveMonitor:
    """As :class:`~mmcli.pipeline.training.monitor.Monitor`, of towers that change; says once if they make everything alike.

    Every process of a team computes the head, and a GPU may round a sum differently each time. What is the best epoch
    and when to stop must not hang on that, so once an epoch all of them take the first one's weights and figures.

    Args:
        live: What is trained, and on what.
        head: The head in training.
        inner: Looks at a head.
        progress: Who to tell.
    """

    def __init__(self, live: Live, head: BaseHead, inner: Monitor, progress: Progress) -> None:
        self._live, self._head, self._inner, self.prior = live, head, inner, inner.prior
        self._progress, self._told = progress, False
        self._alpha = live.config.loss.cosine_weight
        self._first = alikeness(live.store.splits["val"])

    def __call__(self, head: BaseHead) -> dict[str, float]:
        """``val_mAP`` and facts of the codes, from towers as they are now; of trained ones how alike directions are."""
        self._take_weights(head)
        if not self._live.towers.sides:
            return self._take_figures(self._inner(head))
        self._embed()
        found = self._take_figures(self._inner(head) | alikeness(self._live.store.splits["val"]))
        self._warn(found)
        return found

    def _embed(self) -> None:
        store, sides = self._live.store, self._live.towers.sides
        self._live.shards.gather()
        store.renew()
        if "image" in sides:
            store.embed_images(self._inner.rows, None)
        if "text" in sides:
            store.embed_captions(self._inner.rows, None)
        self._live.shards.scatter()

    def _take_weights(self, head: BaseHead) -> None:
        """The first process's, of the head in training, its running average, and what of the towers all have whole."""
        shards = self._live.shards
        whole = [value for name, value in shards.local.items() if not shards.is_part(name)]
        heads = {id(one): one for one in (self._head, head)}.values()
        tensors = [tensor for one in heads for tensor in (*one.parameters(), *one.buffers())]
        self._live.team.broadcast_([*tensors, *whole])

    def _take_figures(self, found: Mapping[str, float]) -> dict[str, float]:
        values = torch.tensor(list(found.values()), dtype=torch.float64, device=self._live.team.device)
        self._live.team.broadcast_([values])
        return dict(zip(found, values.tolist(), strict=True))

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
