"""The prompts of zero-shot tagging: templates with ``{}`` for the category's name, the default ones or a file's."""

from pathlib import Path

from ...errors import InputError, read_text

# A short ensemble in the manner of CLIP's (Radford et al. 2021, section 3.1.4); lower case, as SigLIP2 is trained.
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a photo of the {}.",
    "there is a {} in the photo.",
    "a {} in a scene.",
    "{}",
)
GAP = "{}"


def read_prompts(path: Path) -> tuple[str, ...]:
    """Templates of a UTF-8 file, one a line; empty lines are passed over.

    Raises:
        InputError: No such file, not text, no template, a line without exactly one ``{}``, or a line given twice.
    """
    do = "write one template a line, such as: a photo of a {}."
    lines = read_text(path, "cannot read prompts", wanted="a text file", do=do).splitlines()
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        template = line.strip()
        if not template:
            continue
        where = f"{path}, line {number}"
        if template.count(GAP) != 1:
            got = f"{template.count(GAP)} times {GAP} in '{template}'"
            raise InputError("not a prompt", where=where, got=got, wanted=f"{GAP} once, for the name", do=do)
        if template in line_of:
            got, wanted = f"the template of line {line_of[template]}", "each once"
            raise InputError("a prompt twice", where=where, got=got, wanted=wanted, do="leave one of them out")
        line_of[template] = number
    if not line_of:
        raise InputError("no prompts", where=path, got="an empty file", wanted="at least one template", do=do)
    return tuple(line_of)
