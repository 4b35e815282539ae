"""What is said where a finetuning does not have the memory it needs."""

from ... import InputError
from ..core.config import Config


def short_of_memory(config: Config, where: object) -> InputError:
    """The error for it, with the three things that would help most."""
    training = config.training
    parts = 2 * training.accumulation_steps
    size = max(1, training.batch_size * training.accumulation_steps // parts)
    checkpointing = "" if config.finetune.gradient_checkpointing else "--gradient-checkpointing, "
    less = "--unfreeze last-1 or --towers image" if config.finetune.gradient_checkpointing else "fewer --patches"
    return InputError(
        "out of memory", where=where,
        got=f"batches of {training.batch_size} in {training.accumulation_steps} parts"
        if training.accumulation_steps > 1
        else f"batches of {training.batch_size}",
        wanted="more memory",
        do=f"{checkpointing}--batch-size {size} --accumulation {parts} (the same batch, half at once), or {less};"
        " what was kept stays, and --resume goes on with the first two",
    )  # fmt: skip
