"""How long a plan is likely to take, from trainings of the same store where there are any; else from one figure.

An estimate says what it rests on. Extractions and finetuning are not estimated: they depend on images and towers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ... import InputError
from ..core.metrics_file import read_history
from .ablate_plan import Plan, Training

# Train images a second of a head on two cores; README, the loop over bits.
IMAGES_PER_S = 10_000.0
# Of an evaluation: votes, metrics and intervals of 5,000 images, on two cores.
EVALUATION_S_PER_IMAGE = 6e-4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds, and what they rest on."""

    train_s: float
    evaluate_s: float
    basis: str

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.train_s + self.evaluate_s


def estimate(
    plan: Plan, missing: Iterable[Training], n_evaluations: int, runs: Mapping[str, Path], *, n_train: int, n_test: int
) -> Estimate:
    """Estimate what is still to be done.

    Args:
        plan: Everything that was asked for.
        missing: Trainings that are not there.
        n_evaluations: Evaluations that are not there.
        runs: Runs that are there.
        n_train: Train images of the store.
        n_test: Images that are evaluated.
    """
    known = [spent for key, folder in runs.items() if key in plan.trainings and (spent := seconds_of(folder)) > 0]
    heads = [one for one in missing if one.kind == "head"]
    if known:
        each, basis = median(known), f"the median of {len(known)} finished trainings of this plan"
        train_s = each * len(heads)
    else:
        basis = (
            f"{IMAGES_PER_S:,.0f} train images a second, every epoch of every training: early stopping makes it less"
        )
        train_s = sum(one.config.training.num_epochs * n_train / IMAGES_PER_S for one in heads)
    others = [one for one in missing if one.kind == "finetune"]
    basis += f"; {len(others)} trainings of towers are not estimated" if others else ""
    return Estimate(train_s=train_s, evaluate_s=n_evaluations * n_test * EVALUATION_S_PER_IMAGE, basis=basis)


def seconds_of(folder: Path) -> float:
    """Seconds of all epochs of a run; 0 where it does not say."""
    try:
        return float(sum(line["epoch_s"] for line in read_history(folder)))
    except (InputError, KeyError):
        return 0.0
